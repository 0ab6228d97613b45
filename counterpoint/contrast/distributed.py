"""One primitive for contrast over processes: gather with gradient, so that local rows meet global columns.

Every rank computes ``world_size / N_global * sum over its own rows``. The backward of the gather sums what all ranks
say about a row, and data-parallel training averages over ranks, so the gradient equals that of one process that holds
the whole batch, exactly, also when ranks hold different numbers of rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from counterpoint.errors import InputError


class Gathered(NamedTuple):
    """Rows of all ranks in rank order, where this rank's rows start in them, and how many ranks there are."""

    rows: Tensor
    start: int
    ranks: int

    @property
    def total(self) -> int:
        """How many rows all ranks have."""
        return len(self.rows)


class Placed(NamedTuple):
    """As `Gathered`, without anyone holding the rows of all."""

    start: int
    total: int
    ranks: int


TRAVELLING = ("info_nce", "nt_xent", "dcl", "dclw", "sup_con", "clip_loss", "sigmoid_loss")
"""Objectives whose keys can travel from process to process, with all their options."""

_exchange: ContextVar[str] = ContextVar("exchange", default="gather")


@contextmanager
def exchange(how: Literal["gather", "ring"]) -> Iterator[None]:
    """How rows of several processes meet inside the block; results and gradients are the same.

    "gather" gives every rank a copy of all keys: one exchange, and the usual choice. "ring" lets key blocks travel from rank
    to rank (`counterpoint.contrast.kernels.ring`), so that no rank ever holds more than a few blocks of its own size: for
    batches whose keys would not fit, and with half the arithmetic where the keys are the queries. It serves the objectives in
    `TRAVELLING`, with all their options; others gather in either case.

    Raises:
        InputError: neither of the two.
    """
    if how not in ("gather", "ring"):
        raise InputError(f'rows of several processes meet by "gather" or "ring", not "{how}"')
    token = _exchange.set(how)
    try:
        yield
    finally:
        _exchange.reset(token)


def by_ring() -> bool:
    """Whether key blocks travel: several processes, and `exchange` says so."""
    return world_size() > 1 and _exchange.get() == "ring"


def place(local: Tensor) -> Placed:
    """Where the rows of `local` stand among those of all ranks; one small all-reduce."""
    sizes = _sizes(len(local), local.device) if world_size() > 1 else [len(local)]
    return Placed(sum(sizes[: rank()]), sum(sizes), len(sizes))


def world_size() -> int:
    """Number of processes that contrast together: 1 unless a process group exists."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(local: Tensor) -> Gathered:
    """Rows ``[n_r, ...]`` of every rank, stacked ``[sum n_r, ...]``; gradients return to the rank that owns the row."""
    if world_size() == 1:
        return Gathered(local, 0, 1)
    sizes = _sizes(len(local), local.device)
    return Gathered(_Gather.apply(local, sizes), sum(sizes[: rank()]), len(sizes))


def gather_plain(local: Tensor) -> Gathered:
    """As `gather`, without gradient (queues, labels, statistics)."""
    if world_size() == 1:
        return Gathered(local.detach(), 0, 1)
    sizes = _sizes(len(local), local.device)
    return Gathered(_all_gather(local.detach(), sizes), sum(sizes[: rank()]), len(sizes))


def sum_over_ranks(local: Tensor) -> Tensor:
    """The sum of `local` over all ranks, with gradient: for statistics of the whole batch."""
    return local if world_size() == 1 else _Total.apply(local)


@torch.no_grad()
def log_sum(local: Tensor) -> Tensor:
    """``log sum_r exp(local_r)`` over ranks r, for each element, without gradient; -inf where a rank adds nothing."""
    if world_size() == 1:
        return local.detach()
    peak = local.detach().clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    peak = peak.masked_fill(peak.isneginf(), 0)
    total = (local.detach() - peak).exp()
    dist.all_reduce(total)
    return total.log() + peak


def _sizes(n: int, device: torch.device) -> list[int]:
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=device)
    sizes[rank()] = n
    dist.all_reduce(sizes)
    return sizes.tolist()


def _all_gather(local: Tensor, sizes: list[int]) -> Tensor:
    longest = max(sizes)
    padded = local.new_zeros((longest, *local.shape[1:]))
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, sizes):
        ctx.sizes = sizes
        return _all_gather(local, sizes)

    @staticmethod
    def backward(ctx, gradient):
        parts = gradient.contiguous().split(ctx.sizes)
        if dist.get_backend() == "nccl" and len(set(ctx.sizes)) == 1:
            own = torch.empty_like(parts[rank()])
            dist.reduce_scatter(own, [part.contiguous() for part in parts])
            return own, None
        total = gradient.contiguous().clone()  # gloo has no reduce-scatter: sum everything, keep the own rows
        dist.all_reduce(total)
        return total.split(ctx.sizes)[rank()], None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local):
        whole = local.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx, gradient):  # what every rank's loss says about the sum
        whole = gradient.contiguous().clone()
        dist.all_reduce(whole)
        return whole
