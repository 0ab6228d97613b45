"""Sentences from everything that people have, and the batches made of them."""

import gzip
import json
import logging

import numpy as np
import pytest
import torch

from counterpoint.data import texts
from counterpoint.encoders.text import byte_tokenizer
from counterpoint.errors import InputError

ROWS = [("A dog runs.", "A dog is running.", "A cat sleeps."), ("Rain falls.", "It rains.", "The sun shines.")]
HEADER = ("anchor", "positive", "negative")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def table(path, kind):
    match kind:
        case "csv" | "tsv":
            comma = "," if kind == "csv" else "\t"
            path.write_text("\n".join(comma.join(f'"{cell}"' for cell in row) for row in [HEADER, *ROWS]) + "\n")
        case "jsonl":
            path.write_text("\n".join(json.dumps(dict(zip(HEADER, row, strict=True))) for row in ROWS) + "\n")
        case "parquet":
            pandas = pytest.importorskip("pandas")
            pytest.importorskip("pyarrow")
            pandas.DataFrame(ROWS, columns=list(HEADER)).to_parquet(path)
    return path


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_give_their_columns_by_role(tmp_path, kind):
    found = texts.load(table(tmp_path / f"t.{kind}", kind))
    assert [tuple(row) for row in zip(*found.columns.values(), strict=True)] == ROWS
    assert tuple(found.columns) == HEADER and found.score is None


def test_roles_follow_names_not_places_and_other_columns_are_left_alone(tmp_path):
    path = tmp_path / "nli.csv"
    path.write_text("id,hard_neg,sent1,sent0,neg_2\n7,n,p,a,m\n8,N,P,A,M\n")
    found = texts.load(path)
    assert {part: list(column) for part, column in found.columns.items()} == {
        "anchor": ["a", "A"], "positive": ["p", "P"], "negative": ["n", "N"], "negative_2": ["m", "M"],
    }  # fmt: skip
    picked = texts.load(path, columns=["hard_neg", "sent0"])
    assert list(picked.columns["anchor"]) == ["n", "N"] and list(picked.columns["positive"]) == ["a", "A"]
    with pytest.raises(InputError, match=r"no column sent2; did you mean sent[01]\?; it has id, hard_neg"):
        texts.load(path, columns=["sent2"])


def test_a_text_file_holds_one_sentence_a_line(tmp_path):
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    content = "\ufeffOne, two.\r\nThree\tfour\r\nünï\u2028cöde".encode()
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for path in (plain, packed, str(plain)):
        assert list(texts.load(path).columns["anchor"]) == ["One, two.", "Three\tfour", "ünï\u2028cöde"]


def test_quoted_line_breaks_and_commas_stay_in_their_cell(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text('sentence\n"one,\ntwo"\n"say ""hi"""\n')
    assert list(texts.load(path).columns["anchor"]) == ["one,\ntwo", 'say "hi"']


def test_objects_in_memory():
    assert list(texts.load(["a", "b"]).columns["anchor"]) == ["a", "b"]
    assert list(texts.load(np.array(["a", "b"])).columns["anchor"]) == ["a", "b"]
    assert list(texts.load(ROWS).columns) == list(HEADER)
    assert list(texts.load({"text": ["a", "b"]}).columns["anchor"]) == ["a", "b"]
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"n": [1, 2], "query": ["a", "b"], "answer": ["c", None]})
    assert list(texts.load(frame["query"]).columns["anchor"]) == ["a", "b"]
    assert list(texts.load(frame, whole=True).columns["positive"]) == ["c", ""]
    assert len(texts.load(frame)) == 1


def test_scored_pairs_are_no_positives():
    found = texts.load({"sentence1": ["a", "b"], "sentence2": ["b", "c"], "score": ["0.5", "4"]})
    assert found.score.tolist() == [0.5, 4.0]
    assert list(found.single().columns) == ["anchor"] and list(found.single().columns["anchor"]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("id,price\n1,2\n", "has the columns id, price, and none is known to hold sentences"),
        ("foo,bar\na,b\n", "has the columns foo, bar"),
        ("positive,foo\na,b\n", "has the columns positive, foo"),
        ("sentence,anchor\na,b\n", "has the columns sentence, anchor"),
        ("sentence,foo\n3,b\n4,c\n", "column sentence of .* holds numbers.*columns are sentence, foo"),
        ("sentence,foo\na,b\nc\n", "row 3 of .* has 1 cells, but the header has 2"),
        ('sentence\n"a', "line 2 of .* is no table row"),
        ("sentence1,sentence2,score\na,b,x\n", "column score of .* no number"),
        ("sentence\n", "holds no sentence"),
        ("", "columns none"),
    ],
)
def test_wrong_tables_are_refused_with_what_they_hold(tmp_path, content, message):
    path = tmp_path / "wrong.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        texts.load(path)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    for name in ("a.txt", "a.csv"):
        (tmp_path / name).write_bytes(b"sentence\ngood\nna\xefve\n")
        with pytest.raises(InputError, match=r"line 3 of .* is not UTF-8 \(byte 0xef\)"):
            texts.load(tmp_path / name)


