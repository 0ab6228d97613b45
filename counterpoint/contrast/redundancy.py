"""Redundancy reduction: the dimensions of two views should agree one by one and say different things."""

import torch
from torch import Tensor

from counterpoint.contrast.distributed import sum_over_ranks
from counterpoint.contrast.operands import check_matrix, wide
from counterpoint.errors import InputError

EPSILON = 1e-5  # beside the variance, as in batch normalisation: a dead dimension correlates with nothing


def correlation(z1: Tensor, z2: Tensor) -> Tensor:
    r"""Cross-correlation ``[d, d]`` of the dimensions of two views over the batch.

    .. math:: C_{lm} = \frac{1}{N} \sum_i \hat z_{il}\, \hat z'_{im}

    with every dimension brought to mean 0 and variance 1 over the batch (of all processes), in float32.

    Args:
        z1: ``[N, d]`` embeddings of the first view.
        z2: ``[N, d]`` embeddings of the second view; row i belongs to row i.

    Raises:
        InputError: wrong shape or type, or a batch of one.
    """
    check_matrix(z1, "z1")
    check_matrix(z2, "z2")
    if z1.shape != z2.shape:
        raise InputError(f"z1 and z2, the two views, must have one shape, not {list(z1.shape)} and {list(z2.shape)}")
    z1, z2 = wide(z1), wide(z2)
    count = sum_over_ranks(z1.new_tensor(float(len(z1))))
    if len(z1) == 1 and float(count) == 1:
        raise InputError("a batch of one item has no variance: use a batch of at least 2")
    with torch.autocast(z1.device.type, enabled=False):
        return sum_over_ranks(_standard(z1, count).T @ _standard(z2, count)) / count


def barlow_twins(z1: Tensor, z2: Tensor, *, weight: float = 0.0051) -> Tensor:
    r"""Each dimension agrees with itself in the other view, and with no other (Zbontar et al. 2021).

    .. math:: \ell = \sum_l (1 - C_{ll})^2 + \lambda \sum_l \sum_{m \ne l} C_{lm}^2

    with C the cross-correlation over the batch, under a process group over that of all processes.

    Source: Zbontar et al. 2021 (arXiv 2103.03230), equations 1 and 2; their batch normalisation has the same 1e-5.

    Args:
        z1: ``[N, d]`` embeddings of the first view, N at least 2.
        z2: ``[N, d]`` embeddings of the second view; row i belongs to row i.
        weight: lambda, of the redundancy term.

    Returns:
        Scalar, a sum over dimensions.

    Raises:
        InputError: wrong shape or type, a batch of one, or a negative weight.
    """
    if not weight >= 0:
        raise InputError(f"weight must not be negative, got {weight}")
    matrix = correlation(z1, z2)
    return (1 - matrix.diagonal()).square().sum() + weight * off_diagonal(matrix).square().sum()


def off_diagonal(matrix: Tensor) -> Tensor:
    """All entries of ``[..., d, d]`` but the diagonal's, ``[..., d (d - 1)]``."""
    d = matrix.shape[-1]
    return matrix.flatten(-2)[..., : d * d - 1].unflatten(-1, (d - 1, d + 1))[..., 1:].flatten(-2) if d > 1 else (
        matrix.new_zeros(*matrix.shape[:-2], 0)
    )  # fmt: skip


def _standard(z: Tensor, count: Tensor) -> Tensor:
    centred = z - sum_over_ranks(z.sum(0)) / count
    return centred * (sum_over_ranks(centred.square().sum(0)) / count + EPSILON).rsqrt()
