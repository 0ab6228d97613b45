"""Frozen text encoders with a few weights of their own: prefixes before every attention, or low-rank updates (through peft)."""

import copy
import inspect
import warnings
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterpoint.encoders.text import TextEncoder
from counterpoint.errors import InputError, one_line

Tuning = Literal["full", "prefix", "lora", "head"]
TUNINGS = ("full", "prefix", "lora", "head")


NO_PREFIX = (
    "a prefix needs a model that takes earlier keys and values, such as BERT, RoBERTa or ELECTRA, and {} does not: take "
    "tuning lora, or another encoder"
)


class LoRAEncoder(TextEncoder):
    r"""A frozen encoder whose chosen matrices get a trained update of low rank.

    .. math:: W + \frac{\alpha}{r} B A

    B starts at zero, so that the encoder starts as what it was; afterwards `stock` adds the updates to the matrices, and nothing
    of them is left to load.

    Args:
        encoder: whose model is taken over and frozen.
        rank: r.
        alpha: :math:`\alpha`.
        targets: names of the linear layers; none takes query and value where peft knows the model's.

    Raises:
        InputError: no such layers, or none that peft knows.

    Source: Hu et al. 2022 (arXiv 2106.09685), section 4.
    """

    def __init__(self, encoder: TextEncoder, *, rank: int = 8, alpha: float = 16.0, targets: tuple[str, ...] = ()):
        if rank < 1 or alpha <= 0:
            raise InputError(f"LoRA needs a rank of 1 or more and an alpha above 0, not {rank} and {alpha}")
        names = [*targets] or _query_and_value(encoder)
        options: Any = {"r": rank, "lora_alpha": alpha, "target_modules": names}
        super().__init__(*_parts(encoder, _adapted(encoder, "LoraConfig", **options)))

    def stock(self) -> TextEncoder:
        return TextEncoder(*_parts(self, copy.deepcopy(self.model).merge_and_unload()))


