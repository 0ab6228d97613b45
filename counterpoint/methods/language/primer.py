"""Input-label contrast: a text against the names of its labels, which one encoder reads both (entry 7, a survey)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from counterpoint import contrast
from counterpoint.contrast.operands import unit
from counterpoint.data import texts
from counterpoint.encoders.scorers import Scorer, scorer
from counterpoint.errors import InputError
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.train.method import Batch

COLDEST = 0.01


class InputLabel(SimCSE):
    r"""A text is to go with the names of its labels, and not with those of others; new labels then need a name alone.

    .. math::
        \ell_i = -\sum_{p \in P_i} \log \sigma(l_{ip}) - \sum_{k \in N_i} \log \sigma(-l_{ik}), \qquad
        l_{ij} = \frac{s(f(x_i), f(y_j)) - \theta}{\tau}

    Contrast of two texts needs a way to change a text and keep its meaning, which one wrong word ends. A text and its labels need
    none. The names y of the labels go through the encoder f of the texts x, so that a label is a place among texts and no
    row of a classifier: labels that nobody trained on are scored like the others (zero-shot), and rare ones borrow from
    what their names mean. Each label is a question of its own (binary NCE), so that a text may have none, one or several.

    When to use it: texts with labels whose names say what they mean, above all with few texts a label, with rare labels, or
    with labels still to come. With thousands of texts a label and no new ones a classifier is as good. `score_labels` scores
    any names, and the protocol `zero-shot-text` measures it. Data: a table with a column of texts and a column ``label`` (or
    ``labels``, with | between).

    Defaults: ours, where the survey names no number: cosines, threshold 0.3 and temperature 0.1, both learned; all labels of
    the training are negatives of texts that do not have them. The survey reports 0.05 to 0.1 of temperature for texts.

    Where codes differ: the paper is a survey, without code. The objective is the one that it calls input-label contrast, with the
    encoder shared by both sides; its text could not be read in full, and formulas here are the standard ones. CLESS, which it
    builds on, scores by a small network (``scorer="match"``) and takes words of the text itself as pseudo-labels.

    With ``label_texts=False`` every label has a vector of its own, drawn at random, in the place of its name: with
    ``objective="ranking"`` the softmax classifier to compare with. It cannot score a new label.

    Source: Rethmeier and Augenstein 2023, "A Primer on Contrastive Pretraining in Language Processing" (ACM Computing Surveys
    55(10); arXiv 2102.12982); Rethmeier and Augenstein 2020 (CLESS, arXiv 2010.01061).

    Args:
        labels: names of the labels that training may use; texts of any other are left out of it. () takes all that the data have.
        objective: of the scores: "binary", "ranking" (a softmax over one positive and the negatives) or "triplet".
        scorer: "cosine", "dot", "distance", "bilinear", or "match", a small network; see `counterpoint.encoders.scorers`.
        negatives: labels drawn for each text at each step; None takes all that it does not have.
        sampling: of these: "uniform", or by the "frequency" of the labels among the training texts.
        correction: subtract log(K q), q the probability of that draw: NCE proper, whose sigmoids are probabilities. Without,
            scores are relative to the draw (negative sampling).
        template: sentence that a name is set into, with {} where it goes.
        label_texts: False gives each label a vector of its own; needs `labels`.
        threshold: theta at the start, the score from which a label is as likely as not; learned.
        temperature: tau at the start; learned, and never below 0.01.
        head: a train-only linear layer with tanh over texts and labels.
        **simcse: as in SimCSE; its further parts (mixing, heads) do not apply.
    """

    uses_labels = True
    reads_pairs = False
    vectors: nn.Parameter | None

    def __init__(
        self,
        labels: tuple[str, ...] = (),
        objective: Literal["binary", "ranking", "triplet"] = "binary",
        scorer: Scorer = "cosine",
        negatives: int | None = None,
        sampling: Literal["uniform", "frequency"] = "uniform",
        correction: bool = False,
        template: str = "{}",
        label_texts: bool = True,
        threshold: float = 0.3,
        temperature: float = 0.1,
        head: bool = False,
        **simcse: Any,
    ):
        if simcse.get("mixing") or simcse.get("heads"):
            raise InputError("mixing and several heads change pairs of texts: input-label contrast has none")
        if not temperature >= COLDEST:
            raise InputError(f"temperature must be {COLDEST} or more, not {temperature}")
        if negatives is not None and negatives < 1:
            raise InputError(f"negatives must be 1 or more, not {negatives}: leave it out for all labels")
        if sampling not in ("uniform", "frequency"):
            raise InputError(f'sampling must be "uniform" or "frequency", not "{sampling}"')
        if "{}" not in template:
            raise InputError(f'the template "{template}" does not name the label: write {{}} where its name belongs')
        if not label_texts and len(labels) < 2:
            raise InputError("vectors in the place of names need to know the labels: give labels")
        if len(set(labels)) < len(labels):
            raise InputError(f"each label can be named once, not {', '.join(labels)}")
        super().__init__(head=head, temperature=temperature, **simcse)
        self.objective = contrast.scored_objective(objective)
        self.labels, self.template = tuple(labels), template
        self.drawn, self.sampling, self.correction = negatives, sampling, correction
        self.scorer = build_scorer(scorer, self.encoder.dim)
        self.threshold = nn.Parameter(torch.tensor(float(threshold)))
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))  # type: ignore[assignment]
        vectors = None if label_texts else nn.Parameter(unit(torch.randn(len(self.labels), self.encoder.dim)))
        self.register_parameter("vectors", vectors)
        self.log_noise: Tensor | None = None  # of the labels, in the order of `labels`

    # ---- data -------------------------------------------------------------------------------------------------------

    def training_items(self, data: Any, *, limit: int | None = None, seed: int = 0) -> texts.Sentences:
        """Texts with the labels that training may use; texts of any other label, or of none, are left out."""
        items = self.read(data) if not isinstance(data, texts.Sentences) else data
        if items.class_of is None:
            raise InputError(f"{items.name} has no labels: add a column label with the name of each text's label")
        counts = items.class_of[items.class_of >= 0].bincount(minlength=len(items.classes))
        there = [name for name, count in zip(items.classes, counts.tolist(), strict=True) if count]
        if not self.labels:
            self.labels = tuple(there)
            self.arguments |= {"labels": self.labels}  # the run must say which labels it was trained on
        if unknown := [name for name in self.labels if name not in there]:
            raise InputError(f"no text of {items.name} has the label {unknown[0]}; there are {', '.join(there)}")
        if len(self.labels) < 2:
            raise InputError(f"{items.name} has one label, {', '.join(there)}: there is nothing to tell apart")
        number = torch.tensor([self.labels.index(x) if x in self.labels else -2 for x in items.classes])
        class_of = torch.where(items.class_of >= 0, number[items.class_of.clamp(min=0)], -1)
        kept = ((class_of[:, 0] >= 0) & (class_of > -2).all(1)).nonzero()[:, 0]
        items = replace(items, class_of=class_of, classes=self.labels).subset(kept)
        items = super().read(items, limit=limit, seed=seed)
        assert items.class_of is not None
        often = items.class_of[items.class_of >= 0].bincount(minlength=len(self.labels)).float()
        share = torch.ones_like(often) if self.sampling == "uniform" else often.clamp(min=1)
        self.log_noise = (share / share.sum()).log()
        return items

    # ---- training ---------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Tensor:
        (text,) = self.project((batch["input_ids"], batch["attention_mask"]))
        positive = self.marked(batch["label"])
        counted = positive | self.negatives_of(positive)
        # of many labels only those are read that some text of the batch needs
        used = counted.any(0).nonzero()[:, 0]
        scores = self.scores(text, self.label_vectors(used))
        options = {"log_noise": self.noise[used]} if self.correction else {}
        return self.objective(scores, positive[:, used], ignore=~counted[:, used], **options)

    def marked(self, label: Tensor) -> Tensor:
        """bool ``[B, C]`` from the numbers of each text's labels ``[B, P]``, -1 filling up."""
        found = torch.zeros(len(label), len(self.labels) + 1, dtype=torch.bool, device=label.device)
        return found.scatter_(1, label.remainder(len(self.labels) + 1), True)[:, :-1]

    def negatives_of(self, positive: Tensor) -> Tensor:
        """bool ``[B, C]``: the labels that each text is contrasted with, drawn among those that it does not have."""
        if self.drawn is None or self.drawn >= len(self.labels):
            return ~positive
        gumbel = -(-torch.rand(positive.shape, device=positive.device).clamp(min=1e-20).log()).log()
        order = (self.noise + gumbel).masked_fill(positive, -torch.inf).argsort(1, descending=True)
        chosen = torch.zeros_like(positive).scatter_(1, order[:, : self.drawn], True)
        return chosen & ~positive

    @property
    def noise(self) -> Tensor:
        """Log-probability ``[C]`` with which each label is drawn."""
        assert self.log_noise is not None
        return self.log_noise.to(self.device)

    def label_vectors(self, at: Tensor) -> Tensor:
        """Vectors ``[U, d]`` of the labels at `at`: of their names, or their own."""
        if self.vectors is not None:
            return self.vectors[at]
        ids, mask = self.tokens([self.labels[i] for i in at.tolist()])
        (vectors,) = self.project((ids, mask))
        return vectors

    def tokens(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of names in their sentence."""
        said = texts.Texts({"anchor": [self.template.replace("{}", name) for name in names]}, name="labels")
        rows = texts.tokenise(said, self.encoder.tokenizer, self.encoder.max_length)
        ids, mask = rows.ids["anchor"].padded(torch.arange(len(names)), rows.pad)
        return ids.to(self.device), mask.to(self.device)

    def scores(self, text: Tensor, label: Tensor) -> Tensor:
        """Logits ``[B, U]``."""
        with torch.autocast(text.device.type, enabled=False):
            return (self.scorer(text.float(), label.float()) - self.threshold) / self.temperature

    def after_step(self) -> None:
        with torch.no_grad():
            self.temperature.clamp_(min=COLDEST)  # type: ignore[attr-defined]

    # ---- use --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score_labels(self, data: Any, labels: Sequence[str], *, batch_size: int = 128) -> np.ndarray:
        """How well each text goes with each label, also with labels that training never saw: float32 ``[N, C]``.

        Scores are logits: under ``objective="binary"`` with `correction` their sigmoids are probabilities.

        Args:
            data: texts, whatever `encode` takes.
            labels: their names. A method without label texts gives -inf to those that it does not know.
            batch_size: texts per forward pass.
        """
        training = self.training
        self.eval()
        try:
            pooled = torch.from_numpy(self.encode(data, batch_size=batch_size)).to(self.device)
            if self.vectors is None:
                label = self.head(self.encoder.pooled(*self.tokens(labels)))
            else:
                label = self.vectors[[self.labels.index(name) if name in self.labels else 0 for name in labels]]
            found = torch.cat([self.scores(self.head(part), label) for part in pooled.split(1024)]).cpu().numpy()
        finally:
            self.train(training)
        if self.vectors is not None:
            found[:, [name not in self.labels for name in labels]] = -np.inf
        return found


build_scorer = scorer
"""The function of that name, whose place an argument takes inside the constructor."""
