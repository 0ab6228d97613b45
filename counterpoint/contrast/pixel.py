r"""Contrast of places: locations of two feature maps are positives when they lie close to each other in the image.

A map ``[N, C, H, W]`` of a view has H x W bins; the view's box ``[N, 4]`` (left, top, right, bottom edge as shares of the
image, left and right exchanged in a mirrored view: `counterpoint.views.ImageViews.with_geometry`) says where they lie. Two
bins are near if their centres are less than `near` diagonals of the larger kind of bin apart.

Every loss compares the two maps of one item only: processes have nothing to exchange but the mean.

Source: Xie et al. 2021, "Propagate Yourself" (CVPR; arXiv 2011.10043), section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoint.contrast.operands import einsum, reduce, unit
from counterpoint.errors import InputError


def pixel_consistency(
    query: Tensor,
    key: Tensor,
    query_box: Tensor,
    key_box: Tensor,
    *,
    near: float = 0.7,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Minus twice the mean similarity of near locations, one direction (PixPro, eq. 3 as released).

    .. math:: \ell_b = -2\, \frac{\sum_{ij} A_{ij} \langle q_i, k_j \rangle}{\sum_{ij} A_{ij} + 10^{-6}}

    An item whose views have no near locations gives 0 and counts in the mean.

    Args:
        query: ``[N, C, H, W]``.
        key: ``[N, C, H', W']``, constant.
        query_box: ``[N, 4]``, where the view of the query lies.
        key_box: ``[N, 4]``, where that of the key lies.
        near: largest distance of a positive, in diagonals of a bin.
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean", "sum" or "none" (per item).

    Raises:
        InputError: maps or boxes that do not fit together.
    """
    similarity, positive = _compared(query, key, query_box, key_box, near, normalize)
    sums = (similarity * positive).sum((1, 2))
    return reduce(-2 * sums / (positive.sum((1, 2)) + 1e-6), reduction)


def pixel_contrast(
    query: Tensor,
    key: Tensor,
    query_box: Tensor,
    key_box: Tensor,
    *,
    near: float = 0.7,
    temperature: float = 0.3,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""Each location picks the near ones among all locations of the other view of its item (PixContrast, eq. 2).

    .. math:: \ell_i = -\log \frac{\sum_j A_{ij}\, e^{s_{ij}/\tau}}{\sum_j e^{s_{ij}/\tau}}

    averaged over the locations that have a near one; an item without any gives 0 and counts in the mean.

    Args:
        query, key, query_box, key_box, near, normalize, reduction: as in `pixel_consistency`.
        temperature: of the softmax.

    Raises:
        InputError: as `pixel_consistency`.
    """
    similarity, positive = _compared(query, key, query_box, key_box, near, normalize)
    logits = similarity / temperature
    # a finite stand-in: a location without positives would otherwise spoil the gradients of the others by NaN
    attraction = logits.masked_fill(~positive, -1e4).logsumexp(2)
    counted = positive.any(2)
    terms = (logits.logsumexp(2) - attraction) * counted
    return reduce(terms.sum(1) / counted.sum(1).clamp(min=1), reduction)


def bin_distances(query_box: Tensor, key_box: Tensor, query_size: Sequence[int], key_size: Sequence[int]) -> Tensor:
    """Distances of the centres of two maps' bins, in diagonals of the larger kind of bin: ``[N, H * W, H' * W']``.

    Args:
        query_box: ``[N, 4]``.
        key_box: ``[N, 4]``.
        query_size: height and width of the query's map.
        key_size: those of the key's.
    """
    query, diagonal = _bins(query_box, *query_size)
    key, other = _bins(key_box, *key_size)
    apart = (query[:, :, None] - key[:, None]).square().sum(3).sqrt()
    return apart / torch.maximum(diagonal, other)[:, None, None]


def _bins(box: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Centres ``[N, H * W, 2]`` and the diagonal ``[N]`` of one bin."""
    left, top, right, bottom = box.unbind(1)
    across, down = (right - left) / width, (bottom - top) / height  # across is negative in a mirrored view
    columns = torch.arange(width, device=box.device, dtype=box.dtype) + 0.5
    rows = torch.arange(height, device=box.device, dtype=box.dtype) + 0.5
    x = (columns * across[:, None] + left[:, None])[:, None].expand(-1, height, -1)
    y = (rows * down[:, None] + top[:, None])[:, :, None].expand(-1, -1, width)
    return torch.stack((x, y), dim=3).flatten(1, 2), (across.square() + down.square()).sqrt()


def _compared(
    query: Tensor, key: Tensor, query_box: Tensor, key_box: Tensor, near: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Similarities ``[N, H * W, H' * W']`` of all locations of the two maps of each item, and which are near."""
    if query.ndim != 4 or key.ndim != 4 or query.shape[:2] != key.shape[:2] or 0 in (*query.shape, *key.shape):
        raise InputError(
            f"query and key must be maps [N, C, H, W] of equal N and C, not {list(query.shape)} and {list(key.shape)}"
        )
    if query_box.shape != (len(query), 4) or key_box.shape != (len(query), 4):
        raise InputError(
            f"each of {len(query)} views needs a box of four numbers, got {list(query_box.shape)} and {list(key_box.shape)}"
        )
    q, k = (x.flatten(2).transpose(1, 2) for x in (query, key.detach()))
    if normalize:
        q, k = unit(q), unit(k)
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad():
        positive = bin_distances(query_box, key_box, query.shape[2:], key.shape[2:]) < near
    return einsum("nic,njc->nij", q.to(wide), k.to(wide)), positive
