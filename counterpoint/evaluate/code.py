"""Search: where the answer to a question stands among all candidates, question and candidates in one space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from counterpoint.contrast import unit
from counterpoint.data import code, domains, texts
from counterpoint.errors import InputError
from counterpoint.evaluate.image_text import CUTOFFS, first_hits, guesses, reciprocal_rank, standing
from counterpoint.evaluate.protocols import Result, bootstrap, checked_features
from counterpoint.evaluate.texts import Encode, bag_of_words

CODE_SEARCH = "code-search"

LAST = 1000
"""An answer beyond this rank counts as not found."""

OF_CODE = ("codenn-pairs", "cosqa-pairs")
"""Named sets that `code-search` measures without being asked to."""


def code_search(encode: Encode, task: domains.Search, *, name: str = CODE_SEARCH, subject: str = "") -> Result:
    """Mean reciprocal rank x 100 of the first right answer among all candidates, by cosine: protocol `code-search`.

    The rank is that of the best of a question's right answers; beyond 1,000 it counts as 0. Equally similar candidates stand
    in random order, of which the result is the expectation: constant vectors score what guessing scores. All candidates are
    ranked for every question.

    Args:
        encode: of questions and candidates alike.
        task: the questions and the candidates.
        name: of the protocol, with the data if they are no run's own.
        subject: for the record.

    Returns:
        A result with a bootstrap interval over questions, whose detail holds R@1, R@5 and R@10 in %, `candidates`, and what
        guessing scores (`chance`).

    Source: Husain et al. 2019 (arXiv 1909.09436) rank among 1,000; among all candidates, and with 0 beyond rank 1,000,
    DeepSoftwareAnalytics/CoCoSoDa at 2f2bf8e.
    """
    query, candidates = (unit(checked_features(encode([*x]), "search")) for x in (task.queries, task.candidates))
    if (len(query), len(candidates)) != (len(task.queries), len(task.candidates)):
        raise InputError(f"encode returned {len(query) + len(candidates):,} rows, but one for each text is needed")
    relevant = torch.from_numpy(task.relevant)
    found = reciprocal_rank(*standing(query, candidates.to(query.device), relevant), LAST).cpu()
    hits = first_hits(query, candidates.to(query.device), relevant, CUTOFFS)
    detail: dict[str, Any] = {f"R@{k}": 100 * float(hits[k].mean()) for k in CUTOFFS}
    right, nobody = (relevant >= 0).sum(1), torch.zeros(len(relevant), dtype=torch.int64)
    chance = reciprocal_rank(nobody, right, len(candidates) - right, LAST)
    detail |= {"candidates": len(candidates), "chance": 100 * float(chance.mean())}
    detail |= {f"chance R@{k}": 100 * float(v.mean()) for k, v in guesses(right, len(candidates), CUTOFFS).items()}
    low, high = bootstrap(found)
    return Result(name, "MRR", 100 * float(found.mean()), (100 * low, 100 * high), len(query), subject, detail)


def bag_of_names(sentences: Sequence[str]) -> np.ndarray:
    """The baseline that learns nothing: counts of hashed words, of names their parts (``readLine`` is two words)."""
    return bag_of_words([code.words(sentence) for sentence in sentences])


def task_of(source: Any, split: str = "test", *, own: bool = True) -> dict[str, domains.Search]:
    """What is asked and looked for in data, by domain ("" where there is one); empty where the data are no pairs.

    Each domain (language) has its own candidates.

    Args:
        source: name, names with a plus between them, file or table.
        split: part of a named set.
        own: whether files and tables may be taken: not those that training saw.
    """
    names = [part.partition(":")[0] for part in source.split("+")] if isinstance(source, str) else [""]
    if all(name in texts.NAMES for name in names):
        if not all(name.endswith(texts.PAIRS) for name in names):
            return {}
        found = {name.removesuffix(texts.PAIRS): domains.search(name, split) for name in names}
        return found if len(found) > 1 else {"": found.popitem()[1]}
    if not own:
        return {}
    rows = texts.load(source, whole=True)
    if "positive" not in rows.columns or rows.score is not None:
        return {}
    if rows.domain is None:
        return {"": domains.Search.of(rows)}
    parts = {name: rows.subset(np.flatnonzero(rows.domain == i)) for i, name in enumerate(rows.domains)}
    return {name: domains.Search.of(part) for name, part in parts.items()}


def searched(
    encode: Encode, tasks: Mapping[str, domains.Search], *, name: str = CODE_SEARCH, subject: str = ""
) -> Result:
    """`code_search` in each domain, and the mean over domains; the detail holds each one's under its name."""
    each = {domain: code_search(encode, task, name=name, subject=subject) for domain, task in tasks.items()}
    first = next(iter(each.values()))
    if len(each) == 1:
        return first
    shared = {key: float(np.mean([result.detail[key] for result in each.values()])) for key in first.detail}
    shared["candidates"] = sum(result.detail["candidates"] for result in each.values())
    detail = {"".join(c if c.isalnum() else "_" for c in domain): result.value for domain, result in each.items()}
    value, n = float(np.mean([*detail.values()])), sum(result.n for result in each.values())
    return Result(name, "MRR", value, None, n, subject, {**detail, **shared})


def measure(
    subjects: Mapping[str, Any],
    source: Any,
    names: Sequence[str] | None = None,
    *,
    own: bool = True,
    bag: bool = True,
) -> Iterator[Result]:
    """Protocol `code-search` on every subject: in the test part of `source`, or of named sets (``code-search:cosqa-pairs``).

    Args:
        subjects: methods by what they are called.
        source: what a run was trained on, or is to be measured on.
        names: protocols; None measures `source` where one can search in it.
        own: as in `task_of`, of `source`.
        bag: measure also a bag of words.

    Raises:
        InputError: data to search in are missing under a name that was asked for.
    """
    for name in (CODE_SEARCH,) if names is None else names:
        asked = name.partition(":")[2]
        tasks = task_of(asked or source, own=own or bool(asked))
        if not tasks:
            if names is None:
                return
            raise InputError(
                f"{asked or source} holds no pairs that training did not see, which {CODE_SEARCH} needs: give --data with "
                f"columns query and code, or name sets as in {CODE_SEARCH}:cosqa-pairs"
            )
        encoders: dict[str, Encode] = {subject: method.encode for subject, method in subjects.items()}
        if bag:
            encoders["bag of words"] = bag_of_names
        for subject, encode in encoders.items():
            yield searched(encode, tasks, name=name, subject=subject)


def is_code(source: Any) -> bool:
    """Whether the data are named sets of code."""
    names = [part.partition(":")[0] for part in source.split("+")] if isinstance(source, str) else [""]
    return all(name in OF_CODE for name in names)


def score_of(source: Any, method: Any) -> Result:
    """Mean reciprocal rank in the dev part of what a training reads: what it may choose among its weights by."""
    return searched(method.encode, task_of(source, "dev"), name=f"{CODE_SEARCH}-dev")
