"""Folders for sentence-transformers: the stock library gives the same vectors."""

import sys

import pytest
import torch

from counterpoint.encoders.text import text
from counterpoint.errors import InputError
from counterpoint.export.checks import tokens
from counterpoint.export.sentence_folder import save

TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SENTENCES = ["A dog runs.", "It rains", "x", "", "a sentence that is much longer than the limit"]


def build(seed=0, **options):
    torch.manual_seed(seed)
    return text(dict(TINY), **options).eval()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_stock_sentence_transformer_gives_the_same_vectors(tmp_path, pooling):
    stock = pytest.importorskip("sentence_transformers")
    encoder = build(pooling=pooling, max_length=24)
    path = tmp_path / "out"
    assert save(encoder, path) < 1e-5
    model = stock.SentenceTransformer(str(path), device="cpu")
    batch = tokens(encoder, SENTENCES)
    with torch.no_grad():
        ours = encoder.embed(batch)
    torch.testing.assert_close(torch.from_numpy(model.encode(SENTENCES)), ours, atol=1e-5, rtol=1e-4)
    again = text(str(path)).eval()
    assert again.pooling == pooling and again.max_length == 24 and not again.fresh
    with torch.no_grad():
        torch.testing.assert_close(again.embed(batch), ours)
    assert [*tmp_path.iterdir()] == [path]
    assert save(build(1, pooling=pooling), path) < 1e-5
    assert text(str(path)).max_length == 512


def test_a_pooling_that_no_stock_module_has(tmp_path):
    with pytest.raises(InputError, match='no module for "first-last" pooling; export --to safetensors or onnx'):
        save(build(pooling="first-last"), tmp_path / "a")
    assert not [*tmp_path.iterdir()]


def test_other_vectors_are_not_kept(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    from counterpoint.export import sentence_folder

    monkeypatch.setitem(sentence_folder.MODES, "mean", "cls")
    with pytest.raises(InputError, match="sentence-transformers answers differently"):
        save(build(pooling="mean"), tmp_path / "a")
    assert not [*tmp_path.iterdir()]


def test_without_the_library_the_folder_is_written_unchecked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    difference = save(build(), tmp_path / "a")
    assert difference != difference and (tmp_path / "a" / "modules.json").is_file()
