"""Augmentation for parameter-efficient tuning: what learns, what a copy is, the loss by its formula, what can be exported."""

import csv
import sys
from contextlib import suppress
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from counterpoint import cli
from counterpoint.contrast import sup_con
from counterpoint.errors import InputError
from counterpoint.evaluate.runs import evaluate
from counterpoint.export import export, load_encoder
from counterpoint.memory.labels import Transduction
from counterpoint.methods.language.fine_tuning_text import FineTuningText
from counterpoint.methods.language.peft_augmentation import PEFTAugmentation
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.train import Run, fit, resume
from counterpoint.train.checkpoint import load_state
from counterpoint.views.words import EDA

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
OPTIONS = {"batch_size": 8, "optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.0, "progress": False, "log_every": 1}
MOVES = EDA(copies=4, alpha=0.3, operators=("swap", "delete"))
ROWS = [(f"{who} {what} {where}", label) for who in ("Ann", "the cat", "a dog", "Bob") for what in ("runs", "sits here")
        for where, label in (("xx", 0), ("oo", 1))]  # fmt: skip


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("d.csv", ROWS), ("o.csv", [("she runs xx", 0), ("she runs oo", 1), ("he is oo", 1)])):
        with open(name, "w", newline="") as file:
            csv.writer(file).writerows([("sentence", "label"), *rows])


def build(seed=0, **options):
    torch.manual_seed(seed)
    defaults = {"encoder": dict(TINY), "max_length": 32, "prefix_length": 4, "eda": MOVES}
    return PEFTAugmentation(**{**defaults, **options}).train()


def ready(**options):
    """A method that has its copies, and a batch."""
    method = build(**options)
    items = method.training_items("d.csv")
    if method.augment:
        method.copies = method.made()
    return method, items.take(torch.arange(8))


def learned(method):
    return {name for name, p in method.named_parameters() if p.requires_grad}


QUIET = {"dropout": 0.0, "classifier_dropout": 0.0, "prefix_dropout": 0.0}


@pytest.mark.parametrize(
    ("tuning", "what"),
    [("prefix", "prompt_encoder"), ("lora", "lora_"), ("head", "nothing"), ("full", "encoder.model")],
)
def test_what_learns_and_that_nothing_else_moves(tuning, what):
    method, _ = ready(tuning=tuning)
    names = learned(method)
    assert {"classifier.weight", "classifier.bias"} < names or tuning == "head"
    assert all(what in name for name in names - {"classifier.weight", "classifier.bias"})
    before = {name: value.clone() for name, value in method.state_dict().items()}
    fit(method, "d.csv", run="run", epochs=1, **OPTIONS)
    moved = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    assert moved <= names and "classifier.weight" in moved
    assert any(what in name for name in moved) or tuning == "head"


def test_the_loss_is_its_formula():
    for weighting, rest in (("convex", 0.7), ("sum", 1.0)):
        method, batch = ready(mu=0.3, temperature=0.2, weighting=weighting, **QUIET)
        torch.manual_seed(3)
        found = method.loss(batch)
        torch.manual_seed(3)
        copies = method.drawn(batch["index"])
        own = method.encoder(batch["input_ids"], batch["attention_mask"]).pooled
        both = torch.cat([own, method.encoder(*copies).pooled])
        label = batch["label"][:, 0].repeat(2)
        torch.testing.assert_close(found["cross entropy"], rest * F.cross_entropy(method.classifier(both), label))
        z = F.normalize(both, dim=1) @ F.normalize(both, dim=1).T / 0.2
        total = 0.0
        for i in range(16):
            others = [j for j in range(16) if j != i]
            same = [j for j in others if label[j] == label[i]]
            total -= sum(z[i, p] - torch.logsumexp(z[i, others], 0) for p in same) / len(same)
        torch.testing.assert_close(found["contrast"], 0.3 * total / 16)


def test_anchors_without_a_positive_count_as_nothing():
    method, batch = ready(augment=(), mu=1.0, weighting="sum", **QUIET)
    batch["label"] = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1])[:, None]  # the last has no positive without copies
    z = method.encoder(batch["input_ids"], batch["attention_mask"]).pooled
    rows = sup_con(z, batch["label"][:, 0], temperature=0.1, reduction="none")
    torch.testing.assert_close(method.loss(batch)["contrast"], rows[:7].sum() / 8)


def test_an_example_and_its_copy_alone():
    method, batch = ready(positives="example", **QUIET)
    torch.manual_seed(3)
    found = method.loss(batch)["contrast"]
    torch.manual_seed(3)
    copies = method.drawn(batch["index"])
    views = [method.encoder(*x).pooled for x in ((batch["input_ids"], batch["attention_mask"]), copies)]
    torch.testing.assert_close(found, 0.5 * sup_con(torch.stack(views, 1), torch.arange(8), temperature=0.1))


