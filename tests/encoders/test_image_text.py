"""Image and text towers: one space, what is normalised, what is cut, and the models of open_clip."""

import json
import logging
import sys

import pytest
import torch

from counterpoint.data import texts
from counterpoint.encoders.image_text import OpenClipTokenizer, towers
from counterpoint.errors import InputError

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CAPTIONS = ["A dog runs.", "It rains on the roof of the house", "x"]
SIZES = {"embed_dim": 12}
VISION = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
MODELS = {
    "tiny-clip": {**SIZES, "vision_cfg": VISION, "text_cfg": TEXT},
    "tiny-last": {
        **SIZES,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"},
        "custom_text": True,
        "init_logit_scale": 2.5,
        "init_logit_bias": -10,
    },
    "tiny-timm": {
        **SIZES,
        "vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "avg", "image_size": 32},
        "text_cfg": TEXT,
    },
    "tiny-coca": {
        **SIZES,
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**TEXT, "context_length": 15, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 15, "vocab_size": 49408, "width": 12, "heads": 2, "layers": 1},
        "custom_text": True,
    },
}


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    try:
        import open_clip
    except ModuleNotFoundError:
        return None  # the tests that need it skip themselves
    folder = tmp_path_factory.mktemp("configs")
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return open_clip


def build(image="convnet-4", text=None, seed=0, **options):
    if image.startswith("open_clip:") and sys.modules.get("open_clip", image) is not None:
        pytest.importorskip("open_clip")
    torch.manual_seed(seed)
    text = dict(TINY) if text is None and not image.startswith("open_clip:") else text
    return towers(image, text, **{"image_size": 32, **options}).eval()


def tokens(pair, captions=CAPTIONS):
    """Ids and mask, padded to the longest of these captions."""
    rows = texts.tokenise(texts.load(captions, whole=True), pair.tokenizer, pair.max_length)
    batch = rows.take(torch.arange(len(captions)))
    return batch["input_ids"], batch["attention_mask"]


def images(n=3, side=32, channels=3):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------------------------- ours


def test_each_tower_is_its_encoder_and_a_linear_map():
    pair = build(dim=12)
    ids, mask = tokens(pair)
    with torch.no_grad():
        expected = pair.images(images()).pooled @ pair.image_projection.weight.T
        torch.testing.assert_close(pair.image(images()), expected)
        expected = pair.texts(ids, mask).pooled @ pair.text_projection.weight.T
        torch.testing.assert_close(pair.text(ids, mask), expected)
    assert pair.image_projection.bias is None and pair.text_projection.bias is None
    assert (pair.dim, pair.image_size, pair.channels, pair.max_length, pair.positions) == (12, 32, 3, 77, 512)
    assert pair.texts.pooling == "mean" and pair.temperature == 0.07


def test_defaults():
    pair = towers("convnet-4")
    assert (pair.dim, pair.image_size, pair.max_length) == (512, 64, 77)
    config = pair.texts.model.config
    assert config.hidden_size == 256 and config.num_hidden_layers == 4 and config.hidden_dropout_prob == 0
    assert towers("convnet-4", "transformer-32-1", channels=1, image_size=16).image(images(2, 16, 1)).shape == (2, 512)


def test_whole_images_are_brought_to_the_tower():
    pair = build(image_size=16)
    pixels = (images(2, 48) * 255).to(torch.uint8)
    from counterpoint.views import plain

    with torch.no_grad():
        torch.testing.assert_close(pair.embed({"image": pixels}), pair.image(plain(pixels, 16)))


