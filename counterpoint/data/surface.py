"""How alike two sentences look, whatever they mean: shared words, words to change, the longest common subsequence.

Sentences are rows of word numbers, so that many pairs are compared at once. Compare pools of candidates, not all pairs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from counterpoint.data.texts import Ragged
from counterpoint.errors import InputError

Surface = Literal["jaccard", "edit", "rouge-l", "overlap"]
SURFACES = ("jaccard", "edit", "rouge-l", "overlap")
MOST_WORDS = 64
"""Words of a sentence that are looked at; the rest of a longer one is not."""
BLOCK = 2**22
"""Pairs of words that are compared at a time."""


def numbered_words(*columns: Sequence[str], most: int = MOST_WORDS) -> list[Ragged]:
    """Each column's sentences as rows of word numbers; equal words have equal numbers in all columns.

    A word is a run of letters and digits in lower case; a sentence without any is a row of length 0.

    Args:
        columns: sentences.
        most: words after which a sentence is cut.
    """
    numbers: dict[str, int] = {}

    def row(sentence: str) -> list[int]:
        return [numbers.setdefault(word, len(numbers)) for word in re.findall(r"\w+", sentence.lower())[:most]]

    return [Ragged.of([row(sentence) for sentence in column]) for column in columns]


def surface_similarity(first: Tensor, second: Tensor, measure: Surface = "overlap") -> Tensor:
    r"""How alike the words of each pair of rows are, 0 to 1.

    "jaccard": distinct words in common, of all distinct words. "edit": :math:`1 - d / \max(m, n)`, d the fewest words to
    insert, delete or replace. "rouge-l": :math:`2 l / (m + n)`, l the length of the longest common subsequence. "overlap": the
    mean of "jaccard" and "edit" (ours). Two empty rows are alike; an empty and another one are not.

    Args:
        first: int64 ``[..., m]``, word numbers, -1 behind the last word.
        second: int64 ``[..., n]``; leading dimensions broadcast with those of `first`.
        measure: which.

    Returns:
        float32 ``[...]``.

    Raises:
        InputError: no such measure.

    Source: ROUGE-L: Lin 2004; the others are textbook.
    """
    if measure not in SURFACES:
        raise InputError(f'no surface similarity named "{measure}"; there are {", ".join(SURFACES)}')
    leading = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    count = math.prod(leading)
    x = first.expand(*leading, -1).reshape(count, first.shape[-1])
    y = second.expand(*leading, -1).reshape(count, second.shape[-1])
    block = max(1, BLOCK // max(1, x.shape[1] * y.shape[1]))
    parts = [_measured(a, b, measure) for a, b in zip(x.split(block), y.split(block), strict=True)]
    return torch.cat(parts).reshape(leading)


def _measured(x: Tensor, y: Tensor, measure: str) -> Tensor:
    same = (x[:, :, None] == y[:, None]) & (x >= 0)[:, :, None]
    m, n = (x >= 0).sum(1), (y >= 0).sum(1)
    match measure:
        case "jaccard":
            value = _jaccard(same, x, y)
        case "edit":
            value = 1 - _edits(same, m, n) / torch.maximum(m, n).clamp(min=1)
        case "rouge-l":
            value = 2 * _common(same) / (m + n).clamp(min=1)
        case _:
            return (_measured(x, y, "jaccard") + _measured(x, y, "edit")) / 2
    return torch.where(m + n > 0, value, 1.0)


def _jaccard(same: Tensor, x: Tensor, y: Tensor) -> Tensor:
    new_x, new_y = _first(x), _first(y)
    common = (same.any(2) & new_x).sum(1)
    return common / (new_x.sum(1) + new_y.sum(1) - common).clamp(min=1)


def _first(x: Tensor) -> Tensor:
    """bool: words that their row has not had before."""
    earlier = (x[:, :, None] == x[:, None]).tril(-1).any(2)
    return ~earlier & (x >= 0)


def _edits(same: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """Edit distance: the rows of its table one after the other, each for all pairs and columns at once."""
    rows, long, wide = same.shape
    column = torch.arange(wide + 1, device=same.device, dtype=torch.float32)
    line = column.expand(rows, -1)
    found = torch.where(m == 0, line.gather(1, n[:, None])[:, 0], 0.0)
    for i in range(long):
        above = torch.minimum(line[:, 1:] + 1, line[:, :-1] + (~same[:, i]).float())
        start = torch.cat([torch.full_like(line[:, :1], i + 1), above], 1)
        # insertions: the least over all earlier columns, plus the way from there
        line = (start - column).cummin(1).values + column
        found = torch.where(m == i + 1, line.gather(1, n[:, None])[:, 0], found)
    return found


def _common(same: Tensor) -> Tensor:
    """Length of the longest common subsequence; padding matches nothing."""
    rows, long, wide = same.shape
    line = torch.zeros(rows, wide + 1, device=same.device)
    for i in range(long):
        above = torch.maximum(line[:, 1:], line[:, :-1] + same[:, i].float())
        line = torch.cat([line[:, :1], above], 1).cummax(1).values
    return line[:, -1]