def test_mixup_mixes_vectors_for_the_classifier_alone():
    method, batch = ready(mixup=0.4, **QUIET)
    plain, _ = ready(**QUIET)
    torch.manual_seed(3)
    found = method.loss(batch)
    torch.manual_seed(3)
    other = plain.loss(batch)
    torch.testing.assert_close(found["contrast"], other["contrast"])
    assert found["cross entropy"] != other["cross entropy"]
    with torch.no_grad():  # a classifier that says the same of everything cannot tell a mixture
        method.classifier.weight.zero_()
    assert method.loss(batch)["cross entropy"].item() == pytest.approx(0.5 * torch.tensor(2.0).log().item())


def test_without_parts_it_is_fine_tuning():
    options = {"tuning": "full", "augment": (), "mu": 0.0, "dropout": 0.0, "classifier_dropout": 0.0}
    method, batch = ready(**options)
    torch.manual_seed(0)
    plain = FineTuningText(encoder=dict(TINY), max_length=32, dropout=0.0, classifier_dropout=0.0).train()
    torch.testing.assert_close(method.loss(batch), plain.loss(batch))


def test_copies_belong_to_their_rows_and_follow_the_seed():
    method = build()
    method.training_items("d.csv", seed=4)
    copies = method.made()
    assert len(copies.offsets) == 1 + 4 * len(ROWS)
    decode = method.encoder.tokenizer.decode
    for i, (sentence, _) in enumerate(ROWS):
        ids, mask = copies.padded(torch.arange(4 * i, 4 * i + 4), method.encoder.pad)
        for row, real in zip(ids, mask, strict=True):
            assert {*decode(row[real.bool()], skip_special_tokens=True).split()} <= {*sentence.split()}
    method.training_items("d.csv", seed=4)
    assert torch.equal(method.made().flat, copies.flat)
    method.training_items("d.csv", seed=5)
    assert not torch.equal(method.made().flat, copies.flat)
    method.copies = copies
    drawn, own = (
        {decode(row[real.bool()]) for row, real in zip(*rows, strict=True)}
        for rows in (method.drawn(torch.tensor([3] * 100)), copies.padded(torch.arange(12, 16), method.encoder.pad))
    )
    assert drawn == own  # all of that row's, and none of another's


def test_pairs_change_side_by_side():
    method = build(eda=EDA(copies=3, operators=("swap",)))
    method.training_items({"sentence1": ["a b", "c d"], "sentence2": ["e f", "g h"], "label": ["0", "1"]})
    copies = method.made()
    ids, mask = copies.padded(torch.arange(6), method.encoder.pad)
    text = [method.encoder.tokenizer.decode(row[real.bool()]) for row, real in zip(ids, mask, strict=True)]
    assert len(text) == 6 and all({*t.replace("[", " [").replace("]", "] ").split()} >= {"e", "f"} for t in text[:3])
    assert all(t.index("a") < t.index("e") and t.count("[SEP]") == 2 for t in text[:3])  # no word changes sides


def test_translations_are_copies_too(monkeypatch):
    mine = ModuleType("mine")
    mine.shout = lambda sentences: [sentence.upper() for sentence in sentences]
    monkeypatch.setitem(sys.modules, "mine", mine)
    method = build(augment=("translation",), translation="mine:shout")
    method.training_items("d.csv")
    copies = method.made()
    assert len(copies.offsets) == 1 + len(ROWS)
    ids, mask = copies.padded(torch.tensor([2]), method.encoder.pad)
    assert method.encoder.tokenizer.decode(ids[0][mask[0].bool()], skip_special_tokens=True) == ROWS[2][0].upper()
    both = build(augment=("eda", "translation"), translation="mine:shout")
    both.training_items("d.csv")
    assert len(both.made().offsets) == 1 + 5 * len(ROWS)


def test_synonyms_come_from_a_file(tmp_path):
    (tmp_path / "s.txt").write_text("cat, kitten\ndog, puppy\n")
    method = build(eda=EDA(copies=2, operators=("replace",), synonyms="s.txt"))
    method.training_items("d.csv")
    ids, mask = method.made().padded(torch.arange(8, 10), method.encoder.pad)  # the fifth row: the cat runs xx
    assert ROWS[4][0] == "the cat runs xx"
    text = {
        method.encoder.tokenizer.decode(row[m.bool()], skip_special_tokens=True)
        for row, m in zip(ids, mask, strict=True)
    }
    assert text == {"the kitten runs xx"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": ("paraphrase",)}, "copies are made by eda and translation"),
        ({"augment": ("translation",)}, "copies are made by eda and translation, the latter by a named one"),
        ({"weighting": "half"}, 'weighting is convex or sum, positives class or example, not "half"'),
        ({"mu": 1.5}, "mu .at most 1 if convex."),
        ({"temperature": 0.0}, "temperature are positive"),
        ({"positives": "example", "augment": ()}, "an example is its own positive only with copies"),
        ({"max_length": 510}, "behind the prefix there is room for 508 tokens, max_length is 510"),
        ({"encoder": {**TINY, "model_type": "distilbert"}}, "take tuning lora"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_an_encoder_without_words_says_so_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match="give a file of synonyms, or take the operators swap and delete"):
        fit(build(eda=EDA()), "d.csv", run="run", epochs=1, **OPTIONS)
    with pytest.raises(InputError, match=r"there is no file of synonyms none\.txt"):
        fit(build(eda=EDA(synonyms="none.txt")), "d.csv", run="run", epochs=1, **OPTIONS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"transduction": Transduction("o.csv", 0.0)}, {"tuning": "lora", "mixup": 0.4}])