@pytest.mark.parametrize("image", ["convnet-4", "open_clip:tiny-clip", "open_clip:tiny-last", "open_clip:tiny-coca"])
def test_a_text_does_not_see_its_neighbours_padding(image):
    pair = build(image)
    with torch.no_grad():
        together = pair.text(*tokens(pair))
        alone = torch.cat([pair.text(*tokens(pair, [caption])) for caption in CAPTIONS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert (together[0] - together[1]).norm() > 1e-3


def test_timm_towers_normalise_pixels_themselves():
    pair = build("resnet10t", pretrained=False)
    mean, std = pair.images.mean, pair.images.std
    with torch.no_grad():
        raw = pair.images.model((images() - mean) / std) @ pair.image_projection.weight.T
        torch.testing.assert_close(pair.image(images()), raw)
    assert mean.shape == (3, 1, 1) and mean.min() > 0.3


def test_a_text_tower_that_reads_from_left_to_right_and_cannot_pad(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["a", "dog", "cat", "runs", "<end>"])}
    core = Tokenizer(models.WordLevel(words, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()

    def folder(name, **special):
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20, "vocab_size": len(words)}
        GPT2Model(GPT2Config(**sizes, bos_token_id=4, eos_token_id=4)).save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    pair = build(text=folder("ends", eos_token="<end>"), max_length=20)
    with torch.no_grad():
        found = pair.text(*tokens(pair, ["a dog runs", "a", "a cat runs a cat"]))
        torch.testing.assert_close(found[1:2], pair.text(*tokens(pair, ["a"])), atol=1e-5, rtol=1e-4)
    # the first token is "a" in all of them, and has seen nothing else
    assert (found[0] - found[2]).norm() > 1e-3 and pair.max_length == 20 == pair.positions
    with pytest.raises(InputError, match="neither a padding nor an end token"):
        build(text=folder("none"))


def test_every_parameter_gets_a_gradient():
    for image in (
        "convnet-4",
        "open_clip:tiny-clip",
        "open_clip:tiny-last",
        "open_clip:tiny-timm",
        "open_clip:tiny-coca",
    ):
        pair = build(image).train()
        ids, mask = tokens(pair)
        (pair.image(images()).square().sum() + pair.text(ids, mask).square().sum()).backward()
        without = [name for name, p in pair.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, (image, without)


@pytest.mark.parametrize("image", ["convnet-4", "open_clip:tiny-clip"])
def test_compiling_reaches_the_nets_that_are_called(image):
    pair = build(image)
    pair.compile(backend="eager")
    nets = pair.children() if image == "convnet-4" else pair.model.children()
    assert all(net._compiled_call_impl is not None for net in nets) and pair._compiled_call_impl is None


# ------------------------------------------------------------------------------------------------------------ open_clip


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_of_open_clip_give_what_open_clip_gives(name, models):
    from PIL import Image
    from torchvision.transforms.functional import to_pil_image

    pair = build(f"open_clip:{name}", image_size=None)
    torch.manual_seed(0)
    model, _, preprocess = models.create_model_and_transforms(name)
    model.load_state_dict(pair.model.state_dict())
    model.eval()
    pixels = (images() * 255).to(torch.uint8)
    pictures = torch.stack([preprocess(to_pil_image(x)) for x in pixels])
    assert isinstance(to_pil_image(pixels[0]), Image.Image)
    sentences = [
        *CAPTIONS,
        "a very long caption, much longer than sixteen tokens, so that it has to be cut somewhere",
        "",
    ]
    with torch.no_grad():
        torch.testing.assert_close(
            pair.image(pixels / 255), model.encode_image(pictures, normalize=False), atol=1e-4, rtol=1e-3
        )
        theirs = model.encode_text(models.get_tokenizer(name)(sentences), normalize=False)
        torch.testing.assert_close(pair.text(*tokens(pair, sentences)), theirs, atol=1e-5, rtol=1e-4)
    assert (pair.dim, pair.image_size, pair.positions) == (12, 32, model.context_length)
    assert pair.temperature == pytest.approx(float(1 / model.logit_scale.exp()))


def test_weights_come_from_a_local_checkpoint_and_the_scale_with_them(models, tmp_path):
    torch.manual_seed(5)
    model = models.create_model("tiny-clip")
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    pair = build(f"open_clip:tiny-clip/{tmp_path}/weights.pt")
    assert all(torch.equal(a, b) for a, b in zip(pair.model.parameters(), model.parameters(), strict=True))
    assert pair.temperature == pytest.approx(torch.tensor(-4.0).exp().item())
    trained = {name for name, p in pair.named_parameters() if p.requires_grad}
    assert "model.logit_scale" not in trained and "model.visual.proj" in trained


def test_a_model_can_take_another_size():
    pair = build("open_clip:tiny-clip", image_size=64, max_length=8, dim=12)
    assert pair.image_size == 64 and pair.max_length == 8
    assert pair.image(images(2, 64)).shape == (2, 12)
    assert tokens(pair, ["many words that go on and on and on"])[0].shape[1] == 8


def test_the_tokeniser_answers_as_one_of_transformers(models):
    tokenizer = OpenClipTokenizer(models.get_tokenizer("tiny-clip"), 16)
    first, last = 49406, 49407
    found = tokenizer(["a dog", ""], truncation=True, max_length=16, return_attention_mask=False)["input_ids"]
    assert [len(row) for row in found] == [4, 2] and found[1] == [first, last] and tokenizer.pad_token_id == 0
    assert tokenizer("a dog")["input_ids"] == [found[0]]
    long = "dog " * 30
    assert len(tokenizer([long], max_length=8)["input_ids"][0]) == 8
    assert len(tokenizer([long], truncation=False)["input_ids"][0]) == 32


def test_long_captions_are_counted(caplog):
    pair = build("open_clip:tiny-clip")
    tokens(pair, ["dog " * 30, "a dog"])
    assert "1 of 2 sentences cut to 16 tokens" in caplog.text


def test_open_clip_does_not_talk(capfd, caplog):
    handlers = list(logging.getLogger().handlers)
    build("open_clip:tiny-clip")
    assert not caplog.records and capfd.readouterr().err == "" and logging.getLogger().handlers == handlers


@pytest.mark.parametrize(
    "image, options, message",
    [
        ("open_clip:tiny-clap", {}, 'open_clip has no model "tiny-clap"; did you mean tiny-clip'),
        (
            "open_clip:ViT-B-32/lion2b_s34b_b79k",
            {},
            "neither a file nor weights of ViT-B-32; did you mean laion2b_s34b_b79k",
        ),
        ("open_clip:ViT-B/32/no.pt", {}, '"no.pt" is neither a file nor weights of ViT-B-32; its tags are '),
        ("open_clip:local-dir:/no/such/folder", {}, "could not be loaded: .*not found"),
        ("open_clip:tiny-clip", {"text": "transformer"}, "brings its own text tower: leave text out"),
        ("open_clip:tiny-clip", {"channels": 1}, "takes images of 3 channels, not 1"),
        ("open_clip:tiny-clip", {"dim": 512}, "have 12 dimensions: leave dim out, or say 12, not 512"),
        ("open_clip:tiny-clip", {"max_length": 17}, "between 3 and 16, not 17"),
        ("open_clip:ViT-B-32", {"pretrained": True}, "say which weights: open_clip:ViT-B-32/TAG, .* openai"),
        ("convnet-4", {"max_length": 600}, "between 3 and 512, not 600"),
        ("convnet-4", {"dim": 0}, "dim must be at least 1"),
        ("resnet1", {}, 'no image encoder named "resnet1"'),
        ("convnet-4", {"text": "./no-such-folder"}, "there is no folder ./no-such-folder"),
    ],
)
def test_what_cannot_be_built_is_refused(image, options, message):
    with pytest.raises(InputError, match=message):
        build(image, **options)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="could not be loaded"):
        build(f"open_clip:tiny-clip/{tmp_path}/w.pt")


def test_open_clip_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(InputError, match=r"pip install counterpoint\[image-text\]"):
        build("open_clip:tiny-clip")
