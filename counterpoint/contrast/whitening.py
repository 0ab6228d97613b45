"""Whitening: features of a batch get unit covariance, group by group, and never by a statistic of other batches."""

from typing import Literal

import torch
from torch import Tensor

from counterpoint.contrast.operands import check_matrix, wide
from counterpoint.errors import InputError

Kind = Literal["zca", "cholesky"]
Solver = Literal["auto", "eigh", "newton"]

ROUNDS = 24
"""Steps of the iteration for a root: enough for eigenvalues that differ by a factor of 10^6."""


def shuffled_group_whitening(
    x: Tensor,
    permutations: Tensor | None = None,
    *,
    groups: int,
    eps: float = 0.0,
    kind: Kind = "zca",
    detach: bool = True,
    solver: Solver = "auto",
) -> Tensor:
    r"""Random groups of channels become uncorrelated, chunk by chunk, each chunk under a shuffle of its own.

    .. math::
        Y_g = \bar X_g W_g, \qquad W_g = \Big( \tfrac1n \bar X_g^\top \bar X_g + \epsilon I \Big)^{-1/2}

    X is one chunk ``[n, D]`` with its channels permuted, :math:`\bar X_g` the centred columns of group g; afterwards all
    channels return to their places. A chunk is a view, so that views of one sentence differ in who was grouped with whom.

    :math:`W_g` is a constant in the backward pass, as released: only the centring and the product carry gradient. All chunks
    and groups are computed at once, in float32 also under autocast. The statistics are those of one process.

    Args:
        x: ``[V n, D]``, chunk after chunk, not normalised.
        permutations: int64 ``[V, D]``, one a chunk; group g of chunk v holds the channels
            ``permutations[v, g d : (g + 1) d]``. None: one chunk, channels as they are.
        groups: G, which divides D.
        eps: beside the variances; 0 is the released code, which a dead channel ends in infinity.
        kind: "zca", the symmetric root, which stays as near to the channels as whitening can; or "cholesky", which makes
            later channels of a group from what earlier ones leave over.
        detach: False lets gradient pass through W as well.
        solver: of the symmetric root: "eigh" is exact and lets a GPU wait for the CPU; "newton" needs products only (24
            rounds of Newton-Schulz); "auto" takes eigh on the CPU and newton elsewhere.

    Returns:
        ``[V n, D]``.

    Raises:
        InputError: sizes that do not divide, or no more rows in a chunk than channels in a group: such a covariance is
            singular, and whitening by it would make all rows equally far apart.

    Source: Zhuo et al. 2023 (arXiv 2305.17746); SupstarZh/WhitenedCSE at 65fe70a.
    """
    check_matrix(x, "x")
    rows, dim = x.shape
    if permutations is None:
        permutations = torch.arange(dim, device=x.device)[None]
    if permutations.ndim != 2 or permutations.shape[1] != dim or permutations.is_floating_point():
        raise InputError(f"permutations must be int64 [chunks, {dim}], not {list(permutations.shape)}")
    chunks = len(permutations)
    if groups < 1 or dim % groups:
        raise InputError(f"{dim} channels cannot be put into {groups} groups evenly: choose a divisor of {dim}")
    if rows % chunks:
        raise InputError(f"{rows} rows cannot be cut into {chunks} chunks evenly")
    count, width = rows // chunks, dim // groups
    if count <= width:
        raise InputError(
            f"whitening {width} channels needs more than {width} rows, not {count}: take larger batches or more groups"
        )
    at = permutations.to(x.device)[:, None].expand(chunks, count, dim)
    shuffled = wide(x).view(chunks, count, dim).gather(2, at)
    grouped = shuffled.view(chunks, count, groups, width).transpose(1, 2)
    centred = grouped - grouped.mean(2, keepdim=True)
    with torch.autocast(x.device.type, enabled=False):
        white = centred @ whitening_matrix(
            covariance(centred.detach() if detach else centred), eps=eps, kind=kind, solver=solver
        )
    placed = white.transpose(1, 2).reshape(chunks, count, dim)
    return torch.zeros_like(placed).scatter(2, at, placed).view(rows, dim)


def covariance(centred: Tensor) -> Tensor:
    """``[..., n, d]`` of mean 0 over n -> ``[..., d, d]``, divided by n."""
    return centred.mT @ centred / centred.shape[-2]


def whitening_matrix(matrix: Tensor, *, eps: float = 0.0, kind: Kind = "zca", solver: Solver = "auto") -> Tensor:
    r"""W ``[..., d, d]`` with :math:`W^\top (C + \epsilon I) W = I`.

    Args:
        matrix: C ``[..., d, d]``, symmetric and positive definite, in float32 or more.
        eps: added to the diagonal.
        kind: "zca" (:math:`C^{-1/2}`) or "cholesky" (:math:`L^{-\top}` of :math:`C = L L^\top`).
        solver: see `shuffled_group_whitening`.
    """
    if kind not in ("zca", "cholesky") or solver not in ("auto", "eigh", "newton"):
        raise InputError(f'whitening is "zca" or "cholesky", by "eigh", "newton" or "auto", not "{kind}" by "{solver}"')
    if not eps >= 0:
        raise InputError(f"eps must not be negative, got {eps}")
    identity = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    if eps:
        matrix = matrix + eps * identity
    if kind == "cholesky":
        lower, _ = torch.linalg.cholesky_ex(matrix)  # without a look at whether it worked, for which a GPU would wait
        return torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False).mT
    if solver == "eigh" or (solver == "auto" and matrix.device.type == "cpu"):
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.rsqrt()[..., None, :]) @ vectors.mT
    return _newton(matrix, identity)


def _newton(matrix: Tensor, identity: Tensor) -> Tensor:
    """The inverse root by products alone: the coupled iteration of Newton and Schulz, from eigenvalues of at most 1."""
    scale = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    root, inverse = matrix / scale, identity.expand_as(matrix)
    for _ in range(ROUNDS):
        step = (3 * identity - inverse @ root) / 2
        root, inverse = root @ step, step @ inverse
    return inverse * scale.rsqrt()
