"""The loop around every strategy: prompts in a batch, an end for each of them, and whoever wants to watch."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from counterpoint.decoding.reader import Reader
from counterpoint.decoding.strategies import Readers, check_amateur
from counterpoint.encoders.causal import CausalLM
from counterpoint.errors import InputError

log = logging.getLogger("counterpoint")

Watch = Callable[[list[int | None]], None]
"""Called after every step with the new token of each text, None for texts that have ended."""


@torch.inference_mode()
def decode(
    strategy: Any,
    lm: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    steps: int,
    amateur: CausalLM | None = None,
    instructed: Sequence[Sequence[int]] | None = None,
    stop: bool = True,
    seed: int = 0,
    watch: Watch | None = None,
) -> list[list[int]]:
    """Continue prompts, all in one batch.

    Args:
        strategy: one of `counterpoint.decoding.STRATEGIES`.
        lm: the model, in evaluation mode.
        prompts: ids of each.
        steps: most tokens to add; fewer where the model takes no more.
        amateur: the model to contrast with, for strategies that need one.
        instructed: the prompts behind an instruction to be truthful, for strategies that take one.
        stop: end a text at the model's end token, if it has one (the end token is left out).
        seed: of strategies that draw.
        watch: see `Watch`.

    Returns:
        The new ids of each.

    Raises:
        InputError: no prompt, an empty one, one that leaves no room, a missing amateur, or one of another tokeniser.
    """
    if strategy.needs_amateur and amateur is None:
        raise InputError(
            f"{type(strategy).__name__} contrasts two models: name the other one with --amateur (amateur=)"
        )
    if not strategy.needs_amateur and amateur is not None:
        raise InputError(f"{type(strategy).__name__} has no use for an amateur: leave it out")
    if amateur is not None:
        check_amateur(lm, amateur)
    if not strategy.takes_instruction or not getattr(strategy, "refocus_weight", 1):
        instructed = None
    device = lm.model.get_input_embeddings().weight.device
    for model, rows in ((lm, prompts), (amateur, prompts), (lm, instructed)):
        if model is not None and rows is not None:
            steps = room(model, rows, steps)
    batch = left_padded(prompts, lm.filler, device)
    readers = Readers(
        Reader(lm, *batch),
        None if amateur is None else Reader(amateur, *batch),
        None if instructed is None else Reader(lm, *left_padded(instructed, lm.filler, device)),
    )
    generator = torch.Generator(device).manual_seed(seed)
    end = lm.end if stop else None
    found: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    # the range first: asked for one more, the strategy would read what nobody needs
    for _, tokens in zip(range(steps), strategy.tokens(readers, generator), strict=False):
        new = tokens.tolist()
        running = [before and token != end for before, token in zip(running, new, strict=True)]
        for row, token in enumerate(new):
            if running[row]:
                found[row].append(token)
        if watch is not None:
            watch([token if here else None for token, here in zip(new, running, strict=True)])
        if not any(running):
            break
    return found


def room(lm: CausalLM, prompts: Sequence[Sequence[int]], steps: int) -> int:
    """How many of `steps` further tokens the model takes behind the longest prompt.

    Raises:
        InputError: no prompt, an empty one, or one that leaves no room.
    """
    if not prompts:
        raise InputError("there is no prompt to continue")
    if steps < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {steps}")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise InputError(
                f"prompt {number} is empty, and {lm.name} has no token to start a text with: give it a word"
            )
        if len(prompt) >= lm.positions:
            raise InputError(
                f"prompt {number} has {len(prompt):,} tokens, but {lm.name} takes {lm.positions:,}, prompt and continuation "
                "together: shorten it"
            )
    left = lm.positions - max(map(len, prompts))
    if left < steps:
        log.warning("%s takes %s tokens: the continuation ends after %s", lm.name, f"{lm.positions:,}", f"{left:,}")
    return min(steps, left)


def left_padded(rows: Sequence[Sequence[int]], filler: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor ``[B, S]`` that ends where they end, and its mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[filler] * (longest - len(row)) + [*row] for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
