"""Parts that make the pairs of a step harder: they change what a method contrasts, and nothing else of it.

Each is a small record of choices; a method takes any of them as ``mixing=(part, ...)`` and applies them in order between its
embeddings and its objective. What a part draws, it draws from torch's generator of the embeddings' device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.contrast import Pairs, unit
from counterpoint.errors import InputError


@dataclass(frozen=True)
class HardMixing:
    r"""Harder negatives than there are, made from the hardest that there are (MoCHi).

    Of each anchor's `hard` most similar negatives, `mixed` pairs are mixed with each other and `mixed_with_query` ones with
    the anchor itself, and join its denominator as constants:

    .. math::
        h = \frac{\alpha n_i + (1 - \alpha) n_j}{\lVert \cdot \rVert}, \; \alpha \sim U(0, 1) \qquad
        h' = \frac{\beta q + (1 - \beta) n_j}{\lVert \cdot \rVert}, \; \beta \sim U(0, \tfrac12)

    With a queue the negatives are its keys; without one, the other rows of the batch that the objective repels.

    Args:
        hard: N, how many of the most similar negatives are mixed (all, where there are fewer).
        mixed: s, synthetic negatives from two hard ones.
        mixed_with_query: s', synthetic negatives from a hard one and the anchor.
        warmup_epochs: epochs without mixing at the start, while features mean nothing yet.

    Source: Kalantidis et al. 2020 (arXiv 2010.01028), sections 3.2 and 3.3.
    """

    hard: int = 1024
    mixed: int = 1024
    mixed_with_query: int = 128
    warmup_epochs: int = 10

    repels = True

    def __post_init__(self) -> None:
        if self.hard < 1 or min(self.mixed, self.mixed_with_query, self.warmup_epochs) < 0:
            raise InputError(f"hard mixing needs at least one hard negative and no negative numbers, got {self}")

    def build(self, dim: int) -> "HardMixing":
        return self

    def __call__(self, pairs: Pairs, epoch: int = 0) -> Pairs:
        if epoch < self.warmup_epochs or not self.mixed + self.mixed_with_query:
            return pairs
        with torch.no_grad():
            mixed = torch.cat([self._of(*side) for side in pairs.sides()])
        known = pairs.hard_negatives
        return replace(pairs, hard_negatives=mixed if known is None else torch.cat([known, mixed], dim=1))

    def _of(self, anchor: Tensor, pool: Tensor, without: Tensor | None) -> Tensor:
        count = min(self.hard, len(pool) - (0 if without is None else without.shape[1]))
        if count < 1:
            raise InputError("a batch of one item has no negatives to mix: use a batch of at least 2")
        hard, n = hardest(anchor, pool, count, without=without), len(anchor)
        made = []
        if self.mixed:
            i, j = (_drawn(hard, self.mixed) for _ in range(2))
            made.append(mix(pool[i], pool[j], torch.rand(n, self.mixed, device=anchor.device)))
        if self.mixed_with_query:
            j = _drawn(hard, self.mixed_with_query)
            share = torch.rand(n, self.mixed_with_query, device=anchor.device) / 2
            made.append(mix(anchor[:, None], pool[j], share))
        return torch.cat(made, dim=1)


Mixing = HardMixing
"""Every part there is."""

NAMED: dict[str, Mixing] = {"mochi": HardMixing()}
"""Parts by the names that recipes and the command line use."""


class Mixed(nn.Module):
    """Parts in the order in which they are applied; without any, pairs stay what they are.

    Args:
        parts: the choices.
        dim: length of the embeddings.
        owner: the method, for messages.
        repels: whether the method has negatives.

    Raises:
        InputError: a part that needs what the method does not have.
    """

    def __init__(self, parts: Sequence[Mixing], dim: int, owner: str, repels: bool = True) -> None:
        super().__init__()
        for part in parts:
            if part.repels and not repels:
                raise InputError(f"{type(part).__name__} works on negatives, and {owner} has none: leave it out")
        self.parts: list[Any] = [part.build(dim) for part in parts]
        self.learned = nn.ModuleList(part for part in self.parts if isinstance(part, nn.Module))

    def forward(self, pairs: Pairs, epoch: int = 0) -> Pairs:
        for part in self.parts:
            pairs = part(pairs, epoch)
        return pairs


def hardest(query: Tensor, pool: Tensor, count: int, *, without: Tensor | None = None) -> Tensor:
    """The rows of `pool` most similar to each query, as positions int64 ``[N, count]`` in rising order.

    Args:
        query: ``[N, d]``; its length does not matter.
        pool: ``[P, d]``, on the unit sphere.
        count: how many, at most P.
        without: int64 ``[N, W]``, rows of the pool that are left out.

    Raises:
        InputError: more than there are.
    """
    if not 1 <= count <= len(pool):
        raise InputError(f"{count} hardest of {len(pool)} negatives: choose a number between 1 and {len(pool)}")
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        similarity = query.to(pool.dtype) @ pool.T
        if without is not None:
            similarity.scatter_(1, without, -torch.inf)
        return similarity.topk(count, dim=1, sorted=False).indices.sort(dim=1).values


def mix(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """``share * first + (1 - share) * second`` on the unit sphere, constants: ``[N, S, d]`` with shares ``[N, S]``."""
    return unit(torch.lerp(second, first.expand_as(second), share[..., None].to(second.dtype))).detach()


def _drawn(index: Tensor, count: int) -> Tensor:
    """Of each row of `index` [N, H], `count` entries drawn evenly with replacement: [N, count]."""
    at = torch.randint(index.shape[1], (len(index), count), device=index.device)
    return index.gather(1, at)
