"""Kinds of characters of code, and docstrings: Python's tokens against Python, everything else against what it must be."""

import ast
import itertools
import keyword

import numpy as np
import pytest
import torch

from counterpoint.data import code, texts
from counterpoint.encoders.text import byte_tokenizer

FUNCTION = '''def read(path: str, *, mode="r") -> list[int]:
    """Reads a file.

    :param path: where
    """
    # slow
    return [len(line) for line in open(path) if line != '\\'' and 0x1F < 1.5e-3]
'''


def tokens(text):
    return [(code.KINDS[kind], text[start:end]) for kind, start, end in code.lexed(text)]


def test_python_is_read_by_its_own_rules():
    found = tokens(FUNCTION)
    assert found[:4] == [("keyword", "def"), ("identifier", "read"), ("separator", "("), ("identifier", "path")]
    by_kind = {kind: {text for k, text in found if k == kind} for kind in code.KINDS}
    assert by_kind["keyword"] == {"def", "return", "for", "in", "if", "and"}
    assert by_kind["number"] == {"0x1F", "1.5e-3"} and by_kind["comment"] == {"# slow"}
    assert {"->", "*", "=", "!=", "<"} == by_kind["operator"]
    assert (
        any(text.startswith('"""Reads') and text.endswith('"""') for text in by_kind["string"])
        and "'\\''" in by_kind["string"]
    )
    assert all(keyword.iskeyword(word) for word in by_kind["keyword"])


CASES = {
    "c#": (
        'foreach (var x in y) { s += "a \\" b" + \'c\'; } // done\n/* all\nof it */ int? z = 0xFF;',
        {("keyword", "foreach"), ("keyword", "var"), ("string", '"a \\" b"'), ("string", "'c'"), ("comment", "// done"),
         ("comment", "/* all\nof it */"), ("number", "0xFF"), ("operator", "?"), ("separator", "{"), ("identifier", "z")},
    ),
    "sql": (
        "SELECT TOP 1 wn.id -- the first\nFROM t WHERE name = 'O''Neil' AND @p >= 1.5",
        {("keyword", "SELECT"), ("keyword", "FROM"), ("keyword", "AND"), ("comment", "-- the first"), ("string", "'O'"),
         ("identifier", "@p"), ("number", "1.5"), ("identifier", "wn")},
    ),
    "python 2": ('print "hello %s" % name', {("string", '"hello %s"'), ("operator", "%"), ("identifier", "name")}),
    "c": ("for (i = 0; i < n; i--) x->y();", {("keyword", "for"), ("operator", "-"), ("identifier", "i"), ("number", "0")}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_other_languages_are_read_without_knowing_them(name):
    text, expected = CASES[name]
    assert expected <= {*tokens(text)}
    assert ("comment", "--) x->y();") not in tokens(text)


UNFINISHED = {
    'x = "never closed\ny = 1': [("string", '"never closed'), ("identifier", "y")],
    "def f(:\n    '''to the end\n  of it": [("string", "'''to the end\n  of it")],
    "x = 1 /* no end": [("comment", "/* no end")],
    "s = 'a\\": [("string", "'a\\")],
    "if x:\n        y\n    z": [("keyword", "if"), ("identifier", "z")],
    "})(": [("separator", ")")],
    "\x00 $ \udc80": [("operator", "$")],
}


@pytest.mark.parametrize("text", UNFINISHED)
def test_code_that_does_not_parse_is_read_all_the_same(text):
    found = tokens(text)
    assert all(token in found for token in UNFINISHED[text])
    spans = code.lexed(text)
    assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    covered = {i for span in spans for i in range(span.start, span.end)}
    assert all(i in covered for i, letter in enumerate(text) if not letter.isspace() and letter != "\x00")


def test_nothing_has_no_tokens():
    for text in ("", "   ", "\n\n"):
        assert code.lexed(text) == [] and code.kinds(text).tolist() == [-1] * len(text)


def test_kinds_are_those_of_the_tokens_and_white_space_has_none():
    at = code.kinds(FUNCTION)
    assert len(at) == len(FUNCTION) and at.dtype == np.int8
    for kind, start, end in code.lexed(FUNCTION):
        inside = [i for i in range(start, end) if not FUNCTION[i].isspace()]
        assert set(at[inside].tolist()) == {kind}
    assert all(at[i] == -1 for i, letter in enumerate(FUNCTION) if letter.isspace())


def test_positions_survive_letters_of_several_bytes():
    text = 'ä = "日本" + b\nsecond = 1'
    assert tokens(text) == [
        ("identifier", "ä"), ("operator", "="), ("string", '"日本"'), ("operator", "+"), ("identifier", "b"),
        ("identifier", "second"), ("operator", "="), ("number", "1"),
    ]  # fmt: skip


def test_tokens_get_the_kind_of_their_characters():
    rows = texts.Texts({"anchor": ["add"], "positive": ["x += 12"]})
    items = texts.tokenise(rows, byte_tokenizer(), {"anchor": 4, "positive": 32}, kinds={"positive": code.kinds})
    batch = items.subset([0]).take(torch.tensor([0]))
    names = ["" if kind < 0 else code.KINDS[kind] for kind in batch["positive_kinds"][0].tolist()]
    assert names == ["", "identifier", "", "operator", "operator", "", "number", "number", ""]
    assert "kinds" not in batch and batch["input_ids"].shape == (1, 4) and items.truncated == 1


# ----------------------------------------------------------------------------------------------------------- docstrings


def test_a_docstring_is_taken_out_and_the_rest_stays_code():
    rest, docstring = code.without_docstring(FUNCTION)
    assert docstring == "Reads a file.\n\n:param path: where" and code.summary(docstring) == "Reads a file."
    expected = ast.parse(FUNCTION)
    expected.body[0].body.pop(0)
    assert ast.dump(ast.parse(rest)) == ast.dump(expected) and "Reads" not in rest and "# slow" in rest


@pytest.mark.parametrize(
    "text, rest, said",
    [
        ("def f(x):\n    return x", "def f(x):\n    return x", ""),
        ("def f(a: int = {1: 2}[1], b=lambda y: y):\n  r'''One\n  two.'''\n  return a", None, "One\ntwo."),
        ("def f(x):\n    'Short.'\n    print x", "def f(x):\n    print x", "Short."),
        ('@wraps(g)\n# why\ndef f():\n    # first\n    """Said."""\n    pass', None, "Said."),
        ('def f(): "All of it."', "def f():", "All of it."),
        ("x = {1: 'no docstring'}", "x = {1: 'no docstring'}", ""),
        ("def f(x): return 'no docstring'", "def f(x): return 'no docstring'", ""),
        ("", "", ""),
    ],
)
def test_docstrings_of_all_kinds(text, rest, said):
    found, docstring = code.without_docstring(text)
    assert docstring == said
    if rest is not None:
        assert found == rest
    else:
        ast.parse(found)
        assert said.split()[0] not in found


@pytest.mark.parametrize(
    "docstring, first",
    [
        ("Adds two\n  numbers.\n\nMore.", "Adds two numbers."),
        ("Adds.\n:param x: a", "Adds."),
        ("Adds.\nArgs:\n  x", "Adds."),
        ("Adds.\n>>> f(1)", "Adds."),
        ("Adds\n----\nmore", "Adds"),
        (":param x: a", ""),
        ("", ""),
    ],
)
def test_a_summary_is_what_is_said_first(docstring, first):
    assert code.summary(docstring) == first


def test_names_are_taken_apart():
    assert code.words("readHTMLFile_count2 = x.get_it(1)") == "read HTML File count2 x get it 1"
