"""Input-label contrast: each text against names, drawn negatives, new labels by their names, training and resuming."""

import json
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from counterpoint.cli import main
from counterpoint.contrast import scored_binary, scored_ranking
from counterpoint.data import labelled, texts
from counterpoint.errors import InputError
from counterpoint.evaluate.runs import evaluate
from counterpoint.methods.language.primer import InputLabel
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.train import Method, Run, fit, resume
from counterpoint.train.checkpoint import load_state

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
FOOD, PETS, SKY = (
    ("bread", "cheese", "soup", "rice"),
    ("dog", "cat", "hamster", "rabbit"),
    ("sun", "moon", "star", "cloud"),
)
ROWS = [(f"{frame} {word}", name) for name, words in (("food", FOOD), ("pets", PETS), ("sky", SKY))
        for word in words for frame in ("I see a", "there was some", "look at this")]  # fmt: skip
TABLE = {"text": [text for text, _ in ROWS], "label": [name for _, name in ROWS]}
SEVERAL = {
    "text": ["dog soup", "a dog", "cat and moon", "bread", "a star"],
    "labels": ["food|pets", "pets", "pets|sky", "food", "sky"],
}
OPTIONS = {"batch_size": 12, "optimizer": "adamw", "lr": 3e-3, "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed=0, cls=InputLabel, **options):
    torch.manual_seed(seed)
    return cls(**{"encoder": dict(TINY), "max_length": 40, "dropout": 0.0, **options}).train()


def embedded(method, sentences):
    ids = method.encoder.tokenizer(sentences, padding=True, return_tensors="pt")
    return method.head(method.encoder.pooled(ids["input_ids"], ids["attention_mask"]))


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("objective, loss", [("binary", scored_binary), ("ranking", scored_ranking)])
def test_a_step_by_hand(objective, loss):
    method = build(objective=objective, template="about {}")
    items = method.training_items(SEVERAL)
    assert items.classes == method.labels == ("food", "pets", "sky")
    batch = items.take(torch.tensor([0, 2, 3, 4]))
    text = embedded(method, [SEVERAL["text"][i] for i in (0, 2, 3, 4)])
    names = embedded(method, ["about food", "about pets", "about sky"])
    cosine = F.normalize(text, dim=1) @ F.normalize(names, dim=1).T
    positive = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1]]).bool()
    torch.testing.assert_close(method.loss(batch), loss((cosine - 0.3) / 0.1, positive))
    method.loss(batch).backward()
    for p in (method.temperature, method.threshold, *method.encoder.model.get_input_embeddings().parameters()):
        assert (p.grad is not None and p.grad.abs().sum() > 0) or objective == "ranking"


def test_negatives_are_drawn_among_what_a_text_is_not():
    method = build(negatives=2, sampling="frequency", labels=tuple("abcdefgh"))
    rows = [(f"text {i}", name) for i, name in enumerate("aaaaaaaaaaaabcdefgh" * 2)]
    items = method.training_items({"text": [t for t, _ in rows], "label": [n for _, n in rows]})
    share = torch.tensor([24.0, *[2.0] * 7])
    torch.testing.assert_close(method.noise, (share / share.sum()).log())
    positive = method.marked(torch.tensor([[1, 3], [7, -1], [0, -1]]).repeat(400, 1))
    drawn = method.negatives_of(positive)
    assert not (drawn & positive).any() and (drawn.sum(1) == 2).all()
    often = drawn[1::3].float().mean(0)
    assert often[0] > 0.85 and 0.1 < often[2] < 0.3  # a: nearly always one of two
    everything = build(labels=("a", "b"), negatives=2)
    assert torch.equal(everything.negatives_of(torch.eye(2).bool()), ~torch.eye(2).bool())
    assert items.take(torch.arange(3))["label"].shape == (3, 1)


def test_drawn_negatives_and_their_correction_enter_the_loss():
    method = build(negatives=1, correction=True)
    items = method.training_items(TABLE)
    batch = items.take(torch.tensor([0, 13, 30]))
    torch.manual_seed(5)
    found = method.loss(batch)
    torch.manual_seed(5)
    positive = method.marked(batch["label"])
    counted = positive | method.negatives_of(positive)
    assert (counted.sum(1) == 2).all()
    text, names = embedded(method, [TABLE["text"][i] for i in (0, 13, 30)]), embedded(method, ["food", "pets", "sky"])
    scores = (F.normalize(text, dim=1) @ F.normalize(names, dim=1).T - 0.3) / 0.1
    noise = torch.full((3,), -np.log(3)).float()
    torch.testing.assert_close(found, scored_binary(scores, positive, ignore=~counted, log_noise=noise))