def test_other_wrong_data(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty.txt").write_text("\n  \n\n")
    cases = {
        "line 2 of bad.jsonl is not JSON": tmp_path / "bad.jsonl",
        "holds no sentence": tmp_path / "empty.txt",
        "is a folder": tmp_path,
        "did you mean stsb": "stsbb",
        "list of sentences is empty": [],
        "item 1 of the list is 3": ["a", 3],
        r"item 1 of the list is \('a',\).*tuple of 2 strings": [("a", "b"), ("a",)],
        "not from int": 3,
        "no split 'test'": None,
    }
    for message, data in cases.items():
        with pytest.raises(InputError, match=message):
            texts.load(["a"], "test") if data is None else texts.load(data)


def test_empty_and_repeated_rows_are_left_out_and_counted_once(caplog):
    caplog.set_level(logging.WARNING)
    found = texts.load(["a", "", "b", "  ", "a", "a", None])
    assert list(found.columns["anchor"]) == ["a", "b"]
    assert [record.getMessage() for record in caplog.records] == [
        "sentences: 3 empty sentences left out",
        "sentences: 2 repeated sentences left out (each would be its own negative)",
    ]
    assert len(texts.load(["a", "", "a"], whole=True)) == 3
    pairs = texts.load([("a", "x"), ("a", "y"), ("a", "x"), ("", "z")])
    assert list(pairs.columns["positive"]) == ["x", "y"]


def test_limit_is_a_seeded_subset():
    data = [f"sentence {i}" for i in range(50)]
    first, again = texts.load(data, limit=10, seed=1), texts.load(data, limit=10, seed=1)
    other = texts.load(data, limit=10, seed=2)
    assert first.columns == again.columns != other.columns and len(first) == 10
    assert set(first.columns["anchor"]) < set(texts.load(data, limit=20, seed=1).columns["anchor"])


def known_sets(folder):
    """Small files in the layout of the known sets."""
    (folder / "sts").mkdir()
    (folder / "nli").mkdir()
    (folder / "text_corpus").mkdir()
    files = {
        "sts/stsb.csv.gz": "split,score,sentence1,sentence2\ntrain,5.0,A b.,C d\ntest,1.5,Null,E f\ndev,2.0,G,H\n",
        "sts/sick.csv.gz": "split,relatedness,sentence1,sentence2\ntest,4.5,I j,null\n",
        "sts/sts12_16.csv.gz": "task,subset,split,score,sentence1,sentence2\n"
        + "".join(f"STS{y},x,test,{y % 6},K{y},L{y}\n" for y in range(12, 17))
        + "STS12,y,train,3,M,E f.\nSTS12,y,test,4,O,P\n",
        "nli/snli_dev_test.csv.gz": "split,label,premise,hypothesis\ndev,entailment,p,e\ndev,contradiction,p,c\n"
        "dev,neutral,p,n\ndev,entailment,q,e\ntest,entailment,r,e\n",
        "text_corpus/multi30k_captions_en.txt.gz": "A dog\na  B\nA cat\nk13!\n",
        "text_corpus/brown_sentences.tsv.gz": "news\tHe said\nfiction\tShe ran\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(gzip.compress(content.encode()))


def test_known_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COUNTERPOINT_DATA", raising=False)
    with pytest.raises(InputError, match=r"stsb\.csv\.gz .* is not on this machine; put it into sts/"):
        texts.load("stsb")
    known_sets(tmp_path)
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path))
    pairs = texts.load("stsb", "test")
    assert pairs.score.tolist() == [1.5] and pairs.columns == {"anchor": ["Null"], "positive": ["E f"]}
    assert texts.load("stsb:dev").score.tolist() == [2.0]
    assert len(texts.sts("sts12")) == 2 and len(texts.sts("sts12", "train")) == 1 and len(texts.sts("sts15")) == 1
    assert texts.sts("sick").columns["positive"] == ["null"]
    with pytest.raises(InputError, match="sts13 has the splits test, not 'train'"):
        texts.load("sts13")
    triples = texts.load("snli:dev")
    assert [list(column) for column in triples.columns.values()] == [["p"], ["e"], ["c"]]
    with pytest.raises(InputError, match="snli has the splits dev, test"):
        texts.load("snli")
    assert list(texts.load("brown").columns["anchor"]) == ["He said", "She ran"]
    # "a  B" is a sentence of STS-B and "k13!" one of STS13, but for case, spaces and punctuation
    assert list(texts.load("multi30k-without-sts").columns["anchor"]) == ["A dog", "A cat"]
    training = texts.load("sts-sentences").columns["anchor"]
    assert {"A b.", "C d", "I j", "K14", "M"} <= set(training)
    assert not {"Null", "null", "E f", "E f.", "G", "H"} & set(training)


