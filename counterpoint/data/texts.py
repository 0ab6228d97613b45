"""Sentences: `load` gets them from a name, a file, lists or a DataFrame; `tokenise` makes the items a method trains on."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.data import sources
from counterpoint.data.images import chosen
from counterpoint.errors import InputError, nearest

log = logging.getLogger("counterpoint")

# what a column of sentences may be called, by the part it plays
ANCHOR = ("anchor", "sentence", "text", "sentence1", "sent0", "query", "question", "premise", "caption", "docstring")
POSITIVE = ("positive", "sentence2", "sent1", "answer", "response", "hypothesis", "paraphrase", "code")
NEGATIVE = re.compile(r"(hard_)?neg(ative)?(_?\d+)?$")
SCORE = ("score", "similarity", "relatedness")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Texts:
    """Rows of sentences, before they are tokens.

    Args:
        columns: the sentences by the part they play: "anchor", then "positive", "negative", "negative_2" ... where
            the data has them; all of one length.
        score: [N] how alike anchor and positive are, where people judged it. Such pairs are no positives: training
            uses their sentences singly.
        name: where they come from.
        label: int64 [N], 1 where anchor and positive belong together and 0 where they do not, if the data say so.
        domain: int64 [N], of which of the `domains` a row is, where there are several.
        domains: their names.
        class_of: int64 [N, P], which of the `classes` each row belongs to, the first one before others, -1 fills up. Rows of
            two sentences with classes are neither positives nor negatives.
        classes: what the classes are called, as one would say it.
    """

    columns: Mapping[str, Sequence[str]]
    score: np.ndarray | None = None
    name: str = "sentences"
    label: np.ndarray | None = None
    domain: np.ndarray | None = None
    domains: tuple[str, ...] = ()
    class_of: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.columns["anchor"])

    def subset(self, index: Iterable[int]) -> Texts:
        """The rows at `index`, in that order."""
        at = [int(i) for i in index]
        columns = {part: [column[i] for i in at] for part, column in self.columns.items()}
        names = ("score", "label", "domain", "class_of")
        arrays = {name: x[at] for name in names if (x := getattr(self, name)) is not None}
        return replace(self, columns=columns, **arrays)

    def sentences(self) -> list[str]:
        """Every distinct sentence of every column, in order of appearance."""
        return list(dict.fromkeys(sentence for column in self.columns.values() for sentence in column))

    @property
    def first_class(self) -> np.ndarray | None:
        """int64 [N]: the class of each row, its first where it has several; None without classes."""
        return None if self.class_of is None else self.class_of[:, 0]

    def positives(self) -> Texts:
        """The rows whose sentences belong together: all that are not labelled 0."""
        return self if self.label is None else self.subset(np.flatnonzero(self.label == 1))

    def single(self) -> Texts:
        """The same sentences without their pairing, each once."""
        return Texts({"anchor": self.sentences()}, name=self.name)


def load(
    data: Any,
    split: str = "train",
    *,
    columns: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    whole: bool = False,
    classes: bool = False,
) -> Texts:
    """Sentences from a known name, a file, lists of strings or a DataFrame.

    Args:
        data: a name in `NAMES`, its split after a colon if you like (``"stsb:dev"``); a text file with one sentence a
            line; a .csv, .tsv, .jsonl or .parquet file (also .gz); a list of strings; a list of tuples (anchor,
            positive, negative ...); a dictionary of columns; a DataFrame or Series. Several names with a plus between them
            are so many domains of one set (``"arxiv-pairs+codenn-pairs"``).
        split: which part of a known set; own data is all "train".
        columns: names of a table's sentence columns in the order anchor, positive, negative ...; None finds them by
            their names (``sentence`` or ``text``; ``sentence1`` and ``sentence2``; ``query`` and ``code``; ``anchor``,
            ``positive``, ``negative``, ``negative_2`` ...; a table of one column needs no name). A column ``score`` beside two
            columns makes them scored pairs, a column ``label`` of 0 and 1 labelled ones. Beside a single column of sentences
            a column ``label`` names the class of each row, and ``labels`` one or several, with | between them. A column
            ``domain`` names the domain of each row.
        limit: at most so many rows, a seeded random subset.
        seed: of that subset.
        whole: keep every row, also empty and repeated ones, so that row i of the result is row i of the data (to embed
            it). Otherwise rows with an empty sentence and repeated rows are left out, since a repeated sentence would
            be its own negative, and the log says how many.
        classes: a column ``label`` names the class of each row, of one sentence or of two: whole numbers from 0, or words
            (whose numbers are their alphabetical order). Known sets with classes have them in any case.

    Raises:
        InputError: nothing there, a line that is not UTF-8 (with its number), no column of sentences (with the
            columns found), or nothing left.
    """
    if isinstance(data, Texts):
        found = data
    elif isinstance(data, str) and all(name.partition(":")[0] in NAMES for name in data.split("+")):
        named = [name.partition(":") for name in data.split("+")]
        parts = [NAMES[name](part or split) for name, _, part in named]
        found = parts[0] if len(parts) == 1 else joined(parts, [name.removesuffix(PAIRS) for name, _, _ in named])
    else:
        found = _own(data, columns, classes)
        if split != "train":
            raise InputError(
                f"{found.name} has no split {split!r}: own sentences are one set; hold out a file yourself"
            )
    if not whole:
        found = _clean(found)
    if len(found) == 0:
        raise InputError(f"{found.name} holds no sentence")
    return found if limit is None or limit >= len(found) else found.subset(chosen(len(found), limit, seed).tolist())


def _own(data: Any, columns: Sequence[str] | None, classes: bool) -> Texts:
    if isinstance(data, str | Path):
        return _file(Path(data).expanduser(), str(data), columns, classes)
    if isinstance(data, Mapping) or hasattr(data, "columns"):  # a DataFrame, without importing pandas
        return _table(as_columns(data), "the table", columns, classes)
    if isinstance(data, np.ndarray | Sequence) or hasattr(data, "tolist"):
        rows = list(data.tolist() if hasattr(data, "tolist") else data)
        return _rows(rows)
    raise InputError(f"sentences come from a path, a list of strings or a table, not from {type(data).__name__}")


def _rows(rows: list[Any]) -> Texts:
    if not rows:
        raise InputError("the list of sentences is empty")
    width = (
        1 if isinstance(rows[0], str) or rows[0] is None else len(rows[0]) if isinstance(rows[0], list | tuple) else 0
    )
    for number, row in enumerate(rows):
        cells = row if isinstance(row, list | tuple) else [row]
        if (
            len(cells) != width
            or width == 0
            or any(not isinstance(cell, str) and not is_missing(cell) for cell in cells)
        ):
            expected = "a string" if width < 2 else f"a tuple of {width} strings, as the first"
            raise InputError(f"item {number} of the list is {short(row)}, but a sentence is {expected}")
    cells = [row if isinstance(row, list | tuple) else [row] for row in rows]
    named = dict(zip(_parts(width), zip(*cells, strict=True), strict=True))
    return Texts({part: [as_text(cell) for cell in column] for part, column in named.items()}, name="sentences")


def _parts(width: int) -> list[str]:
    return ["anchor", "positive", "negative", *(f"negative_{i}" for i in range(2, width))][:width]


def _file(path: Path, given: str, columns: Sequence[str] | None, classes: bool) -> Texts:
    if not path.is_file():
        if path.is_dir():
            raise InputError(f"{given} is a folder; sentences come from one file (.txt, {', '.join(TABLES)})")
        known = ", ".join(NAMES)
        raise InputError(f"{given!r} is neither a file nor one of {known}{nearest(given, NAMES)}")
    kind, name = kind_of(path), path.name
    if kind == ".parquet":
        return _table(_parquet(path), name, columns, classes)
    lines = read_lines(path)
    match kind:
        case ".csv" | ".tsv":
            return _table(separated(lines, "\t" if kind == ".tsv" else ",", name), name, columns, classes)
        case ".jsonl" | ".ndjson":
            rows = _json_rows(lines, name)
            if rows and all(isinstance(row, str | list) for row in rows):
                return replace(_rows(rows), name=name)
            return _table(_json_table(rows, name), name, columns, classes)
        case ".json" | ".xlsx" | ".xls" | ".arrow" | ".pdf" | ".docx" | ".zip":
            raise InputError(f"{given} is no kind of file we read; save it as .txt, {', '.join(TABLES)}")
    return Texts({"anchor": lines}, name=name)


def kind_of(path: Path) -> str:
    """The extension that says how a file is read, in lower case; that of "a.CSV.gz" is ".csv"."""
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    return suffixes[-1].lower() if suffixes else ""


def read_table(path: Path) -> dict[str, list[Any]]:
    """The columns of a file of one of the kinds in `TABLES` (all but Parquet also .gz).

    Raises:
        InputError: cannot be read, a line that is not UTF-8 or not of the table (with its number).
    """
    kind = kind_of(path)
    if kind == ".parquet":
        return _parquet(path)
    lines = read_lines(path)
    if kind in (".jsonl", ".ndjson"):
        return _json_table(_json_rows(lines, path.name), path.name)
    return separated(lines, "\t" if kind == ".tsv" else ",", path.name)


def as_columns(data: Any) -> dict[str, list[Any]]:
    """The columns of a DataFrame or of a dictionary of columns."""
    names = [str(name) for name in (data if isinstance(data, Mapping) else data.columns)]
    return dict(zip(names, ([*data[name]] for name in data), strict=True))


def read_lines(path: Path) -> list[str]:
    """Lines of a text file in UTF-8, without their ends."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"line {line:,} of {path} is not UTF-8 (byte {content[error.start]:#04x}); convert the file"
        ) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def separated(lines: list[str], separator: str, name: str) -> dict[str, list[str]]:
    """The columns of a table whose cells are separated by `separator`, the first line being their titles."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO("\n".join(lines)), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise InputError(f"line {reader.line_num:,} of {name} is no table row ({error})") from error
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise InputError(f"row {number:,} of {name} has {len(row)} cells, but the header has {len(header)}")
    return {title: [row[i] for row in rows] for i, title in enumerate(header)}


def _json_rows(lines: list[str], name: str) -> list[Any]:
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"line {number:,} of {name} is not JSON ({error.msg})") from error
    return rows


def _json_table(rows: list[Any], name: str) -> dict[str, list[Any]]:
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f'{name} holds no JSON objects; each line is one, such as {{"sentence": "..."}}')
    titles = list(dict.fromkeys(title for row in rows for title in row))
    return {title: [row.get(title) for row in rows] for title in titles}


def _parquet(path: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError("Parquet files need pyarrow: pip install counterpoint[tables]") from error
    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read as Parquet ({' '.join(str(error).split())})") from error


def _table(table: dict[str, list[Any]], name: str, columns: Sequence[str] | None, classes: bool) -> Texts:
    found = ", ".join(table) or "none"
    if columns is not None:
        if missing := [title for title in columns if title not in table]:
            raise InputError(f"{name} has no column {missing[0]}{nearest(missing[0], table)}; it has {found}")
        titles = list(columns)
    else:
        titles = _found(list(table))
        if not titles and len(table) == 1 and not holds_numbers(next(iter(table.values()))):
            titles = list(table)
        if not titles:
            raise InputError(
                f"{name} has the columns {found}, and none is known to hold sentences: name them sentence (or text), "
                "or anchor, positive, negative ..., or sentence1 and sentence2"
            )
    for title in titles:
        if holds_numbers(table[title]):
            raise InputError(f"column {title} of {name} holds numbers, not sentences; its columns are {found}")
    parts = {
        part: [as_text(cell) for cell in table[title]] for part, title in zip(_parts(len(titles)), titles, strict=True)
    }
    if classes:
        return replace(Texts(parts, name=name), **_one_class(table, titles, name))
    score = None
    judged = [title for title in table if title.lower() in SCORE]
    if len(titles) == 2 and judged:
        try:
            score = np.array([float(cell) for cell in table[judged[0]]])
        except (TypeError, ValueError) as error:
            raise InputError(f"column {judged[0]} of {name} holds something that is no number ({error})") from error
    label = None
    answers = [[as_text(cell).strip() for cell in table[title]] for title in table if title.lower() == "label"]
    if len(titles) == 2 and score is None and answers and {*answers[0]} <= {"0", "1"}:
        label = np.array(answers[0], dtype=np.int64)
    named = _classes(table, titles) if len(titles) == 1 else {}
    return replace(Texts(parts, score, name, label), **_domains(table, titles, name), **named)


def _classes(table: dict[str, list[Any]], titles: list[str]) -> dict[str, Any]:
    """Numbers and names of the classes that a column ``label`` (or ``labels``, several with | between) gives each row."""
    column = next(
        (table[title] for title in table if title.lower() in ("label", "labels") and title not in titles), None
    )
    if column is None:
        return {}
    cells = [[name for part in as_text(cell).split("|") if (name := part.strip())] for cell in column]
    return classed(cells, sorted({name for row in cells for name in row}))


def classed(rows: Sequence[Sequence[str]], classes: Sequence[str]) -> dict[str, Any]:
    """The fields `class_of` and `classes` of `Texts`, from the names of each row's classes.

    Args:
        rows: names of the classes of each row, the first one before others; a row of none has -1 alone.
        classes: all names.
    """
    number = {name: i for i, name in enumerate(classes)}
    class_of = np.full((len(rows), max([1, *map(len, rows)])), -1, np.int64)
    for row, names in zip(class_of, rows, strict=True):
        row[: len(names)] = [number[name] for name in names]
    return {"class_of": class_of, "classes": tuple(classes)}


def _one_class(table: dict[str, list[Any]], titles: list[str], name: str) -> dict[str, Any]:
    """As `_classes`, of a column ``label`` that gives each row one class: a whole number from 0, or a word."""
    column = next((table[title] for title in table if title.lower() == "label" and title not in titles), None)
    if column is None:
        return {}
    cells = [as_text(cell).strip() for cell in column]
    if "" in cells:
        raise InputError(
            f"row {cells.index('') + 1:,} of {name} has no label; its column label must hold one in each row"
        )
    # 1.0 is what a table makes of 1 when another cell is empty
    whole = [cell.removesuffix(".0") for cell in cells]
    if all(re.fullmatch(r"\d{1,6}", cell) for cell in whole):
        return classed([[str(int(cell))] for cell in whole], [str(i) for i in range(max(map(int, whole)) + 1)])
    if all(re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", cell) for cell in cells):
        raise InputError(
            f"column label of {name} holds numbers that are no classes; a class is a whole number from 0, or a word"
        )
    return classed([[cell] for cell in cells], sorted({*cells}))


def _domains(table: dict[str, list[Any]], titles: list[str], name: str) -> dict[str, Any]:
    """Numbers and names of the domains that a table's column ``domain`` tells apart."""
    column = next((table[title] for title in table if title.lower() == "domain" and title not in titles), None)
    if column is None:
        return {}
    cells = [as_text(cell).strip() for cell in column]
    if "" in cells:
        raise InputError(
            f"row {cells.index('') + 1:,} of {name} has no domain; its column domain must name one in each row"
        )
    domains, number = np.unique(cells, return_inverse=True)
    return {"domain": number.astype(np.int64), "domains": tuple(map(str, domains))}


def joined(parts: Sequence[Texts], domains: Sequence[str]) -> Texts:
    """Sets of one form as the domains of one set, one after the other.

    Args:
        parts: the sets.
        domains: what each is called.

    Raises:
        InputError: a domain twice, or sets of different form.
    """
    if len(set(domains)) < len(domains):
        raise InputError(f"each domain can be named once, not {' and '.join(domains)}")
    first = parts[0]
    for part in parts[1:]:
        same = part.columns.keys() == first.columns.keys() and (part.label is None) == (first.label is None)
        special = [x for x in (part, first) if x.score is not None or x.classes]
        if not same or special or part.domain is not None:
            forms = " and ".join(f"{x.name} ({', '.join(x.columns)})" for x in (first, part))
            raise InputError(f"{forms} are not of one form and cannot be the domains of one set")
    columns = {part: [cell for x in parts for cell in x.columns[part]] for part in first.columns}
    label = None if first.label is None else np.concatenate([x.label for x in parts if x.label is not None])
    number = np.repeat(np.arange(len(parts)), [len(x) for x in parts])
    return Texts(columns, None, "+".join(x.name for x in parts), label, number, tuple(domains))


def _found(titles: list[str]) -> list[str]:
    """Columns of sentences by their names: one anchor, at most one positive, negatives only beside a positive."""
    anchors = [title for title in titles if title.lower() in ANCHOR]
    positives = [title for title in titles if title.lower() in POSITIVE]
    negatives = [title for title in titles if NEGATIVE.match(title.lower())]
    if not anchors and not negatives and [title.lower() for title in positives] == ["code"]:
        return positives  # code alone, to be searched
    if len(anchors) != 1 or len(positives) > 1 or (negatives and not positives):
        return []
    return anchors + positives + negatives


def is_missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and np.isnan(cell)) or type(cell).__name__ == "NAType"


