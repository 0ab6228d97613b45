"""Views of text: tokens or words repeated, left out or replaced. Batched, on the batch's device, positions drawn or given.

Rows are ids ``[B, L]`` with a mask ``[B, L]`` that is 1 on the tokens and 0 on the padding behind them; the first and the
last token of a row are taken to be special ([CLS] and [SEP]) and always stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterpoint.errors import InputError

MOST_REPEATS = 10


def repeat_bound(lengths: Tensor, rate: float = 0.32, most: int = MOST_REPEATS) -> Tensor:
    """How many tokens may be repeated, exclusive: ``min(most, int(rate * L))``; 0 means that nothing is drawn.

    Args:
        lengths: int64 [B], tokens of each row with the special ones.
        rate: share of the length.
        most: cap, exclusive as well.
    """
    if not 0 <= rate <= 1 or most < 1:
        raise InputError(f"repetition needs a rate between 0 and 1 and at most at least 1, got {rate} and {most}")
    return _table(lengths, lambda length: min(most, int(rate * length)))


def repeat_tokens(
    ids: Tensor,
    mask: Tensor,
    *,
    rate: float = 0.32,
    most: int = MOST_REPEATS,
    positions: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Some random tokens of each row are said twice, in place, so that its length changes and its meaning hardly does.

    A row of L tokens repeats :math:`k \sim U\{0, ..., \min(\text{most}, \lfloor rL \rfloor) - 1\}` distinct tokens, chosen
    evenly from positions 1 to L - 2.

    Args:
        ids: int64 [B, L].
        mask: int64 or bool [B, L].
        rate: r.
        most: cap of the draw; at most ``most - 1`` tokens are repeated.
        positions: bool [B, L], the tokens to repeat, instead of the draw. Rows too short for a repeat stay unchanged.
        generator: source of the draw.

    Returns:
        ids and mask ``[B, L + k]``, k the most repeats of a row; what lies beyond a row's mask is its last token.

    Source: Wu et al. 2022 (arXiv 2109.04380), section 3.1; bounds as in the code that trained the released models
    (the paper states another draw).
    """
    real = mask.bool()
    lengths = real.sum(1)
    bound = repeat_bound(lengths, rate, most)
    if positions is None:
        count = (torch.rand(len(ids), generator=generator, device=ids.device) * bound).long()
        positions = draw(inner(mask), count, generator)
    positions = positions & (bound > 0)[:, None]
    if bool((positions & ~inner(mask)).any()):
        raise InputError("only tokens between the first and the last of a row can be repeated")
    return emit(ids, real.long() + positions.long())


