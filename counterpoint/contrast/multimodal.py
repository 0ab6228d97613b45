"""Two modalities, each with a second view made by a momentum encoder: contrast between the modalities and within them."""

from typing import NamedTuple

import torch
from torch import Tensor

from counterpoint.contrast.operands import Temperature, unit
from counterpoint.contrast.pairs import Pairs
from counterpoint.contrast.softmax import info_nce


class Queues(NamedTuple):
    """Earlier vectors ``[K, d]`` of each kind, further negatives; None for none.

    Attributes:
        code: what the encoder made of code.
        query: what it made of queries.
        code_key: what the momentum encoder made of augmented code.
        query_key: what it made of augmented queries.
    """

    code: Tensor | None = None
    query: Tensor | None = None
    code_key: Tensor | None = None
    query_key: Tensor | None = None


def multimodal_pairs(
    code: Tensor,
    query: Tensor,
    code_key: Tensor,
    query_key: Tensor,
    queues: Queues | None = None,
    *,
    intra: bool = True,
    scale: float = 1.0,
) -> list[Pairs]:
    """The contrasts of `multimodal_contrast` one by one, their rows on the unit sphere.

    Args:
        code, query, code_key, query_key, queues, intra, scale: as there.
    """
    c, q = unit(code), unit(query)
    keys_c, keys_q = unit(code_key.detach()), unit(query_key.detach())
    old = queues or Queues()
    contrasts = [(c, q, old.query), (c, keys_q, old.query_key), (q, c, old.code), (q, keys_c, old.code_key)]
    if intra:
        contrasts += [(c, keys_c, old.code_key), (q, keys_q, old.query_key)]
    return [Pairs(x, scale * key, negatives=negatives, normalize=False) for x, key, negatives in contrasts]


def multimodal_contrast(
    code: Tensor,
    query: Tensor,
    code_key: Tensor,
    query_key: Tensor,
    queues: Queues | None = None,
    *,
    temperature: Temperature = 0.07,
    intra: bool = True,
    scale: float = 1.0,
) -> Tensor:
    r"""Code c picks its query q and a query its code, each also among the keys c', q' of augmented inputs (CoCoSoDa).

    .. math::
        \mathcal{L} = \frac1{6B} \sum_i \Big[ \ell(c_i, q, Q_q) + \ell(c_i, q', Q_{q'}) + \ell(q_i, c, Q_c)
        + \ell(q_i, c', Q_{c'}) + \ell(c_i, c', Q_{c'}) + \ell(q_i, q', Q_{q'}) \Big], \qquad
        \ell(x_i, P, Q) = -\frac{x_i \cdot P_i}{\tau}
        + \log \Big( \sum_j e^{x_i \cdot P_j / \tau} + \sum_m e^{x_i \cdot Q_m / \tau} \Big)

    The last two terms are those within a modality; without them the mean is over 4 B, so that they also make the others count
    for less.

    Args:
        code: ``[B, d]``.
        query: ``[B, d]``; row i belongs to row i.
        code_key: ``[B, d]``, constant.
        query_key: ``[B, d]``, constant.
        queues: unit vectors of earlier batches.
        temperature: scalar.
        intra: whether the terms within a modality count.
        scale: of the similarities within the batch, those to negatives included.

    Returns:
        Scalar.

    Source: Shi et al. 2023 (arXiv 2204.03293); DeepSoftwareAnalytics/CoCoSoDa at 2f2bf8e, `model.py`.
    """
    contrasts = multimodal_pairs(code, query, code_key, query_key, queues, intra=intra, scale=scale)
    losses = [pairs.loss(info_nce, temperature=temperature) for pairs in contrasts]
    return torch.stack(losses).mean()
