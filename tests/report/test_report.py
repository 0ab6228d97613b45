"""The report of a run: a page that holds what the run folder holds, and nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from counterpoint.errors import InputError
from counterpoint.report import figures, gallery, page, write
from counterpoint.report.charts import axis, number, smooth
from counterpoint.report.reading import Run, read

VOID = {"meta", "br", "link", "img", "input", "hr", "col", "wbr"}
SELF_CLOSING = {"line", "path", "rect", "image"}


class Page(HTMLParser):
    """Checks that tags are balanced and keeps text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID | SELF_CLOSING
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def metrics_lines(steps: int = 40) -> list[str]:
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {
            "step": step,
            "epoch": step / 10,
            "time": 2.0 * step,
            "loss": 5 - 3 * step / steps,
            "lr": 1e-3,
        }
        line["images_per_second"] = 1234.0
        if step % 4 == 0:
            share = step / steps
            line["positive"] = np.histogram(np.clip(rng.normal(0.9 * share, 0.1, 500), -1, 1), 50, (-1, 1))[0].tolist()
            line["negative"] = np.histogram(np.clip(rng.normal(0, 0.1, 500), -1, 1), 50, (-1, 1))[0].tolist()
            line |= {"alignment": 1 - 0.5 * share, "uniformity": -3 * share, "effective_rank": 5 + 40 * share}
        lines.append(json.dumps(line))
    return lines


def result(subject: str, value: float, **more: Any) -> dict[str, Any]:
    made = {"protocol": "one-shot-20way", "metric": "accuracy", "value": value, "ci": [value - 4, value + 4], "n": 400}
    return made | {"subject": subject, "detail": {"chance": 5.0}} | more


def make_gallery(
    folder: Path, count: int = 40, channels: int = 1, labelled: bool = True, **more: Any
) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    label = np.arange(count) % 4
    vector = np.eye(4)[label] + 0.3 * rng.normal(size=(count, 4))
    arrays: dict[str, Any] = {
        "image": rng.integers(0, 256, (count, channels, 12, 12), dtype=np.uint8),
        "vector": np.concatenate([vector, 0.05 * rng.normal(size=(count, 12))], axis=1).astype(np.float32),
    }
    if labelled:
        arrays |= {
            "label": label,
            "classes": np.array(["a", "b", "c", "d"]),
            "labels_used_in_training": np.array(False),
        }
    arrays |= more
    np.savez(folder / "gallery.npz", **arrays)
    return arrays


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(metrics_lines()) + "\n")
    (folder / "config.yaml").write_text(
        "method: simclr\nmodel: {encoder: convnet-32, temperature: 0.2}\ndata: omniglot\n"
        "labels_used_in_training: false\n"
        "command: counterpoint train simclr --data omniglot --seed 3\n"
    )
    (folder / "environment.json").write_text(
        json.dumps({"started": "2026-03-05T10:07:00", "device": "cpu (2 cores)", "versions": {"torch": "9.9.9"}})
    )
    (folder / "evaluation.json").write_text(
        json.dumps([result("trained", 78.2), result("untrained", 31.0), result("raw pixels", 22.0)])
    )
    make_gallery(folder)
    return folder


@pytest.mark.parametrize(("method", "title"), [("swav", "SwAV"), ("mcl", "MCL"), ("mine", "mine")])
def test_a_method_has_its_name_for_people(method, title):
    assert page.heading(Run(Path("run"), [], config={"method": method, "data": "cifar10"})) == f"{title} on cifar10"


def test_whole_page_holds_the_run(run: Path) -> None:
    path = write(run)
    assert path == run / "report.html"
    text = path.read_text()
    found = Page(text)
    for words in (
        "SimCLR on omniglot", "convnet-32", "5 March 2026, 10:07", "1 min 20 s", "cpu (2 cores)", "1,234",
        "trained 78.2 % · untrained 31.0 % · raw pixels 22.0 % on one-shot-20way",
        "47.2 points above", "74.2 to 82.2", "chance 5 %",
        "No label was used in training: classes below only colour the map and check the neighbours.",
        "temperature: 0.2", "versions.torch", "9.9.9", "counterpoint train simclr --data omniglot --seed 3",
    ):  # fmt: skip
        assert words in found.text, words
    order = [
        "SimCLR on",
        "78.2 %",
        "No label",
        "Loss",
        "Similarity of",
        "Geometry",
        "Map of",
        "Nearest neigh",
        "Settings",
    ]
    places = [found.text.index(words) for words in [*order, "Reproduce"]]
    assert places == sorted(places)
    assert len(text) < 3_000_000


