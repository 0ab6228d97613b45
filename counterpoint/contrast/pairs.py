"""What one step contrasts, as data: parts that change it come between a method's embeddings and its objective."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from counterpoint.contrast.distributed import gather_plain
from counterpoint.contrast.geometry import score_stats
from counterpoint.contrast.operands import Temperature, unit
from counterpoint.contrast.relation import Same
from counterpoint.contrast.softmax import clip_loss, dcl, dclw, nt_xent
from counterpoint.errors import InputError


@dataclass(frozen=True)
class Pairs:
    """Row i of `query` belongs to row i of `key`.

    Attributes:
        query: ``[N, d]``.
        key: ``[M, d]``; rows from N on belong to no query (given negatives).
        negatives: shared further keys ``[K, d]``, for example a queue.
        hard_negatives: further keys of each anchor alone ``[A, S, d]``. The anchors are the queries, followed by the keys
            where `both`; group by group, where there are several.
        in_batch: whether the other keys of the batch are negatives.
        both: whether the keys are anchors too.
        within: whether the other rows of its own side are negatives of an anchor.
        normalize: whether rows are still to be brought to the unit sphere.
        partner: ``[N, d]``, the other view of each query as the same head sees it, where `key` is the target of another
            head or network (a second prediction, in SimSiam); None: its key.
        items: int64 ``[N]``, what each pair shows: pairs of equal number do not repel each other. None: all differ.
        groups: of how many batches, one after the other in every field, this is. Each is contrasted by itself, and the
            loss is their mean.
    """

    query: Tensor
    key: Tensor
    negatives: Tensor | None = None
    hard_negatives: Tensor | None = None
    in_batch: bool = True
    both: bool = False
    within: bool = False
    normalize: bool = True
    partner: Tensor | None = None
    items: Tensor | None = None
    groups: int = 1

    @classmethod
    def under(cls, objective: Callable[..., Tensor], query: Tensor, key: Tensor, **more: Any) -> "Pairs":
        """Pairs as an objective compares them: NT-Xent and DCL look both ways and within, CLIP both ways only."""
        while isinstance(objective, partial):
            objective = objective.func
        within = objective in (nt_xent, dcl, dclw)
        return cls(query, key, both=within or objective is clip_loss, within=within, **more)

    @property
    def matched(self) -> Tensor:
        """The other view of each query ``[N, d]``: its `partner`, or its key."""
        if self.partner is not None:
            return self.partner
        return torch.cat([group.key[: len(group.query)] for group in self.split()])

    def split(self) -> list["Pairs"]:
        """The `groups` as pairs of their own."""
        if self.groups == 1:
            return [self]
        names = ("query", "key", "hard_negatives", "partner", "items")
        given = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        parts = zip(*(value.tensor_split(self.groups) for _, value in given), strict=True)
        return [replace(self, groups=1, **{name: part for (name, _), part in zip(given, group, strict=True)})
                for group in parts]  # fmt: skip

    def with_queries(self, more: Tensor, *, apart: bool = False) -> "Pairs":
        """Further queries ``[c N, d]`` of the same keys, c times as many: row i of each N belongs to key i.

        Args:
            more: the queries.
            apart: each N of them is a group of its own, contrasted as the queries are. False puts all into one batch with
                as many copies of the keys, which repel like other keys, also from the queries that they belong to.
        """
        n, times = len(self.query), 1 + len(more) // len(self.query)

        def copies(x: Tensor | None, parts: int = 1) -> Tensor | None:
            """Of each of so many even parts, one after the other."""
            return x if x is None else torch.cat([p for part in x.tensor_split(parts) for p in [part] * times])

        more_of: dict[str, Any] = {name: copies(getattr(self, name)) for name in ("partner", "items")}
        more_of["query"] = torch.cat([self.query, more])
        if apart or self.groups > 1:  # what stands apart stays apart
            more_of |= {"key": copies(self.key), "hard_negatives": copies(self.hard_negatives)}
            return replace(self, groups=times * self.groups, **more_of)
        more_of["key"] = torch.cat([self.key[:n]] * times + [self.key[n:]])
        more_of["hard_negatives"] = copies(self.hard_negatives, 2 if self.both else 1)
        return replace(self, **more_of)

    def sides(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Each group of anchors ``[N, d]``, all rows that may repel it ``[P, d]``, and which of those are no negatives.

        The last is int64 ``[N, 1 or 2]`` (the anchor itself, its partner), None where all are negatives. Rows are on the
        unit sphere and, unlike the anchors, constants; under several processes they are those of all.
        """
        if self.groups > 1:
            return [side for group in self.split() for side in group.sides()]
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

    def detach(self) -> "Pairs":
        """The same pairs as constants."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        constants: dict[str, Any] = {name: x.detach() for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **constants)

    def scores(self, temperature: Temperature = 1.0, *, most: int | None = None) -> Tensor:
        """What the loss sees of each anchor, float32 ``[A, 5]``: see `counterpoint.contrast.score_stats`.

        Args:
            temperature: of the exponentials.
            most: only the first so many anchors of each side.
        """
        if self.groups > 1:
            return torch.cat([group.scores(temperature, most=most) for group in self.split()])
        found = []
        for anchor, positive, pool, out, own in self._anchors(most):
            more = {"without": out, "hard_negatives": own}
            found.append(score_stats(anchor, positive, pool, temperature, normalize=False, **more))
        return torch.cat(found)

    def proxy_accuracy(self, *, most: int | None = None) -> Tensor:
        """Share of the anchors whose positive has a higher score than each of their negatives: how hard the task is.

        Args:
            most: only the first so many anchors of each side.
        """
        if self.groups > 1:
            return torch.stack([group.proxy_accuracy(most=most) for group in self.split()]).mean()
        wins = []
        for anchor, positive, pool, out, own in self._anchors(most):
            score = anchor @ pool.T
            if out is not None:
                score.scatter_(1, out, -torch.inf)
            if own is not None:
                score = torch.cat([score, torch.einsum("nd,nsd->ns", anchor, own)], dim=1)
            wins.append(((anchor * positive).sum(1, keepdim=True) > score).all(1))
        return torch.cat(wins).float().mean()

    def _anchors(self, most: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Of each side the first anchors, their positives, all that may repel them, who of it does not, and their own."""
        ready = unit if self.normalize else torch.Tensor.float
        sides = self.sides()
        hard = [None] * len(sides) if self.hard_negatives is None else self.hard_negatives.tensor_split(len(sides))
        for (anchor, pool, out), other, own in zip(sides, (self.key, self.query), hard, strict=False):
            positive = ready(other[: len(anchor)][:most])
            own = None if own is None else ready(own[:most])
            yield anchor[:most], positive, pool, None if out is None else out[:most], own

    def loss(self, objective: Callable[..., Tensor], **options: Any) -> Tensor:
        """The objective of these pairs, with `options` as they are.

        Raises:
            InputError: the objective cannot take what these pairs hold.
        """
        if self.groups > 1:
            losses = [group.loss(objective, **options) for group in self.split()]
            return torch.stack(losses).mean() if losses[0].ndim == 0 else torch.cat(losses)
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
        if self.items is not None:
            extra["ignore"] = Same(self.items, self.items)
        if extra.keys() - _parameters(objective):
            raise InputError(
                f"further negatives need the objective info_nce; {getattr(objective, '__name__', objective)} takes pairs only"
            )
        return objective(self.query, self.key, **options, **extra)


@cache
def _parameters(objective: Callable[..., Tensor]) -> frozenset[str]:
    return frozenset(inspect.signature(objective).parameters)