def test_stopped_and_resumed_it_ends_where_it_would_have(monkeypatch, options):
    training = {**OPTIONS, "epochs": 4, "checkpoint_seconds": 0}
    fit(build(**options), "d.csv", run="whole", **training)
    original = PEFTAugmentation.loss

    def stop(self, batch):
        if self.global_step == 5:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(PEFTAugmentation, "loss", stop)
        fit(build(**options), "d.csv", run="stopped", **training)
    resume("stopped")
    one, two = (load_state(Run.open(name).checkpoint)["state_dict"] for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_neighbours_stay_those_of_the_start_when_the_table_learns(monkeypatch):
    """After a stop the copies are made again, from a table that has moved."""
    from counterpoint.methods.language import peft_augmentation

    seen = []
    monkeypatch.setattr(
        peft_augmentation, "neighbours", lambda words, tokenizer, table: seen.append(table.clone()) or {}
    )
    start = build(tuning="full", eda=EDA(copies=2)).embeddings.detach().clone()
    fit(build(tuning="full", eda=EDA(copies=2)), "d.csv", run="run", epochs=2, **OPTIONS)
    resume("run")
    method = Run.open("run").model()
    method.training_items("d.csv")
    method.made()
    assert len(seen) >= 3 and all(torch.equal(table, start) for table in seen[1:])
    assert not torch.equal(method.embeddings, start)
    assert build(tuning="lora", eda=EDA(copies=2)).table is None  # a frozen one needs no second


def test_lora_leaves_as_an_ordinary_encoder_and_a_prefix_does_not(tmp_path):
    torch.manual_seed(0)
    fit(SimCSE(encoder="transformer-32-1", max_length=32), "d.csv", run="first", epochs=1, **OPTIONS)
    options = {"encoder": None, "start": "first", "pooling": None}
    run = fit(build(tuning="lora", **options), "d.csv", run="lora", epochs=4, **OPTIONS)
    for form in ("safetensors", "sentence-transformers"):
        path, difference = export(run, form)
        assert path.exists() and difference < 1e-4
    tokens = run.method.encoder.tokenizer(["she runs"], return_tensors="pt")
    vector = load_encoder(tmp_path / "lora" / "encoder.safetensors")(tokens["input_ids"]).pooled
    torch.testing.assert_close(vector, torch.from_numpy(run.method.encode(["she runs"])), rtol=1e-4, atol=1e-5)
    first = torch.from_numpy(Run.open("first").encode(["she runs"]))
    assert not torch.allclose(vector, first, atol=1e-3)
    going_on = FineTuningText(start="lora")  # what LoRA learned counts
    torch.testing.assert_close(going_on.eval().encoder(tokens["input_ids"]).pooled, vector)
    run = fit(build(**options), "d.csv", run="prefix", epochs=1, **OPTIONS)
    for form in ("safetensors", "onnx", "sentence-transformers"):
        with pytest.raises(InputError, match="a prefix is no part of a stock encoder"):
            export(run, form)
    with pytest.raises(InputError, match="a prefix is no part of a stock encoder"):
        FineTuningText(start="prefix")
    assert run.encode(["she runs", "he"]).shape == (2, 32)


def test_it_learns_and_the_contrast_keeps_classes_apart():
    with open("more.csv", "w", newline="") as file:
        rows = [(f"{who} {what} {where}", label) for who in ("she", "my cat") for what in ("is here", "runs", "sits")
                for where, label in (("xx", 0), ("oo", 1))]  # fmt: skip
        csv.writer(file).writerows([("sentence", "label"), *rows])
    apart = {}
    for mu in (0.0, 0.5):
        run = fit(build(tuning="lora", rank=4, mu=mu), "d.csv", run=f"run{mu}", epochs=40, **OPTIONS)
        found = {result.subject: result for result in evaluate(run, "more.csv")}
        assert found["trained"].value > 80 and found["trained"].value > found["untrained"].value + 20
        apart[mu] = found["trained"].detail["silhouette"]
    assert apart[0.5] > apart[0.0]


def test_from_the_command_line(capsys):
    command = ["train", "peft-augmentation", "--data", "d.csv", "--encoder", "transformer-32-1", "--max_length", "32"]
    options = ["--tuning", "lora", "--eda.operators", "[swap]", "--mixup", "0.4", "--epochs", "1", "--batch_size", "8"]
    assert cli.main([*command, *options, "--run", "r", "--progress", "false"]) == 0
    assert Run.open("r").config["model"]["eda"]["operators"] == ["swap"]
    assert cli.main(["train", "--resume", "r"]) == 0
    assert cli.main(["export", "r", "--to", "safetensors"]) == 0
    assert cli.main(["evaluate", "r", "--data", "o.csv"]) == 0
    assert cli.main([*command, "--run", "s", "--progress", "false"]) == 2
    assert "take the operators swap and delete" in capsys.readouterr().err
