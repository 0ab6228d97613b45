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
        items: resident ``Images`` (tensors) or a map-style data set of dictionaries (``ImageFiles``).
        tensors: the resident tensors by name; None when `items` streams.
        batch_size: items per batch over all ranks.
        seed: decides the order together with the epoch.
        shuffle: False keeps the order of the data and the last, smaller batch.
        workers: decoding processes for streamed items.
    """

    def __init__(
        self,
        items: Any,
        tensors: Batch | None,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 2,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        self.items, self.tensors, self.seed, self.shuffle, self.workers = items, tensors, seed, shuffle, workers
        self.batch_size = min(batch_size, len(items))
        self.rank, self.ranks = 0, 1
        self.epoch, self.batch = 0, 0

    @classmethod
    def of(cls, items: Any, method: Any, batch_size: int, **options: Any) -> "Batches":
        """Batches of what `counterpoint.data.load` returned, in the channels that `method` sees."""
        channels = getattr(method, "channels", None)
        if not hasattr(items, "image"):
            return cls(items, None, batch_size, **options)
        if channels is not None:
            items = items.channels(channels)
        tensors = {"image": items.image, "index": torch.arange(len(items))}
        if items.label is not None:
            tensors["label"] = items.label
        return cls(items, tensors, batch_size, **options)

    def to(self, device: torch.device, rank: int = 0, ranks: int = 1) -> "Batches":
        """Move resident tensors to `device` (unless they would take over half of its free memory)."""
        self.rank, self.ranks = rank, ranks
        if self.tensors is not None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if sum(value.nbytes for value in self.tensors.values()) < free / 2:
                self.tensors = {name: value.to(device) for name, value in self.tensors.items()}
        return self

    def __len__(self) -> int:
        count = len(self.items)
        return count // self.batch_size if self.shuffle else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # a generator: where to start is decided when the first batch is asked for, after a resumed position is in place
        if self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0
        yield from self._resident() if self.tensors is not None else self._streamed()

    def _resident(self) -> Iterator[Batch]:
        assert self.tensors is not None
        order = self._order().to(self.tensors["image"].device)
        while self.batch < len(self):
            index = self._slice(order, self.batch)
            self.batch += 1
            yield {name: value[index] for name, value in self.tensors.items()}

    def _streamed(self) -> Iterator[Batch]:
        order = self._order()
        remaining = [self._slice(order, batch).tolist() for batch in range(self.batch, len(self))]
        for batch in DataLoader(self.items, batch_sampler=remaining, num_workers=self.workers):
            self.batch += 1
            yield batch

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.items))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self.items), generator=generator)

    def _slice(self, order: Tensor, batch: int) -> Tensor:
        index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        return index.tensor_split(self.ranks)[self.rank] if self.ranks > 1 else index
