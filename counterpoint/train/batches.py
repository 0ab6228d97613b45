"""Batches whose order is a function of (seed, epoch), so that a position is all there is to resume."""

from collections.abc import Iterator
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
    """

    def __init__(self, items: Any, batch_size: int, *, seed: int = 0, shuffle: bool = True, workers: int = 2):
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        self.items, self.seed, self.shuffle, self.workers = items, seed, shuffle, workers
        self.resident = hasattr(items, "take")
        self.batch_size = min(batch_size, len(items))
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
        count = len(self.items)
        return count // self.batch_size if self.shuffle else -(-count // self.batch_size)

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
        return torch.randperm(len(self.items), generator=generator)

    def _slice(self, order: Tensor, batch: int) -> Tensor:
        index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return index.tensor_split(self.ranks)[self.rank] if self.ranks > 1 else index
