"""Text from a causal language model: a run of ours or any of transformers, one prompt or many, by any strategy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counterpoint.encoders.causal import CausalLM
from counterpoint.errors import InputError


def generate(
    model: Any,
    prompt: str | Sequence[str],
    strategy: str = "contrastive-search",
    *,
    max_new_tokens: int = 128,
    amateur: Any = None,
    instruction: str | None = None,
    batch_size: int = 8,
    stop: bool = True,
    seed: int = 0,
    device: str = "auto",
    say: Any = None,
    **settings: Any,
) -> Any:
    """Continue a prompt, or several.

    Args:
        model: run or run folder, transformers model by name or folder, a method, or a `CausalLM`.
        prompt: a text, or several.
        strategy: "contrastive-search", "greedy", "nucleus", "top-k", "contrastive", "dola" or "lol".
        max_new_tokens: most tokens to add; fewer where the model takes no more.
        amateur: for "contrastive" and "lol": the model to contrast with, named as `model`; a run of `lol` has its own.
        instruction: for "lol": text before each prompt that asks for the truth; its effect is added.
        batch_size: prompts that are continued at a time.
        stop: end where the model ends its text.
        seed: of strategies that draw.
        device: "auto" takes a GPU when there is one.
        say: called with (number of the prompt, new piece of text) while texts grow.
        **settings: of the strategy: k and alpha, top_p, top_k, temperature, layers, relative_top, lower_weight ...; see
            `counterpoint.decoding.strategies`.

    Returns:
        The continuation without the prompt; a list for several prompts.

    Raises:
        InputError: no such model, strategy or setting; no prompt, or one that leaves no room; two models with different
            tokenisers.
    """
    from counterpoint.decoding import continued
    from counterpoint.decoding import strategy as named

    chosen = named(strategy, **settings)
    lm, own = opened(model, device)
    other = None
    if chosen.needs_amateur:
        other = own if amateur is None else opened(amateur, device)[0]
    elif amateur is not None:
        raise InputError(f"{strategy} has no use for an amateur: leave it out")
    if instruction is not None and not chosen.takes_instruction:
        raise InputError(f"{strategy} contrasts with no instruction: leave it out, or put it into the prompt")
    options: dict[str, Any] = {
        "steps": max_new_tokens,
        "batch_size": batch_size,
        "stop": stop,
        "seed": seed,
        "say": say,
    }
    prompts = [prompt] if isinstance(prompt, str) else [*prompt]
    found = continued(chosen, lm, prompts, amateur=other, instruction=instruction, **options)
    return found[0] if isinstance(prompt, str) else found


def opened(model: Any, device: str = "auto") -> tuple[CausalLM, CausalLM | None]:
    """A language model that is ready to generate, and the amateur that a run of `lol` holds.

    Args:
        model: as in `generate`.
        device: "auto", or as torch names it.

    Raises:
        InputError: nothing of that name, or no language model.
    """
    import torch

    from counterpoint.train.run import Run
    from counterpoint.train.start import language_model

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if isinstance(model, CausalLM):
        return model.to(place).eval(), None
    if isinstance(model, Run):
        model = model.folder
    if isinstance(model, str | Path):
        return language_model(model, place)
    if getattr(model, "family", None) == "language":
        lm, other = model.to(place).eval().models
        return lm, other
    raise InputError(f"a {type(model).__name__} is no language model: name a run, a folder or a model of transformers")
