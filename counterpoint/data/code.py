"""Source code as text: of what kind each character is, and the docstring of a function.

What Python's own grammar accepts is read by Python's tokeniser. Everything else, other languages and snippets that do not
even parse, is read by a lexer that knows no language and never fails.
"""

from __future__ import annotations

import ast
import io
import itertools
import keyword
import re
import tokenize
import warnings
from collections.abc import Iterator
from inspect import cleandoc
from typing import NamedTuple

import numpy as np

KINDS = ("keyword", "identifier", "number", "string", "operator", "separator", "comment")
"""Kinds of tokens, by their numbers."""

KEYWORD, IDENTIFIER, NUMBER, STRING, OPERATOR, SEPARATOR, COMMENT = range(len(KINDS))

# reserved words of C, C++, C#, Java, JavaScript, Go, PHP and Ruby; a name that is one of them elsewhere is rare enough
_SHARED = """
abstract auto base bool boolean break byte case catch char class const continue decimal default delegate delete do double else
enum event explicit extends extern final finally fixed float for foreach goto if implements implicit import in int interface
internal is lock long namespace native new null object operator out override package params private protected public readonly
ref return sbyte sealed short signed sizeof static string struct super switch synchronized template this throw throws transient
true false try typedef typename typeof uint ulong union unsigned unsafe ushort using virtual void volatile while yield async
await debugger export function instanceof let of var with chan defer fallthrough func go map range select type echo elseif
endforeach endif foreach isset unset use begin def elsif end ensure module next nil redo rescue retry self then undef unless
until when
"""
# these count in capitals, too
_SQL = """
all alter and any as asc between by cast column constraint create cross cursor declare desc distinct drop exec execute exists
foreign from full group having inner insert intersect into join key left like limit not null on or order outer over partition
primary procedure references right rollback select set table then top trigger truncate union unique update values view when
where with
"""
_SQL_WORDS = frozenset(_SQL.split())
_RESERVED = frozenset(keyword.kwlist) | frozenset(_SHARED.split()) | _SQL_WORDS

_LEXER = re.compile(
    r"""
    (?P<comment> /\*.*?(?:\*/|\Z) | <!--.*?(?:-->|\Z) | //[^\n]* | \#[^\n]* | --(?=[ \t])[^\n]* )
    | (?P<string> \"{3}(?:\\.|[^\\])*?(?:\"{3}|\Z) | '{3}(?:\\.|[^\\])*?(?:'{3}|\Z)
        | "(?:\\.|[^"\\\n])*(?:"|\\?(?=\n|\Z)) | '(?:\\.|[^'\\\n])*(?:'|\\?(?=\n|\Z)) | `(?:\\.|[^`\\\n])*(?:`|\\?(?=\n|\Z)) )
    | (?P<number> (?:\d|\.\d)(?:[eE][+-]?\d|\.\d|\w)* )
    | (?P<identifier> [@$]?[^\W\d]\w* )
    | (?P<separator> [()\[\]{},;:.] )
    | (?P<operator> [^\s\w] )
    """,
    re.VERBOSE | re.DOTALL,
)


class Span(NamedTuple):
    """A token of code: its kind as a number (see `KINDS`), and which characters it is."""

    kind: int
    start: int
    end: int


def lexed(code: str) -> list[Span]:
    """The tokens of code in any language, in their order; white space belongs to none.

    Unfinished strings end with their line, unfinished comments and triple-quoted strings with the text. Nothing is refused:
    what is no code at all consists of identifiers and operators.

    Args:
        code: the text.
    """
    return _python(code) or [*_any_language(code)]


def kinds(code: str) -> np.ndarray:
    """int8 [characters]: the kind of the token that each character of `code` is in (see `KINDS`); -1 for white space."""
    at = np.full(len(code), -1, np.int8)
    for kind, start, end in lexed(code):
        at[start:end] = kind
    at[[letter.isspace() for letter in code]] = -1
    return at


