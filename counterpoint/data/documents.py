"""Pairs out of whole documents: sentences that stand near each other, and spans of one text. No label, and no word changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from counterpoint.data.texts import Texts
from counterpoint.errors import InputError

Place = Literal["adjacent", "overlapping", "subsumed", "any"]
PLACES = ("adjacent", "overlapping", "subsumed", "any")


def neighbours(documents: Sequence[Sequence[str]], distance: int = 1, *, name: str = "neighbours") -> Texts:
    """Each sentence with the one that comes `distance` sentences later in its document, as pairs (anchor, positive).

    Contrasted over a batch, with distance 1, that is Quick-Thoughts: which of these sentences comes next? With other distances,
    and a `counterpoint.encoders.scorers.Bilinear` for each, it is CONPONO.

    Args:
        documents: sentences of each document, in their order.
        distance: 1 or more; negative looks back.
        name: of the set.

    Raises:
        InputError: a distance of 0, or no document long enough.

    Source: Logeswaran and Lee 2018 (arXiv 1803.02893); Iter et al. 2020 (arXiv 2005.10389).
    """
    if distance == 0:
        raise InputError("a sentence is no neighbour of itself: give a distance other than 0")
    step = abs(distance)
    rows = [(a, b) for document in documents for a, b in zip(document, document[step:], strict=False)]
    if not rows:
        raise InputError(f"no document has {step + 1} sentences: there is no pair at a distance of {distance}")
    ahead, behind = (list(side) for side in zip(*rows, strict=True))
    anchor, positive = (ahead, behind) if distance > 0 else (behind, ahead)
    return Texts({"anchor": anchor, "positive": positive}, name=name)


def spans(
    documents: Sequence[str],
    place: Place = "any",
    *,
    shortest: int = 8,
    longest: int = 32,
    seed: int = 0,
    name: str = "spans",
) -> Texts:
    r"""Two spans of words of each document, as pairs (anchor, positive): what a document is about shows in both.

    Lengths are drawn between the bounds, those of anchors leaning to the long end (Beta(4, 2)) and those of positives to the
    short one (Beta(2, 4)), so that a small part is to agree with a large one.

    Args:
        documents: one text each; those of fewer than ``shortest + 1`` words are left out.
        place: the positive is next to the anchor ("adjacent"), shares some of its words ("overlapping"), lies inside it
            ("subsumed"), or is any of these, drawn for each document.
        shortest, longest: words of a span; a document may be too short for long ones.
        seed: of the draws.
        name: of the set.

    Raises:
        InputError: bounds that are none, an unknown place, or no document long enough.

    Source: Giorgi et al. 2021, "DeCLUTR" (arXiv 2006.03659), section 3.1, whose documents and spans are far longer.
    """
    if not 1 <= shortest <= longest or place not in PLACES:
        raise InputError(f"spans have 1 <= shortest <= longest words and a place among {', '.join(PLACES)}")
    random, rows = np.random.default_rng(seed), []
    for document in documents:
        words = document.split()
        if len(words) <= shortest:
            continue
        where = PLACES[int(random.integers(3))] if place == "any" else place
        a, p = (shortest + round((longest - shortest) * random.beta(*lean)) for lean in ((4, 2), (2, 4)))
        if where == "adjacent":  # both must find room, side by side
            a, p = min(a, len(words) - 1), min(p, max(1, len(words) - min(a, len(words) - 1)))
            start = int(random.integers(len(words) - a - p + 1))
            first, second = slice(start, start + a), slice(start + a, start + a + p)
            if random.random() < 0.5:
                first, second = slice(start + p, start + p + a), slice(start, start + p)
        else:
            a = min(a, len(words))
            p = min(p, a if where == "subsumed" else len(words))
            start = int(random.integers(len(words) - a + 1))
            low, high = (start, start + a - p) if where == "subsumed" else (start - p + 1, start + a - 1)
            begin = int(random.integers(max(0, low), min(high, len(words) - p) + 1))
            first, second = slice(start, start + a), slice(begin, begin + p)
        rows.append((" ".join(words[first]), " ".join(words[second])))
    if not rows:
        raise InputError(f"no document has more than {shortest} words: there is nothing to cut spans from")
    anchor, positive = (list(side) for side in zip(*rows, strict=True))
    return Texts({"anchor": anchor, "positive": positive}, name=name)
