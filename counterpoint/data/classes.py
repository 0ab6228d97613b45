"""Sentences and pairs of sentences that people judged, each set under its usual name; single texts: `data.labelled`.

The part "test" is the one whose labels are public: the official test part of MRPC and SICK, and the development parts of CoLA
and RTE, whose test labels GLUE keeps. No training row is also one of dev or test: neither the
sentence of a single one, nor the two of a pair together (sets of pairs share sentences between their parts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from counterpoint.data import sources, texts
from counterpoint.data.texts import Texts
from counterpoint.errors import InputError


@dataclass(frozen=True)
class Source:
    """Where a set lies.

    Args:
        folder, file: below the data folder.
        splits: the parts of the file that train, dev and test consist of.
        sentences: columns, one or two.
        classes: names by number, as people say them.
        written: as the file has them, by number; None if it has the numbers.
        label: column of the classes.
    """

    folder: str
    file: str
    splits: Mapping[str, tuple[str, ...]]
    sentences: tuple[str, ...]
    classes: tuple[str, ...]
    written: tuple[str, ...] | None = None
    label: str = "label"


THREE = {"train": ("train",), "dev": ("dev",), "test": ("test",)}
TWO = ("sentence1", "sentence2")
RELATIONS = ("entailment", "neutral", "contradiction")

SOURCES: dict[str, Source] = {
    "cola": Source(
        "glue",
        "cola",
        {"train": ("in_domain_train",), "test": ("in_domain_dev", "out_of_domain_dev")},
        ("sentence",),
        ("unacceptable", "acceptable"),
    ),
    "mrpc": Source("glue", "mrpc", THREE, TWO, ("different", "paraphrase")),
    "rte": Source(
        "glue",
        "rte",
        {"train": ("train",), "test": ("dev",)},
        TWO,
        ("entailment", "not_entailment"),
        written=("entailment", "not_entailment"),
    ),
    "sick-e": Source("sts", "sick", THREE, TWO, RELATIONS, written=RELATIONS, label="entailment"),
}
"""Corpus of Linguistic Acceptability, Microsoft Research Paraphrase Corpus, Recognising Textual Entailment, SICK (entailment)."""


def texts_of(name: str, split: str) -> Texts:
    """The rows of the set called `name` with their classes.

    Raises:
        InputError: no such part, or a file that is not on this machine.
    """
    source = SOURCES[name]
    if split not in source.splits:
        more = ": hold a share of train out (--held_out 0.1)" if split == "dev" else ""
        raise InputError(f"{name} has the splits {', '.join(source.splits)} with labels, not {split!r}{more}")
    holds = ", ".join(("split", source.label, *source.sentences))
    table = texts.read_table(sources.require(source.folder, f"{source.file}.csv.gz", holds))
    every = np.array(table["split"])
    columns = dict(zip(("anchor", "positive"), (table[title] for title in source.sentences), strict=False))
    names = dict(zip(source.written or map(str, range(len(source.classes))), source.classes, strict=True))
    rows = replace(
        Texts(columns, name=f"{name}/{split}"),
        **texts.classed([[names[cell]] for cell in table[source.label]], source.classes),
    )

    def part(which: str) -> Texts:
        return rows.subset(np.flatnonzero(np.isin(every, source.splits[which])))

    if split != "train":
        return part(split)
    train = part("train")
    tested = {row for other in source.splits if other != "train" for row in _items(part(other))}
    kept = [i for i, row in enumerate(_items(train)) if row not in tested]
    return replace(train.subset(kept), name=f"{name}/train")


def _items(rows: Texts) -> list[frozenset[str]]:
    """What a row says, whatever its case, spacing, punctuation or order of sentences."""
    return [frozenset(map(texts.plain, row)) for row in zip(*rows.columns.values(), strict=True)]


def numbered(rows: Texts, names: tuple[str, ...], *, known: bool) -> Texts:
    """The rows, with classes numbered as a model does that was told their names.

    Args:
        rows: with or without classes.
        names: of the model's classes; none where it takes the numbers of the data.
        known: whether the numbers of words are fixed, as those of a known set are; those of a file depend on what else it holds.

    Raises:
        InputError: a class that is not among them, or words without names.
    """
    if rows.class_of is None or (not names and (known or all(map(str.isdecimal, rows.classes)))):
        return rows
    if not names:
        raise InputError(
            f"the labels of {rows.name} are words: say in which order they count, --classes '[{', '.join(rows.classes)}]'"
        )
    if missing := [name for name in rows.classes if name not in names]:
        raise InputError(f"{rows.name} has the class {missing[0]}, but the model knows {', '.join(names)}")
    number = np.array([*(names.index(name) for name in rows.classes), -1])  # -1 stays
    return replace(rows, class_of=number[rows.class_of], classes=names)


def with_unlabelled(rows: Texts, data: object, inputs: str) -> Texts:
    """`rows`, and behind them inputs without labels, which get class 0 for now.

    Args:
        rows: with classes.
        data: what they are of.
        inputs: a part of that set, or a file.

    Raises:
        InputError: neither, or inputs of another form than the rows.
    """
    known = isinstance(data, str) and data.partition(":")[0] in texts.CLASSIFIED
    if known and inputs in ("train", "dev", "test"):
        more = texts.load(str(data).partition(":")[0], inputs)
    elif inputs in ("train", "dev", "test"):
        raise InputError(
            f"{rows.name} has no part {inputs}: name a file of inputs without labels, --transduction.inputs FILE"
        )
    else:
        more = texts.load(inputs, classes=True)
    if more.columns.keys() != rows.columns.keys():
        forms = [" and ".join(x.columns) for x in (rows, more)]
        raise InputError(f"{rows.name} has {forms[0]} in a row, and {more.name} has {forms[1]}")
    columns = {part: [*column, *more.columns[part]] for part, column in rows.columns.items()}
    assert rows.class_of is not None
    unknown = np.full((len(more), rows.class_of.shape[1]), -1)
    unknown[:, 0] = 0
    return replace(rows, columns=columns, class_of=np.concatenate([rows.class_of, unknown]))
