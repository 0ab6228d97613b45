"""Protocols for images and texts against brute force, known answers and chance."""

import math

import numpy as np
import pytest
import torch

from counterpoint.data import Images, captions
from counterpoint.data.pairs import Pairs
from counterpoint.errors import InputError
from counterpoint.evaluate import image_text
from counterpoint.evaluate.image_text import (
    TEMPLATES,
    class_vectors,
    first_hits,
    measure,
    modality_gap,
    retrieval,
    zero_shot,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


# ------------------------------------------------------------------------------------------------------------ zero-shot


def words(sentences):
    """Sum of fixed random vectors of letters, of very different length from sentence to sentence."""
    table = random(256, 6, seed=3)
    return torch.stack([sum((i + 1) * table[b] for i, b in enumerate(s.encode())) for s in sentences]).half()


def test_a_class_is_the_mean_direction_of_its_prompts():
    found = class_vectors(words, ["ant", "polar_bear", "top/shirt"], ["a photo of {a}", "{} and {}", "x {}"])
    for vector, name, article in zip(found, ["ant", "polar bear", "top or shirt"], ["an", "a", "a"], strict=True):
        prompts = [f"a photo of {article} {name}", f"{name} and {name}", f"x {name}"]
        expected = unit(unit(words(prompts).double()).mean(0))
        assert np.allclose(vector, expected.numpy(), atol=1e-3)
    assert found.dtype == np.float32 and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert class_vectors(words, ["ant"]).shape == (1, 6)
    assert all("{}" in line or "{a}" in line for line in TEMPLATES) and len(set(TEMPLATES)) == len(TEMPLATES)


@pytest.mark.parametrize(
    "classes, templates, message",
    [
        ([], TEMPLATES, "at least one class name and one template"),
        (["a"], [], "at least one class name and one template"),
        (["a"], ["{}", "a photo"], r'template "a photo" does not name the class'),
    ],
)
def test_prompts_that_cannot_be(classes, templates, message):
    with pytest.raises(InputError, match=message):
        class_vectors(words, classes, templates)


def test_zero_shot_takes_the_nearest_class():
    images, texts = random(50, 8), random(7, 8, seed=1)
    labels = torch.randint(7, (50,), generator=torch.Generator().manual_seed(2))
    result = zero_shot(images, labels, texts, classes=list("abcdefg"), subject="trained")
    cosine = unit(images) @ unit(texts).T
    order = cosine.argsort(1, descending=True)
    right = order[:, 0] == labels
    assert result.value == pytest.approx(100 * right.float().mean().item())
    assert result.detail["top-5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert result.detail["chance"] == pytest.approx(100 * labels.bincount().max().item() / 50)
    each = {name: 100 * right[labels == i].float().mean().item() for i, name in enumerate("abcdefg")}
    assert result.detail["per_class"] == pytest.approx(each)
    assert result.detail["mean_per_class"] == pytest.approx(np.mean([*each.values()]))
    assert (result.protocol, result.metric, result.n, result.subject) == ("zero-shot", "accuracy", 50, "trained")
    assert result.ci[0] <= result.value <= result.ci[1]
    # neither the length of a vector nor the block it falls into matters
    again = zero_shot(images.numpy() * 7, labels.numpy(), texts * torch.arange(1, 8)[:, None])
    assert again.value == result.value and again.detail["per_class"]["0"] == pytest.approx(each["a"])


def test_classes_without_images_do_not_count():
    result = zero_shot(torch.eye(3), torch.tensor([0, 0, 2]), torch.eye(4, 3) + 0.1, classes=["a", "b", "c", "d"])
    assert list(result.detail["per_class"]) == ["a", "c"] and "top-5" not in result.detail
    assert result.value == pytest.approx(200 / 3) and result.detail["mean_per_class"] == pytest.approx(75)


def test_a_constant_embedding_guesses():
    images, texts = torch.full((40, 5), 0.3), torch.full((8, 5), 0.7)
    result = zero_shot(images, torch.zeros(40, dtype=torch.int64), texts)
    assert result.value == pytest.approx(100 / 8) and result.detail["top-5"] == pytest.approx(500 / 8)
    assert zero_shot(torch.zeros(4, 5), torch.arange(4), random(4, 5)).value == pytest.approx(25)


@pytest.mark.parametrize(
    "images, labels, texts, message",
    [
        (random(3, 4), torch.tensor([0, 1, 2]), random(2, 4), "between 0 and 1, one class vector each, not at 2"),
        (random(3, 4), torch.tensor([0, -1, 1]), random(2, 4), "between 0 and 1"),
        (random(3, 4), torch.tensor([0, 1]), random(2, 4), "3 image features but image labels"),
        (random(3, 4), torch.tensor([0, 1, 1]), random(2, 5), "4 dimensions but class vectors 5"),
        (random(3, 4) * math.nan, torch.tensor([0, 1, 1]), random(2, 4), "NaN"),
        (random(3, 4), torch.tensor([0.0, 1, 1]), random(2, 4), "whole numbers"),
    ],
)
def test_zero_shot_refuses(images, labels, texts, message):
    with pytest.raises(InputError, match=message):
        zero_shot(images, labels, texts)


# ------------------------------------------------------------------------------------------------------------ retrieval


def brute(images, texts, owners):
    """R@k by sorting: image -> text, text -> image. `owners` lists the images of each text."""
    cosine = (unit(images.double()) @ unit(texts.double()).T).numpy()
    there, back = {}, {}
    for k in (1, 5, 10):
        asked = [i for i in range(len(images)) if any(i in owner for owner in owners)]
        hits = [any(i in owners[t] for t in np.argsort(-cosine[i])[:k]) for i in asked]
        there[f"R@{k}"] = 100 * np.mean(hits)
        hits = [any(i in owner for i in np.argsort(-cosine[:, t])[:k]) for t, owner in enumerate(owners) if owner]
        back[f"R@{k}"] = 100 * np.mean(hits)
    return there, back


@pytest.mark.parametrize("block", [1, 100, 2**24])
def test_retrieval_is_what_sorting_gives(block, monkeypatch):
    monkeypatch.setattr(image_text, "BLOCK", block)
    owner = torch.arange(25).repeat_interleave(3)[torch.randperm(75, generator=torch.Generator().manual_seed(5))]
    images = random(25, 6)
    texts = images[owner] + 1.2 * random(75, 6, seed=1)
    there, back, mean = retrieval(images, texts, owner, subject="trained")
    expected = brute(images, texts, [[i] for i in owner.tolist()])
    for result, recalls in zip((there, back), expected, strict=True):
        assert {name: result.detail[name] for name in recalls} == pytest.approx(recalls)
        assert result.value == pytest.approx(recalls["R@1"]) and result.metric == "R@1" and result.subject == "trained"
        assert result.ci[0] <= result.value <= result.ci[1] and 0 < result.value < 100
    assert (there.protocol, there.n, there.detail["candidates"]) == ("retrieval-text", 25, 75)
    assert (back.protocol, back.n, back.detail["candidates"]) == ("retrieval-image", 75, 25)
    assert mean.protocol == "retrieval-mean" and mean.value == pytest.approx((there.value + back.value) / 2)
    assert mean.detail["R@5"] == pytest.approx((there.detail["R@5"] + back.detail["R@5"]) / 2)


def test_any_caption_of_an_image_is_a_hit_and_only_its_own():
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.1], [0.0, 0.9, 0.2], [0.0, 0.2, 1.0]])
    there, back, _ = retrieval(images, texts, torch.tensor([0, 0, 1, 2]))
    # image 1 finds the text of image 0 first; text 1 of image 0 finds image 1
    assert there.value == pytest.approx(200 / 3) and back.value == pytest.approx(75)
    assert there.detail["R@5"] == 100


