"""Images and what people say about them: the pairs, and the items a method trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from counterpoint.data import images, texts
from counterpoint.data.images import ImageFiles, Images
from counterpoint.errors import InputError


@dataclass
class Pairs:
    """Images and what people say about them.

    Args:
        images: in memory, or decoded when asked for
        texts: the distinct captions
        captions: int64 [N, K], the captions of each image as places in `texts`, filled up with -1 at the end; two images
            with the same caption share its number
        name: where they come from
        skipped: (image, reason) of what was left out
    """

    images: Images | ImageFiles
    texts: tuple[str, ...]
    captions: Tensor
    name: str = "pairs"
    skipped: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.captions.dtype != torch.int64 or self.captions.ndim != 2 or len(self.captions) != len(self.images):
            form = f"{self.captions.dtype} {list(self.captions.shape)}"
            raise InputError(
                f"{self.name}: captions must be int64 [{len(self.images)}, K], one row an image, not {form}"
            )
        there = self.captions >= 0
        if not there[:, :1].all() or self.captions.shape[1] == 0 or (there[:, 1:] > there[:, :-1]).any():
            raise InputError(f"{self.name}: each image needs a caption, and -1 may only stand after the last one")
        if len(self) and int(self.captions.max()) >= len(self.texts):
            raise InputError(
                f"{self.name}: caption {int(self.captions.max())} is asked for, but there are {len(self.texts)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def label(self) -> Tensor | None:
        """int64 [N], class of each image where it is known."""
        return self.images.label

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, () where there are none."""
        return self.images.classes

    def of(self, index: int) -> list[str]:
        """The captions of one image."""
        return [self.texts[i] for i in self.captions[index].tolist() if i >= 0]

    def subset(self, index: Tensor | np.ndarray | Sequence[int] | slice) -> Pairs:
        """The images at `index` (positions, a boolean mask or a slice), in that order, and only their captions."""
        at = torch.arange(len(self))[index] if isinstance(index, slice) else torch.as_tensor(index)
        at = at.nonzero().flatten() if at.dtype == torch.bool else at.to(torch.int64)
        captions, strings = used(self.captions[at], self.texts)
        return replace(self, images=self.images.subset(at), texts=strings, captions=captions)

    def split(self, fraction: float = 0.2, seed: int = 0) -> tuple[Pairs, Pairs]:
        """(train, test): a fixed random `fraction` of the images is held out, from every class alike if labels are known."""
        train, test = images.split_index(len(self), self.label, fraction, seed, self.name)
        return self.subset(train), self.subset(test)

    def tokenised(self, tokenizer: Any, max_length: int) -> PairItems | PairFiles:
        """The same pairs with their captions as tokens, each distinct caption once; see `texts.tokenise`."""
        rows = texts.tokenise(texts.Texts({"anchor": self.texts}, name=self.name), tokenizer, max_length)
        about = (rows.ids["anchor"], self.captions, rows.pad, self.name, rows.truncated)
        return PairFiles(self.images, *about) if isinstance(self.images, ImageFiles) else PairItems(self.images, *about)


def used(captions: Tensor, texts: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """The captions int64 [N, K] numbered anew, and only the texts that they use, in the same order."""
    kept, number = captions.unique(return_inverse=True)
    # -1, if it is among them, has number 0 and becomes -1 again
    absent = int((kept < 0).sum())
    number = number.view(captions.shape) - absent
    width = max(1, int((number >= 0).sum(1).max())) if len(number) else 1
    return number[:, :width].contiguous(), tuple(texts[i] for i in kept[absent:].tolist())


@dataclass
class PairItems:
    """Tokenised pairs in memory: the items of every method that reads images and text.

    Args:
        images: uint8 [N, C, H, W] and, where known, labels
        ids: tokens of the distinct captions
        captions: int64 [N, K], the captions of each image as rows of `ids`, filled up with -1 at the end
        pad: id that fills short rows up
        name: where they come from
        truncated: captions that were longer than the limit
    """

    images: Images
    ids: texts.Ragged
    captions: Tensor
    pad: int
    name: str = "pairs"
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def lengths(self) -> None:
        """Rows are not ordered by length: the images, which cost most, have none."""
        return None

    @property
    def nbytes(self) -> int:
        return self.images.nbytes + self.ids.flat.nbytes + self.ids.offsets.nbytes + self.captions.nbytes

    @property
    def label(self) -> Tensor | None:
        """int64 [N], class of each image where it is known."""
        return self.images.label

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The images at `index` (int64 [B]) with all their captions.

        Returns:
            ``image`` uint8 [B, C, H, W]; ``input_ids`` and ``attention_mask`` int64 [B, K, L], L the longest caption of
            the batch; ``caption`` int64 [B, K], number of the distinct text, -1 (and no token) where an image has fewer
            than K; ``index`` int64 [B]; ``label`` int64 [B] where there are labels.
        """
        at = index.to(self.captions.device)
        return {**self.images.take(at), **_tokens(self.ids, self.captions[at], self.pad)}

    def subset(self, index: Tensor | Sequence[int]) -> PairItems:
        """The images at `index`, in that order; captions keep their numbers."""
        at = torch.as_tensor(index, dtype=torch.int64, device=self.captions.device)
        return replace(self, images=self.images.subset(at), captions=self.captions[at])

    def to(self, device: torch.device | str) -> PairItems:
        """The same pairs on another device."""
        place = torch.device(device)
        return replace(self, images=self.images.to(place), ids=self.ids.to(place), captions=self.captions.to(place))


@dataclass
class PairFiles(Dataset[dict[str, Any]]):
    """Tokenised pairs whose images are decoded when asked for, for sets that do not fit in memory.

    Item: what `PairItems.take` gives for one image, without the first axis, L being the longest caption of all. An image
    that turns out to be unreadable is replaced by the next one together with its captions; see `ImageFiles`.
    """

    images: ImageFiles
    ids: texts.Ragged
    captions: Tensor
    pad: int
    name: str = "pairs"
    truncated: int = 0
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = int(self.ids.lengths.max())

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def label(self) -> Tensor | None:
        """int64 [N], class of each image where it is known."""
        return self.images.label

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.images[index]
        words = _tokens(self.ids, self.captions[item["index"]][None], self.pad)
        short = self.length - words["input_ids"].shape[-1]
        for name, value in (("input_ids", self.pad), ("attention_mask", 0)):
            words[name] = torch.nn.functional.pad(words[name], (0, short), value=value)
        return {**item, **{name: value[0] for name, value in words.items()}}

    def subset(self, index: Tensor | Sequence[int]) -> PairFiles:
        """The images at `index`, in that order; captions keep their numbers."""
        at = torch.as_tensor(index, dtype=torch.int64)
        return replace(self, images=self.images.subset(at), captions=self.captions[at])


def _tokens(ids: texts.Ragged, caption: Tensor, pad: int) -> dict[str, Tensor]:
    """Tokens of the captions int64 [B, K]; a missing one (-1) has padding only."""
    there = (caption >= 0).flatten()[:, None]
    # the first caption stands in for a missing one: it cannot make the batch longer
    rows, mask = ids.padded(caption.where(caption >= 0, caption[:, :1]).flatten(), pad)
    shape = (*caption.shape, rows.shape[-1])
    return {
        "input_ids": rows.masked_fill(~there, pad).view(shape),
        "attention_mask": (mask * there).view(shape),
        "caption": caption,
    }
