"""Parts that make the pairs of a step harder: they change what a method contrasts, and nothing else of it.

Each is a small record of choices; a method takes any of them as ``mixing=(part, ...)`` and applies them in order between its
embeddings and its objective. What a part draws, it draws from torch's generator of the embeddings' device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterpoint.contrast import Pairs, unit
from counterpoint.encoders import heads
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


@dataclass(frozen=True)
class Hallucination:
    r"""A further positive for each query, made in feature space by a small net that learns along (Hallucinator).

    The query is pushed away from the other view of its item, and what comes out is put beside it into a net of three
    layers, the generator, whose answer is one more query for the same key:

    .. math:: e = (1 + r)\, q - r\, k, \quad r \sim U(0, \text{ratio}) \qquad h = \mathrm{MLP}([q, e])

    with q and k as the method has them: q is not on the unit sphere yet, MoCo's k is. r is one number a step (in each
    process its own). The gradient reaches the encoder through q in both places, and through k where k has one.

    The keys are needed once more for the new queries. Where the other keys of the batch are negatives, these copies
    are negatives too, as in the released code, and it depends on the objective what that means. InfoNCE only grows by
    log 2. CLIP's texts have two images to share themselves between. NT-Xent has false negatives: a key repels its own
    copy (cosine 1), a query its own hallucination; and DCL has its positive back in the denominator. With
    ``duplicates="apart"`` hallucinations and keys are a batch of their own, contrasted as the first one is, and the
    loss is the mean of both. With a queue, or without negatives, the two are the same.

    Args:
        ratio: largest r.
        hidden: width of the generator's hidden layers; None is twice the length of the embeddings.
        times: hallucinations of each query, each with its own r.
        duplicates: "negatives", or "apart".

    Source: Wu, Hobbs and Hovakimyan 2023 (arXiv 2307.12168); defaults and duplicates from the released code.
    """

    ratio: float = 0.1
    hidden: int | None = None
    times: int = 1
    duplicates: Literal["negatives", "apart"] = "negatives"

    repels = False

    def __post_init__(self) -> None:
        if self.ratio < 0 or self.times < 1 or (self.hidden is not None and self.hidden < 1):
            raise InputError(f"a hallucination needs a ratio of 0 or more and positive numbers besides, got {self}")
        if self.duplicates not in ("negatives", "apart"):
            raise InputError(f'duplicates must be "negatives" or "apart", not "{self.duplicates}"')

    def build(self, dim: int) -> "Hallucinating":
        return Hallucinating(self, dim)


class Hallucinating(nn.Module):
    """`Hallucination` with its weights, which are trained like the method's own; they are no part of the encoder."""

    def __init__(self, choice: Hallucination, dim: int) -> None:
        super().__init__()
        self.choice = choice
        self.generator = heads.mlp(2 * dim, choice.hidden or 2 * dim, dim, layers=3)

    def forward(self, pairs: Pairs, epoch: int = 0) -> Pairs:
        query, matched = pairs.query, pairs.matched
        ratios = self.choice.ratio * torch.rand(self.choice.times, device=query.device)
        made = [hallucinate(self.generator, query, matched, ratio) for ratio in ratios]
        return pairs.with_queries(torch.cat(made), apart=self.choice.duplicates == "apart")


