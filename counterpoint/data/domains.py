"""Pairs of texts from several domains: positives to train on, labelled pairs to test on, each under a name of its own.

Every set has the splits train (positives only, at most `MOST`), dev and test (labelled: 1 belong together, 0 do not; those
of cosqa-pairs all belong together, and are looked for among all functions). What is held out, and which pairs are negative,
depends on the files alone. No training pair holds a text of dev or test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from counterpoint.data import code, sources, texts
from counterpoint.data.texts import PAIRS, Texts
from counterpoint.errors import InputError

MOST = 5000
"""Positive pairs of a domain that training gets."""

HELD = 300
"""Positive pairs of dev, and of test; each has as many negatives."""

TRIED = 20
"""Other rows among which the negative of a held-out pair is looked for."""

SPLITS = ("train", "dev", "test")


def pairs(name: str, split: str) -> Texts:
    """The pairs called `name` ("arxiv-pairs" ...).

    Raises:
        InputError: no such split, or files that are not on this machine.
    """
    if split not in SPLITS:
        raise InputError(f"{name} has the splits {', '.join(SPLITS)}, not {split!r}")
    train, dev, test = MAKERS[name.removesuffix(PAIRS)]()
    if split != "train":
        return replace(dev if split == "dev" else test, name=f"{name}/{split}")
    train = texts.without(train, [*dev.sentences(), *test.sentences()])
    _, first = np.unique(np.array([*zip(*train.columns.values(), strict=True)]), axis=0, return_index=True)
    train = train.subset(np.sort(first))
    if len(train) > MOST:
        train = train.subset(_order(len(train))[:MOST])
    return replace(train, name=f"{name}/train")


def matched(rows: Sequence[tuple[str, str, str]]) -> tuple[Texts, Texts, Texts]:
    """(train, dev, test) of rows (text, its partner, kind).

    A held-out text's negative is, of `TRIED` partners of other held-out rows of its kind, the one that shares most words
    with it, so that a look at the words is not enough.
    """
    order = _order(len(rows))
    if len(order) < 4 * HELD:
        raise InputError(f"{len(rows):,} pairs are too few to hold out {2 * HELD:,}")
    dev, test, train = np.split(order, [HELD, 2 * HELD])
    a, b, _ = zip(*(rows[i] for i in train), strict=True)
    return Texts({"anchor": a, "positive": b}), _labelled(rows, dev), _labelled(rows, test)


def _labelled(rows: Sequence[tuple[str, str, str]], at: np.ndarray) -> Texts:
    random = np.random.default_rng(1)
    words = {i: set(re.findall(r"\w+", rows[i][1].lower())) for i in at}
    anchors, others, label = [], [], []
    for i in at:
        asked = set(re.findall(r"\w+", rows[i][0].lower()))
        drawn = [j for j in random.permutation(at) if rows[j][2] == rows[i][2] and rows[j][1] != rows[i][1]][:TRIED]
        if not drawn:
            continue
        other = max(drawn, key=lambda j: (len(asked & words[j]) / (1 + len(words[j])) ** 0.5, -j))
        anchors += [rows[i][0]] * 2
        others += [rows[i][1], rows[other][1]]
        label += [1, 0]
    return Texts({"anchor": anchors, "positive": others}, label=np.array(label))


def _order(n: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(n)


def arxiv() -> tuple[Texts, Texts, Texts]:
    """Title and abstract of a paper on arXiv; negatives are abstracts of the same primary category."""
    holds = "arxiv_id, primary_category, title, abstract"
    table = _columns("arxiv_abstracts", "arxiv_12cat.csv.gz", holds)
    return matched(list(zip(table["title"], table["abstract"], table["primary_category"], strict=True)))


def codenn() -> tuple[Texts, Texts, Texts]:
    """Title and code of a question on StackOverflow (Iyer et al. 2016, the parts valid and test); negatives: same language."""
    rows = _json_lines("code_search", "stackoverflow_codenn.jsonl.gz", "lang, query and code of each question")
    once = {row["query"]: (row["query"], row["code"], row["lang"]) for row in rows if row["code"].strip()}
    return matched([*once.values()])


def cosqa() -> tuple[Texts, Texts, Texts]:
    """Python functions and what people ask a search engine for (Huang et al. 2021, arXiv 2105.13239), all without docstrings.

    The queries of dev and test are 500 each. The questions to train on are the first paragraphs of the docstrings of those
    functions that answer no query; of less than three words they are left out.
    """
    said = [code.without_docstring(function) for function in _functions()]
    queries = _json_lines(
        "code_search", "cosqa_queries.jsonl.gz", "split, query and retrieval_idx, the function that answers"
    )
    answers = {row["retrieval_idx"] for row in queries}
    asked = [(code.summary(docstring), i) for i, (_, docstring) in enumerate(said) if i not in answers]
    rows = {"train": [(query, i) for query, i in asked if len(query.split()) >= 3]}
    rows |= {
        part: [(q["query"], q["retrieval_idx"]) for q in queries if q["split"] == part] for part in ("dev", "test")
    }
    made = [
        Texts({"anchor": [query for query, _ in rows[part]], "positive": [said[i][0] for _, i in rows[part]]})
        for part in SPLITS
    ]
    return made[0], made[1], made[2]


def _functions() -> list[str]:
    rows = _json_lines("code_search", "cosqa_codebase.jsonl.gz", "retrieval_idx and code of each function")
    return [row["code"] for row in sorted(rows, key=lambda row: row["retrieval_idx"])]


def multi30k() -> tuple[Texts, Texts, Texts]:
    """Two captions of one photograph (Elliott et al. 2016); negatives are captions of other ones."""
    lines = texts.read_lines(sources.require("text_corpus", "multi30k_captions_en.txt.gz", "one caption a line"))
    images = len(lines) // 5
    return matched([(a, b, "") for a, b in zip(lines[:images], lines[images : 2 * images], strict=True) if a != b])


def mrpc() -> tuple[Texts, Texts, Texts]:
    """Sentences of news that say the same (Dolan and Brockett 2005); negatives are the pairs that people refused."""
    table = _columns("glue", "mrpc.csv.gz", "split, label, sentence1, sentence2")
    label = np.array(table["label"], dtype=np.int64)
    every = Texts({"anchor": table["sentence1"], "positive": table["sentence2"]}, label=label)
    part = np.array(table["split"])
    train = replace(every.subset(np.flatnonzero((part == "train") & (label == 1))), label=None)
    return train, every.subset(np.flatnonzero(part == "dev")), every.subset(np.flatnonzero(part == "test"))


def sts() -> tuple[Texts, Texts, Texts]:
    """Pairs of STS-B and SICK that people scored 4 or more; those scored 3 or less are negatives, others are left out."""

    def judged(split: str) -> Texts:
        both = [texts.sts(name, split) for name in ("stsb", "sick")]
        columns = {part: [cell for x in both for cell in x.columns[part]] for part in ("anchor", "positive")}
        score = np.concatenate([x.score for x in both if x.score is not None])
        clear = np.flatnonzero((score >= 4) | (score <= 3))
        return Texts(columns, label=(score >= 4).astype(np.int64)).subset(clear)

    train = judged("train")
    assert train.label is not None
    return replace(train.subset(np.flatnonzero(train.label)), label=None), judged("dev"), judged("test")


def contradiction(domain: str) -> tuple[Texts, Texts, Texts]:
    """Sentences that say one of 24 things about one of 24 places, made from word lists.

    In the domain "same-statement" two sentences belong together that say the same thing of different places, in
    "same-topic" two that say different things of the same place. What is positive in one is negative in the other, and the
    sentences are the same: an encoder that does not know the domain can only be right about one of them. Held-out sentences
    are combinations of place and statement that training does not see.
    """
    cells = list(product(range(len(PLACES)), range(len(STATEMENTS))))
    order = _order(len(cells))
    held = [{cells[i] for i in order[start : start + 120]} for start in (0, 120)]
    random = np.random.default_rng(2)

    def sentence(place: int, statement: int) -> str:
        return str(random.choice(FRAMES)).format(PLACES[place], STATEMENTS[statement][random.integers(2)])

    def related(inside: Sequence[tuple[int, int]], same: int) -> list[tuple[str, str]]:
        """For each cell two sentences: of it, and of another one that shares its place (0) or statement (1)."""
        found = []
        for cell in inside:
            others = [x for x in inside if x[same] == cell[same] and x != cell]
            if others:
                found.append((sentence(*cell), sentence(*others[random.integers(len(others))])))
        return found

    positive = {"same-statement": 1, "same-topic": 0}[domain]
    free = [cell for cell in cells if cell not in held[0] | held[1]]
    rows = [row for _ in range(8) for row in related(free, positive)]
    train = Texts(dict(zip(("anchor", "positive"), map(list, zip(*rows, strict=True)), strict=True)))
    tests = []
    for part in held:
        inside = sorted(part)
        answers = [(row, label) for label in (1, 0) for row in related(inside, positive if label else 1 - positive)]
        a, b = zip(*(row for row, _ in answers), strict=True)
        tests.append(Texts({"anchor": a, "positive": b}, label=np.array([label for _, label in answers])))
    return train, tests[0], tests[1]


# -------------------------------------------------------------------------------------------------------------- search


@dataclass(frozen=True)
class Search:
    """Questions, and all that their answers are looked for among.

    Args:
        queries: N questions.
        candidates: M texts, all different.
        relevant: int64 [N, P], which candidates answer each question; -1 fills up.
        name: where they come from.
    """

    queries: tuple[str, ...]
    candidates: tuple[str, ...]
    relevant: np.ndarray
    name: str = "search"

    @classmethod
    def of(cls, pairs: Texts, more: Iterable[str] = ()) -> Search:
        """Each distinct anchor asks for its positives among all positives of the pairs, and `more`.

        Rows without an anchor are candidates only; so are those labelled 0.

        Raises:
            InputError: no columns of pairs, or no question with an answer.
        """
        if "positive" not in pairs.columns:
            raise InputError(f"{pairs.name} holds no pairs: search needs two columns, such as query and code")
        place = {text: i for i, text in enumerate(dict.fromkeys([*pairs.columns["positive"], *more])) if text.strip()}
        place = {text: i for i, text in enumerate(place)}
        label = np.ones(len(pairs)) if pairs.label is None else pairs.label
        answers: dict[str, dict[int, None]] = {}
        for query, answer, together in zip(pairs.columns["anchor"], pairs.columns["positive"], label, strict=True):
            if query.strip() and answer.strip() and together:
                answers.setdefault(query, {})[place[answer]] = None
        if not answers:
            raise InputError(f"{pairs.name} has no row with both a question and an answer, which search needs")
        relevant = np.full((len(answers), max(map(len, answers.values()))), -1)
        for row, found in zip(relevant, answers.values(), strict=True):
            row[: len(found)] = [*found]
        return cls(tuple(answers), tuple(place), relevant, pairs.name)


def search(name: str, split: str = "test") -> Search:
    """What is asked and looked for in a part of the set called `name`.

    The candidates of cosqa-pairs are all 6,267 functions, of which training knows those that answer no query; those of any
    other set are the partners in dev and test.

    Args:
        name: of a set of pairs ("cosqa-pairs" ...).
        split: "dev" or "test".

    Raises:
        InputError: no such split, or files that are not on this machine.
    """
    if split == "train":
        raise InputError(f"{name} has the splits dev, test to search in, not 'train'")
    if name.removesuffix(PAIRS) == "cosqa":
        return Search.of(pairs(name, split), (code.without_docstring(function)[0] for function in _functions()))
    held = [pairs(name, part) for part in ("dev", "test")]
    return Search.of(held[split == "test"], (text for part in held for text in part.columns["positive"]))


# --------------------------------------------------------------------------------------------------------------- files


def _json_lines(folder: str, file: str, holds: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in texts.read_lines(sources.require(folder, file, holds))]


def _columns(folder: str, file: str, holds: str) -> dict[str, list[str]]:
    return texts.separated(texts.read_lines(sources.require(folder, file, holds)), ",", file)


PLACES = (
    "Paris", "Cairo", "Lima", "Oslo", "Tokyo", "Delhi", "Boston", "Nairobi", "Sydney", "Moscow", "Madrid", "Toronto",
    "the harbour", "the school", "the hospital", "the library", "the airport", "the market", "the museum", "the castle",
    "the village", "the factory", "the island", "the valley",
)  # fmt: skip
STATEMENTS = (
    ("prices are rising", "everything gets more expensive"), ("it is raining hard", "there is a downpour"),
    ("the trains are late", "rail service is delayed"), ("people are dancing", "a crowd moves to the music"),
    ("the election was postponed", "the vote has been put off"), ("a fire broke out", "something is burning"),
    ("children play football", "kids kick a ball around"), ("the lights went out", "there is no electricity"),
    ("tourists take photographs", "visitors use their cameras"), ("a bridge collapsed", "an overpass fell down"),
    ("the water is polluted", "nobody can drink what flows from the tap"), ("a film is being shot", "a movie crew is at work"),
    ("the workers are on strike", "staff refuse to do their jobs"), ("snow covers the roofs", "the houses are white with frost"),
    ("a thief was arrested", "police caught a burglar"), ("the bread is fresh", "loaves come straight from the oven"),
    ("the choir is singing", "voices perform a hymn"), ("a new law was passed", "the legislation has been approved"),
    ("doctors treat the wounded", "physicians care for the injured"), ("the dogs bark all night", "hounds make noise until dawn"),
    ("trees are being planted", "gardeners set saplings"), ("a wedding takes place", "two people get married"),
    ("the chess final begins", "the last match of the board game starts"), ("robots build cars", "machines assemble vehicles"),
)  # fmt: skip
FRAMES = ("In {0} {1}.", "At {0}, {1}.", "Today {1} in {0}.", "News from {0}: {1}.")

MAKERS: dict[str, Callable[[], tuple[Texts, Texts, Texts]]] = {
    "arxiv": arxiv,
    "codenn": codenn,
    "cosqa": cosqa,
    "multi30k": multi30k,
    "mrpc": mrpc,
    "sts": sts,
    "same-statement": lambda: contradiction("same-statement"),
    "same-topic": lambda: contradiction("same-topic"),
}
"""(train, dev, test) of every domain by its name."""
