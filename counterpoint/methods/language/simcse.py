"""SimCSE: a sentence is its own positive, because dropout never lets an encoder see it twice the same way."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint import contrast
from counterpoint.data import texts
from counterpoint.data.images import chosen
from counterpoint.encoders.several import Heads, Several
from counterpoint.encoders.text import Pooling, tanh_head, text
from counterpoint.errors import InputError
from counterpoint.memory.mined import MinedNegatives, Mining
from counterpoint.memory.mixing import Mixed, Mixing
from counterpoint.train.method import Batch, Method
from counterpoint.views.text import stack
from counterpoint.views.words import Rewording, reword


class SimCSE(Method):
    r"""Two passes of a sentence through dropout attract each other, all other sentences of the batch repel.

    .. math:: \ell_i = -\frac{\cos(z_i, z_i^+)}{\tau} + \log \sum_j e^{\cos(z_i, z_j^+)/\tau}

    The data decide which SimCSE it is. Single sentences: :math:`z_i^+` is the same sentence under another dropout mask
    (unsupervised). Columns (anchor, positive): the given positive. Columns (anchor, positive, negative ...): the negatives of
    all rows join the sum as well (supervised). All sentences of a batch go through the encoder in one pass. Pairs with
    a score, or with a class, are no positives: their sentences are used singly.

    When to use it: the first thing to try on sentences. Unsupervised it needs a pretrained encoder, one epoch and a small
    rate; its scores vary by a point or two between seeds, so train several.

    Defaults: temperature 0.05, sentences cut to 32 tokens, [CLS] pooling of a pretrained encoder, a head of one linear
    layer with tanh that is used in training only. The paper's recipe: AdamW without weight decay, BERT-base, batch 64 and
    lr 3e-5 (unsupervised), batch 512 and 5e-5 (supervised).

    Where codes differ: the released supervised models keep the head at test time, the unsupervised ones drop it; we always
    drop it, so that an exported encoder needs no part of ours. The own hard negative may weigh more there; it does not by
    default, nor here.

    Source: Gao, Yao and Chen 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings" (EMNLP; arXiv
    2104.08821), equations 4 and 5.

    Args:
        encoder: transformers model by name or folder (also of sentence-transformers), "transformer-W-L" for a fresh one, or
            a configuration; see `counterpoint.encoders.text`.
        pooling: "cls", "mean" or "first-last"; None takes what a sentence-transformers folder says, "mean" for a fresh
            encoder, and else "cls".
        layers: keep only the encoder's first so many layers.
        max_length: tokens that sentences are cut to in training; later a pretrained encoder takes as many as it knows.
        dropout: of the encoder; None keeps its own.
        head: the train-only linear layer with tanh; False contrasts the pooled vector itself.
        temperature: of the softmax.
        objective: "info_nce", or any other objective of two views by name ("nt_xent", "dcl", "clip_loss" ...); hard
            negatives need one that takes them ("info_nce", "binary_nce", "ranking_nce", "triplet", "pair_margin", "n_pair").
        mixing: parts that make the pairs harder, by name ("mochi"); see `counterpoint.memory.mixing`.
        heads: several train-only layers, by name ("several", "amcl"); see `counterpoint.encoders.several`.
        mined: hard negatives from an index of all sentences that is renewed from time to time, by name ("ance",
            "ance-filtered"); see `counterpoint.memory.mined`.
        rewording: how the words of the positive differ, by name ("delete", "repeat", "swap", "negation"); see
            `counterpoint.views.words`. Each sentence has one reworded copy, the same in every epoch; None is dropout alone.
        rewording_rate: share of the words that it changes.
    """

    family = "sentences"
    reads_pairs = True
    """Whether the objective contrasts the columns of the data, so that further negatives can be put beside them."""
    reads_words = False
    """Whether batches say which word a token belongs to."""
    items: Any
    """The sentences that training draws from, kept where negatives are mined."""

    def __init__(
        self,
        encoder: str | dict[str, Any] = "bert-base-uncased",
        pooling: Pooling | None = None,
        layers: int | None = None,
        max_length: int = 32,
        dropout: float | None = None,
        head: bool = True,
        temperature: float = 0.05,
        objective: str = "info_nce",
        mixing: tuple[Mixing, ...] = (),
        heads: Heads | None = None,
        mined: Mining | None = None,
        rewording: Rewording | None = None,
        rewording_rate: float = 0.1,
    ):
        super().__init__()
        self.encoder = text(encoder, pooling=pooling, layers=layers, dropout=dropout)
        if not 3 <= max_length <= self.encoder.positions:
            raise InputError(f"max_length must lie between 3 and {self.encoder.positions}, not {max_length}")
        self.max_length = max_length
        if self.encoder.fresh:  # it never learns what a later position means
            self.encoder.max_length = max_length
        if heads is not None and not head:
            raise InputError("several heads need a head: leave head=False out")
        self.heads = Several(heads, self.encoder.dim, temperature, mixing)
        self.head = self.heads.each(partial(tanh_head, self.encoder.dim)) if head else torch.nn.Identity()
        self.objective, self.temperature = contrast.objective(objective), temperature
        self.mixing = Mixed(mixing, self.encoder.dim, type(self).__name__)
        if mined is not None and not self.reads_pairs:
            raise InputError(
                f"{type(self).__name__} makes its own pairs of single sentences and takes no mined negatives: leave mined out"
            )
        if mined is not None and not takes_negatives(self.objective):
            raise InputError(f"mined negatives need an objective that takes them, such as info_nce, not {objective}")
        self.mined = None if mined is None else MinedNegatives(mined)
        if rewording is not None and not self.reads_pairs:
            raise InputError(f"{type(self).__name__} makes its own pairs of single sentences: leave rewording out")
        if rewording is not None:
            reword([], rewording, rate=rewording_rate)  # what it cannot do is said now
        self.rewording, self.rewording_rate = rewording, rewording_rate

    def read(
        self, data: Any, split: str = "train", *, limit: int | None = None, seed: int = 0, resident: bool | None = None
    ) -> texts.Sentences:
        """Sentences to train on, as tokens; always in memory."""
        if isinstance(data, texts.Sentences):
            return data if limit is None or limit >= len(data) else data.subset(chosen(len(data), limit, seed))
        rows = self.used(texts.load(data, split))
        if limit is not None and limit < len(rows):
            rows = rows.subset(chosen(len(rows), limit, seed).tolist())
        if self.rewording is not None:
            rows = self.reworded(rows, seed)
        return self.tokenised(rows)

    def reworded(self, rows: texts.Texts, seed: int) -> texts.Texts:
        """Single sentences with a reworded copy of each as its positive."""
        if len(rows.columns) > 1:
            raise InputError(
                f"{rows.name} has positives of its own: rewording makes them of single sentences, leave it out"
            )
        anchor = rows.columns["anchor"]
        generator = torch.Generator().manual_seed(seed)
        positive = reword(anchor, str(self.rewording), generator, rate=self.rewording_rate)
        return replace(rows, columns={"anchor": anchor, "positive": positive})

    def tokenised(self, rows: texts.Texts) -> texts.Sentences:
        """The rows as items to train on."""
        return texts.tokenise(rows, self.encoder.tokenizer, self.max_length, words=self.reads_words)

    def used(self, rows: texts.Texts) -> texts.Texts:
        """The rows as this method trains on them."""
        return rows.single() if rows.score is not None or (rows.classes and len(rows.columns) > 1) else rows

    def encode(self, data: Any, *, split: str = "train", batch_size: int = 128) -> np.ndarray:
        """Embeddings float32 [N, D] of sentences (of a table's first column), one for each row of the data.

        Args:
            data: whatever `counterpoint.data.texts.load` takes.
            split: which part of a known set.
            batch_size: sentences per forward pass.
        """
        if not isinstance(data, texts.Sentences):
            anchors = texts.Texts({"anchor": texts.load(data, split, whole=True).columns["anchor"]})
            data = texts.tokenise(anchors, self.encoder.tokenizer, self.encoder.max_length)
        return super().encode(data, batch_size=batch_size)

    def loss(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        query, key, *negatives = self.project(*columns(self.with_mined(batch)))
        return self.contrast(query, key, negatives)

    # ---- mined negatives --------------------------------------------------------------------------------------------

    def grouping(self, epoch: int, items: Any) -> Tensor | None:
        """Batches stay random; but here, before each epoch, is where all sentences are at hand and lists may be due."""
        if self.mined is not None:
            self.items = items
            if self.mined.due("epochs", epoch):
                self.mine(epoch)
        return None

    def after_step(self) -> None:
        if self.mined is not None:
            self.mined.steps += 1
            if self.mined.choice.unit == "steps" and self.mined.due("steps", int(self.mined.steps)):
                self.mine(int(self.mined.steps))

    def mine(self, now: int) -> None:
        """Embed all sentences with the present encoder, and list what is near to each."""
        assert self.mined is not None
        items = self.items
        sides = [replace(items, ids={"anchor": rows}, words=None) for rows in [*items.ids.values()][:2]]
        vectors = [self._rows(self.embed, side, "train", 256) for side in sides]
        self.mined.refresh(vectors[0], vectors[1] if len(vectors) > 1 else None, now, items.domain)

    def with_mined(self, batch: Batch) -> Batch:
        """The batch with columns of mined negatives behind its own, once there are any."""
        rows = None if self.mined is None else self.mined.draw(batch["index"])
        if rows is None:
            return batch
        found, place = dict(batch), self.items.ids.get("positive", self.items.ids["anchor"])
        for name in ("input_ids", "attention_mask"):
            found.setdefault(f"positive_{name}", batch[name])
        for number, column in enumerate(rows.unbind(1)):
            ids, mask = place.padded(column.to(place.flat.device), self.items.pad)
            found |= {f"mined_{number}_input_ids": ids, f"mined_{number}_attention_mask": mask}
        return self.to_device(found)

    def project(self, *sentences: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """[B, D] for each (ids, mask) [B, L], all in one pass."""
        z = self.head(self.encoder.pooled(*stack(list(sentences), self.encoder.pad)))
        return z.tensor_split(len(sentences))

    def contrast(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Sequence[Tensor] = (),
        earlier: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The objective, with hard negatives [B, D] of the batch and keys [K, D] of earlier ones where there are any.

        `options` are further ones of the objective.
        """
        # given negatives as further keys, so that they too meet the queries of every process
        pairs = contrast.Pairs.under(self.objective, query, torch.cat([key, *negatives]), negatives=earlier)
        pairs = self.mixing(pairs, self.current_epoch)
        self.watch(query, key, pairs)
        return self.heads(pairs, self.objective, temperature=self.temperature, **options)


def columns(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(ids, mask) of anchor, positive and further columns; a sentence without a positive is its own."""
    prefixes = [name.removesuffix("input_ids") for name in batch if name.endswith("input_ids")]
    found = [(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]) for prefix in prefixes]
    return found * 2 if len(found) == 1 else found


def takes_negatives(objective: contrast.Objective) -> bool:
    return {"positives", "negatives"} <= inspect.signature(objective).parameters.keys()
