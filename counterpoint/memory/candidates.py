"""Pools of candidates: for each sentence its nearest others under a teacher, and copies of itself with other words;
and what is drawn from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from counterpoint.contrast.operands import unit
from counterpoint.contrast.propensity import InversePropensity, draw_candidates
from counterpoint.data.surface import Surface, surface_similarity
from counterpoint.data.texts import Ragged, Sentences
from counterpoint.errors import InputError

SIMILARITIES = 2**25
"""So many similarities are held at once while neighbours are looked for."""
SAMPLED = 2**22
"""Similarities of which quantiles are taken."""


@dataclass
class VariedSentences(Sentences):
    """Sentences together with reworded copies of each: row ``v N + i`` of `variants` and `words_of` is variant v of sentence i.

    Args:
        variants: token ids of ``[(1 + A) N]`` rows; variant 0 is the sentence itself.
        words_of: word numbers of the same rows; see `counterpoint.data.surface`.
    """

    variants: Ragged | None = None
    words_of: Ragged | None = None

    @property
    def nbytes(self) -> int:
        more = [rows for rows in (self.variants, self.words_of) if rows is not None]
        return super().nbytes + sum(rows.flat.nbytes + rows.offsets.nbytes for rows in more)

    @property
    def copies(self) -> int:
        """A, reworded copies of each sentence."""
        return 0 if self.variants is None else (len(self.variants.offsets) - 1) // len(self) - 1

    def variant(self, number: int) -> Sentences:
        """One variant of all sentences, as items."""
        assert self.variants is not None
        at = torch.arange(len(self), device=self.variants.offsets.device) + number * len(self)
        return Sentences({"anchor": self.variants.subset(at)}, self.pad, name=self.name)

    def subset(self, index: Tensor | list[int]) -> VariedSentences:  # type: ignore[override]
        """The rows at `index`, in that order, with their variants."""
        chosen = super().subset(index)
        assert isinstance(chosen, VariedSentences) and self.variants is not None and self.words_of is not None
        at = torch.as_tensor(index, dtype=torch.int64, device=self.variants.offsets.device)
        every = torch.cat([at + v * len(self) for v in range(1 + self.copies)])
        return replace(chosen, variants=self.variants.subset(every), words_of=self.words_of.subset(every))

    def to(self, device: torch.device | str) -> VariedSentences:
        moved = super().to(device)
        assert isinstance(moved, VariedSentences)
        rows = [None if rows is None else rows.to(device) for rows in (self.variants, self.words_of)]
        return replace(moved, variants=rows[0], words_of=rows[1])


@dataclass(frozen=True)
class Pools:
    """The candidates of N sentences: K neighbours, then the sentence itself, then its A reworded copies.

    Args:
        neighbours: int64 ``[N, K]``, positions of other sentences, the nearest first.
        semantic: ``[N, K + 1 + A]``, how alike the teacher finds sentence and candidate (cosine).
        surface: ``[N, K + 1 + A]``, how alike they look.
        vectors: ``[N, D]``, the teacher's unit vectors of the sentences.
    """

    neighbours: Tensor
    semantic: Tensor
    surface: Tensor
    vectors: Tensor

    def rows(self, index: Tensor, columns: Tensor) -> Tensor:
        """See `candidate_rows`."""
        return candidate_rows(self.neighbours, index, columns)

    def quantile(self, share: float) -> float:
        """The similarity under the teacher below which this share of all neighbours lies (of some millions of them)."""
        values = self.semantic[:, : self.neighbours.shape[1]].flatten()
        return float(values[:: -(-len(values) // SAMPLED)].float().quantile(share))


@dataclass(frozen=True)
class Sampler:
    """Draws positives and hard negatives of sentences from their pools, by inverse propensity.

    Args:
        weights: how likely each allowed candidate is.
        least_positive: similarity under the teacher from which a candidate may be a positive.
        most_negative: up to which it may be a hard negative; none is both.
        duplicate: surface similarity above which it is no positive.
    """

    weights: InversePropensity
    least_positive: float
    most_negative: float
    duplicate: float

    def positive_logits(self, pools: Pools, index: Tensor) -> Tensor:
        """Log weights ``[B, K + 1 + A]`` with which each candidate of the sentences ``[B]`` is drawn as a positive."""
        semantic, surface = pools.semantic[index], pools.surface[index]
        allowed = (semantic >= self.least_positive) & (surface <= self.duplicate)
        return self.weights.logits(semantic, surface, allowed, "positive")

    def negative_logits(self, pools: Pools, index: Tensor) -> Tensor:
        """The same as a hard negative; the sentence itself and its copies are none."""
        semantic, surface = pools.semantic[index], pools.surface[index]
        neighbour = torch.arange(semantic.shape[1], device=semantic.device) < pools.neighbours.shape[1]
        allowed = (semantic <= self.most_negative) & (semantic < self.least_positive) & neighbour
        return self.weights.logits(semantic, surface, allowed, "negative")

    def draw(
        self, pools: Pools, index: Tensor, negatives: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows of the variants: a positive ``[B]`` and negatives ``[B, M]`` of the sentences ``[B]``.

        A sentence without any positive is its own, and one without negatives has random sentences.
        """
        count, own = pools.neighbours.shape
        column = draw_candidates(self.positive_logits(pools, index), generator=generator)
        positive = pools.rows(index, column.where(column >= 0, own))[:, 0]
        if not negatives:
            return positive, positive.new_empty(len(index), 0)
        column = draw_candidates(self.negative_logits(pools, index), negatives, generator=generator)
        found = pools.rows(index, column.clamp(min=0))
        other = torch.randint(1, count, column.shape, generator=generator, device=column.device)
        return positive, found.where(column >= 0, (index[:, None] + other) % count)


