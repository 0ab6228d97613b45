"""Pairs of several domains: from tables, from names with a plus, and the sets made from word lists."""

import numpy as np
import pytest
import torch

from counterpoint.data import domains, texts
from counterpoint.encoders.text import byte_tokenizer
from counterpoint.errors import InputError

TABLE = {
    "sentence1": ["a b", "c d", "e f", "g h", "i j"],
    "sentence2": ["a c", "c e", "e g", "g i", "i k"],
    "domain": ["skin", "cvd", "cvd", "skin", "lung"],
    "label": [1, 0, 1, 1, 0],
}


def test_a_table_says_domains_and_labels():
    rows = texts.load(TABLE)
    assert rows.domains == ("cvd", "lung", "skin") and rows.domain.tolist() == [2, 0, 0, 2, 1]
    assert rows.label.tolist() == [1, 0, 1, 1, 0]
    some = rows.subset([4, 1])
    assert some.domain.tolist() == [1, 0] and some.label.tolist() == [0, 0] and some.domains == rows.domains
    assert texts.load(TABLE, limit=2).domains == rows.domains  # numbers do not depend on what was drawn


def test_labels_are_zeros_and_ones_of_pairs():
    assert texts.load({**TABLE, "label": [0, 1, 2, 1, 0]}).label is None
    assert texts.load({"sentence": ["a", "b"], "label": [0, 1]}).label is None
    assert texts.load({"sentence1": ["a", "a"], "sentence2": ["b", "b"], "label": [1, 0]}).label.tolist() == [1, 0]


def test_a_row_without_domain_is_named():
    with pytest.raises(InputError, match="row 2 of the table has no domain"):
        texts.load({**TABLE, "domain": ["a", "", "b", "a", "a"]})


def test_equal_rows_of_two_domains_are_no_repetition():
    rows = texts.load({"anchor": ["a", "a", "a"], "positive": ["b", "b", "b"], "domain": ["x", "y", "x"]})
    assert len(rows) == 2 and rows.domain.tolist() == [0, 1]


def test_tokens_keep_their_domain():
    items = texts.tokenise(texts.load(TABLE), byte_tokenizer(), 20)
    assert items.take(torch.tensor([4, 0]))["domain"].tolist() == [1, 2]
    assert items.subset([3, 4]).take(torch.tensor([1]))["domain"].tolist() == [1]
    again = items.in_domains(("skin", "other", "cvd", "lung"))
    assert again.domain.tolist() == [0, 2, 2, 0, 3] and again.in_domains(again.domains).domain.tolist() == [
        0,
        2,
        2,
        0,
        3,
    ]
    with pytest.raises(
        InputError, match=r"has the domain lung, but the model knows skin, cvd: give --domains '\[cvd, lung"
    ):
        items.in_domains(("skin", "cvd"))
    assert "domain" not in texts.tokenise(texts.load(["a", "b"]), byte_tokenizer(), 20).take(torch.tensor([0]))


def test_names_with_a_plus_are_domains_of_one_set():
    both = texts.load("same-statement-pairs+same-topic-pairs:train")
    parts = [texts.load(f"{name}-pairs") for name in ("same-statement", "same-topic")]
    assert both.domains == ("same-statement", "same-topic") and len(both) == sum(map(len, parts))
    assert np.bincount(both.domain).tolist() == [len(part) for part in parts]
    test = texts.load("same-statement-pairs+same-topic-pairs", "test")
    assert set(test.label.tolist()) == {0, 1} and set(test.domain.tolist()) == {0, 1}
    with pytest.raises(InputError, match="each domain can be named once"):
        texts.load("same-topic-pairs+same-topic-pairs")
    with pytest.raises(InputError, match="are not of one form"):
        texts.joined([parts[0], texts.load(["a", "b"])], ["x", "y"])
    with pytest.raises(InputError, match="neither a file nor one of"):
        texts.load("same-topic-pairs+nothing")
    with pytest.raises(InputError, match="has the splits train, dev, test, not 'valid'"):
        texts.load("same-topic-pairs", "valid")


def facts(sentence):
    place = next(i for i, name in enumerate(domains.PLACES) if name in sentence)
    statement = next(i for i, ways in enumerate(domains.STATEMENTS) if any(way in sentence for way in ways))
    return place, statement


def test_the_two_made_domains_contradict_each_other():
    seen, held = set(), set()
    for name, same in (("same-topic", 0), ("same-statement", 1)):
        for split in domains.SPLITS:
            rows = texts.load(f"{name}-pairs", split)
            label = np.ones(len(rows)) if rows.label is None else rows.label
            assert (rows.label is None) == (split == "train")
            for a, b, y in zip(rows.columns["anchor"], rows.columns["positive"], label, strict=True):
                one, other = facts(a), facts(b)
                assert (one[same] == other[same]) == bool(y) and (one[1 - same] == other[1 - same]) == (not y)
                (seen if split == "train" else held).update((one, other))
    assert not seen & held and len(seen) == 24 * 24 - 240


def test_held_out_pairs_have_the_hardest_of_some_others_as_negatives(monkeypatch):
    monkeypatch.setattr(domains, "HELD", 8)
    rows = [
        (f"title{i} about word{i % 4}", f"text{i} on word{i % 4}", "even" if i % 2 == 0 else "odd") for i in range(60)
    ]
    train, dev, test = domains.matched(rows)
    assert (len(train), len(dev), len(test)) == (44, 16, 16) and not set(train.sentences()) & set(test.sentences())
    kind, partner = {b: k for _, b, k in rows}, {a: b for a, b, _ in rows}
    for part in (dev, test):
        for a, b, y in zip(part.columns["anchor"], part.columns["positive"], part.label, strict=True):
            assert (partner[a] == b) == bool(y) and kind[b] == kind[partner[a]]
    with pytest.raises(InputError, match="10 pairs are too few to hold out 16"):
        domains.matched(rows[:10])


@pytest.mark.parametrize("name", ["arxiv", "codenn", "cosqa", "multi30k", "mrpc", "sts"])
def test_files_that_are_not_here_are_named(name, tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path))
    monkeypatch.delenv("COUNTERPOINT_DATA", raising=False)
    with pytest.raises(InputError, match="is not on this machine; put it into"):
        texts.load(f"{name}-pairs")
