r"""Contrast whose temperature is a function of the pair (and of the head that looks at it).

A head says that the other view is a Gaussian around its own, with the pair's temperature as variance. The negative
log-likelihood of unit vectors in d dimensions is, up to a constant, :math:`-s/\tau + \Omega(\tau)` with

.. math:: \Omega(\tau) = \tfrac d2 \log \tau + \tfrac1\tau

so each pair pays for the temperature that it chooses: a positive the more for a wide one, a negative for a narrow one.
`beta` weighs that price; at 1 the best temperature of a positive is :math:`2 (1 - s) / d`.

Vectors of C heads lie side by side in a row, ``[N, C d]``. A temperature is any function of two sets of unit vectors
(`PairTemperature`); `counterpoint.encoders.heads.TemperatureNetwork` is the learned one. The losses of heads add up.

Source: Wang et al. 2024, "Adaptive Multi-head Contrastive Learning" (ECCV; arXiv 2310.05615), section 3 and its table of
losses.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.contrast.distributed import gather, gather_plain
from counterpoint.contrast.operands import reduce, unit
from counterpoint.contrast.pairs import Pairs
from counterpoint.contrast.redundancy import off_diagonal
from counterpoint.errors import InputError


class PairTemperature(Protocol):
    """Temperatures of pairs, positive, at least float32; the order of the two may matter."""

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """``[..., C, d]`` twice -> ``[..., C]``: of the pairs that stand at the same place."""

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """``[N, C, d]`` and ``[M, C, d]`` -> ``[C, N, M]``: of all pairs, head by head."""


def apart(z: Tensor, count: int) -> Tensor:
    """The vectors of `count` heads side by side, ``[N, C d]``, as unit vectors ``[N, C, d]``.

    Raises:
        InputError: a length that is no multiple of `count`.
    """
    if z.shape[-1] % count:
        raise InputError(f"{z.shape[-1]} dimensions cannot be shared evenly by {count} heads")
    return unit(z.unflatten(-1, (count, -1)))


def regulariser(tau: Tensor, dim: int) -> Tensor:
    r""":math:`\Omega(\tau) = \tfrac d2 \log \tau + 1/\tau`, elementwise, with d the length of a head's vectors."""
    return dim / 2 * tau.log() + 1 / tau


def attraction(similarity: Tensor, tau: Tensor, *, beta: float, dim: int) -> Tensor:
    r"""A positive's :math:`-s/\tau + \beta\,\Omega(\tau)`, elementwise.

    Raises:
        InputError: temperatures of another shape; they are never broadcast, one belongs to each pair.
    """
    _check_paired(similarity, tau)
    return -similarity / tau + beta * regulariser(tau, dim)


def repulsion(
    similarity: Tensor, tau: Tensor, *, beta: float, dim: int, soft: bool = True, without: Tensor | None = None
) -> Tensor:
    r"""What all candidates of an anchor, along the last axis, push; their regularisers are subtracted.

    .. math::
        \text{soft: } \log \sum_n e^{s_n/\tau_n} - \beta \sum_n w_n \Omega(\tau_n), \; w = \mathrm{softmax}(s/\tau)
        \qquad \text{else: } \frac1K \sum_n \Big( \frac{s_n}{\tau_n} - \beta\,\Omega(\tau_n) \Big)

    The weights w are constants, like the choice of the hardest candidate that they soften.

    Args:
        similarity: ``[..., K]``.
        tau: ``[..., K]``.
        beta: weight of the regulariser.
        dim: d, length of a head's vectors.
        soft: log-sum-exp over the candidates; False takes their mean.
        without: bool, what broadcasts to ``[..., K]``: candidates that do not count.

    Returns:
        ``[...]``.

    Raises:
        InputError: temperatures of another shape; they are never broadcast, one belongs to each pair.
    """
    _check_paired(similarity, tau)
    logits, price = similarity / tau, beta * regulariser(tau, dim)
    if not soft:
        counted = torch.ones_like(logits) if without is None else (~without).to(logits.dtype).expand_as(logits)
        return ((logits - price) * counted).sum(-1) / counted.sum(-1).clamp(min=1)
    if without is not None:
        logits = logits.masked_fill(without, -torch.inf)
    return logits.logsumexp(-1) - (logits.detach().softmax(-1) * price).sum(-1)


