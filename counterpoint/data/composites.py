"""Image sets made from other sets, deterministically: nothing is drawn that a name, a split and a seed do not decide.

**Overlays** (`cifar_fashion`, `cifar_digits`): a picture of one set painted over a picture of another, so that an image has
two things to know. `label` is the class of the picture below, ``factors["item"]`` (or ``factors["digit"]``) that of what was
painted over it. ``background`` holds the same images without the paint, and so does every batch: a view that shall sometimes
lose the overlay takes ``views.without_overlay(batch, p)`` in the place of ``batch["image"]``. Protocols see ``image`` alone.
`overlay` makes the same from any pictures, with another strength or place.

**Side by side** (`fashion_pair`): two things to know of an image again, of which one is hardly visible.

**Values** (`fashion_angles`): an image has a number to predict, ``factors["angle"]`` in degrees, beside its class.

**Classes** (`imbalanced_set`): some are rarer than others in training, as nobody has curated them.

**Places** (`mosaic_set`): several pictures side by side; ``factors["cell"]`` says which class lies where.

**Generated images** (`cifar10_few`, `cifar10_surrogate`): a small real set, and a stand-in for what a generative model
trained on it would give. Their label is -1, "not known"; protocols leave them out.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.data import sources
from counterpoint.data.images import Images, chosen, resize
from counterpoint.errors import InputError

FEW = 10_000
"""Training images of CIFAR-10, from the first, that are `cifar10_few`; the others are the surrogate's."""

DIGITS_FOR_TRAINING = 8_000
"""Test images of MNIST that are painted over training images; the rest goes over test images."""


def overlay(background: Tensor, glyph: Tensor, corner: Tensor, strength: float = 1.0) -> Tensor:
    """Lay a grey picture on black over each image: ``out = b + strength * m * (g - b)``, m = min(1, g / 32) of its grey g.

    Its black is transparent, everything brighter than an eighth of white covers.

    Args:
        background: uint8 [N, C, H, W].
        glyph: uint8 [N, 1, h, w], not larger than the background.
        corner: int64 [N, 2], row and column of the glyph's upper left corner.
        strength: how opaque it is, 0 to 1.

    Raises:
        InputError: a strength out of range, or a glyph that does not lie inside.
    """
    if not 0 <= strength <= 1:
        raise InputError(f"the strength of an overlay is a number between 0 and 1, not {strength}")
    (n, _, height, width), (h, w) = background.shape, glyph.shape[-2:]
    inside = (corner >= 0) & (corner <= corner.new_tensor([height - h, width - w]))
    if len(glyph) != n or len(corner) != n or not bool(inside.all()):
        raise InputError(f"each of {n} images of {height} x {width} needs a glyph of {h} x {w} that lies inside it")
    rows = corner[:, :1, None] + torch.arange(h)[:, None]
    columns = corner[:, 1:, None] + torch.arange(w)
    above = torch.zeros(n, height, width)
    above[torch.arange(n)[:, None, None], rows, columns] = glyph[:, 0].float()
    below, above = background.float(), above[:, None]
    return torch.lerp(below, above.expand_as(below), strength * (above / 32).clamp(max=1)).round_().to(torch.uint8)


def cifar_fashion(
    split: str = "train", *, limit: int | None = None, seed: int = 0, side: int = 20, strength: float = 1.0
) -> Images:
    """CIFAR-10 with a piece of clothing painted over each image, somewhere; factor ``item`` is its class.

    Args:
        split: "train" or "test", of both sets.
        limit, seed: see `counterpoint.data.load`.
        side: of the painted picture in pixels.
        strength: of the paint.
    """
    return _painted("cifar-fashion", split, sources.fashion_mnist(split), "item", limit, seed, side, strength)


