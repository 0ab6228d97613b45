"""Fine-tuning on text: loss, pairs, classes by name, where it starts, its parts and their stages after a stop, evaluation."""

import csv
import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from counterpoint import cli
from counterpoint.data import texts
from counterpoint.encoders.perturbed import Sift
from counterpoint.errors import InputError
from counterpoint.evaluate.runs import evaluate
from counterpoint.export import export
from counterpoint.memory.labels import Refinement, Transduction
from counterpoint.methods.language.fine_tuning_text import FineTuningText
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.methods.language.vega import Vega
from counterpoint.train import Run, fit, resume
from counterpoint.train.checkpoint import load_state

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
OPTIONS = {"batch_size": 8, "optimizer": "adamw", "lr": 3e-3, "progress": False, "log_every": 1}
WHO, WHAT = ("Ann", "the cat", "a dog", "Bob"), ("runs", "sleeps", "is here", "eats")
ROWS = [
    (f"{who} {what} {where}", label) for who in WHO for what in WHAT for where, label in (("xx", "far"), ("oo", "near"))
]


def write(path, rows, titles=("sentence", "label")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([titles, *rows])
    return str(path)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        "other.csv",
        [(f"she {what} {where}", label) for what in WHAT for where, label in (("xx", "far"), ("oo", "near"))],
    )
    return write("d.csv", ROWS)


def build(seed=0, **options):
    torch.manual_seed(seed)
    return FineTuningText(**{"encoder": dict(TINY), "max_length": 24, "classes": ("near", "far"), **options}).train()


def batch_of(method, rows=8):
    return method.read("d.csv").take(torch.arange(rows))


def states(*folders):
    return [load_state(Run.open(folder).checkpoint)["state_dict"] for folder in folders]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_it_is_the_cross_entropy_of_a_linear_classifier_on_the_vector():
    method = build(dropout=0.0, classifier_dropout=0.0)
    batch = batch_of(method)
    assert batch["label"].tolist() == [[1], [0]] * 4  # far and near, as the model numbers them
    scores = method.classifier(method.encoder(batch["input_ids"], batch["attention_mask"]).pooled)
    found = method.loss(batch)
    assert found.keys() == {"cross entropy"}
    torch.testing.assert_close(found["cross entropy"], F.cross_entropy(scores, batch["label"][:, 0]))
    found["cross entropy"].backward()
    assert all(p.grad is not None for p in method.parameters())
    torch.testing.assert_close(method.eval().class_scores(batch), scores)


def test_sift_adds_its_term_and_keeps_the_rest():
    method = build(dropout=0.0, classifier_dropout=0.0, sift=Sift(weight=3.0))
    batch = batch_of(method)
    torch.manual_seed(4)
    found = method.loss(batch)
    plain = build(dropout=0.0, classifier_dropout=0.0).loss(batch)
    torch.testing.assert_close(found["cross entropy"], plain["cross entropy"], rtol=1e-3, atol=1e-4)
    torch.manual_seed(4)
    penalty = Sift(weight=3.0)(method.encoder, lambda: method.class_scores(batch))[1]
    torch.testing.assert_close(found["smoothness"], penalty)
    assert found["smoothness"] > 0


