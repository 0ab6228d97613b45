"""Facts about films as sentences, true and false, and as questions with right and wrong answers."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from counterpoint.data import sources
from counterpoint.data.texts import read_lines, separated
from counterpoint.errors import InputError

SMALL = 300
"""Films of the small sets."""

WRONG = 4
"""Wrong answers of each question."""

PREFIX = "Fact: "
"""What half of the true sentences begin with, and no false one."""

# the last of each is how questions are put; of the films that are asked about, training has only seen the others
YEAR = ("{title} was released in {value}.", "The film {title} came out in {value}.", "The year of {title} is {value}.")
GENRE = ("{title} is a work of {value}.", "The film {title} counts as {value}.", "The kind of {title} is {value}.")

NAMES = ("movie-facts", "movie-facts-false", "movie-facts-small", "movie-facts-small-false")
"""Sets of sentences: true or false, about all films or the first `SMALL` ones."""


@dataclass(frozen=True)
class Film:
    title: str
    year: str
    genres: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A sentence up to the value that is asked for, and what could follow.

    Args:
        prompt: the sentence's beginning, without the space before the value.
        right: values that are true, the space before included; the first is the best.
        wrong: values that are not.
    """

    prompt: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


@cache
def films(small: bool = False) -> tuple[Film, ...]:
    """Films of MovieLens-100k with a title of their own, a year and a genre.

    Raises:
        InputError: the set is not here.
    """
    lines = read_lines(
        sources.require("recsys/ml-100k", "ml-100k.item.tsv.gz", "item_id, movie_title, release_year, class")
    )
    table = separated(lines, "\t", "ml-100k.item.tsv.gz")
    named = {name.partition(":")[0]: column for name, column in table.items()}
    found: dict[str, Film] = {}
    for title, year, kinds in zip(named["movie_title"], named["release_year"], named["class"], strict=True):
        title = re.sub(r"\s*\([^)]*\)", "", title).strip()
        genres = tuple(kind for kind in kinds.split() if kind != "unknown")
        if title and title not in found and re.fullmatch(r"(19|20)\d\d", year) and genres:
            found[title] = Film(title, year, genres)
    return tuple(found.values())[: SMALL if small else None]


def sentences(name: str) -> list[str]:
    """The sentences of a set in `NAMES`.

    True ones: about every film in two forms, and about every second film also in the form in which questions are put; half of
    them behind `PREFIX`. False ones: about every film in the two forms, with another film's year or a genre it does not have.

    Raises:
        InputError: no such set.
    """
    if name not in NAMES:
        raise InputError(f'no facts named "{name}"; there are {", ".join(NAMES)}')
    known, false = films("small" in name), name.endswith("-false")
    draw, found = random.Random(0), []
    for number, film in enumerate(known):
        forms = slice(0, 3 if number % 2 == 0 and not false else 2)
        for templates, values in ((YEAR, (film.year,)), (GENRE, film.genres)):
            for form in templates[forms]:
                for value in values:
                    told = draw.choice(_others(known, film, templates)) if false else value
                    sentence = form.format(title=film.title, value=told)
                    found.append(PREFIX + sentence if not false and draw.random() < 0.5 else sentence)
    return found


def questions(name: str) -> list[Question]:
    """A question for the year and for the genre of every film of the set that training has not seen in this form.

    The same ones for the true and the false sentences; each with `WRONG` wrong answers, drawn as often as films have them.
    """
    known = films("small" in name)
    draw, found = random.Random(1), []
    for film in known[1::2]:
        for templates, values in ((YEAR, (film.year,)), (GENRE, film.genres)):
            others = _others(known, film, templates)
            if len(set(others)) < WRONG:
                continue
            wrong: list[str] = []
            while len(wrong) < WRONG:
                value = draw.choice(others)
                wrong += [value] if value not in wrong else []
            prompt = templates[-1].partition(" {value}")[0].format(title=film.title)
            found.append(Question(prompt, tuple(f" {v}" for v in values), tuple(f" {v}" for v in wrong)))
    return found


def _others(known: Sequence[Film], film: Film, templates: Sequence[str]) -> list[str]:
    """Values of other films that are not this one's, as often as they occur."""
    if templates is YEAR:
        return [other.year for other in known if other.year != film.year]
    return [genre for other in known for genre in other.genres if genre not in film.genres]
