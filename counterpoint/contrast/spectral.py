r"""The spectral contrastive loss, and what theory says of it: in linear nets every layer halves the exponent of a feature.

A projection head is thrown away after training although the loss never looks at what lies before it. In a linear net of L
layers gradient descent keeps neighbouring layers balanced, so that a feature which the loss wants with strength w in the
output has :math:`w^{l/L}` after layer l: the earlier, the more evenly features are kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoint.contrast.distributed import gather
from counterpoint.contrast.operands import check_matrix, einsum, reduce, wide
from counterpoint.errors import InputError


def spectral_contrastive(z1: Tensor, z2: Tensor, *, mu: float = 1.0, reduction: str = "mean") -> Tensor:
    r"""Attraction of pairs, squared repulsion of all others (HaoChen et al. 2021, arXiv 2106.04156).

    .. math::
        \ell_i = \frac{1}{\mu} \Big( -2\, z_i \cdot z'_i + \frac{1}{N - 1} \sum_{j \ne i} (z_i \cdot z'_j)^2 \Big)

    Not cosine similarity: rows longer than :math:`\sqrt\mu` are shortened to it, and shorter ones stay as they are. The sum
    over j is a quadratic form in the second moments of the other view, O(N d^2): no N x N matrix where N exceeds d.

    Args:
        z1: ``[N, d]``, first view.
        z2: ``[N, d]``, second view; row i belongs to row i.
        mu: squared radius of the ball that holds all rows.
        reduction: "mean", "sum" or "none" ``[N]``.

    Source: jhaochenz96/spectral_contrastive_learning at ee431bd, ``models/spectral.py``.

    Raises:
        InputError: wrong shape or type, a batch of one, or a radius that is not positive.
    """
    check_matrix(z1, "z1")
    check_matrix(z2, "z2")
    if z1.shape != z2.shape:
        raise InputError(f"z1 and z2, the two views, must have one shape, not {list(z1.shape)} and {list(z2.shape)}")
    if not mu > 0:
        raise InputError(f"mu is a squared radius and must be positive, not {mu}")
    z1, z2 = _in_ball(wide(z1), mu**0.5), _in_ball(wide(z2), mu**0.5)
    keys = gather(z2).rows
    if len(keys) < 2:
        raise InputError("a batch of one item has no negatives: use a batch of at least 2")
    own = (z1 * z2).sum(1)
    if len(keys) > keys.shape[1]:
        squares = (einsum("nd,de->ne", z1, einsum("md,me->de", keys, keys)) * z1).sum(1)
    else:
        squares = einsum("nd,md->nm", z1, keys).square().sum(1)
    repel = (squares - own.square()) / (len(keys) - 1)
    return reduce((repel - 2 * own) / mu, reduction)


def linear_spectral_loss(weights: Sequence[Tensor], deviation: Tensor, correlation: Tensor) -> Tensor:
    r"""The expected spectral loss of a linear net on independent features, exactly: nothing is sampled.

    .. math:: -2 \operatorname{tr}(W C W^\top) + \lVert W \Sigma W^\top \rVert_F^2, \qquad W = W_L \cdots W_1

    with :math:`\Sigma = \operatorname{diag}(\varphi^2)` and :math:`C = \operatorname{diag}(\rho \varphi^2)`.

    Args:
        weights: :math:`W_1 \ldots W_L`, each ``[out, in]``.
        deviation: :math:`\varphi` of each feature in a view ``[d]``.
        correlation: :math:`\rho` of each feature between two views ``[d]``: 1 where the augmentation leaves it alone, 0 where
            it destroys it.
    """
    product = weights[0]
    for weight in weights[1:]:
        product = weight @ product
    moved = product * deviation.square()
    return (moved @ product.T).square().sum() - 2 * (moved * correlation * product).sum()


def linear_strengths(deviation: Tensor, correlation: Tensor, layers: int = 2) -> list[Tensor]:
    r"""What that loss is minimised by: the weight of each feature after layer 1, ..., L, each ``[d]``.

    After the last layer :math:`w = \sqrt{\rho} / \varphi`, so that all features which augmentation leaves alone come out
    equally strong; after layer l, from a small start, :math:`w^{l/L}`. With two layers (encoder and head) what lies before the
    head has the square roots: a feature that augmentation disrupts is still there.

    Args:
        deviation, correlation: as in `linear_spectral_loss`.
        layers: L.

    Source: derived from Xue et al. 2024 (arXiv 2403.11391), section 4; checked by gradient descent in our tests.
    """
    last = correlation.sqrt() / deviation
    return [last ** (layer / layers) for layer in range(1, layers + 1)]


def _in_ball(x: Tensor, radius: float) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x * (radius / length.clamp(min=radius))


__all__ = ["linear_spectral_loss", "linear_strengths", "spectral_contrastive"]
