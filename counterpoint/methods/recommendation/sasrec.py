"""SASRec: a causal Transformer predicts the next item; the baseline of every contrastive sequence method."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from counterpoint import contrast
from counterpoint.contrast.operands import reduce
from counterpoint.data import interactions
from counterpoint.data.interactions import Histories
from counterpoint.encoders.sequence import SASRecEncoder
from counterpoint.train.method import Batch, Method

TRIES = 8
"""Draws of a random item before one from the history is accepted."""


class SASRec(Method):
    r"""The state after a history picks the next item among all items.

    .. math:: \ell = -\frac{h \cdot e_{\text{next}}}{\tau} + \log \sum_{j=0}^{n} \exp(h \cdot e_j / \tau)

    with h the state of a causal Transformer after the last item and e the embedding of items (row 0 is the padding, a
    class that is never right, as released).

    When to use it: histories of users, when the order of choices matters. It is also the baseline to beat: with this
    full softmax it is far stronger than with the binary cross entropy of its paper.

    Defaults: 64 dimensions, 2 blocks of 2 heads, dropout 0.5 (0.1 suits dense data such as MovieLens), the last 50
    items: QinHsiu/MCLRec at bc8d622. Train with Adam, rate 0.001, without weight decay or schedule.

    Where codes differ: the paper trains every position of a history against one sampled negative (``objective="bce"``
    has its loss); RecBole, and we, train sliding prefixes. The paper puts layer norm before each block, RecBole after.

    Source: Kang and McAuley 2018, "Self-Attentive Sequential Recommendation" (arXiv 1808.09781), section III.

    Args:
        item_count: number of items; 0 finds it in the first data that is read, and remembers.
        dim: length of the vectors.
        layers: Transformer blocks.
        heads: attention heads.
        hidden: width of the feed-forward layers.
        dropout: of embeddings and block outputs.
        attention_dropout: of attention weights.
        max_length: how many of the last items count.
        objective: "softmax" over all items; "bce" against one random item that the history does not hold; or any
            objective of pairs by name ("info_nce", "dcl", "sigmoid_loss" ...), between states and the embeddings of
            the next items of the batch.
        temperature: of the objective (scores are dot products; "bce" has none).
    """

    family = "histories"

    def __init__(
        self,
        item_count: int = 0,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        hidden: int = 256,
        dropout: float = 0.5,
        attention_dropout: float = 0.5,
        max_length: int = 50,
        objective: str = "softmax",
        temperature: float = 1.0,
    ):
        super().__init__()
        self.encoder = SASRecEncoder(
            item_count,
            dim=dim,
            layers=layers,
            heads=heads,
            hidden=hidden,
            dropout=dropout,
            attention_dropout=attention_dropout,
            max_length=max_length,
        )
        self.temperature = temperature
        self.next_item: Callable[[Tensor, Batch], Tensor]
        if objective == "softmax":
            self.next_item = self.full_softmax
        elif objective == "bce":
            self.next_item = self.binary_cross_entropy
        else:
            self.next_item = partial(self.among_the_batch, contrast.objective(objective))

    def read(
        self, data: Any, split: str = "train", *, limit: int | None = None, seed: int = 0, resident: bool | None = None
    ) -> Histories:
        """Histories in the codes of this model's items, always in memory; see `counterpoint.data.interactions.load`."""
        encoder = self.encoder
        known = encoder.catalogue or None
        options: dict[str, Any] = {"limit": limit, "seed": seed, "max_length": encoder.max_length}
        histories = interactions.load(data, split, catalogue=known, **options)
        if known is None:
            encoder.name_items(histories.catalogue)
            self.arguments["item_count"] = encoder.items
        return histories

    def encode(self, data: Any, *, split: str = "all", batch_size: int = 512) -> np.ndarray:
        """States of users ``[N, D]`` after their whole histories, or before what `split` holds out.

        Rows of `Histories` keep the split that they are of.
        """
        split = data.split if isinstance(data, Histories) else split
        return super().encode(data, split=split, batch_size=batch_size)

    def state(self, batch: Batch) -> Tensor:
        return self.encoder(batch["item_seq"], batch["item_seq_len"]).pooled

    def loss(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        state = self.state(batch)
        self.watch(state, self.encoder.table[batch["target"]])
        return self.next_item(state, batch)

    def full_softmax(self, state: Tensor, batch: Batch) -> Tensor:
        # not info_nce: it would gather the items of every process, and all hold the same ones
        table = self.encoder.table
        right = (state * table[batch["target"]]).sum(1) / self.temperature
        return reduce(contrast.log_sum_exp(state, table, temperature=self.temperature) - right, "mean")

    def binary_cross_entropy(self, state: Tensor, batch: Batch) -> Tensor:
        table, wrong = self.encoder.table, self.absent_items(batch)
        scores = [(state * table[item]).sum(1) for item in (batch["target"], wrong)]
        return reduce(F.softplus(-scores[0]) + F.softplus(scores[1]), "mean")

    def absent_items(self, batch: Batch) -> Tensor:
        """A random item for each row, neither its target nor in its history (but for a few in tiny catalogues)."""
        target, history = batch["target"], batch["item_seq"]
        wrong = torch.zeros_like(target)
        for _ in range(TRIES):
            clash = (wrong == 0) | (wrong == target) | (wrong[:, None] == history).any(1)
            wrong = torch.where(clash, torch.randint_like(target, 1, self.encoder.items + 1), wrong)
        return wrong

    def among_the_batch(self, objective: contrast.Objective, state: Tensor, batch: Batch) -> Tensor:
        return objective(state, self.encoder.table[batch["target"]], temperature=self.temperature, normalize=False)
