"""The command line, end to end on tiny data: every command, every exit status, no traceback for bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from counterpoint import cli, recipes
from counterpoint.export import load_encoder
from counterpoint.methods import BASELINES, CATALOGUE
from counterpoint.train import Method, Run
from counterpoint.views import BYOL_1, HANDWRITING, SIMCLR

SMALL = ["--encoder", "convnet-4", "--projection", "[16, 8]", "--batch_size", "8", "--progress", "false"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTERPOINT_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path / "nothing"))
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)
    np.save("plain.npy", image)
    np.savez("d.npz", image=image, label=np.arange(40) % 4)
    return tmp_path


def photos(folder: str, classes=("cat", "dog"), each: int = 8, side: int = 20) -> str:
    random = np.random.default_rng(1)
    for name in classes:
        inside = Path(folder, name)
        inside.mkdir(parents=True)
        for i in range(each):
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(inside / f"{i}.png")
    return folder


def train(*options: str, name: str = "simclr", data: str = "d.npz", epochs: str = "1", run: str = "run") -> int:
    return cli.main(["train", name, "--data", data, *SMALL, "--epochs", epochs, "--run", run, *options])


def refused(capsys, *argv: str, status: int = 2) -> str:
    """What a command that cannot work says: one or two lines, no traceback."""
    try:
        code = cli.main([*argv])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == status, captured.err
    said = [line for line in captured.err.splitlines() if line.strip()]
    assert "Traceback" not in captured.err and 1 <= len(said) <= 3
    return captured.err


# ---- from training to files ------------------------------------------------------------------------------------------


def test_train_evaluate_report_embed_export_load(capsys):
    assert train("--seed", "3") == 0
    assert "run: trained; next: counterpoint evaluate run" in capsys.readouterr().out
    assert cli.main(["evaluate", "run"]) == 0
    said = capsys.readouterr().out
    for expected in ("knn-200-0.1", "linear-offline", "trained", "untrained", "raw pixels", "held out by us"):
        assert expected in said
    results = json.loads(Path("run/evaluation.json").read_text())
    assert {(result["protocol"], result["subject"]) for result in results} == {
        (protocol, subject)
        for protocol in ("knn-200-0.1", "linear-offline", "geometry")
        for subject in ("trained", "untrained", "raw pixels")
    }
    assert cli.main(["report", "run"]) == 0
    assert "<html" in Path("run/report.html").read_text().lower()
    assert cli.main(["embed", "run", "--data", "d.npz", "--out", "deep/v.npz"]) == 0
    vectors = np.load("deep/v.npz", allow_pickle=False)
    assert vectors["vector"].shape == (40, 32) and vectors["vector"].dtype == np.float32
    assert vectors["label"].tolist() == [i % 4 for i in range(40)] and vectors["classes"].tolist() == [*"0123"]
    assert cli.main(["export", "run", "--to", "safetensors"]) == 0
    assert "largest difference 0.0e+00" in capsys.readouterr().out
    encoder = load_encoder("run/encoder.safetensors")
    images = torch.from_numpy(np.load("d.npz")["image"])
    with torch.no_grad():
        np.testing.assert_allclose(encoder(images / 255).pooled, vectors["vector"], atol=1e-5)
    kinds = {file.suffix for file in Path("run").rglob("*") if file.is_file()}
    assert kinds == {".yaml", ".json", ".jsonl", ".safetensors", ".npz", ".html"}
    for file in Path("run").rglob("*.safetensors"):
        assert not file.read_bytes().startswith((b"\x80", b"PK"))
    np.load("run/gallery.npz", allow_pickle=False)["image"]
    np.load("run/gallery.npz", allow_pickle=False)["classes"]


@pytest.mark.parametrize("name", ["simclr", "moco", "byol", "simsiam", "dcl"])
def test_every_method_trains_from_the_command_line(name, capsys):
    assert train(name=name) == 0
    run = Run.open("run")
    assert run.config["method"] == name and run.config["model"]["image_size"] == 16
    assert run.config["command"].startswith(f"counterpoint train {name} --data d.npz")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", name, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for option in ("--data", "--epochs", "--sgd_momentum", "--projection", "--views.rotate", "--run"):
        assert option in said


def test_without_a_name_runs_are_numbered(capsys):
    for _ in range(2):
        assert cli.main(["train", "simclr", "--data", "plain.npy", *SMALL, "--epochs", "1"]) == 0
    assert sorted(folder.name for folder in Path("runs").iterdir()) == ["simclr-1", "simclr-2"]


def test_recipes_bring_their_settings_and_take_changes(monkeypatch):
    recipe = {"method": "dcl", "data": "d.npz", "encoder": "convnet-4", "image_size": 12, "epochs": 1, "batch_size": 8}
    monkeypatch.setitem(recipes.entries(), "mine", recipe | {"about": "x", "views": "handwriting", "temperature": 0.5})
    assert cli.main(["train", "mine", "--projection", "[16, 8]", "--views.rotate", "20", "--progress", "false"]) == 0
    config = Run.open("runs/mine-1").config
    assert (config["method"], config["data"], config["fit"]["epochs"]) == ("dcl", str(Path("d.npz").resolve()), 1)
    assert config["model"]["temperature"] == 0.5 and config["model"]["image_size"] == 12
    views = config["model"]["views"]
    assert views["rotate"] == 20 and views["crop"] is None and views["elastic"] == HANDWRITING.elastic


def test_images_smaller_than_the_default_are_seen_at_their_size(capsys):
    folder = photos("photos", side=20)
    assert train(data=folder) == 0
    assert Run.open("run").config["model"]["image_size"] == 20
    assert train("--image_size", "24", data=folder, run="larger") == 0
    assert Run.open("larger").config["model"]["image_size"] == 24


def test_demo_goes_from_training_to_report(capsys, monkeypatch):
    small = {**recipes.entries()["simclr-omniglot"], "encoder": "convnet-4", "limit": 512, "progress": False}
    monkeypatch.setitem(recipes.entries(), "simclr-omniglot", small)
    assert cli.main(["demo", "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert "one-shot-20way" in said and "raw pixels" in said and "61.2 %" in said
    assert Path("runs/demo-1/report.html").is_file()


# ---- configuration ---------------------------------------------------------------------------------------------------


def printed(capsys, *argv: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *argv, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_printed_configuration_gives_itself_again(capsys):
    options = ["--data", "d.npz", *SMALL, "--views", "handwriting", "--views.rotate", "20", "--lr", "1e-3"]
    first = printed(capsys, "simclr", *options, "--clip", "0.5", "--epochs", "1")
    assert first["views"]["rotate"] == 20 and first["views"]["crop"] is None and first["lr"] == 0.001
    assert first["image_size"] == 16, "the size that the training will take, not the method's default"
    Path("c.yaml").write_text(yaml.safe_dump(first))
    assert printed(capsys, "--config", "c.yaml") == first
    assert printed(capsys, "simclr", "--config", "c.yaml", "--epochs", "2") == {**first, "epochs": 2}
    assert cli.main(["train", "--config", "c.yaml", "--run", "run"]) == 0
    config = Run.open("run").config
    assert config["fit"] | config["model"] == {k: v for k, v in first.items() if k not in ("run", "data", "method")}


def test_the_configuration_of_a_run_trains_the_same_again(capsys):
    assert train("--views", "handwriting", name="moco", run="one") == 0
    assert cli.main(["train", "--config", "one/config.yaml", "--run", "two"]) == 0
    one, two = Run.open("one"), Run.open("two")
    assert {k: v for k, v in one.config.items() if k != "command"} == {
        k: v for k, v in two.config.items() if k != "command"
    }
    state = two.model().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.model().state_dict().items())


def test_named_views_and_single_changes(capsys):
    base = ["--data", "d.npz", *SMALL]
    plain = printed(capsys, "simclr", *base)
    assert plain["views"]["blur"] == SIMCLR.blur
    named = printed(capsys, "byol", *base, "--views", "simclr-small", "--other_views=handwriting")
    assert named["views"]["blur"] == 0 and named["other_views"]["crop"] is None
    single = printed(capsys, "byol", *base, "--views.grey", "0.5")
    assert single["views"]["grey"] == 0.5 and single["views"]["blur"] == BYOL_1.blur


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no configuration"),
        ("[1, 2]", "holds no configuration"),
        ("method: [", "cannot read the configuration"),
        ("method: simclr\nepochz: 3", "epochz.*did you mean epochs"),
        ("method: simclr\nviews: {rotat: 3}", 'ImageViews has no field "rotat"; did you mean rotate'),
        ("method: simclr\nviews: nonsense", 'no views named "nonsense"'),
        ("method: simclr\nlr: fast", "lr must be a number, not 'fast'"),
        ("method: simclr\nencoder: convnet-4\ntemperature: hot", "temperature must be a number, not 'hot'"),
    ],
)
def test_unusable_configuration_files(capsys, content, message):
    Path("c.yaml").write_text(content)
    said = refused(capsys, "train", "--config", "c.yaml", "--data", "d.npz")
    assert re.search(message, said), said
    assert "cannot read" in refused(capsys, "train", "--config", "absent.yaml")


# ---- stop and go on --------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(capsys, monkeypatch):
    original = Method.training_step

    def step(self, *arguments):
        if self.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", step)
        assert train() == 130
    assert "go on with: counterpoint train --resume run" in capsys.readouterr().err
    assert "temperature: 0.2 in the run, 0.3 now" in refused(capsys, "train", "--resume", "run", "--temperature", "0.3")
    assert "method: simclr in the run, dcl now" in refused(capsys, "train", "dcl", "--resume", "run")
    assert "views.flip" in refused(capsys, "train", "--resume", "run", "--views.flip", "0")
    assert "no option epochz; did you mean epochs" in refused(capsys, "train", "--resume", "run", "--epochz", "2")
    same = ["--temperature", "2e-1", "--projection", "[16, 8]", "--views", "simclr", "--data", "d.npz"]
    assert cli.main(["train", "simclr", "--resume", "run", *same]) == 0
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 1


def test_ctrl_c_outside_of_training_ends_with_130(capsys, monkeypatch):
    def interrupted(rest):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "report", (interrupted, ""))
    assert cli.main(["report", "x"]) == 130


def test_a_failed_check_ends_with_1(capsys):
    Path("golden").mkdir()
    np.savez("golden/case.npz", **{"in.x": np.zeros(3, np.float32), "out.y": np.zeros(3, np.float32)})
    Path("golden/case.json").write_text(json.dumps({"op": "nothing.like_it", "slug": "dcl"}))
    assert cli.main(["parity", "golden"]) == 1
    assert "0 passed, 1 failed" in capsys.readouterr().out


# ---- data that people have -------------------------------------------------------------------------------------------


def test_a_corrupt_file_is_left_out_and_named_once(capsys, caplog):
    folder = photos("photos")
    Path("photos/cat/0.png").write_bytes(b"not an image")
    assert train(data=folder) == 0
    told = [record.getMessage() for record in caplog.records if "could not be read" in record.getMessage()]
    assert len(told) == 1 and "1 of 16 files" in told[0] and "cat/0.png" in told[0]
    assert cli.main(["embed", "run", "--data", folder]) == 0
    vectors = np.load("vectors.npz")
    assert len(vectors["vector"]) == 15 and "cat/0.png" not in vectors["path"] and "dog/7.png" in vectors["path"]


def test_one_class_has_no_classification(capsys):
    folder = photos("photos", classes=("cat",), each=12)
    assert train(data=folder) == 0
    assert cli.main(["evaluate", "run"]) == 0
    assert {result["protocol"] for result in json.loads(Path("run/evaluation.json").read_text())} == {"geometry"}
    said = refused(capsys, "evaluate", "run", "--protocol", "linear-offline")
    assert "a linear probe needs at least two classes" in said


def test_an_unlabelled_folder_is_measured_by_its_geometry(capsys):
    folder = photos("photos", classes=(".",), each=12)
    assert train(data=folder) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", "run"]) == 0
    results = json.loads(Path("run/evaluation.json").read_text())
    assert [result["subject"] for result in results] == ["trained", "untrained", "raw pixels"]
    assert {result["metric"] for result in results} == {"effective rank"}
    before = Path("run/evaluation.json").read_text()
    said = refused(capsys, "evaluate", "run", "--protocol", "knn-200-0.1")
    assert f"knn-200-0.1 does not fit {Path('photos').resolve()}" in said
    assert Path("run/evaluation.json").read_text() == before


def test_other_data_can_be_evaluated(capsys):
    assert train(data="plain.npy") == 0
    assert cli.main(["evaluate", "run", "--data", "d.npz", "--protocol", "knn-200-0.1"]) == 0
    results = json.loads(Path("run/evaluation.json").read_text())
    assert {result["protocol"] for result in results} == {"knn-200-0.1"}


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("metods", 'no command "metods"; did you mean methods?'),
        ("train simclrr --data d.npz", 'no method or recipe named "simclrr"; did you mean simclr?'),
        ("train simclr-fashon", "did you mean simclr-fashion?"),
        ("train simclr", "needs data: --data"),
        ("train simclr --data d.npz --epoch 3", "no option --epoch; did you mean --epochs?"),
        ("train simclr --data d.npz --views.rotat=3", "did you mean --views.rotate?"),
        ("train simclr --data d.npz --views simclr-smal", "did you mean simclr-small?"),
        ("train simclr --data d.npz --views", "--views needs a value"),
        ("train simclr --data d.npz --epochs many", "epochs"),
        ("train simclr --data d.npz --epochs 0", "epochs must be at least 1"),
        ("train simclr --data d.npz --optimizer sdg", "sgd"),
        ("train simclr --data d.npz --projection [16]", "projection"),
        ("train simclr --data d.npz --projection [0,8]", "positive widths"),
        ("train simclr --data d.npz --encoder convent", "did you mean convnet?"),
        ("train simclr --data d.npz --objective ntxent", "did you mean nt_xent?"),
        ("train simclr --data d.npz --views.crop [0.5,2]", "crop is a share"),
        ("train simclr --data absent.npz", "no folder or file absent.npz"),
        ("train simclr --data fashion-mist", "did you mean fashion-mnist?"),
        ("train simclr --data empty", "empty/ holds no images"),
        ("train moco --data d.npz --queue 0", "size of at least 1"),
        ("train byol --data d.npz --momentum 2", "between 0 and 1"),
        ("train --resume empty", "empty is no run folder"),
        ("evaluate empty", "empty is no run folder"),
        ("evaluate", "required: run"),
        ("evaluate empty --protocl x", "did you mean --protocol?"),
        ("report empty", "no metrics"),
        ("report absent", "absent is not a run folder"),
        ("embed absent --data d.npz", "absent is no run folder"),
        ("embed absent", "required: --data"),
        ("export absent --to timm", "absent is no run folder"),
        ("compare", "required: NAME"),
        ("compare simclr --seeds a", "invalid int value"),
        ("compare simclr --epochz 3", "did you mean epochs"),
        ("compare simclr --epochs", "--epochs needs a value"),
        ("compare simclr --data d.npz --epochs many", "epochs must be a whole number, not 'many'"),
        ("compare simclr --data d.npz --optimizer sdg", "did you mean sgd?"),
        ("compare simclr --data d.npz --encoder convnet-4 --temperature hot", "temperature must be a number"),
        ("compare simclr --data d.npz --projection 3", "projection must be tuple[int, int], not 3"),
        ("compare simclr --views {rotat:", "cannot be read"),
        ("reproduce dlc", "did you mean dcl?"),
        ("reproduce dcl --budget tpu", 'no budget "tpu"'),
        ("parity absent", "absent"),
        ("methods --jsn", "did you mean --json?"),
    ],
)
def test_bad_input_is_one_sentence(capsys, argv, message):
    Path("empty").mkdir()
    assert message in refused(capsys, *argv.split())
    assert not Path("runs").exists()


def test_a_planned_method_says_so(capsys, monkeypatch):
    from counterpoint import methods

    monkeypatch.setattr(methods, "CATALOGUE", (methods.Entry(1, "later", "Later", "vision"),))
    assert 'method "later" is planned' in refused(capsys, "train", "later", "--data", "d.npz")


def test_a_run_that_exists_is_not_overwritten(capsys):
    assert train() == 0
    before = Path("run/checkpoints/last.safetensors").read_bytes()
    said = refused(capsys, "train", "simclr", "--data", "d.npz", *SMALL, "--run", "run")
    assert "run folder run exists" in said and "--resume run" in said
    assert Path("run/checkpoints/last.safetensors").read_bytes() == before


def test_damaged_runs_are_named(capsys):
    assert train() == 0
    file = Path("run/checkpoints/last.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    for command in (["evaluate", "run"], ["train", "--resume", "run"], ["export", "run", "--to", "safetensors"]):
        assert "is not a readable checkpoint" in refused(capsys, *command)
    file.unlink()
    assert "no checkpoint at" in refused(capsys, "embed", "run", "--data", "d.npz")
    file.write_bytes(content)
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace("convnet-4", "convnet-8"))
    assert "does not belong to run/config.yaml" in refused(capsys, "evaluate", "run")
    config.write_text("method: {")
    assert "config.yaml is damaged" in refused(capsys, "evaluate", "run")


def test_export_refuses_what_it_cannot_do(capsys):
    assert train() == 0
    assert 'cannot export to "tim"; there are safetensors, onnx, timm' in refused(
        capsys, "export", "run", "--to", "tim"
    )
    assert "convnet-4 is not a timm model" in refused(capsys, "export", "run", "--to", "timm")


def test_divergence_is_a_sentence(capsys, monkeypatch):
    original = Method.training_step

    def step(self, *arguments):
        return original(self, *arguments) * (float("nan") if self.global_step == 2 else 1)

    monkeypatch.setattr(Method, "training_step", step)
    said = refused(capsys, "train", "simclr", "--data", "d.npz", *SMALL, "--epochs", "1", "--run", "run")
    assert "at step 4 " in said and "lower lr" in said  # the weights of step 3 are NaN, so the loss of step 4 is


# ---- lists and help --------------------------------------------------------------------------------------------------


def test_methods_as_json_are_the_49(capsys):
    Path("results/studies").mkdir(parents=True)
    Path("results/parity.json").write_text(json.dumps({"dcl": {"passed": 3, "failed": 1}}))
    Path("results/studies/dcl.json").write_text(
        json.dumps({"verdict": "not_reproduced", "effect": 1.5, "ci": [-1, 4], "claim": "x"})
    )
    assert cli.main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["number"] for row in rows] == list(range(1, 50))
    keys = {"number", "slug", "title", "domain", "status", "parity", "study"}
    assert all(set(row) == keys and row["status"] in ("planned", "ready") for row in rows)
    dcl = next(row for row in rows if row["slug"] == "dcl")
    assert dcl["parity"] == {"passed": 3, "failed": 1} and dcl["number"] == 28
    record = {"verdict": "not_reproduced", "effect": 1.5, "ci": [-1, 4], "record": "studies/dcl.json"}
    assert dcl["study"] == record
    assert all(row["parity"] is None and row["study"] is None for row in rows if row["slug"] != "dcl")
    assert cli.main(["methods"]) == 0
    said = capsys.readouterr().out
    assert all(entry.slug in said for entry in (*BASELINES, *CATALOGUE))
    assert "3/4" in said and "not reproduced" in said


def test_help_names_every_command(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        said = capsys.readouterr().out
        assert all(f"  {name} " in said for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    for name in cli.COMMANDS:
        code = 0
        try:
            code = cli.main([name, "--help"])
        except SystemExit as stop:
            code = stop.code
        assert code == 0 and "usage: counterpoint" in capsys.readouterr().out
    assert cli.main(["train"]) == 2


LIGHT = """
import sys, time
from counterpoint import cli
for argv in (["--help"], ["methods"], ["methods", "--json"], ["nonsense"]):
    cli.main(argv)
