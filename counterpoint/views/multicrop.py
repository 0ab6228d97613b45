"""Multi-crop: cheap small views beside the large ones, for any method, and one encoder pass per size of view."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from counterpoint.errors import InputError
from counterpoint.views.image import ImageViews

LARGE, SMALL = 224, 96


@dataclass(frozen=True)
class MultiCrop:
    """Further small views of each image: local parts at low resolution, drawn like the method's own views otherwise.

    Args:
        count: number of small views of each image.
        size: their side in pixels; None is 96/224 of the large views' side.
        crop: smallest and largest share of the image's area that they show.

    Source: Caron et al. 2020 (arXiv 2006.09882), section 3.2; sizes and shares as released.

    Raises:
        InputError: no view, no pixel, or shares that are none.
    """

    count: int = 6
    size: int | None = None
    crop: tuple[float, float] = (0.05, 0.14)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"small views: count is at least 1, got {self.count}; without small views, leave them out")
        if self.size is not None and self.size < 1:
            raise InputError(f"small views: size is a number of pixels, at least 1, got {self.size}")
        if len(self.crop) != 2 or not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise InputError(f"small views: crop needs two shares with 0 < smallest <= largest <= 1, got {self.crop}")

    def side(self, large: int) -> int:
        """Side in pixels of the small views beside large ones of side `large`."""
        return self.size or max(1, round(large * SMALL / LARGE))

    def of(self, views: ImageViews) -> ImageViews:
        """The small counterpart of `views`: same colours and flips, other size and crop.

        Raises:
            InputError: views without a size when the small ones have none either.
        """
        if self.size is None and views.size is None:
            raise InputError("small views take their size from the large ones, which have none: set one of the two")
        return replace(views, size=self.side(views.size or 0), crop=self.crop)

    def __call__(self, images: Tensor, views: ImageViews, generator: torch.Generator | None = None) -> list[Tensor]:
        """`count` random small views of each image [B, C, H, W], each float32 [B, C, size, size]."""
        small = self.of(views)
        return [small(images, generator) for _ in range(self.count)]

    def check(self, encoder: Any) -> "MultiCrop":
        """Return itself if `encoder` takes small views as well as large ones.

        Raises:
            InputError: the encoder has one fixed size.
        """
        side = self.side(encoder.image_size)
        if side != encoder.image_size and not encoder.takes(side):
            raise InputError(
                f"{encoder.name} takes images of {encoder.image_size} px only, not small views of {side} px: choose a "
                "convolutional encoder (convnet, resnet18) or leave small_views out"
            )
        return self


def crops(
    images: Tensor,
    large: ImageViews | Sequence[ImageViews],
    small: MultiCrop | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Random views of a batch, the large ones first.

    Args:
        images: [B, C, H, W].
        large: the large views, one after the other; a single one is drawn twice.
        small: the small ones, like the first large one but for size and crop; None for none.
        generator: source of all draws.
    """
    sets = (large, large) if isinstance(large, ImageViews) else tuple(large)
    found = [views(images, generator) for views in sets]
    return found if small is None else found + small(images, sets[0], generator)


def by_size(encode: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> list[Tensor]:
    """`encode` of every view, those of one size joined into one pass; results in the order of the views.

    Batch normalisation inside `encode` so takes the statistics of each size apart (and of all views of that size together),
    as in the released code: small crops do not shift what large ones are normalised by.

    Args:
        encode: from images [N, C, H, W] to one row each, [N, ...].
        views: batches of images, each [B, C, h, w].
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, view in enumerate(views):
        groups.setdefault(tuple(view.shape[1:]), []).append(place)
    found: dict[int, Tensor] = {}
    for places in groups.values():
        rows = encode(torch.cat([views[place] for place in places]))
        found |= zip(places, rows.split([len(views[place]) for place in places]), strict=True)
    return [found[place] for place in range(len(views))]


def compared(count: int, large: int = 2) -> list[tuple[int, int]]:
    """Which of `count` views a contrast of two views compares: every pair with a large view in it, once each.

    Small views are never each other's partner: two of them may show nothing in common.
    """
    return [(i, j) for i in range(min(large, count)) for j in range(i + 1, count)]


def predicted(count: int, large: int = 2) -> list[tuple[int, int]]:
    """Which of `count` views predicts which large one: each of them every large view but itself, as (view, target)."""
    return [(view, target) for view in range(count) for target in range(min(large, count)) if target != view]
