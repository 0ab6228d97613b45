"""Views of text as words: rewordings, easy data augmentation, whose sentences keep their label, and words of like meaning.

Words are what white space separates. Everything is drawn from a generator, so that a seed gives the same copies again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint.data.negation import affirmed
from counterpoint.data.texts import read_lines
from counterpoint.errors import InputError

Similar = Callable[[str], Sequence[str]]
"""Words that may stand in the place of a word in lower case; none where there are none."""

CORE = re.compile(r"^(\W*)(\w(?:.*\w)?)(\W*)$")
LEAST = 3
"""Letters of the shortest word that counts as a neighbour."""


def replace_words(words: Sequence[str], count: int, similar: Similar, generator: torch.Generator) -> list[str]:
    """Up to `count` distinct words that are no stop words give way, wherever they stand, to one of their similar ones."""
    found = list(words)
    able = [word for word in dict.fromkeys(map(core, words)) if word not in stop_words() and similar(word)]
    for i in torch.randperm(len(able), generator=generator)[:count].tolist():
        new = _one(similar(able[i]), generator)
        found = [dressed(new, word) if core(word) == able[i] else word for word in found]
    return found


def insert_words(words: Sequence[str], count: int, similar: Similar, generator: torch.Generator) -> list[str]:
    """`count` times, a word similar to a random one of the sentence is put at a random place."""
    found = list(words)
    for _ in range(count):
        able = [word for word in map(core, found) if similar(word)]
        if not able:
            break
        new = _one(similar(_one(able, generator)), generator)
        found.insert(int(torch.randint(len(found) + 1, (), generator=generator)), new)
    return found


def swap_words(words: Sequence[str], count: int, generator: torch.Generator | None) -> list[str]:
    """`count` times, two random words change places."""
    found = list(words)
    for _ in range(count if len(found) > 1 else 0):
        a, b = torch.randperm(len(found), generator=generator)[:2].tolist()
        found[a], found[b] = found[b], found[a]
    return found


def delete_words(words: Sequence[str], rate: float, generator: torch.Generator) -> list[str]:
    """Each word is left out with probability `rate`; where none would be left, a random one stays."""
    draw = torch.rand(len(words), generator=generator)
    return [word for word, x in zip(words, draw.tolist(), strict=True) if x >= rate] or [_one(words, generator)]


def leave_out(words: Sequence[str], rate: float, generator: torch.Generator | None = None) -> list[str]:
    """A share `rate` of the words is missing: at least one, never all."""
    count = min(len(words) - 1, max(1, round(rate * len(words))))
    out = {*torch.randperm(len(words), generator=generator)[:count].tolist()}
    return [word for i, word in enumerate(words) if i not in out]


def repeat_words(words: Sequence[str], rate: float, generator: torch.Generator | None = None) -> list[str]:
    """A share `rate` of the words is said twice: at least one."""
    count = max(1, round(rate * len(words)))
    twice = {*torch.randperm(len(words), generator=generator)[:count].tolist()}
    return [word for i, word in enumerate(words) for _ in range(1 + (i in twice))]


def drop_negations(words: Sequence[str]) -> list[str]:
    """The sentence without its negations ("don't go" and "do not go" become "do go"); one that is nothing else stays."""
    return [left for word in words if (left := affirmed(word))] or [*words]


Rewording = Literal["repeat", "delete", "swap", "negation"]
REWORDINGS: dict[str, Callable[[Sequence[str], float, torch.Generator | None], list[str]]] = {
    "repeat": repeat_words,
    "delete": leave_out,
    "swap": lambda words, rate, generator: swap_words(words, 1, generator),
    "negation": lambda words, rate, generator: drop_negations(words),
}
"""Ways to say a sentence with other words, by name; each takes words, the share of them to change, and a generator. "swap"
lets two words change places, "negation" leaves out the words that deny, which turns the meaning around; both know no share."""


def reword(
    sentences: Sequence[str], name: str, generator: torch.Generator | None = None, *, rate: float = 0.1
) -> list[str]:
    """Each sentence reworded; words are what white space separates.

    Args:
        sentences: sentences.
        name: one of `REWORDINGS`.
        generator: source of the draws.
        rate: share of words that change.

    Raises:
        InputError: no such rewording, or a share that does not lie between 0 and 1.
    """
    if name not in REWORDINGS:
        raise InputError(f'no rewording named "{name}"; there are {", ".join(REWORDINGS)}')
    if not 0 < rate < 1:
        raise InputError(f"the share of words that a rewording changes lies between 0 and 1, not {rate}")
    return [" ".join(REWORDINGS[name](sentence.split(), rate, generator)) for sentence in sentences]


OPERATORS = ("replace", "insert", "swap", "delete")
NEED_SIMILAR = ("replace", "insert")


@dataclass(frozen=True)
class EDA:
    """Easy data augmentation: copies of a sentence, each with a few words replaced, inserted, swapped or deleted.

    Each copy is made by one operator, all operators about equally often; replaced, inserted and swapped are
    ``max(1, int(alpha * words))``, deleted is each word with probability alpha.

    Where the released code differs: it brings sentences to lower case and strips what is no letter; here punctuation and case
    stay. Its synonyms are WordNet's; here they come from a file, or are neighbours in a table of token embeddings, among which
    there are words of opposite meaning.

    Args:
        copies: of each sentence; the authors advise 16 at alpha 0.05 for 500 sentences or fewer.
        alpha: share of words that an operator changes.
        operators: of `OPERATORS`.
        synonyms: file of them, see `synonyms_of`; None takes neighbours of token embeddings, see `neighbours`.

    Raises:
        InputError: no copy, a share that is none, or an operator that does not exist.

    Source: Wei and Zou 2019 (arXiv 1901.11196); jasonwei20/eda_nlp at 04ab29c.
    """

    copies: int = 9
    alpha: float = 0.1
    operators: tuple[str, ...] = OPERATORS
    synonyms: str | None = None

    def __post_init__(self) -> None:
        if self.copies < 1 or not 0 < self.alpha < 1:
            raise InputError(
                f"EDA makes 1 copy or more, with alpha between 0 and 1, not {self.copies} and {self.alpha}"
            )
        if not self.operators or not {*self.operators} <= {*OPERATORS}:
            raise InputError(f"operators are some of {', '.join(OPERATORS)}, not {', '.join(self.operators) or 'none'}")

    @property
    def needs_similar(self) -> bool:
        return bool({*self.operators} & {*NEED_SIMILAR})

    def __call__(self, sentence: str, similar: Similar, generator: torch.Generator) -> list[str]:
        """The copies of one sentence; an empty one has empty copies."""
        words = sentence.split()
        if not words:
            return [""] * self.copies
        count = max(1, int(self.alpha * len(words)))
        order = [*self.operators] * -(-self.copies // len(self.operators))
        chosen = [order[i] for i in torch.randperm(len(order), generator=generator)[: self.copies].tolist()]
        return [" ".join(self._copy(words, name, count, similar, generator)) for name in chosen]

    def _copy(
        self, words: list[str], operator: str, count: int, similar: Similar, generator: torch.Generator
    ) -> list[str]:
        match operator:
            case "replace":
                return replace_words(words, count, similar, generator)
            case "insert":
                return insert_words(words, count, similar, generator)
            case "swap":
                return swap_words(words, count, generator)
        return delete_words(words, self.alpha, generator)


def core(word: str) -> str:
    """A word in lower case, without the punctuation around it; "" if nothing is left."""
    found = CORE.match(word)
    return found[2].lower() if found else ""


def dressed(word: str, like: str) -> str:
    """`word` with the capital letter and the punctuation of another."""
    found = CORE.match(like)
    assert found is not None
    return f"{found[1]}{word.capitalize() if found[2][0].isupper() else word}{found[3]}"


def stop_words() -> frozenset[str]:
    """English words that are not replaced: they say little, and their neighbours something else."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS


