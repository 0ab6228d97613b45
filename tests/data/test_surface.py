"""Surface similarities against their definitions, written as loops."""

import random

import pytest
import torch

from counterpoint.data import surface
from counterpoint.data.surface import numbered_words, surface_similarity
from counterpoint.errors import InputError


def padded(rows):
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows]).reshape(len(rows), width)


def edit(a, b):
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            change = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, change)
    return table[-1][-1]


def common(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            same = a[i - 1] == b[j - 1]
            table[i][j] = table[i - 1][j - 1] + 1 if same else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def by_definition(a, b, measure):
    if not a and not b:
        return 1.0
    match measure:
        case "jaccard":
            return len({*a} & {*b}) / len({*a} | {*b})
        case "edit":
            return 1 - edit(a, b) / max(len(a), len(b))
        case "rouge-l":
            return 2 * common(a, b) / (len(a) + len(b))
    return (by_definition(a, b, "jaccard") + by_definition(a, b, "edit")) / 2


@pytest.mark.parametrize("measure", surface.SURFACES)
def test_random_rows_of_any_length(measure, monkeypatch):
    monkeypatch.setattr(surface, "BLOCK", 500)  # several blocks
    draw = random.Random(0)
    rows = [[[draw.randrange(6) for _ in range(draw.randrange(9))] for _ in range(60)] for _ in range(2)]
    found = surface_similarity(padded(rows[0]), padded(rows[1]), measure)
    expected = [by_definition(a, b, measure) for a, b in zip(*rows, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("measure", surface.SURFACES)
def test_pools_are_compared_with_their_owner(measure):
    owner, pool = padded([[1, 2, 3], [4]]), torch.tensor([[[1, 2, 3], [3, 2, 1]], [[4, -1, -1], [5, 6, -1]]])
    found = surface_similarity(owner[:, None], pool, measure)
    assert found.shape == (2, 2) and found[0, 0] == found[1, 0] == 1 and found[1, 1] == 0
    assert found[0, 1] == pytest.approx(by_definition([1, 2, 3], [3, 2, 1], measure))


def test_order_matters_to_all_but_jaccard():
    a, b = padded([[1, 2, 3, 4]]), padded([[4, 3, 2, 1]])
    values = {measure: surface_similarity(a, b, measure).item() for measure in surface.SURFACES}
    assert values["jaccard"] == 1 and values["edit"] == 0 and values["rouge-l"] == 0.25 and values["overlap"] == 0.5


def test_words_are_numbered_alike_in_all_columns():
    one, other = numbered_words(["A dog, a DOG!", "..."], ["the dog", "naïve x y z"], most=3)
    every = torch.arange(2)
    assert one.padded(every, -1)[0].tolist() == [[0, 1, 0], [-1, -1, -1]]
    assert other.padded(every, -1)[0].tolist() == [[2, 1, -1], [3, 4, 5]]


def test_nothing_and_nonsense():
    assert surface_similarity(torch.zeros(0, 3).long(), torch.zeros(0, 2).long()).shape == (0,)
    assert surface_similarity(padded([[], []]), padded([[], [1]])).tolist() == [1, 0]
    with pytest.raises(InputError, match='no surface similarity named "bleu"; there are jaccard'):
        surface_similarity(padded([[1]]), padded([[1]]), "bleu")
