"""Texts and the names of their labels: how often the best name is right, apart for labels that training saw and others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from counterpoint.data import texts
from counterpoint.errors import InputError
from counterpoint.evaluate.protocols import Result, bootstrap
from counterpoint.evaluate.texts import Encode, bag_of_words, unit_vectors

ZERO_SHOT, SEEN = "zero-shot-text", "zero-shot-text-seen"
PROTOCOLS = (ZERO_SHOT, SEEN)

Score = Callable[[list[str], list[str]], np.ndarray]
"""From N texts and C names to scores [N, C]."""


def by_cosine(encode: Encode) -> Score:
    """Scores of an encoder of sentences: cosine of a text and a name."""

    def score(sentences: list[str], names: list[str]) -> np.ndarray:
        both = unit_vectors(encode([*sentences, *names]), len(sentences) + len(names))
        return both[: len(sentences)] @ both[len(sentences) :].T

    return score


def average_precision(score: np.ndarray, relevant: np.ndarray) -> float:
    """Mean precision at the ranks of the relevant items; among equal scores the order is random, and its expectation taken.

    Args:
        score: [N].
        relevant: bool [N], at least one.
    """
    order = np.argsort(-score, kind="stable")
    ranked, hit = score[order], relevant[order].astype(np.float64)
    first = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
    size = np.diff(np.append(first, len(ranked)))
    good = np.add.reduceat(hit, first)
    before = np.append(0, good.cumsum()[:-1])
    total = 0.0
    for start, n, r, known in zip(first, size, good, before, strict=True):
        if (
            r
        ):  # the k-th of n equal items is relevant with r/n, and then k-1 others before it hold (r-1)/(n-1) on average
            k = np.arange(1, n + 1)
            others = (k - 1) * (r - 1) / max(n - 1, 1)
            total += float((r / n * (known + others + 1) / (start + k)).sum())
    return total / float(relevant.sum())


def zero_shot_text(
    score: Score,
    rows: texts.Texts,
    *,
    seen: Sequence[str] = (),
    of_seen: bool = False,
    subject: str = "",
    name: str | None = None,
) -> Result:
    """Accuracy of the label whose name fits best: protocol `zero-shot-text`, of labels that training never saw.

    Texts whose (first) label training did not see are shown the names of the labels that it did not see. `zero-shot-text-seen`
    is the same of the labels that it saw. Any of a text's labels is right. Labels that tie with others win their share of the
    draw, so that constant scores have what guessing has.

    Args:
        score: of texts and names.
        rows: single texts with classes.
        seen: names of the classes that training saw.
        of_seen: measure those in the place of the others.
        subject: for the record.
        name: of the protocol, with the data if they are no run's own.

    Returns:
        Top-1 in %; the detail holds, in %, `macro_f1` (of the winners, against the first label), `ap` (mean over labels of the
        average precision with which its name ranks the texts), `ap_chance` (the mean share of texts that have a label),
        `mean_per_class`, `chance` (the share of the largest class), `among_all` (accuracy with the names of all labels) and
        `named` (the share of texts that contain the name of their own label); and the number of `labels`.

    Raises:
        InputError: texts without classes, or none of the kind that is asked for.

    Source: the task is that of Rethmeier and Augenstein 2023 (arXiv 2102.12982); average precision as in their CLESS (arXiv
    2010.01061); ties, splits and names are ours.
    """
    if rows.class_of is None:
        raise InputError(f"{rows.name} has no labels with names: {ZERO_SHOT} needs a column label beside the texts")
    chosen = [i for i, title in enumerate(rows.classes) if (title in seen) == of_seen]
    at = np.flatnonzero(np.isin(rows.class_of[:, 0], chosen))
    if len(chosen) < 2 or len(at) == 0:
        kind = "saw" if of_seen else "did not see"
        raise InputError(f"{rows.name} has {len(chosen)} labels that training {kind}, with {len(at)} texts: too few")
    sentences = [*rows.subset(at).columns["anchor"]]
    every = np.asarray(score(sentences, [*rows.classes]), np.float64)
    if every.shape != (len(at), len(rows.classes)) or np.isnan(every).any():
        raise InputError(f"scores must be [{len(at)}, {len(rows.classes)}] without NaN, not {list(every.shape)}")
    member = np.zeros((len(at), len(rows.classes) + 1), bool)
    np.put_along_axis(member, rows.class_of[at] % (len(rows.classes) + 1), True, 1)
    member = member[:, :-1]
    mine, right = every[:, chosen], member[:, chosen]
    correct = _won(mine, right)
    first = np.searchsorted(chosen, rows.class_of[at, 0])
    count = np.bincount(first, minlength=len(chosen))
    each = np.bincount(first, weights=_won(mine, np.eye(len(chosen), dtype=bool)[first]), minlength=len(chosen))
    there = right.any(0)
    low, high = bootstrap(correct)
    named = [any(n.lower() in s.lower() for n, m in zip(rows.classes, row, strict=True) if m)
             for s, row in zip(sentences, member, strict=True)]  # fmt: skip
    detail: dict[str, Any] = {
        "macro_f1": 100 * _macro_f1(mine, first),
        "ap": 100 * float(np.mean([average_precision(mine[:, c], right[:, c]) for c in np.flatnonzero(there)])),
        "ap_chance": 100 * float(right[:, there].mean()),
        "mean_per_class": 100 * float((each[count > 0] / count[count > 0]).mean()),
        "chance": 100 * float(count.max() / len(at)),
        "among_all": 100 * float(_won(every, member).mean()),
        "labels": len(chosen),
        "named": 100 * float(np.mean(named)),
    }
    protocol = name or (SEEN if of_seen else ZERO_SHOT)
    return Result(protocol, "accuracy", 100 * float(correct.mean()), (100 * low, 100 * high), len(at), subject, detail)


def _won(score: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Probability [N] that the best label is right, equal ones being drawn from."""
    best = score == score.max(1, keepdims=True)
    return (best & right).sum(1) / best.sum(1)


