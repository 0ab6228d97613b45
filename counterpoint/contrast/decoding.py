"""Contrast while a language model writes: candidates against what is written, an expert against an amateur."""

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from counterpoint.contrast.operands import einsum, unit, wide
from counterpoint.errors import InputError


def contrastive_search_score(
    context: Tensor,
    candidate: Tensor,
    probability: Tensor,
    *,
    alpha: float = 0.6,
    mask: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    r"""How good each candidate for the next token is: probable, and in a state unlike those of all tokens before it.

    .. math:: (1 - \alpha)\, p(v \mid x_{<t}) - \alpha \max_j \cos(h_v, h_j)

    The state of a candidate is the one *after* it has been read. 0 is greedy search. Cosines are computed in float32 and may be
    negative. The best is ``.argmax(1)``, the first among equals.

    Source: Su et al. 2022 (arXiv 2202.06417), equation 5; Su and Xu 2023 (arXiv 2210.14140).

    Args:
        context: ``[B, S, E]``, states of the tokens of prompt and continuation.
        candidate: ``[B, K, E]``, states of the candidates.
        probability: ``[B, K]``, of the candidates under the softmax over the whole vocabulary.
        alpha: weight of the penalty, 0 to 1.
        mask: ``[B, S]``, 0 where the context is padding.
        normalize: False where `context` and `candidate` are unit vectors already.

    Returns:
        Scores ``[B, K]``.

    Raises:
        InputError: wrong shapes, or an alpha outside of [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie between 0 and 1, not {alpha}")
    if context.ndim != 3 or candidate.ndim != 3 or probability.shape != candidate.shape[:2]:
        shapes = ", ".join(str(list(x.shape)) for x in (context, candidate, probability))
        raise InputError(f"context is [B, S, E], candidate [B, K, E] and probability [B, K], not {shapes}")
    if normalize:
        context, candidate = unit(context), unit(candidate)
    alike = einsum("bke,bse->bks", candidate, context)
    if mask is not None:
        alike = alike.masked_fill(~mask.bool()[:, None], -torch.inf)
    return (1 - alpha) * wide(probability) - alpha * alike.amax(2)


def plausible(log_probability: Tensor, relative_top: float) -> Tensor:
    r"""Which tokens an expert does not rule out: :math:`p(v) \ge \rho \max_w p(w)`, bool of the same shape ``[..., V]``.

    The most probable one always is; with 0 all are.

    Source: Li et al. 2023 (arXiv 2210.15097), equation 3.
    """
    if not 0 <= relative_top <= 1:
        raise InputError(f"relative_top must lie between 0 and 1, not {relative_top}")
    if relative_top == 0:
        return torch.ones_like(log_probability, dtype=torch.bool)
    return log_probability >= log_probability.amax(-1, keepdim=True) + math.log(relative_top)


def layer_divergence(mature: Tensor, early: Tensor) -> Tensor:
    r"""How far the prediction of an early layer is from the last one's, for each position.

    .. math:: J = \tfrac12 \Big( \overline{M (\log M - \log p)} + \overline{M (\log M - \log q)} \Big), \quad M = \tfrac{p+q}2

    with the mean over the vocabulary. Not the Jensen-Shannon divergence, but with :math:`KL(M \| p)` in its place, as DoLa's
    release has it.

    Source: Chuang et al. 2024 (arXiv 2309.03883), section 2.1; voidism/DoLa at 805230e.

    Args:
        mature: logits of the last layer ``[..., V]``.
        early: logits of layers ``[C, ..., V]``.

    Returns:
        ``[C, ...]``.
    """
    if early.shape[1:] != mature.shape:
        raise InputError(f"early must be [layers, {str(list(mature.shape))[1:-1]}], not {list(early.shape)}")
    last, first = log_softmax(wide(mature), -1), log_softmax(wide(early), -1)
    middle = (last.exp() + first.exp()) / 2
    both = 2 * torch.xlogy(middle, middle) - middle * last - middle * first
    return both.mean(-1) / 2


def furthest_layer(mature: Tensor, early: Tensor) -> tuple[Tensor, Tensor]:
    """For each position the early layer whose prediction is furthest from the last one's: `layer_divergence`.

    Args:
        mature: logits ``[..., V]``.
        early: logits ``[C, ..., V]``.

    Returns:
        Which one, int64 ``[...]`` (the first among equals), and its logits ``[..., V]``.
    """
    chosen = layer_divergence(mature, early).argmax(0)
    return chosen, early.gather(0, chosen[None, ..., None].expand(1, *mature.shape))[0]


def contrastive_logprob(
    expert: Tensor,
    amateur: Tensor,
    *,
    early: tuple[Tensor, Tensor] | None = None,
    truthful: Tensor | None = None,
    lower_weight: float = 0.5,
    refocus_weight: float = 0.5,
    relative_top: float = 0.1,
    relative_top_value: float = -torch.inf,
    post_softmax: bool = True,
) -> Tensor:
    r"""What an expert knows and an amateur does not: the difference of their log-probabilities, over plausible tokens.

    .. math::
        f = \log\mathrm{softmax}\Big( \underbrace{e^{(L)} - a^{(L)}}_{\text{last layers}}
        + \lambda \underbrace{(e^{(l)} - a^{(l)})}_{\text{lower layers}}
        + \gamma \underbrace{(e^{(L)}_{\text{truth}} - e^{(L)})}_{\text{refocused}} \Big)

    Log-probabilities e of the expert, a of the amateur; implausible tokens (`plausible` under :math:`e^{(L)}`) get
    `relative_top_value` afterwards. One function for all: contrastive decoding has the first term alone, DoLa too, with an early
    layer of the expert in the amateur's place (`furthest_layer`), and LOL all three.

    Source: Li et al. 2023 (arXiv 2210.15097); Zhang et al. 2023 (arXiv 2312.15710), HillZhang1999/ICD at d96efb3, whose
    coefficients are 1; Chuang et al. 2024 (arXiv 2309.03883); Chen et al. 2024 (arXiv 2408.08769), whose fusion is assumed
    to be this sum.

    Args:
        expert: logits ``[..., V]``.
        amateur: logits ``[..., V]``.
        early: logits of a lower layer of both ``[..., V]``.
        truthful: logits of the expert where the prompt asks for the truth ``[..., V]``.
        lower_weight: :math:`\lambda`.
        refocus_weight: :math:`\gamma`.
        relative_top: see `plausible`; 0 masks nothing.
        relative_top_value: score of an implausible token: minus infinity to generate, -1000 to score answers as released.
        post_softmax: False leaves the log-softmax around the sum out.

    Returns:
        Scores ``[..., V]``.

    Raises:
        InputError: models of different vocabularies, or other shapes that do not agree.
    """
    for name, other in (
        ("amateur", amateur),
        ("truthful", truthful),
        *zip(("early", "early"), early or (), strict=False),
    ):
        if other is not None and other.shape != expert.shape:
            raise InputError(
                f"expert and {name} must have one shape, not {list(expert.shape)} and {list(other.shape)}: contrast needs two "
                "models of one vocabulary"
            )
    last = log_softmax(wide(expert), -1)
    score = last - log_softmax(wide(amateur), -1)
    if early is not None and lower_weight:
        score = score + lower_weight * (log_softmax(wide(early[0]), -1) - log_softmax(wide(early[1]), -1))
    if truthful is not None and refocus_weight:
        score = score + refocus_weight * (log_softmax(wide(truthful), -1) - last)
    if post_softmax:
        score = log_softmax(score, -1)
    return score.masked_fill(~plausible(last, relative_top), relative_top_value)


def nucleus(logits: Tensor, *, top_p: float = 1.0, top_k: int | None = None, temperature: float = 1.0) -> Tensor:
    """Probabilities ``[..., V]`` to draw the next token from: of the most probable ones alone, which sum to one again.

    Source: Holtzman et al. 2020 (arXiv 1904.09751), section 3.1; Fan et al. 2018 (arXiv 1805.04833).

    Args:
        logits: ``[..., V]``.
        top_p: the smallest set of tokens whose probabilities sum to at least so much.
        top_k: at most so many; None for no limit.
        temperature: that divides the logits.

    Raises:
        InputError: top_p outside of (0, 1], temperature or top_k not positive.
    """
    if not 0 < top_p <= 1 or not temperature > 0 or (top_k is not None and top_k < 1):
        raise InputError(
            f"top_p lies above 0 and up to 1, temperature and top_k are positive, not {top_p}, {temperature} and {top_k}"
        )
    if top_k is not None and top_k < logits.shape[-1]:
        found, at = (logits / temperature).topk(top_k, -1)
    else:
        found, at = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    share = softmax(wide(found), -1)
    before = share.cumsum(-1) - share  # a token stays if those before it do not reach top_p
    share = share.masked_fill(before >= top_p, 0)
    share = share / share.sum(-1, keepdim=True)
    return torch.zeros_like(logits, dtype=share.dtype).scatter(-1, at, share)
