"""Omniglot, embedded: 4,840 handwritten characters to learn from and the official one-shot test.

The drawings of the two small background sets (8 alphabets) come with the package, and so does the test: 20 runs, each
with 20 characters drawn once by one person and once by another, from alphabets that are not in the background sets.
Licence, source and checksums: OMNIGLOT.md beside this file.

Source: Lake, Salakhutdinov, Tenenbaum 2015, "Human-level concept learning through probabilistic program induction".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from counterpoint.data.images import Images, chosen, resize
from counterpoint.errors import InputError

FILE = Path(__file__).with_name("omniglot.npz")
SIDE = 105


@dataclass(frozen=True)
class Runs:
    """The one-shot test: in run r, test drawing i is the same character as training drawing `answer[r, i]`.

    Args:
        training: uint8 [20, 20, 1, S, S], ink 255 on 0
        test: uint8 [20, 20, 1, S, S]
        answer: int64 [20, 20]
    """

    training: Tensor
    test: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Drawings:
    """Who drew what: one entry per background drawing, ordered by alphabet, character, drawer.

    Args:
        alphabet: int64 [4840], index into `alphabets`
        character: int64 [4840], 1-based number inside its alphabet
        drawer: int64 [4840], 1 to 20
        sets: int64 [4840], 1 = in small set 1 only, 2 = in small set 2 only, 3 = in both
    """

    alphabet: Tensor
    character: Tensor
    drawer: Tensor
    sets: Tensor
    alphabets: tuple[str, ...]


@cache
def _packed() -> dict[str, np.ndarray]:
    with np.load(FILE, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _unpack(bits: np.ndarray) -> Tensor:
    pixels = np.unpackbits(bits, axis=-1, count=SIDE * SIDE)
    np.multiply(pixels, 255, out=pixels)
    return torch.from_numpy(pixels).view(*bits.shape[:-1], 1, SIDE, SIDE)


def drawings() -> Drawings:
    """Alphabet, character, drawer and set of each background drawing, in the order of `load`."""
    packed = _packed()
    alphabet, character, drawer, sets = (
        torch.from_numpy(packed[name].astype(np.int64)) for name in ("alphabet", "character", "drawer", "sets")
    )
    return Drawings(alphabet, character, drawer, sets, tuple(packed["alphabets"].tolist()))


def load(split: str = "train", *, size: int | None = None, limit: int | None = None, seed: int = 0) -> Images:
    """The background drawings, uint8 [4840, 1, 105, 105], ink 255 on 0, every distinct drawing once.

    Labels say which of the 242 characters it is ("Greek/7"); they are for looking at the result.

    Raises:
        InputError: for any split but "train"; the test of this data set is the one-shot protocol.
    """
    if split != "train":
        raise InputError(
            f"omniglot has no split {split!r}: its test is the one-shot protocol (counterpoint.data.omniglot.runs(), "
            "counterpoint.evaluate.one_shot), on alphabets that training never sees"
        )
    packed, about = _packed(), drawings()
    character = torch.stack([about.alphabet, about.character], dim=1)
    names, label = character.unique(dim=0, return_inverse=True)
    at = chosen(len(label), limit, seed)
    image = _unpack(packed["bits"][at.numpy()])
    return Images(
        image=image if size is None else resize(image, size),
        label=label[at],
        classes=tuple(f"{about.alphabets[alphabet]}/{number}" for alphabet, number in names.tolist()),
        name="omniglot/train",
    )


def runs(size: int | None = None) -> Runs:
    """The official one-shot test, area-resized to `size` pixels a side (None: 105)."""
    packed = _packed()
    training, test = _unpack(packed["run_training"]), _unpack(packed["run_test"])
    if size is not None:
        training, test = (resize(x.flatten(0, 1), size).unflatten(0, x.shape[:2]) for x in (training, test))
    return Runs(training, test, torch.from_numpy(packed["run_answer"].astype(np.int64)))
