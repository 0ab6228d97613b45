"""One file rebuilds an encoder: its weights, its sizes, and what it reads with."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from counterpoint import encoders
from counterpoint.errors import InputError
from counterpoint.export import export, load_encoder, weights
from counterpoint.export.weights import save
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.methods.recommendation.sasrec import SASRec
from counterpoint.train import fit

TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SENTENCES = ["A dog runs.", "It rains", "naïve ☃", "", "words " * 20]


def sentences(seed=0, **options):
    torch.manual_seed(seed)
    return encoders.text(dict(TINY), **options).eval()


def embed(encoder, texts=SENTENCES):
    options = {"padding": True, "truncation": True, "max_length": encoder.max_length, "return_tensors": "pt"}
    found = encoder.tokenizer(texts, **options)
    with torch.no_grad():
        return encoder(found["input_ids"], found["attention_mask"]).pooled


@pytest.mark.parametrize("pooling", ["cls", "mean", "first-last"])
def test_a_text_encoder_comes_back_with_its_tokeniser(tmp_path, pooling):
    encoder = sentences(pooling=pooling, max_length=24)
    assert save(encoder, tmp_path / "a" / "encoder.safetensors", method="simcse") == 0
    again = load_encoder(tmp_path / "a" / "encoder.safetensors")
    assert (again.pooling, again.max_length, again.positions, again.dim) == (pooling, 24, 512, 16)
    assert not again.training and again.model.pooler is None
    assert torch.equal(embed(again), embed(encoder)) and not torch.equal(embed(again), embed(sentences(1)))
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["encoder.safetensors"]


def test_a_folders_model_comes_back_where_the_folder_is_gone(tmp_path):
    from transformers import BertConfig, BertModel

    source = tmp_path / "source"
    BertModel(BertConfig(**TINY, vocab_size=262, max_position_embeddings=40)).save_pretrained(source)
    encoders.text(dict(TINY)).tokenizer.save_pretrained(source)
    encoder = encoders.text(str(source), layers=1, pooling="mean").eval()
    save(encoder, tmp_path / "encoder.safetensors")
    expected = embed(encoder)
    source.rename(tmp_path / "gone")
    again = load_encoder(tmp_path / "encoder.safetensors")
    assert torch.equal(embed(again), expected) and again.model.config.num_hidden_layers == 1
    assert again.name == "source"
    assert str(tmp_path).encode() not in (tmp_path / "encoder.safetensors").read_bytes()


def test_weights_that_share_memory_are_written(tmp_path):
    encoder = sentences()
    first, second = encoder.model.encoder.layer[:2]
    second.output.dense.weight = first.output.dense.weight
    assert save(encoder, tmp_path / "encoder.safetensors") == 0


def test_a_sequence_encoder_recommends_elsewhere(tmp_path):
    lists = [[f"item {(start + step) % 9}" for step in range(6)] for start in range(9)]
    method = SASRec(dim=8, hidden=16, layers=1, max_length=5, dropout=0.2, attention_dropout=0.3)
    run = fit(method, lists, epochs=1, batch_size=8, run=tmp_path / "run", progress=False)
    path, difference = export(run, "safetensors")
    assert path == run.folder / "encoder.safetensors" and difference == 0
    again, trained = load_encoder(path), run.model().encoder
    assert again.catalogue == trained.catalogue and len(again.catalogue) == 9 and "item 3" in again.catalogue
    assert (again.dropout.p, again.blocks[0].attention_dropout, again.max_length) == (0.2, 0.3, 5)
    codes = torch.tensor([[1, 5, 2, 0], [3, 0, 0, 0]])
    with torch.no_grad():
        state = again(codes, torch.tensor([3, 1])).pooled
        assert torch.equal(state, trained(codes, torch.tensor([3, 1])).pooled)
    assert torch.equal(again.table, trained.table)
    names = bytes(load_file(path)["names"].tolist()).decode().split("\0")
    assert tuple(names) == again.catalogue
    with pytest.raises(InputError, match="histories cannot be exported --to onnx; export --to safetensors"):
        export(run, "onnx")


def test_a_run_of_sentences_is_exported(tmp_path):
    method = SimCSE(encoder=dict(TINY), max_length=16)
    run = fit(method, SENTENCES[:3] * 4, epochs=1, batch_size=4, run=tmp_path / "run", progress=False)
    path, difference = export(run, "safetensors", tmp_path / "here.st")
    assert path == tmp_path / "here.st" and difference == 0
    assert torch.equal(embed(load_encoder(path)), embed(run.model().encoder))
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["encoder"])
    assert about["method"] == "simcse" and about["kind"] == "text"


def test_statistics_of_pixels_travel_along(tmp_path):
    encoder = encoders.image("resnet10t", image_size=32).eval()
    encoder.mean.fill_(0.1)
    save(encoder, tmp_path / "encoder.safetensors")
    assert torch.equal(load_encoder(tmp_path / "encoder.safetensors").mean, encoder.mean)


def test_what_answers_differently_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "encoder.safetensors"
    save(encoders.image("convnet-4", image_size=16), path)
    good = path.read_bytes()
    monkeypatch.setattr(weights, "load_encoder", lambda _: encoders.image("convnet-4", image_size=16).eval())
    torch.manual_seed(3)
    with pytest.raises(InputError, match="answers differently"):
        save(encoders.image("convnet-4", image_size=16), path)
    assert path.read_bytes() == good and [*tmp_path.iterdir()] == [path]


def test_encoders_that_nothing_can_rebuild_are_refused(tmp_path):
    class Own(encoders.ConvNet):
        pass

    with pytest.raises(InputError, match="a Own cannot be rebuilt from a file; ConvNet, TimmEncoder, TextEncoder"):
        save(Own(), tmp_path / "encoder.safetensors")
    assert not [*tmp_path.iterdir()]


def test_a_file_cannot_write_outside_its_folder(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save(sentences(), path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    evil = {"files/../../../../../../../../" + str(tmp_path / "evil").lstrip("/"): torch.zeros(3, dtype=torch.uint8)}
    save_file({**load_file(path), **evil}, path, metadata=header)
    with pytest.raises(InputError, match="leads out of the folder"):
        load_encoder(path)
    assert not (tmp_path / "evil").exists()


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    import safetensors.torch

    def full(tensors, path, metadata):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match=r"cannot write into .*No space left on device"):
        save(encoders.image("convnet-4", image_size=16), tmp_path / "encoder.safetensors")
    assert not [*tmp_path.iterdir()]
