"""What an exported encoder is asked before it is kept, and how much its answers may differ."""

from collections.abc import Sequence
from random import Random
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

from counterpoint.errors import InputError

TOLERANCE = 1e-3
"""Largest difference that is kept; of vectors with numbers above 1, as a share of the largest number."""

SENTENCES = ("A man is playing a guitar.", "Two dogs run across the snow", "", "rain " * 400)


def largest_difference(ours: Tensor, theirs: Tensor, who: str) -> float:
    """Largest absolute difference between two answers of one shape.

    Args:
        ours: the trained encoder's.
        theirs: of what was written.
        who: reads what was written, for the message.

    Raises:
        InputError: they differ by more than `TOLERANCE`.
    """
    difference = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
    if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise InputError(f"{who} answers differently (by {difference:.1e}), so nothing was kept")
    return difference


def images(encoder: Any, count: int = 4) -> Tensor:
    """Random images in 0 to 1, [count, C, S, S]."""
    shape = (count, encoder.channels, encoder.image_size, encoder.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(count))


def tokens(encoder: Any, sentences: Sequence[str] = SENTENCES, tokenizer: Any = None) -> dict[str, Tensor]:
    """Sentences cut and padded: ``input_ids`` and ``attention_mask`` [N, L].

    Args:
        encoder: for which.
        sentences: N of them.
        tokenizer: that does it; default the encoder's own.
    """
    from counterpoint.data.texts import Ragged, pad_of

    # not texts.tokenise, which would tell the reader that sentences were cut that are not theirs
    options = {"truncation": True, "max_length": encoder.max_length, "return_token_type_ids": False}
    rows = (tokenizer or encoder.tokenizer)(list(sentences), **options)["input_ids"]
    pad = pad_of(encoder.tokenizer)
    ids, mask = Ragged.of([row or [pad] for row in rows]).padded(torch.arange(len(rows)), pad)
    return {"input_ids": ids, "attention_mask": mask}


def gibberish(lengths: Sequence[int]) -> list[str]:
    """Sentences of random words, so many words each."""
    random = Random(sum(lengths))
    word = lambda: "".join(random.choices(ascii_lowercase, k=random.randint(1, 7)))  # noqa: E731
    return [" ".join(word() for _ in range(length)) for length in lengths]


def histories(encoder: Any, count: int = 4) -> dict[str, Tensor]:
    """Random histories of every length: ``item_seq`` [count, L], ``item_seq_len`` [count]."""
    random = torch.Generator().manual_seed(count)
    length = torch.linspace(1, encoder.max_length, count).long()
    item = torch.randint(1, encoder.items + 1, (count, encoder.max_length), generator=random)
    return {"item_seq": item * (torch.arange(encoder.max_length) < length[:, None]), "item_seq_len": length}
