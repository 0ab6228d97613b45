"""Masked language models: a text encoder with a head that guesses hidden tokens, and tables that two models share."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from counterpoint.encoders.text import TextEncoder, place_of, quiet, text
from counterpoint.errors import InputError

HEADS = ("cls", "lm_head", "lm_predictions")
"""What transformers' masked language models call the part behind the encoder."""

TABLES = ("word_embeddings", "position_embeddings")


class MaskedLanguageModel(nn.Module):
    """A text encoder and the head that makes a score for each token of the vocabulary out of a hidden vector.

    Attributes:
        encoder: a `TextEncoder`, of tokens that are partly hidden.
        head: transformers' own of that model, its last matrix tied to the embeddings where the configuration says so.
    """

    def __init__(self, encoder: TextEncoder, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.asks_for_table = len(inspect.signature(head.forward).parameters) > 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor, at: Tensor) -> Tensor:
        """Scores ``[M, V]`` of the tokens at the places `at` ``[M]`` of the flattened ``[B, L]`` batch."""
        hidden = self.encoder.hidden(input_ids, attention_mask)
        table = [self.encoder.model.get_input_embeddings()] if self.asks_for_table else []
        return self.head(hidden.flatten(0, 1)[at], *table)


def masked_language_model(
    name: str | dict[str, Any], *, layers: int | None = None, dropout: float | None = None
) -> MaskedLanguageModel:
    """Build a masked language model.

    Args:
        name, layers, dropout: as in `counterpoint.encoders.text.text`.

    Raises:
        InputError: as `text`; a tokeniser without a mask token; or a kind of model without a head that we know.
    """
    import transformers

    encoder = text(name, layers=layers, dropout=dropout)
    mask_of(encoder)
    config = encoder.model.config
    try:
        with quiet():
            if encoder.fresh:
                model = transformers.AutoModelForMaskedLM.from_config(config)
            else:
                options = {"config": config, "dtype": torch.float32}
                model = transformers.AutoModelForMaskedLM.from_pretrained(place_of(encoder.name), **options)
    except ValueError as error:
        raise InputError(f"transformers has no masked language model of the kind of {encoder.name}") from error
    head = next((found for part in HEADS if isinstance(found := getattr(model, part, None), nn.Module)), None)
    if head is None:
        raise InputError(
            f"{type(model).__name__} keeps its head in a place that we do not know ({', '.join(HEADS)}): take another generator"
        )
    encoder.model = model.base_model.train()
    return MaskedLanguageModel(encoder, head)


def mask_of(encoder: TextEncoder) -> int:
    """The id of the token that hides another.

    Raises:
        InputError: the tokeniser has none.
    """
    if encoder.tokenizer.mask_token_id is None:
        kind = type(encoder.tokenizer).__name__
        raise InputError(f"the tokeniser of {encoder.name} ({kind}) has no mask token: take an encoder that has one")
    return encoder.tokenizer.mask_token_id


class ReplacedTokenHead(nn.Module):
    """A score ``[B, L]`` for each token of hidden vectors ``[B, L, D]``, high where the token seems not to belong.

    Linear - GELU - Linear on the normalised sum of the token's vector and the first one's, which so has to know the text.

    Source: microsoft/DeBERTa at 4d7fe0b, `replaced_token_detection_model.py`; initial weights as there (BERT's).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.dense, self.score = nn.LayerNorm(dim, eps=1e-7), nn.Linear(dim, dim), nn.Linear(dim, 1)
        for linear in (self.dense, self.score):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden[:, :1] + hidden)
        return self.score(nn.functional.gelu(self.dense(x))).squeeze(-1)


def shared_tables(leader: TextEncoder, follower: TextEncoder) -> list[tuple[nn.Embedding, nn.Embedding]]:
    """Tables of embeddings (of tokens, and of positions where there are any) that two encoders have alike.

    Raises:
        InputError: their tables of tokens are of different shape.
    """

    def tables(encoder: TextEncoder) -> dict[str, nn.Embedding]:
        found = {"word_embeddings": encoder.model.get_input_embeddings()}
        every = ((name.rpartition(".")[2], part) for name, part in encoder.model.named_modules())
        return {name: part for name, part in every if name in TABLES and isinstance(part, nn.Embedding)} | found

    one, other = tables(leader), tables(follower)
    sizes = [list(x["word_embeddings"].weight.shape) for x in (one, other)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"generator and encoder cannot share embeddings: their tables of tokens are {sizes[0]} and {sizes[1]}; take a "
            "generator of the same vocabulary and width, or sharing none"
        )
    both = [(one[name], other[name]) for name in TABLES if name in one and name in other]
    return [(a, b) for a, b in both if a.weight.shape == b.weight.shape]


class Disentangled(nn.Module):
    r"""Embeddings shared without a tug of war: the follower's table is the leader's, as a constant, plus a difference of its own.

    .. math:: E_f = \mathrm{sg}(E_l) + \Delta

    The follower keeps :math:`E_f` itself as its weight, so that it stays an ordinary model: its gradient is that of
    :math:`\Delta`, and after each step `follow` adds by how much the leader's table has moved. Weight decay is to spare these
    tables: it would pull :math:`E_f` instead of :math:`\Delta`.

    Args:
        pairs: tables (leader's, follower's), see `shared_tables`.
        copy: start at :math:`\Delta = 0`; False at the difference that there is.

    Source: He et al. 2023 (arXiv 2111.09543), section 3.2.
    """

    def __init__(self, pairs: list[tuple[nn.Embedding, nn.Embedding]], *, copy: bool) -> None:
        super().__init__()
        self.pairs = pairs  # a plain list: the tables belong to their models
        for i, (leader, follower) in enumerate(pairs):
            if copy:
                follower.load_state_dict(leader.state_dict())
            self.register_buffer(f"seen{i}", leader.weight.detach().clone())

    @torch.no_grad()
    def follow(self) -> None:
        for (leader, follower), seen in zip(self.pairs, self.buffers(), strict=True):
            follower.weight += leader.weight - seen
            seen.copy_(leader.weight)