@pytest.mark.parametrize(
    "options",
    [{"scorer": s} for s in ("dot", "distance", "bilinear", "match")]
    + [{"objective": "triplet"}, {"head": True}, {"label_texts": False, "labels": ("food", "pets", "sky")}],
)
def test_every_choice_can_be_trained_and_scores_names(options):
    method = build(**options)
    items = method.training_items(TABLE)
    method.loss(items.take(torch.arange(0, 36, 5))).backward()
    grown = [p for name, p in method.named_parameters() if not name.startswith("encoder.model.pooler")]
    assert all(p.grad is None or p.grad.isfinite().all() for p in grown)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.encoder.parameters())
    found = method.score_labels(["a dog", "some bread"], ["pets", "food", "weather"])
    assert found.shape == (2, 3) and method.training
    if options.get("label_texts", True):
        assert np.isfinite(found).all()
    else:
        assert np.isneginf(found[:, 2]).all() and np.isfinite(found[:, :2]).all()


# ------------------------------------------------------------------------------------------------------------- the data


def test_labels_that_training_may_not_use_are_left_out_with_their_texts():
    method = build(labels=("food", "sky"))
    items = method.training_items(SEVERAL)
    assert len(items) == 2 and items.take(torch.arange(2))["label"].tolist() == [[0, -1], [1, -1]]
    other = build(labels=("pets", "food"))
    assert other.training_items(SEVERAL).class_of.tolist() == [[1, 0], [0, -1], [1, -1]]
    assert len(build().training_items(TABLE, limit=10, seed=1)) == 10
    rows = texts.load({"text": ["a", "b", "c"], "label": ["x", "", "y"]})
    assert rows.class_of.tolist() == [[0], [-1], [1]] and len(build().training_items(rows_to_table(rows))) == 2


def rows_to_table(rows):
    names = ["|".join(rows.classes[i] for i in row if i >= 0) for row in rows.class_of]
    return {"text": rows.columns["anchor"], "labels": names}


def test_named_sets_hold_classes_out(monkeypatch):
    rows = [(f"{name} {i}", [name]) for i in range(40) for name in ("robotics", "genomics", "other", "more")]
    rows += [(f"both {i}", ["other", "robotics"]) for i in range(20)]
    classes = ("robotics", "genomics", "other", "more")
    monkeypatch.setitem(labelled.MAKERS, "arxiv-titles", lambda: (labelled.shared_out(rows), classes))
    monkeypatch.setitem(labelled.UNSEEN, "arxiv-titles", ("robotics", "genomics"))
    entire = {split: texts.load("arxiv-titles", split) for split in labelled.SPLITS}
    held = {split: texts.load(f"arxiv-titles-held:{split}") for split in labelled.SPLITS}
    assert sum(map(len, entire.values())) == 180 and len(entire["test"]) == 36
    assert held["test"].columns == entire["test"].columns and held["train"].classes == classes
    for split in ("train", "dev"):
        assert {2, 3} == set(held[split].class_of.flatten().tolist()) - {-1}
        assert set(held[split].columns["anchor"]) < set(entire[split].columns["anchor"])
    assert not set(entire["train"].columns["anchor"]) & set(entire["test"].columns["anchor"])
    with pytest.raises(InputError, match="has the splits train, dev, test, not 'valid'"):
        texts.load("arxiv-titles", "valid")
    with pytest.raises(InputError, match="too few classes to hold any out"):
        texts.load("subj-held")


# ---------------------------------------------------------------------------------------------------------------- runs


def write(path, table):
    rows = zip(*table.values(), strict=True)
    path.write_text("\n".join([",".join(table), *(",".join(row) for row in rows)]))
    return path