def as_text(cell: Any) -> str:
    return "" if is_missing(cell) else str(cell)


def holds_numbers(column: Sequence[Any]) -> bool:
    cells = [as_text(cell).strip() for cell in column]
    cells = [cell for cell in cells if cell]
    return bool(cells) and all(re.fullmatch(r"[-+]?[\d.,]+([eE][-+]?\d+)?", cell) for cell in cells)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _clean(texts: Texts) -> Texts:
    rows = list(zip(*texts.columns.values(), strict=True))
    full = [i for i, row in enumerate(rows) if all(cell.strip() for cell in row)]
    if empty := len(rows) - len(full):
        what = "empty sentences" if len(texts.columns) == 1 else "rows with an empty sentence"
        log.warning("%s: %s %s left out", texts.name, f"{empty:,}", what)
    first: dict[tuple[Any, ...], int] = {}
    for i in full:
        first.setdefault((None if texts.domain is None else int(texts.domain[i]), *rows[i]), i)
    if (repeated := len(full) - len(first)) and texts.score is None and texts.label is None and not texts.classes:
        what = "repeated sentences" if len(texts.columns) == 1 else "repeated rows"
        log.warning("%s: %s %s left out (each would be its own negative)", texts.name, f"{repeated:,}", what)
        full = list(first.values())
    return texts if len(full) == len(rows) else texts.subset(full)


