"""Smoothness: the answers to an input and to the same input, moved a little in the worst direction, shall agree."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from counterpoint.contrast.operands import reduce, wide
from counterpoint.errors import InputError


def symmetric_cross_entropy(logits: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    r"""Two softmax answers pull at each other, each towards the other as it is now.

    .. math:: \ell_i = -\sum_c \bar q_{ic} \log p_{ic} - \sum_c \bar p_{ic} \log q_{ic}

    with p of `logits`, q of `target`, and the barred ones constants. The value at equality is not 0 but twice the entropy. The
    gradient is that of :math:`KL(\bar q \| p) + KL(\bar p \| q)`, which is 0 at equality, and not that of the symmetric KL
    divergence, where p and q would move in their other places too. With ``target.detach()`` only the first term has any.

    Args:
        logits: ``[N, C]``.
        target: ``[N, C]``.
        reduction: "mean", "sum" or "none"; the mean is that over all processes.

    Raises:
        InputError: two shapes, or fewer than two classes.

    Source: microsoft/DeBERTa at 4d7fe0b, `sift/sift.py`, where it is called symmetric KL.
    """
    if logits.shape != target.shape or logits.ndim != 2 or logits.shape[1] < 2:
        shapes = f"{list(logits.shape)} and {list(target.shape)}"
        raise InputError(
            f"two answers to compare must be of one shape [rows, classes] with two classes or more, not {shapes}"
        )
    one, other = (log_softmax(wide(x), dim=1) for x in (logits, target))
    rows = -(other.detach().exp() * one).sum(1) - (one.detach().exp() * other).sum(1)
    return reduce(rows, reduction)


def ascended(perturbation: Tensor, gradient: Tensor, *, rate: float = 1e-4) -> Tensor:
    r"""A perturbation after one step towards where the loss grows, as long in each position.

    .. math:: \delta + \eta\, g / (10^{-6} + \max_h |g_h|)

    A gradient whose norm is not finite changes nothing.

    Args:
        perturbation: :math:`\delta`, ``[..., H]``.
        gradient: g, of the loss by it; the maximum goes over the last axis.
        rate: :math:`\eta`.

    Source: as `symmetric_cross_entropy`, `PerturbationLayer.update_delta`.
    """
    finite = torch.linalg.vector_norm(gradient).isfinite()
    step = rate * gradient / (1e-6 + gradient.abs().amax(-1, keepdim=True))
    return torch.where(finite, perturbation + step, perturbation)
