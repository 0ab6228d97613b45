"""Pages and README do what they say: their Python runs, their table is current."""

import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

from counterpoint import results

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[tuple[str, str]]:
    """(title, code) of every Python block of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r'^```python(?: title="([^"]+)")?\n(.*?)^```', text, re.S | re.M)


def test_the_identity_page_holds():
    names: dict = {}
    for _, code in blocks("core.md"):
        exec(code, names)


def test_adding_a_method_works_literally(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict = {}
    try:
        for title, code in blocks("adding-a-method.md"):
            if title:
                (tmp_path / title).write_text(code)
            else:
                exec(code, names)
        assert names["vectors"].shape[0] == 64 and (tmp_path / "runs" / "adaptive" / "config.yaml").is_file()
    finally:
        sys.modules.pop("mymethod", None)


def test_whatever_the_taxonomy_names_is_there():
    from counterpoint import contrast
    from counterpoint.evaluate import labels, pairs
    from counterpoint.evaluate import texts as sentences
    from counterpoint.memory.mined import NAMED

    text = (ROOT / "docs" / "taxonomy.md").read_text(encoding="utf-8")
    named = {*re.findall(r"`(counterpoint\.[\w.]+)`", text), *re.findall(r"^::: ([\w.]+)$", text, re.M)}
    assert len(named) > 35
    for name in named:
        module, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        assert inspect.getdoc(thing), name
    protocols = {*re.findall(r"`(\w[\w-]+)`", text.split("## How it is known to work")[1].split("## The functions")[0])}
    assert protocols == {*labels.PROTOCOLS, *sentences.PROTOCOLS, pairs.PAIR_F1}
    listed = text.split("The names `")[1].split("are objectives")[0]
    assert {*re.findall(r"(\w+)`", listed)} == contrast.PAIR_OBJECTIVES.keys()
    assert {*re.findall(r"--mined ([\w-]+)`", text)} == NAMED.keys()
    for function, argument in re.findall(r"`(\w+)=` (?:and `(?:\w+)=` )?of `counterpoint\.contrast\.(\w+)`", text):
        assert function in inspect.signature(getattr(contrast, argument)).parameters


def test_the_readme_table_is_current(monkeypatch):
    monkeypatch.delenv("COUNTERPOINT_RESULTS", raising=False)
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text = readme.README.read_text(encoding="utf-8")
    assert readme.written(text) == text, "run: python tools/readme.py"


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    """What builds the site, with records of this test alone."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    monkeypatch.setenv("COUNTERPOINT_RESULTS", str(tmp_path))
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_leaderboard_begins_with_what_learned_nothing_and_then_falls(hooks, tmp_path):
    assert hooks._leaderboard("vision-leaderboard", "linear-offline").startswith("*Not recorded yet.*")

    def row(name, linear, **more):
        spread = {"deviation": 0.5, "values": [linear]}
        return {
            "name": name,
            "knn-200-0.1": {"mean": 10.0, **spread},
            "linear-offline": {"mean": linear, **spread},
            **more,
        }

    cost = {"minutes": 1.25, "memory_mb": 1234, "items": 30_000}
    rows = [row("raw pixels", 20.0), row("untrained", 30.0)]
    rows += [
        row("simclr-cifar10-small", 40.0, **cost),
        row("swav-cifar10-small", 50.0, **cost),
        row("mine", 10.0, **cost),
    ]
    shared = {"data": "cifar10", "limit": 5000, "encoder": "convnet-16", "epochs": 6, "steps": None, "batch_size": 128}
    environment = {"device": "CPU, 1 threads", "torch": "9"}
    record = {"shared": shared, "seeds": [0], "rows": rows, "environment": environment}
    results.save(tmp_path / "comparisons" / "vision-leaderboard.json", record)
    (tmp_path / "comparisons" / "vision-leaderboard.svg").write_text("<?xml?><svg>dots</svg>")
    page = hooks._leaderboard("vision-leaderboard", "linear-offline, knn-200-0.1")
    table = [line for line in page.splitlines() if line.startswith("| ")][1:]
    names = ["untrained encoder", "raw pixels", "[SwAV](methods/swav.md)", "[SimCLR](methods/simclr.md)", "mine"]
    assert [line.split("|")[2].strip() for line in table] == names
    assert [line.split("|")[1].strip() for line in table] == ["", "", "1", "2", "3"]
    assert (
        "| 50.0 ± 0.5 | 10.0 ± 0.5 | 1.2 | 1,234 MB | 30,000 |" in page
        and "6 epochs, batch 128" in page
        and "<svg>dots</svg>" in page
    )
    assert "leaderboard.md" in hooks._compared("swav")[0] and hooks._comparisons() == "None recorded yet."


def test_a_method_s_page_shows_all_its_studies(hooks, tmp_path):
    """Those under its name and under longer ones, unless the longer one is another method's."""
    for stem, claim in (("mcl", "first"), ("mcl-dominant", "second"), ("clip-lit", "third")):
        record = {"verdict": "reproduced", "claim": claim, "effect": 1.0, "ci": [0.5, 1.5]}
        results.save(tmp_path / "studies" / f"{stem}.json", record)
    said = hooks._evidence("mcl")
    assert said.index("Claim: first") < said.index("### mcl-dominant") < said.index("Claim: second")
    assert "third" not in hooks._evidence("clip") and "Claim: third" in hooks._evidence("clip-lit")


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    page = (tmp_path / "site" / "methods" / "dcl.html").read_text(encoding="utf-8")
    assert "<math" in page and "temperature" in page and "FORMULA" not in page and ":math:" not in page
    everything = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")]
    assert not any(re.search(r'<(?:script|link|img)[^>]+(?:src|href)="?https?:', text) for text in everything)