# ---------------------------------------------------------------------------------------------------------- known sets


def sts(name: str, split: str = "test") -> Texts:
    """Scored pairs: "stsb" (Cer et al. 2017), "sick" (Marelli et al. 2014) or "sts12" ... "sts16" (SemEval).

    Args:
        name: of the set.
        split: "train", "dev" or "test" of stsb and sick; "test" of the others, and "train" of sts12. "all" is all.

    Raises:
        InputError: the file is not on this machine, or no such split.
    """
    file, score = {"stsb": ("stsb", "score"), "sick": ("sick", "relatedness")}.get(name, ("sts12_16", "score"))
    table = _known_file("sts", f"{file}.csv.gz", f"split, {score}, sentence1, sentence2")
    inside = [task.lower() == name for task in table["task"]] if "task" in table else [True] * len(table["split"])
    splits = {part for part, mine in zip(table["split"], inside, strict=True) if mine}
    if split != "all" and split not in splits:
        raise InputError(f"{name} has the splits {', '.join(sorted(splits))}, not {split!r}")
    at = [i for i, part in enumerate(table["split"]) if inside[i] and split in ("all", part)]
    pairs = {"anchor": table["sentence1"], "positive": table["sentence2"]}
    return Texts(pairs, np.array(table[score], dtype=float), f"{name}/{split}").subset(at)