heavy = {"torch", "lightning", "timm", "sklearn", "numpy", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_the_first_look_is_fast_and_imports_nothing_heavy():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", LIGHT], check=True, capture_output=True, env=environment)
    for argv in (["--help"], ["methods"]):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "counterpoint.cli", *argv], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        assert min(times) < 0.5


# ---- experiments -----------------------------------------------------------------------------------------------------


def test_compare_prints_a_table_and_writes_a_plot(capsys):
    argv = ["compare", "simclr", "dcl", "--data", "d.npz", *SMALL, "--epochs", "1", "--image_size", "16"]
    assert cli.main([*argv, "--lr", "1e-3", "--seeds", "0", "1", "--out", "c", "--record", "tiny"]) == 0
    said = capsys.readouterr().out
    columns = ("minutes", "memory MB", "knn-200-0.1", "each training saw")
    for row in ("raw pixels", "untrained", "simclr", "dcl", *columns):
        assert row in said
    assert Path("c/comparison.svg").read_text().lstrip().startswith("<?xml")
    record = json.loads(Path("results/comparisons/tiny.json").read_text())
    assert record["seeds"] == [0, 1] and [row["name"] for row in record["rows"]][:2] == ["raw pixels", "untrained"]
    assert Run.open("c/dcl-seed1").config["fit"]["lr"] == 0.001
    assert "holds another configuration (other temperature)" in refused(
        capsys, *argv, "--lr", "1e-3", "--seeds", "0", "--out", "c", "--temperature", "0.5"
    )


