"""CLIP computes its formula, masks what it says, bounds its scale, and learns."""

import csv
import json
import math
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from counterpoint import cli, contrast
from counterpoint.data import Images, captions
from counterpoint.errors import InputError
from counterpoint.methods.image_text.clip import CLIP, MOST_SCALE, drawn
from counterpoint.train import Method, fit, resume
from counterpoint.train.batches import Batches
from counterpoint.train.checkpoint import load_state
from counterpoint.train.optimise import Optimisation
from counterpoint.views import ImageViews

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 220), "yellow": (230, 220, 20)}
WHERE = ("left", "right")


pytestmark = pytest.mark.usefixtures("one_thread")


def picture(colour, where, noise):
    x = np.full((12, 12, 3), 128) + noise
    half = slice(0, 6) if where == "left" else slice(6, 12)
    x[:, half] = np.array(COLOURS[colour]) + noise[:, half]
    return x.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """64 pictures of a colour on one side, one of eight captions each: many of them equal."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    with open(folder / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for i in range(64):
            colour, where = list(COLOURS)[i % 4], WHERE[i // 4 % 2]
            Image.fromarray(picture(colour, where, random.integers(-15, 16, (12, 12, 3)))).save(folder / f"{i}.png")
            rows.writerow([f"{i}.png", f"{colour} on the {where}"])
    return folder / "pairs.csv"


def build(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"encoder": "convnet-4", "text": dict(TINY), "dim": 16, "image_size": 12, "max_length": 24}
    return CLIP(**{**sizes, **options}).train()


def batch_of(method, rows=6):
    """Six images with one to three captions each, of which some are the same text."""
    generator = torch.Generator().manual_seed(1)
    caption = torch.tensor([[0, 1, 2], [3, -1, -1], [0, 1, -1], [4, 5, 6], [3, -1, -1], [7, -1, -1]])[:rows]
    words = ["a dog", "the dog", "dog", "two cats", "it rains", "rain", "the sky is falling", "x"]
    rows_of = method.encoder.tokenizer([words[i] for i in caption.clamp(min=0).flatten()])["input_ids"]
    ids = torch.zeros(len(rows_of), max(map(len, rows_of)), dtype=torch.int64)
    mask = ids.clone()
    for i, (row, real) in enumerate(zip(rows_of, caption.flatten() >= 0, strict=True)):
        if real:
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    image = torch.randint(0, 256, (len(caption), 3, 12, 12), dtype=torch.uint8, generator=generator)
    shape = (*caption.shape, -1)
    return {"image": image, "input_ids": ids.view(shape), "attention_mask": mask.view(shape), "caption": caption,
            "index": torch.arange(len(caption))}  # fmt: skip


def spied(method, batch, seed=3):
    """The loss and the two sets of embeddings it was computed from."""
    method.watching = True
    torch.manual_seed(seed)
    loss = method.loss(batch)
    method.watching = False
    return loss, method.watched["query"], method.watched["key"]


def plain(image, text, temperature, ignored=None):
    """Cross entropy of the whole matrix both ways, in float64."""
    u, v = F.normalize(image.double(), dim=1), F.normalize(text.double(), dim=1)
    logits = u @ v.T / temperature
    if ignored is not None:
        logits = logits.masked_fill(ignored & ~torch.eye(len(u), dtype=torch.bool), -torch.inf)
    own = torch.arange(len(u))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# --------------------------------------------------------------------------------------------------------------- formula


def test_the_loss_is_cross_entropy_both_ways():
    method = build(temperature=0.2)
    loss, image, text = spied(method, batch_of(method))
    assert loss.item() == pytest.approx(plain(image, text, 0.2).item(), rel=1e-5)
    assert image.shape == text.shape == (6, 16)


def test_neither_side_is_privileged():
    torch.manual_seed(0)
    a, b = torch.randn(7, 5), torch.randn(7, 5)
    method = build()
    assert method.objective(a, b, temperature=0.1).item() == pytest.approx(
        method.objective(b, a, temperature=0.1).item()
    )
    assert method.objective is contrast.clip_loss


def test_images_and_captions_belong_together_row_by_row():
    method = build()
    batch = batch_of(method)
    torch.manual_seed(3)
    with torch.no_grad():
        image = method.encoder.image(method.views(batch["image"]))
        ids, mask, _ = drawn(batch)
        text = method.encoder.text(ids, mask)
    _, query, key = spied(method, batch)
    torch.testing.assert_close(query, image)
    torch.testing.assert_close(key, text)


def test_equal_captions_can_be_left_out():
    batch = batch_of(build())
    batch["caption"] = batch["caption"][:, :1]  # texts 0, 3, 0, 4, 3, 7
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name][:, :1]
    equal = batch["caption"] == batch["caption"].T
    method, as_paper = build(duplicates="masked"), build()
    loss, image, text = spied(method, batch)
    assert loss.item() == pytest.approx(plain(image, text, 0.07, equal).item(), rel=1e-5)
    other, *_ = spied(as_paper, batch)
    assert other.item() == pytest.approx(plain(image, text, 0.07).item(), rel=1e-5)
    assert other - loss > 0.01
    one_way = build(duplicates="masked", objective="info_nce")
    logits = contrast.unit(image.double()) @ contrast.unit(text.double()).T / 0.07
    logits = logits.masked_fill(equal & ~torch.eye(6, dtype=torch.bool), -torch.inf)
    expected = F.cross_entropy(logits, torch.arange(6)).item()
    assert spied(one_way, batch)[0].item() == pytest.approx(expected, rel=1e-5)


def test_what_is_masked_is_the_caption_that_was_drawn():
    """Images 0 and 2 share two of their captions: whether they are false negatives depends on the draw."""
    method = build(duplicates="masked")
    batch = batch_of(method)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        method.views(batch["image"])
        caption = drawn(batch)[2]
        loss, image, text = spied(method, batch, seed)
        assert loss.item() == pytest.approx(plain(image, text, 0.07, caption[:, None] == caption).item(), rel=1e-5)
        seen.add(bool(caption[0] == caption[2]))
    assert seen == {True, False}


def test_captions_are_drawn_evenly_and_never_from_the_padding():
    batch = batch_of(build())
    torch.manual_seed(0)
    chosen = torch.stack([drawn(batch)[2] for _ in range(600)])
    for image, caption in enumerate(batch["caption"]):
        own = caption[caption >= 0]
        share = (chosen[:, image, None] == own).float().mean(0)
        assert share.sum() == pytest.approx(1) and (share - 1 / len(own)).abs().max() < 0.08
    assert len(chosen[:, 0].unique()) == 3
    # two images with the same captions draw apart
    assert (chosen[:, 0] == chosen[:, 2]).float().mean() < 0.5


@pytest.mark.parametrize("name", sorted(contrast.PAIR_OBJECTIVES))
def test_any_objective_of_pairs_is_taken_by_name(name):
    method = build(objective=name, temperature=0.3)
    loss, image, text = spied(method, batch_of(method))
    expected = contrast.PAIR_OBJECTIVES[name](image, text, temperature=0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert method.logit_scale.grad.abs() > 0


# ----------------------------------------------------------------------------------------------------------- logit scale


def test_the_scale_starts_as_said_and_has_the_gradient_of_the_formula():
    method = build()
    assert method.logit_scale.item() == pytest.approx(
        math.log(1 / 0.07)
    ) and method.temperature.item() == pytest.approx(0.07)
    method = build(temperature=0.5)
    loss, image, text = spied(method, batch_of(method))
    (found,) = torch.autograd.grad(loss, method.logit_scale)
    log_scale = torch.tensor(math.log(2.0), dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(image, text, torch.exp(-log_scale)), log_scale)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4) and abs(expected) > 1e-4


def test_the_scale_never_passes_one_hundred():
    method = build(temperature=0.01)
    with torch.no_grad():
        method.logit_scale.fill_(6.0)
    assert 1 / method.temperature.item() == pytest.approx(100, rel=1e-4)
    method.after_step()
    assert method.logit_scale.item() == pytest.approx(MOST_SCALE)
    # at the bound it can still come back
    spied(method, batch_of(method))[0].backward()
    assert method.logit_scale.grad.abs() > 0
    with torch.no_grad():
        method.logit_scale.fill_(-1.0)
    method.after_step()
    assert method.logit_scale.item() == -1.0


def test_the_scale_does_not_decay():
    method = build()
    method.optimisation = Optimisation(weight_decay=0.2)
    groups = {id(p): group["weight_decay"] for group in method.parameter_groups() for p in group["params"]}
    assert groups[id(method.logit_scale)] == 0 and groups[id(method.encoder.image_projection.weight)] == 0.2
    assert len(groups) == sum(p.requires_grad for p in method.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.009}, "from 0.01"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"objective": "clip"}, 'no objective named "clip"'),
        ({"duplicates": "merged"}, 'not "merged"'),
        ({"duplicates": "masked", "objective": "dcl"}, "dcl cannot leave pairs out: take clip_loss or info_nce"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


# ------------------------------------------------------------------------------------------------------------------ data


def test_embeddings_are_of_images_and_of_texts():
    method = build(image_size=16)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    vectors = method.encode(pixels, batch_size=2)
    assert vectors.shape == (5, 16) and vectors.dtype == np.float32 and method.training
    method.eval()
    with torch.no_grad():
        whole = method.encoder.image(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
        torch.testing.assert_close(torch.from_numpy(vectors), whole, atol=1e-5, rtol=1e-4)
    images = Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
    assert np.array_equal(method.encode(images), method.encode(pixels))
    assert np.array_equal(method.embed({"image": images.image}).detach().numpy(), method.encode(images))
    said = method.encode_text(["a dog", "", "a much longer sentence than that", "a dog"], batch_size=2)
    assert said.shape == (4, 16) and np.allclose(said[0], said[3], atol=1e-6) and np.isfinite(said).all()
    for i, sentence in enumerate(["a dog", "", "a much longer sentence than that"]):
        assert np.allclose(method.encode_text(sentence), said[i], atol=1e-5)
    assert method.encode_text([]).shape == (0, 16)


def test_grey_towers_take_colour_and_the_other_way_round():
    grey = np.random.default_rng(0).integers(0, 256, (4, 12, 12), dtype=np.uint8)
    colour = np.repeat(grey[..., None], 3, 3)
    assert np.allclose(build(channels=1).encode(grey), build(channels=1).encode(colour), atol=1e-3)
    assert np.allclose(build().encode(grey), build().encode(colour), atol=1e-5)


def test_pairs_are_read_from_a_table(table):
    method = build()
    items = method.read(table)
    assert len(items) == 64 and len(method.read(table, limit=10)) == 10 and len(method.read(items, limit=7)) == 7
    batch = items.take(torch.arange(9))
    assert batch["image"].shape == (9, 3, 13, 13) and batch["caption"].shape == (9, 1)
    assert batch["caption"][0] == batch["caption"][8] != batch["caption"][1]
    decode = method.encoder.tokenizer.decode
    assert decode(batch["input_ids"][5, 0], skip_special_tokens=True) == "green on the right"
    pairs = captions.load(table, size=method.stored_size)
    assert np.array_equal(method.encode(table), method.encode(pairs))
    assert np.array_equal(method.encode(items), method.encode(pairs))


def test_images_are_kept_as_large_as_the_smallest_crop_needs():
    assert build(image_size=100).stored_size == 106  # 100 / sqrt(0.9)
    assert build(image_size=100, views=ImageViews(crop=None)).stored_size == 100
    assert build(image_size=100, views=ImageViews(crop=(0.08, 1.0))).stored_size == 200


def test_pairs_that_are_decoded_when_asked_for_train_alike(table):
    method = build()
    kept, streamed = method.read(table), method.read(table, resident=False)
    one, two = (next(iter(Batches(items, 12, seed=5, workers=0))) for items in (kept, streamed))
    assert isinstance(streamed, captions.PairFiles) and torch.equal(one["caption"], two["caption"])
    assert spied(method, two)[0].item() == pytest.approx(spied(method, one)[0].item(), rel=1e-5)
    assert np.array_equal(method.encode(streamed), method.encode(kept))
    assert len(method.read(streamed, limit=9)) == 9


@pytest.mark.parametrize(
    "data, message",
    [
        ("cifar10", "CLIP learns from images with captions, but cifar10 has none: say cifar10-captions"),
        ("omniglot", "but omniglot has none"),
        ("stsb", "stsb holds sentences only"),
        ("stsb:dev", "stsb:dev holds sentences only"),
        (
            np.zeros((4, 8, 8, 3), np.uint8),
            "an array holds images only: hand in a table with the columns image and caption",
        ),
    ],
)
def test_data_that_lack_one_side_say_so(data, message):
    with pytest.raises(InputError, match=message):
        build().read(data)


def test_images_without_captions_cannot_be_trained_on(tmp_path):
    with pytest.raises(InputError, match="these have none: hand in a table"):
        fit(build(), Images(torch.zeros(8, 3, 12, 12, dtype=torch.uint8)), run=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------------------- training

QUICK = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.0, "progress": False, "batch_size": 16}


def test_it_learns_which_caption_belongs_to_which_image(table, tmp_path):
    from counterpoint.evaluate.image_text import retrieval

    method = build(duplicates="masked")
    run = fit(method, table, epochs=25, run=tmp_path / "run", **QUICK)
    pairs = captions.load(table)
    owner = [[i for i in range(64) if pairs.captions[i, 0] == t] for t in range(len(pairs.texts))]
    there, back, _ = retrieval(run.encode(table), run.method.encode_text(list(pairs.texts)), torch.tensor(owner))
    assert there.value > 90 and back.value == 100 and there.detail["chance R@1"] == pytest.approx(12.5)
    assert 0.01 <= run.method.temperature.item() != pytest.approx(0.07, abs=1e-4)
    unseen = np.stack(
        [picture("blue", "left", np.zeros((12, 12, 3), int)), picture("red", "right", np.zeros((12, 12, 3), int))]
    )
    similarity = contrast.unit(torch.from_numpy(run.encode(unseen))) @ contrast.unit(
        torch.from_numpy(run.method.encode_text(["blue on the left", "red on the right"]))).T  # fmt: skip
    assert similarity[0, 0] > similarity[0, 1] and similarity[1, 1] > similarity[1, 0]


def test_a_stopped_training_goes_on_exactly(table, tmp_path, monkeypatch):
    options = {**QUICK, "epochs": 2, "checkpoint_seconds": 0}
    entire = fit(build(), table, run=tmp_path / "entire", **options)
    original, seen = Method.training_step, []

    def step(self, *arguments):
        seen.append(1)
        if len(seen) == 6:  # in the second batch of the second epoch
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", step)
        stopped = fit(build(), table, run=tmp_path / "stopped", **options)
    assert stopped.interrupted
    resume(tmp_path / "stopped")
    one, two = (
        load_state(tmp_path / name / "checkpoints" / "last.safetensors")["state_dict"] for name in ("entire", "stopped")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert one["logit_scale"] != build().logit_scale and entire.config["model"]["text"] == TINY


def test_from_the_command_line(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "clip", "--data", str(table), "--encoder", "convnet-4", "--text", "transformer-32-1", "--dim", "8",
             "--image_size", "12", "--max_length", "20", "--duplicates", "masked", "--epochs", "2", "--batch_size", "16",
             "--optimizer", "adamw", "--lr", "0.001", "--log_every", "1", "--run", "r"]  # fmt: skip
    assert cli.main(words) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(math.isfinite(line["loss"]) for line in lines) and "alignment" in lines[0]
    assert "pairs/s" in capsys.readouterr().err
    assert cli.main([*words[:-1], "dcl", "--duplicates", "negatives", "--objective", "dcl", "--epochs", "1"]) == 0
    assert cli.main([*words[:-1], "bad", "--objective", "dcl"]) == 2
    assert "dcl cannot leave pairs out" in capsys.readouterr().err


def test_models_of_open_clip_train_by_the_same_method(table, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 12, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-pairs.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-pairs.json")
    torch.manual_seed(0)
    method = CLIP("open_clip:tiny-pairs")
    assert method.image_size == 12 and method.encoder.max_length == 12
    before = method.logit_scale.item()
    run = fit(method, table, epochs=4, run=tmp_path / "run", log_every=1, **{**QUICK, "lr": 0.003})
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.2 and run.method.logit_scale.item() != before
    assert np.array_equal(run.model().encode(table), method.encode(table))