STS = ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb", "sick")
"""The seven sets of the protocol `sts-all`, in the order of everyone's tables."""


def without(texts: Texts, others: Iterable[str]) -> Texts:
    """`texts` without the rows that hold a sentence of `others`, whatever its case, spacing or full stop."""
    known = {plain(sentence) for sentence in others}
    rows = zip(*texts.columns.values(), strict=True)
    return texts.subset(i for i, row in enumerate(rows) if not any(plain(cell) in known for cell in row))


def plain(sentence: str) -> str:
    """A sentence without what makes no other of it: case, spacing, punctuation."""
    return " ".join(re.findall(r"\w+", sentence.lower()))


def _sts_sentences(split: str) -> Texts:
    """All sentences of the seven sets except those of STS-B's dev and test part: for studies that test on STS-B only."""
    _only("sts-sentences", split)
    sets = [sts(name, "all") for name in STS]
    tested = [sentence for part in ("dev", "test") for sentence in sts("stsb", part).sentences()]
    distinct = dict.fromkeys(sentence for texts in sets for sentence in texts.sentences())
    return without(Texts({"anchor": list(distinct)}, name="sts-sentences"), tested)


def _multi30k(split: str) -> Texts:
    _only("multi30k", split)
    path = sources.require("text_corpus", "multi30k_captions_en.txt.gz", "one caption a line")
    return Texts({"anchor": read_lines(path)}, name="multi30k")


