"""Tiled reductions over a similarity matrix that is never held: memory O((N + M) d + one tile), forward and backward.

With logits ``l_ij = scale * <query_i, key_j> + log_weight_j`` over the pairs not in `without`:

    row_i = log sum_j exp(l_ij)        column_j = log sum_i exp(l_ij)

The backward pass recomputes each tile, since ``d row_i / d l_ij = exp(l_ij - row_i)`` needs only the result. When the
keys are the queries, each unordered pair of tiles is visited once and serves as a row tile and as a column tile.
"""

from collections.abc import Iterator
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from counterpoint.contrast.relation import Relation
from counterpoint.errors import InputError

TILE = {"cpu": (512, 1024), "cuda": (4096, 8192)}  # rows, columns; the CPU tile stays in the second-level cache
SAFE_RANGE = 80.0  # exp(-80) is still a normal float32, so one common shift loses nothing while all logits lie in it


@overload
def log_sum_exp(
    query: Tensor,
    key: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    without: Relation | None = None,
    log_weight: Tensor | None = None,
    columns: Literal[False] = False,
) -> Tensor: ...


@overload
def log_sum_exp(
    query: Tensor,
    key: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    without: Relation | None = None,
    log_weight: Tensor | None = None,
    columns: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def log_sum_exp(
    query: Tensor,
    key: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    without: Relation | None = None,
    log_weight: Tensor | None = None,
    columns: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-sum-exp of similarities, tile by tile.

    .. math:: \text{row}_i = \log \sum_{j \notin \text{without}(i)} W_j \exp(\langle q_i, k_j \rangle / \tau_i)

    Args:
        query: ``[N, d]``, used as given (normalise first if cosine similarity is meant).
        key: ``[M, d]``; None takes the queries themselves, and then `without` must be symmetric.
        temperature: positive scalar, 0-d tensor, or (with a key) one value per row ``[N]``; gradients flow to tensors.
        without: pairs that do not count.
        log_weight: additive log-weight of each column, ``[M]``.
        columns: also return the log-sum-exp down each column, from the same pass.

    Returns:
        ``row [N]``, or ``(row [N], column [M])``. At least float32. A row or column in which no pair counts is -inf,
        with zero gradient.

    Raises:
        InputError: shapes that do not fit together.
    """
    wide = query if key is None else key
    if query.ndim != 2 or wide.ndim != 2 or query.shape[1] != wide.shape[1]:
        raise InputError(f"query and key must be [N, d] and [M, d], not {list(query.shape)} and {list(wide.shape)}")
    if log_weight is not None and log_weight.shape != wide.shape[:1]:
        raise InputError(f"log_weight must hold one value per key, [{len(wide)}], not {list(log_weight.shape)}")
    if isinstance(temperature, Tensor) and temperature.numel() not in (1, len(query)):
        raise InputError(f"temperature must be one value or one per query ({len(query)}), not {temperature.numel()}")
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.to(dtype)
    scale = query.new_ones(())
    if isinstance(temperature, Tensor) and temperature.ndim > 0 and temperature.numel() > 1:
        if key is None:
            key = query
        query = query / temperature.reshape(-1, 1).to(dtype)
    else:
        scale = scale / temperature.to(dtype).reshape(()) if isinstance(temperature, Tensor) else scale / temperature
    key = None if key is None else key.to(dtype)
    if key is None and log_weight is not None:
        key = query
    log_weight = None if log_weight is None else log_weight.to(dtype)
    row, column = _LogSumExp.apply(query, key, scale, log_weight, without, columns and key is not None)
    if not columns:
        return row
    return row, row if key is None else column


def softplus_sum(query: Tensor, key: Tensor, *, scale: float | Tensor = 1.0, bias: float | Tensor = 0.0) -> Tensor:
    r"""Row sums of the pairwise softplus: ``out_i = sum_j log(1 + exp(scale * <q_i, k_j> + bias))``, tile by tile.

    Args:
        query: ``[N, d]``.
        key: ``[M, d]``.
        scale: positive scalar or 0-d tensor (an inverse temperature).
        bias: scalar or 0-d tensor added to every logit.

    Returns:
        ``[N]``, at least float32; differentiable in all four arguments.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    scale, bias = (torch.as_tensor(value, dtype=dtype, device=query.device).reshape(()) for value in (scale, bias))
    return _SoftplusSum.apply(query, key, scale, bias)


def _tiles(n: int, m: int, device: torch.device, triangle: bool = False) -> Iterator[tuple[slice, slice]]:
    height, width = TILE.get(device.type, TILE["cuda"])
    if triangle:
        width = height
    for top in range(0, n, height):
        for left in range(top if triangle else 0, m, width):
            yield slice(top, min(top + height, n)), slice(left, min(left + width, m))


class _LogSumExp(torch.autograd.Function):
    """Rows and columns of a similarity matrix reduced in one pass; see the module docstring."""

    @staticmethod
    def forward(ctx, query, key, scale, log_weight, without, columns):
        ctx.without, ctx.columns, ctx.self_similarity = without, columns, key is None
        other = query if key is None else key
        with torch.autocast(query.device.type, enabled=False):
            row, column = _reduce(query, other, scale, log_weight, without, columns, key is None)
        ctx.save_for_backward(query, key, scale, log_weight, row, column)
        if column is None:
            column = row.new_empty(0)
        return row, column

    @staticmethod
    @once_differentiable
    def backward(ctx, row_gradient, column_gradient):
        query, key, scale, log_weight, row, column = ctx.saved_tensors
        other = query if key is None else key
        want_query, want_key, want_scale, want_weight = ctx.needs_input_grad[:4]
        query_gradient = torch.zeros_like(query)
        key_gradient = query_gradient if key is None else torch.zeros_like(key) if want_key else None
        weight_gradient = torch.zeros_like(log_weight) if want_weight else None
        row_shift = row.masked_fill(row == -torch.inf, 0)
        column_shift = column.masked_fill(column == -torch.inf, 0) if ctx.columns else row_shift
        down = column_gradient if ctx.columns else row_gradient
        with torch.autocast(query.device.type, enabled=False):
            for rows, cols in _tiles(len(query), len(other), query.device, ctx.self_similarity):
                diagonal = ctx.self_similarity and rows == cols
                logits = _logits(query, other, scale, log_weight, ctx.without, rows, cols)
                flow_down = ctx.columns or (ctx.self_similarity and not diagonal)
                weight = (logits - row_shift[rows, None]) if flow_down else logits.sub_(row_shift[rows, None])
                weight = weight.exp_().mul_(row_gradient[rows, None])
                if flow_down:
                    weight += logits.sub_(column_shift[None, cols]).exp_().mul_(down[None, cols])
                query_gradient[rows].addmm_(weight, other[cols])
                if key_gradient is not None:
                    key_gradient[cols].addmm_(weight.T, query[rows])
                if weight_gradient is not None:
                    weight_gradient[cols] += weight.sum(0)
            scale_gradient = (query * query_gradient).sum() if want_scale else None
            query_gradient *= scale
            if key_gradient is not None and key is not None:
                key_gradient *= scale
        if scale_gradient is not None and key is None:
            scale_gradient = scale_gradient / 2  # each unordered pair stood in the product once from either side
        return (
            query_gradient if want_query else None,
            key_gradient if key is not None else None,
            scale_gradient,
            weight_gradient,
            None,
            None,
        )


def _logits(query, key, scale, log_weight, without, rows, columns) -> Tensor:
    tile = (query[rows] @ key[columns].T).mul_(scale)
    if log_weight is not None:
        tile += log_weight[columns]
    return tile if without is None else without.fill_(tile, rows, columns, -torch.inf)


def _reduce(query, key, scale, log_weight, without, columns, triangle) -> tuple[Tensor, Tensor | None]:
    bound = scale * query.norm(dim=1).amax() * key.norm(dim=1).amax()
    if log_weight is None and query.device.type == "cpu" and 2 * float(bound) < SAFE_RANGE:
        return _reduce_bounded(query, key, scale, without, columns, triangle, bound)
    return _reduce_online(query, key, scale, log_weight, without, columns, triangle)


def _reduce_bounded(query, key, scale, without, columns, triangle, bound) -> tuple[Tensor, Tensor | None]:
    """All logits lie within +-bound and exp of their whole range is representable: one shift, plain sums."""
    row = query.new_zeros(len(query))
    column = row if triangle else query.new_zeros(len(key)) if columns else None
    for rows, cols in _tiles(len(query), len(key), query.device, triangle):
        terms = _logits(query, key, scale, None, without, rows, cols).sub_(bound).exp_()
        row[rows] += terms.sum(1)
        if column is not None and not (triangle and rows == cols):
            column[cols] += terms.sum(0)
    row = row.log_().add_(bound)
    return row, None if column is None or triangle else column.log_().add_(bound)


def _reduce_online(query, key, scale, log_weight, without, columns, triangle) -> tuple[Tensor, Tensor | None]:
    """Any range of logits: every tile is reduced around its own maxima and merged by log-add-exp."""
    row = query.new_full((len(query),), -torch.inf)
    column = row if triangle else query.new_full((len(key),), -torch.inf) if columns else None
    for rows, cols in _tiles(len(query), len(key), query.device, triangle):
        tile = _logits(query, key, scale, log_weight, without, rows, cols)
        row[rows] = torch.logaddexp(row[rows], tile.logsumexp(1))
        if column is not None and not (triangle and rows == cols):
            column[cols] = torch.logaddexp(column[cols], tile.logsumexp(0))
    return row, None if triangle else column


class _SoftplusSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, scale, bias):
        ctx.save_for_backward(query, key, scale, bias)
        total = query.new_zeros(len(query))
        with torch.autocast(query.device.type, enabled=False):
            for rows, cols in _tiles(len(query), len(key), query.device):
                total[rows] += functional.softplus((query[rows] @ key[cols].T).mul_(scale).add_(bias)).sum(1)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, scale, bias = ctx.saved_tensors
        query_gradient, key_gradient = torch.zeros_like(query), torch.zeros_like(key)
        bias_gradient = torch.zeros_like(bias)
        with torch.autocast(query.device.type, enabled=False):
            for rows, cols in _tiles(len(query), len(key), query.device):
                weight = (query[rows] @ key[cols].T).mul_(scale).add_(bias).sigmoid_().mul_(gradient[rows, None])
                query_gradient[rows].addmm_(weight, key[cols])
                key_gradient[cols].addmm_(weight.T, query[rows])
                bias_gradient += weight.sum()
            scale_gradient = (query * query_gradient).sum()
        return query_gradient * scale, key_gradient * scale, scale_gradient, bias_gradient
