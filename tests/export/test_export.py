"""What leaves the house loads back and answers the same."""

import json

import pytest
import torch
from safetensors.torch import save_file

from counterpoint.errors import InputError
from counterpoint.export import export, load_encoder
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.train import Run, fit


def trained(folder, size: int, encoder: str, channels: int = 3, batch: int = 4) -> Run:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, channels, size, size), dtype=torch.uint8)
    method = SimCLR(encoder=encoder, image_size=size, channels=channels, projection=(16, 8))
    return fit(method, images, epochs=1, batch_size=batch, run=folder / "run", progress=False)


@pytest.mark.parametrize(("encoder", "channels"), [("convnet-4", 1), ("resnet10t", 3)])
def test_safetensors_answers_exactly_the_same(tmp_path, encoder, channels):
    run = trained(tmp_path, 32, encoder, channels)
    path, difference = export(run, "safetensors", tmp_path / "deep" / "encoder.safetensors")
    assert path == tmp_path / "deep" / "encoder.safetensors" and difference == 0
    again, method = load_encoder(path), run.model()
    assert not again.training and (again.name, again.channels, again.image_size) == (encoder, channels, 32)
    images = torch.rand(3, channels, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images).pooled, method.encoder(images).pooled)
        assert not torch.equal(again(images).pooled, run.untrained().encoder(images).pooled)
    assert export(run, "safetensors")[0] == run.folder / "encoder.safetensors"


@pytest.mark.parametrize(("encoder", "channels"), [("resnet10t", 3), ("resnet10t", 1), ("test_vit", 3)])
def test_timm_opens_the_folder(tmp_path, encoder, channels):
    import timm

    run = trained(tmp_path, 96, encoder, channels, batch=2)
    path, difference = export(run, "timm")
    assert path == run.folder / "timm" and difference < 1e-5
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "counterpoint.json", "model.safetensors"]
    again = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
    original = run.model().encoder.model
    images = torch.rand(2, channels, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(again(images), original(images), rtol=1e-5, atol=1e-5)
    config = json.loads((path / "config.json").read_text())
    assert config["architecture"] == encoder and config["pretrained_cfg"]["input_size"] == [channels, 96, 96]
    assert len(config["pretrained_cfg"]["mean"]) == len(config["pretrained_cfg"]["std"]) == channels


def test_what_timm_cannot_rebuild_is_refused_with_the_reason(tmp_path):
    with pytest.raises(InputError, match=r"resnet10t has the stem for small images.*safetensors.*image_size above 64"):
        export(trained(tmp_path / "a", 32, "resnet10t"), "timm")
    run = trained(tmp_path / "b", 32, "convnet-4")
    with pytest.raises(InputError, match="convnet-4 is not a timm model; export --to safetensors or onnx"):
        export(run, "timm")
    assert not (run.folder / "timm").exists()


def test_formats_are_refused_with_those_that_are_possible(tmp_path, monkeypatch):
    run = trained(tmp_path, 32, "convnet-4")
    with pytest.raises(InputError, match=r'cannot export to "onxx"; there are safetensors, onnx, timm.*mean onnx\?'):
        export(run, "onxx")
    with pytest.raises(InputError, match=r"images cannot be exported --to open_clip; .*safetensors or onnx or timm"):
        export(run, "open_clip")
    monkeypatch.setattr(SimCLR, "family", "smells")
    with pytest.raises(InputError, match="smells cannot be exported --to onnx; embed writes their vectors"):
        export(run, "onnx")


def test_a_timm_export_that_answers_differently_is_not_kept(tmp_path, monkeypatch):
    import timm

    run = trained(tmp_path, 96, "resnet10t", batch=2)
    path, _ = export(run, "timm")
    good = (path / "model.safetensors").read_bytes()
    create = timm.create_model

    def other(name, *arguments, **options):
        model = create(name, *arguments, **options)
        if name.startswith("local-dir:"):
            torch.nn.init.normal_(model.conv1[0].weight)
        return model

    monkeypatch.setattr(timm, "create_model", other)
    with pytest.raises(InputError, match=r"timm's resnet10t answers differently .* nothing was kept"):
        export(run, "timm", tmp_path / "other")
    with pytest.raises(InputError, match="answers differently"):
        export(run, "timm")
    assert (path / "model.safetensors").read_bytes() == good
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run"]
    assert not list(run.folder.glob(".*"))


def test_other_files_are_no_encoders(tmp_path):
    with pytest.raises(InputError, match="is not an encoder that counterpoint exported"):
        load_encoder(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "partly.safetensors", metadata={"encoder": '{"name": "convnet-4"}'})
    about = {"name": "convnet-4", "image_size": 16, "channels": 3, "dim": 32}
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors", metadata={"encoder": json.dumps(about)})
    for name in ("text", "weights", "partly", "other"):
        with pytest.raises(InputError, match=rf"{name}\.safetensors is not an encoder that counterpoint exported"):
            load_encoder(tmp_path / f"{name}.safetensors")
