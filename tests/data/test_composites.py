"""Composites are what they say: the picture below, the picture above, who is where; and inflation is the copied set."""

import pytest
import torch

from counterpoint.data import Images, composites, load, sources
from counterpoint.data.composites import inflate, overlay, reconstructed, replicated
from counterpoint.errors import InputError
from counterpoint.train.batches import Batches
from counterpoint.views import without_overlay


def grey(n, seed, side=28):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 10
    image = torch.zeros(n, 1, side, side, dtype=torch.uint8)
    image[:, :, 6:22, 6:22] = torch.randint(64, 256, (n, 1, 16, 16), dtype=torch.uint8, generator=generator)
    return Images(image, label, tuple("0123456789"), "grey")


@pytest.fixture(autouse=True)
def small_sources(monkeypatch):
    """The sets that composites are made of, with random pixels and few images."""

    def cifar10(split="train", *, limit=None, seed=0):
        n = 120 if split == "train" else 20
        generator = torch.Generator().manual_seed(n)
        image = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Images(image, torch.arange(n) % 10, sources.CIFAR_CLASSES, f"cifar10/{split}")

    monkeypatch.setattr(sources, "cifar10", cifar10)
    monkeypatch.setattr(sources, "fashion_mnist", lambda split="train", **_: grey(70 if split == "train" else 30, 1))
    monkeypatch.setattr(sources, "mnist", lambda split="test", **_: grey(50, 2))
    monkeypatch.setattr(composites, "DIGITS_FOR_TRAINING", 40)
    monkeypatch.setattr(composites, "FEW", 70)


def test_overlay_covers_where_the_glyph_is_bright_and_nowhere_else():
    below = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    glyph = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
    glyph[:, :, 1, 1], glyph[:, :, 0, 0] = 240, 16
    corner = torch.tensor([[0, 0], [5, 2]])
    out = overlay(below, glyph, corner)
    for i, (row, column) in enumerate(corner.tolist()):
        assert (out[i, :, row + 1, column + 1] == 240).all()
        assert (out[i, :, row, column] == 100 - 42).all()  # grey 16 covers half
        untouched = torch.ones(8, 8, dtype=torch.bool)
        untouched[row + 1, column + 1] = untouched[row, column] = False
        assert (out[i, :, untouched] == 100).all()
    assert torch.equal(overlay(below, glyph, corner, strength=0.0), below)
    assert (overlay(below, glyph, corner, strength=0.5)[0, :, 1, 1] == 170).all()
    with pytest.raises(InputError, match="lies inside"):
        overlay(below, glyph, corner + 1)
    with pytest.raises(InputError, match="between 0 and 1"):
        overlay(below, glyph, corner, strength=2.0)


@pytest.mark.parametrize(("name", "factor"), [("cifar-fashion", "item"), ("cifar-digits", "digit")])
def test_painted_sets(name, factor):
    whole, again = load(name), load(name)
    assert torch.equal(whole.image, again.image) and whole.image.shape == (120, 3, 32, 32)
    assert torch.equal(whole.background, sources.cifar10().image)
    changed = (whole.image != whole.background).any(1)
    assert changed.flatten(1).any(1).all()
    assert (changed.flatten(1).sum(1) <= 20 * 20).all()
    assert set(whole.factors) == {factor} and whole.factors[factor].unique().tolist() == list(range(10))
    # what is painted has nothing to do with what is below
    assert (whole.factors[factor] == whole.label).float().mean() < 0.5
    # a limit takes some of these very images
    some = load(name, limit=7, seed=3)
    same = (some.image[:, None] == whole.image).flatten(2).all(2)
    assert (same.sum(1) == 1).all()
    assert torch.equal(some.factors[factor], whole.factors[factor][same.int().argmax(1)])
    batch = whole.take(torch.tensor([4, 5]))
    assert torch.equal(batch["background"], whole.background[4:6])
    small = load(name, size=16)
    assert small.background.shape == small.image.shape == (120, 3, 16, 16)


def test_digits_of_training_and_test_are_different_people_s(monkeypatch):
    seen = []
    subset = Images.subset

    def watched(self, index):
        if self.name == "grey":
            seen.append(range(*index.indices(len(self))))
        return subset(self, index)

    monkeypatch.setattr(Images, "subset", watched)
    load("cifar-digits", "train"), load("cifar-digits", "test")
    assert not set(seen[0]) & set(seen[1]) and len(seen[0]) + len(seen[1]) == 50


