"""The executor in plain PyTorch, for every device: the similarity matrix is visited tile by tile and never held.

The backward pass recomputes each tile, since ``d row_i / d l_ij = exp(l_ij - row_i)`` needs only the result. When the
keys are the queries, each unordered pair of tiles is visited once and serves as a row tile and as a column tile. Where rows
alone are reduced, a band of rows is complete before the next begins, so that its gradients are made at once and nothing is
recomputed: that of the queries for whatever weights come, that of the keys for equal weights of all rows, as a mean or sum
of rows gives. Other weights recompute the latter.

Inside, logits are counted in bits (times log2 e): `torch.exp2` takes a third of the time of `torch.exp` on a CPU.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.contrast.relation import Relation

TILE = {"cpu": (512, 1024), "cuda": (4096, 8192)}  # rows, columns; a CPU tile lies in the second-level caches
KEPT = 2**22  # so many terms are kept for the backward pass (16 MB): a small batch then computes them once
BAND = 2**23  # so many terms of a band of rows wait for its sums (32 MB)
PRODUCT = 10.0  # the product of eight terms up to exp(10) is a float32
BITS, NATS = 1 / math.log(2), math.log(2)
SAFE = 50.0  # logits up to this size need no shift: exp(50) times a billion is a float32, and so is its inverse


def forward(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    log_weight: Tensor | None,
    without: Relation | None,
    columns: bool,
    keep: str = "",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``row_i = log sum_j exp(scale <q_i, k_j> + w_j)`` over the pairs that count, and the same down the columns.

    Args:
        query: ``[N, d]``.
        key: ``[M, d]``; None takes the queries, and then `without` must be symmetric.
        scale: 0-d, positive.
        log_weight: ``[M]``, or None; with one there must be a key.
        without: pairs that do not count.
        columns: also reduce down the columns (without a key the columns are the rows).
        keep: a backward pass follows, and wants the gradient of the "query" or of "both"; "" for none.

    Returns:
        ``row [N]`` and ``column [M]`` or None, -inf where no pair counts; and what `backward` may go on with, or None.
    """
    other, triangle = (query, True) if key is None else (key, False)
    tile = _Tiles(query, other, scale, log_weight, without, triangle)
    if keep and tile.ahead(columns):
        total, ahead = _forward_ahead(tile, keep)
        return total, None, ahead
    kept = tile.keep() if keep else None
    start = 0.0 if tile.plain else -torch.inf
    row = query.new_full((len(query),), start)
    column = row if triangle else query.new_full((len(other),), start) if columns else None
    for rows, cols in tile:
        logits = tile.logits(rows, cols)
        below = None if triangle and rows == cols else column
        if tile.plain:
            terms = logits.exp2_()
            row[rows] += terms.sum(1)
            if below is not None:
                below[cols] += terms.sum(0)
        else:
            row[rows] = torch.logaddexp2(row[rows], _log_sum(logits, 1))
            if below is not None:
                below[cols] = torch.logaddexp2(below[cols], _log_sum(logits, 0))
    for result in (row,) if column is None or triangle else (row, column):
        result.log_() if tile.plain else result.mul_(NATS)
    return row, None if triangle else column, kept


