"""Texts with classes: what a classifier says of rows it has not learned from, one that was trained together with its encoder
or a linear one on frozen embeddings."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from counterpoint.data import texts
from counterpoint.data.images import stratified
from counterpoint.errors import InputError
from counterpoint.evaluate.protocols import Result, linear_probe, own_classifier
from counterpoint.evaluate.texts import Encode, unit_vectors

log = logging.getLogger("counterpoint")

LINEAR = "linear-text"
PROBED = 5000
"""Most rows that a linear classifier is fitted to."""


def tuned(method: Any, items: texts.Sentences, *, name: str = "fine-tune", subject: str = "") -> Result:
    """Accuracy of the method's own classifier: protocol `fine-tune`, of texts.

    Args:
        method: with a classifier.
        items: rows with classes.
        name: of the protocol.
        subject: for the record.

    Returns:
        A result whose detail holds `f1` of class 1 where there are two, `macro_f1`, `matthews` (x 100), `chance` (of always
        saying the largest class), and how the vectors lie by class: see `counterpoint.evaluate.protocols.separation`.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    assert items.label is not None
    truth = items.label.cpu().numpy()
    with torch.no_grad():
        vectors = torch.from_numpy(method.encode(items)).to(method.device)
        found = method.classifier(vectors).argmax(1).cpu().numpy()
    result = own_classifier(name, found, vectors.cpu(), truth, subject=subject)
    result.detail["chance"] = 100 * float(np.bincount(truth).max()) / len(truth)
    result.detail["macro_f1"] = 100 * float(f1_score(truth, found, average="macro", zero_division=0))
    result.detail["matthews"] = 100 * float(matthews_corrcoef(truth, found))
    if method.classes == 2:
        result.detail["f1"] = 100 * float(f1_score(truth, found, zero_division=0))
    return result


def measure(
    subjects: Mapping[str, Any], source: Any, *, other: bool, limit: int | None = None, seed: int = 0
) -> Iterator[Result]:
    """Protocol `fine-tune` on every subject.

    Args:
        subjects: methods by what they are called.
        source: a known set, whose test part is taken (or the part after a colon); a file of other rows; or what the training
            read, of which only rows that it held out are taken.
        other: whether `source` is other data than the training's.
        limit, seed: of the training.
    """
    method = subjects["trained"]
    items, note = _items(method, source, other, limit, seed)
    if items is None:
        log.warning("%s left out: training saw the labels of all rows; give --data with others", method.classification)
        return
    if items.label is None:
        raise InputError(f"{items.name} has no labels: {method.classification} needs a column label")
    if int(items.label.max()) >= method.classes:
        raise InputError(f"{items.name} has the class {int(items.label.max())}, but there are {method.classes}, from 0")
    for subject, each in subjects.items():
        result = tuned(each, items, name=method.classification, subject=subject)
        if getattr(each, "transduction", None) is not None:
            result.detail["transductive"] = True
            note = note or f"may be among the inputs that training saw without labels ({each.transduction.inputs})"
        if note:
            result.detail["note"] = note
        yield result


def _items(method: Any, source: Any, other: bool, limit: int | None, seed: int) -> tuple[Any, str]:
    if isinstance(source, str) and source.partition(":")[0] in texts.CLASSIFIED:
        name, _, part = source.partition(":")
        return method.read(name, part if other and part else "test"), ""
    if other:
        return method.read(source), ""
    if not method.held_out:
        return None, ""
    held = method.parts(source, limit=limit, seed=seed)[1]
    return method.read(held), f"held out by us: {method.held_out:.0%} of the rows"


def validation_rows(method: Any, data: Any, *, limit: int | None, seed: int) -> texts.Sentences:
    """The rows by which a training may choose among its weights: those it holds out, or else the dev part of a known set.

    Raises:
        InputError: there are none.
    """
    if method.held_out:
        return method.read(method.parts(data, limit=limit, seed=seed)[1])
    if isinstance(data, str) and data.partition(":")[0] in texts.CLASSIFIED:
        return method.read(data.partition(":")[0], "dev")
    raise InputError(
        "validate needs rows that training does not see: hold a share out (--held_out 0.1), or leave validate out"
    )


# ---- frozen embeddings ---------------------------------------------------------------------------------------------------


def linear_text(
    encode: Encode, train: texts.Texts, test: texts.Texts, *, name: str = LINEAR, seed: int = 0, subject: str = ""
) -> Result:
    """Accuracy of a linear classifier on frozen embeddings of texts: protocol `linear-text`.

    `counterpoint.evaluate.linear_probe` on unit vectors; of rows of two sentences on :math:`|u - v|` and :math:`u v`, side by
    side. Of several classes of a row the first counts.

    Args:
        encode: the encoder.
        train, test: rows with classes; of more than `PROBED` training rows a seeded random subset is taken.
        name: of the protocol, with the data if they are no run's own.
        seed: of that subset, and of the probe's validation split.
        subject: for the record.

    Raises:
        InputError: rows without classes, parts of other forms, and as `linear_probe`.

    Source: SentEval, Conneau and Kiela 2018 (LREC; arXiv 1803.05449), whose classifier chooses its strength by ten folds.
    """
    if train.first_class is None or test.first_class is None:
        raise InputError(f"{test.name} has no labels: {LINEAR} needs a column label beside the texts")
    if train.columns.keys() != test.columns.keys():
        raise InputError(f"{train.name} and {test.name} must have as many texts in a row")
    if len(train) > PROBED:
        train = train.subset(np.random.default_rng(seed).permutation(len(train))[:PROBED])
    x, y = (_features(encode, rows) for rows in (train, test))
    assert train.first_class is not None
    result = linear_probe(x, train.first_class, y, test.first_class, seed=seed, subject=subject)
    result.detail["chance"] = 100 * float(np.bincount(test.first_class).max()) / len(test)
    return replace(result, protocol=name)


def _features(encode: Encode, rows: texts.Texts) -> np.ndarray:
    columns = [unit_vectors(encode([*column]), len(rows)) for column in rows.columns.values()]
    if len(columns) == 1:
        return columns[0]
    first, second = columns[:2]
    return np.concatenate([np.abs(first - second), first * second], 1)


def measure_linear(
    subjects: Sequence[tuple[str, Encode]], source: Any, names: Sequence[str], *, own: bool = True, seed: int = 0
) -> Iterator[Result]:
    """Protocol `linear-text` on every subject: of `source`, or of the named sets (``linear-text:trec``).

    Args:
        subjects: what to measure, encoders by what they are called.
        source: a known set, or texts with labels of which a fifth of each class is held out here.
        names: protocols.
        own: whether files and tables may be taken: not those whose labels training saw.
        seed: as in `linear_text`.

    Raises:
        InputError: texts without classes, or whose labels training saw.
    """
    for name in names:
        data = name.partition(":")[2] or source
        if isinstance(data, str) and data in texts.CLASSIFIED:
            train, test, note = texts.load(data, "train"), texts.load(data, "test"), ""
        else:
            rows, note = texts.load(data, classes=True), "held out by us: a fifth of the rows"
            other = f"give --data with others, or name a set as in {LINEAR}:sst2"
            if rows.first_class is None:
                raise InputError(f"{rows.name} has no labels, which {LINEAR} needs in a column label: {other}")
            if not own:
                raise InputError(f"training saw the labels of {rows.name}: {other}")
            train, test = (rows.subset(at) for at in stratified(torch.from_numpy(rows.first_class), 0.2))
        for subject, encode in subjects:
            result = linear_text(encode, train, test, name=name, seed=seed, subject=subject)
            if note:
                result.detail["note"] = note
            yield result
