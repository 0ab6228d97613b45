"""Given answers, rated token by token with the scores that would have written them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from counterpoint.decoding.loop import left_padded
from counterpoint.decoding.strategies import Scored, check_amateur
from counterpoint.encoders.causal import Answer, CausalLM
from counterpoint.errors import InputError


class Given:
    """What a model predicts at the last T places before the end of each text ``[B, T]``: `Seen` of the strategies."""

    def __init__(self, lm: CausalLM, answer: Answer, places: slice):
        self.lm, self.answer, self.places = lm, answer, places

    @property
    def logits(self) -> Tensor:
        return self.answer.logits[:, self.places]

    def exit(self, layer: int) -> Tensor:
        return self.lm.exit(self.answer.layers, layer, self.places)


@torch.inference_mode()
def answer_scores(
    strategy: Scored,
    lm: CausalLM,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    amateur: CausalLM | None = None,
    instructed: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Sum of the scores of an answer's tokens behind its prompt, for each of N pairs, float64 ``[N]``.

    Padding on the left: the places of the answers are the last ones in every row, whatever stands before them.

    Args:
        strategy: one that scores ("greedy" is the model itself, `relative_top=0` leaves no token out).
        lm: the model, in evaluation mode.
        prompts: ids of each.
        answers: ids of each.
        amateur: as in `decode`.
        instructed: as in `decode`.

    Raises:
        InputError: a strategy that draws or looks ahead, an empty prompt or answer, a text that is too long, or an amateur that
            is missing or has another tokeniser.
    """
    if not isinstance(strategy, Scored):
        raise InputError(
            f"{type(strategy).__name__} does not score given answers; greedy, contrastive, dola and lol do"
        )
    if strategy.needs_amateur and amateur is None:
        raise InputError(f"{type(strategy).__name__} contrasts two models, and there is no amateur")
    if amateur is not None:
        check_amateur(lm, amateur)
    if not prompts or len(prompts) != len(answers) or not all(map(len, prompts)) or not all(map(len, answers)):
        raise InputError("every answer needs a prompt, and neither may be empty")
    device = lm.model.get_input_embeddings().weight.device
    longest = max(map(len, answers))
    places = slice(-longest - 1, -1)

    def seen(model: CausalLM, before: Sequence[Sequence[int]]) -> Given:
        rows = [[*prompt, *answer] for prompt, answer in zip(before, answers, strict=True)]
        if (most := max(map(len, rows))) > model.positions:
            raise InputError(f"prompt and answer have {most:,} tokens, but {model.name} takes {model.positions:,}")
        # a text shorter than the longest answer and the place before it
        ids, mask = left_padded([*rows, [0] * (longest + 1)], model.filler, device)
        return Given(model, model(ids[:-1], mask[:-1]), places)

    score = strategy.scores(
        seen(lm, prompts),
        seen(amateur, prompts) if amateur is not None and strategy.needs_amateur else None,
        seen(lm, instructed) if instructed is not None and strategy.takes_instruction else None,
    )
    ids, mask = left_padded(answers, 0, device)
    each = score.double().gather(2, ids[..., None])[..., 0]
    return each.masked_fill(mask == 0, 0).sum(1)
