"""What each query is compared with, written out, for objectives that look at single scores and not at a sum over all."""

from typing import NamedTuple

import torch
from torch import Tensor

from counterpoint.contrast.distributed import Gathered, gather
from counterpoint.contrast.operands import (
    check_dimensions,
    check_matrix,
    check_pair,
    einsum,
    ignored_pairs,
    unit,
    wide,
)
from counterpoint.contrast.relation import Relation
from counterpoint.errors import InputError


class Candidates(NamedTuple):
    """The positive of each query and everything that may repel it.

    Attributes:
        query: ``[N, d]``.
        positive: ``[N, d]``, the key that each query belongs to.
        pool: ``[C, d]``, shared candidates: the keys of all processes, then the shared negatives.
        own: int64 ``[N]``, place of the positive in the pool; -1 where it is not in it.
        hard: ``[N, S, d]``, further candidates of each query alone.
        without: pairs of the pool's keys that do not count.
        start: where this process's keys stand in the pool.
        keys: how many of the pool are keys.
    """

    query: Tensor
    positive: Tensor
    pool: Tensor
    own: Tensor
    hard: Tensor | None
    without: Relation | None
    start: int
    keys: int

    @property
    def attraction(self) -> Tensor:
        """Score of each query and its positive ``[N]``."""
        return (self.query * self.positive).sum(1)

    @property
    def negatives(self) -> int:
        """How many candidates a query has beside its positive, those to ignore among them."""
        own = 1 if self.keys else 0
        return len(self.pool) - own + (0 if self.hard is None else self.hard.shape[1])

    def scores(self, rows: slice = slice(None)) -> Tensor:
        """Scores ``[n, C + S]`` of some queries, their positives among them; held in full."""
        shared = einsum("nd,md->nm", self.query[rows], self.pool)
        if self.hard is None:
            return shared
        return torch.cat([shared, einsum("nd,nsd->ns", self.query[rows], self.hard[rows])], 1)

    def counted(self, rows: slice = slice(None)) -> Tensor:
        """bool ``[n, C + S]``: the candidates that are negatives."""
        first, last, _ = rows.indices(len(self.query))
        width = len(self.pool) + (0 if self.hard is None else self.hard.shape[1])
        counts = torch.ones(last - first, width, dtype=torch.bool, device=self.pool.device)
        if self.without is not None:
            counts[:, : self.keys] = ~self.without.holds(slice(first, last), slice(0, self.keys))
        if self.keys:
            counts.scatter_(1, self.own[rows, None], False)
        return counts


def candidates(
    query: Tensor,
    key: Tensor,
    *,
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    ignore: Relation | Tensor | None = None,
    in_batch: bool = True,
    normalize: bool = True,
) -> Candidates:
    """Check and collect what the queries are compared with; arguments as in `counterpoint.contrast.info_nce`.

    Args:
        query: ``[N, d]``.
        key: ``[M, d]``.
        positives: int64 ``[N]``, the key row of each query; None pairs row i with key i.
        negatives: shared extra keys ``[K, d]``.
        hard_negatives: extra keys of each query alone ``[N, S, d]``.
        ignore: pairs of the batch that do not count, positives excepted.
        in_batch: whether the other keys of the batch are negatives.
        normalize: bring rows to the unit sphere.

    Raises:
        InputError: wrong shape or type, a positive that is no key, or nobody to compare with.
    """
    check_pair(query, key, 1.0)
    n = len(query)
    if positives is None:
        if n != len(key):
            raise InputError(
                f"query has {n} rows and key {len(key)}: row i is paired with row i, so pass positives= to say which key "
                "belongs to which query"
            )
        positives = torch.arange(n, device=query.device)
    if positives.is_floating_point() or positives.shape != (n,):
        raise InputError(f"positives must be int64 [{n}], one key row a query, not {list(positives.shape)}")
    if query.device.type == "cpu" and not bool(((positives >= 0) & (positives < len(key))).all()):
        raise InputError(f"positives must name key rows from 0 to {len(key) - 1}")
    ready = unit if normalize else wide
    query, key = ready(query), ready(key)
    keys = gather(key) if in_batch else Gathered(key[:0], 0, 1)
    pool = [keys.rows]
    if negatives is not None:
        check_matrix(negatives, "negatives")
        check_dimensions(negatives, "negatives", query)
        pool.append(ready(negatives))
    if hard_negatives is not None:
        if hard_negatives.ndim != 3 or len(hard_negatives) != n:
            raise InputError(f"hard_negatives must be [{n}, S, d], not {list(hard_negatives.shape)}")
        check_dimensions(hard_negatives, "hard_negatives", query)
        hard_negatives = ready(hard_negatives)
    without = None if ignore is None or not in_batch else ignored_pairs(ignore, keys, n, len(key))
    own = positives + keys.start if in_batch else torch.full_like(positives, -1)
    everyone = torch.cat(pool) if len(pool) > 1 else pool[0]
    found = Candidates(query, key[positives], everyone, own, hard_negatives, without, keys.start, len(keys.rows))
    if found.negatives < 1:
        raise InputError("no negatives: a batch of one pair, and nothing further to compare with")
    return found
