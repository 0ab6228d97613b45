"""Pairwise sigmoid contrast: every pair is its own yes-or-no question, without a softmax over the batch."""

from torch import Tensor
from torch.nn import functional

from counterpoint.contrast.distributed import by_ring, gather
from counterpoint.contrast.kernels import ring, softplus_sum
from counterpoint.contrast.operands import (
    check_matrix,
    check_temperature,
    divide,
    fits_at_once,
    logit_matrix,
    reduce,
    unit,
    wide,
)
from counterpoint.errors import InputError


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""SigLIP: binary cross entropy over all pairs (Zhai et al. 2023, arXiv 2303.15343, algorithm 1).

    .. math::
        \ell_i = \sum_j \log(1 + e^{-y_{ij} (s_{ij}/\tau + b)}), \quad y_{ij} = 1 \text{ if } i = j \text{ else } -1

    Since ``softplus(-l) = softplus(l) - l``, this is one softplus sum minus the positive logits.

    Args:
        image: ``[N, d]``.
        text: ``[N, d]``; row i belongs to row i.
        temperature: scalar or 0-d tensor (the paper starts its logit scale at 10).
        bias: scalar or 0-d tensor (the paper starts at -10).
        normalize: cosine similarity (True) or plain dot product.
        reduction: "mean" over the N images, "sum" or "none" ``[N]``.

    Raises:
        InputError: wrong shape or type.
    """
    check_matrix(image, "image")
    check_matrix(text, "text")
    check_temperature(temperature, 1)
    if isinstance(bias, Tensor) and bias.numel() != 1:
        raise InputError(f"bias must be one value, not {bias.numel()}")
    if image.shape != text.shape:
        raise InputError(f"row i is paired with row i, but the shapes are {list(image.shape)} and {list(text.shape)}")
    image, text = (unit(image), unit(text)) if normalize else (wide(image), wide(text))
    scale = divide(image.new_ones(()), temperature)
    positive = (image * text).sum(1) * scale + (bias.reshape(()) if isinstance(bias, Tensor) else bias)
    if by_ring():
        return reduce(ring.softplus_sum(image, text, scale=scale, bias=bias) - positive, reduction)
    keys = gather(text)
    if fits_at_once(image, keys, gain=16):
        total = functional.softplus(logit_matrix(image, text, temperature) + bias).sum(1)
    else:
        total = softplus_sum(image, keys.rows, scale=scale, bias=bias)
    return reduce(total - positive, reduction)