def cifar_digits(
    split: str = "train", *, limit: int | None = None, seed: int = 0, side: int = 20, strength: float = 1.0
) -> Images:
    """CIFAR-10 with a handwritten digit painted over each image, somewhere; factor ``digit`` is which.

    The digits are MNIST's test part: 8,000 of them over training images, 2,000 over test images.

    Args:
        split, limit, seed, side, strength: as in `cifar_fashion`.
    """
    digits = sources.mnist("test")
    part = slice(DIGITS_FOR_TRAINING) if split == "train" else slice(DIGITS_FOR_TRAINING, None)
    return _painted("cifar-digits", split, digits.subset(part), "digit", limit, seed, side, strength)


def _painted(
    name: str, split: str, above: Images, factor: str, limit: int | None, seed: int, side: int, strength: float
) -> Images:
    below = sources.cifar10(split)
    assert above.label is not None
    # which picture lies over which, and where, is one draw for the whole set: a limit takes some of these images
    generator = torch.Generator().manual_seed(20 if split == "train" else 21)
    partner = torch.randperm(len(below), generator=generator) % len(above)
    room = below.image.shape[-1] - side
    corner = torch.randint(0, room + 1, (len(below), 2), generator=generator)
    at = chosen(len(below), limit, seed)
    below, partner = below.subset(at), partner[at]
    image = overlay(below.image, resize(above.image[partner], side), corner[at], strength)
    return replace(
        below, image=image, background=below.image, factors={factor: above.label[partner]}, name=f"{name}/{split}"
    )


def fashion_pair(split: str = "train", *, limit: int | None = None, seed: int = 0, contrast: float = 0.2) -> Images:
    """Two pieces of clothing side by side, the right one faint: uint8 [N, 1, 28, 28], each squeezed to half its width.

    `label` is the class of the left one, factor ``faint`` that of the right one, which has nothing to do with it.

    Args:
        split: "train" or "test".
        limit, seed: see `counterpoint.data.load`.
        contrast: of the right one, as a share of its own.
    """
    left = sources.fashion_mnist(split)
    assert left.label is not None
    partner = torch.randperm(len(left), generator=torch.Generator().manual_seed(22 if split == "train" else 23))
    at = chosen(len(left), limit, seed)
    halves = [left.image[index].float().unflatten(3, (14, 2)).mean(4) for index in (at, partner[at])]
    image = torch.cat([halves[0], contrast * halves[1]], dim=3).round_().to(torch.uint8)
    return replace(
        left.subset(at), image=image, factors={"faint": left.label[partner[at]]}, name=f"fashion-pair/{split}"
    )


def cifar10_few(split: str = "train", *, limit: int | None = None, seed: int = 0) -> Images:
    """The first 10,000 training images of CIFAR-10 (and its whole test part): real data that is scarce."""
    images = sources.cifar10(split)
    if split == "train":
        images = images.subset(slice(FEW))
    return replace(images.subset(chosen(len(images), limit, seed)), name=f"cifar10-few/{split}")


def cifar10_surrogate(split: str = "train", *, limit: int | None = None, seed: int = 0, components: int = 64) -> Images:
    """A stand-in for generated images, NOT the output of a generative model: what PCA keeps of images outside `cifar10_few`.

    The other 40,000 training images of CIFAR-10, each replaced by its projection on the `components` principal components
    of the first 2,000 of `cifar10_few`: plausible, off the distribution (blurred), and without labels (-1). Unlike a
    generator's, they carry news of images that are not in the real set.

    Args:
        split: "train"; there is nothing to test on.
        limit, seed: see `counterpoint.data.load`.
        components: how much is kept; fewer are further from real images.

    Raises:
        InputError: another split.
    """
    if split != "train":
        raise InputError(f"cifar10-surrogate stands for generated images and has no split {split!r}: take cifar10-few")
    every = sources.cifar10("train")
    rest = every.image[FEW:]
    rest = rest[chosen(len(rest), limit, seed)]
    image = reconstructed(rest, every.image[: min(FEW, 2_000)], components)
    return Images(image, torch.full((len(image),), -1), every.classes, "cifar10-surrogate")


