"""Who relates to whom: relations between N rows and M columns, as data that a tiled pass can read tile by tile.

A relation never holds N x M entries unless it was given as a matrix. `Listed` holds a few columns per row (self, the
positive, an ignore list), `Same` holds one integer per row and per column (labels, clusters, sample ids). They combine
with ``|``, ``&`` and ``~``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Relation(ABC):
    """A set of (row, column) pairs."""

    parts: tuple["Relation", ...] = ()
    """The relations that this one combines."""

    tensors: tuple[Tensor, ...] = ()
    """What it holds itself."""

    @abstractmethod
    def holds(self, rows: slice, columns: slice) -> Tensor:
        """Boolean tile ``[rows, columns]``: does the relation hold for each pair?"""

    def fill_(self, tile: Tensor, rows: slice, columns: slice, value: float) -> Tensor:
        """Write `value` into `tile` (the entries of ``rows x columns``) wherever the relation holds."""
        return tile.masked_fill_(self.holds(rows, columns), value)

    def window(self, rows: slice, columns: slice) -> "Relation":
        """The relation between these rows and columns alone, which it numbers from 0."""
        return Window(self, rows.start, columns.start)

    def __or__(self, other: "Relation") -> "Relation":
        return Either(self, other)

    def __and__(self, other: "Relation") -> "Relation":
        return Both(self, other)

    def __invert__(self) -> "Relation":
        return Not(self)


class Listed(Relation):
    """Row i relates to the columns ``index[i]``.

    Args:
        index: int64 ``[N]`` or ``[N, P]``; -1 stands for "none".
    """

    def __init__(self, index: Tensor):
        self.index = index if index.ndim == 2 else index[:, None]
        self.tensors = (self.index,)

    def holds(self, rows: slice, columns: slice) -> Tensor:
        tile = torch.zeros(
            rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool, device=self.index.device
        )
        return self.fill_(tile, rows, columns, True)

    def fill_(self, tile: Tensor, rows: slice, columns: slice, value: float) -> Tensor:
        here = self.index[rows]
        inside = (here >= columns.start) & (here < columns.stop)
        row, place = inside.nonzero(as_tuple=True)
        tile[row, here[row, place] - columns.start] = value
        return tile

    def window(self, rows: slice, columns: slice) -> Relation:
        here = self.index[rows]
        inside = (here >= columns.start) & (here < columns.stop)
        return Listed(torch.where(inside, here - columns.start, -1))


class Same(Relation):
    """Row i relates to column j when ``row_ids[i] == column_ids[j]`` (labels, clusters, sample ids)."""

    def __init__(self, row_ids: Tensor, column_ids: Tensor):
        self.row_ids, self.column_ids = self.tensors = (row_ids, column_ids)

    def holds(self, rows: slice, columns: slice) -> Tensor:
        return self.row_ids[rows, None] == self.column_ids[None, columns]

    def window(self, rows: slice, columns: slice) -> Relation:
        return Same(self.row_ids[rows], self.column_ids[columns])


class Mask(Relation):
    """A relation given in full as a boolean matrix ``[N, M]`` (the one form whose size is quadratic)."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix.bool()
        self.tensors = (self.matrix,)

    def holds(self, rows: slice, columns: slice) -> Tensor:
        return self.matrix[rows, columns]

    def window(self, rows: slice, columns: slice) -> Relation:
        return Mask(self.matrix[rows, columns])


class Either(Relation):
    """Pairs in one relation or the other."""

    def __init__(self, first: Relation, second: Relation):
        self.first, self.second = self.parts = (first, second)

    def holds(self, rows: slice, columns: slice) -> Tensor:
        return self.first.holds(rows, columns) | self.second.holds(rows, columns)

    def fill_(self, tile: Tensor, rows: slice, columns: slice, value: float) -> Tensor:
        return self.second.fill_(self.first.fill_(tile, rows, columns, value), rows, columns, value)

    def window(self, rows: slice, columns: slice) -> Relation:
        return Either(self.first.window(rows, columns), self.second.window(rows, columns))


class Both(Relation):
    """Pairs in both relations."""

    def __init__(self, first: Relation, second: Relation):
        self.first, self.second = self.parts = (first, second)

    def holds(self, rows: slice, columns: slice) -> Tensor:
        return self.first.holds(rows, columns) & self.second.holds(rows, columns)

    def window(self, rows: slice, columns: slice) -> Relation:
        return Both(self.first.window(rows, columns), self.second.window(rows, columns))


class Transposed(Relation):
    """The relation seen from the other side: pairs (column, row)."""

    def __init__(self, inner: Relation):
        self.inner = inner
        self.parts = (inner,)

    def holds(self, rows: slice, columns: slice) -> Tensor:
        return self.inner.holds(columns, rows).T

    def window(self, rows: slice, columns: slice) -> Relation:
        return Transposed(self.inner.window(columns, rows))


class Not(Relation):
    """Pairs outside a relation."""

    def __init__(self, inner: Relation):
        self.inner = inner
        self.parts = (inner,)

    def holds(self, rows: slice, columns: slice) -> Tensor:
        return ~self.inner.holds(rows, columns)

    def window(self, rows: slice, columns: slice) -> Relation:
        return Not(self.inner.window(rows, columns))


class Window(Relation):
    """A relation seen from row `top` and column `left` on."""

    def __init__(self, inner: Relation, top: int, left: int):
        self.inner, self.top, self.left = inner, top, left

    def holds(self, rows: slice, columns: slice) -> Tensor:
        return self.inner.holds(
            slice(rows.start + self.top, rows.stop + self.top),
            slice(columns.start + self.left, columns.stop + self.left),
        )


def pack(relation: Relation | None) -> tuple[str, list[Tensor]]:
    """A relation as words and tensors, the only things that a registered operator takes; "" is none."""
    if relation is None:
        return "", []
    words, tensors = [type(relation).__name__], [*relation.tensors]
    for part in relation.parts:
        inner, more = pack(part)
        words.append(inner)
        tensors += more
    return " ".join(words), tensors


def unpack(form: str, tensors: Sequence[Tensor]) -> Relation | None:
    """The relation that `pack` took apart."""
    words, held = iter(form.split()), iter(tensors)

    def build() -> Relation:
        match next(words):
            case "Listed":
                return Listed(next(held))
            case "Mask":
                return Mask(next(held))
            case "Same":
                return Same(next(held), next(held))
            case "Not":
                return Not(build())
            case "Transposed":
                return Transposed(build())
            case "Either":
                return Either(build(), build())
            case "Both":
                return Both(build(), build())
            case unknown:
                raise ValueError(f"no relation {unknown}")

    return build() if form else None
