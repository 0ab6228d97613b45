"""Batches whose order is a function of (seed, epoch), so that a position is all there is to resume."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from counterpoint.errors import InputError

Batch = dict[str, Tensor]


class Batches:
    """An epoch of batches at a time; iterating again goes on with the next epoch.

    Resident items are gathered on their device, with no loader process between the arrays and the views; items that
    live in files are decoded by worker processes. Under several ranks, `batch_size` is the size over all of them and
    each rank takes its slice.

    Args:
        items: resident `Items`, or a map-style data set of dictionaries (``ImageFiles``).
        batch_size: items per batch over all ranks.
        seed: decides the order together with the epoch.
        shuffle: False goes through all items once, the last batch smaller: in their order, or from long to short where
            they have lengths.
        workers: decoding processes for streamed items.

    Attributes:
        grouping: asked once an epoch, with the epoch and the items, for the group of each item, int64 [N]: the batches of
            that epoch then hold items of one group each (see `grouped_batches`), and none of a group below 0. None, or an
            answer of None: any items.

    Items with ``repeats`` are taken so many times an epoch, as if they were so many copies.
    """

    def __init__(self, items: Any, batch_size: int, *, seed: int = 0, shuffle: bool = True, workers: int = 2):
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        self.items, self.seed, self.shuffle, self.workers = items, seed, shuffle, workers
        self.resident = hasattr(items, "take")
        repeats = getattr(items, "repeats", None)
        self.repeats: Tensor | None = None if repeats is None else repeats.cpu()
        self.count = len(items) if self.repeats is None else int(self.repeats.sum())
        self.batch_size = min(batch_size, self.count)
        self.grouping: Callable[[int, Any], Tensor | None] | None = None
        self.device = torch.device("cpu")
        self.rank, self.ranks = 0, 1
        self.epoch, self.batch = 0, 0

    def to(self, device: torch.device, rank: int = 0, ranks: int = 1) -> "Batches":
        """Move resident items to `device` (unless they would take over half of its free memory)."""
        self.rank, self.ranks = rank, ranks
        # what streams has no size: only ask what is resident
        if self.resident and (device.type != "cuda" or self.items.nbytes < torch.cuda.mem_get_info(device)[0] / 2):
            self.items, self.device = self.items.to(device), device
        return self

    def __len__(self) -> int:
        if self.shuffle:
            return self.count // self.batch_size
        return -(-len(self.items) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # a generator: where to start is decided when the first batch is asked for, after a resumed position is in place
        if self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0
        yield from self._resident() if self.resident else self._streamed()

    def _resident(self) -> Iterator[Batch]:
        order = self.order().to(self.device)
        while self.batch < len(self):
            index = self._slice(order, self.batch)
            self.batch += 1
            yield self.items.take(index)

    def _streamed(self) -> Iterator[Batch]:
        order = self.order()
        remaining = [self._slice(order, batch).tolist() for batch in range(self.batch, len(self))]
        for batch in DataLoader(self.items, batch_sampler=remaining, num_workers=self.workers):
            self.batch += 1
            yield batch

    def order(self) -> Tensor:
        """Position of every item of this epoch, in the order in which the batches take them."""
        if not self.shuffle:
            lengths = getattr(self.items, "lengths", None)
            every = torch.arange(len(self.items))
            return every if lengths is None else lengths.cpu().argsort(descending=True, stable=True)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = None if self.grouping is None else self.grouping(self.epoch, self.items)
        if groups is not None:
            return self._grouped(groups.cpu(), generator)
        order = torch.randperm(self.count, generator=generator)
        return order if self.repeats is None else torch.arange(len(self.items)).repeat_interleave(self.repeats)[order]

    def _grouped(self, groups: Tensor, generator: torch.Generator) -> Tensor:
        """Passes through the groups until there are as many batches as in any other epoch."""
        within = (groups >= 0).nonzero()[:, 0]
        groups = groups[within]
        counts = groups.bincount(minlength=1)
        if int(counts.max()) < self.batch_size:
            raise InputError(
                f"the largest of {int((counts > 0).sum())} groups has {int(counts.max()):,} items, and batches of one group "
                f"need {self.batch_size:,}: take fewer groups or smaller batches"
            )
        found: list[Tensor] = []
        missing = len(self)
        while missing > 0:
            drawn = torch.cat([torch.randperm(count, generator=generator) for count in counts.tolist()])
            found.append(grouped_batches(groups, drawn, self.batch_size)[:missing])
            missing -= len(found[-1])
        return within[torch.cat(found).flatten()]

    def _slice(self, order: Tensor, batch: int) -> Tensor:
        index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return index.tensor_split(self.ranks)[self.rank] if self.ranks > 1 else index


def grouped_batches(
    groups: Tensor, permutations: Tensor, batch_size: int, *, world_size: int = 1, rank: int = 0
) -> Tensor:
    """Batches that hold items of one group each, in turn from group 0, 1, ... as long as a group has any left.

    A group of n items gives ``n // world_size // batch_size`` batches on each rank: of its permuted members the first
    are kept, so many as fill the batches of all ranks, and rank r takes those at r, r + world_size, ... A visit takes its
    batch from the end of that list, the last item first.

    Args:
        groups: int64 [N], from 0.
        permutations: int64 [N]; block after block the order of group 0, 1, ..., as positions among its members, which stand
            in the order of the items.
        batch_size: items of a batch on one rank.
        world_size: ranks.
        rank: whose batches.

    Returns:
        int64 [batches, batch_size], positions of items.

    Source: Zhang et al. 2024 (arXiv 2402.11816), released sampler `MCL_batch_sampler_DDP`.
    """
    counts = groups.bincount()
    members = groups.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    # the c-th block of permutations counts from the first member of group c
    drawn = members[permutations + starts.repeat_interleave(counts)]
    batches = counts // world_size // batch_size
    rounds, found = [], []
    for start, count in zip(starts.tolist(), batches.tolist(), strict=True):
        mine = drawn[start : start + count * world_size * batch_size][rank::world_size]
        found.append(mine.flip(0).view(count, batch_size))
        rounds.append(torch.arange(count))
    return torch.cat(found)[torch.cat(rounds).argsort(stable=True)]
