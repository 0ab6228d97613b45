"""Augmentation for parameter-efficient tuning: few weights, few examples, changed copies of them, and a contrast that holds
classes together."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint import contrast
from counterpoint.contrast.operands import reduce
from counterpoint.data import texts
from counterpoint.encoders.tuned import Tuning, tuned
from counterpoint.errors import InputError
from counterpoint.memory.labels import mixed_up
from counterpoint.methods.language.fine_tuning_text import FineTuningText
from counterpoint.train.method import Batch
from counterpoint.views.text import stack
from counterpoint.views.translation import round_trip
from counterpoint.views.words import EDA, Similar, core, looked_up, neighbours, synonyms_of


class PEFTAugmentation(FineTuningText):
    r"""Prefix tuning or LoRA on originals and changed copies, and supervised contrast of their vectors.

    .. math::
        L = (1 - \mu)\, \mathrm{CE} + \mu\, \frac1M \sum_i \frac{-1}{\max(|P_i|, 1)} \sum_{p \in P_i}
        \log \frac{e^{z_i \cdot z_p / \tau}}{\sum_{a \ne i} e^{z_i \cdot z_a / \tau}}

    The encoder is frozen but for a prefix in each layer, or low-rank updates of query and value; the classifier learns. Each
    example of a batch comes with one of its copies, drawn anew each time: easy data augmentation (words replaced, inserted,
    swapped, deleted), or the sentence translated there and back. z are the unit vectors of all M originals and copies;
    :math:`P_i` are those of the same class. Mixup mixes vectors before the classifier, with their labels; the contrast sees them
    unmixed.

    The paper: augmentation helps parameter-efficient tuning with little data, but not always, and harms larger models on harder
    tasks; prefixes separate the classes of changed text less well than fine-tuning does, which a contrast repairs.

    When to use it: with 50 to 1,000 labelled texts, or where one encoder shall serve many tasks with a few weights for each.
    Rates are higher than for fine-tuning: 1e-3 to 1e-2.
    ``counterpoint train peft-augmentation --data few.csv --lr 5e-3 --epochs 50``.
    LoRA exports as an ordinary encoder; a prefix cannot.

    Defaults: prefix of 40 (P-tuning v2's script for BERT on BoolQ; 128 for RoBERTa on RTE) with dropout 0.1 and without
    reparameterisation; there AdamW at 5e-3, batch 32, 100 epochs. Assumed: rank 8 and alpha 16 of LoRA (5e-4 is usual),
    :math:`\mu` 0.5, :math:`\tau` 0.1, 0.4 for mixup. EDA as released: 9 copies at alpha 0.1.

    Where codes differ: there is none of the paper, and it could not be read beyond its abstract; parts follow their own
    releases. That its "simple contrastive loss" is supervised is assumed; ``positives="example"`` pulls an example to its copy
    alone. EDA's authors append all copies to the data; here an example and a copy share a batch, so that every anchor has a
    positive, and each step costs twice. Positions of a text start behind the prefix, as released.

    Source: Obadinma, Guo and Zhu 2023, "Effectiveness of Data Augmentation for Parameter Efficient Tuning with Limited Data"
    (arXiv 2303.02577); THUDM/P-tuning-v2 at b1520c9, jasonwei20/eda_nlp at 04ab29c, HobbitLong/SupContrast at 66a8fe5; Hu et
    al. 2022 (arXiv 2106.09685).

    Args:
        tuning: "prefix", "lora", "head" (the classifier alone) or "full".
        prefix_length: places of the prefix; so many fewer tokens fit.
        prefix_dropout: of the prefix.
        rank: of LoRA's updates.
        alpha: LoRA's updates count alpha / rank.
        targets: linear layers that LoRA updates, by name; none takes query and value.
        augment: where copies come from: "eda", "translation", both, or nothing.
        eda: its options.
        translation: "MODEL+MODEL", there and back, or "module:function" of your own; see `counterpoint.views.translation`.
        mixup: a of Beta(a, a), from which each row's share is drawn; 0 mixes nothing.
        mu: weight of the contrast; 0 is none.
        weighting: "convex" as above, or "sum": CE + mu times the contrast.
        temperature: of the contrast.
        positives: of an anchor: all of its "class", or copies of the same "example".
        **fine_tuning: as in FineTuningText.
    """

    table: Tensor | None

    def __init__(
        self,
        tuning: Tuning = "prefix",
        prefix_length: int = 40,
        prefix_dropout: float = 0.1,
        rank: int = 8,
        alpha: float = 16.0,
        targets: tuple[str, ...] = (),
        augment: tuple[Literal["eda", "translation"], ...] = ("eda",),
        eda: EDA = EDA(),  # noqa: B008 (frozen)
        translation: str | None = None,
        mixup: float = 0.0,
        mu: float = 0.5,
        weighting: Literal["convex", "sum"] = "convex",
        temperature: float = 0.1,
        positives: Literal["class", "example"] = "class",
        **fine_tuning: Any,
    ):
        if not {*augment} <= {"eda", "translation"} or ("translation" in augment) != (translation is not None):
            raise InputError(
                f"copies are made by eda and translation, the latter by a named one, not by {augment}, {translation}"
            )
        if weighting not in ("convex", "sum") or positives not in ("class", "example"):
            raise InputError(
                f'weighting is convex or sum, positives class or example, not "{weighting}" and "{positives}"'
            )
        if mixup < 0 or mu < 0 or (weighting == "convex" and mu > 1) or not temperature > 0:
            raise InputError(
                f"mixup, mu (at most 1 if convex) and temperature are positive, not {mixup}, {mu}, {temperature}"
            )
        if positives == "example" and mu and not augment:
            raise InputError("an example is its own positive only with copies: give augment, or take positives class")
        super().__init__(**fine_tuning)
        options: dict[str, Any] = {"length": prefix_length, "dropout": prefix_dropout, "rank": rank, "alpha": alpha}
        segments = self.encoder.segments
        self.encoder = tuned(self.encoder, tuning, targets=targets, **options)
        self.encoder.segments = segments
        if self.max_length > self.encoder.positions:
            raise InputError(
                f"behind the prefix there is room for {self.encoder.positions} tokens, max_length is {self.max_length}"
            )
        self.augment, self.eda, self.translation = augment, eda, translation
        self.mixup, self.mu, self.temperature, self.positives = mixup, mu, temperature, positives
        self.rest = 1 - mu if weighting == "convex" else 1.0
        self.copies: texts.Ragged | None = None
        # neighbours must be the same after a stop, when a table that learns has moved on
        moves = tuning == "full" and "eda" in augment and eda.needs_similar and eda.synonyms is None
        self.register_buffer("table", self.embeddings.detach().clone() if moves else None)

    @property
    def embeddings(self) -> Tensor:
        return self.encoder.model.get_input_embeddings().weight

    # ---- copies -----------------------------------------------------------------------------------------------------

    def training_items(self, data: Any, *, limit: int | None = None, seed: int = 0) -> texts.Sentences:
        items = super().training_items(data, limit=limit, seed=seed)
        self.copies, self.draws = None, torch.Generator().manual_seed(seed)
        if "eda" in self.augment:
            self.similar_to([])  # what cannot be had is said now, and not in the middle of the training
        self.there_and_back = None if self.translation is None else round_trip(self.translation)
        return items

    def grouping(self, epoch: int, items: Any) -> Tensor | None:
        if self.augment and self.copies is None:  # after a stop they are made again, the same
            self.copies = self.made()
        return super().grouping(epoch, items)

    def made(self) -> texts.Ragged:
        """Token ids of all copies of the training's rows, those of a row one after the other; pairs change side by side."""
        assert self.trained is not None
        columns = {}
        for part, sentences in self.trained.columns.items():
            copies: list[list[str]] = [[] for _ in sentences]
            if "eda" in self.augment:
                similar = self.similar_to(sentences)
                copies = [self.eda(sentence, similar, self.draws) for sentence in sentences]
            if self.there_and_back is not None:
                copies = [[*own, new] for own, new in zip(copies, self.there_and_back(sentences), strict=True)]
            columns[part] = [copy for own in copies for copy in own]
        return self.tokens(texts.Texts(columns, name="copies"), self.max_length).ids["anchor"]

    def similar_to(self, sentences: Sequence[str]) -> Similar:
        if self.eda.synonyms is not None:
            return looked_up(synonyms_of(self.eda.synonyms))
        if not self.eda.needs_similar:
            return looked_up({})
        words = [core(word) for sentence in sentences for word in sentence.split()]
        table = self.embeddings if self.table is None else self.table
        return looked_up(neighbours(words, self.encoder.tokenizer, table))

    def drawn(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, L] of a random copy of each of the rows int64 [B]."""
        assert self.copies is not None and self.trained is not None
        count = (len(self.copies.offsets) - 1) // len(self.trained)
        at = index * count + torch.randint(count, index.shape, device=index.device)
        ids, mask = self.copies.padded(at.cpu(), self.encoder.pad)
        return ids.to(index.device), mask.to(index.device)

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        rows = [(batch["input_ids"], batch["attention_mask"])]
        if self.copies is not None:
            rows.append(self.drawn(batch["index"]))
        vectors, terms = self.passed(*stack(rows, self.encoder.pad))
        target = torch.cat([self.wanted(batch)] * len(rows))
        views = vectors.unflatten(0, (len(rows), -1)).transpose(0, 1)
        if len(rows) == 2:
            self.watch(*views.unbind(1))
        mixed, mixture = mixed_up(vectors, target, self.classes, self.mixup) if self.mixup else (vectors, target)
        found = {"cross entropy": self.rest * self.cross_entropy(self.scores(mixed), mixture), **terms}
        if self.mu:
            same = batch["index"] if self.positives == "example" else classes_of(target)[: len(views)]
            near = contrast.sup_con(views, same, temperature=self.temperature, reduction="none")
            found["contrast"] = self.mu * reduce(near, "mean")  # anchors without a positive count, as 0
        return found


def classes_of(target: Tensor) -> Tensor:
    """int64 [N] from classes or shares of them."""
    return target if target.ndim == 1 else target.argmax(1)