@dataclass(frozen=True)
class Transformation:
    r"""Harder positives and fresh negatives by moving features along straight lines, off the unit sphere (FT).

    The two features of a pair are pushed apart along their own line, and the queue is mixed with a shuffle
    :math:`\pi` of itself:

    .. math::
        \hat q = \lambda q + (1 - \lambda) k, \quad \hat k = \lambda k + (1 - \lambda) q, \quad
        \lambda - 1 \sim \mathrm{Beta}(\alpha_+, \alpha_+) \qquad
        \hat n_j = \lambda' n_j + (1 - \lambda') n_{\pi(j)}, \quad \lambda' \sim \mathrm{Beta}(\alpha_-, \alpha_-)

    so that :math:`\hat q \cdot \hat k = s + 2 \lambda (1 - \lambda)(1 - s)`: never more than s, and the less a pair has
    left to learn, the less it is changed. All negatives meet :math:`\hat q`. The results are not of length one, on purpose,
    and the objective takes them as they are; the queue itself stays what it is.

    Without a queue the negatives are other pairs of the batch, which are extrapolated like every pair. They are not
    interpolated: a mixture of two items that all queries share would repel both items from themselves. Given negatives
    (rows of the key without a query, negatives of one anchor) stay what they are. A method without negatives is refused:
    where the loss is -s alone, extrapolation only scales the gradient.

    Args:
        target: "pos", "neg" or "posneg" (both, as far as there is a queue).
        elementwise: for which of them each element of a feature has a draw of its own; "none" draws one number a step.
        positive_alpha: of the Beta distribution of the extrapolation.
        negative_alpha: of the Beta distribution of the interpolation.
        renormalize: bring the two features of a pair back to the unit sphere, which is another transformation and no
            clean-up: a score s - c becomes (s - c) / (1 + c), and those of the negatives shrink.
        warmup_epochs: epochs without it at the start.

    Source: Zhu et al. 2021 (arXiv 2108.02982), section 4.
    """

    target: Literal["posneg", "pos", "neg"] = "posneg"
    elementwise: Literal["none", "pos", "neg", "posneg"] = "none"
    positive_alpha: float = 2.0
    negative_alpha: float = 1.6
    renormalize: bool = False
    warmup_epochs: int = 0

    repels = True
    leaves_sphere = True

    def __post_init__(self) -> None:
        known = ("posneg", "pos", "neg")
        if self.target not in known or self.elementwise not in (*known, "none"):
            raise InputError(f"target is one of {', '.join(known)}, and elementwise one of them or none, got {self}")
        if not min(self.positive_alpha, self.negative_alpha) > 0 or self.warmup_epochs < 0:
            raise InputError(f"feature transformation needs positive alphas and epochs of 0 or more, got {self}")

    def build(self, dim: int) -> "Transformation":
        return self

    def __call__(self, pairs: Pairs, epoch: int = 0) -> Pairs:
        if self.target == "neg" and pairs.negatives is None:
            raise InputError("only the negatives of a queue are interpolated, and there is none: use target=pos")
        if epoch < self.warmup_epochs:
            return pairs
        positive = negative = order = None
        if "pos" in self.target:
            positive = 1 + self._share("pos", self.positive_alpha, pairs.query)
        if "neg" in self.target and pairs.negatives is not None:
            negative = self._share("neg", self.negative_alpha, pairs.negatives)
            order = torch.randperm(len(pairs.negatives), device=pairs.negatives.device)
        return transform(pairs, positive, negative, order, renormalize=self.renormalize)

    def _share(self, side: str, alpha: float, rows: Tensor) -> Tensor:
        both = torch.full((), alpha, device=rows.device)
        shape = rows.shape if side in self.elementwise else ()
        return torch.distributions.Beta(both, both, validate_args=False).sample(shape)


Mixing = HardMixing | Hallucination | Transformation
"""Every part there is."""

NAMED: dict[str, Mixing] = {
    "mochi": HardMixing(),
    "hallucinator": Hallucination(),
    "feature-transformation": Transformation(),
}
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
        for part, later in pairwise(parts):
            if getattr(part, "leaves_sphere", False):
                raise InputError(
                    f"{type(part).__name__} takes features off the unit sphere, where {type(later).__name__} needs them: "
                    "put it last, as in mixing=mochi,feature-transformation"
                )
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


def hallucinate(generator: Callable[[Tensor], Tensor], query: Tensor, other: Tensor, ratio: float | Tensor) -> Tensor:
    """What `generator` makes of ``[query, (1 + ratio) * query - ratio * other]``, ``[N, 2 d]`` -> ``[N, d]``, as given."""
    return generator(torch.cat([query, (1 + ratio) * query - ratio * other], dim=1))


def transform(
    pairs: Pairs,
    positive_share: Tensor | None,
    negative_share: Tensor | None = None,
    order: Tensor | None = None,
    *,
    renormalize: bool = False,
) -> Pairs:
    """Pairs with extrapolated positives and interpolated negatives, off the unit sphere: see `Transformation`.

    The gradient reaches both features of a pair through both, as far as they have any.

    Args:
        pairs: what is changed.
        positive_share: lambda, above 1: a scalar or ``[N, d]``; None leaves the positives.
        negative_share: lambda' between 0 and 1: a scalar or ``[K, d]``; None leaves the negatives.
        order: int64 ``[K]``, the row that each negative is mixed with.
        renormalize: bring the extrapolated features back to the unit sphere.
    """
    ready = unit if pairs.normalize else torch.Tensor.float
    query, key, negatives = ready(pairs.query), ready(pairs.key), pairs.negatives
    if positive_share is not None:
        here, there = (x.unflatten(0, (pairs.groups, -1)) for x in (query, key))
        share = positive_share.view_as(here) if positive_share.ndim else positive_share
        partner, rest = there.tensor_split([here.shape[1]], dim=1)
        here, partner = here + (1 - share) * (partner - here), partner + (1 - share) * (here - partner)
        if renormalize:
            here, partner = unit(here), unit(partner)
        query, key = here.flatten(0, 1), torch.cat([partner, rest], dim=1).flatten(0, 1)
    if negatives is not None:
        negatives = ready(negatives)
        if negative_share is not None and order is not None:
            negatives = negatives + (1 - negative_share) * (negatives[order] - negatives)
    own = None if pairs.hard_negatives is None else ready(pairs.hard_negatives)
    return replace(pairs, query=query, key=key, negatives=negatives, hard_negatives=own, normalize=False)


def _drawn(index: Tensor, count: int) -> Tensor:
    """Of each row of `index` [N, H], `count` entries drawn evenly with replacement: [N, count]."""
    at = torch.randint(index.shape[1], (len(index), count), device=index.device)
    return index.gather(1, at)
