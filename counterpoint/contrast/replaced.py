"""Replaced token detection: binary noise contrast of the tokens of a text against those that a small language model proposes."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from counterpoint.contrast.operands import reduce, wide
from counterpoint.errors import InputError


def replaced(ids: Tensor, original: Tensor) -> Tensor:
    """bool, of the shape of both: where a token is another one than it was. A sampled token that is right is no replacement."""
    return ids != original


def replaced_token_loss(
    logits: Tensor, ids: Tensor, original: Tensor, mask: Tensor, *, reduction: str = "mean"
) -> Tensor:
    r"""How well each token is told to be the original or a replacement.

    .. math:: \ell = \frac1{|T|} \sum_{t \in T} \mathrm{BCE}(\text{logit}_t, [x_t \ne x^0_t])

    T are all tokens, also those that were never masked: that is what makes the task cheaper to learn from than masked tokens.

    Args:
        logits: ``[B, L]``, high where a replacement is suspected.
        ids: int64 ``[B, L]``, the text with replacements.
        original: int64 ``[B, L]``, the text.
        mask: ``[B, L]``, above 0 where a token counts.
        reduction: "mean" over all tokens of all processes, "sum", or "none": ``[B, L]``, 0 where no token counts.

    Raises:
        InputError: shapes that differ.

    Source: Clark et al. 2020 (arXiv 2003.10555), equation 1; microsoft/DeBERTa at 4d7fe0b,
    `replaced_token_detection_model.py`.
    """
    if not logits.shape == ids.shape == original.shape == mask.shape:
        shapes = ", ".join(str(list(x.shape)) for x in (logits, ids, original, mask))
        raise InputError(f"logits, ids, original and mask must be of one shape, not {shapes}")
    real, target = mask > 0, replaced(ids, original)
    loss = binary_cross_entropy_with_logits(wide(logits), target.to(torch.promote_types(logits.dtype, torch.float32)),
                                            reduction="none")  # fmt: skip
    return reduce(loss.masked_fill(~real, 0.0), reduction, real)
