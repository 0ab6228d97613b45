"""Texts in, texts out: prompts become tokens, batches are decoded, and what is new becomes text while it grows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from counterpoint.decoding.loop import decode, left_padded, room
from counterpoint.encoders.causal import CausalLM
from counterpoint.errors import InputError

Say = Callable[[int, str], None]
"""Called with the number of a prompt and the piece of text that was added to it."""


def encoded(lm: CausalLM, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text; an empty one is the token that starts a text, where the model has one."""
    rows = lm.tokenizer([*texts], add_special_tokens=True, verbose=False)["input_ids"] if texts else []
    # some tokenisers end every text, which is no place to go on from
    rows = [row[:-1] if len(row) > 1 and row[-1] == lm.end and not text.endswith(str(lm.tokenizer.eos_token)) else row
            for row, text in zip(rows, texts, strict=True)]  # fmt: skip
    return [row or ([lm.start] if lm.start is not None else []) for row in rows]


def continued(
    strategy: Any,
    lm: CausalLM,
    prompts: Sequence[str],
    *,
    steps: int = 128,
    amateur: CausalLM | None = None,
    instruction: str | None = None,
    batch_size: int = 8,
    stop: bool = True,
    seed: int = 0,
    say: Say | None = None,
) -> list[str]:
    """The continuation of each prompt, without the prompt.

    Args:
        strategy, lm, steps, amateur, stop, seed: as in `decode`.
        prompts: texts.
        instruction: text before each prompt, for the strategies that contrast with it.
        batch_size: prompts that are continued at a time.
        say: see `Say`.
    """
    if not prompts:
        raise InputError("there is no prompt to continue")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    found: list[str] = []
    for first in range(0, len(prompts), batch_size):
        texts = prompts[first : first + batch_size]
        growing = [Growing(lm) for _ in texts]

        def watch(tokens: list[int | None], first: int = first, growing: list["Growing"] = growing) -> None:
            for row, token in enumerate(tokens):
                if token is not None and say is not None and (piece := growing[row].add(token)):
                    say(first + row, piece)

        ids = decode(
            strategy,
            lm,
            encoded(lm, texts),
            steps=steps,
            amateur=amateur,
            instructed=None if instruction is None else encoded(lm, [instruction + text for text in texts]),
            stop=stop,
            seed=seed + first,
            watch=None if say is None else watch,
        )
        for row, new in enumerate(ids):
            if say is not None and (piece := growing[row].rest()):
                say(first + row, piece)
            found.append(lm.tokenizer.decode(new))
    return found


class Growing:
    """A text that grows token by token, said as soon as it is certain: a letter may take several tokens."""

    def __init__(self, lm: CausalLM):
        self.tokenizer, self.said = lm.tokenizer, ""
        self.ids: list[int] = []

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        return "" if text.endswith("\ufffd") else self._new(text)

    def rest(self) -> str:
        return self._new(self.tokenizer.decode(self.ids))

    def _new(self, text: str) -> str:
        piece, self.said = text[len(self.said) :], text
        return piece


@torch.inference_mode()
def beam(lm: CausalLM, prompts: Sequence[Sequence[int]], *, steps: int, width: int = 4) -> list[list[int]]:
    """Beam search by transformers' own `generate`: new ids of each prompt."""
    steps = room(lm, prompts, steps)
    ids, mask = left_padded(prompts, lm.filler, lm.model.get_input_embeddings().weight.device)
    options: dict[str, Any] = {
        "num_beams": width,
        "do_sample": False,
        "max_new_tokens": steps,
        "pad_token_id": lm.filler,
    }
    out = lm.model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    return [row[: row.index(lm.end)] if lm.end in row else row for row in out]
