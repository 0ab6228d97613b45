"""ESimCSE: SimCSE whose positives differ in length and whose negatives come from earlier batches too."""

from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint.data import texts
from counterpoint.errors import InputError
from counterpoint.memory import MomentumEncoder, Queue
from counterpoint.methods.language.simcse import SimCSE, takes_negatives
from counterpoint.train.method import Batch
from counterpoint.views.text import MOST_REPEATS, repeat_tokens, repeat_words


class ESimCSE(SimCSE):
    r"""Unsupervised SimCSE that repeats a few tokens in one of the two copies, and keeps a queue of momentum keys.

    .. math::
        \ell_i = -\frac{\cos(z_i, z_i^+)}{\tau} + \log \Big( \sum_j e^{\cos(z_i, z_j^+)/\tau}
        + \sum_{q \in \text{queue}} e^{\cos(z_i, q)/\tau} \Big)

    SimCSE's two copies always have the same length, which position embeddings show, so the encoder learns that equal length
    means equal meaning. Saying some tokens twice breaks the cue. The queue holds embeddings of the original sentences by
    a slowly moving copy of the transformer without dropout; they pass through the present head.

    When to use it: instead of unsupervised SimCSE, above all when the lengths of your sentences vary. The queue matters
    less than the repetition and wants about two and a half batches.

    Defaults: BERT-base: repetition 0.32, queue 160, momentum 0.995, temperature 0.05, batch 64, AdamW at 3e-5 without
    warm-up, one epoch. RoBERTa: repetition 0.30 (base), 0.28 (large, with queue 128 and dropout 0.15), lr 1e-5.

    Where codes differ: the paper draws between 0 and max(2, int(0.32 N)) repeats inclusive, the code that trained the
    released models below min(10, int(0.32 N)); ours is the code's. There each sentence is repeated once, before its one epoch;
    here it is drawn anew whenever the sentence comes up. The code seems to copy the momentum transformer before the
    pretrained weights are loaded; ours starts from them.

    Source: Wu et al. 2022, "ESimCSE: Enhanced Sample Building Method for Contrastive Learning of Unsupervised Sentence
    Embedding" (COLING; arXiv 2109.04380); caskcsg/sentemb at 5eeec55.

    Args:
        repetition: what is said twice: "tokens", whole "words" (weaker in the paper), or "none".
        repeat_rate: share of the length below which the number of repeats is drawn.
        queue: number of keys kept; 0 for no queue.
        momentum: of the copy that makes the keys.
        **simcse: as in SimCSE.
    """

    reads_pairs = False

    def __init__(
        self,
        repetition: Literal["tokens", "words", "none"] = "tokens",
        repeat_rate: float = 0.32,
        queue: int = 160,
        momentum: float = 0.995,
        **simcse: Any,
    ):
        super().__init__(**simcse)
        if repetition not in ("tokens", "words", "none"):
            raise InputError(f'repetition is "tokens", "words" or "none", not "{repetition}"')
        if not 0 <= repeat_rate <= 1 or queue < 0:
            raise InputError(f"repeat_rate lies between 0 and 1 and queue is 0 or more, not {repeat_rate} and {queue}")
        longest = self.max_length + {"tokens": MOST_REPEATS - 1, "words": self.max_length, "none": 0}[repetition]
        if longest > self.encoder.positions:
            raise InputError(
                f"repetition makes {longest} tokens of up to {self.max_length}, but {self.encoder.name} takes "
                f"{self.encoder.positions}: lower max_length"
            )
        if queue and not takes_negatives(self.objective):
            raise InputError(f"a queue needs the objective info_nce; with {self.objective.__name__} set queue to 0")
        self.repetition, self.repeat_rate, self.reads_words = repetition, repeat_rate, repetition == "words"
        self.queue = Queue(self.heads.width, queue, start="empty", whole_first=True) if queue else None
        self.key_encoder = MomentumEncoder(self.encoder, momentum) if queue else None

    def used(self, rows: texts.Texts) -> texts.Texts:
        return rows.single() if len(rows.columns) > 1 else rows

    def on_train_epoch_start(self) -> None:
        if self.queue is not None:
            self.queue.clear()

    def loss(self, batch: Batch) -> Tensor:
        original = batch["input_ids"], batch["attention_mask"]
        query, key = self.project(original, self.repeated(batch))
        if self.queue is None or self.key_encoder is None:
            return self.contrast(query, key)
        loss = self.contrast(query, key, earlier=self.queue.keys)
        self.key_encoder.update(self.encoder)  # with the weights before this step's update, as released
        keys: Any = self.key_encoder.module.eval()
        with torch.no_grad():
            self.queue.enqueue(self.head(keys.pooled(*original)))
        return loss

    def repeated(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(ids, mask) of the second copy."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        match self.repetition:
            case "tokens":
                return repeat_tokens(ids, mask, rate=self.repeat_rate)
            case "words":
                return repeat_words(ids, mask, batch["words"], rate=self.repeat_rate)
        return ids, mask