def reconstructed(images: Tensor, fitted_on: Tensor, components: int) -> Tensor:
    """What `components` principal components of some images keep of others: uint8 [N, C, H, W], the same shape.

    Raises:
        InputError: not between 1 and as many components as there are images or pixels.
    """
    x = fitted_on.flatten(1).double()
    if not 1 <= components <= min(x.shape):
        raise InputError(f"components must be between 1 and {min(x.shape)}, not {components}")
    mean = x.mean(0)
    x = x - mean
    # the smaller of the two Gram matrices has the same spectrum
    if len(x) <= x.shape[1]:
        values, vectors = torch.linalg.eigh(x @ x.T)
        basis = (x.T @ vectors[:, -components:]) / values[-components:].clamp_min(1e-9).sqrt()
    else:
        basis = torch.linalg.eigh(x.T @ x).eigenvectors[:, -components:]
    parts = []
    for some in images.split(4096):
        kept = (some.flatten(1).double() - mean) @ basis @ basis.T + mean
        parts.append(kept.round_().clamp_(0, 255).to(torch.uint8).view(some.shape))
    return torch.cat(parts)


def inflate(real: Images, generated: Images, replication: int) -> Images:
    """Real images, each `replication` times an epoch, and generated ones once; those have the label -1 if they have none.

    Nothing is copied: ``repeats`` says how often an epoch shows each image, and the order of an epoch is that of the set
    with its copies. `replicated` makes the copies.

    Raises:
        InputError: images of other shapes, or no replication.
    """
    if replication < 1:
        raise InputError(f"replication must be at least 1, not {replication}")
    if real.image.shape[1:] != generated.image.shape[1:]:
        raise InputError(
            f"{real.name} has images {list(real.image.shape[1:])} but {generated.name} {list(generated.image.shape[1:])}: "
            "generated images need the size and the channels of the real ones"
        )
    label = torch.full((len(generated),), -1) if generated.label is None else generated.label
    return Images(
        torch.cat([real.image, generated.image]),
        None if real.label is None else torch.cat([real.label, label]),
        real.classes,
        f"{real.name} + {generated.name}",
        repeats=torch.tensor([replication, 1]).repeat_interleave(torch.tensor([len(real), len(generated)])),
    )


def replicated(images: Images) -> Images:
    """The same set with its repeats as real copies: blocks of one number of repeats are repeated as a whole."""
    if images.repeats is None:
        return images
    at, start = [], 0
    for times, length in zip(*(x.tolist() for x in images.repeats.unique_consecutive(return_counts=True)), strict=True):
        at.append(torch.arange(start, start + length).repeat(times))
        start += length
    return replace(images.subset(torch.cat(at)), repeats=None)


def fashion_angles(split: str = "train", *, limit: int | None = None, seed: int = 0) -> Images:
    """Fashion-MNIST turned counter-clockwise by 0 to 90 degrees: a measured value to predict; factor ``angle`` holds it.

    `label` is the class of the piece. Views must keep the angle: no rotation, no mirror, no shear, no uneven crop
    (``views.UPRIGHT``).

    Args:
        split: "train" or "test".
        limit, seed: see `counterpoint.data.load`.
    """
    upright = sources.fashion_mnist(split)
    # one draw for the whole set, as above
    generator = torch.Generator().manual_seed(22 if split == "train" else 23)
    angle = 90 * torch.rand(len(upright), generator=generator)
    at = chosen(len(upright), limit, seed)
    images, angle = upright.subset(at), angle[at]
    return replace(images, image=turned(images.image, angle), factors={"angle": angle}, name=f"fashion-angles/{split}")


def turned(images: Tensor, angle: Tensor) -> Tensor:
    """Images turned counter-clockwise by their angles in degrees, with black around: uint8 [N, C, H, W], H = W."""
    radian = angle.deg2rad()
    cosine, sine, zero = radian.cos(), radian.sin(), torch.zeros_like(radian)
    # from output to input positions, which is the other way round, with y pointing down
    maps = torch.stack([cosine, -sine, zero, sine, cosine, zero], 1).view(-1, 2, 3)
    parts = []
    for some, affine in zip(images.split(4096), maps.split(4096), strict=True):
        grid = functional.affine_grid(affine, list(some.shape), align_corners=False)
        parts.append(functional.grid_sample(some.float(), grid, align_corners=False).round_().to(torch.uint8))
    return torch.cat(parts)