def test_reproduce_prints_the_verdict(capsys, monkeypatch):
    studies = import_module("counterpoint.studies.reproduce")  # the package gives its name to the function
    study = studies.Study(
        slug="dcl",
        claim="a claim",
        metric="knn-200-0.1",
        effect="method - baseline",
        expect=["method - baseline > 200"],
        seeds=[0, 1, 2],
        budgets={"cpu": {arm: {"recipe": slug, **TINY} for arm, slug in (("baseline", "simclr"), ("method", "dcl"))}},
        over={},
    )
    monkeypatch.setattr(studies, "entries", lambda: {"dcl": study})
    assert cli.main(["reproduce", "dcl", "--out", "s"]) == 0
    said = capsys.readouterr().out
    assert "a claim" in said and "fails" in said and "dcl: not reproduced" in said
    assert json.loads(Path("results/studies/dcl.json").read_text())["verdict"] == "not_reproduced"
    assert cli.main(["reproduce", "dcl", "--out", "s", "--seeds", "0", "--no-save"]) == 0
    assert "(one seed: no interval)" in capsys.readouterr().out


TINY = {
    "data": "d.npz",
    "encoder": "convnet-4",
    "image_size": 16,
    "projection": [16, 8],
    "epochs": 1,
    "batch_size": 8,
    "progress": False,
}
