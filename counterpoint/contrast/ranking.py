"""Multiple negatives ranking and its relative whose targets come from the embeddings themselves."""

import torch
from torch import Tensor

from counterpoint.contrast.distributed import gather
from counterpoint.contrast.kernels import log_sum_exp
from counterpoint.contrast.operands import Temperature, check_pair, divide, reduce, unit, wide
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