def test_page_is_self_contained_and_described(run: Path) -> None:
    text = write(run).read_text()
    found = Page(text)
    for tag, attributes in found.tags:
        for name in ("src", "href", "poster", "data", "action", "srcset"):
            value = attributes.get(name)
            if value and tag != "a":
                assert value.startswith("data:"), (tag, name, value[:60])
        assert tag not in ("link", "iframe", "object", "embed", "base")
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert "@import" not in text
    assert "default-src 'none'" in text
    pictures = [a for t, a in found.tags if a.get("role") in ("img", "application")]
    assert len(pictures) >= 6 and all(a.get("aria-label") for a in pictures)
    assert all(a.get("type") == "button" for t, a in found.tags if t == "button")


def test_everything_from_outside_is_escaped(run: Path) -> None:
    evil = "</script><script>alert('\"x\"')</script>&amp;"
    (run / "config.yaml").write_text(
        json.dumps({"method": evil, "data": f"{evil}/{{{{script}}}}", "command": ["counterpoint", evil]})
    )
    (run / "environment.json").write_text(json.dumps({evil: {evil: evil}, "device": evil}))
    (run / "evaluation.json").write_text(json.dumps([result(evil, 50.0, protocol=evil, metric=evil)]))
    make_gallery(run, classes=np.array([evil, "b", 'c"', "<d>"]))
    text = write(run).read_text()
    found = Page(text)
    assert len(re.findall(r"<script", text)) == 2
    assert "alert(" in found.text
    assert "{{script}}" in found.text, "what the run holds is not read as a template"
    assert embedded(text)["gallery"]["classes"]["0"] == evil


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("evaluation.json", "78.2 %"),
        ("gallery.npz", "Map of the embedding"),
        ("environment.json", "5 March"),
        ("config.yaml", "counterpoint train"),
    ],
)
def test_part_without_its_file_is_left_out(run: Path, name: str, gone: str) -> None:
    (run / name).unlink()
    found = Page(write(run).read_text())
    assert gone not in found.text
    assert "Loss" in found.text


def test_only_a_loss(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n')
    text = write(tmp_path).read_text()
    found = Page(text)
    assert "From 1.50 to 1.50" in found.text
    for words in ("Similarity of", "Geometry", "took", "Map of", "Settings", "No label", "learning rate"):
        assert words not in found.text


def test_nothing_is_said_of_labels_unless_the_run_says_it(run: Path) -> None:
    (run / "config.yaml").unlink()
    make_gallery(run, labelled=False)
    assert "label was used" not in Page(write(run).read_text()).text
    (run / "config.yaml").write_text("labels_used_in_training: true\n")
    assert "Labels were used in training" in Page(write(run).read_text()).text


def test_killed_and_resumed_run(tmp_path: Path) -> None:
    lines = [json.dumps({"step": s, "loss": s, "time": t}) for s, t in ((1, 10), (2, 20), (3, 30), (4, 40))]
    again = [json.dumps({"step": s, "loss": 100 + s, "time": t}) for s, t in ((3, 5), (4, 9))]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "lo', *again, '{"step": 5, "loss": 7']))
    found = read(tmp_path)
    steps, values = found.series("loss")
    assert steps.tolist() == [1, 2, 3, 4]
    assert values.tolist() == [1, 2, 103, 104]
    assert found.seconds == 49
    write(tmp_path)


def test_not_a_number_leaves_the_page_whole(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.0}\n'
    )
    assert embedded(write(tmp_path).read_text())["charts"]["loss"]["step"] == [1, 3]


