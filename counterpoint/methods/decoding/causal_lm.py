"""A causal language model: each token is predicted from those before it."""

from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import log_softmax

from counterpoint.contrast.operands import reduce
from counterpoint.data import corpus
from counterpoint.data.images import chosen
from counterpoint.data.texts import Sentences
from counterpoint.encoders.causal import Answer, causal
from counterpoint.errors import InputError
from counterpoint.train.method import Batch, Method
from counterpoint.train.start import earlier_method, take_over

KEPT = ("encoder", "tokenizer", "positions")
"""Arguments that a training takes from the run that it starts from."""


class CausalLanguageModel(Method):
    r"""Next-token prediction on running text.

    .. math:: \mathcal{L}_{MLE} = -\frac1T \sum_t \log p(x_t \mid x_{<t})

    Documents stand one after the other, an end token behind each, and are cut into rows of `max_length` tokens; or, with
    ``packed: false``, each is a row of its own. A tokeniser of a fresh model learns from the training text and is part of
    the checkpoint. Every twentieth document is held out of the training, and measured: `perplexity`.

    When to use it: to have a small language model of your own text, to fine-tune a pretrained one, or as the model that
    contrastive search, DoLa and contrastive decoding need (``counterpoint generate``). On two CPU cores a fresh model of
    width 128 sees some thousands of tokens a second: it learns phrases, not facts about the world.

    Defaults: rows of 256 tokens; the models that the papers of contrastive decoding start from are GPT-2's.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

    Args:
        encoder: transformers model by name or folder, "decoder-W-L" for a fresh one, or a configuration; see
            `counterpoint.encoders.causal`. None takes that of `start`, or "gpt2".
        tokenizer: of a fresh model: "bpe-N", "bytes", or a name or folder; None is that of `start`, or "bpe-4096".
        positions: most tokens that a fresh model can take; None is that of `start`, or 256.
        max_length: tokens of a training row; None is 256, or what the model takes if that is less.
        packed: rows run through documents; False has a row for each document, cut to `max_length`.
        dropout: None keeps the configuration's.
        start: run folder of an earlier training whose model this one goes on with.
        scorer: run folder or name of another language model, by which the protocol ``open-ended`` judges continuations; the
            training does not see it.
    """

    family = "language"

    def __init__(
        self,
        encoder: str | dict[str, Any] | None = None,
        tokenizer: str | None = None,
        positions: int | None = None,
        max_length: int | None = None,
        packed: bool = True,
        dropout: float | None = None,
        start: str | None = None,
        scorer: str | None = None,
    ):
        super().__init__()
        given: dict[str, Any] = dict(zip(KEPT, (encoder, tokenizer, positions), strict=True))
        earlier = None if start is None else earlier_method(start, CausalLanguageModel)
        if earlier is not None:
            given = taken_over(given, earlier.arguments, str(start))
        given["encoder"] = given["encoder"] or "gpt2"
        given["positions"] = given["positions"] or 256
        self.arguments |= given  # the run must say which model this is, also when the earlier one is gone
        self.encoder = causal(
            given["encoder"], tokenizer=given["tokenizer"], positions=given["positions"], dropout=dropout
        )
        if earlier is not None:
            take_over(self.encoder, earlier.encoder)
        self.max_length = min(256, self.encoder.positions) if max_length is None else max_length
        if not 2 <= self.max_length <= self.encoder.positions:
            raise InputError(f"max_length must lie between 2 and {self.encoder.positions}, not {max_length}")
        self.packed, self.scorer = packed, scorer

    @property
    def models(self) -> tuple[Any, Any]:
        """What generates, and the amateur that it may be contrasted with (here none)."""
        return self.encoder, None

    def read(
        self, data: Any, split: str = "train", *, limit: int | None = None, seed: int = 0, resident: bool | None = None
    ) -> Sentences:
        """Rows of tokens; always in memory.

        Args:
            data: whatever `counterpoint.data.corpus.load` takes.
            split: "train" without the documents that are held out, "test" with these alone, or "all".
            limit: at most so many rows, a seeded random subset.
            seed: of that subset.
            resident: nothing else is possible.
        """
        if not isinstance(data, Sentences):
            documents = corpus.load(data, split)
            if split == "train" and not self.encoder.learned:
                self.encoder.learn(documents)
            name = data if isinstance(data, str) else "text"
            rows = corpus.packed if self.packed else corpus.separate
            data = rows(documents, self.encoder.tokenizer, self.max_length, name=name)
        return data if limit is None or limit >= len(data) else data.subset(chosen(len(data), limit, seed))

    def encode(self, data: Any, *, split: str = "all", batch_size: int = 32) -> np.ndarray:
        """Mean of the last layer's states over the tokens of each document, float32 ``[N, D]``.

        Args:
            data: whatever `counterpoint.data.corpus.load` takes.
            split: which part of it.
            batch_size: documents per forward pass.
        """
        if not isinstance(data, Sentences):
            documents = corpus.load(data, split)
            data = corpus.separate(documents, self.encoder.tokenizer, self.encoder.positions, ends=False)
        return super().encode(data, batch_size=batch_size)

    def loss(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        return next_token_loss(self.answer(batch).logits, batch["input_ids"], batch["attention_mask"])

    def answer(self, batch: Batch) -> Answer:
        """Logits and states of a batch."""
        return self.encoder(batch["input_ids"], None if self.packed else batch["attention_mask"])


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean over all tokens but the first of each row of how little they were expected.

    Args:
        logits: ``[B, L, V]``.
        ids: ``[B, L]``.
        mask: ``[B, L]``, 0 for padding on the right.
    """
    expected = log_softmax(logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None])[..., 0]
    counted = mask[:, 1:].bool()
    return reduce(-expected * counted, "mean", counted)


def taken_over(given: dict[str, Any], earlier: dict[str, Any], start: str) -> dict[str, Any]:
    """The arguments of the earlier run, which must not contradict those that are given.

    Raises:
        InputError: they do.
    """
    for name, value in given.items():
        if value is not None and value != earlier[name]:
            raise InputError(f"{name} is {value}, but {start} was trained with {earlier[name]}: leave {name} out")
    return {name: earlier[name] for name in given}