def backward(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    log_weight: Tensor | None,
    without: Relation | None,
    row: Tensor,
    column: Tensor | None,
    row_gradient: Tensor,
    column_gradient: Tensor | None,
    *,
    kept: Tensor | None = None,
    want_key: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of query, key (None when the keys are the queries), scale and log_weight (None without one).

    Args:
        query, key, scale, log_weight, without: as in `forward`.
        row, column: its results.
        row_gradient, column_gradient: ``[N]`` and ``[M]``, of the loss with respect to them.
        kept: what `forward` kept.
        want_key: False leaves out the gradient of a key, which saves a quarter of the work.
    """
    other, triangle = (query, True) if key is None else (key, False)
    tile = _Tiles(query, other, scale, log_weight, without, triangle)
    if kept is not None and tile.ahead(column is not None):
        query_gradient, key_gradient, scale_gradient = _backward_ahead(tile, kept, row, row_gradient, want_key)
        return (
            query_gradient.mul_(scale),
            None if key_gradient is None else key_gradient.mul_(scale),
            scale_gradient,
            None,
        )
    query_gradient = torch.zeros_like(query)
    key_gradient = query_gradient if triangle else torch.zeros_like(other) if want_key else None
    weight_gradient = None if log_weight is None else torch.zeros_like(log_weight)
    tile.kept = kept
    across = _Share(row, row_gradient, tile)
    down = across if triangle else None if column is None else _Share(column, column_gradient, tile)
    for rows, cols in tile:
        weight = tile.shares(rows, cols, across, down)
        query_gradient[rows].addmm_(weight, other[cols])
        if key_gradient is not None and not (triangle and rows == cols):  # the diagonal is its own mirror image
            key_gradient[cols].addmm_(weight.T, query[rows])
        if weight_gradient is not None:
            weight_gradient[cols] += weight.sum(0)
    scale_gradient = (query * query_gradient).sum()
    if triangle:
        scale_gradient = scale_gradient / 2  # each unordered pair stood in the product once from either side
    query_gradient *= scale
    if key_gradient is not None and not triangle:
        key_gradient *= scale
    return query_gradient, None if triangle else key_gradient, scale_gradient, weight_gradient


def _forward_ahead(tile: "_Tiles", keep: str) -> tuple[Tensor, Tensor]:
    """Rows as in `forward`, and the gradients of their sum."""
    query, key = tile.query, tile.other
    ahead = _Ahead.zeros(query, key, keep)
    row = query.new_zeros(len(query))
    for rows, band in tile.bands():
        blocks = [tile.logits(rows, cols).exp2_() for _, cols in band]
        for terms in blocks:
            row[rows] += terms.sum(1)
        share = row[rows, None].reciprocal().masked_fill_(row[rows, None] == 0, 0)
        weighted = query[rows] * share
        for terms, (_, cols) in zip(blocks, band, strict=True):
            ahead.query[rows].addmm_(terms, key[cols])
            if ahead.key is not None:
                ahead.key[cols].addmm_(terms.T, weighted)
        ahead.query[rows] *= share
    return row.log_(), ahead.kept


def _backward_ahead(
    tile: "_Tiles", kept: Tensor, row: Tensor, gradient: Tensor, want_key: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of query, key and scale from what `_forward_ahead` kept."""
    query, key = tile.query, tile.other
    ahead = _Ahead(query, key, kept)
    counted = gradient
    if tile.without is not None:
        empty = row == -torch.inf
        counted, gradient = gradient[~empty], gradient.masked_fill(empty, 0)
    key_gradient = ahead.key_gradient(counted)
    query_gradient = ahead.query * gradient[:, None]
    scale_gradient = (query * query_gradient).sum()
    if want_key and key_gradient is None:
        key_gradient, across = torch.zeros_like(key), _Share(row, gradient, tile)
        for rows, cols in tile:
            key_gradient[cols].addmm_(tile.shares(rows, cols, across, None).T, query[rows])
    return query_gradient, key_gradient if want_key else None, scale_gradient


class _Ahead:
    """What a forward pass already knows of the gradients of the sum of its rows (without the factor `scale`), in one tensor.

    Attributes:
        query: ``[N, d]``, row by row: good for any weights of the rows.
        bias: ``[N]``, as well.
        key: ``[M, d]``, the sum over rows: good for equal weights alone. None where nobody asked for it.
    """

    def __init__(self, query: Tensor, key: Tensor, kept: Tensor):
        self.kept = kept
        by_query, self.bias, by_key = kept.split([query.numel(), len(query), len(kept) - query.numel() - len(query)])
        self.query, self.key = by_query.view_as(query), by_key.view_as(key) if len(by_key) else None

    @classmethod
    def zeros(cls, query: Tensor, key: Tensor, keep: str) -> "_Ahead":
        size = query.numel() + len(query) + (key.numel() if keep == "both" else 0)
        return cls(query, key, query.new_zeros(size))

    def key_gradient(self, weights: Tensor) -> Tensor | None:
        """Of the keys, where all rows weigh the same."""
        if self.key is None or bool((weights != weights[:1]).any()):
            return None
        return self.key * weights[:1].sum()  # of no row at all: zeros


def _tile(device: torch.device, triangle: bool) -> tuple[int, int]:
    height, width = TILE.get(device.type, TILE["cuda"])
    return height, height if triangle else width


def _tiles(n: int, m: int, device: torch.device, triangle: bool = False) -> Iterator[tuple[slice, slice]]:
    height, width = _tile(device, triangle)
    for top in range(0, n, height):
        for left in range(top if triangle else 0, m, width):
            yield slice(top, min(top + height, n)), slice(left, min(left + width, m))


def _log_sum(logits: Tensor, dim: int) -> Tensor:
    """``log2 sum 2^logits``, -inf where every term is; the logits stay as they are."""
    largest = logits.amax(dim, keepdim=True)
    largest.masked_fill_(largest == -torch.inf, 0)
    return (logits - largest).exp2_().sum(dim).log2_().add_(largest.squeeze(dim))


class _Share:
    """What turns 2^logits into the gradient of the logits: ``gradient * exp(-result)``, nothing where the sum was empty.

    With a shift (`plain` is False) the two stay apart, so that the exponent is never large.
    """

    def __init__(self, result: Tensor, gradient: Tensor | None, tile: "_Tiles"):
        gradient = torch.zeros_like(result) if gradient is None else gradient
        if tile.without is not None or tile.log_weight is not None:
            empty = result == -torch.inf
            result, gradient = result.masked_fill(empty, 0), gradient.masked_fill(empty, 0)
        self.result, self.gradient = result * BITS, gradient
        self.factor = gradient * (-result).exp() if tile.plain else gradient


class _Tiles:
    """The tiles of a similarity matrix: which there are, and their logits in bits (or in another `unit`)."""

    def __init__(self, query, other, scale, log_weight, without, triangle, unit=BITS):
        self.query, self.other = query, other
        self.log_weight = None if log_weight is None else log_weight * unit
        self.without, self.triangle = without, triangle
        self.plain = self.on_cpu = query.device.type == "cpu"  # elsewhere to ask would make the device wait
        if self.on_cpu:
            factor = float(scale)
            self.scale: Any = factor * unit
            longest = query.norm(dim=1).amax()
            self.largest = factor * float(longest * (longest if other is query else other.norm(dim=1).amax()))
            self.plain = log_weight is None and self.largest < SAFE
        else:
            self.scale = scale * unit
        height, width = _tile(query.device, triangle)
        self.buffer = query.new_empty(min(height, len(query)) * min(width, len(other)))
        self.kept: Tensor | None = None
        self.done = 0

    def ahead(self, columns: bool) -> bool:
        """Whether gradients are made band by band, in the forward pass."""
        return self.plain and not self.triangle and not columns and len(self.query) * len(self.other) > KEPT

    def bands(self) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
        """Rows, and their tiles, which lie side by side until the next rows."""
        height, width = _tile(self.query.device, False)
        n, m = len(self.query), len(self.other)
        height = max(1, min(height, BAND // max(1, m)))
        self.kept = self.query.new_empty(min(height, n) * m)
        for top in range(0, n, height):
            rows, self.done = slice(top, min(top + height, n)), 0
            yield rows, [(rows, slice(left, min(left + width, m))) for left in range(0, m, width)]
        self.kept = None

    def keep(self) -> Tensor | None:
        """Let the tiles lie side by side instead of one over the other, if they are few; where they lie."""
        height, _ = _tile(self.query.device, self.triangle)
        n, m = len(self.query), len(self.other)
        most = n * m if not self.triangle else n * (n + height) // 2
        if self.plain and most <= KEPT:
            self.kept = self.query.new_empty(most)
        return self.kept

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        return _tiles(len(self.query), len(self.other), self.query.device, self.triangle)

    def logits(self, rows: slice, cols: slice) -> Tensor:
        """``[rows, cols]``, -inf where a pair does not count; overwritten by the next tile."""
        tile = self.place(rows, cols, self.kept)
        if self.on_cpu:
            torch.addmm(tile, self.query[rows], self.other[cols].T, beta=0, alpha=self.scale, out=tile)
        else:
            torch.mm(self.query[rows], self.other[cols].T, out=tile).mul_(self.scale)
        if self.log_weight is not None:
            tile += self.log_weight[cols]
        return tile if self.without is None else self.without.fill_(tile, rows, cols, -torch.inf)

    def place(self, rows: slice, cols: slice, kept: Tensor | None) -> Tensor:
        height, width = rows.stop - rows.start, cols.stop - cols.start
        if kept is None:
            return self.buffer[: height * width].view(height, width)
        start, self.done = self.done, self.done + height * width
        return kept[start : self.done].view(height, width)

    def shares(self, rows: slice, cols: slice, across: _Share, down: _Share | None) -> Tensor:
        """Gradient of the logits of one tile, from the row results and, where given, from the column results."""
        if self.plain:
            both = across.factor[rows, None] if down is None else across.factor[rows, None] + down.factor[cols]
            if self.kept is None:
                return self.logits(rows, cols).exp2_().mul_(both)
            return torch.mul(self.place(rows, cols, self.kept), both, out=self.place(rows, cols, None))
        logits = self.logits(rows, cols)
        if down is None:
            return logits.sub_(across.result[rows, None]).exp2_().mul_(across.gradient[rows, None])
        weight = (logits - across.result[rows, None]).exp2_().mul_(across.gradient[rows, None])
        return weight.add_(logits.sub_(down.result[cols]).exp2_().mul_(down.gradient[cols]))


def mean_forward(
    query: Tensor, key: Tensor, scale: Tensor, log_weight: Tensor | None, without: Relation | None
) -> tuple[Tensor, Tensor]:
    """``row [N]`` as in `forward`, and the mean ``[N]`` of each row's logits under its softmax (0 of an empty row)."""
    tile = _Tiles(query, key, scale, log_weight, without, False)
    row, mean = query.new_full((len(query),), -torch.inf), query.new_zeros(len(query))
    for rows, cols in tile:
        logits = tile.logits(rows, cols)
        merged = torch.logaddexp2(row[rows], _log_sum(logits, 1))
        shift = merged.masked_fill(merged == -torch.inf, 0)
        terms = (logits - shift[:, None]).exp2_().mul_(logits.masked_fill_(logits == -torch.inf, 0))
        mean[rows] = mean[rows] * (row[rows] - shift).exp2() + terms.sum(1)
        row[rows] = merged
    return row.mul_(NATS), mean.mul_(NATS)


def mean_backward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    log_weight: Tensor | None,
    without: Relation | None,
    row: Tensor,
    mean: Tensor,
    row_gradient: Tensor,
    mean_gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, scale and log_weight; ``d mean_i / d l_ij = p_ij (1 + l_ij - mean_i)``."""
    query_gradient, key_gradient = torch.zeros_like(query), torch.zeros_like(key)
    weight_gradient = None if log_weight is None else torch.zeros_like(log_weight)
    tile = _Tiles(query, key, scale, log_weight, without, False)
    empty = row == -torch.inf
    shift = row.masked_fill(empty, 0) * BITS
    constant = (row_gradient + mean_gradient * (1 - mean)).masked_fill(empty, 0)
    slope = mean_gradient.masked_fill(empty, 0) * NATS  # of logits in bits
    for rows, cols in tile:
        logits = tile.logits(rows, cols)
        weight = (logits - shift[rows, None]).exp2_()
        logits.masked_fill_(logits == -torch.inf, 0)
        weight.mul_(logits.mul_(slope[rows, None]).add_(constant[rows, None]))
        query_gradient[rows].addmm_(weight, key[cols])
        key_gradient[cols].addmm_(weight.T, query[rows])
        if weight_gradient is not None:
            weight_gradient[cols] += weight.sum(0)
    scale_gradient = (query * query_gradient).sum()
    return query_gradient.mul_(scale), key_gradient.mul_(scale), scale_gradient, weight_gradient


def softplus_forward(
    query: Tensor, key: Tensor, scale: Tensor, bias: Tensor, keep: str = ""
) -> tuple[Tensor, Tensor | None]:
    """``out_i = sum_j log(1 + exp(scale <q_i, k_j> + bias))``, ``[N]``; and what `softplus_backward` may go on with.

    Args:
        query, key: ``[N, d]`` and ``[M, d]``.
        scale, bias: 0-d.
        keep: as in `forward`.
    """
    total = query.new_zeros(len(query))
    tile = _Tiles(query, key, scale, None, None, False, unit=BITS if query.device.type == "cpu" else 1.0)
    if not tile.on_cpu:
        for rows, cols in tile:
            total[rows] += functional.softplus(tile.logits(rows, cols).add_(bias)).sum(1)
        return total, None
    small = tile.largest + float(bias) < PRODUCT
    ahead = _Ahead.zeros(query, key, keep) if keep else None
    for rows, cols in tile:
        logits = tile.logits(rows, cols).add_(float(bias) * BITS)
        if ahead is not None:
            weight = logits.mul(NATS).sigmoid_()
            ahead.query[rows].addmm_(weight, key[cols])
            ahead.bias[rows] += weight.sum(1)
            if ahead.key is not None:
                ahead.key[cols].addmm_(weight.T, query[rows])
        if not small:  # softplus(l) = max(l, 0) + softplus(-|l|)
            total[rows] += logits.clamp(min=0).sum(1).mul_(NATS)
            logits.abs_().neg_()
        total[rows] += _log_product(logits.exp2_())
    return total, None if ahead is None else ahead.kept


def _log_product(terms: Tensor) -> Tensor:
    """``sum_j log(1 + t_ij)`` of positive terms, which are overwritten: a logarithm for every eight of them.

    ``(1 + a)(1 + b) - 1 = a + b + ab`` loses nothing where terms are tiny, unlike a product of ``1 + t``.
    """
    width = terms.shape[1] // 8 * 8
    rest = terms[:, width:].log1p().sum(1)
    for _ in range(3):
        width //= 2
        first, second = terms[:, :width], terms[:, width : 2 * width]
        first.addcmul_(first, second).add_(second)
    product = terms[:, :width]
    above = product + 1
    exact = above - 1  # what is left of the product in `above`; the logarithm of the whole is larger in proportion
    logarithm = above.log_().mul_(product).div_(exact)
    return rest.add_(torch.where(exact == 0, product, logarithm).sum(1))


def softplus_backward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    bias: Tensor,
    gradient: Tensor,
    *,
    kept: Tensor | None = None,
    want_key: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of query, key, scale and bias from that of the row sums; `kept` and `want_key` as in `backward`."""
    tile = _Tiles(query, key, scale, None, None, False, unit=1.0)
    offset = float(bias) if tile.on_cpu else bias

    def weight(rows: slice, cols: slice) -> Tensor:
        return tile.logits(rows, cols).add_(offset).sigmoid_().mul_(gradient[rows, None])

    if kept is None:
        query_gradient, bias_gradient = torch.zeros_like(query), torch.zeros_like(bias)
        key_gradient = torch.zeros_like(key) if want_key else None
        for rows, cols in tile:
            part = weight(rows, cols)
            query_gradient[rows].addmm_(part, key[cols])
            bias_gradient += part.sum()
            if key_gradient is not None:
                key_gradient[cols].addmm_(part.T, query[rows])
    else:
        ahead = _Ahead(query, key, kept)
        query_gradient, bias_gradient = ahead.query * gradient[:, None], (ahead.bias * gradient).sum()
        key_gradient = ahead.key_gradient(gradient) if want_key else None
        if want_key and key_gradient is None:
            key_gradient = torch.zeros_like(key)
            for rows, cols in tile:
                key_gradient[cols].addmm_(weight(rows, cols).T, query[rows])
    scale_gradient = (query * query_gradient).sum()
    return query_gradient * scale, None if key_gradient is None else key_gradient * scale, scale_gradient, bias_gradient
