"""Pairs out of documents keep their distance, their document and their place."""

import pytest

from counterpoint.data import texts
from counterpoint.data.documents import neighbours, spans
from counterpoint.errors import InputError

DOCUMENTS = [["a", "b", "c", "d"], ["x", "y"], ["alone"]]


@pytest.mark.parametrize(
    "distance, expected",
    [
        (1, [("a", "b"), ("b", "c"), ("c", "d"), ("x", "y")]),
        (2, [("a", "c"), ("b", "d")]),
        (-1, [("b", "a"), ("c", "b"), ("d", "c"), ("y", "x")]),
    ],
)
def test_neighbours(distance, expected):
    found = neighbours(DOCUMENTS, distance)
    assert list(zip(found.columns["anchor"], found.columns["positive"], strict=True)) == expected
    assert len(texts.load(found)) == len(expected)  # pairs that a method can be trained on


def numbers(text):
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("place", ["adjacent", "overlapping", "subsumed", "any"])
@pytest.mark.parametrize("length", [5, 9, 40])
def test_spans_lie_where_they_should(place, length):
    document = " ".join(map(str, range(length)))
    found = spans([document] * 300, place, shortest=4, longest=12)
    assert len(found) == 300
    seen = set()
    for a, p in zip(*(map(numbers, column) for column in found.columns.values()), strict=True):
        assert a == list(range(a[0], a[0] + len(a))) and p == list(range(p[0], p[0] + len(p)))
        assert len(a) <= 12 and 1 <= len(p) <= 12 and a[0] >= 0 and max(a[-1], p[-1]) < length
        shared = set(a) & set(p)
        kind = "adjacent" if not shared else "subsumed" if shared == set(p) else "overlapping"
        assert (
            place == "any" or {"adjacent": not shared, "overlapping": bool(shared), "subsumed": shared == set(p)}[place]
        )
        assert shared or p[0] == a[-1] + 1 or a[0] == p[-1] + 1
        seen.add(kind)
    assert len(seen) == 3 or place != "any" or length == 5
    assert len(set(found.columns["anchor"])) > 1 or length == 5
    assert spans([document], place, shortest=4, seed=3).columns == spans([document], place, shortest=4, seed=3).columns
    if length == 40 and place == "any":  # anchors are the long ones
        lengths = [sum(len(numbers(t)) for t in column) for column in found.columns.values()]
        assert lengths[0] > 1.2 * lengths[1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: neighbours(DOCUMENTS, 0), "no neighbour of itself"),
        (lambda: neighbours(DOCUMENTS, 4), "no document has 5 sentences"),
        (lambda: spans(["a b"]), "no document has more than 8 words"),
        (lambda: spans(["a b"], "near"), "a place among adjacent"),
        (lambda: spans(["a b"], shortest=0), "1 <= shortest"),
    ],
)
def test_it_refuses(call, message):
    with pytest.raises(InputError, match=message):
        call()