class PrefixEncoder(TextEncoder):
    r"""A frozen encoder that attends, in every layer, to trained keys and values besides those of the text.

    .. math:: \mathrm{softmax}\big(q\, [P_k; K]^\top / \sqrt{d}\big)\, [P_v; V]

    P is one table, a row for each of p places: first the key of layer 0, then its value, then those of layer 1 ... (see
    `keys_values`), without a network in between. Positions of the text count from p, as in the paper's code, so that p fewer
    tokens fit.

    Args:
        encoder: whose model is taken over and frozen; of a kind that takes earlier keys (BERT, RoBERTa, ELECTRA).
        length: p.
        dropout: of the prefix.

    Raises:
        InputError: a model that takes no earlier keys, or has no room for so many.

    Source: Li and Liang 2021 (arXiv 2101.00190); Liu et al. 2022, "P-Tuning v2" (arXiv 2110.07602); THUDM/P-tuning-v2 at
    b1520c9.
    """

    def __init__(self, encoder: TextEncoder, *, length: int = 40, dropout: float = 0.1):
        room = encoder.positions - length
        if length < 1 or room < 3:
            raise InputError(
                f"a prefix needs 1 to {encoder.positions - 3} places of the {encoder.positions} that {encoder.name} has, not "
                f"{length}"
            )
        if not 0 <= dropout < 1:
            raise InputError(f"dropout of the prefix must lie between 0 and 1, not {dropout}")
        before = _answer(encoder)
        super().__init__(*_parts(encoder, _adapted(encoder, "PrefixTuningConfig", num_virtual_tokens=length)))
        self.positions, self.max_length = room, min(self.max_length, room)
        self.dropout = nn.Dropout(dropout)
        self.model.prompt_encoder["default"].register_forward_hook(partial(_through, self.dropout))
        try:
            heeded = not torch.allclose(_answer(self), before)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            heeded = False
        if not heeded:
            raise InputError(NO_PREFIX.format(encoder.name))

    @property
    def table(self) -> nn.Parameter:
        """The prefix, ``[p, 2 * layers * dim]``."""
        return self.model.prompt_encoder["default"].embedding.weight

    def called(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        # not through peft's own forward, which leaves segments out
        model = self.model.get_base_model()
        rows = len(input_ids)
        mask = torch.cat([attention_mask.new_ones(rows, len(self.table)), attention_mask], 1)
        # newer versions of transformers call it cache
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        return model(input_ids=input_ids, attention_mask=mask, **{name: self.model.get_prompt(rows)}, **options)

    def keys_values(self, rows: int) -> tuple[Tensor, Tensor]:
        """What a batch of `rows` texts attends to besides itself: keys and values, each ``[layers, rows, heads, p, d]``."""
        layers = self.model.get_prompt(rows).layers
        return torch.stack([layer.keys for layer in layers]), torch.stack([layer.values for layer in layers])

    def stock(self) -> TextEncoder:
        raise InputError(
            "a prefix is no part of a stock encoder, so that no format can hold this one: counterpoint embed RUN writes its "
            "vectors, and tuning lora can be exported"
        )


def tuned(
    encoder: TextEncoder,
    how: Tuning,
    *,
    length: int = 40,
    dropout: float = 0.1,
    rank: int = 8,
    alpha: float = 16.0,
    targets: tuple[str, ...] = (),
) -> TextEncoder:
    """`encoder`, of which only a part will learn.

    Args:
        encoder: taken over.
        how: "full": everything; "prefix" or "lora": as the two classes here, with their options; "head": nothing, which
            leaves learning to what comes after it.

    Raises:
        InputError: no such tuning, peft is not installed, or as the classes.
    """
    if how not in TUNINGS:
        raise InputError(f'tuning must be one of {", ".join(TUNINGS)}, not "{how}"')
    if how == "prefix":
        return PrefixEncoder(encoder, length=length, dropout=dropout)
    if how == "lora":
        return LoRAEncoder(encoder, rank=rank, alpha=alpha, targets=targets)
    return encoder.requires_grad_(how == "full")


def _adapted(encoder: TextEncoder, kind: str, **options: Any) -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise InputError("prefixes and LoRA need peft: pip install counterpoint[peft]") from error
    if type(encoder) is not TextEncoder:
        raise InputError(f"prefixes and LoRA are for plain text encoders, and this is a {type(encoder).__name__}")
    # transformers renames what peft uses, and says so in every run to those who can change nothing about it
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    config = getattr(peft, kind)(task_type="FEATURE_EXTRACTION", **options)
    try:
        return peft.get_peft_model(encoder.model, config)
    except (ValueError, KeyError, AttributeError) as error:
        if kind == "PrefixTuningConfig":
            raise InputError(NO_PREFIX.format(encoder.name)) from error
        raise InputError(f"LoRA does not fit {encoder.name}: {one_line(error)}") from error


@torch.no_grad()
def _answer(encoder: TextEncoder) -> Tensor:
    """Vectors of two short rows, without a random draw."""
    training = encoder.training
    try:
        return encoder.eval()(torch.full((2, 2), encoder.pad + 1), torch.tensor([[1, 1], [1, 0]])).pooled
    finally:
        encoder.train(training)


def _parts(encoder: TextEncoder, model: Any) -> tuple[Any, ...]:
    return model, encoder.tokenizer, encoder.pooling, encoder.max_length, encoder.name, encoder.fresh


def _query_and_value(encoder: TextEncoder) -> list[str] | None:
    """Names of these two in models that peft does not know; None leaves it to peft."""
    ends = {name.rpartition(".")[2] for name, part in encoder.model.named_modules() if isinstance(part, nn.Linear)}
    for names in (["query", "value"], ["q_lin", "v_lin"], ["q", "v"], ["Wqkv"]):
        if ends.issuperset(names):
            return names
    return None


def _through(dropout: nn.Module, module: nn.Module, inputs: Any, prefix: Tensor) -> Tensor:
    return dropout(prefix)