def repeat_words(
    ids: Tensor,
    mask: Tensor,
    words: Tensor,
    *,
    rate: float = 0.32,
    most: int = MOST_REPEATS,
    positions: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Some random words of each row are said twice, with all their tokens: the variant that the paper found weaker.

    Of W words :math:`k \sim U\{0, ..., \min(\text{most}, W, \max(2, \lfloor rW \rfloor)) - 1\}` are repeated, never the last.

    Args:
        ids: int64 [B, L].
        mask: int64 or bool [B, L].
        words: int64 [B, L], number of the word of each token (from 0), -1 for tokens of no word.
        rate: r.
        most: cap of the draw.
        positions: bool [B, most words], the words to repeat, instead of the draw.
        generator: source of the draw.

    Returns:
        As `repeat_tokens`.
    """
    count = words.amax(1) + 1
    if positions is None:
        bound = _table(count, lambda w: min(most, w, max(2, int(rate * w))))
        number = torch.arange(max(1, int(count.max())), device=ids.device)
        picked = (torch.rand(len(ids), generator=generator, device=ids.device) * bound).long()
        positions = draw(number < count[:, None] - 1, picked, generator)
    chosen = _tokens_of(positions, words)
    # a word of several tokens is said twice as a whole: a b -> a b a b
    return _emit_runs(ids, mask.bool(), words, chosen)


def delete_words(
    ids: Tensor,
    mask: Tensor,
    words: Tensor,
    *,
    rate: float = 0.1,
    positions: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Each word is left out with probability `rate`; one word of a row always stays.

    Args:
        ids: int64 [B, L].
        mask: int64 or bool [B, L].
        words: int64 [B, L], number of the word of each token, -1 for none (such tokens stay).
        rate: probability.
        positions: bool [B, most words], the words to leave out, instead of the draw.
        generator: source of the draw.

    Returns:
        ids and mask, as long as the longest row left.
    """
    if not 0 <= rate < 1:
        raise InputError(f"words are left out with a probability from 0 to below 1, got {rate}")
    if positions is None:
        count = words.amax(1) + 1
        number = torch.arange(max(1, int(count.max())), device=ids.device)
        noise = torch.rand(len(ids), len(number), generator=generator, device=ids.device)
        noise = noise.masked_fill(number >= count[:, None], -1)
        # the word with the highest draw stays in any case
        positions = (noise >= 0) & (noise < rate) & (number != noise.argmax(1, keepdim=True))
    return emit(ids, (mask.bool() & ~_tokens_of(positions, words)).long())


def mask_tokens(
    ids: Tensor,
    mask: Tensor,
    special: Tensor,
    *,
    rate: float = 0.15,
    generator: torch.Generator | None = None,
) -> Tensor:
    """bool [B, L]: the tokens of each row that a masked language model has to guess, ``max(1, round(rate * L))`` of them.

    Args:
        ids: int64 [B, L].
        mask: int64 or bool [B, L].
        special: int64 [S], ids that are never chosen (of the tokeniser's special tokens). Rows of no others have none.
        rate: share of a row's L tokens, special ones counted.
        generator: source of the draw.

    Source: microsoft/DeBERTa at 4d7fe0b, `mlm_task.py`, with n-grams of 1; it draws one token out of each window of 6.
    """
    if not 0 < rate < 1:
        raise InputError(f"tokens are masked at a rate above 0 and below 1, not {rate}")
    real = mask.bool()
    count = (rate * real.sum(1)).round().clamp(min=1)
    return draw(real & ~torch.isin(ids, special), count, generator)


def soft_replace(
    ids: Tensor,
    allowed: Tensor,
    into: int | Tensor,
    *,
    rate: float = 0.1,
    share: float = 0.8,
    random_ids: Tensor | None = None,
    draws: tuple[Tensor, Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """ids int64 [B, L] of which some tokens have become others: CoCoSoDa's soft augmentation, one operator for all its forms.

    Each allowed token is chosen with probability `rate`; of the chosen ones a `share` becomes `into`, and of the rest half
    becomes a random token if there are any, while the others stay what they are. Dynamic masking: `into` is the mask token, with
    random tokens. Dynamic replacement: `into` is the token of its syntactic type. Allowing the tokens of one type alone makes
    the forms for a specified type.

    Args:
        ids: int64 [B, L].
        allowed: bool [B, L], which tokens may change (not padding, not special ones).
        into: what they become, one id or int64 [B, L].
        rate: probability of being chosen.
        share: of the chosen ones that become `into`.
        random_ids: int64 [B, L], or None.
        draws: uniform numbers [B, L] that choose, replace and randomise, instead of drawing them.
        generator: source of the draw.

    Raises:
        InputError: a rate or share outside [0, 1].

    Source: Shi et al. 2023 (arXiv 2204.03293), soft data augmentation; DeepSoftwareAnalytics/CoCoSoDa at 2f2bf8e, `run.py`.
    """
    if not (0 <= rate <= 1 and 0 <= share <= 1):
        raise InputError(f"tokens are replaced at a rate and share between 0 and 1, not {rate} and {share}")
    if draws is None:
        one, two, three = torch.rand(3, *ids.shape, generator=generator, device=ids.device)
    else:
        one, two, three = draws
    chosen = allowed & (one < rate)
    replaced = chosen & (two < share)
    found = torch.where(replaced, into, ids)
    return found if random_ids is None else torch.where(chosen & ~replaced & (three < 0.5), random_ids, found)


def emit(ids: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Each token of ids [B, L] as often as `times` [B, L] says, rows closed up; ids and mask as long as the longest row."""
    ends = times.cumsum(1)
    column = torch.arange(max(1, int(ends[:, -1].max())), device=ids.device).expand(len(ids), -1).contiguous()
    source = torch.searchsorted(ends.contiguous(), column, right=True).clamp(max=ids.shape[1] - 1)
    return ids.gather(1, source), (column < ends[:, -1:]).long()


def stack(rows: list[tuple[Tensor, Tensor]], pad: int) -> tuple[Tensor, Tensor]:
    """Batches (ids, mask) of different width as one, so that an encoder needs one pass; padding holds `pad`."""
    width = max(ids.shape[1] for ids, _ in rows)
    every = [
        torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)
        for ids, mask in rows
        for x, value in ((ids.masked_fill(~mask.bool(), pad), pad), (mask.long(), 0))
    ]
    return torch.cat(every[0::2]), torch.cat(every[1::2])


def inner(mask: Tensor) -> Tensor:
    """bool [B, L]: the tokens that are neither the first nor the last of their row."""
    column = torch.arange(mask.shape[1], device=mask.device)
    return (column > 0) & (column < mask.bool().sum(1, keepdim=True) - 1)


def draw(allowed: Tensor, count: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """bool [B, L]: in each row `count` [B] of the `allowed` places (all of them where there are fewer), evenly drawn."""
    noise = torch.rand(allowed.shape, generator=generator, device=allowed.device).masked_fill(~allowed, -1)
    rank = noise.argsort(1, descending=True).argsort(1)
    return allowed & (rank < count[:, None])


def _tokens_of(positions: Tensor, words: Tensor) -> Tensor:
    """bool [B, L]: tokens whose word is marked."""
    return positions.gather(1, words.clamp(min=0)) & (words >= 0)


def _emit_runs(ids: Tensor, real: Tensor, words: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    # order by (word, copy, place): the second copy of a word comes after its whole first copy
    rows, length = ids.shape
    column = torch.arange(length, device=ids.device).expand(rows, -1)
    same = torch.cat([torch.zeros_like(chosen[:, :1]), (words[:, 1:] == words[:, :-1]) & (words[:, 1:] >= 0)], 1)
    run = (~same).long().cumsum(1)  # tokens of one word share a run; others have one of their own
    first = torch.where(real, run * 2, torch.iinfo(torch.int64).max)
    second = torch.where(chosen, run * 2 + 1, torch.iinfo(torch.int64).max)
    order = torch.cat([first, second], 1).argsort(dim=1, stable=True)
    total = real.sum(1) + chosen.sum(1)
    width = max(1, int(total.max()))
    out = torch.cat([column, column], 1).gather(1, order)[:, :width]
    return ids.gather(1, out), (torch.arange(width, device=ids.device) < total[:, None]).long()


def _table(count: Tensor, bound) -> Tensor:
    # a table of Python's own int(rate * n): float32 on a device would round some products the other way
    top = int(count.max()) if count.numel() else 0
    return torch.tensor([bound(n) for n in range(top + 1)], device=count.device)[count]
