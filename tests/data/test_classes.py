"""Texts with classes: columns of labels, pairs read as one row, known sets, and what none of it changes for others."""

import gzip

import numpy as np
import pytest
import torch

from counterpoint.data import texts
from counterpoint.data.classes import numbered, with_unlabelled
from counterpoint.encoders.text import byte_tokenizer
from counterpoint.errors import InputError
from counterpoint.evaluate import pairs
from counterpoint.methods.language.simcse import SimCSE

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def table(label, second=None):
    found = {"sentence": [f"sentence {i}" for i in range(len(label))], "label": label}
    return found if second is None else {**found, "sentence2": second}


def test_labels_are_numbers_or_words():
    numbers = texts.load(table(["2", "0", "2"]), classes=True)
    assert numbers.first_class.tolist() == [2, 0, 2] and numbers.classes == ("0", "1", "2")
    words = texts.load(table(["yes", "no", "yes"]), classes=True)
    assert words.first_class.tolist() == [1, 0, 1] and words.classes == ("no", "yes")
    assert texts.load(table([1.0, 0.0]), classes=True).first_class.tolist() == [1, 0]  # as a DataFrame has them
    assert texts.load({"sentence": ["a", "b"]}, classes=True).class_of is None
    for wrong, message in (
        (["", "a"], "row 1 of the table has no label"),
        (["0.5", "1"], "numbers that are no classes"),
    ):
        with pytest.raises(InputError, match=message):
            texts.load(table(wrong), classes=True)


def test_without_being_asked_pairs_have_no_classes():
    scored = texts.load({**table(["1", "0"], ["x", "y"])})
    assert scored.label.tolist() == [1, 0] and scored.classes == ()  # pairs that belong together or not, as before
    batch = texts.tokenise(scored, byte_tokenizer(), 30).take(torch.arange(2))
    assert "label" not in batch


def test_repeated_sentences_stay_where_they_have_classes():
    rows = {"sentence": ["a", "a", "", "b"], "label": ["0", "1", "0", "1"]}
    assert texts.load(rows, classes=True).first_class.tolist() == [0, 1, 1]


def test_a_pair_is_one_row_of_which_the_longer_part_is_cut():
    rows = texts.load(table(["0", "1"], ["b", "a very long second sentence"]), classes=True)
    tokenizer = byte_tokenizer()
    items = texts.tokenise(rows, tokenizer, 20, together=True)
    assert list(items.ids) == ["anchor"] and items.truncated == 1
    batch = items.take(torch.arange(2))
    assert batch["label"].tolist() == [[0], [1]] and batch["attention_mask"].sum(1).tolist() == [14, 20]
    whole = tokenizer("sentence 0", "b")["input_ids"]
    assert batch["input_ids"][0, :14].tolist() == whole and whole.count(tokenizer.sep_token_id) == 2
    moved = items.subset([1]).to("cpu")
    assert moved.label.tolist() == [1] and moved.classes == ("0", "1")


def test_classes_are_numbered_as_the_model_does():
    rows = texts.load(table(["yes", "no"]), classes=True)
    found = numbered(rows, ("yes", "no", "maybe"), known=False)
    assert found.first_class.tolist() == [0, 1] and found.classes == ("yes", "no", "maybe")
    with pytest.raises(InputError, match=r"are words: say in which order they count, --classes '\[no, yes\]'"):
        numbered(rows, (), known=False)
    assert numbered(rows, (), known=True) is rows
    with pytest.raises(InputError, match="has the class no, but the model knows yes, maybe"):
        numbered(rows, ("yes", "maybe"), known=False)
    other = texts.load(table(["no", "no"]), classes=True)  # one class only: its number must not change
    assert numbered(other, ("yes", "no"), known=False).first_class.tolist() == [1, 1]


def test_unlabelled_inputs_stand_behind_the_rows(tmp_path):
    rows = texts.load(table(["1", "0"]), classes=True)
    file = tmp_path / "u.txt"
    file.write_text("one\ntwo\n\nthree\n")
    found = with_unlabelled(rows, None, str(file))
    assert found.columns["anchor"] == ["sentence 0", "sentence 1", "one", "two", "three"]
    assert found.first_class.tolist() == [1, 0, 0, 0, 0] and found.classes == rows.classes
    with pytest.raises(InputError, match="has no part test: name a file"):
        with_unlabelled(rows, "mine.csv", "test")
    two = texts.load(table(["1", "0"], ["x", "y"]), classes=True)
    with pytest.raises(InputError, match=r"the table has anchor and positive in a row, and u\.txt has anchor"):
        with_unlabelled(two, None, str(file))


@pytest.fixture
def glue(tmp_path, monkeypatch):
    def write(name, lines):
        folder = tmp_path / "glue"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))

    write("sst2", ["split,label,sentence", "train,0,bad film", "train,1,Good film!", "dev,1,fine", "test,1,good  film"])
    pair = ["entailment,a b,c", "not_entailment,d,e", "entailment,a b,f"]
    rte = [f"{i},{part},{row}" for i, (part, row) in enumerate(zip(("train", "train", "dev"), pair, strict=True))]
    write("rte", ["index,split,label,sentence1,sentence2", *rte, '3,train,not_entailment,"f.",a b'])
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path))


def test_known_sets_have_no_row_of_their_test_part_in_training(glue):
    rows = texts.load("sst2")
    assert rows.columns["anchor"] == ["bad film"] and rows.classes == ("a bad review", "a good review")
    assert texts.load("sst2", "test").first_class.tolist() == [1] and texts.load("sst2:dev").first_class.tolist() == [1]
    rte = texts.load("rte")  # a sentence may stand in both parts, a pair may not
    assert rte.columns["anchor"] == ["a b", "d"] and rte.first_class.tolist() == [0, 1]
    assert texts.load("rte", "test").columns["positive"] == ["f"]
    with pytest.raises(
        InputError, match=r"rte has the splits train, test with labels, not 'dev': hold a share of train out"
    ):
        texts.load("rte", "dev")


def test_rows_with_classes_are_neither_positives_nor_labelled_pairs(glue):
    method = SimCSE(encoder=dict(TINY), max_length=20)
    assert list(method.read("rte").ids) == ["anchor"] and len(method.read("rte")) == 4  # sentences, each once
    assert pairs.labelled("rte", own=True) is None
    with pytest.raises(InputError, match="are not of one form and cannot be the domains of one set"):
        texts.load("sst2+sst2".replace("+sst2", "+rte"))
    assert np.array_equal(texts.load("rte").subset([1]).first_class, [1])


def test_texts_that_deny_are_a_set_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "glue").mkdir()
    lines = [
        "split,label,sentence",
        "train,0,not good",
        "train,1,good",
        "train,1,isn't bad",
        "dev,0,never",
        "test,1,no lie",
        "test,0,lie",
    ]
    (tmp_path / "glue" / "sst2.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path))
    rows = texts.load("sst2-negations")
    assert rows.columns["anchor"] == ["not good", "isn't bad"] and rows.first_class.tolist() == [0, 1]
    assert texts.load("sst2-negations", "test").columns["anchor"] == ["no lie"]
