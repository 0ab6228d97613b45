"""How embeddings lie in space: close pairs, even spread, used dimensions."""

import math

import torch
from torch import Tensor

from counterpoint.contrast.distributed import gather
from counterpoint.contrast.kernels import log_sum_exp
from counterpoint.contrast.relation import Listed
from counterpoint.contrast.softmax import _check_matrix, _wide, reduce, unit
from counterpoint.errors import InputError


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0, normalize: bool = True) -> Tensor:
    r"""Mean distance of positive pairs, :math:`\mathbb{E} \lVert x_i - y_i \rVert^\alpha`; 0 is perfect.

    Source: Wang and Isola 2020 (arXiv 2005.10242), section 4.1.

    Args:
        x: ``[N, d]``.
        y: ``[N, d]``; row i belongs to row i.
        alpha: power of the distance.
        normalize: project rows to the unit sphere first.
    """
    _check_matrix(x, "x")
    _check_matrix(y, "y")
    if x.shape != y.shape:
        raise InputError(f"x and y must have one shape, not {list(x.shape)} and {list(y.shape)}")
    x, y = (unit(x), unit(y)) if normalize else (_wide(x), _wide(y))
    return reduce((x - y).norm(dim=1).pow(alpha), "mean")


def uniformity(x: Tensor, *, t: float = 2.0, normalize: bool = True) -> Tensor:
    r"""Log of the mean Gaussian potential over pairs of rows.

    .. math:: \log \mathbb{E}_{i \ne j}\, e^{-t \lVert x_i - x_j \rVert^2}

    0 when all rows coincide, about -2t for an even spread in many dimensions. Tiled: memory stays linear in N, and the
    value is differentiable.

    Source: Wang and Isola 2020 (arXiv 2005.10242), section 4.1.

    Args:
        x: ``[N, d]``, N at least 2.
        t: sharpness of the potential.
        normalize: project rows to the unit sphere first; False uses the rows as given (any norm).
    """
    _check_matrix(x, "x")
    if not t > 0:
        raise InputError(f"t must be positive, not {t}")
    x = unit(x) if normalize else _wide(x)
    everyone = gather(x)
    n = len(everyone.rows)
    if n < 2:
        raise InputError("uniformity needs at least two rows")
    own = Listed(torch.arange(everyone.start, everyone.start + len(x), device=x.device))
    square = everyone.rows.square().sum(1)
    mine = slice(everyone.start, everyone.start + len(x))
    if normalize and bool((square > 0.5).all()):  # a row of zeros (dead encoder) lies off the sphere
        rows = (
            log_sum_exp(x, everyone.rows if everyone.ranks > 1 else None, temperature=1 / (2 * t), without=own) - 2 * t
        )
    else:
        rows = log_sum_exp(x, everyone.rows, temperature=1 / (2 * t), without=own, log_weight=-t * square)
        rows = rows - t * square[mine]
    return gather(rows).rows.logsumexp(0) - math.log(n * (n - 1))


def effective_rank(x: Tensor) -> Tensor:
    r"""Number of directions that are really used: :math:`\exp(-\sum_k p_k \log p_k)`, p the normalised singular values.

    Between 1 and d; a collapsed encoder shows as 1. Without gradient.

    Source: Roy and Vetterli 2007; RankMe, Garrido et al. 2023 (arXiv 2210.02885), eq. 1.

    Args:
        x: ``[N, d]``.
    """
    _check_matrix(x, "x")
    with torch.no_grad():
        values = torch.linalg.svdvals(x.float())
        share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        return torch.special.entr(share).sum().exp()