def _python(code: str) -> list[Span]:
    """Tokens by Python's own rules; none where it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the escapes of strings that are nobody's but the data's
            ast.parse(code)
        found = [*tokenize.generate_tokens(io.StringIO(code).readline)]
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return []
    starts = [0, *(place.end() for place in re.finditer("\n", code))]
    spans = []
    for kind, text, (row, column), (last, end), _ in found:
        match kind:
            case tokenize.NAME:
                number = KEYWORD if keyword.iskeyword(text) else IDENTIFIER
            case tokenize.NUMBER:
                number = NUMBER
            case tokenize.OP:
                number = SEPARATOR if text in "()[]{},;:." else OPERATOR
            case tokenize.COMMENT:
                number = COMMENT
            case _ if text.strip():
                number = STRING  # also the parts into which newer versions of Python cut a string with fields
            case _:  # ends of lines, indentation
                continue
        spans.append(Span(number, starts[row - 1] + column, starts[last - 1] + end))
    return spans


def _any_language(code: str) -> Iterator[Span]:
    for token in _LEXER.finditer(code):
        kind, text = KINDS.index(str(token.lastgroup)), token[0]
        if kind == IDENTIFIER and (text in _RESERVED or (text.isupper() and text.lower() in _SQL_WORDS)):
            kind = KEYWORD
        yield Span(kind, token.start(), token.end())


# ----------------------------------------------------------------------------------------------------------- docstrings

# where a docstring stops to say what the function does
_DETAILS = re.compile(
    r"\n\s*\n|\n\s*(?:[:@]\w+|>>>|(?:args?|arguments|param(?:eter)?s?|returns?|raises|examples?|notes?)\s*:)|\n\s*-{3,}",
    re.IGNORECASE,
)


def without_docstring(code: str) -> tuple[str, str]:
    """A Python function as (code without its docstring, docstring without quotes); the latter is "" where there is none.

    Also of code that today's Python no longer accepts.

    Args:
        code: begins with the function (decorators and comments may come first).
    """
    depth, inside = 0, False
    tokens = [span for span in _any_language(code) if span.kind != COMMENT]
    for token, following in itertools.pairwise(tokens):
        text = code[token.start : token.end]
        inside = inside or text in ("def", "class")
        depth += (text in "([{") - (text in ")]}") if token.kind == SEPARATOR else 0
        if not (inside and depth == 0 and text == ":" and token.kind == SEPARATOR):
            continue
        start = following.start
        if following.kind == IDENTIFIER:  # r, u: a letter before the quotes
            rest = re.compile(r"""[rRuUbB]{1,2}(?=["'])""").match(code, start)
            string = None if rest is None else next(span for span in tokens if span.start >= rest.end())
        else:
            string = following if following.kind == STRING else None
        if string is None:
            return code, ""
        quoted = code[string.start : string.end]
        quotes = 3 if quoted[:3] in ('"""', "'''") else 1
        before = code[:start].rstrip(" \t")
        after = code[string.end :].lstrip(" \t;")
        joined = before.rstrip("\n") + "\n" + after.lstrip("\n") if after.strip() else before.rstrip()
        return joined, cleandoc(quoted[quotes:].removesuffix(quoted[:quotes]))
    return code, ""


def summary(docstring: str) -> str:
    """What a docstring says first, in one line: its first paragraph, without parameters and examples.

    Source: the first paragraph serves as the query of CodeSearchNet (Husain et al. 2019, arXiv 1909.09436).
    """
    text = docstring.strip()
    stop = _DETAILS.search(text)
    first = text if stop is None else text[: stop.start()]
    if re.match(r"[:@]\w+|>>>", first):
        return ""
    return " ".join(first.split())


def words(code: str) -> str:
    """The words that code is made of, names taken apart: ``readLine_count`` is "read Line count"."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_", " ", code)
    return " ".join(re.findall(r"\w+", apart))