def _macro_f1(score: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the labels that occur of F1 of being the winner; equal winners share."""
    best = score == score.max(1, keepdims=True)
    said = best / best.sum(1, keepdims=True)
    true = np.eye(score.shape[1])[truth]
    there = true.any(0)
    f1 = 2 * (said * true).sum(0) / np.maximum(said.sum(0) + true.sum(0), 1e-12)
    return float(f1[there].mean())


def labelled(
    source: Any, split: str = "test", *, own: bool = True, asked: bool = False
) -> tuple[texts.Texts, tuple[str, ...] | None] | None:
    """The labelled texts to test on, and the labels that the training part of a named set has; None where there are none.

    Args:
        source: name, file or table.
        split: part of a named set.
        own: whether files and tables may be taken: not those that training saw.
        asked: whether somebody wants them, so that a file which cannot be read is an error.
    """
    base = source.partition(":")[0] if isinstance(source, str) else ""
    known = base in texts.NAMES
    if known:
        if base.removesuffix("-held") not in texts.LABELLED:
            return None
        rows, train = texts.load(base, split), texts.load(base, "train")
        assert train.class_of is not None
        there = np.unique(train.class_of[train.class_of >= 0])
        return rows, tuple(train.classes[i] for i in there)
    if not own:
        return None
    try:
        found = texts.load(source)
    except InputError:
        if asked:
            raise
        return None
    return None if found.class_of is None or len(found.columns) > 1 else (found, None)


def measure(
    subjects: Mapping[str, Any],
    source: Any,
    names: Sequence[str] | None = None,
    *,
    own: bool = True,
    bag: bool = True,
    trained_on: Any = None,
) -> Iterator[Result]:
    """Both protocols on every subject: on the test part of `source`, or of named sets (``zero-shot-text:trec``).

    Seen are the labels that the method names as those of its training; for a method that names none, and was trained on the
    set that it is measured on, those of the set's training part; else none.

    Args:
        subjects: methods by what they are called.
        source: what a run was trained on, or is to be measured on.
        names: protocols; None measures `source` if it holds labelled texts.
        own: as in `labelled`, of `source`.
        bag: measure also a bag of words.
        trained_on: what the run was trained on.

    Raises:
        InputError: data without labelled texts, or without labels of that kind, under a name that was asked for.
    """
    for protocol in PROTOCOLS if names is None else names:
        kind, _, asked = protocol.partition(":")
        found = labelled(asked or source, own=own or bool(asked), asked=names is not None)
        if found is None:
            if names is None:
                return
            raise InputError(
                f"{asked or source} holds no labelled texts that training did not see, which {kind} needs: give --data, or "
                f"name a set as in {kind}:trec"
            )
        rows, trained = found
        seen = seen_by(subjects, trained if (asked or source) == trained_on else None)
        scores = {subject: score_of(method) for subject, method in subjects.items()}
        if bag:
            scores["bag of words"] = by_cosine(bag_of_words)
        options: dict[str, Any] = {"seen": seen, "of_seen": kind == SEEN, "name": protocol}
        if names is None and sum((title in seen) == (kind == SEEN) for title in rows.classes) < 2:
            continue
        for subject, score in scores.items():
            yield zero_shot_text(score, rows, subject=subject, **options)


def seen_by(subjects: Mapping[str, Any], trained: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the labels that the methods were trained on, or else `trained`."""
    for method in subjects.values():
        if getattr(method, "uses_labels", False) and (named := getattr(method, "labels", ())):
            return tuple(named)
    return tuple(trained or ())


def scorer(source: Any) -> Callable[[Any], Result] | None:
    """Accuracy of known labels on the dev part of a named set, as a function of the method; None where there is none."""
    if (found := labelled(source, "dev", own=False)) is None:
        return None
    rows, trained = found

    def score(method: Any) -> Result:
        seen = seen_by({"trained": method}, trained)
        return zero_shot_text(score_of(method), rows, seen=seen, of_seen=True, name=f"{SEEN}-dev")

    return score


def score_of(method: Any) -> Score:
    """How a method scores names: in its own way, or by the cosine of its embeddings."""
    own = getattr(method, "score_labels", None)
    return own if own is not None else by_cosine(method.encode)
