"""Image and text towers leave together: our file, two graphs, and open_clip's own folder."""

import json
import math

import pytest
import torch

from counterpoint.encoders.image_text import towers
from counterpoint.errors import InputError
from counterpoint.export import export, graphs, load_encoder, open_clip_folder, weights
from counterpoint.export.checks import tokens
from counterpoint.methods.image_text.clip import CLIP

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CAPTIONS = ["A dog runs.", "It rains on the roof of the house", "x", ""]
VISION = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
MODELS = {
    "small-clip": {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT},
    "small-sigmoid": {
        "embed_dim": 12,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"},
        "custom_text": True,
        "init_logit_bias": -10,
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("configs")
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return open_clip


def build(image="convnet-4", **options):
    torch.manual_seed(0)
    text = None if image.startswith("open_clip:") else dict(TINY)
    return towers(image, text, **{"image_size": 32, "max_length": 12, **options}).eval()


def answers(encoder):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return encoder.image(images), encoder.text(*tokens(encoder, CAPTIONS).values())


def same(one, other, **options):
    return all(torch.allclose(a, b, **options) for a, b in zip(answers(one), answers(other), strict=True))


@pytest.mark.parametrize("name", ["convnet-4", "open_clip:small-clip", "open_clip:small-sigmoid"])
def test_one_file_holds_both(tmp_path, models, name):
    encoder = build(name)
    encoder.temperature = 0.031
    path = tmp_path / "encoder.safetensors"
    assert weights.save(encoder, path) == 0
    torch.manual_seed(9)
    again = load_encoder(path)
    assert type(again) is type(encoder) and not again.training and same(again, encoder, atol=0, rtol=0)
    for attribute in ("name", "dim", "image_size", "channels", "max_length", "positions", "temperature"):
        assert getattr(again, attribute) == getattr(encoder, attribute)


@pytest.mark.parametrize("name", ["convnet-4", "open_clip:small-clip"])
def test_a_graph_for_each_tower(tmp_path, models, name):
    for needed in ("onnx", "onnxscript"):
        pytest.importorskip(needed)
    runtime = pytest.importorskip("onnxruntime")
    encoder = build(name)
    assert graphs.save_towers(encoder, tmp_path / "out") < 1e-5
    image, text = (runtime.InferenceSession(tmp_path / "out" / f"{part}.onnx") for part in ("image", "text"))
    assert (tmp_path / "out" / "tokenizer").is_dir() == (name == "convnet-4")
    words = image.get_modelmeta().custom_metadata_map
    assert words.get("tokenizer") == (None if name == "convnet-4" else "open_clip.get_tokenizer('small-clip')")
    # more rows than the torch tower takes in one piece, each as if it were alone
    captions = [f"{'dog ' * (i % 5)}{i}" for i in range(40)]
    inputs = {key: value.numpy() for key, value in tokens(encoder, captions).items()}
    found = torch.from_numpy(text.run(None, inputs)[0])
    with torch.no_grad():
        alone = torch.cat([encoder.text(*tokens(encoder, [caption]).values()) for caption in captions])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = encoder.image(images)
    torch.testing.assert_close(torch.from_numpy(image.run(None, {"image": images.numpy()})[0]), expected)


@pytest.mark.parametrize("name", ["small-clip", "small-sigmoid"])
def test_open_clip_opens_its_folder(tmp_path, models, name):
    encoder = build(f"open_clip:{name}", image_size=48)
    encoder.temperature = 0.02
    path = tmp_path / "out"
    assert open_clip_folder.save(encoder, path) < 1e-5
    torch.manual_seed(9)
    model = models.create_model(f"local-dir:{path}").eval()
    assert float(model.logit_scale.detach()) == pytest.approx(-math.log(0.02))
    ids = models.get_tokenizer(f"local-dir:{path}")(CAPTIONS)
    images = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image((images - encoder.mean) / encoder.std), encoder.image(images))
        text = encoder.text(*tokens(encoder, ["A dog runs."]).values())
        torch.testing.assert_close(model.encode_text(ids[:1]), text)
    again = towers(f"open_clip:local-dir:{path}", max_length=12).eval()
    assert again.temperature == pytest.approx(0.02) and again.image_size == 48
    torch.testing.assert_close(again.mean, encoder.mean)


def test_only_models_of_open_clip_have_its_folder(tmp_path, models, monkeypatch):
    with pytest.raises(InputError, match=r"convnet-4 and .* is no model of open_clip; export --to safetensors or onnx"):
        open_clip_folder.save(build(), tmp_path / "out")
    encoder, other = build("open_clip:small-clip"), build("open_clip:small-sigmoid")
    monkeypatch.setattr(models, "create_model", lambda _: other.model)
    with pytest.raises(InputError, match="open_clip answers differently"):
        open_clip_folder.save(encoder, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


class Trained:
    """As much of a run as `export` looks at."""

    config = {"method": "clip"}  # noqa: RUF012

    def __init__(self, method, folder):
        self.method, self.folder = method, folder

    def model(self):
        return self.method.eval()


def test_the_temperature_is_the_one_that_was_learned(tmp_path):
    torch.manual_seed(0)
    method = CLIP(encoder="convnet-4", text=dict(TINY), image_size=32, temperature=0.5)
    with torch.no_grad():
        method.logit_scale.fill_(math.log(20))
    path, difference = export(Trained(method, tmp_path), "safetensors")
    assert difference == 0 and load_encoder(path).temperature == pytest.approx(0.05)
