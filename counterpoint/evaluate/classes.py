"""Texts with classes: what a classifier that was trained together with its encoder says of rows it has not learned from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from counterpoint.data import texts
from counterpoint.errors import InputError
from counterpoint.evaluate.protocols import Result, own_classifier

log = logging.getLogger("counterpoint")


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
