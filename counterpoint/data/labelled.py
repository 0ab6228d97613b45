"""Texts with classes that have names, each set under a name of its own, with the splits train, dev and test.

``NAME-held`` is the same set with some classes held out: no training or dev text has any of them, the test part has all. What
is learned of the other classes is then asked about classes that nobody trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from counterpoint.data import sources, texts
from counterpoint.data.negation import denies
from counterpoint.data.texts import Texts, classed
from counterpoint.errors import InputError

SPLITS = ("train", "dev", "test")
HELD = "-held"

ARXIV = {
    "cs.CR": "cryptography and security",
    "cs.IR": "information retrieval",
    "cs.NE": "neural and evolutionary computing",
    "cs.RO": "robotics",
    "cs.SD": "sound and audio",
    "cs.SI": "social networks",
    "econ.EM": "econometrics",
    "physics.bio-ph": "biological physics",
    "q-bio.GN": "genomics",
    "q-bio.NC": "neurons and cognition",
    "q-fin.ST": "statistical finance",
    "stat.AP": "applied statistics",
}
"""Categories of arXiv by their names; a paper may be in several."""

TREC = ("abbreviation", "description", "entity", "person", "location", "number")
UNSEEN = {
    "arxiv-titles": ("robotics", "genomics", "statistical finance", "social networks"),
    "arxiv-abstracts": ("robotics", "genomics", "statistical finance", "social networks"),
    "trec": ("location", "number"),
    "brown-genres": ("religion", "science fiction", "news", "government", "romance"),
}
"""Classes that are held out under ``NAME-held``; of two classes nothing can be."""

Row = tuple[str, Sequence[str]]


def load(name: str, split: str) -> Texts:
    """The set called `name` ("trec", "trec-held" ...).

    Raises:
        InputError: no such split, files that are not on this machine, or a set of which no class can be held out.
    """
    base, held = name.removesuffix(HELD), name.endswith(HELD)
    if split not in SPLITS:
        raise InputError(f"{name} has the splits {', '.join(SPLITS)}, not {split!r}")
    if held and base not in UNSEEN:
        raise InputError(f"{base} has too few classes to hold any out; sets that have enough are {', '.join(UNSEEN)}")
    parts, classes = MAKERS[base]()
    rows = parts[split]
    if held and split != "test":
        rows = [(text, names) for text, names in rows if not set(names) & set(UNSEEN[base])]
    found = Texts({"anchor": [text for text, _ in rows]}, name=f"{name}/{split}")
    found = replace(found, **classed([names for _, names in rows], classes))
    if split == "test":
        return found
    return texts.without(found, [text for text, _ in parts["test"]])


def arxiv(abstracts: bool) -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """Titles (and abstracts) of papers on arXiv; all their categories among `ARXIV`, the primary one first."""
    holds = "primary_category, categories, title, abstract"
    table = texts.separated(
        texts.read_lines(sources.require("arxiv_abstracts", "arxiv_12cat.csv.gz", holds)), ",", "arxiv_12cat.csv.gz"
    )
    rows = []
    columns = (table[name] for name in ("primary_category", "categories", "title", "abstract"))
    for primary, every, title, abstract in zip(*columns, strict=True):
        codes = dict.fromkeys([primary, *every.replace(",", " ").split()])
        names = [ARXIV[code] for code in codes if code in ARXIV]
        rows.append((f"{title} {abstract}" if abstracts else title, names))
    return shared_out(rows), tuple(ARXIV.values())


def trec() -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """Questions by what they ask for (Li and Roth 2002); a tenth of the training part is dev."""
    table = _transfer()
    parts: dict[str, list[Row]] = {"train": [], "test": []}
    for task, split, label, sentence in table:
        if task == "TREC":
            parts[split].append((sentence, [TREC[int(label)]]))
    some = shared_out(parts["train"], (0.9, 1.0))
    return {"train": some["train"], "dev": some["dev"], "test": parts["test"]}, TREC


def subj() -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """Sentences of film reviews and of plots (Pang and Lee 2004)."""
    names = ("a personal opinion", "an objective description")
    rows: list[Row] = [(sentence, [names[int(label)]]) for task, _, label, sentence in _transfer() if task == "SUBJ"]
    return shared_out(rows), names


def sst2() -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """Phrases and sentences of film reviews, liked or not (Socher et al. 2013); the test part has sentences only."""
    table = texts.separated(
        texts.read_lines(sources.require("glue", "sst2.csv.gz", "split, label, sentence")), ",", "sst2.csv.gz"
    )
    names = ("a bad review", "a good review")
    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for split, label, sentence in zip(table["split"], table["label"], table["sentence"], strict=True):
        parts[split].append((sentence, [names[int(label)]]))
    return parts, names


def sst2_negations() -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """Those of `sst2` that deny something ("not", "never", "doesn't"): a tenth in training, a fifth in dev and test."""
    parts, names = sst2()
    return {split: [row for row in rows if denies(row[0])] for split, rows in parts.items()}, names


def brown() -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """Sentences of the Brown corpus by the kind of text that they stand in."""
    said = {
        "belles_lettres": "essays",
        "learned": "science",
        "lore": "popular lore",
        "science_fiction": "science fiction",
    }
    lines = texts.read_lines(sources.require("text_corpus", "brown_sentences.tsv.gz", "category TAB sentence"))
    rows: list[Row] = []
    for line in lines:
        genre, _, sentence = line.partition("\t")
        rows.append((sentence, [said.get(genre, genre)]))
    return shared_out(rows), tuple(sorted({names[0] for _, names in rows}))


def shared_out(rows: Sequence[Row], shares: tuple[float, float] = (0.7, 0.8)) -> dict[str, list[Row]]:
    """Rows as train, dev and test, at random but always alike: what lies below the first and the second share, and the rest."""
    order = np.random.default_rng(0).permutation(len(rows))
    ends = [round(share * len(rows)) for share in shares]
    return {name: [rows[i] for i in part] for name, part in zip(SPLITS, np.split(order, ends), strict=True)}


def _transfer() -> list[tuple[str, str, str, str]]:
    file = sources.require("senteval", "transfer.csv.gz", "task, split, label, sentence")
    table = texts.separated(texts.read_lines(file), ",", "transfer.csv.gz")
    return list(zip(*(table[name] for name in ("task", "split", "label", "sentence")), strict=True))


MAKERS: dict[str, Callable[[], tuple[dict[str, list[Row]], tuple[str, ...]]]] = {
    "arxiv-titles": lambda: arxiv(False),
    "arxiv-abstracts": lambda: arxiv(True),
    "trec": trec,
    "subj": subj,
    "sst2": sst2,
    "sst2-negations": sst2_negations,
    "brown-genres": brown,
}
"""(rows of each split, names of the classes) of every set by its name; a row is a text and the names of its classes."""
