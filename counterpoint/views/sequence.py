"""Random views of user histories: crop, mask and reorder, batched; each sample draws its own.

A history is a row of ``item_seq`` (int64 [B, L], right-padded with 0) and its length. One with a single item has nothing
to vary and is returned unchanged.

Source: Xie et al. 2022, "Contrastive Learning for Sequential Recommendation" (arXiv 2010.14395), section 3.2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from counterpoint.errors import InputError, nearest

View = tuple[Tensor, Tensor]


def crop(item_seq: Tensor, length: Tensor, share: float = 0.5, generator: torch.Generator | None = None) -> View:
    """Keep ``floor(share * length)`` items in a row (at least 1) from a random place, moved to the front."""
    kept = torch.where(length > 1, _share_of(length, share, item_seq).clamp(min=1), length)
    place = torch.arange(item_seq.shape[1], device=item_seq.device)
    source = (_begin(length, kept, generator)[:, None] + place).clamp(max=item_seq.shape[1] - 1)
    return item_seq.gather(1, source).masked_fill(place >= kept[:, None], 0), kept


def mask(item_seq: Tensor, length: Tensor, share: float = 0.5, generator: torch.Generator | None = None) -> View:
    """Set ``floor(share * length)`` random places to 0, the padding, which attention then skips; the length stays."""
    place = torch.arange(item_seq.shape[1], device=item_seq.device)
    draw = torch.rand(item_seq.shape, generator=generator, device=item_seq.device)
    rank = draw.masked_fill(place >= length[:, None], 2.0).argsort(1).argsort(1)
    hidden = torch.where(length > 1, _share_of(length, share, item_seq), 0)
    return item_seq.masked_fill(rank < hidden[:, None], 0), length


def reorder(item_seq: Tensor, length: Tensor, share: float = 0.8, generator: torch.Generator | None = None) -> View:
    """Shuffle ``floor(share * length)`` items in a row from a random place; the length stays."""
    window = torch.where(length > 1, _share_of(length, share, item_seq), 0)
    begin = _begin(length, window, generator)[:, None]
    place = torch.arange(item_seq.shape[1], device=item_seq.device)
    inside = (place >= begin) & (place < begin + window[:, None])
    # two keys, so that no rounding moves an item out of its window: a random order, then (stable) what comes before
    # the window, inside and after it, outside of it in the old order
    draw = torch.rand(item_seq.shape, generator=generator, device=item_seq.device)
    shuffled = torch.where(inside, draw, 0.0).argsort(dim=1, stable=True)
    key = torch.where(inside, begin, place).gather(1, shuffled)
    return item_seq.gather(1, shuffled.gather(1, key.argsort(dim=1, stable=True))), length


OPERATORS: dict[str, Callable[..., View]] = {"crop": crop, "mask": mask, "reorder": reorder}


@dataclass(frozen=True)
class SequenceViews:
    """The choices that make two random views of a history; calling it makes them.

    Args:
        crop: share of the items that a crop keeps
        mask: share of the items that are masked
        reorder: share of the items that are shuffled
        operators: which of the three are drawn from
    """

    crop: float = 0.5
    mask: float = 0.5
    reorder: float = 0.8
    operators: tuple[str, ...] = ("crop", "mask", "reorder")

    def __post_init__(self) -> None:
        for name in OPERATORS:
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} is a share of a history, above 0 and at most 1, not {getattr(self, name)}")
        if not self.operators:
            raise InputError(f"views of histories need one of the operators {', '.join(OPERATORS)}")
        for name in self.operators:
            if name not in OPERATORS:
                raise InputError(
                    f'no operator named "{name}"{nearest(name, OPERATORS)}; there are {", ".join(OPERATORS)}'
                )

    def __call__(self, item_seq: Tensor, length: Tensor, generator: torch.Generator | None = None) -> tuple[View, View]:
        """Two views of every history, by two different operators (one and the same if there is only one).

        Args:
            item_seq: int64 [B, L], right-padded with 0.
            length: int64 [B], at least 1.
            generator: of the draws.

        Returns:
            ``((item_seq, length), (item_seq, length))``, of the same shapes.
        """
        count, size, device = len(self.operators), len(item_seq), item_seq.device
        first = torch.randint(count, (size,), generator=generator, device=device)
        second = first
        if count > 1:
            second = (first + 1 + torch.randint(count - 1, (size,), generator=generator, device=device)) % count
        one, two = (self._view(item_seq, length, choice, generator) for choice in (first, second))
        return one, two

    def _view(self, item_seq: Tensor, length: Tensor, choice: Tensor, generator: torch.Generator | None) -> View:
        seen, kept = item_seq, length
        for number, name in enumerate(self.operators):
            items, count = OPERATORS[name](item_seq, length, getattr(self, name), generator)
            seen = torch.where((choice == number)[:, None], items, seen)
            kept = torch.where(choice == number, count, kept)
        return seen, kept


@lru_cache(maxsize=64)
def _floors(share: float, longest: int, device: torch.device) -> Tensor:
    # by the product as double precision has it, as published code does; 0.8 * 5 in single precision is not safe
    return torch.tensor([math.floor(share * length) for length in range(longest + 1)], device=device)


def _share_of(length: Tensor, share: float, item_seq: Tensor) -> Tensor:
    return _floors(share, item_seq.shape[1], item_seq.device)[length]


def _begin(length: Tensor, window: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform in 0 ... length - window."""
    room = length - window
    draw = torch.rand(length.shape, generator=generator, device=length.device)
    return torch.minimum((draw * (room + 1)).long(), room)
