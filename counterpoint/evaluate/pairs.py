"""Labelled pairs: how well one threshold of the cosine tells pairs that belong together from others, domain by domain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from counterpoint.data import texts
from counterpoint.errors import InputError
from counterpoint.evaluate.protocols import Result
from counterpoint.evaluate.texts import Encode, bag_of_words, similarity

PAIR_F1 = "pair-f1"


def f1_max(score: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """The largest F1 of "together if the score is at least t" over all thresholds t, and the largest t that reaches it.

    Args:
        score: [N].
        label: [N], 1 belongs together, 0 does not.

    Raises:
        InputError: no pair that belongs together.
    """
    score, label = np.asarray(score, np.float64), np.asarray(label).astype(bool)
    if not label.any():
        raise InputError("F1 looks for pairs that belong together, and there is none")
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    hits = label[order].cumsum()
    last = np.append(ranked[1:] != ranked[:-1], True)  # equal scores fall on one side together
    f1 = np.where(last, 2 * hits / (np.arange(1, len(score) + 1) + label.sum()), -1)
    best = int(f1.argmax())
    return float(f1[best]), float(ranked[best])


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """Share of (positive, negative) pairs whose positive scores higher, ties half; nan where one kind is missing."""
    from scipy.stats import rankdata

    label = np.asarray(label).astype(bool)
    positive, negative = int(label.sum()), int((~label).sum())
    if not positive or not negative:
        return float("nan")
    return float((rankdata(score)[label].sum() - positive * (positive + 1) / 2) / (positive * negative))


def pair_f1(
    encode: Encode | Mapping[str, Encode], pairs: texts.Texts, *, name: str = PAIR_F1, subject: str = ""
) -> Result:
    """F1max x 100 of the cosine on labelled pairs, the mean over their domains: protocol `pair-f1`.

    The threshold of each domain is the best one for these very pairs, as in the paper: an optimistic number, the same for
    everyone. Always saying yes has 100 * 2p / (1 + p), p the share of pairs that belong together (66.7 of half); the detail
    holds it as `always_yes`.

    Args:
        encode: the encoder, or one for each domain by its name.
        pairs: labelled.
        name: of the protocol, with the data if they are no run's own.
        subject: for the record.

    Returns:
        A result whose detail holds, for each domain under its name (with _ for anything that is no letter), F1max, and after
        it `_accuracy` at that threshold, `_auc` (both x 100), `_threshold`, and `_ratio`, mean cosine of positives by that of
        negatives (not without negatives). Pairs without domains have these names alone. The interval resamples pairs within
        each domain.

    Raises:
        InputError: pairs without labels, or a domain in which no pair belongs together.

    Source: Hallee et al. 2024 (arXiv 2401.15713), section on evaluation; its grid of thresholds is 0.001 wide, ours exact.
    """
    if pairs.label is None:
        raise InputError(f"{pairs.name} has no labels: pair-f1 needs a column label of 0 and 1 beside two of texts")
    domain = np.zeros(len(pairs), np.int64) if pairs.domain is None else pairs.domain
    random = np.random.default_rng(0)
    detail: dict[str, Any] = {}
    values, draws = [], []
    for number in np.unique(domain):
        at = np.flatnonzero(domain == number)
        named = pairs.domains[number] if pairs.domain is not None else ""
        own = encode.get(named, encode[""]) if isinstance(encode, Mapping) else encode
        score, label = similarity(own, pairs.subset(at)).astype(np.float64), pairs.label[at]
        best, threshold = f1_max(score, label)
        values.append(100 * best)
        draws.append(100 * _resampled(score, label, random))
        key = "".join(letter if letter.isalnum() else "_" for letter in named)
        more = {"accuracy": 100 * float(((score >= threshold) == label).mean()), "threshold": threshold}
        if (label == 0).any():
            more["auc"] = 100 * auc(score, label)
            if apart := score[label == 0].mean():
                more["ratio"] = float(score[label == 1].mean() / apart)
        detail |= {key: 100 * best} if key else {}
        detail |= {f"{key}_{what}" if key else what: number for what, number in more.items()}
    share = float(pairs.label.mean())
    detail["always_yes"] = 100 * 2 * share / (1 + share)
    low, high = np.percentile(np.mean(draws, axis=0), (2.5, 97.5))
    return Result(name, "F1max", float(np.mean(values)), (float(low), float(high)), len(pairs), subject, detail)


def _resampled(score: np.ndarray, label: np.ndarray, random: np.random.Generator, times: int = 500) -> np.ndarray:
    """F1max of `times` resamples of the pairs (ties count as they happen to stand)."""
    at = random.integers(len(score), size=(times, len(score)))
    order = np.argsort(-score[at], axis=1, kind="stable")
    hits = np.take_along_axis(label[at], order, axis=1).cumsum(1)
    return (2 * hits / (np.arange(1, len(score) + 1) + hits[:, -1:])).max(1)


def labelled(source: Any, split: str = "test", *, own: bool = True) -> texts.Texts | None:
    """The labelled pairs that named sets hold in that part, or all of a file; None where there are none.

    Args:
        source: name, names with a plus between them, file or table.
        split: part of a named set.
        own: whether files and tables may be taken: not those that training saw.
    """
    names = [part.partition(":")[0] for part in source.split("+")] if isinstance(source, str) else [""]
    known = all(name in texts.NAMES for name in names)
    if not (all(name.endswith(texts.PAIRS) for name in names) if known else own):
        return None
    try:
        found = texts.load(source, split) if known else texts.load(source)
    except InputError:
        if known:
            raise
        return None
    return None if found.label is None or found.classes else found


def measure(
    subjects: Mapping[str, Any],
    source: Any,
    names: Sequence[str] | None = None,
    *,
    own: bool = True,
    bag: bool = True,
) -> Iterator[Result]:
    """Protocol `pair-f1` on every subject: on the test part of `source`, or on the named sets (``pair-f1:arxiv-pairs``).

    Args:
        subjects: methods by what they are called.
        source: what a run was trained on, or is to be measured on.
        names: protocols; None measures `source` if it holds labelled pairs.
        own: as in `labelled`, of `source`.
        bag: measure also a bag of words.

    Raises:
        InputError: data without labelled pairs under a name that was asked for.
    """
    for name in (PAIR_F1,) if names is None else names:
        asked = name.partition(":")[2]
        pairs = labelled(asked) if asked else labelled(source, own=own)
        if pairs is None:
            if names is None:
                return
            raise InputError(
                f"{asked or source} holds no labelled pairs that training did not see, which {PAIR_F1} needs: give --data, or "
                f"name sets as in {PAIR_F1}:mrpc-pairs"
            )
        encoders: dict[str, Encode | dict[str, Encode]] = {
            subject: in_domains(method, pairs.domains or _alone(asked or source))
            for subject, method in subjects.items()
        }
        if bag:
            encoders["bag of words"] = bag_of_words
        for subject, encode in encoders.items():
            yield pair_f1(encode, pairs, name=name, subject=subject)


def in_domains(method: Any, domains: Sequence[str]) -> dict[str, Encode]:
    """For each domain how the method embeds its texts; "" stands for a domain that it does not know.

    A single domain stands for texts whose pairs name none.
    """
    known = getattr(method, "domains", ())
    found: dict[str, Encode] = {"": method.encode}
    for domain in domains:
        if domain in known:
            found[domain] = partial(method.encode, domain=domain)
    if len(domains) == 1:
        found[""] = found.get(domains[0], method.encode)
    return found


def score_of(source: Any, method: Any) -> Result:
    """F1max on the dev part of what a training reads: what it may choose among its weights by."""
    pairs = labelled(source, "dev")
    assert pairs is not None
    return pair_f1(in_domains(method, pairs.domains or _alone(source)), pairs, name=f"{PAIR_F1}-dev")


def _alone(source: Any) -> tuple[str, ...]:
    return (str(source).partition(":")[0].removesuffix(texts.PAIRS),)
