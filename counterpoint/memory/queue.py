"""The keys of the last batches, first in first out: MoCo's dictionary."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from counterpoint.contrast.distributed import gather_plain
from counterpoint.errors import InputError


class Queue(nn.Module):
    """The newest K keys, [K, d], without gradient.

    Everything is a buffer: a checkpoint holds the keys and the place where the next one goes. `enqueue` never changes
    a tensor that `keys` handed out before, so a loss on the old keys may be backpropagated after it. With several
    processes each enqueues the keys of all, in rank order, so that all queues stay equal.

    Args:
        dim: length d of a key.
        size: number K of keys kept.
        start: "random" begins with K random unit vectors, which count as negatives until they are overwritten, as in
            the paper's code; "empty" begins with none, and `keys` has as many rows as were enqueued, up to K.
        whole_first: the first keys after an empty start are all held, even if they are more than K; the next `enqueue`
            cuts the queue to K again (ESimCSE's released code).
        generator: source of the random start.

    Attributes:
        filled: int64 scalar, number of enqueued keys now held (random starting keys are not counted).
        pointer: int64 scalar, row that the next key overwrites.

    Source: He et al. 2020 (arXiv 1911.05722), section 3.2 and algorithm 1.

    Raises:
        InputError: dim or size below one, or `whole_first` without an empty start.
    """

    bank: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(
        self,
        dim: int,
        size: int,
        *,
        start: Literal["random", "empty"] = "random",
        whole_first: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or size < 1:
            raise InputError(f"a queue needs dim and size of at least 1, got {dim} and {size}")
        if start not in ("random", "empty"):
            raise InputError(f'a queue starts "random" or "empty", got "{start}"')
        if whole_first and start != "empty":
            raise InputError('whole_first is about an empty start; use start="empty"')
        self.start, self.size, self.whole_first = start, size, whole_first
        bank = torch.randn(size, dim, generator=generator) if start == "random" else torch.zeros(size, dim)
        self.register_buffer("bank", F.normalize(bank, dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        # host's copy of `filled`, so that `keys` need not wait for the device; None after loading a checkpoint
        self._count: int | None = 0

    def __len__(self) -> int:
        """Rows of `keys`."""
        if self.start == "random":
            return self.size
        if self._count is None:
            self._count = int(self.filled)
        return self._count

    @property
    def keys(self) -> Tensor:
        """[K, d], not copied; in order of age only until it wraps around. Fewer rows while one begun empty fills."""
        return self.bank[: len(self)]

    @property
    def oldest_first(self) -> Tensor:
        """The `keys` in order of age, copied once the queue has wrapped around."""
        if len(self) < self.size:
            return self.keys
        return self.keys.roll(-int(self.pointer), 0)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put keys [n, d] in, overwriting the oldest; of more than K the newest K are kept. Normalise them before.

        Raises:
            InputError: keys of another length.
        """
        size, dim = self.size, self.bank.shape[1]
        if keys.dim() != 2 or keys.shape[1] != dim:
            raise InputError(f"the queue holds keys of length {dim}, got shape {list(keys.shape)}")
        keys = gather_plain(keys).rows.to(self.bank)
        count = keys.shape[0]
        if self.whole_first and count > size and len(self) == 0:
            self.bank = keys.clone()
            self.filled.fill_(count)
            self._count = count
            return
        self._cut()
        skipped = max(0, count - size)
        rows = (self.pointer + skipped + torch.arange(count - skipped, device=self.bank.device)) % size
        # out of place: a loss that still needs the old keys for its gradient keeps them
        self.bank = self.bank.index_copy(0, rows, keys[skipped:])
        self.pointer.add_(count).remainder_(size)
        self.filled.add_(count).clamp_(max=size)
        self._count = None if self._count is None else min(size, self._count + count)

    def clear(self) -> None:
        """Begin empty again.

        Raises:
            InputError: of a queue that begins with random keys.
        """
        if self.start != "empty":
            raise InputError('only a queue with start="empty" can be cleared')
        self.bank = self.bank[: self.size]
        self.pointer.zero_()
        self.filled.zero_()
        self._count = 0

    def _cut(self) -> None:
        """Forget all but the newest K of a first enqueue that was held whole."""
        if len(self.bank) > self.size:
            self.bank = self.bank[-self.size :]
            self.filled.fill_(self.size)
            self._count = self.size

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}bank")
        if self.whole_first and saved is not None and len(saved) >= self.size:
            self.bank = self.bank.new_zeros(len(saved), self.bank.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._count = None