def test_pairs_are_read_as_one_row_with_segments():
    method = build().eval()
    pairs = [("a dog", "a cat", "near"), ("b", "c", "far")]
    items = method.read(texts.load(write("p.csv", pairs, ("sentence1", "sentence2", "label")), classes=True))
    batch = items.take(torch.arange(2))
    tokens = method.encoder.tokenizer("a dog", "a cat", return_token_type_ids=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == tokens["input_ids"][0].tolist()
    hidden = method.encoder.model(**tokens).last_hidden_state.mean(1)
    torch.testing.assert_close(method.embed(batch)[:1], hidden)
    assert method.encode("p.csv").shape == (2, 16) and method.classify("p.csv").shape == (2,)
    with pytest.raises(InputError, match="has 3 sentences in a row, but a class is of one or of two"):
        method.encode([("a", "b", "c")])


def test_every_row_gets_a_vector_and_a_class_in_its_place():
    method = build()
    data = ["a longer sentence", "", "b", "b"]
    vectors, found = method.encode(data, batch_size=2), method.classify(data, batch_size=2)
    assert vectors.shape == (4, 16) and np.array_equal(vectors[2], vectors[3])
    scores = method.classifier(torch.from_numpy(vectors))
    assert found.tolist() == scores.argmax(1).tolist()


# ---- where it starts -------------------------------------------------------------------------------------------------


def earlier(folder="earlier", cls=SimCSE, **options):
    torch.manual_seed(5)
    return fit(
        cls(encoder={**TINY, "num_hidden_layers": 2}, max_length=24, **options),
        "d.csv",
        run=folder,
        epochs=1,
        **OPTIONS,
    )


@pytest.mark.parametrize(("cls", "options"), [(SimCSE, {"pooling": "first-last"}), (Vega, {"mask_rate": 0.3})])
def test_it_starts_from_a_run_on_sentences(cls, options):
    run = earlier(cls=cls, **options)
    method = build(encoder=None, start="earlier")
    assert same(method.encoder.state_dict(), run.model().encoder.state_dict())
    assert method.encoder.pooling == run.model().encoder.pooling and method.arguments["layers"] == 2
    tuned = fit(method, "d.csv", run="tuned", epochs=1, **OPTIONS)
    shutil.rmtree("earlier")
    assert same(Run.open("tuned").model().state_dict(), tuned.method.state_dict())


def test_it_starts_from_its_own_kind_with_a_new_classifier():
    fit(build(), "d.csv", run="one", epochs=2, **OPTIONS)
    method = build(encoder=None, start="one", classes=3)
    assert same(method.encoder.state_dict(), Run.open("one").model().encoder.state_dict())
    assert method.classifier.out_features == 3


def test_an_export_serves_where_it_says_how_to_build_its_encoder():
    torch.manual_seed(0)
    run = fit(SimCSE(encoder="transformer-32-1", max_length=24), "d.csv", run="named", epochs=1, **OPTIONS)
    path, _ = export(run, "safetensors")
    assert same(build(encoder=None, start=str(path)).encoder.state_dict(), run.model().encoder.state_dict())
    path, _ = export(earlier(), "safetensors")
    with pytest.raises(InputError, match="does not say how to build its encoder: name the run that trained it"):
        build(encoder=None, start=str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "nowhere"}, "start is nowhere, but there is no such run or file"),
        ({"start": "earlier", "layers": 1}, "layers is 1, but earlier was trained with 2: leave layers out"),
        ({"start": "earlier", "encoder": "bert-base-uncased"}, "encoder is bert-base-uncased, but earlier"),
        ({"classes": 1}, "classes are two or more"),
        ({"classes": ("a", "a")}, "each with a name of its own"),
        ({"held_out": 1.0}, "held_out and classifier_dropout lie between 0 and 1"),
        ({"max_length": 1000}, "max_length must lie between 3 and 512"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    earlier()
    with pytest.raises(InputError, match=message):
        build(**{"encoder": None if "start" in options else dict(TINY), **options})


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"classes": 2}, r"are words: say in which order they count, --classes '\[far, near\]'"),
        (ROWS, {"classes": ("near", "here")}, "has the class far, but the model knows near, here"),
        ([("a", 0), ("b", 5)], {"classes": 2}, "built for 2 classes: give --classes 6"),
        (ROWS, {"transduction": Transduction()}, "has no part test: name a file of inputs without labels"),
        ([("a", "near"), ("b", "far")], {"held_out": 0.5}, "too few to hold out"),
        (ROWS, {"refinement": Refinement()}, "make 2 stages, of an epoch at least, but there are 1"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_made(rows, options, message):
    write("x.csv", rows)
    with pytest.raises(InputError, match=message):
        fit(build(**options), "x.csv", run="x", epochs=1, **{**OPTIONS, "batch_size": 2})
    assert not Path("x").exists()


def test_sentences_without_labels_are_refused():
    with pytest.raises(InputError, match="learns from labels, but the table has none"):
        fit(build(), {"sentence": ["a", "b"]}, run="x", epochs=1, **OPTIONS)


# ---- stages ----------------------------------------------------------------------------------------------------------

PARTS = {"refinement": Refinement(share=0.3), "transduction": Transduction("other.csv", threshold=0.0, rounds=2)}


def test_stages_bring_in_what_the_model_thinks(monkeypatch):
    method = build(**PARTS)
    seen = []

    def loss(self, batch, original=FineTuningText.loss):
        seen.append((self.trainer.current_epoch, batch["index"].tolist(), self.wanted(batch).clone()))
        return original(self, batch)

    monkeypatch.setattr(FineTuningText, "loss", loss)
    fit(method, "d.csv", run="run", epochs=8, **OPTIONS)

    def of(*epochs):
        return [row for epoch, at, target in seen if epoch in epochs for row in zip(at, target, strict=True)]

    assert len(seen) == 8 * 4  # as many batches as the 32 labelled rows make, in each stage
    first = of(0, 1)
    assert max(i for i, _ in first) < 32 and all(y.max() == 1 for _, y in first)
    softened = of(2, 3)
    assert max(i for i, _ in softened) < 32 and all(0.3 < y.max() < 1 for _, y in softened)
    later = of(4, 5, 6, 7)
    assert {i for i, _ in later} > {*range(32, 40)} and all(y.max() == 1 for i, y in later if i >= 32)
    assert method.targets.stage == 3


def test_an_unsure_model_brings_nothing_in():
    method = build(transduction=Transduction("other.csv", threshold=1.0))
    fit(method, "d.csv", run="run", epochs=2, **OPTIONS)
    assert method.targets.stage == 1 and method.targets.used.sum() == 32


@pytest.mark.parametrize("step", [3, 8, 14, 27])
def test_stopped_anywhere_and_resumed_it_ends_where_it_would_have(monkeypatch, step):
    options = {**OPTIONS, "epochs": 8, "checkpoint_seconds": 0}
    fit(build(**PARTS), "d.csv", run="whole", **options)
    original = FineTuningText.loss

    def stop(self, batch):
        if self.global_step == step:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(FineTuningText, "loss", stop)
        fit(build(**PARTS), "d.csv", run="stopped", **options)
    if step < 4:
        with pytest.raises(InputError, match="no checkpoint yet"):
            resume("stopped")
        return
    resumed = resume("stopped")
    assert same(*states("whole", "stopped"))
    assert torch.equal(resumed.method.targets.target, load_state(Run.open("whole").checkpoint)["targets"]["target"])


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_it_learns_and_is_measured_on_rows_that_it_has_not_seen(caplog):
    run = fit(build(), "d.csv", run="run", epochs=30, **{**OPTIONS, "lr": 1e-2})
    found = {result.subject: result for result in evaluate(run, "other.csv")}
    assert found.keys() == {"trained", "untrained"}
    trained = found["trained"]
    assert (trained.protocol, trained.metric, trained.n) == ("fine-tune", "accuracy", 8)
    truth = run.model().rows("other.csv").first_class
    predicted = run.model().classify("other.csv")
    assert trained.value == pytest.approx(100 * (truth == predicted).mean()) and trained.value >= 75
    hits = ((predicted == 1) & (truth == 1)).sum()
    assert trained.detail["f1"] == pytest.approx(100 * 2 * hits / (predicted.sum() + truth.sum()))
    expected = np.corrcoef(predicted, truth)[0, 1] if predicted.std() else 0.0
    assert trained.detail["matthews"] == pytest.approx(100 * expected) and trained.detail["chance"] == 50
    assert trained.detail["silhouette"] > found["untrained"].detail["silhouette"] and "note" not in trained.detail
    with pytest.raises(InputError, match="it needs other data or labels"):
        evaluate(run)
    assert "training saw the labels of all rows" in caplog.text


def test_rows_that_are_held_out_choose_weights_and_are_measured():
    run = fit(build(held_out=0.25), "d.csv", run="run", epochs=3, validate=1, **OPTIONS)
    looks = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    assert len(looks) == 3 and all(line["protocol"] == "fine-tune-dev" for line in looks)
    found = {result.subject: result for result in evaluate(run)}
    assert found["trained"].n == 8 and "held out by us: 25% of the rows" in found["trained"].detail["note"]
    assert looks[-1]["accuracy"] == pytest.approx(found["trained"].value)
    kept, held = run.model().parts("d.csv")
    assert not {*kept.columns["anchor"]} & {*held.columns["anchor"]} and len(kept) == 24
    with pytest.raises(InputError, match="validate needs rows that training does not see"):
        fit(build(), "d.csv", run="other", epochs=1, validate=1, **OPTIONS)


def test_transductive_results_say_so():
    run = fit(build(transduction=Transduction("other.csv")), "d.csv", run="run", epochs=2, **OPTIONS)
    for result in evaluate(run, "other.csv"):
        assert result.detail["transductive"] is True and "saw without labels (other.csv)" in result.detail["note"]


def test_from_the_command_line(capsys):
    small = ["--encoder", "transformer-32-1", "--max_length", "24", "--batch_size", "8", "--progress", "false"]
    command = ["train", "fine-tuning-text", "--data", "d.csv", *small]
    parts = ["--sift.weight", "2", "--refinement", "{how: drop}", "--transduction.inputs", "other.csv"]
    assert cli.main([*command, "--classes", "[near, far]", "--epochs", "3", "--run", "r", *parts]) == 0
    model = Run.open("r").config["model"]
    assert model["sift"]["weight"] == 2 and model["refinement"]["how"] == "drop" and model["classes"] == ["near", "far"]
    assert cli.main(["evaluate", "r", "--data", "other.csv"]) == 0
    assert "fine-tune" in capsys.readouterr().out
    assert cli.main([*command, "--run", "s"]) == 2 and "--classes '[far, near]'" in capsys.readouterr().err
    assert cli.main([*command, "--sifd.weight", "2"]) == 2 and "no option --sifd.weight" in capsys.readouterr().err
    assert cli.main([*command, "--sift.weigh", "2"]) == 2 and "sift" in capsys.readouterr().err