def make_pools(
    items: VariedSentences,
    vectors: list[Tensor],
    *,
    size: int = 100,
    shard: int = 50_000,
    measure: Surface = "overlap",
    generator: torch.Generator | None = None,
) -> Pools:
    """Neighbours under a teacher, and how alike each candidate looks; only inside the pools is that computed.

    Args:
        items: the sentences and their copies.
        vectors: the teacher's ``[N, D]`` of each variant, that of the sentences first.
        size: K; fewer where a shard has fewer others.
        shard: see `nearest_in_shards`.
        measure: of the surface.
        generator: of the shards.
    """
    assert items.words_of is not None
    x, *copies = (unit(part) for part in vectors)
    neighbours, near = nearest_in_shards(x, size, shard=shard, generator=generator)
    words_of = items.words_of.to(x.device)
    columns = torch.arange(neighbours.shape[1] + 1 + items.copies, device=x.device)
    surface = []
    for at in torch.arange(len(x), device=x.device).split(512):
        rows = candidate_rows(neighbours, at, columns.expand(len(at), -1))
        own, others = words_of.padded(at, -1)[0], words_of.padded(rows.flatten(), -1)[0]
        surface.append(surface_similarity(own[:, None], others.unflatten(0, rows.shape), measure))
    alike = [near, torch.ones_like(near[:, :1]), *((x * copy).sum(1, keepdim=True) for copy in copies)]
    return Pools(neighbours, torch.cat(alike, 1), torch.cat(surface), x)


def candidate_rows(neighbours: Tensor, index: Tensor, columns: Tensor) -> Tensor:
    """Which row of the variants each chosen candidate is, int64 ``[B, S]``.

    Args:
        neighbours: int64 ``[N, K]``.
        index: int64 ``[B]``, sentences.
        columns: int64 ``[B, S]``, candidates of theirs: below K a neighbour, from K on a variant of the sentence.
    """
    near = neighbours[index]
    other = near.gather(1, columns.clamp(max=near.shape[1] - 1))
    copy = (columns - near.shape[1]) * len(neighbours) + index[:, None]
    return torch.where(columns < near.shape[1], other, copy)


def nearest_in_shards(
    x: Tensor, count: int, *, shard: int = 50_000, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The most similar other rows of each row, by exact search inside random shards of the rows.

    Args:
        x: ``[N, D]`` on the unit sphere.
        count: neighbours of each row; fewer where its shard has fewer others.
        shard: most rows of a shard; shards are of even size. The search costs N times this.
        generator: decides the shards.

    Returns:
        Positions int64 ``[N, count]``, the nearest first, and their cosines ``[N, count]``.

    Raises:
        InputError: fewer than two rows, or sizes that are not positive.
    """
    if len(x) < 2 or count < 1 or shard < 2:
        raise InputError(f"neighbours need two rows, one neighbour and shards of two, got {len(x)}, {count}, {shard}")
    order = torch.randperm(len(x), generator=generator).to(x.device)
    shards = order.tensor_split(-(-len(x) // shard))
    count = min(count, min(map(len, shards)) - 1)
    found = torch.empty(len(x), count, dtype=torch.int64, device=x.device)
    cosine = x.new_empty(len(x), count)
    for members in shards:
        candidates = x[members]
        for rows in torch.arange(len(members), device=x.device).split(max(1, SIMILARITIES // len(members))):
            alike = candidates[rows] @ candidates.T
            alike[torch.arange(len(rows), device=x.device), rows] = -torch.inf
            cosine[members[rows]], at = alike.topk(count, dim=1)
            found[members[rows]] = members[at]
    return found, cosine