def _multi30k_without_sts(split: str) -> Texts:
    """Captions that stand in no STS set: those were partly made from the same captions."""
    tested = [sentence for name in STS for sentence in sts(name, "all").sentences()]
    return replace(without(_multi30k(split), tested), name="multi30k-without-sts")


def _brown(split: str) -> Texts:
    _only("brown", split)
    path = sources.require("text_corpus", "brown_sentences.tsv.gz", "category TAB sentence")
    return Texts({"anchor": [line.split("\t", 1)[1] for line in read_lines(path)]}, name="brown")


def _snli(split: str) -> Texts:
    """Triples for supervised training: a premise, a sentence that follows from it, one that contradicts it."""
    table = _known_file("nli", "snli_dev_test.csv.gz", "split, label, premise, hypothesis")
    splits = set(table["split"])
    if split not in splits:
        raise InputError(f"snli has the splits {', '.join(sorted(splits))} here, not {split!r}: say snli:dev")
    of: dict[str, dict[str, str]] = {}
    for part, label, premise, hypothesis in zip(
        *(table[c] for c in ("split", "label", "premise", "hypothesis")), strict=True
    ):
        if part == split:
            of.setdefault(premise, {}).setdefault(label, hypothesis)
    rows = [
        (p, h["entailment"], h["contradiction"]) for p, h in of.items() if {"entailment", "contradiction"} <= h.keys()
    ]
    return Texts(dict(zip(_parts(3), map(list, zip(*rows, strict=True)), strict=True)), name=f"snli/{split}")


