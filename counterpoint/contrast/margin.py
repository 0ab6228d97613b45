"""Margins on pair scores: positives and negatives are held apart from each other's extremes."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.contrast.candidates import Candidates, candidates
from counterpoint.contrast.distributed import Gathered, gather
from counterpoint.contrast.operands import Temperature, check_temperature, divide, einsum, own_rows, reduce, two_views
from counterpoint.contrast.relation import Relation
from counterpoint.errors import InputError

BLOCK = 2**22  # scores looked at together while the hardest negatives are searched


def contrastive_regularizer(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: Temperature = 1.0,
    batch_wide: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Margins between the score of a pair and its hardest negative, which keep learned views from collapsing.

    .. math::
        \ell_k = \big[p_k - \min(p_k, a_k)\big]_+ + \frac{1}{2N - 2} \sum_j \big[\max(p_k, a_k) - n_{kj}\big]_+,
        \qquad a_k = \max_j n_{kj}

    over the 2N rows k of both views, with p their partner's score and n the scores of all other rows. No
    :math:`n_{kj}` exceeds :math:`a_k`, so that the brackets never cut and the sum over j is one over vectors: O(N d) besides
    the search for the hardest negative, which needs no gradient and holds no N x N matrix.

    Source: Qin et al. 2023 (arXiv 2304.07763), eq. 15-17.

    Args:
        z1: ``[N, d]``, first view.
        z2: ``[N, d]``, second view; row i belongs to row i.
        temperature: that divides all scores.
        batch_wide: the paper's form: the two margins are the smallest and the largest of {smallest p, largest a} over
            the whole batch. False: each row has its own, as in the paper's released code.
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean" over the 2N rows, "sum" or "none" ``[2N]``.

    Raises:
        InputError: wrong shape or type, or a batch of one (it has no negative).
    """
    query, keys, pair = two_views(z1, z2, temperature, normalize)
    own, half = own_rows(query, keys), len(z1)
    partner = torch.cat([own[:half] + half, own[half:] - half])
    found = _hardest(query, keys, own, partner)
    positive = divide(pair, temperature)
    hardest = divide((query * keys.rows[found]).sum(1), temperature)
    others = (query * (keys.rows.sum(0) - query)).sum(1) - pair
    average = divide(others, temperature) / (len(keys.rows) - 2)
    lower, upper = positive, hardest
    if batch_wide:
        lower, upper = gather(positive).rows.min(), gather(hardest).rows.max()
    return reduce(positive - torch.minimum(lower, upper) + torch.maximum(lower, upper) - average, reduction)


