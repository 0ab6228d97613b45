"""Replaced token detection: binary noise contrast of the tokens of a text against those that a small language model proposes."""

import math

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


def token_nce_loss(
    scores: Tensor,
    log_noise: Tensor,
    ids: Tensor,
    original: Tensor,
    mask: Tensor,
    *,
    rate: float = 0.15,
    reduction: str = "mean",
) -> Tensor:
    r"""Replaced token detection that knows how likely its noise is, and so learns probabilities of tokens (Electric).

    .. math::
        \ell = \frac1{|T|} \sum_{t \in T} \mathrm{BCE}\big(s_t - \log \tfrac{r}{1 - r}\, q_t,\; [x_t = x^0_t]\big)

    At the optimum :math:`s_t = \log p(x_t \mid \text{rest})`: a sum of scores ranks whole sentences, as a language model's
    likelihood does, in one pass. r is the share of noise tokens: a token comes from the data with odds of 1 - r to r.

    Args:
        scores: ``[B, L]``, minus the energy of each token in its context.
        log_noise: ``[B, L]``, log q of the token that stands there, under the model that proposes replacements; a constant.
        ids: int64 ``[B, L]``, the text with replacements.
        original: int64 ``[B, L]``, the text.
        mask: ``[B, L]``, above 0 where a token counts.
        rate: r, the share of tokens that were proposed.
        reduction: as in `replaced_token_loss`.

    Raises:
        InputError: shapes that differ, or a rate that is not between 0 and 1.

    Source: Clark et al. 2020, "Pre-Training Transformers as Energy-Based Cloze Models" (EMNLP; arXiv 2012.08561), equation 5.
    """
    if not 0 < rate < 1:
        raise InputError(f"rate lies between 0 and 1, not {rate}")
    if log_noise.shape != scores.shape:
        raise InputError(f"log_noise must be of the shape of scores, {list(scores.shape)}, not {list(log_noise.shape)}")
    # `replaced_token_loss` has its logits high where a replacement is suspected
    suspicion = wide(log_noise).detach() + math.log(rate / (1 - rate)) - wide(scores)
    return replaced_token_loss(suspicion, ids, original, mask, reduction=reduction)