def _plain_sentences(split: str) -> Texts:
    """Unpaired sentences to pretrain on, none of them in STS-B's dev and test part.

    Multi30k, Brown, and the training parts of SST-2, MRPC, RTE and CoLA; of SNLI the dev part, since there is no other here.
    """
    _only("plain-sentences", split)
    found = [*_multi30k("train").columns["anchor"], *_brown("train").columns["anchor"]]
    for folder, file, part, titles in (
        ("glue", "sst2", "train", ("sentence",)),
        ("glue", "mrpc", "train", ("sentence1", "sentence2")),
        ("glue", "rte", "train", ("sentence1", "sentence2")),
        ("glue", "cola", "in_domain_train", ("sentence",)),
        ("nli", "snli_dev_test", "dev", ("premise", "hypothesis")),
    ):
        table = _known_file(folder, f"{file}.csv.gz", f"split, {', '.join(titles)}")
        found += [s for title in titles for s, of in zip(table[title], table["split"], strict=True) if of == part]
    tested = [sentence for part in ("dev", "test") for sentence in sts("stsb", part).sentences()]
    sentences = [sentence for sentence in dict.fromkeys(found) if sentence.strip()]
    return without(Texts({"anchor": sentences}, name="plain-sentences"), tested)


def _only(name: str, split: str) -> None:
    if split != "train":
        raise InputError(f"{name} has no split {split!r}; it is one set")


def _known_file(folder: str, file: str, holds: str) -> dict[str, list[str]]:
    return separated(read_lines(sources.require(folder, file, holds)), ",", file)


def _scored(name: str) -> Callable[[str], Texts]:
    return lambda split: sts(name, split)


def _paired(name: str) -> Callable[[str], Texts]:
    def load_pairs(split: str) -> Texts:
        from counterpoint.data import domains  # which needs this module

        return domains.pairs(name, split)

    return load_pairs


def _labelled(name: str) -> Callable[[str], Texts]:
    def load_labelled(split: str) -> Texts:
        from counterpoint.data import classes, labelled  # which need this module

        return labelled.load(name, split) if name.removesuffix("-held") in LABELLED else classes.texts_of(name, split)

    return load_labelled


PAIRS = "-pairs"
LABELLED = ("arxiv-titles", "arxiv-abstracts", "trec", "subj", "sst2", "sst2-negations", "brown-genres")
"""Sets whose texts have classes with names; see `counterpoint.data.labelled`."""
JUDGED = ("cola", "mrpc", "rte", "sick-e")
"""Sets whose sentences or pairs have a class as whole; see `counterpoint.data.classes`."""
CLASSIFIED = (*LABELLED, *JUDGED)
"""Sets whose rows have classes."""
DOMAINS = ("arxiv", "codenn", "cosqa", "multi30k", "mrpc", "sts", "same-statement", "same-topic")
"""Domains whose pairs have a name: ``arxiv-pairs`` and so on; see `counterpoint.data.domains`."""


NAMES: dict[str, Callable[[str], Texts]] = {
    **{name: _scored(name) for name in STS},
    "sts-sentences": _sts_sentences,
    "multi30k": _multi30k,
    "multi30k-without-sts": _multi30k_without_sts,
    "brown": _brown,
    "snli": _snli,
    "plain-sentences": _plain_sentences,
    **{name + PAIRS: _paired(name + PAIRS) for name in DOMAINS},
    **{name: _labelled(name) for name in (*LABELLED, *(name + "-held" for name in LABELLED), *JUDGED)},
}
"""Known sets; each takes a split."""


# -------------------------------------------------------------------------------------------------------------- tokens


@dataclass
class Ragged:
    """Rows of different length in one tensor.

    Args:
        flat: [sum of lengths] all rows one after the other.
        offsets: int64 [N + 1], row i is ``flat[offsets[i]:offsets[i + 1]]``.
    """

    flat: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Ragged:
        lengths = torch.tensor([0, *map(len, rows)])
        flat = np.fromiter((value for row in rows for value in row), np.int32, int(lengths.sum()))
        return cls(torch.from_numpy(flat), lengths.cumsum(0))

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def padded(self, index: Tensor, value: int) -> tuple[Tensor, Tensor]:
        """Rows at `index` as int64 [B, L], L the longest of them, filled up with `value`; and int64 mask [B, L]."""
        start = self.offsets[index]
        length = self.offsets[index + 1] - start
        column = torch.arange(int(length.max()) if len(length) else 0, device=self.flat.device)
        mask = column < length[:, None]
        at = (start[:, None] + column).masked_fill(~mask, 0)
        return self.flat[at].long().masked_fill(~mask, value), mask.long()

    def subset(self, index: Tensor) -> Ragged:
        length = self.lengths[index]
        offsets = torch.cat([length.new_zeros(1), length.cumsum(0)])
        at = torch.arange(int(offsets[-1]), device=self.flat.device)
        at = at + (self.offsets[index] - offsets[:-1]).repeat_interleave(length)
        return Ragged(self.flat[at], offsets)

    def to(self, device: torch.device | str) -> Ragged:
        return Ragged(self.flat.to(device), self.offsets.to(device))