@torch.no_grad()
def _hardest(query: Tensor, keys: Gathered, own: Tensor, partner: Tensor) -> Tensor:
    """For each row the key, neither itself nor its partner, with the highest score: int64 ``[2N]``."""
    apart = torch.stack([own, partner], 1)
    step = max(1, BLOCK // len(keys.rows))
    with torch.autocast(query.device.type, enabled=False):
        parts = [
            (query[rows : rows + step] @ keys.rows.T).scatter_(1, apart[rows : rows + step], -torch.inf).argmax(1)
            for rows in range(0, len(query), step)
        ]
    return torch.cat(parts)


def triplet(
    query: Tensor,
    key: Tensor,
    *,
    margin: float = 0.2,
    temperature: Temperature = 0.0,
    mining: Literal["hardest", "semi-hard", "all"] = "hardest",
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    ignore: Relation | Tensor | None = None,
    in_batch: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Each query's key is to be more similar than its negatives are, by a margin; then it asks for nothing more.

    .. math:: \ell_i = \big[m - s_{ip} + s_{in}\big]_+ \qquad\text{with}\qquad
        [x]_+ = \max(0, x) \;\text{or}\; \tau \log(1 + e^{x/\tau})

    The negative n is the hardest one of the candidates; the hardest of those that are less similar than the positive
    ("semi-hard"; where there is none, the least similar of all); or the loss is the mean over "all". For the first two the
    candidates are searched in blocks, without gradient.

    Args:
        query: ``[N, d]``.
        key: ``[M, d]``.
        margin: m, of similarities: a margin of squared distances on the unit sphere is twice as much.
        temperature: width of the corner; 0 is the hinge.
        mining: which negatives count.
        positives: int64 ``[N]``, the key row of each query; None pairs row i with key i.
        negatives: shared extra keys ``[K, d]``.
        hard_negatives: extra keys of each query alone ``[N, S, d]``.
        ignore: pairs of the batch that do not count: a relation or bool ``[N, M]``; positives always count.
        in_batch: do the other keys of the batch count as negatives?
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean" over the queries that have a negative, "sum" or "none" ``[N]`` (0 where there is none).

    Raises:
        InputError: wrong shape or type, an unknown mining, or a negative margin or temperature.

    Source: Schroff et al. 2015 (arXiv 1503.03832), equation 1 and section 3.2; the soft corner: Hermans et al. 2017 (arXiv
    1703.07737), section 2. Their distances are squared Euclidean, with a margin of 0.2 (here: 0.1).
    """
    if mining not in ("hardest", "semi-hard", "all"):
        raise InputError(f'mining must be "hardest", "semi-hard" or "all", not "{mining}"')
    _check_corner(margin, temperature)
    found = candidates(
        query,
        key,
        positives=positives,
        negatives=negatives,
        hard_negatives=hard_negatives,
        ignore=ignore,
        in_batch=in_batch,
        normalize=normalize,
    )
    attraction = found.attraction
    if mining == "all":
        counts = found.counted()
        short = corner(margin - attraction[:, None] + found.scores(), temperature).masked_fill(~counts, 0.0)
        many = counts.sum(1)
        return reduce(short.sum(1) / many.clamp(min=1), reduction, many > 0)
    chosen, there = _mined(found, mining == "semi-hard")
    rows = corner(margin - attraction + _scores_at(found, chosen), temperature).masked_fill(~there, 0.0)
    return reduce(rows, reduction, there)


def pair_margin(
    query: Tensor,
    key: Tensor,
    *,
    margin: float = 1.0,
    temperature: Temperature = 0.0,
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    ignore: Relation | Tensor | None = None,
    in_batch: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Pairs are to be close, and all others at least a margin apart: the first contrastive loss.

    .. math:: \ell_i = \tfrac12 d_{ip}^2 + \frac{1}{2 K} \sum_{k=1}^{K} \big[m - d_{ik}\big]_+^2,
        \qquad d_{ij} = \lVert q_i - k_j \rVert

    Unlike the triplet's, the margin is absolute: positives are pulled together for ever. Holds all N x M distances.

    Args:
        query: ``[N, d]``.
        key: ``[M, d]``.
        margin: m, of distances; on the unit sphere orthogonal vectors are 1.41 apart.
        temperature: width of the corner, as in `triplet`; 0 is the hinge.
        positives, negatives, hard_negatives, ignore, in_batch: as in `triplet`.
        normalize: on the unit sphere (True) or as given.
        reduction: "mean", "sum" or "none" ``[N]``.

    Raises:
        InputError: as `triplet`.

    Source: Hadsell, Chopra and LeCun 2006 (CVPR), equation 4; there pairs come one by one, here all pairs of a batch count.
    """
    _check_corner(margin, temperature)
    found = candidates(
        query,
        key,
        positives=positives,
        negatives=negatives,
        hard_negatives=hard_negatives,
        ignore=ignore,
        in_batch=in_batch,
        normalize=normalize,
    )
    counts = found.counted()
    length = found.pool.square().sum(1).expand(len(counts), -1)
    if found.hard is not None:
        length = torch.cat([length, found.hard.square().sum(2)], 1)
    square = found.query.square().sum(1, keepdim=True) + length - 2 * found.scores()
    # a distance of 0 has no gradient: its direction is unknown
    distance = square.clamp(min=1e-12).sqrt()
    apart = corner(margin - distance, temperature).square().masked_fill(~counts, 0.0)
    together = (found.query - found.positive).square().sum(1)
    return reduce((together + apart.sum(1) / counts.sum(1).clamp(min=1)) / 2, reduction)


def corner(x: Tensor, temperature: Temperature) -> Tensor:
    r"""What is above 0, with a corner of some width: :math:`\tau \log(1 + e^{x/\tau})`; of width 0 the hinge max(0, x)."""
    if not isinstance(temperature, Tensor) and temperature == 0:
        return x.relu()
    return temperature * functional.softplus(x / temperature)


def _check_corner(margin: float, temperature: Temperature) -> None:
    if not margin >= 0:
        raise InputError(f"margin cannot be negative, got {margin}")
    if isinstance(temperature, Tensor) or temperature != 0:
        check_temperature(temperature, 1)


@torch.no_grad()
def _mined(found: Candidates, semi: bool) -> tuple[Tensor, Tensor]:
    """Of each query the place of its negative among all candidates, int64 ``[N]``, and whether it has any, bool ``[N]``."""
    width = len(found.pool) + (0 if found.hard is None else found.hard.shape[1])
    step = max(1, BLOCK // width)
    attraction, chosen, there = found.attraction, [], []
    for start in range(0, len(found.query), step):
        rows = slice(start, start + step)
        scores, counts = found.scores(rows), found.counted(rows)
        place = scores.masked_fill(~counts, -torch.inf).argmax(1)
        if semi:
            below = counts & (scores < attraction[rows, None])
            hardest = scores.masked_fill(~below, -torch.inf).argmax(1)
            easiest = scores.masked_fill(~counts, torch.inf).argmin(1)
            place = torch.where(below.any(1), hardest, easiest)
        chosen.append(place)
        there.append(counts.any(1))
    return torch.cat(chosen), torch.cat(there)


def _scores_at(found: Candidates, place: Tensor) -> Tensor:
    """Score of each query and the candidate at `place` ``[N]``."""
    shared = len(found.pool)
    if not shared:
        assert found.hard is not None
        return einsum("nd,nd->n", found.query, found.hard[torch.arange(len(place), device=place.device), place])
    rows = found.pool[place.clamp(max=shared - 1)]
    if found.hard is not None:
        own = (place - shared).clamp(min=0)
        hard = found.hard[torch.arange(len(place), device=place.device), own]
        rows = torch.where((place < shared)[:, None], rows, hard)
    return (found.query * rows).sum(1)
