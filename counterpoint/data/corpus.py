"""Running text to train language models on: `load` gets documents, `packed` and `separate` make rows of tokens of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from counterpoint.data import facts, sources
from counterpoint.data.texts import Ragged, Sentences, read_lines, read_table, separated
from counterpoint.errors import InputError, nearest

HELD_OUT = 20
"""Every so many-th document is held out, of sets that come in one part."""

TOGETHER = 40
"""Sentences that make a document, of sets of single ones."""


def load(data: Any, split: str = "train") -> list[str]:
    """Documents.

    Args:
        data: a name in `NAMES` (several with a plus between them), a text file (documents with an empty line between them, or one
            a line where there is none), a list of strings, or a table file with a column ``text``.
        split: "train", "test", or "all". Of sets that come in one part, every twentieth document is "test".

    Raises:
        InputError: nothing there, a line that is not UTF-8 (with its number), an empty file, or nothing held out.
    """
    if split not in ("train", "test", "all"):
        raise InputError(f'text has the splits train, test and all, not "{split}"')
    if isinstance(data, str) and all(name in NAMES for name in data.split("+")):
        return [document for name in data.split("+") for document in NAMES[name](split)]
    if isinstance(data, str | Path):
        path = Path(data).expanduser()
        if not path.is_file():
            raise InputError(
                f"{str(data)!r} is neither a file nor one of {', '.join(NAMES)}{nearest(str(data), NAMES)}"
            )
        found, name = _file(path), path.name
    elif isinstance(data, Sequence) and all(isinstance(document, str) for document in data):
        found, name = [*data], "the list"
    else:
        raise InputError(f"text comes from a name, a file or a list of strings, not from {type(data).__name__}")
    found = [document for document in found if document.strip()]
    if not found:
        raise InputError(f"{name} holds no text")
    return part(found, split, name)


def part(documents: list[str], split: str, name: str) -> list[str]:
    """The part of documents that come in one.

    Raises:
        InputError: so few documents that none is held out.
    """
    if split == "all" or (split == "train" and len(documents) < HELD_OUT):
        return documents
    if len(documents) < HELD_OUT:
        raise InputError(
            f"{name} has {len(documents)} documents, of which none is held out (every {HELD_OUT}th is, from {HELD_OUT} on): give "
            "--data with other text"
        )
    return [document for i, document in enumerate(documents) if (i % HELD_OUT == HELD_OUT - 1) == (split == "test")]


def packed(documents: Sequence[str], tokenizer: Any, length: int, *, name: str = "text") -> Sentences:
    """All documents one after the other, an end token behind each, cut into rows of `length` tokens; what is left is dropped.

    Raises:
        InputError: not enough text for one row.
    """
    rows = tokens(documents, tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    flat = [token for row in rows for token in (*row, *end)]
    if len(flat) < length:
        raise InputError(
            f"{name} has {len(flat):,} tokens, which is less than one row of {length}: take more text or shorter rows"
        )
    blocks = [flat[i : i + length] for i in range(0, len(flat) - length + 1, length)]
    return Sentences({"anchor": Ragged.of(blocks)}, end[0] if end else 0, name=name)


def separate(
    documents: Sequence[str], tokenizer: Any, length: int, *, ends: bool = True, name: str = "text"
) -> Sentences:
    """A row for each document, cut to `length` tokens; with `ends` an end token behind it where the tokeniser has one."""
    end = [] if tokenizer.eos_token_id is None or not ends else [tokenizer.eos_token_id]
    rows = [[*row, *end][:length] or [0] for row in tokens(documents, tokenizer)]
    return Sentences({"anchor": Ragged.of(rows)}, tokenizer.eos_token_id or 0, name=name)


def tokens(documents: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Ids of each document, without special tokens."""
    found: list[list[int]] = []
    for start in range(0, len(documents), 1024):
        chunk = [*documents[start : start + 1024]]
        found += tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return found


def _file(path: Path) -> list[str]:
    if path.suffixes and path.suffixes[0] in (".csv", ".tsv", ".jsonl", ".parquet"):
        table = read_table(path)
        if "text" not in table:
            raise InputError(f"{path.name} has the columns {', '.join(table)}, but text is expected in a column text")
        return [str(document) for document in table["text"]]
    return paragraphs(read_lines(path))


def paragraphs(lines: Sequence[str]) -> list[str]:
    """Documents of lines: with an empty line between them, or one a line where there is none."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    blocks = [block for block in blocks if block]
    return [*lines] if len(blocks) == 1 else ["\n".join(block) for block in blocks]


def _brown(split: str) -> list[str]:
    lines = read_lines(sources.require("text_corpus", "brown_sentences.tsv.gz", "category TAB sentence"))
    documents: list[str] = []
    group: list[str] = []
    before = ""
    for kind, sentence in (line.split("\t", 1) for line in lines):
        if group and (kind != before or len(group) == TOGETHER):
            documents.append(" ".join(group))
            group = []
        before = kind
        group.append(sentence)
    return part([*documents, " ".join(group)], split, "brown")


def _shakespeare(split: str) -> list[str]:
    lines = read_lines(
        sources.require("text_corpus", "tinyshakespeare.txt.gz", "plays, an empty line between speeches")
    )
    speeches = paragraphs(lines)
    scenes = ["\n\n".join(speeches[i : i + TOGETHER]) for i in range(0, len(speeches), TOGETHER)]
    return part(scenes, split, "shakespeare")


def _arxiv(split: str) -> list[str]:
    lines = read_lines(sources.require("arxiv_abstracts", "arxiv_12cat.csv.gz", "title, abstract"))
    table = separated(lines, ",", "arxiv_12cat.csv.gz")
    return part(
        [f"{title}. {abstract}" for title, abstract in zip(table["title"], table["abstract"], strict=True)],
        split,
        "arxiv",
    )


def _facts(name: str) -> Callable[[str], list[str]]:
    # what is asked of facts is another question than their sentences: no sentence is held out
    return lambda split: facts.sentences(name)


NAMES: dict[str, Callable[[str], list[str]]] = {
    "brown-text": _brown,
    "arxiv-text": _arxiv,
    "shakespeare-text": _shakespeare,
    **{name: _facts(name) for name in facts.NAMES},
}
"""Known texts; each takes a split."""
