"""Relations are sets of pairs: every tile of every form equals the same tile of the full matrix."""

import pytest
import torch

from counterpoint.contrast import Listed, Mask, Same
from counterpoint.contrast.relation import Transposed

N, M = 9, 12
GENERATOR = torch.Generator().manual_seed(0)
INDEX = torch.randint(-1, M, (N, 3), generator=GENERATOR)
MATRIX = torch.rand(N, M, generator=GENERATOR) < 0.4
ROW_IDS, COLUMN_IDS = torch.randint(0, 4, (N,), generator=GENERATOR), torch.randint(0, 4, (M,), generator=GENERATOR)

listed = torch.tensor([[j in INDEX[i].tolist() for j in range(M)] for i in range(N)])
single = torch.tensor([[j == int(INDEX[i, 0]) for j in range(M)] for i in range(N)])
same = torch.tensor([[bool(ROW_IDS[i] == COLUMN_IDS[j]) for j in range(M)] for i in range(N)])
BUILT = {
    "listed": (Listed(INDEX), listed),
    "listed-once": (Listed(INDEX[:, 0]), single),
    "same": (Same(ROW_IDS, COLUMN_IDS), same),
    "mask": (Mask(MATRIX), MATRIX),
    "mask-of-numbers": (Mask(MATRIX.float()), MATRIX),
    "or": (Listed(INDEX) | Same(ROW_IDS, COLUMN_IDS), listed | same),
    "and": (Mask(MATRIX) & Same(ROW_IDS, COLUMN_IDS), MATRIX & same),
    "not": (~Listed(INDEX), ~listed),
    "nested": (~(Mask(MATRIX) | Listed(INDEX)) & ~Same(ROW_IDS, COLUMN_IDS), ~(MATRIX | listed) & ~same),
    "transposed": (Transposed(Listed(torch.tensor([[2, 5], [0, -1], [8, 2]]))), None),
}


def full(name: str) -> torch.Tensor:
    matrix = BUILT[name][1]
    if matrix is None:
        matrix = torch.zeros(N, 3, dtype=torch.bool)
        for row, column in [(2, 0), (5, 0), (0, 1), (8, 2), (2, 2)]:
            matrix[row, column] = True
    return matrix


@pytest.mark.parametrize("name", BUILT)
def test_every_tile_equals_the_matrix(name):
    relation, matrix = BUILT[name][0], full(name)
    n, m = matrix.shape
    for top in range(0, n, 2):
        for left in range(0, m, 5):
            rows, columns = slice(top, min(top + 2, n)), slice(left, min(left + 5, m))
            held = relation.holds(rows, columns)
            assert held.dtype == torch.bool
            assert torch.equal(held, matrix[rows, columns])
            tile = torch.arange(held.numel(), dtype=torch.float32).reshape(held.shape)
            expected = tile.masked_fill(held, -torch.inf)
            assert torch.equal(relation.fill_(tile, rows, columns, -torch.inf), expected)
            assert torch.equal(tile, expected), "fill_ writes in place"


def test_minus_one_lists_nobody():
    nobody = Listed(torch.full((4, 2), -1))
    assert not bool(nobody.holds(slice(0, 4), slice(0, 6)).any())


def test_combining_never_changes_the_parts():
    first, second = Mask(MATRIX), Listed(INDEX)
    before = first.matrix.clone()
    _ = (first | second).holds(slice(0, N), slice(0, M)), (first & ~second).holds(slice(0, N), slice(0, M))
    assert torch.equal(first.matrix, before)