def test_texts_that_several_images_share():
    owners = [[0, 1, 4], [2], [3, 2], [], [4]]
    padded = torch.tensor([[0, -1, 1, 4], [2, -1, -1, -1], [-1, 3, 2, -1], [-1] * 4, [4, -1, -1, -1]])
    images, texts = random(6, 3), random(5, 3, seed=1)  # image 5 has no text, text 3 no image: both only distract
    there, back, _ = retrieval(images, texts, padded)
    for result, recalls in zip((there, back), brute(images, texts, owners), strict=True):
        assert {name: result.detail[name] for name in recalls} == pytest.approx(recalls)
    assert (there.n, back.n) == (5, 4)


def test_constant_embeddings_score_chance_and_not_more():
    owner = torch.arange(40).repeat_interleave(5)
    there, back, _ = retrieval(torch.full((40, 7), 0.37), torch.full((200, 7), 0.11), owner)
    miss = math.prod((195 - i) / (200 - i) for i in range(10))
    assert there.value == pytest.approx(2.5) and there.detail["R@10"] == pytest.approx(100 * (1 - miss))
    assert back.value == pytest.approx(2.5) and back.detail["R@5"] == pytest.approx(12.5)
    for result in (there, back):
        for k in (1, 5, 10):
            assert result.detail[f"R@{k}"] == pytest.approx(result.detail[f"chance R@{k}"])


def test_random_embeddings_score_chance():
    owner = torch.arange(500).repeat_interleave(2)
    for result in retrieval(random(500, 16), random(1000, 16, seed=1), owner)[:2]:
        for k in (1, 5, 10):
            chance = result.detail[f"chance R@{k}"]
            spread = 100 * math.sqrt(chance / 100 / 500)
            assert abs(result.detail[f"R@{k}"] - chance) < 4 * spread


