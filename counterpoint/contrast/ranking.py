"""Multiple negatives ranking, N-pair, and a relative whose targets come from the embeddings themselves."""

import torch
from torch import Tensor

from counterpoint.contrast.distributed import gather
from counterpoint.contrast.kernels import log_sum_exp
from counterpoint.contrast.operands import Temperature, check_pair, divide, reduce, unit, wide
from counterpoint.contrast.relation import Relation
from counterpoint.contrast.softmax import info_nce
from counterpoint.errors import InputError


def mnr(a: Tensor, b: Tensor, *, scale: float = 20.0, normalize: bool = True, reduction: str = "mean") -> Tensor:
    r"""Multiple negatives ranking: each a picks its b among those of the batch, in one direction.

    .. math:: \ell_i = -s \cos(a_i, b_i) + \log \sum_j e^{s \cos(a_i, b_j)}

    Args:
        a: ``[N, d]``.
        b: ``[N, d]``; row i belongs to row i.
        scale: s, the inverse of a temperature.
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean", "sum" or "none".

    Raises:
        InputError: wrong shape or type, or a scale that is not positive.

    Source: Henderson et al. 2017 (arXiv 1705.00652), section 4; the scale is that of sentence-transformers.
    """
    if not scale > 0:
        raise InputError(f"scale must be positive, not {scale}")
    return info_nce(a, b, temperature=1 / scale, normalize=normalize, reduction=reduction)


def n_pair(
    query: Tensor,
    key: Tensor,
    *,
    temperature: Temperature = 1.0,
    l2: float = 0.002,
    positives: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    ignore: Relation | Tensor | None = None,
    in_batch: bool = True,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    r"""InfoNCE of plain dot products in one direction, and a term that keeps the vectors from growing.

    .. math::
        \ell_i = \log \Big(1 + \sum_{j \ne i} e^{(f_i^\top f_j^+ - f_i^\top f_i^+)/\tau}\Big)
        + \frac{\lambda}{4} \big(\lVert f_i \rVert^2 + \lVert f_i^+ \rVert^2\big)

    With one negative it is a soft triplet loss: the hinge has become a softplus and the margin is gone. Lengths say how sure a
    query is; without the second term they grow for ever.

    Args:
        query: ``[N, d]``.
        key: ``[M, d]``.
        temperature: of the dot products; the paper has none (1).
        l2: lambda.
        positives: int64 ``[N]``, the key row of each query; None pairs row i with key i.
        negatives, hard_negatives, ignore, in_batch: as in `counterpoint.contrast.info_nce`.
        normalize: False takes vectors as they are; on the unit sphere the second term is a constant.
        reduction: "mean", "sum" or "none" ``[N]``.

    Raises:
        InputError: wrong shape or type, or a negative l2.

    Source: Sohn 2016 (NeurIPS), equation 6 and section 3.2.2; 0.002 and the factor 1/4 are those of TensorFlow's
    ``npairs_loss``.
    """
    if not l2 >= 0:
        raise InputError(f"l2 cannot be negative, got {l2}")
    loss = info_nce(
        query,
        key,
        temperature=temperature,
        positives=positives,
        negatives=negatives,
        hard_negatives=hard_negatives,
        ignore=ignore,
        in_batch=in_batch,
        normalize=normalize,
        reduction=reduction,
    )
    ready = unit if normalize else wide
    own = ready(key) if positives is None else ready(key)[positives]
    lengths = ready(query).square().sum(1) + own.square().sum(1)
    return loss + reduce(l2 / 4 * lengths, reduction)


def relabelled_clip(
    a: Tensor, b: Tensor, *, temperature: Temperature = 0.7, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    r"""Both sides pick each other as in CLIP, but whom they should pick is read off how alike the pairs are.

    .. math::
        P = \mathrm{softmax}_{rows}\big( \tfrac{\tau}{2} (A A^\top + B B^\top) \big), \quad
        y_i = \arg\max_j P_{ij}, \quad y'_j = \arg\max_i P_{ij}, \quad
        \ell_i = \tfrac12 \big( \mathrm{CE}(S_{i \cdot}, y_i) + \mathrm{CE}(S_{\cdot i}, y'_i) \big), \quad S = A B^\top / \tau

    Targets are constants, the first of equal ones counts, and y' is the largest of a column of the softmax over rows. Of long
    vectors, and of any on the unit sphere, each pair is most like itself: then this is CLIP's loss. Of short ones a target may
    be another pair. The temperature multiplies where the targets are made and divides in S, as released. Targets are
    found among the pairs of all processes; for them N x N numbers are held without gradient.

    Args:
        a: ``[N, d]``.
        b: ``[N, d]``; row i belongs to row i.
        temperature: scalar or 0-d tensor, learnable.
        normalize: cosine similarity (True) or plain dot product, which is what was released.
        reduction: "mean", "sum" or "none" ``[N]``.

    Raises:
        InputError: wrong shape or type.

    Source: Hallee et al. 2024 (arXiv 2401.15713), released ``clip_loss`` (9738dfe) and, with a temperature of 1,
    ``mnr_plus_loss`` (2a67569).
    """
    check_pair(a, b, temperature)
    if len(a) != len(b):
        raise InputError(f"row i is paired with row i, but there are {len(a)} and {len(b)} rows")
    a, b = (unit(a), unit(b)) if normalize else (wide(a), wide(b))
    every_a, every_b = gather(a), gather(b)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        alike = (every_a.rows @ every_a.rows.T + every_b.rows @ every_b.rows.T) / 2
        share = (alike * temperature).softmax(1)
        own = slice(every_a.start, every_a.start + len(a))
        there, back = (
            share.max(1).indices[own],
            share.max(0).indices[own],
        )  # max names the first of equals, argmax may not
    one = log_sum_exp(a, every_b.rows, temperature=temperature) - divide((a * every_b.rows[there]).sum(1), temperature)
    other = log_sum_exp(b, every_a.rows, temperature=temperature) - divide((b * every_a.rows[back]).sum(1), temperature)
    return reduce((one + other) / 2, reduction)