@dataclass
class Sentences:
    """Tokenised sentences in memory: the items of every method that reads text.

    A batch holds ``input_ids`` and ``attention_mask`` int64 [B, L] of the anchor, the same with the prefix
    ``positive_``, ``negative_``, ``negative_2_`` ... for further columns (each with its own L), ``index`` int64 [B],
    ``words`` int64 [B, L] (number of the word a token belongs to, -1 for none) and ``kinds`` (with the column's prefix) int64
    [B, L] (of what kind a token is, -1 for none) if they were asked for, ``domain`` int64 [B] where the data have domains,
    and ``label`` int64 [B, P] where they have classes (-1 fills up).

    Args:
        ids: token ids by column ("anchor", "positive", "negative" ...).
        pad: id that fills short rows up.
        words: word numbers of the anchor's tokens.
        name: where they come from.
        truncated: sentences that were longer than the limit.
        domain: int64 [N], of which of the `domains` a row is.
        domains: their names.
        kinds: by column, the kinds of its tokens.
        class_of: int64 [N, P], which of the `classes` a row belongs to, -1 fills up.
        classes: their names.
        repeats: int64 [N], how often an epoch has a row; None is once.
    """

    ids: dict[str, Ragged]
    pad: int
    words: Ragged | None = None
    name: str = "sentences"
    truncated: int = 0
    domain: Tensor | None = None
    domains: tuple[str, ...] = ()
    kinds: dict[str, Ragged] = field(default_factory=dict)
    class_of: Tensor | None = None
    classes: tuple[str, ...] = ()
    repeats: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids["anchor"].offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 [N], tokens of the longest sentence of a row."""
        return torch.stack([rows.lengths for rows in self.ids.values()]).amax(0)

    @property
    def nbytes(self) -> int:
        return sum(rows.flat.nbytes + rows.offsets.nbytes for rows in (*self.ids.values(), *self.kinds.values()))

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The rows at `index` as a batch, padded only to the longest of them."""
        at = index.to(self.ids["anchor"].offsets.device)
        batch = {"index": at}
        for part, rows in self.ids.items():
            prefix = "" if part == "anchor" else f"{part}_"
            batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"] = rows.padded(at, self.pad)
            if part in self.kinds:
                batch[f"{prefix}kinds"] = self.kinds[part].padded(at, -1)[0]
        if self.words is not None:
            batch["words"] = self.words.padded(at, -1)[0]
        if self.domain is not None:
            batch["domain"] = self.domain[at]
        if self.class_of is not None:
            batch["label"] = self.class_of[at]
        return batch

    @property
    def label(self) -> Tensor | None:
        """int64 [N]: the class of each row, its first where it has several; None without classes."""
        return None if self.class_of is None else self.class_of[:, 0]

    def subset(self, index: Tensor | Sequence[int]) -> Sentences:
        """The rows at `index`, in that order."""
        at = torch.as_tensor(index, dtype=torch.int64, device=self.ids["anchor"].offsets.device)
        words = None if self.words is None else self.words.subset(at)
        more = {name: x[at] for name in ("domain", "class_of", "repeats") if (x := getattr(self, name)) is not None}
        ids, kinds = ({part: rows.subset(at) for part, rows in of.items()} for of in (self.ids, self.kinds))
        return replace(self, ids=ids, words=words, kinds=kinds, **more)

    def in_domains(self, names: Sequence[str]) -> Sentences:
        """The same rows with their domains numbered as `names` are.

        Raises:
            InputError: a row of a domain that is not among them.
        """
        if self.domain is None:
            return self
        if missing := [name for name in self.domains if name not in names]:
            known = f"{', '.join(names)}" if names else "none"
            raise InputError(
                f"{self.name} has the domain {missing[0]}, but the model knows {known}: give "
                f"--domains '[{', '.join(self.domains)}]'"
            )
        number = torch.tensor([names.index(name) for name in self.domains], device=self.domain.device)
        return replace(self, domain=number[self.domain], domains=tuple(names))

    def to(self, device: torch.device | str) -> Sentences:
        words = None if self.words is None else self.words.to(device)
        more = {
            name: x.to(device) for name in ("domain", "class_of", "repeats") if (x := getattr(self, name)) is not None
        }
        ids, kinds = ({part: rows.to(device) for part, rows in of.items()} for of in (self.ids, self.kinds))
        return replace(self, ids=ids, words=words, kinds=kinds, **more)


Kinds = Callable[[str], Sequence[int] | np.ndarray]
"""The kind of each character of a text, as a number; -1 for none."""