def test_names_are_learned_and_a_new_one_is_scored_by_its_name(tmp_path):
    """Labels that share letters with their texts: the new label's name is the only thing that says what it is."""
    random = np.random.default_rng(0)
    letters = "abcdefghijkl"
    rows = [("".join(random.choice([x, x, x, "z"], 12)), x * 6) for x in letters for _ in range(12)]
    data = write(tmp_path / "t.csv", {"text": [t for t, _ in rows], "label": [n for _, n in rows]})
    method = build(labels=tuple(x * 6 for x in letters[:9]), encoder="transformer-32-1", threshold=0.5)
    run = fit(method, data, run=tmp_path / "run", epochs=15, **{**OPTIONS, "lr": 5e-3})
    held = write(tmp_path / "h.csv", {"text": ["".join(random.choice([x, x, "z"], 14)) for x in letters * 4],
                                      "label": [x * 6 for x in letters * 4]})  # fmt: skip
    results = {
        (r.protocol, r.subject): r for r in evaluate(run, held, protocols=["zero-shot-text", "zero-shot-text-seen"])
    }
    assert results["zero-shot-text", "trained"].detail["labels"] == 3 and results["zero-shot-text", "trained"].n == 12
    assert results["zero-shot-text-seen", "trained"].value > 80
    assert results["zero-shot-text", "trained"].value > 70  # chance is 33
    assert {subject for _, subject in results} == {"trained", "untrained", "bag of words"}


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.csv", TABLE)
    options = "--encoder transformer-16-1 --max_length 40 --epochs 1 --batch_size 12 --optimizer adamw --progress false"
    assert main(["train", "primer", "--data", "t.csv", "--labels", "[food, pets]", "--run", "r", *options.split()]) == 0
    assert Run.open("r").config["model"]["labels"] == ["food", "pets"]
    write(tmp_path / "h.csv", {"text": [f"{text} too" for text in TABLE["text"]], "label": TABLE["label"]})
    assert main(["evaluate", "r", "--data", "h.csv", "--protocol", "zero-shot-text-seen"]) == 0
    found = json.loads((tmp_path / "r" / "evaluation.json").read_text())
    assert {r["subject"] for r in found} == {"trained", "untrained", "bag of words"} and found[0]["n"] == 24
    (tmp_path / "wrong.csv").write_text("text,label\na,b\na,b,c\n")
    assert main(["evaluate", "r", "--data", "wrong.csv", "--protocol", "zero-shot-text-seen"]) == 2
    assert "row 3 of wrong.csv has 3 cells" in capsys.readouterr().err
    assert main(["evaluate", "r", "--protocol", "zero-shot-text"]) == 2
    assert "holds no labelled texts that training did not see" in capsys.readouterr().err
    assert main(["train", "primer", "--data", "t.csv", "--run", "all", *options.split()]) == 0
    assert Run.open("all").config["model"]["labels"] == ["food", "pets", "sky"]  # found in the data, and recorded


def test_a_sentence_method_is_asked_about_all_labels(tmp_path):
    write(tmp_path / "t.csv", TABLE)
    run = fit(build(cls=SimCSE), tmp_path / "t.csv", run=tmp_path / "r", epochs=1, **OPTIONS)
    results = evaluate(run, tmp_path / "t.csv", protocols=["zero-shot-text"])
    assert len(results) == 3 and results[0].detail["labels"] == 3


@pytest.mark.parametrize("options", [{}, {"negatives": 1, "correction": True}])
def test_a_stopped_training_goes_on_exactly(tmp_path, monkeypatch, options):
    data = write(tmp_path / "t.csv", TABLE)
    fitting = {**OPTIONS, "epochs": 3, "checkpoint_seconds": 0}
    fit(build(dropout=0.1, **options), data, run=tmp_path / "entire", **fitting)
    step, seen = Method.training_step, []

    def stopping(self, *arguments):
        seen.append(1)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", stopping)
        assert fit(build(dropout=0.1, **options), data, run=tmp_path / "stopped", **fitting).interrupted
    resume(tmp_path / "stopped")
    one, two = (
        load_state(tmp_path / name / "checkpoints" / "last.safetensors")["state_dict"] for name in ("entire", "stopped")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert one["threshold"] != 0.3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build(template="about"), "does not name the label"),
        (lambda: build(scorer="cos"), 'no scorer named "cos"'),
        (lambda: build(objective="nce"), 'no objective of scores named "nce"'),
        (lambda: build(label_texts=False), "vectors in the place of names need to know the labels"),
        (lambda: build(labels=("a", "a")), "each label can be named once"),
        (lambda: build(negatives=0), "negatives must be 1 or more"),
        (lambda: build(temperature=0.0), "temperature must be 0.01 or more"),
        (lambda: build(sampling="even"), 'sampling must be "uniform" or "frequency"'),
        (
            lambda: build(labels=("food", "drink")).training_items(TABLE),
            "has the label drink; there are food, pets, sky",
        ),
        (lambda: build().training_items(["a text", "another"]), "has no labels: add a column label"),
        (lambda: build().training_items({"text": ["a", "b"], "label": ["x", "x"]}), "there is nothing to tell apart"),
    ],
)
def test_it_refuses(call, message):
    with pytest.raises(InputError, match=message):
        call()
