"""What the places of a feature map know: a linear classifier of single locations, for images that show several things."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.data import Images
from counterpoint.data.images import resize
from counterpoint.errors import InputError
from counterpoint.evaluate.protocols import Result, linear_probe
from counterpoint.train.method import Method
from counterpoint.views import plain

EncodeMaps = Callable[[Tensor], Tensor]
"""uint8 images [N, C, H, W] to feature maps [N, D, h, w]."""

TESTED = 16
SHOWN = 1000
BATCH = 512
PATCH = 8


def dense_linear(
    encode: EncodeMaps, train: Images, test: Images, factor: str = "cell", *, seed: int = 0, subject: str = ""
) -> Result:
    """Accuracy of a linear classifier of single locations of frozen feature maps: protocol `dense-linear`.

    The label of a location is that of the cell in which its centre lies. The classifier is `linear_probe`'s, fitted to one
    random location of each training image (so that the items it is tuned on are other images) and scored on all
    locations of the test images, or on 16 random ones of each where there are more. The interval resamples whole images.

    Args:
        encode: images to maps; called with some hundred images at a time.
        train, test: images with a label map each, ``factors[factor]`` int64 [N, g, g].
        factor: its name.
        seed: of the locations, and of the probe's validation split.
        subject: what was measured.

    Returns:
        A result whose detail also holds the mean cosine between two different locations `within` a cell and `across` cells,
        on the first 1,000 test images: how smooth the map is, and how well it keeps things apart.

    Raises:
        InputError: no such label maps, or maps coarser than the cells.
    """
    for items in (train, test):
        if factor not in items.factors or items.factors[factor].ndim != 3:
            raise InputError(f'{items.name} has no label map "{factor}": one class for each cell [N, g, g]')
    generator = torch.Generator().manual_seed(seed)
    train_x, train_y, _ = _locations(encode, train, factor, 1, generator)
    test_x, test_y, of = _locations(encode, test, factor, TESTED, generator)
    found = linear_probe(train_x, train_y, test_x, test_y, groups=of, seed=seed, subject=subject)
    within, across = _smoothness(encode, test.image[:SHOWN], test.factors[factor].shape[-1])
    shares = test_y.bincount().float() / len(test_y)
    more = {"within": within, "across": across, "chance": 100 * float(shares.max())}
    return replace(found, protocol=f"dense-linear:{factor}", detail=found.detail | more)


def maps_of(method: Method) -> EncodeMaps:
    """The last feature maps of a method's encoder, of whole images without any random view.

    Raises:
        InputError: (when called) the encoder gives none.
    """

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        training = method.training
        method.eval()
        try:
            found = method.encoder(plain(images.to(method.device), method.encoder.image_size)).map
        finally:
            method.train(training)
        if found is None:
            raise InputError(f"{method.encoder.name} gives no feature map, so single locations cannot be measured")
        return found.float().cpu()

    return encode


def patches(images: Tensor) -> Tensor:
    """The baseline that learns nothing: the pixels of patches of 8 x 8."""
    side = max(PATCH, images.shape[-1] // PATCH * PATCH)
    return functional.pixel_unshuffle(resize(images, side).float() / 255, PATCH)


def _maps(encode: EncodeMaps, images: Tensor, cells: int) -> Iterator[Tensor]:
    for part in images.split(BATCH):
        maps = encode(part)
        if min(maps.shape[-2:]) < cells:
            size = " x ".join(map(str, maps.shape[-2:]))
            raise InputError(f"maps of {size} locations cannot tell {cells} x {cells} cells apart: take larger images")
        yield maps


def _cells(height: int, width: int, cells: int) -> Tensor:
    """Cell in which the centre of each location lies, [height * width]."""
    rows, columns = (((torch.arange(n) + 0.5) * cells / n).long() for n in (height, width))
    return (rows[:, None] * cells + columns).flatten()


def _locations(
    encode: EncodeMaps, items: Images, factor: str, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors [M, D] at up to `count` random locations of each image, their labels [M], and the images they are of [M]."""
    labels = items.factors[factor].cpu()
    side = labels.shape[-1]
    vectors, truth = [], []
    for maps, known in zip(_maps(encode, items.image, side), labels.flatten(1).split(BATCH), strict=True):
        height, width = maps.shape[-2:]
        # the first of a random order: each location is as likely as any other
        at = torch.rand(len(maps), height * width, generator=generator).argsort(1)[:, :count]
        vectors.append(maps.flatten(2).transpose(1, 2).gather(1, at[..., None].expand(-1, -1, maps.shape[1])))
        truth.append(known.gather(1, _cells(height, width, side)[at]))
    x, y = torch.cat(vectors), torch.cat(truth)
    return x.flatten(0, 1), y.flatten(), torch.arange(len(x)).repeat_interleave(x.shape[1])


def _smoothness(encode: EncodeMaps, images: Tensor, side: int) -> tuple[float, float]:
    """Mean cosine of two different locations of one cell, and of two cells, over the images."""
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for maps in _maps(encode, images, side):
        place = functional.normalize(maps.flatten(2), dim=1)
        similarity = (place.transpose(1, 2) @ place).double().sum(0)
        cell = _cells(maps.shape[-2], maps.shape[-1], side)
        same = cell[:, None] == cell
        pairs = (same & ~torch.eye(len(cell), dtype=torch.bool), ~same)
        sums += torch.stack([similarity[pair].sum() for pair in pairs])
        counts += torch.tensor([float(len(maps) * pair.sum()) for pair in pairs])
    within, across = (sums / counts.clamp(min=1)).tolist()
    return within, across