def test_two_equal_images_share_the_hit():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    there, back, _ = retrieval(images, images, torch.arange(3))
    assert there.value == back.value == pytest.approx(100 * (0.5 + 0.5 + 1) / 3)
    assert there.detail["R@5"] == 100


def test_equal_vectors_tie_wherever_they_stand():
    """In float32 their products may differ in the last bits from place to place; here they surely do."""
    texts = unit(random(1, 301).repeat(37, 1) * (1 + 1e-6 * random(37, 301, seed=1)))
    images = unit(random(1, 301, seed=2)).repeat(37, 1)
    assert len((images @ texts.T).unique()) > 3
    hits = first_hits(images, texts, torch.arange(37)[:, None], (1,))[1]
    assert hits.numpy() == pytest.approx(np.full(37, 1 / 37))


def test_captions_of_one_image_are_resampled_together():
    owner = torch.arange(20).repeat_interleave(50)
    found = torch.arange(1000) // 50 % 2 == 0  # all captions of an image are right or none is
    texts = torch.where(found[:, None], torch.eye(20)[owner], torch.eye(20)[(owner + 1) % 20])
    _, back, _ = retrieval(torch.eye(20), texts, owner)
    assert back.value == 50 and back.ci[1] - back.ci[0] > 30  # as uncertain as 20 images, not as 1,000 captions


@pytest.mark.parametrize(
    "owner, message",
    [
        (torch.arange(3), r"must hold whole numbers \[4\]"),
        (torch.tensor([0.0, 1, 2, 2]), "whole numbers"),
        (torch.tensor([0, 1, 2, 3]), "names image 3, but there are 3, counted from 0"),
        (torch.full((4,), -1), "pairs no text with any image"),
    ],
)
def test_retrieval_refuses(owner, message):
    with pytest.raises(InputError, match=message):
        retrieval(random(3, 5), random(4, 5), owner)


# ------------------------------------------------------------------------------------------------------------------ gap


def test_identical_clouds_have_no_gap():
    x = random(200, 10)
    result = modality_gap(x, x * 3)
    assert result.value == pytest.approx(0, abs=1e-6) and result.detail["separability"] == 50
    assert result.detail["cosine_of_pairs"] == pytest.approx(1, abs=1e-6)
    cosine = unit(x.double()) @ unit(x.double()).T
    others = cosine[~torch.eye(200, dtype=torch.bool)].mean().item()
    assert result.detail["cosine_of_non_pairs"] == pytest.approx(others, abs=1e-6)
    assert (result.protocol, result.metric, result.n, result.ci) == ("modality-gap", "distance", 200, None)


def test_the_gap_is_the_distance_of_the_centroids_and_does_not_swap():
    x, y = random(60, 5) + 1, random(60, 5, seed=1) - torch.tensor([2.0, 0, 0, 0, 0])
    expected = (unit(x).mean(0) - unit(y).mean(0)).norm().item()
    assert modality_gap(x, y).value == modality_gap(y, x).value == pytest.approx(expected, rel=1e-5)
    apart = modality_gap(torch.eye(4)[[0] * 20], -torch.eye(4)[[0] * 20])
    assert apart.value == pytest.approx(2) and apart.detail["separability"] == 100
    assert apart.detail["cosine_of_pairs"] == apart.detail["cosine_of_non_pairs"] == pytest.approx(-1)


def test_clouds_of_one_distribution_cannot_be_told_apart_on_pairs_held_out():
    # 30 dimensions and 60 pairs: a classifier tested on what it was fitted to would tell nearly all apart
    found = [
        modality_gap(random(60, 30, seed=i), random(60, 30, seed=100 + i)).detail["separability"] for i in range(6)
    ]
    assert abs(np.mean(found) - 50) < 8
    # both members of a pair lie on one side: what tells a pair from others does not help
    base = random(150, 30) * 5
    near = modality_gap(base + 0.01 * random(150, 30, seed=1), base + 0.01 * random(150, 30, seed=2))
    assert 35 < near.detail["separability"] < 65


def test_the_gap_refuses():
    with pytest.raises(InputError, match="row i is paired with row i"):
        modality_gap(random(20, 3), random(21, 3))
    with pytest.raises(InputError, match="at least 10 pairs, not 4"):
        modality_gap(random(4, 3), random(4, 3))


# -------------------------------------------------------------------------------------------------------------- measure


class Colours:
    """A method that knows colours: images by their mean, texts by the name in them."""

    names = ("red", "green", "blue")
    stored_size, channels = 8, 3

    def __init__(self, knows=True):
        self.knows = knows

    def encode(self, data):
        images = data.images if isinstance(data, Pairs) else data
        mean = images.image.float().mean((2, 3)).numpy() / 255
        return mean if self.knows else mean * 0 + 1

    def encode_text(self, sentences):
        found = [[float(name in line) for name in self.names] for line in sentences]
        return np.array(found, np.float32) + 0.01 if self.knows else np.ones((len(sentences), 3), np.float32)


