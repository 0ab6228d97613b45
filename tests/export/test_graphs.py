"""ONNX graphs: any batch, any length, padding ignored, nothing kept that answers differently."""

import json
import sys

import pytest
import torch

from counterpoint import encoders
from counterpoint.errors import InputError
from counterpoint.export import export, graphs
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.train import fit

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
for needed in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(needed)


def opened(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session, **inputs):
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def image_encoder(name, size, channels=3):
    """With statistics of batch normalisation that are not the fresh ones."""
    torch.manual_seed(0)
    encoder = encoders.image(name, image_size=size, channels=channels).train()
    with torch.no_grad():
        for _ in range(3):
            encoder(torch.rand(8, channels, size, size))
    return encoder.eval()


def text_encoder(pooling, **options):
    torch.manual_seed(0)
    return encoders.text({**TINY, **options.pop("config", {})}, pooling=pooling, max_length=20, **options).eval()


@pytest.mark.parametrize(
    ("name", "size", "channels"), [("convnet-4", 16, 1), ("resnet10t", 32, 3), ("test_vit", 32, 3)]
)
def test_images_of_any_number(tmp_path, name, size, channels):
    encoder = image_encoder(name, size, channels)
    assert graphs.save_image(encoder, tmp_path / "out", method="simclr") < 1e-4
    session = opened(tmp_path / "out" / "encoder.onnx")
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape, taken.type) == ("image", ["batch", channels, size, size], "tensor(float)")
    assert (given.name, given.shape) == ("embedding", ["batch", encoder.dim])
    for count in (1, 3, 6):
        images = torch.rand(count, channels, size, size)
        with torch.no_grad():
            torch.testing.assert_close(run(session, image=images), encoder(images).pooled, atol=1e-4, rtol=1e-4)
    words = session.get_modelmeta().custom_metadata_map
    assert words["encoder"] == name and words["method"] == "simclr" and words["image_size"] == str(size)
    assert json.loads((tmp_path / "out" / "counterpoint.json").read_text()) == words


def test_a_run_is_exported_without_chatter(tmp_path, capfd):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    method = SimCLR(encoder="convnet-4", image_size=16, projection=(16, 8))
    trained = fit(method, images, epochs=1, batch_size=4, run=tmp_path / "run", progress=False)
    capfd.readouterr()
    path, difference = export(trained, "onnx")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert path == trained.folder / "onnx" and 0 < difference < 1e-4
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = trained.model().encoder(images).pooled
        assert not torch.allclose(trained.untrained().encoder(images).pooled, expected, atol=1e-3)
    torch.testing.assert_close(run(opened(path / "encoder.onnx"), image=images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean", "first-last"])
def test_sentences_of_any_length_and_padding_does_not_reach_the_vector(tmp_path, pooling):
    from transformers import AutoTokenizer

    encoder = text_encoder(pooling)
    assert graphs.save_text(encoder, tmp_path / "out") < 1e-5
    session = opened(tmp_path / "out" / "encoder.onnx")
    assert [(taken.name, taken.shape) for taken in session.get_inputs()] == [
        ("input_ids", ["batch", "length"]),
        ("attention_mask", ["batch", "length"]),
    ]
    ids = torch.randint(5, 200, (2, 5))
    ids[1, 2:] = encoder.pad
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = run(session, input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        torch.testing.assert_close(found, encoder(ids, mask).pooled, atol=1e-5, rtol=1e-4)
    alone = run(session, input_ids=ids[1:, :2], attention_mask=mask[1:, :2])
    wider = torch.full((1, 20), 7)
    wider[:, :2] = ids[1:, :2]
    padded = run(session, input_ids=wider, attention_mask=(torch.arange(20) < 2).long()[None])
    torch.testing.assert_close(found[1:], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert len(tokenizer("x" * 90, truncation=True)["input_ids"]) == 20
    words = session.get_modelmeta().custom_metadata_map
    assert words["pooling"] == pooling and words["max_length"] == "20"


def test_another_architecture(tmp_path):
    encoder = text_encoder("mean", config={"model_type": "roberta", "max_position_embeddings": 40})
    assert graphs.save_text(encoder, tmp_path / "out") < 1e-5


@pytest.mark.parametrize("wrong", ["mask", "bias"])
def test_a_graph_that_answers_differently_is_not_kept(tmp_path, monkeypatch, wrong):
    encoder = text_encoder("mean")
    traced = graphs._traced

    def other(graph, *rest):
        if wrong == "mask":
            embed = lambda ids, mask: encoder(ids, torch.ones_like(mask)).pooled  # noqa: E731
        else:
            embed = lambda ids, mask: encoder(ids, mask).pooled + 2e-3  # noqa: E731
        return traced(graphs.TextGraph(encoder, embed).eval(), *rest)

    monkeypatch.setattr(graphs, "_traced", other)
    with pytest.raises(InputError, match=r"onnxruntime with .* answers differently \(by .*, so nothing was kept"):
        graphs.save_text(encoder, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_what_torch_cannot_write_is_refused(tmp_path):
    encoder = image_encoder("convnet-4", 16)
    forward = encoder.forward
    encoder.forward = lambda images: forward(images if float(images.sum()) > 0 else -images)
    with pytest.raises(InputError, match=r"torch cannot write convnet-4 as ONNX .*export --to safetensors"):
        graphs.save_image(encoder, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_large_weights_lie_beside_the_graph_and_nothing_tells_of_this_machine(tmp_path, monkeypatch):
    encoder = image_encoder("convnet-4", 16)
    graphs.save_image(encoder, tmp_path / "small")
    assert sorted(file.name for file in (tmp_path / "small").iterdir()) == ["counterpoint.json", "encoder.onnx"]
    monkeypatch.setattr(graphs, "LARGE", 0)
    graphs.save_image(encoder, tmp_path / "large")
    names = ["counterpoint.json", "encoder.onnx", "encoder.onnx.data"]
    assert sorted(file.name for file in (tmp_path / "large").iterdir()) == names
    moved = (tmp_path / "large").rename(tmp_path / "moved")
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(
        run(opened(moved / "encoder.onnx"), image=images),
        run(opened(tmp_path / "small" / "encoder.onnx"), image=images),
    )
    content = (tmp_path / "small" / "encoder.onnx").read_bytes()
    assert b".py" not in content and str(tmp_path).encode() not in content


def test_missing_packages_and_file_names_are_refused(tmp_path, monkeypatch):
    encoder = encoders.image("convnet-4", image_size=16)
    with pytest.raises(InputError, match=r"writes a folder with encoder\.onnx in it; name a folder, not .*model\.onnx"):
        graphs.save_image(encoder, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="a Linear is no ImageEncoder"):
        graphs.save_image(torch.nn.Linear(2, 2), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"needs onnxruntime: pip install counterpoint\[onnx\]"):
        graphs.save_image(encoder, tmp_path / "out")
    assert not [*tmp_path.iterdir()]