def imbalanced_set(
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 0,
    of: str = "cifar10",
    profile: Literal["linear", "exponential"] = "linear",
) -> Images:
    """CIFAR-10 or Fashion-MNIST whose classes are unequally frequent in training; the test part stays balanced.

    Args:
        split, limit, seed: see `counterpoint.data.load`.
        of: "cifar10" or "fashion-mnist".
        profile: see `imbalanced`.
    """
    images = _source(of, split)
    if split == "train":
        images = imbalanced(images, profile)
    name = f"{of}-{profile}/{split}"
    return replace(images.subset(chosen(len(images), limit, seed)), name=name)


def imbalanced(images: Images, profile: Literal["linear", "exponential"] = "linear", seed: int = 2021) -> Images:
    r"""A seeded subset in which class i of n keeps the share (i + 1) / n, or exp(i + 1) / exp(n), of its images.

    Every class keeps at least one image, the last one all.

    Source: Zheng et al. 2023 (arXiv 2105.03746), section 5; shares as released.

    Raises:
        InputError: images without labels.
    """
    if images.label is None:
        raise InputError(f"{images.name} has no labels, so its classes cannot be thinned out")
    classes = images.label.unique().tolist()
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for i, value in enumerate(classes):
        members = (images.label == value).nonzero().flatten()
        n = len(classes)
        share = (i + 1) / n if profile == "linear" else math.exp(i + 1 - n)
        order = torch.randperm(len(members), generator=generator)
        kept.append(members[order[: max(1, round(share * len(members)))]])
    return images.subset(torch.cat(kept).sort().values)


def mosaic_set(
    split: str = "train", *, limit: int | None = None, seed: int = 0, of: str = "cifar10", side: int = 2
) -> Images:
    """Pictures of several pictures, for which it matters where one looks; factor ``cell`` holds their classes.

    As many mosaics as images, in which each image occurs `side` x `side` times, in other company.

    Args:
        split, limit, seed: see `counterpoint.data.load`.
        of: "cifar10" or "fashion-mnist".
        side: cells along each side.
    """
    images = _source(of, split)
    # one draw for the whole set, as above
    generator = torch.Generator().manual_seed(24 if split == "train" else 25)
    order = torch.stack([torch.randperm(len(images), generator=generator) for _ in range(side**2)], dim=1)
    return replace(mosaic(images, order[chosen(len(images), limit, seed)]), name=f"{of}-mosaic/{split}")


def mosaic(images: Images, order: Tensor) -> Images:
    """Lay images of one size beside each other; factor ``cell`` int64 [M, s, s] holds their labels, if they have any.

    Args:
        images: [N, C, H, W].
        order: int64 [M, s * s], which images each mosaic shows, row by row.

    Returns:
        [M, C, s * H, s * W], without labels of their own.

    Raises:
        InputError: a number of cells that makes no square.
    """
    count, cells = order.shape
    side = math.isqrt(cells)
    if side**2 != cells or not cells:
        raise InputError(f"{cells} images make no square mosaic: take 4 or 9")
    laid = images.image[order.flatten()].unflatten(0, (count, side, side)).permute(0, 3, 1, 4, 2, 5)
    factors = {} if images.label is None else {"cell": images.label[order].view(count, side, side)}
    whole = laid.flatten(4, 5).flatten(2, 3).contiguous()
    return Images(whole, classes=images.classes, name=f"{images.name} in mosaics", factors=factors)


def _source(name: str, split: str) -> Images:
    known = {"cifar10": sources.cifar10, "fashion-mnist": sources.fashion_mnist}
    if name not in known:
        raise InputError(f"composites are made of {' or '.join(known)}, not {name}")
    return known[name](split)
