"""What one step contrasts, as data: parts that change it come between a method's embeddings and its objective."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from counterpoint.contrast.distributed import gather_plain
from counterpoint.contrast.softmax import clip_loss, dcl, dclw, nt_xent, unit
from counterpoint.errors import InputError


@dataclass(frozen=True)
class Pairs:
    """Row i of `query` belongs to row i of `key`.

    Attributes:
        query: ``[N, d]``.
        key: ``[M, d]``; rows from N on belong to no query (given negatives).
        negatives: shared further keys ``[K, d]``, for example a queue.
        hard_negatives: further keys of each anchor alone ``[A, S, d]``. The anchors are the queries, followed by the keys
            where `both`.
        in_batch: whether the other keys of the batch are negatives.
        both: whether the keys are anchors too.
        within: whether the other rows of its own side are negatives of an anchor.
        normalize: whether rows are still to be brought to the unit sphere.
    """

    query: Tensor
    key: Tensor
    negatives: Tensor | None = None
    hard_negatives: Tensor | None = None
    in_batch: bool = True
    both: bool = False
    within: bool = False
    normalize: bool = True

    @classmethod
    def under(cls, objective: Callable[..., Tensor], query: Tensor, key: Tensor, **more: Any) -> "Pairs":
        """Pairs as an objective compares them: NT-Xent and DCL look both ways and within, CLIP both ways only."""
        while isinstance(objective, partial):
            objective = objective.func
        within = objective in (nt_xent, dcl, dclw)
        return cls(query, key, both=within or objective is clip_loss, within=within, **more)

    def sides(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Each group of anchors ``[N, d]``, all rows that may repel it ``[P, d]``, and which of those are no negatives.

        The last is int64 ``[N, 1 or 2]`` (the anchor itself, its partner), None where all are negatives. Rows are on the
        unit sphere and, unlike the anchors, constants; under several processes they are those of all.
        """
        ready = unit if self.normalize else torch.Tensor.float
        query, key = ready(self.query), ready(self.key)
        anchors = [(query, key)] + ([(key, query)] if self.both else [])
        found = []
        for own, other in anchors:
            pool, out = [], []
            n, before = len(own), 0
            for rows in ([other] if self.in_batch else []) + ([own] if self.within else []):
                everyone = gather_plain(rows.detach())
                out.append(before + everyone.start + torch.arange(n, device=own.device))
                pool.append(everyone.rows)
                before += len(everyone.rows)
            if self.negatives is not None:
                pool.append(ready(self.negatives))
            if not pool:
                raise InputError("nothing repels: there are neither keys of the batch nor further negatives")
            found.append((own, torch.cat(pool) if len(pool) > 1 else pool[0], torch.stack(out, 1) if out else None))
        return found

    def loss(self, objective: Callable[..., Tensor], **options: Any) -> Tensor:
        """The objective of these pairs, with `options` as they are.

        Raises:
            InputError: the objective cannot take what these pairs hold.
        """
        extra: dict[str, Any] = {}
        if len(self.key) != len(self.query):
            extra["positives"] = torch.arange(len(self.query), device=self.query.device)
        if self.negatives is not None and len(self.negatives):
            extra["negatives"] = self.negatives
        if self.hard_negatives is not None:
            extra["hard_negatives"] = self.hard_negatives
        if not self.in_batch:
            extra["in_batch"] = False
        if not self.normalize:
            extra["normalize"] = False
        if extra.keys() - _parameters(objective):
            raise InputError(
                f"further negatives need the objective info_nce; {getattr(objective, '__name__', objective)} takes pairs only"
            )
        return objective(self.query, self.key, **options, **extra)


@cache
def _parameters(objective: Callable[..., Tensor]) -> frozenset[str]:
    return frozenset(inspect.signature(objective).parameters)
