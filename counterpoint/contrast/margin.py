"""Margins on pair scores: positives and negatives are held apart from each other's extremes."""

import torch
from torch import Tensor

from counterpoint.contrast.distributed import Gathered, gather
from counterpoint.contrast.operands import Temperature, divide, own_rows, reduce, two_views

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
