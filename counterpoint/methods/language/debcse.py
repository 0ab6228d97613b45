"""DebCSE: pairs chosen against the biases of the rules that usually make them."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from counterpoint.contrast.balanced import balanced_info_nce
from counterpoint.contrast.distributed import gather_plain
from counterpoint.contrast.propensity import InversePropensity
from counterpoint.data import texts
from counterpoint.data.surface import SURFACES, Surface, numbered_words
from counterpoint.encoders import TextEncoder
from counterpoint.errors import InputError
from counterpoint.memory import MomentumEncoder
from counterpoint.memory.candidates import Pools, Sampler, VariedSentences, make_pools
from counterpoint.methods.language.simcse import SimCSE, columns
from counterpoint.train.method import Batch
from counterpoint.train.start import earlier_encoder, take_over
from counterpoint.views.words import reword

Rewording = Literal["repeat", "delete", "swap"]


class DebCSE(SimCSE):
    r"""SimCSE whose positives and negatives are drawn from pools of candidates by inverse propensity.

    .. math::
        \ell_i = -\frac{\cos(z_i, z_i^+)}{\tau} + \log \Big( \sum_j e^{\cos(z_i, z_j^+)/\tau}
        + \sum_j \sum_m e^{\cos(z_i, z_{jm}^-)/\tau} \Big), \qquad
        P^\pm(c \mid x) \propto \frac{\mathbb 1[\pm s_{sem} \ge \pm\theta^\pm]\, e^{\pm s_{sem}(x, c)/t_s}}{e^\pm(x, c)}

    A sentence under dropout is a positive of equal length with equal words, and random negatives share no word with it: an
    encoder may learn length and words in place of meaning. A rule prefers its pairs for how they look, so each candidate c
    of a sentence x gets a propensity from its surface similarity, :math:`e^+ = \sigma((s_{sur} - \mu_x)/t_p)` and
    :math:`e^- = 1 - e^+`, and counts by the inverse: among candidates that a teacher finds alike those are preferred that look
    different, among those it finds different those that look alike. The pool of x is its K nearest neighbours under
    the teacher, x itself under dropout, and reworded copies of x. Only x itself is left where no other candidate is near
    enough. Pairs of the batch that the teacher finds too alike do not repel each other.

    When to use it: on sentences that have paraphrases and near misses among each other, which the sampler can find; when
    ``sts-b-overlap-bias`` or ``sts-b-length-bias`` show that words or lengths stand in for meaning. Of a few thousand
    unrelated sentences it makes SimCSE. The teacher: the encoder of an earlier run with ``--start runs/simcse-1`` (training goes
    on from there), or, without, the encoder as `teacher_epochs` of plain SimCSE leave it.

    Defaults: ours, all of them but the recipe's: batch 64, AdamW at 3e-5, temperature 0.05 are SimCSE's. Thresholds are
    shares of the similarities in all pools, since cosines of two teachers cannot be compared: positives above 0.99, negatives
    below 0.6, false negatives above 0.995; ``thresholds="cosine"`` takes them as cosines (0.75, 0.45 and 0.85, say).

    Where codes differ: no code is public, and of the paper only the abstract could be read. Inverse propensity weighting by
    surface similarity is the paper's; each formula for it here is our reading, and each can be changed or left out. `balance`
    is a guess at the "alternate normalised" loss that the paper is said to have. The loss is SimCSE's with hard negatives.

    Source: Miao, Du and Zhang 2023, "DebCSE: Rethinking Unsupervised Contrastive Sentence Embedding Learning in the
    Debiasing Perspective" (CIKM; arXiv 2309.07396), abstract.

    Args:
        start: run folder, or exported encoder, that is the teacher and where training starts from.
        teacher_epochs: epochs of plain SimCSE at the start of the training, after which the encoder is the teacher; None: 1
            without `start`, else none.
        refresh: epochs after which the present encoder becomes the teacher and pools are made anew; 0 keeps the first.
        pool: K, neighbours in a pool.
        shard: sentences among which neighbours are looked for, exactly; random parts of this size of more sentences.
        surface: how alike two sentences look: "jaccard", "edit", "rouge-l", or "overlap" (the mean of the first two).
        rewordings: the copies of x in its pool: "repeat", "delete" and "swap" words.
        debias: False leaves the propensities out: pairs are chosen by meaning alone.
        hard_negatives: M, drawn for each sentence; 0 for none.
        thresholds: whether the next three are shares ("quantile") or "cosine"s.
        positive_from: least similarity of a positive.
        negative_to: largest similarity of a hard negative.
        false_from: least similarity of a pair that is not repelled; None repels all.
        duplicate: surface similarity above which a candidate is no positive (x itself remains the last resort); 1 lets copies in.
        sharpness: t_p of the propensity.
        meaning_temperature: t_s.
        floor: least propensity.
        most_weight: largest inverse propensity.
        balance: rounds of `counterpoint.contrast.balanced.balanced_info_nce` in the place of InfoNCE.
        **simcse: as in SimCSE.
    """

    reads_pairs = False

    def __init__(
        self,
        start: str | None = None,
        teacher_epochs: int | None = None,
        refresh: int = 0,
        pool: int = 100,
        shard: int = 50_000,
        surface: Surface = "overlap",
        rewordings: tuple[Rewording, ...] = ("repeat", "delete", "swap"),
        debias: bool = True,
        hard_negatives: int = 1,
        thresholds: Literal["quantile", "cosine"] = "quantile",
        positive_from: float = 0.99,
        negative_to: float = 0.6,
        false_from: float | None = 0.995,
        duplicate: float = 0.95,
        sharpness: float = 0.1,
        meaning_temperature: float = 0.05,
        floor: float = 0.05,
        most_weight: float = 10.0,
        balance: int = 0,
        **simcse: Any,
    ):
        earlier = None
        if start is not None:
            earlier = earlier_encoder(start, TextEncoder)
            if "encoder" not in simcse:
                depth = earlier.model.config.num_hidden_layers
                simcse |= {"encoder": earlier.name, "pooling": earlier.pooling, "layers": depth}
        super().__init__(**simcse)
        teacher_epochs = int(start is None) if teacher_epochs is None else teacher_epochs
        self.arguments |= {**simcse, "teacher_epochs": teacher_epochs}  # when the earlier run is gone
        if min(teacher_epochs, refresh, hard_negatives, balance) < 0 or pool < 1 or shard < 2:
            raise InputError("teacher_epochs, refresh, hard_negatives and balance cannot be negative, nor a pool empty")
        if hard_negatives > pool:
            raise InputError(f"a pool of {pool} has no {hard_negatives} hard negatives")
        if surface not in SURFACES or thresholds not in ("quantile", "cosine"):
            raise InputError(f'surface is one of {", ".join(SURFACES)} and thresholds "quantile" or "cosine"')
        if unknown := [name for name in rewordings if name not in get_args(Rewording)]:
            raise InputError(f'no rewording named "{unknown[0]}"; there are {", ".join(get_args(Rewording))}')
        if negative_to >= positive_from:
            raise InputError(
                f"positive_from ({positive_from}) must lie above negative_to ({negative_to}): no sentence is both"
            )
        shares = [share for share in (positive_from, negative_to, false_from) if share is not None]
        if thresholds == "quantile" and not all(0 <= share <= 1 for share in shares):
            raise InputError(f'shares lie between 0 and 1, not {shares}: say thresholds="cosine" if cosines are meant')
        if false_from is not None and (self.mixing.parts or simcse.get("heads")):
            raise InputError("mixing and several heads know no false negatives: set false_from to None beside them")
        self.teacher_epochs, self.refresh, self.pool, self.shard = teacher_epochs, refresh, pool, shard
        self.surface, self.rewordings, self.negatives = surface, rewordings, hard_negatives
        self.weights = InversePropensity(debias, sharpness, meaning_temperature, floor, most_weight)
        self.thresholds, self.positive_from, self.negative_to = thresholds, positive_from, negative_to
        self.false_from, self.duplicate = false_from, duplicate
        if balance:
            self.objective = partial(balanced_info_nce, rounds=balance)
        if earlier is not None:
            take_over(self.encoder, earlier)
        self.teacher = MomentumEncoder(self.encoder, momentum=0.0)
        self.taught: Tensor  # the epoch at whose start the teacher was taken
        self.register_buffer("taught", torch.tensor(-1))
        self.pools: Pools | None = None

    def on_train_start(self) -> None:
        epochs = self.trainer.max_epochs
        if epochs and epochs <= self.teacher_epochs:
            raise InputError(
                f"{self.teacher_epochs} of {epochs} epochs make the teacher, so that no pair would be drawn: give more epochs, "
                "or start from an earlier run"
            )

    # ---- the data ---------------------------------------------------------------------------------------------------

    def used(self, rows: texts.Texts) -> texts.Texts:
        return rows.single() if len(rows.columns) > 1 else rows

    def training_items(self, data: Any, *, limit: int | None = None, seed: int = 0) -> VariedSentences:
        """Sentences as tokens, each with its reworded copies, which `seed` decides."""
        if isinstance(data, texts.Sentences):
            if isinstance(data, VariedSentences):
                return data
            raise InputError("DebCSE rewords sentences: train it on sentences, not on tokens")
        rows = texts.load(self.used(texts.load(data)), limit=limit, seed=seed)
        sentences = [*rows.columns["anchor"]]
        generator = torch.Generator().manual_seed(seed)
        variants = [sentences, *(reword(sentences, name, generator) for name in self.rewordings)]
        every = texts.Texts({"anchor": [sentence for variant in variants for sentence in variant]}, name=rows.name)
        tokens = texts.tokenise(every, self.encoder.tokenizer, self.max_length)
        found = tokens.ids["anchor"]
        own = {"anchor": found.subset(torch.arange(len(sentences)))}
        words = numbered_words(every.columns["anchor"])[0]
        return VariedSentences(own, tokens.pad, name=rows.name, variants=found, words_of=words)

    def grouping(self, epoch: int, items: Any) -> None:
        """Batches stay random; but here, before each epoch, is where a teacher is taken and pools are made."""
        since = epoch - self.teacher_epochs
        if since < 0:
            self.pools = None
            return
        due = self.refresh > 0 and since % self.refresh == 0
        if (due or int(self.taught) < 0) and int(self.taught) != epoch:
            self.teacher.update(self.encoder)
            self.taught.fill_(epoch)
            self.pools = None
        if self.pools is None:  # after a stop they are made again: the teacher is in the checkpoint
            self.make_pools(items)

    def make_pools(self, items: VariedSentences) -> None:
        """Embed all sentences and copies with the teacher, find neighbours, compare how candidates look."""
        teacher: Any = self.teacher.module
        parts = [self._rows(teacher.embed, items.variant(v), "train", 256) for v in range(1 + items.copies)]
        vectors = [part.to(self.device) for part in parts]
        generator = torch.Generator().manual_seed(int(self.taught))
        options: dict[str, Any] = {"size": self.pool, "shard": self.shard, "measure": self.surface}
        self.pools, self.items = make_pools(items, vectors, **options, generator=generator), items
        at = self.pools.quantile if self.thresholds == "quantile" else float
        self.sampler = Sampler(self.weights, at(self.positive_from), at(self.negative_to), self.duplicate)
        self.least_false = None if self.false_from is None else at(self.false_from)

    def choose(self, index: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Rows of the variants that are drawn for the sentences ``[B]``: a positive ``[B]`` and negatives ``[B, M]``."""
        assert self.pools is not None
        return self.sampler.draw(self.pools, index, self.negatives, generator)

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Tensor:
        anchor = columns(batch)[0]
        if self.pools is None:
            query, key = self.project(anchor, anchor)
            return self.contrast(query, key)
        positive, negatives = self.choose(batch["index"])
        chosen = [positive, *negatives.unbind(1)]
        query, key, *others = self.project(anchor, *(self.tokens(rows) for rows in chosen))
        if self.least_false is None:
            return self.contrast(query, key, others)
        return self.contrast(query, key, others, ignore=self.false_negatives(batch["index"], chosen))

    def tokens(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        variants = self.items.variants
        assert variants is not None
        ids, mask = variants.padded(rows.to(variants.flat.device), self.items.pad)
        return ids.to(rows.device), mask.to(rows.device)

    def false_negatives(self, index: Tensor, chosen: Sequence[Tensor]) -> Tensor:
        """bool ``[B, keys of all processes]``: pairs whose sentences the teacher finds too alike to repel each other."""
        assert self.pools is not None and self.least_false is not None
        vectors = self.pools.vectors
        keys = gather_plain(vectors[torch.cat([*chosen]) % len(vectors)]).rows
        with torch.autocast(index.device.type, enabled=False):
            return vectors[index] @ keys.T >= self.least_false