def tokenise(
    texts: Texts,
    tokenizer: Any,
    max_length: int | Mapping[str, int],
    *,
    words: bool = False,
    kinds: Mapping[str, Kinds] | None = None,
    together: bool = False,
) -> Sentences:
    """Turn sentences into tokens, once.

    Sentences longer than `max_length` tokens (special ones counted) are cut, and the log says how many, once. A row that
    has no token at all (an empty sentence under a tokeniser without special tokens) gets the padding token as its only one.

    Args:
        texts: what `load` found.
        tokenizer: of transformers.
        max_length: longest row, or that of each column by its part.
        words: also number the words (runs without white space) that the anchor's tokens come from.
        kinds: by column, what says of what kind each character is; a token is of the kind of its last character.
        together: both sentences of a row as one, as the tokeniser joins them ([CLS] a [SEP] b [SEP]); the longer one is cut.

    Raises:
        InputError: `words` or `kinds` with a tokeniser that does not know where in the text its tokens come from.
    """
    pad, truncated = pad_of(tokenizer), 0
    wanted: dict[tuple[str, str], Kinds] = {(part, "kinds"): of for part, of in (kinds or {}).items()}
    if words:
        wanted["anchor", "words"] = word_numbers
    if wanted and not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not say which word a token comes from; repeat tokens, not words"
            if words
            else f"{type(tokenizer).__name__} does not say which characters a token comes from, so its kind is not known"
        )
    ids: dict[str, Ragged] = {}
    found: dict[str, dict[str, Ragged]] = {"words": {}, "kinds": {}}
    cuts: dict[int, int] = {}
    columns = {"anchor": texts.columns["anchor"]} if together else texts.columns
    second = texts.columns.get("positive") if together else None
    for part, column in columns.items():
        most = max_length if isinstance(max_length, int) else max_length[part]
        rows: list[list[int]] = []
        marks: dict[str, list[list[int]]] = {what: [] for of, what in wanted if of == part}
        for start in range(0, len(column), 8192):
            chunk = [*column[start : start + 8192]]
            other = [] if second is None else [[*second[start : start + 8192]]]
            options = {"return_offsets_mapping": True} if marks else {}
            tokens = tokenizer(
                chunk, *other, truncation=True, max_length=most, return_attention_mask=False,
                return_token_type_ids=False, **options,
            )  # fmt: skip
            full = [i for i, row in enumerate(tokens["input_ids"]) if len(row) >= most]
            if full:
                cut = [[sentences[i] for i in full] for sentences in (chunk, *other)]
                entire = tokenizer(*cut, truncation=False, verbose=False)["input_ids"]
                cuts[most] = cuts.get(most, 0) + sum(len(row) > most for row in entire)
            rows += [row or [pad] for row in tokens["input_ids"]]
            for what, values in marks.items():
                at, spans = wanted[part, what], zip(chunk, tokens["offset_mapping"], strict=True)
                values += [_of_tokens(at(text), span) or [-1] for text, span in spans]
        ids[part] = Ragged.of(rows)
        for what, values in marks.items():
            found[what][part] = Ragged.of(values)
    count = sum(map(len, columns.values()))
    for most, cut_rows in cuts.items():
        truncated += cut_rows
        if cut_rows:
            log.warning("%s: %s of %s sentences cut to %d tokens", texts.name, f"{cut_rows:,}", f"{count:,}", most)
    domain, class_of = (
        None if x is None else torch.from_numpy(np.array(x, np.int64)) for x in (texts.domain, texts.class_of)
    )
    known = (texts.domains, found["kinds"], class_of, texts.classes)
    return Sentences(ids, pad, found["words"].get("anchor"), texts.name, truncated, domain, *known)


def pad_of(tokenizer: Any) -> int:
    """The id that fills rows up: the padding token, else the end-of-text token (which the log says once).

    Raises:
        InputError: the tokeniser has neither.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{type(tokenizer).__name__} has neither a padding nor an end token; set tokenizer.pad_token to one it has"
        )
    log.warning("the tokeniser has no padding token; its end token %s pads instead", tokenizer.eos_token)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.eos_token_id


def word_numbers(text: str) -> list[int]:
    """Which word (from 0) each character lies in; -1 for white space."""
    at = [-1] * len(text)
    for number, word in enumerate(re.finditer(r"\S+", text)):
        at[word.start() : word.end()] = [number] * (word.end() - word.start())
    return at


def _of_tokens(at: Sequence[int] | np.ndarray, spans: Sequence[tuple[int, int]]) -> list[int]:
    """What characters are, of tokens; -1 for special tokens."""
    # the last character: tokens of some tokenisers begin with the space before their word
    return [-1 if end <= start else int(at[end - 1]) for start, end in spans]
