"""Fine-tuning on text: an encoder and a new classifier follow the labels of sentences, or of pairs of sentences."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from counterpoint.contrast.operands import reduce
from counterpoint.data import texts
from counterpoint.data.classes import numbered, with_unlabelled
from counterpoint.data.images import stratified
from counterpoint.encoders.perturbed import Sift
from counterpoint.encoders.text import Pooling, marks_pairs, text
from counterpoint.errors import InputError
from counterpoint.memory.labels import Refinement, Targets, Transduction
from counterpoint.train.method import Batch, Method
from counterpoint.train.start import earlier_text, take_over


class FineTuningText(Method):
    r"""All weights of a text encoder, and a linear classifier on its vector, follow the cross entropy of the labels.

    .. math:: \ell_i = -\sum_c y_{ic} \log \mathrm{softmax}(W f_i + b)_c \;[\,+\; w\, \ell^{\text{SiFT}}_i\,]

    The two sentences of a pair are read as one, [CLS] a [SEP] b [SEP], in which they can be compared word by word.

    Three of Vega's tricks are parts, to be combined as one likes. `sift`: the answers must not change when the embeddings move in
    the worst direction. `refinement`: after a share of the epochs, labels give way to what the model thinks, or are dropped.
    `transduction`: inputs without labels join under those the model is sure of. Each of the last two, and each further round,
    begins one more stage of the training, all of as many epochs, which are as long as those of the labelled rows alone; the
    model goes on rather than begins again, so that a training costs what plain fine-tuning of its length costs.

    When to use it: when texts have classes; after SimCSE or Vega on many texts of the domain, when some have labels. ::

        counterpoint train fine-tuning-text --data reviews.csv --classes '[bad, good]' --encoder bert-base-uncased
        counterpoint train fine-tuning-text --data rte --start runs/vega-1 --sift '{}' --transduction '{threshold: 0.9}'

    ``--held_out 0.1`` keeps a tenth of the rows for ``--validate 1 --patience 5``. Evaluation reports the classifier as
    ``fine-tune``: accuracy, F1 and Matthews correlation, and how far the classes lie apart; on inputs that the training saw
    without labels it says so. With few labels, or where only a small part of the weights shall be kept for each task, take
    peft-augmentation.

    Defaults: dropout 0.1 before the classifier, 128 tokens (GLUE's usual); rates of 1e-5 to 5e-5 with AdamW, linear decay and 3
    epochs are usual. SiFT as in DeBERTa's scripts. Threshold 0.9, one round and a share of 0.2 are assumed.

    Where codes differ: BERT's classifier reads its pretrained pooler, which text encoders here do not have: the vector is that of
    the first token, or the mean. Vega's report could not be read: what transduction and refinement are is our reading.

    Source: Devlin et al. 2019 (arXiv 1810.04805), section 4.1; Zhong et al. 2023 (arXiv 2302.09268).

    Args:
        encoder: as in SimCSE; None takes that of `start`, or bert-base-uncased.
        pooling: as in SimCSE; None takes that of `start`, or what suits the encoder.
        layers: keep only the encoder's first so many layers.
        max_length: tokens that a sentence or a pair is cut to.
        dropout: of the encoder; None keeps its own.
        classes: how many there are, numbered from 0; or their names, in the order of their numbers, where the data have words.
        start: run folder (or exported encoder) of an earlier training on text, whose encoder this one starts from.
        classifier_dropout: before the classifier.
        sift: perturbed embeddings; None is none.
        refinement: of the labels; None is none.
        transduction: inputs without labels; None is none.
        held_out: share of the rows, class by class, that training leaves for `validate` and for evaluation.
    """

    family = "sentences"
    uses_labels = True
    classification = "fine-tune"

    def __init__(
        self,
        encoder: str | dict[str, Any] | None = None,
        pooling: Pooling | None = None,
        layers: int | None = None,
        max_length: int = 128,
        dropout: float | None = None,
        classes: int | tuple[str, ...] = 2,
        start: str | None = None,
        classifier_dropout: float = 0.1,
        sift: Sift | None = None,
        refinement: Refinement | None = None,
        transduction: Transduction | None = None,
        held_out: float = 0.0,
    ):
        super().__init__()
        self.names = () if isinstance(classes, int) else tuple(classes)
        self.classes = classes if isinstance(classes, int) else len(self.names)
        if self.classes < 2 or len({*self.names}) < len(self.names):
            raise InputError(f"classes are two or more, each with a name of its own, not {classes}")
        if not (0 <= held_out < 1 and 0 <= classifier_dropout < 1):
            raise InputError(
                f"held_out and classifier_dropout lie between 0 and 1, not {held_out} and {classifier_dropout}"
            )
        earlier, given = None, {"encoder": encoder, "pooling": pooling, "layers": layers}
        if start is not None:
            earlier, given = earlier_text(start, **given)
        given["encoder"] = given["encoder"] or "bert-base-uncased"
        self.arguments |= given  # the run must say which encoder this is, also when the earlier one is gone
        choice: Any = given
        self.encoder = text(choice["encoder"], pooling=choice["pooling"], layers=choice["layers"], dropout=dropout)
        if earlier is not None:
            take_over(self.encoder, earlier)
        if not 3 <= max_length <= self.encoder.positions:
            raise InputError(f"max_length must lie between 3 and {self.encoder.positions}, not {max_length}")
        if self.encoder.fresh:  # it never learns what a later position means
            self.encoder.max_length = max_length
        self.encoder.segments = marks_pairs(self.encoder)
        self.max_length, self.held_out = max_length, held_out
        self.classifier = nn.Linear(self.encoder.dim, self.classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.dropout = nn.Dropout(classifier_dropout)
        self.sift, self.refinement, self.transduction = sift, refinement, transduction
        self.targets: Targets | None = None
        self.trained: texts.Texts | None = None

    # ---- data -------------------------------------------------------------------------------------------------------

    def rows(self, data: Any, split: str = "train", *, limit: int | None = None, seed: int = 0) -> texts.Texts:
        """The rows of `data` with classes as this method numbers them."""
        known = isinstance(data, texts.Texts) or (isinstance(data, str) and data.partition(":")[0] in texts.CLASSIFIED)
        rows = texts.load(data, split, limit=limit, seed=seed, classes=True)
        return numbered(rows, self.names, known=known)

    def read(
        self, data: Any, split: str = "train", *, limit: int | None = None, seed: int = 0, resident: bool | None = None
    ) -> texts.Sentences:
        """Sentences or pairs as tokens, with their classes; always in memory."""
        if isinstance(data, texts.Sentences):
            return data
        return self.tokens(self.rows(data, split, limit=limit, seed=seed), self.max_length)

    def tokens(self, rows: texts.Texts, max_length: int) -> texts.Sentences:
        if len(rows.columns) > 2:
            raise InputError(f"{rows.name} has {len(rows.columns)} sentences in a row, but a class is of one or of two")
        return texts.tokenise(rows, self.encoder.tokenizer, max_length, together=True)

    def parts(self, data: Any, *, limit: int | None = None, seed: int = 0) -> tuple[texts.Texts, texts.Texts]:
        """Rows that are trained on, and rows that are held out."""
        rows = self.rows(data, limit=limit, seed=seed)
        if not self.held_out or rows.first_class is None:
            return rows, rows.subset([])
        kept, held = stratified(torch.from_numpy(rows.first_class), self.held_out, seed)
        if not len(held):
            raise InputError(f"{rows.name} has {len(rows)} rows, too few to hold out a share of {self.held_out:g}")
        return rows.subset(kept.tolist()), rows.subset(held.tolist())

    def training_items(self, data: Any, *, limit: int | None = None, seed: int = 0) -> texts.Sentences:
        rows = self.parts(data, limit=limit, seed=seed)[0]
        labelled = len(rows)
        if self.transduction is not None and rows.classes:
            rows = with_unlabelled(rows, data, self.transduction.inputs)
        items, self.trained = self.tokens(rows, self.max_length), rows
        if len(rows) > labelled:  # an epoch is as long as it would be without the others
            items.repeats = (torch.arange(len(rows)) < labelled).long()
        if (self.transduction or self.refinement) and items.label is not None:
            known = items.label.clamp(max=self.classes - 1)  # that there are no others is checked later
            self.targets = Targets(known, self.classes, labelled, self.refinement, self.transduction)
        return items

    def whole(self, data: Any, split: str) -> texts.Sentences:
        """Every row of `data`, in order, without classes."""
        if isinstance(data, texts.Sentences):
            return data
        rows = texts.load(data, split, whole=True, classes=True)
        return self.tokens(replace(rows, class_of=None, classes=()), self.encoder.max_length)

    def encode(self, data: Any, *, split: str = "train", batch_size: int = 128) -> np.ndarray:
        """Embeddings float32 [N, D] of sentences or pairs, one for each row of the data."""
        return super().encode(self.whole(data, split), batch_size=batch_size)

    def classify(self, data: Any, *, split: str = "train", batch_size: int = 128) -> np.ndarray:
        """The class of every row, int64 [N]."""
        return super().classify(self.whole(data, split), batch_size=batch_size)

    # ---- training ---------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        vectors, terms = self.passed(batch["input_ids"], batch["attention_mask"])
        return {"cross entropy": self.cross_entropy(self.scores(vectors), self.wanted(batch)), **terms}

    def passed(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Vectors [B, D] of the rows, and the term that keeps answers smooth if there is one."""
        if self.sift is None:
            return self.encoder.pooled(ids, mask), {}
        seen: list[Tensor] = []

        def answer() -> Tensor:
            seen.append(self.encoder.pooled(ids, mask))
            return self.scores(seen[-1])

        smoothness = self.sift(self.encoder, answer)[1]
        return seen[0], {"smoothness": smoothness}

    def scores(self, vectors: Tensor) -> Tensor:
        return self.classifier(self.dropout(vectors))

    def cross_entropy(self, scores: Tensor, target: Tensor) -> Tensor:
        return reduce(nn.functional.cross_entropy(scores.float(), target, reduction="none"), "mean")

    def wanted(self, batch: Batch) -> Tensor:
        """What the rows are to be taken for: classes int64 [B], or shares of them [B, C]."""
        return batch["label"][:, 0] if self.targets is None else self.targets.of(batch["index"])

    def class_scores(self, batch: Batch) -> Tensor:
        return self.scores(self.embed(batch))

    # ---- stages -----------------------------------------------------------------------------------------------------

    def grouping(self, epoch: int, items: Any) -> Tensor | None:
        """Where a stage begins, the model looks at all rows and labels change; rows that take no part sit the epoch out."""
        if self.targets is None:
            return None
        if self.targets.due(epoch, self.trainer.max_epochs or 1):
            thought = self._rows(lambda batch: self.class_scores(batch).softmax(1), items, "train", 128)
            self.targets.change(thought)
        return torch.where(self.targets.used, 0, -1)

    def on_train_start(self) -> None:
        if self.targets is not None and (self.trainer.max_epochs or 1) < self.targets.stages:
            raise InputError(
                f"refinement and transduction make {self.targets.stages} stages, of an epoch at least, but there are "
                f"{self.trainer.max_epochs}: give more epochs"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.targets is not None:
            checkpoint["targets"] = self.targets.state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.targets is not None:
            self.targets.state = checkpoint["targets"]