# -------------------------------------------------------------------------------------------------------------- tokens


def test_batches_are_padded_only_to_their_longest_row(tokenizer):
    items = texts.tokenise(texts.load(["a", "abcdefgh", "abc"]), tokenizer, 32)
    assert len(items) == 3 and items.lengths.tolist() == [3, 10, 5]
    batch = items.take(torch.tensor([2, 0]))
    assert set(batch) == {"index", "input_ids", "attention_mask"} and batch["index"].tolist() == [2, 0]
    expected = tokenizer(["abc", "a"], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"]) and batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["attention_mask"], expected["attention_mask"]) and batch["input_ids"].shape == (2, 5)


def test_further_columns_have_their_own_width(tokenizer):
    items = texts.tokenise(texts.load(ROWS), tokenizer, 32)
    batch = items.take(torch.tensor([1]))
    assert {name: tuple(x.shape) for name, x in batch.items() if name.endswith("input_ids")} == {
        "input_ids": (1, 13), "positive_input_ids": (1, 11), "negative_input_ids": (1, 17),
    }  # fmt: skip
    assert tokenizer.decode(batch["negative_input_ids"][0], skip_special_tokens=True) == "The sun shines."
    assert items.lengths.tolist() == [19, 17]


def test_subset_and_device_keep_the_rows(tokenizer):
    items = texts.tokenise(texts.load([f"{'x' * i} {i}" for i in range(1, 9)]), tokenizer, 32, words=True)
    some = items.subset([5, 2, 2])
    for i, at in enumerate((5, 2, 2)):
        ours, original = some.take(torch.tensor([i])), items.take(torch.tensor([at]))
        assert all(torch.equal(ours[name], original[name]) for name in ("input_ids", "attention_mask", "words"))
    moved = items.to(torch.device("cpu"))
    assert torch.equal(moved.take(torch.arange(8))["input_ids"], items.take(torch.arange(8))["input_ids"])
    assert items.nbytes > 0


def test_long_sentences_are_cut_and_counted_once(tokenizer, caplog):
    caplog.set_level(logging.WARNING)
    items = texts.tokenise(texts.load(["word " * 10_000, "short", "x" * 14, "y" * 15]), tokenizer, 16)
    assert items.truncated == 2 and items.lengths.tolist() == [16, 7, 16, 16]
    assert items.take(torch.tensor([0]))["input_ids"][0, -1] == tokenizer.sep_token_id
    assert [r.getMessage() for r in caplog.records] == ["sentences: 2 of 4 sentences cut to 16 tokens"]


def test_words_are_numbered(tokenizer):
    items = texts.tokenise(texts.load(["ab  c", "d"]), tokenizer, 32, words=True)
    assert items.take(torch.arange(2))["words"].tolist() == [[-1, 0, 0, -1, -1, 1, -1], [-1, 0, -1, -1, -1, -1, -1]]


def bare(**special):
    """A tokeniser of words without [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", **special)


def test_without_padding_token_the_end_token_pads_and_it_is_said(caplog):
    caplog.set_level(logging.WARNING)
    tokenizer = bare(eos_token="<end>")
    items = texts.tokenise(texts.load(["a b", "a", ""], whole=True), tokenizer, 8)
    texts.pad_of(tokenizer)
    assert items.take(torch.arange(3))["input_ids"].tolist() == [[2, 3], [2, 1], [1, 1]]
    assert items.take(torch.arange(3))["attention_mask"].tolist() == [[1, 1], [1, 0], [1, 0]]
    assert [r.getMessage() for r in caplog.records].count(
        "the tokeniser has no padding token; its end token <end> pads instead"
    ) == 1
    with pytest.raises(InputError, match="neither a padding nor an end token"):
        texts.tokenise(texts.load(["a"]), bare(), 8)