def test_missing_or_damaged_input_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        write(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no metrics"):
        write(tmp_path / "empty")
    (run / "gallery.npz").write_bytes(b"PK half")
    with pytest.raises(InputError, match=r"gallery\.npz"):
        write(run)
    make_gallery(run, label=np.zeros(3))
    with pytest.raises(InputError, match="one vector"):
        write(run)
    make_gallery(run)
    (run / "evaluation.json").write_text("[{")
    with pytest.raises(InputError, match=r"evaluation\.json"):
        write(run)


def test_failure_keeps_the_earlier_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(run).read_bytes()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n')

    def full(self: Path, data: str, encoding: str | None = None) -> int:
        with open(self, "w") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        write(run)
    assert (run / "report.html").read_bytes() == before
    assert not [p for p in run.iterdir() if "partial" in p.name]


def test_browser_gets_vectors_whose_cosines_are_those_of_the_run(run: Path) -> None:
    arrays = make_gallery(run, count=60, vector=np.random.default_rng(2).normal(1.0, 1.0, (60, 300)).astype(np.float32))
    text = write(run).read_text()
    data = embedded(text)["gallery"]
    coded = np.frombuffer(base64.b64decode(data["vector"]), np.int8).reshape(data["count"], data["size"]).astype(float)
    unit = arrays["vector"] / np.linalg.norm(arrays["vector"], axis=1, keepdims=True)
    short = coded / np.linalg.norm(coded, axis=1, keepdims=True)
    # Sixty vectors span at most sixty directions, so 128 lose nothing: centring or a wrong scale would show here.
    assert np.abs(short @ short.T - unit @ unit.T).max() < 0.015
    assert "from 300 to " in Page(text).text


def test_sprite_sheet_shows_each_image_in_its_place(run: Path) -> None:
    arrays = make_gallery(run, channels=3)
    data = embedded(write(run).read_text())["gallery"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["sprite"].split(",")[1]))).convert("RGB"))
    for index in (0, 7, 39):
        top, left = index // data["columns"] * data["side"], index % data["columns"] * data["side"]
        tile = picture[top : top + data["side"], left : left + data["side"]]
        assert np.array_equal(tile, arrays["image"][index].transpose(1, 2, 0))


def test_gallery_leaves_out_what_it_cannot_show(run: Path) -> None:
    vector = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    vector[3] = np.nan
    make_gallery(run, vector=vector)
    text = write(run).read_text()
    assert embedded(text)["gallery"]["count"] == 39
    assert "1 without a finite vector" in Page(text).text
    make_gallery(run, count=gallery.MOST + 20)
    items = gallery.read(run / "gallery.npz")
    assert items is not None and len(items.image) == gallery.MOST and items.total == gallery.MOST + 20


@pytest.mark.parametrize("count", [1, 2, 12])
def test_few_images_are_mapped_by_pca(run: Path, count: int) -> None:
    make_gallery(run, count=count)
    text = write(run).read_text()
    assert "placed by PCA" in Page(text).text
    assert np.isfinite(embedded(text)["gallery"]["place"]).all()


def test_equal_vectors_do_not_break_the_map(run: Path) -> None:
    make_gallery(run, vector=np.ones((40, 6), dtype=np.float32))
    assert np.isfinite(embedded(write(run).read_text())["gallery"]["place"]).all()


def test_map_is_the_same_each_time(run: Path) -> None:
    first = embedded(write(run).read_text())["gallery"]["place"]
    assert embedded(write(run).read_text())["gallery"]["place"] == first


def test_another_bundle_can_be_shown(run: Path, tmp_path: Path) -> None:
    make_gallery(tmp_path, count=17)
    assert embedded(write(run, tmp_path / "gallery.npz").read_text())["gallery"]["count"] == 17


def test_classes_of_many_alphabets_are_coloured_by_alphabet(run: Path) -> None:
    label = np.arange(40) % 20
    names = np.array([f"{'Greek' if k < 10 else 'Latin'}/{k}" for k in range(20)])
    make_gallery(run, label=label, classes=names)
    data = embedded(write(run).read_text())["gallery"]
    assert data["groups"] == ["Greek", "Latin"]
    assert data["group"] == [0 if k < 10 else 1 for k in label]


def test_agreement_of_neighbours_by_hand() -> None:
    angles = np.array([0.0, 0.1, 0.25, 2.0, 2.1, 2.25])
    vector = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found, chance = gallery.agreement(vector, np.array([0, 0, 1, 1, 1, 0]), k=1)
    # Nearest: 0-1, 1-0, 2-1, 3-4, 4-3, 5-4; same class: yes yes no yes yes no. Chance: 2 * 3*2 / (6*5).
    assert found == pytest.approx(4 / 6)
    assert chance == pytest.approx(0.4)


def test_order_of_pairs_is_the_area_under_the_roc() -> None:
    positive, negative = np.zeros(50), np.zeros(50)
    positive[[30, 40]] = 0.5
    negative[[30, 45]] = [0.8, 0.2]
    # 30 against 30 ties (half of 0.8), 40 beats 30 (0.8), both lose against 45.
    assert figures._order(positive, negative) == pytest.approx(0.5 * 0.4 + 0.5 * 0.8)
    assert figures.certain(0.99999) == "over 99.9\u00a0%" and figures.certain(1.0) == "100.0\u00a0%"


