r"""Objectives of scores that anything may have made: a bilinear form, a network that reads both texts, an energy.

One interface: scores ``[N, M]`` of N anchors and M candidates, which are positive, which do not count, and how much each pair
weighs. Scores are divided by no temperature here. What comes from embeddings alone has functions that hold no matrix; see
`counterpoint.contrast.info_nce`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.contrast.margin import corner
from counterpoint.contrast.operands import check_matrix, reduce, wide
from counterpoint.errors import InputError, nearest


def scored_binary(
    scores: Tensor,
    positives: Tensor,
    *,
    ignore: Tensor | None = None,
    weight: Tensor | None = None,
    log_noise: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Every pair is a question of its own, yes or no: binary NCE with any number of positives.

    .. math::
        \ell_i = -\sum_{p \in P_i} w_{ip} \log \sigma(l_{ip}) - \sum_{k \in N_i} w_{ik} \log \sigma(-l_{ik}), \qquad
        l_{ij} = s_{ij} - \log K_i\, q_j

    K_i is the number of negatives of anchor i (at least 1). The sigmoid of a score then is a probability for each candidate
    alone: they need not sum to 1, so that none, one or several may be right. With one candidate and a scorer of single texts it
    is the objective of residual energy-based models (minus the energy as score, real texts as positives).

    Args:
        scores: ``[N, M]``.
        positives: bool ``[N, M]``.
        ignore: bool ``[N, M]``, pairs that do not count, positives among them.
        weight: ``[N, M]`` or ``[M]``, factors of the terms; a constant.
        log_noise: log q of each candidate ``[M]``, or one number; None leaves the correction out (negative sampling).
        reduction: "mean" over anchors that have any pair that counts, "sum" or "none" ``[N]``.

    Raises:
        InputError: shapes that do not fit.

    Source: Rethmeier and Augenstein 2023 (arXiv 2102.12982), on input-label contrast; noise: Gutmann and Hyvarinen 2010.
    """
    scores, positives, counts, weight = _checked(scores, positives, ignore, weight)
    if log_noise is not None:
        many = (counts & ~positives).sum(1, keepdim=True).clamp(min=1)
        scores = scores - torch.as_tensor(log_noise, dtype=scores.dtype, device=scores.device).detach() - many.log()
    terms = functional.softplus(torch.where(positives, -scores, scores)) * weight
    return reduce(terms.masked_fill(~counts, 0.0).sum(1), reduction, counts.any(1))


def scored_ranking(
    scores: Tensor,
    positives: Tensor,
    *,
    ignore: Tensor | None = None,
    weight: Tensor | None = None,
    log_noise: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Each positive is to be picked among the negatives: a softmax over one positive and all negatives.

    .. math::
        \ell_i = -\frac{1}{\sum_p w_{ip}} \sum_{p \in P_i} w_{ip}
            \log \frac{e^{l_{ip}}}{e^{l_{ip}} + \sum_{k \in N_i} w_{ik} e^{l_{ik}}}, \qquad l_{ij} = s_{ij} - \log q_j

    Positives of one anchor do not compete with each other. With one positive each it is a softmax cross entropy.

    Args:
        scores, positives, ignore, log_noise: as in `scored_binary`.
        weight: ``[N, M]`` or ``[M]``, above 0: of the mean over positives, and of the negatives in the sum.
        reduction: "mean" over anchors with a positive and a negative, "sum" or "none" ``[N]`` (0 for others).

    Raises:
        InputError: shapes that do not fit.

    Source: as `counterpoint.contrast.noise.ranking_nce`.
    """
    scores, positives, counts, weight = _checked(scores, positives, ignore, weight)
    if log_noise is not None:
        scores = scores - torch.as_tensor(log_noise, dtype=scores.dtype, device=scores.device).detach()
    yes, no = counts & positives, counts & ~positives
    full = yes.any(1) & no.any(1)
    # a row without negatives has no sum to differentiate: it gets one that nothing depends on
    against = torch.where(no, scores + weight.log(), -torch.inf).masked_fill(~full[:, None], 0.0).logsumexp(1, True)
    terms = (functional.softplus(against - scores) * weight).masked_fill(~yes, 0.0).sum(1)
    shares = weight.masked_fill(~yes, 0.0).sum(1)
    return reduce((terms / shares.masked_fill(~full, 1.0)).masked_fill(~full, 0.0), reduction, full)


def scored_triplet(
    scores: Tensor,
    positives: Tensor,
    *,
    ignore: Tensor | None = None,
    weight: Tensor | None = None,
    margin: float = 1.0,
    temperature: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""The least of the positives is to lie above the hardest negative, by a margin.

    .. math:: \ell_i = w_i \big[m - \min_{p \in P_i} s_{ip} + \max_{k \in N_i} s_{ik}\big]_+

    Args:
        scores, positives, ignore: as in `scored_binary`.
        weight: ``[N, M]`` or ``[M]``; that of the hardest negative counts.
        margin: m, in the unit of the scores.
        temperature: width of the corner; see `counterpoint.contrast.margin.triplet`.
        reduction: "mean" over anchors with a positive and a negative, "sum" or "none" ``[N]`` (0 for others).

    Raises:
        InputError: shapes that do not fit, or a negative margin or temperature.

    Source: Weston et al. 2011 (WSABIE, IJCAI), without its ranks; hinge as in Schroff et al. 2015 (arXiv 1503.03832).
    """
    if margin < 0 or temperature < 0:
        raise InputError(f"margin and temperature cannot be negative, got {margin} and {temperature}")
    scores, positives, counts, weight = _checked(scores, positives, ignore, weight)
    yes, no = counts & positives, counts & ~positives
    full = yes.any(1) & no.any(1)
    lowest = scores.masked_fill(~yes, torch.inf).argmin(1, keepdim=True)
    hardest = scores.masked_fill(~no, -torch.inf).argmax(1, keepdim=True)
    short = margin - scores.gather(1, lowest) + scores.gather(1, hardest)
    rows = (corner(short, temperature) * weight.gather(1, hardest))[:, 0]
    return reduce(rows.masked_fill(~full, 0.0), reduction, full)


SCORED_OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "binary": scored_binary,
    "ranking": scored_ranking,
    "triplet": scored_triplet,
}
"""Objectives of scores, ``f(scores, positives, ignore=, weight=, reduction=)``."""


def scored_objective(name: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The objective of scores called `name`, or `name` itself when it is already a function.

    Raises:
        InputError: none has that name.
    """
    if callable(name):
        return name
    if name not in SCORED_OBJECTIVES:
        hint = nearest(name, SCORED_OBJECTIVES) or f"; there are {', '.join(SCORED_OBJECTIVES)}"
        raise InputError(f'no objective of scores named "{name}"{hint}')
    return SCORED_OBJECTIVES[name]


def _checked(
    scores: Tensor, positives: Tensor, ignore: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores in at least float32, which are positive, which count, and the weight of each."""
    check_matrix(scores, "scores")
    for name, x in (("positives", positives), ("ignore", ignore)):
        if x is not None and (x.shape != scores.shape or x.dtype != torch.bool):
            raise InputError(f"{name} must be bool {list(scores.shape)}, as scores are, not {x.dtype} {list(x.shape)}")
    if weight is not None and weight.shape not in (scores.shape, scores.shape[1:]):
        raise InputError(f"weight must be {list(scores.shape)} or [{scores.shape[1]}], not {list(weight.shape)}")
    scores = wide(scores)
    counts = torch.ones_like(positives) if ignore is None else ~ignore
    weight = scores.new_ones(()) if weight is None else weight.detach().to(scores)
    return scores, positives, counts, weight.expand_as(scores)