def synonyms_of(path: str | Path) -> dict[str, list[str]]:
    """Words of like meaning from a file: each line a group of them, separated by commas or tabs.

    Raises:
        InputError: no such file, or one without a group of two.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise InputError(f"there is no file of synonyms {path}")
    found: dict[str, list[str]] = {}
    for line in read_lines(place):
        group = [word.strip().lower() for word in re.split(r"[,\t]", line) if word.strip()]
        for word in group:
            found.setdefault(word, []).extend(other for other in group if other != word)
    if not any(found.values()):
        raise InputError(f"{path} holds no synonyms: each line is a group of words, separated by commas")
    return found


def neighbours(words: Iterable[str], tokenizer: Any, table: Tensor, *, count: int = 5) -> dict[str, list[str]]:
    """The words nearest to each of `words` in a table of token embeddings, by cosine.

    Only words that are one token each, of letters, take part; others have no neighbours.

    Args:
        words: in lower case.
        tokenizer: of transformers, of whose tokens some are whole words.
        table: [V, D], the embeddings of the tokens.
        count: neighbours of a word.

    Raises:
        InputError: a tokeniser whose tokens are no words.
    """
    at: dict[str, int] = {}
    for i, word in enumerate(_whole_words(tokenizer)[: len(table)]):
        if word is not None:
            at.setdefault(word, i)
    if len(at) <= count:
        raise InputError(
            "the tokens of this encoder are no words, so that none has neighbours: give a file of synonyms, or take the "
            "operators swap and delete"
        )
    names, asked = [*at], [word for word in dict.fromkeys(words) if word in at]
    unit = torch.nn.functional.normalize(table.detach()[[*at.values()]].float(), dim=1)
    place = {word: i for i, word in enumerate(names)}
    found: dict[str, list[str]] = {}
    for chunk in (asked[i : i + 512] for i in range(0, len(asked), 512)):
        own = torch.tensor([place[word] for word in chunk], device=unit.device)
        near = (unit[own] @ unit.T).scatter(1, own[:, None], -torch.inf).topk(count, dim=1).indices
        found |= {word: [names[i] for i in row] for word, row in zip(chunk, near.tolist(), strict=True)}
    return found


def _whole_words(tokenizer: Any) -> list[str | None]:
    """The word in lower case that each token is; None for pieces of words, marks and special tokens."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = {*tokenizer.all_special_tokens, None}
    # WordPiece marks where a word goes on; other tokenisers where it begins
    goes_on = any(token.startswith("##") for token in tokens if token is not None)
    found: list[str | None] = []
    for token in tokens:
        begins = token is not None and (goes_on or token.startswith(("Ġ", "▁")))
        word = "" if token in special or not begins else token.lstrip("Ġ▁")
        found.append(word.lower() if word.isalpha() and len(word) >= LEAST else None)
    return found


def _one(values: Sequence[str], generator: torch.Generator) -> str:
    return values[int(torch.randint(len(values), (), generator=generator))]


def looked_up(table: Mapping[str, Sequence[str]]) -> Similar:
    """Similar words out of a table."""
    return lambda word: table.get(word, ())