def test_interval_is_drawn_where_it_lies(run: Path) -> None:
    text = write(run).read_text()
    assert 'class="whisker" style="left:74.20%;width:8.00%"' in text
    assert 'class="dot" style="left:78.20%"' in text
    assert 'class="chance" style="left:5.00%"' in text
    (run / "evaluation.json").write_text(json.dumps([result("trained", 50.0, detail={"ways": 4})]))
    assert 'class="chance" style="left:25.00%"' in write(run).read_text()
    (run / "evaluation.json").write_text(json.dumps([result("trained", 50.0, detail={})]))
    assert 'class="chance"' not in write(run).read_text()


def test_metric_that_is_no_share_keeps_its_unit(run: Path) -> None:
    (run / "evaluation.json").write_text(json.dumps([result("trained", -2.5, metric="uniformity", ci=None, detail={})]))
    text = Page(write(run).read_text()).text
    assert "\N{MINUS SIGN}2.50" in text and "\N{MINUS SIGN}2.50 %" not in text and "\N{MINUS SIGN}2.5 %" not in text


def test_axis_and_numbers() -> None:
    assert [round(t, 9) for t in axis([0.13, 0.61]).ticks] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert axis([4.0, 4.0]).low < 4 < axis([4.0, 4.0]).high
    assert [number(v, 0.25) for v in (0, 0.25, -1.5)] == ["0", "0.25", "\N{MINUS SIGN}1.50"]
    assert number(12345.6) == "12,346" and number(2e-5) == "2e\N{MINUS SIGN}5"
    assert smooth(np.arange(100.0)) == pytest.approx(np.arange(100.0))


def test_template_has_no_place_left_empty() -> None:
    with pytest.raises(KeyError):
        page.fill("{{missing}}", title="x")


def with_scores(lines: list[str], **more: float) -> str:
    made = []
    for text in lines:
        line = json.loads(text)
        if "positive" in line:
            share = line["step"] / 40
            line |= {
                "score_positive": -1.5 + share,
                "score_negative": 0.1 - 0.05 * share,
                "score_negative_variance": 0.04,
            }
            line |= {"score_positive_variance": 0.25, "score_negative_soft": 0.3 * share, **more}
        made.append(json.dumps(line))
    return "\n".join(made) + "\n"


def test_scores_are_drawn_with_their_spread(run: Path) -> None:
    assert "Scores that enter the loss" not in Page(write(run).read_text()).text  # a run of before
    (run / "metrics.jsonl").write_text(with_scores(metrics_lines(400)))
    text = write(run).read_text()
    found = Page(text)
    assert (
        found.text.index("Similarity of")
        < found.text.index("Scores that enter the loss")
        < found.text.index("Geometry")
    )
    drawn = embedded(text)["charts"]["scores"]["plots"]["scores"]
    assert drawn["name"] == "positive" and drawn["values"][0] == pytest.approx(-1.4) and drawn["values"][-1] == 8.5
    assert [other["name"] for other in drawn["also"]] == ["negative", "negative, soft maximum"]
    assert drawn["also"][0]["values"][-1] == pytest.approx(-0.4) and drawn["also"][1]["values"][-1] == pytest.approx(3)
    assert drawn["y"][0] <= -1.4 - 0.5 and drawn["y"][1] >= 8.5 + 0.5  # room for the spread, off the range of a cosine
    assert text.count('class="band positive"') == text.count('class="band negative"') == 1
    assert "the positive lies 8.90 above the mean negative" in found.text


def test_scores_without_a_temperature_or_with_one_look(run: Path) -> None:
    lines = [json.loads(text) for text in with_scores(metrics_lines()).splitlines()]
    for line in lines:
        line.pop("score_negative_soft", None)
        line.pop("score_positive_variance", None)
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = write(run).read_text()
    assert "soft maximum" not in text and 'class="band positive"' not in text and 'class="band negative"' in text
    (run / "metrics.jsonl").write_text(json.dumps(lines[3]))
    assert "Scores that enter" not in write(run).read_text()


def test_page_says_where_the_shown_items_come_from(run: Path) -> None:
    with np.load(run / "gallery.npz") as file:
        held = {name: file[name] for name in file.files}
    np.savez(run / "gallery.npz", **held, origin=np.array("items <training> saw"))
    assert "They are items &lt;training&gt; saw." in write(run).read_text()