def adaptive_contrast(
    pairs: Pairs,
    temperature: PairTemperature,
    *,
    count: int,
    beta: float = 0.1,
    hardest: int | None = None,
    decoupled: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Softmax contrast by C heads, each pair under its own temperature.

    .. math::
        \ell_i = \sum_c \Big( -\frac{s^c_{i,i'}}{\tau^c_{i,i'}} + \beta\,\Omega(\tau^c_{i,i'})
        + \operatorname{rep}_{n \in N_i} (s^c_{in}, \tau^c_{in}) \Big)

    with `repulsion` as rep. Who repels whom is said by `pairs`, as for any other objective. A constant temperature and
    beta 0 make it the sum over heads of DCL, or with ``decoupled=False`` of NT-Xent and InfoNCE. Anchors x candidates
    similarities and temperatures are held: this is a plain dense pass, not the tiled one.

    Args:
        pairs: rows ``[N, C d]``, heads side by side.
        temperature: of pairs.
        count: C.
        beta: weight of the regulariser.
        hardest: None repels all candidates softly; a number k the k most similar by their mean (1 is the paper's table).
        decoupled: the positive is no candidate.
        reduction: "mean" over anchors (queries, then keys where both are anchors), "sum" or "none".

    Raises:
        InputError: negatives of single anchors (mixing), no candidates at all, or rows that heads cannot share.
    """
    if pairs.hard_negatives is not None:
        raise InputError("adaptive heads know pairs of the batch and a queue, not negatives of a single anchor")
    if pairs.groups > 1:
        options: dict[str, Any] = {
            "count": count,
            "beta": beta,
            "hardest": hardest,
            "decoupled": decoupled,
            "reduction": reduction,
        }
        found = [adaptive_contrast(group, temperature, **options) for group in pairs.split()]
        return torch.cat(found) if reduction == "none" else torch.stack(found).mean()
    query, key = apart(pairs.query, count), apart(pairs.key, count)
    price: dict[str, Any] = {"beta": beta, "dim": query.shape[-1]}
    losses = []
    for anchor, other in [(query, key)] + ([(key, query)] if pairs.both else []):
        partner = other[: len(anchor)]
        positive, wide = _similarity(anchor, partner), temperature(anchor, partner).T  # [C, N]
        pool, without = _candidates(pairs, anchor, other)
        with torch.autocast(anchor.device.type, enabled=False):
            similarity = torch.einsum("ncd,pcd->cnp", anchor, pool)
        without = None if without is None else without.expand_as(similarity)
        if hardest is None:
            tau = temperature.between(anchor, pool)
        else:
            at = _hardest(similarity, without, hardest)
            similarity, without = _picked(at, similarity, without)
            chosen = torch.stack([rows[index] for rows, index in zip(pool.unbind(1), at, strict=True)], dim=2)
            tau = temperature(anchor[:, None].expand_as(chosen), chosen).permute(2, 0, 1)
        if not decoupled:
            similarity, tau = torch.cat([similarity, positive[..., None]], -1), torch.cat([tau, wide[..., None]], -1)
            without = None if without is None else functional.pad(without, (0, 1))
            if hardest is not None:  # of the negatives and the positive
                at = _hardest(similarity, without, hardest)
                similarity, tau, without = _picked(at, similarity, tau, without)
        repelled = repulsion(similarity, tau, **price, soft=hardest is None, without=without)
        losses.append((attraction(positive, wide, **price) + repelled).sum(0))
    return reduce(torch.cat(losses), reduction)


def adaptive_prediction(
    prediction: Tensor,
    target: Tensor,
    temperature: PairTemperature,
    *,
    count: int,
    beta: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    r"""SimSiam by C heads: :math:`\sum_c -s^c/\tau^c + 2 \beta\,\Omega(\tau^c)`, the targets being constants.

    The mean of both directions is then the paper's row for SimSiam, which halves the similarities but not the regularisers.

    Args:
        prediction: ``[N, C d]``, heads side by side.
        target: ``[N, C d]``; no gradient flows into it.
        temperature: of pairs.
        count: C.
        beta: weight of the regulariser.
        reduction: "mean", "sum" or "none".

    Raises:
        InputError: other shapes.
    """
    if prediction.shape != target.shape:
        raise InputError(
            f"prediction and target must have one shape, not {list(prediction.shape)} and {list(target.shape)}"
        )
    first, second = apart(prediction, count), apart(target.detach(), count)
    tau = temperature(first, second).T
    return reduce(attraction(_similarity(first, second), tau, beta=2 * beta, dim=first.shape[-1]).sum(0), reduction)


def adaptive_barlow_twins(
    correlations: Tensor, temperature: PairTemperature, *, weight: float = 0.0051, beta: float = 0.1
) -> Tensor:
    r"""Barlow Twins by C heads, with a temperature for each pair of dimensions.

    .. math::
        \sum_c \sum_l \Big( 1 - \frac{C_{ll}}{\tau_{ll}} \Big)^2 + \beta\,\Omega(\tau_{ll})
        + \sum_{m \ne l} \lambda \frac{C_{lm}^2}{\tau_{lm}} - \beta\,\Omega(\tau_{lm})

    The temperature of dimension l of one view and m of the other is read off what they correlate with: row l and column m
    of C, brought to unit length. (The paper reads it off the two columns of the batch, which ties the network to one batch
    size and to the order of its items.)

    Args:
        correlations: ``[C, d, d]``, one `counterpoint.contrast.redundancy.correlation` for each head.
        temperature: of pairs of vectors of length d.
        weight: lambda, of the redundancy term.
        beta: weight of the regulariser. There are d squared of them, so it wants to be tiny.

    Returns:
        Scalar, a sum over dimensions and heads.
    """
    d = correlations.shape[-1]
    rows, columns = unit(correlations).transpose(0, 1), unit(correlations.mT).transpose(0, 1)  # [d, C, d]
    tau = temperature.between(rows, columns)
    _check_paired(correlations, tau)
    own, owned = correlations.diagonal(dim1=-2, dim2=-1), tau.diagonal(dim1=-2, dim2=-1)
    others, between = off_diagonal(correlations), off_diagonal(tau)
    agree = (1 - own / owned).square() + beta * regulariser(owned, d)
    differ = weight * others.square() / between - beta * regulariser(between, d)
    return agree.sum() + differ.sum()


def _similarity(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(-1).T


def _candidates(pairs: Pairs, anchor: Tensor, other: Tensor) -> tuple[Tensor, Tensor | None]:
    """All rows ``[P, C, d]`` that may repel the anchors, with gradient, and bool ``[N, P]`` which do not (None: all do)."""
    parts, masks, own = [], [], torch.arange(len(anchor), device=anchor.device)
    items = None if pairs.items is None else gather_plain(pairs.items).rows
    for rows in ([other] if pairs.in_batch else []) + ([anchor] if pairs.within else []):
        everyone = gather(rows)
        column = torch.arange(len(everyone.rows), device=anchor.device)
        mask = column == (everyone.start + own)[:, None]
        if items is not None and pairs.items is not None:
            mask = mask | (pairs.items[:, None] == items)
        parts.append(everyone.rows)
        masks.append(mask)
    if pairs.negatives is not None:
        parts.append(apart(pairs.negatives, anchor.shape[1]))
        masks.append(torch.zeros(len(anchor), len(pairs.negatives), dtype=torch.bool, device=anchor.device))
    if not parts or sum(len(rows) for rows in parts) <= pairs.in_batch + pairs.within:
        raise InputError("nothing repels: use a batch of at least 2, or further negatives")
    return torch.cat(parts), torch.cat(masks, dim=1) if pairs.in_batch or pairs.within else None


def _hardest(similarity: Tensor, without: Tensor | None, most: int) -> Tensor:
    """Places of the `most` largest along the last axis (all, where there are fewer) that count."""
    seen = similarity.detach() if without is None else similarity.detach().masked_fill(without, -torch.inf)
    return seen.topk(min(most, seen.shape[-1]), dim=-1).indices


def _picked(at: Tensor, *values: Any) -> tuple[Any, ...]:
    return tuple(None if value is None else value.gather(-1, at) for value in values)


def _check_paired(similarity: Tensor, tau: Tensor) -> None:
    if similarity.shape != tau.shape:
        raise InputError(
            f"one temperature belongs to each pair: similarities are {list(similarity.shape)}, temperatures {list(tau.shape)}"
        )