def labelled(n=60):
    label = torch.arange(n) % 3
    noise = torch.randint(0, 60, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    image = noise + 180 * torch.eye(3, dtype=torch.int64)[label][:, :, None, None]
    return Images(image.to(torch.uint8), label, Colours.names, "colours")


def by_name(results):
    return {(result.protocol, result.subject): result for result in results}


def test_pairs_are_measured_by_every_protocol():
    pairs = captions.from_classes(labelled(), ["{a} square", "this is {}"])
    found = by_name(measure({"trained": Colours(), "untrained": Colours(False)}, pairs))
    assert [key for key in found if key[1] == "trained"] == [
        (name, "trained")
        for name in ("zero-shot", "retrieval-text", "retrieval-image", "retrieval-mean", "modality-gap")
    ]
    for name in ("zero-shot", "retrieval-text", "retrieval-image"):
        assert found[name, "trained"].value == 100
    # two of six texts are right, a third of the images: guessing has one of them first as often
    assert found["retrieval-text", "untrained"].value == pytest.approx(100 / 3)
    assert found["retrieval-image", "untrained"].value == pytest.approx(100 / 3)
    assert found["zero-shot", "untrained"].value == pytest.approx(100 / 3)
    text = found["retrieval-text", "trained"]
    assert text.n == 60 and text.detail["distinct_texts"] == 6 == text.detail["candidates"]
    assert "note" not in text.detail and found["zero-shot", "trained"].detail["templates"] == list(TEMPLATES)
    only = measure({"trained": Colours()}, pairs, protocols=["retrieval-mean"])
    assert [result.protocol for result in only] == ["retrieval-mean"] and only[0].value == 100


def test_labelled_images_are_measured_by_zero_shot_alone():
    (result,) = measure({"trained": Colours()}, labelled())
    assert result.protocol == "zero-shot" and result.value == 100 and result.n == 60
    assert list(result.detail["per_class"]) == ["red", "green", "blue"]
    with pytest.raises(InputError, match='no protocol named "zeroshot"'):
        measure({"trained": Colours()}, labelled(), protocols=["zeroshot"])
    with pytest.raises(InputError, match="no captions and no named classes"):
        measure({"trained": Colours()}, Images(labelled().image, name="photos"))


def test_folders_of_classes(tmp_path):
    from PIL import Image

    items = labelled(12)
    for i, (image, label) in enumerate(zip(items.image, items.label.tolist(), strict=True)):
        (tmp_path / Colours.names[label]).mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / Colours.names[label] / f"{i}.png")
    (result,) = measure({"trained": Colours()}, str(tmp_path))
    assert result.value == 100 and result.n == 12 and result.detail["note"] == "all images of the data"


def test_tables_with_a_test_part_and_without(tmp_path, caplog):
    from PIL import Image

    items = labelled(24)
    lines = ["image,caption,split"]
    for i, (image, label) in enumerate(zip(items.image, items.label.tolist(), strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,a {Colours.names[label]} square,{'test' if i >= 12 else 'train'}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    found = by_name(measure({"trained": Colours()}, tmp_path / "pairs.csv"))
    assert {name for name, _ in found} == {"retrieval-text", "retrieval-image", "retrieval-mean", "modality-gap"}
    result = found["retrieval-text", "trained"]
    assert result.value == 100 and result.n == 12 and result.detail["candidates"] == 3 and "note" not in result.detail
    (tmp_path / "own.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines))
    path = str(tmp_path / "own.csv")
    other = by_name(measure({"trained": Colours()}, path, trained_on="other.csv"))["retrieval-text", "trained"]
    assert other.n == 24 and other.detail["note"] == "all pairs of the data; training used other data"
    seen = by_name(measure({"trained": Colours()}, path, trained_on=path))
    assert {name for name, _ in seen} == {"modality-gap"}  # finding again what was learned would prove nothing
    assert seen["modality-gap", "trained"].detail["note"] == "pairs that training saw"
    assert "training saw every pair" in caplog.text and "column called split" in caplog.text
    rest = by_name(measure({"trained": Colours()}, path, trained_on=path, limit=10))["retrieval-text", "trained"]
    assert rest.n == 14 and rest.detail["note"] == "pairs that the training's limit left out"
    learned, whole = captions.load(path, limit=10), captions.load(path)
    held, _ = image_text._left_out(whole, learned)
    assert {*held.images.paths} == {*whole.images.paths} - {*learned.images.paths} and len(held) == 14
    with pytest.raises(InputError, match="neither a file or folder nor one of"):
        measure({"trained": Colours()}, "no-such-data")
