"""Contrast between the tokens of one text: their states are to be told apart."""

import torch
from torch import Tensor

from counterpoint.contrast.operands import einsum, reduce, unit
from counterpoint.errors import InputError


def token_margin(hidden: Tensor, mask: Tensor, *, margin: float = 0.5, reduction: str = "mean") -> Tensor:
    r"""States of two tokens of a text are to be less alike than a state is to itself, by a margin: SimCTG's loss.

    .. math::
        \frac{\sum_b \sum_{i \ne j \le n_b} [\rho - 1 + \cos(h_i^b, h_j^b)]_+}{\sum_b n_b (n_b - 1)}

    over the texts b of the batch with their :math:`n_b` tokens, which stand first (padding on the right). Gradient flows
    through both states. The division is one of the batch, so that long texts weigh more; under a process group it is one of all
    batches. Holds the cosines ``[B, L, L]``.

    Source: Su et al. 2022 (arXiv 2202.06417), equation 2; yxuansu/SimCTG at 3a91449 (`SimCTGLoss`). As there, a token inside
    the text whose mask is 0 adds nothing as the first of a pair and counts as the second.

    Args:
        hidden: ``[B, L, E]``, states of the tokens.
        mask: ``[B, L]``, 1 where a token counts; the first so many tokens of a row are its text.
        margin: :math:`\rho`.
        reduction: "mean" over pairs, "sum", or "none": the sum of each text ``[B]``.

    Raises:
        InputError: wrong shapes, or a margin outside of [0, 2].
    """
    if hidden.ndim != 3 or mask.shape != hidden.shape[:2]:
        raise InputError(f"hidden is [B, L, E] and mask [B, L], not {list(hidden.shape)} and {list(mask.shape)}")
    if not 0 <= margin <= 2:
        raise InputError(f"margin must lie between 0 and 2, not {margin}")
    states, mask = unit(hidden), mask.bool()
    lengths = mask.sum(1)
    inside = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
    pairs = (inside & mask)[:, :, None] & inside[:, None, :]
    pairs = pairs & ~torch.eye(hidden.shape[1], dtype=torch.bool, device=hidden.device)
    hinge = (margin - 1 + einsum("bie,bje->bij", states, states)).clamp(min=0)
    rows = hinge.masked_fill(~pairs, 0).sum((1, 2))
    return reduce(rows, reduction, lengths * (lengths - 1))