def test_a_view_without_its_overlay():
    items = load("cifar-fashion")
    batch = items.take(torch.arange(60))
    assert torch.equal(without_overlay(batch, 0.0), batch["image"])
    assert torch.equal(without_overlay(batch, 1.0), batch["background"])
    torch.manual_seed(0)
    some = without_overlay(batch, 0.5)
    bare = (some == batch["background"]).flatten(1).all(1)
    painted = (some == batch["image"]).flatten(1).all(1)
    assert (bare ^ painted).all() and 15 < int(bare.sum()) < 45
    assert not torch.equal(some, without_overlay(batch, 0.5))  # drawn anew for each view
    with pytest.raises(InputError, match="no overlay to lose"):
        without_overlay({"image": batch["image"]}, 0.5)


def test_fashion_pair_has_a_faint_right_half():
    items = load("fashion-pair")
    assert items.image.shape == (70, 1, 28, 28)
    left, right = items.image[..., :14].float(), items.image[..., 14:].float()
    assert float(right.mean()) == pytest.approx(0.2 * float(left.mean()), rel=0.05)
    clothes = sources.fashion_mnist().image.float().unflatten(3, (14, 2)).mean(4)
    assert torch.equal(left, clothes.round())
    nearest = torch.cdist(5 * right.flatten(1), clothes.flatten(1)).argmin(1)
    assert torch.equal(nearest % 10, items.factors["faint"])


def test_surrogate_and_real_images_are_disjoint():
    real, made = load("cifar10-few"), load("cifar10-surrogate")
    assert len(real) == 70 and len(made) == 50 and (made.label == -1).all()
    assert torch.equal(real.image, sources.cifar10().image[:70])
    assert len(load("cifar10-few", "test")) == 20
    with pytest.raises(InputError, match="no split"):
        load("cifar10-surrogate", "test")


@pytest.mark.parametrize("count", [30, 400])  # fewer and more images than pixels
def test_reconstruction_keeps_the_principal_components(count):
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(3, 64, generator=generator).double()
    pixels = (128 + 9 * torch.randn(count, 3, generator=generator).double() @ basis).clamp(0, 255)
    images = pixels.round().to(torch.uint8).view(count, 1, 8, 8)
    error = [
        (reconstructed(images, images, k).double() - images.double()).square().mean().item() for k in (1, 2, 3, 20)
    ]
    assert error[0] > error[1] > 5 * error[2] and error[3] <= error[2] < 1
    mean = images.double().flatten(1).mean(0)
    u, s, v = torch.linalg.svd(images.double().flatten(1) - mean, full_matrices=False)
    expected = (u[:, :2] * s[:2]) @ v[:2] + mean
    found = reconstructed(images, images, 2).double().flatten(1)
    assert (found - expected.clamp(0, 255)).abs().max() < 0.51


def test_inflation_is_the_copied_set():
    real, made = load("cifar10-few"), load("cifar10-surrogate")
    both = inflate(real, made, 3)
    copied = replicated(both)
    assert torch.equal(copied.image, torch.cat([real.image, real.image, real.image, made.image]))
    assert torch.equal(copied.label, torch.cat([real.label, real.label, real.label, made.label]))
    assert copied.repeats is None and replicated(real) is real
    assert torch.equal(both.known().image, real.image) and len(real.known()) == len(real)
    # an epoch takes every copy once, as an epoch of the copied set does
    batches, long = Batches(both, 10, seed=1), Batches(copied, 10, seed=1)
    assert len(batches) == len(long) == 26
    count = torch.stack([batches.order().bincount(minlength=120)]).flatten()
    assert torch.equal(count, both.repeats)
    first = batches.order()
    batches.epoch = 1
    assert not torch.equal(first, batches.order())
    # of an epoch cut short real images have the share r N / (r N + M)
    share = float(torch.stack([_first_share(both, seed) for seed in range(200)]).mean())
    assert share == pytest.approx(210 / 260, abs=0.03)
    # embedding takes each once
    assert torch.equal(Batches(both, 10, shuffle=False).order(), torch.arange(120))
    with pytest.raises(InputError, match="replication"):
        inflate(real, made, 0)
    with pytest.raises(InputError, match="size and the channels"):
        inflate(real, sources.fashion_mnist(), 1)


def _first_share(items, seed):
    return (Batches(items, 10, seed=seed).order()[:10] < 70).float().mean()
