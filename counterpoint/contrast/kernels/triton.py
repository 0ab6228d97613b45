r"""Fused executor for NVIDIA GPUs: the similarity tile lives in registers and only its sums leave the chip.

Same mathematics as `blocked`, written on plain tensors, without autograd. With logits
``l_ij = scale * <q_i, k_j> + w_j`` over the pairs that count:

    row_i = log sum_j exp(l_ij)        column_j = log sum_i exp(l_ij)

Forward, 2 N M d operations for rows and columns together. A program owns a block of rows and a span of columns. Every
tile is reduced around its own maximum, one exponential per pair for both directions; only a tile with a row or column
90 binary orders below that maximum is reduced again around each row's and column's own. Partial results (one number per
row and span, per column and row block) are merged in a fixed order: no float atomics, equal input gives equal output.
When the keys are the queries, only the tiles on and above the diagonal are visited.

Backward, 6 N M d operations. With ``W_ij = g_i exp(l_ij - row_i) + h_j exp(l_ij - column_j)`` the gradients are the
products ``W k`` and ``W^T q``. W is recomputed for one chunk of `SCRATCH` bytes at a time and multiplied by the matrix
library, accumulated in float32. For inputs in half precision W is held in float16, scaled to its range: at the weight of
a good positive, which an attraction term will cancel, bfloat16 would be eight times as coarse. The flash-attention form
keeps W on the chip, but it computes every similarity twice (8 N M d) and must hold a [rows, d] gradient in registers,
which fails from about d = 512 on; from d = 256 on the chunk's trip through memory hides behind the products.

The module imports triton: import it only where that is installed. With TRITON_INTERPRET=1 in the environment before that
import, the same kernels run on CPU tensors, slowly, for tests.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from counterpoint.contrast.relation import Either, Listed, Not, Relation, Same

INTERPRETED: bool = triton.knobs.runtime.interpret
HALF = (torch.bfloat16, torch.float16)
LISTED = 4  # columns per row that a relation may list
# One chunk of the backward pass: bytes of its weights, its rows, and the fewest rows worth a chunk of their own. So large
# that the products run at the matrix library's full rate.
SCRATCH, ROWS, FEWEST = 2**28, 8192, 2048
PARTIALS = 2**25  # column partials held at once: 128 MiB
SPAN = 64 if INTERPRETED else 256  # a program's columns are a multiple of this, and this of every BLOCK_M and BLOCK_N
SMALLEST = 32 if INTERPRETED else 64  # the smallest BLOCK_M, and BLOCK_N
TUNE_FROM = 2**36  # multiply-adds from which timing the candidates pays: below, all take a fraction of a millisecond
HALF_RANGE = 2.0**14  # float16 weights are scaled to this: 2 * 2**14 does not overflow, p = 4e-9 is still normal

LN2 = math.log(2)
LOG2E = 1 / LN2
LOG2_E = tl.constexpr(LOG2E)
FAINT = tl.constexpr(2.0**-90)  # a float32 sum above this lost nothing that matters to the flushing at 2**-126
SPREAD = tl.constexpr(100.0)  # binary orders that the results of one tile may span around a common shift
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bit patterns of bfloat16 numbers


def supports(query: Tensor, key: Tensor | None, without: Relation | None, columns: bool) -> bool:
    """Does this executor serve these inputs (``columns`` never decides)?

    CUDA tensors of one half-precision or float32 dtype on a card of compute capability 8.0 or later (CPU tensors under
    Triton's interpreter); no relation, at most four listed columns per row, labels that are the same or that are not,
    or one of each joined by ``|``.
    """
    other = query if key is None else key
    device = query.device
    if query.ndim != 2 or other.ndim != 2 or query.shape[1] != other.shape[1]:
        return False
    if query.dtype not in (*HALF, torch.float32) or other.dtype != query.dtype or other.device != device:
        return False
    if query.numel() == 0 or other.numel() == 0 or max(len(query), len(other)) >= 2**31 - SPAN:
        return False
    terms = _terms(without)
    if terms is None:
        return False
    for listed in terms.listed:
        if len(listed) != len(query) or listed.device != device:
            return False
    if terms.same is not None:
        rows, cols = terms.same.row_ids, terms.same.column_ids
        if rows.shape != query.shape[:1] or cols.shape != other.shape[:1] or {rows.device, cols.device} != {device}:
            return False
    if INTERPRETED:
        return device.type == "cpu"
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def forward(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    log_weight: Tensor | None,
    without: Relation | None,
    columns: bool,
) -> tuple[Tensor, Tensor | None]:
    r"""Log-sum-exp along the rows and, if asked, down the columns of the same pass.

    Args:
        query: ``[N, d]``.
        key: ``[M, d]``; None takes the queries, and then `without` must be symmetric and `log_weight` None.
        scale: 0-d, the inverse temperature. It is read on the device: nothing waits for it.
        log_weight: ``[M]`` or None.
        without: a relation that `supports` accepted.
        columns: also reduce down the columns.

    Returns:
        ``row [N]`` and ``column [M]`` or None (``row`` again when `key` is None and `columns` is asked), float32; -inf
        where no pair counts.
    """
    x, other, scale = _ready(query), _ready(query if key is None else key), _number(scale, query)
    n, m, depth = len(x), len(other), x.shape[1]
    triangle = key is None
    down = columns or triangle
    relation = _on_device(without, m)
    weight = None if log_weight is None else _vector(log_weight * LOG2E, -torch.inf)
    row = x.new_full((n,), -torch.inf, dtype=torch.float32)
    column = row if triangle else x.new_full((m,), -torch.inf, dtype=torch.float32) if columns else None
    # Without columns there is nothing to hold per row block; with them, as many row blocks at once as fit.
    height = n if not down else min(n, max(1, PARTIALS // m // 2) * 2 * SMALLEST)
    span, spans = _spans(height, m, x.device)
    row_partial = row.new_empty(spans, _whole(height))
    column_partial = row.new_empty(triton.cdiv(height, SMALLEST) if down else 0, _whole(m))
    for start in range(0, n, height):
        stop = min(start + height, n)
        if triangle:
            column_partial.fill_(-torch.inf)  # nobody visits the tiles below the diagonal
        config = _launch(
            _reduce_kernel,
            lambda block, rows=stop - start: (triton.cdiv(rows, block["BLOCK_M"]), spans),
            (stop - start) * m * depth,
            query=x,
            key=other,
            scale=scale,
            log_weight=weight,
            listed=relation.listed,
            row_ids=relation.row_ids,
            column_ids=relation.column_ids,
            row_out=row_partial,
            column_out=column_partial,
            start=start,
            stop=stop,
            m=m,
            height=row_partial.shape[1],
            width=column_partial.shape[1],
            span=span,
            D=depth,
            LISTED=relation.width,
            SAME=relation.same,
            COLUMNS=down,
            TRIANGLE=triangle,
            PRECISION=_precision(),
        )
        _merge(row_partial, spans, row[start:stop])
        if column is not None:
            _merge(column_partial, triton.cdiv(stop - start, config["BLOCK_M"]), column)
    row *= LN2
    if column is not None and not triangle:
        column *= LN2
    return row, column if columns else None


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
    want_query: bool = True,
    want_key: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Gradients of ``sum_i row_gradient_i row_i + sum_j column_gradient_j column_j``.

    Args:
        query: as given to `forward`, and so are key, scale, log_weight and without.
        key: see query.
        scale: see query.
        log_weight: see query.
        without: see query.
        row: what `forward` returned.
        column: the same; None if it was not asked.
        row_gradient: ``[N]``. With `key` None, the sum of both gradients if both results were used.
        column_gradient: ``[M]`` or None.
        want_query: False saves one of three products and returns None.
        want_key: False saves one of three products and returns None: keys that do not learn, as in a queue.
        dtype: of the gradients of query and key; None takes theirs. They are rounded once, from float32.

    Returns:
        Gradients of query and key (None without `key`), of the scale (0-d float32; zero if neither query nor key are
        wanted) and of log_weight (``[M]`` float32, or None).
    """
    x, other, scale = _ready(query), _ready(query if key is None else key), _number(scale, query)
    n, m, depth = len(x), len(other), x.shape[1]
    relation = _on_device(without, m)
    if key is None:
        column, column_gradient = row, row_gradient
    largest = _largest(x, row_gradient, column_gradient)
    shift, push = _shift(row), _vector(row_gradient / largest, 0.0)
    column_shift, column_push = None, None
    if column is not None and column_gradient is not None:
        column_shift, column_push = _shift(column), _vector(column_gradient / largest, 0.0)
    weight = None if log_weight is None else _vector(log_weight * LOG2E, -torch.inf)
    weight_gradient = None if weight is None else scale.new_zeros(m)

    def fill(scratch: Tensor, rows: slice, cols: slice) -> None:
        _launch(
            _weights_kernel,
            _tile_grid(rows, cols),
            scratch.numel() * depth,
            query=x,
            key=other,
            scale=scale,
            log_weight=weight,
            listed=relation.listed,
            row_ids=relation.row_ids,
            column_ids=relation.column_ids,
            row=shift,
            column=column_shift,
            row_gradient=push,
            column_gradient=column_push,
            weights=scratch,
            row_start=rows.start,
            row_stop=rows.stop,
            column_start=cols.start,
            column_stop=cols.stop,
            n=n,
            m=m,
            stride=scratch.stride(0),
            D=depth,
            LISTED=relation.width,
            SAME=relation.same,
            PRECISION=_precision(),
        )
        if weight_gradient is not None:
            weight_gradient[cols] += scratch.sum(0, dtype=torch.float32)

    finished = _Finish(scale * largest, query.shape[1], dtype or query.dtype)
    query_gradient, key_gradient, product = (
        _symmetric_product(x, fill, finished)
        if key is None
        else _products(x, other, fill, finished, want_query, want_key)
    )
    if weight_gradient is not None:
        weight_gradient *= largest
    return query_gradient, key_gradient, product * largest, weight_gradient


def softplus_forward(query: Tensor, key: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Row sums of ``log(1 + exp(scale * <q_i, k_j> + bias))``: float32 ``[N]``."""
    x, other = _ready(query), _ready(key)
    n, m, depth = len(x), len(other), x.shape[1]
    span, spans = _spans(n, m, x.device)
    partial = x.new_empty(spans, n, dtype=torch.float32)
    _launch(
        _softplus_kernel,
        lambda block: (triton.cdiv(n, block["BLOCK_M"]), spans),
        n * m * depth,
        query=x,
        key=other,
        scale=_number(scale, query),
        bias=_number(bias, query),
        row_out=partial,
        n=n,
        m=m,
        span=span,
        D=depth,
        PRECISION=_precision(),
    )
    return partial.sum(0)


def softplus_backward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    bias: Tensor,
    gradient: Tensor,
    *,
    want_query: bool = True,
    want_key: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of ``sum_i gradient_i out_i``: query, key (both as in `backward`), scale and bias (0-d float32)."""
    x, other, scale, bias = _ready(query), _ready(key), _number(scale, query), _number(bias, query)
    n, m, depth = len(x), len(other), x.shape[1]
    largest = _largest(x, gradient, None)
    push = _vector(gradient / largest, 0.0)
    bias_gradient = torch.zeros_like(bias)

    def fill(scratch: Tensor, rows: slice, cols: slice) -> None:
        grid = _tile_grid(rows, cols)
        sums = bias.new_empty(*grid({"BLOCK_M": SMALLEST, "BLOCK_N": SMALLEST}))
        blocks = _launch(
            _sigmoid_kernel,
            grid,
            scratch.numel() * depth,
            query=x,
            key=other,
            scale=scale,
            bias=bias,
            gradient=push,
            weights=scratch,
            sums=sums,
            row_start=rows.start,
            row_stop=rows.stop,
            column_start=cols.start,
            column_stop=cols.stop,
            n=n,
            m=m,
            stride=scratch.stride(0),
            D=depth,
            PRECISION=_precision(),
        )
        bias_gradient.add_(sums[: grid(blocks)[0]].sum())

    finished = _Finish(scale * largest, query.shape[1], dtype or query.dtype)
    query_gradient, key_gradient, product = _products(x, other, fill, finished, want_query, want_key)
    return query_gradient, key_gradient, product * largest, bias_gradient * largest


class _Terms(NamedTuple):
    """A relation as the kernels know it: listed columns, and labels that are the same or (`negated`) are not."""

    listed: list[Tensor]
    same: Same | None
    negated: bool


class _Fused(NamedTuple):
    """The same on the device: ``listed [N, width]`` int32, label ids, 0 / 1 (same) / 2 (not the same)."""

    listed: Tensor | None
    width: int
    row_ids: Tensor | None
    column_ids: Tensor | None
    same: int


def _terms(without: Relation | None) -> _Terms | None:
    """The terms of a relation, or None when the kernels have no form for it."""
    listed: list[Tensor] = []
    same: list[tuple[Same, bool]] = []
    left = [] if without is None else [without]
    while left:
        term = left.pop()
        if isinstance(term, Either):
            left += [term.first, term.second]
        elif isinstance(term, Listed):
            listed.append(term.index)
        elif isinstance(term, Same):
            same.append((term, False))
        elif isinstance(term, Not) and isinstance(term.inner, Same):
            same.append((term.inner, True))
        else:
            return None
    if len(same) > 1 or sum(index.shape[1] for index in listed) > LISTED:
        return None
    return _Terms(listed, *(same[0] if same else (None, False)))


def _on_device(without: Relation | None, m: int) -> _Fused:
    terms = _terms(without)
    if terms is None:
        raise ValueError("ask supports() first: this relation has no fused form")
    listed, width = None, 0
    if terms.listed:
        index = torch.cat([index.clamp(-1, m) for index in terms.listed], dim=1)  # int32 must not wrap around
        width = triton.next_power_of_2(index.shape[1])
        listed = functional.pad(index.to(torch.int32), (0, width - index.shape[1], 0, SPAN), value=-1).contiguous()
    if terms.same is None:
        return _Fused(listed, width, None, None, 0)
    row_ids, column_ids = (functional.pad(ids, (0, SPAN)) for ids in (terms.same.row_ids, terms.same.column_ids))
    return _Fused(listed, width, row_ids, column_ids, 2 if terms.negated else 1)


def _ready(x: Tensor) -> Tensor:
    """Contiguous, with rows a multiple of 16 numbers long, so that they load in whole vectors; zeros change nothing."""
    x = x.detach()
    return functional.pad(x, (0, -x.shape[1] % 16)).contiguous()


def _number(value: Tensor, like: Tensor) -> Tensor:
    return value.detach().to(device=like.device, dtype=torch.float32).reshape(())


def _whole(length: int) -> int:
    return -(-length // SPAN) * SPAN


def _vector(values: Tensor, rest: float) -> Tensor:
    """Float32, and long enough that the last tile reads `rest` past the end: neither masks nor clamped addresses there."""
    return functional.pad(values.detach().float(), (0, SPAN), value=rest).contiguous()


def _shift(result: Tensor) -> Tensor:
    """Log-sum-exps in base 2. Where no pair counts, infinity takes every exponential to zero: such a row gives nothing."""
    shift = result.detach().float() * LOG2E
    return _vector(shift.masked_fill(shift == -torch.inf, torch.inf), torch.inf)


def _largest(x: Tensor, row_gradient: Tensor, column_gradient: Tensor | None) -> Tensor:
    """What to divide the incoming gradients by, so that float16 holds the weights: a mean over a million rows is tiny."""
    if x.dtype not in HALF:
        return x.new_ones((), dtype=torch.float32)
    largest = row_gradient.detach().abs().amax().float()
    if column_gradient is not None:
        largest = torch.maximum(largest, column_gradient.detach().abs().amax().float())
    return largest.clamp(min=torch.finfo(torch.float32).tiny * HALF_RANGE) / HALF_RANGE


def _size(x: Tensor) -> Tensor:
    """A power of two not below any number in `x`: divided by it, bfloat16 fits float16 without loss (but of 1e-5 of it)."""
    if x.dtype != torch.bfloat16:
        return x.new_ones((), dtype=torch.float32)
    low, high = x.aminmax()
    return torch.maximum(high, -low).float().clamp(min=1e-30).log2().ceil().exp2()


def _factor(x: Tensor, size: Tensor) -> Tensor:
    """What W is multiplied by, in the dtype of W."""
    return (x / size).half() if x.dtype == torch.bfloat16 else x


class _Finish(NamedTuple):
    """From ``W k`` in float32, padded, to the gradient of the query: its factor, width and dtype."""

    factor: Tensor
    d: int
    dtype: torch.dtype

    def __call__(self, product: Tensor, size: Tensor) -> Tensor:
        if product.dtype == self.dtype and product.shape[1] == self.d:
            return product.mul_(self.factor * size)
        out = product.new_empty(len(product), self.d, dtype=self.dtype)
        for rows in _slices(len(product), ROWS):
            out[rows] = product[rows, : self.d] * (self.factor * size)
        return out


def _slices(n: int, height: int) -> list[slice]:
    return [slice(start, min(start + height, n)) for start in range(0, n, height)]


def _products(x, other, fill, finish, want_query, want_key) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """``W other`` and ``W^T x``, finished, and ``sum W_ij <x_i, other_j>``; ``fill(scratch, rows, columns)`` writes W.

    Only the keys' product stands in float32 as a whole; the queries' is finished a chunk of rows at a time.
    """
    n, m = len(x), len(other)
    height = min(n, ROWS)
    width = min(m, max(SCRATCH // x.element_size() // height // SPAN * SPAN, SPAN))
    scratch = _scratch(x, height, width)
    size, other_size = _size(x), _size(other)
    down = other.new_zeros(other.shape, dtype=torch.float32) if want_key else None
    gradient = x.new_empty(n, finish.d, dtype=finish.dtype) if want_query else None
    total = x.new_zeros((), dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        for rows in _slices(n, height):
            here = _factor(x[rows], size)
            along = here.new_zeros(here.shape, dtype=torch.float32) if want_query else None
            for cols in _slices(m, width):
                chunk = scratch[: rows.stop - rows.start, : cols.stop - cols.start]
                fill(chunk, rows, cols)
                if along is not None:
                    _add_product(along, chunk, _factor(other[cols], other_size))
                if down is not None:
                    _add_product(down[cols], chunk.T, here)
            if gradient is not None and along is not None:
                total += (x[rows] * along).sum() * other_size
                gradient[rows] = finish(along, other_size)
        if down is not None and not want_query:
            total += _inner(other, down) * size
        return gradient, None if down is None else finish(down, size), total


def _symmetric_product(x, fill, finish) -> tuple[Tensor, None, Tensor]:
    """``W x`` for a symmetric W, finished; nothing for the keys; ``sum W_ij <x_i, x_j>`` over unordered pairs.

    Chunks on and above the diagonal serve both sides. Four to a side use most of the symmetry.
    """
    n = len(x)
    side = min(math.isqrt(SCRATCH // x.element_size()) // SPAN * SPAN, max(FEWEST, _whole(-(-n // 4))), n)
    scratch = _scratch(x, side, side)
    size = _size(x)
    product = x.new_zeros(x.shape, dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        for rows in _slices(n, side):
            here = _factor(x[rows], size)
            for cols in _slices(n, side):
                if cols.start < rows.start:
                    continue
                chunk = scratch[: rows.stop - rows.start, : cols.stop - cols.start]
                fill(chunk, rows, cols)
                _add_product(product[rows], chunk, _factor(x[cols], size))
                if cols.start > rows.start:
                    _add_product(product[cols], chunk.T, here)
        total = _inner(x, product) * size / 2
        return finish(product, size), None, total


def _scratch(x: Tensor, height: int, width: int) -> Tensor:
    """Room for a chunk of W, in whole tiles."""
    return x.new_empty(_whole(height), _whole(width), dtype=torch.float16 if x.dtype in HALF else torch.float32)


def _inner(x: Tensor, product: Tensor) -> Tensor:
    """``sum x * product`` without a copy of the whole."""
    return torch.stack([(x[rows] * product[rows]).sum() for rows in _slices(len(x), ROWS)]).sum()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` with float32 accumulation, whatever the inputs."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cpu":
        total.addmm_(left.float(), right.float())
    else:
        try:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
        except RuntimeError:  # torch before this overload took a float32 summand; its check precedes any work
            total += torch.mm(left, right, out_dtype=torch.float32)


def _precision() -> str:
    """How float32 inputs multiply: three tf32 products keep float32's accuracy; one, if torch is told so."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@functools.cache
def _processors(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _spans(height: int, m: int, device: torch.device) -> tuple[int, int]:
    """Columns of one program and number of such spans: about eight programs for every processor."""
    wanted = triton.cdiv(8 * _processors(device), triton.cdiv(height, 2 * SMALLEST))
    span = triton.cdiv(triton.cdiv(m, wanted), SPAN) * SPAN
    return span, triton.cdiv(m, span)


def _tile_grid(rows: slice, cols: slice):
    def grid(block) -> tuple[int]:
        return (
            triton.cdiv(rows.stop - rows.start, block["BLOCK_M"])
            * triton.cdiv(cols.stop - cols.start, block["BLOCK_N"]),
        )

    return grid


def _merge(partial: Tensor, count: int, total: Tensor) -> None:
    """``total = log2(2**total + sum over the first `count` rows of 2**partial)``."""
    grid = (triton.cdiv(len(total), 64),)
    with torch.cuda.device_of(partial):
        _merge_kernel[grid](partial, total, len(total), partial.stride(0), count, BLOCK=64, LINES=32)


def _launch(kernel, grid, work: int, **arguments) -> dict[str, int]:
    """Run an autotuned kernel: with the best of its timed candidates if the work repays it. Returns the block sizes."""
    x = arguments["query"]
    with torch.cuda.device_of(x):
        if work >= TUNE_FROM and not INTERPRETED and not torch.cuda.is_current_stream_capturing():
            kernel[grid](**arguments, enable_fp_fusion=True)
            return kernel.best_config.kwargs
        config = _candidates(x.shape[1], x.element_size())[0 if _spacious(x.device) else -1]
        kernel.fn[grid](**arguments, **config.all_kwargs(), enable_fp_fusion=True)
        return config.kwargs


@functools.cache
def _spacious(device: torch.device) -> bool:
    """Do two of the large programs fit a processor's shared memory?"""
    return INTERPRETED or torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor > 2**17


def _candidates(d: int, itemsize: int) -> list[triton.Config]:
    """Block sizes to try: the first is a sound choice on large cards, the last one fits every card."""
    depth = max(16, triton.next_power_of_2(d))
    if INTERPRETED:
        return [triton.Config({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": min(depth, 64)}, num_warps=4, num_stages=1)]
    step = min(depth, 128 // itemsize)
    shapes: list[tuple[int, int, int, int, int, int | None]]  # rows, columns, depth, warps, stages, registers
    if itemsize == 4:
        shapes = [(128, 64, step, 8, 3, None), (128, 128, step, 8, 3, None), (64, 64, step, 4, 3, None)]
    else:
        # at 128 registers a thread, two programs share a processor, and one multiplies while the other sums
        shapes = [(128, 128, step, 8, 3, 128), (128, 128, step, 8, 3, None), (128, 256, step, 8, 3, None)]
        if step < depth <= 256:  # the rows of the queries stay on the chip while the keys pass by
            shapes.append((128, 128 if depth == 128 else 64, depth, 8, 2, None))
        shapes.append((64, 128, step, 4, 3, None))
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": k}, num_warps=w, num_stages=s, maxnreg=r)
        for m, n, k, w, s, r in shapes
    ]


def _tuned(key: list[str]):
    """`triton.autotune` over `_candidates`; the choice is kept on disk, so that a resumed run computes the same numbers."""
    return triton.autotune(
        configs=_candidates(512, 2) + _candidates(512, 4),
        key=["D", *key],
        prune_configs_by={
            "early_config_prune": lambda configs, arguments, **named: _candidates(
                named["D"], named["query"].element_size()
            )
        },
        cache_results=True,
    )


@triton.jit
def _rows_of(x, index, D: tl.constexpr, offset, BLOCK_D: tl.constexpr):
    """Load ``x[index, offset : offset + BLOCK_D]``; the caller has clamped `index` into range."""
    depth = offset + tl.arange(0, BLOCK_D)
    place = x + index.to(tl.int64)[:, None] * D + depth[None, :]
    value = tl.load(place) if D % BLOCK_D == 0 else tl.load(place, mask=depth[None, :] < D, other=0.0)
    if WIDEN:
        value = value.to(tl.float32)
    return value


@triton.jit
def _similarities(
    query,
    key,
    held,
    rows,
    columns,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``<q_i, k_j>`` of one tile in float32. `held` are the query rows when BLOCK_D covers d."""
    if D <= BLOCK_D:
        return tl.dot(held, tl.trans(_rows_of(key, columns, D, 0, BLOCK_D)), input_precision=PRECISION)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for offset in range(0, D, BLOCK_D):
            q = _rows_of(query, rows, D, offset, BLOCK_D)
            k = _rows_of(key, columns, D, offset, BLOCK_D)
            total = tl.dot(q, tl.trans(k), total, input_precision=PRECISION)
        return total


@triton.jit
def _vector_at(values, start, BLOCK: tl.constexpr):
    """The scalar offset goes into the pointer first: as one tensor of addresses it would fill the registers."""
    return tl.load(values + start + tl.arange(0, BLOCK))


@triton.jit
def _held(query, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    if D <= BLOCK_D:
        return _rows_of(query, rows, D, 0, BLOCK_D)
    else:
        return 0


@triton.jit
def _listed_at(listed, start, BLOCK: tl.constexpr, LISTED: tl.constexpr):
    if LISTED > 0:
        place = tl.arange(0, BLOCK)[:, None] * LISTED + tl.arange(0, LISTED)[None, :]
        return tl.load(listed + tl.cast(start, tl.int64) * LISTED + place)
    else:
        return 0


@triton.jit
def _ids_at(ids, start, BLOCK: tl.constexpr, SAME: tl.constexpr):
    if SAME > 0:
        return _vector_at(ids, start, BLOCK)
    else:
        return 0


@triton.jit
def _drop(
    logits, own, row_ids, column_ids, columns, left, BLOCK_N: tl.constexpr, LISTED: tl.constexpr, SAME: tl.constexpr
):
    """-inf where the relation holds. Few tiles hold a listed column, and only they pay for the look-up."""
    if LISTED > 0:
        hit = (own >= left) & (own < left + BLOCK_N)
        if tl.max(tl.max(hit.to(tl.int32), 1), 0) > 0:
            place = tl.arange(0, LISTED)
            for p in tl.static_range(LISTED):
                one = tl.sum(tl.where(place[None, :] == p, own, 0), 1)
                logits = tl.where(columns[None, :] == one[:, None], float("-inf"), logits)
    if SAME == 1:
        logits = tl.where(row_ids[:, None] == column_ids[None, :], float("-inf"), logits)
    if SAME == 2:
        logits = tl.where(row_ids[:, None] != column_ids[None, :], float("-inf"), logits)
    return logits


@triton.jit
def _row_sums(logits):
    """Each row's maximum and its sum around it."""
    top = tl.max(logits, 1)
    return top, tl.sum(tl.exp2(logits - tl.where(top == float("-inf"), 0.0, top)[:, None]), 1)


@triton.jit
def _column_log_sums(logits):
    peak = tl.max(logits, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    return base + tl.log2(tl.sum(tl.exp2(logits - base[None, :]), 0))


@_tuned(["LISTED", "SAME", "COLUMNS", "TRIANGLE", "PRECISION"])
@triton.jit(do_not_specialize=["start", "stop", "m", "height", "width", "span"])
def _reduce_kernel(
    query,
    key,
    scale,
    log_weight,
    listed,
    row_ids,
    column_ids,
    row_out,
    column_out,
    start,
    stop,
    m,
    height,
    width,
    span,
    D: tl.constexpr,
    LISTED: tl.constexpr,
    SAME: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRIANGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows ``start:stop`` against a span of columns: ``row_out [spans, height]``, ``column_out [row blocks, width]``, base 2."""
    block, part = tl.program_id(0), tl.program_id(1)
    above = start + block * BLOCK_M
    rows = above + tl.arange(0, BLOCK_M)  # past the end they repeat the last one: vectors have room for a whole tile
    safe_rows = tl.minimum(rows, stop - 1)
    factor = tl.load(scale) * LOG2_E
    held = _held(query, safe_rows, D, BLOCK_D)
    own, own_ids = _listed_at(listed, above, BLOCK_M, LISTED), _ids_at(row_ids, above, BLOCK_M, SAME)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first = part * span
    last = tl.minimum(first + span, m)
    if TRIANGLE:
        first = tl.maximum(first, above // BLOCK_N * BLOCK_N)
    for left in range(first, last, BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        safe_columns = tl.minimum(columns, m - 1)
        similarity = _similarities(query, key, held, safe_rows, safe_columns, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
        logits = similarity * factor
        if log_weight is not None:
            logits += _vector_at(log_weight, left, BLOCK_N)[None, :]
        other_ids = _ids_at(column_ids, left, BLOCK_N, SAME)
        logits = _drop(logits, own, own_ids, other_ids, columns, left, BLOCK_N, LISTED, SAME)
        if left + BLOCK_N > m:
            logits = tl.where(columns[None, :] < m, logits, float("-inf"))
        if COLUMNS:  # noqa: SIM102 (the compiler knows the one, only the device the other)
            if above + BLOCK_M > stop:
                logits = tl.where(rows[:, None] < stop, logits, float("-inf"))
        if COLUMNS and SAME == 0:
            peak = tl.max(tl.max(logits, 1), 0)
            peak = tl.where(peak == float("-inf"), 0.0, peak)
            terms = tl.exp2(logits - peak)
            tile_total = tl.sum(terms, 1)
            sums = tl.sum(terms, 0)
            tile_top = tl.zeros((BLOCK_M,), tl.float32) + peak
            column = peak + tl.log2(sums)
            if tl.minimum(tl.min(tile_total, 0), tl.min(sums, 0)) < FAINT:
                column = _column_log_sums(logits)
                tile_top, tile_total = _row_sums(logits)
        else:  # labels leave whole rows of tiles empty, where a common maximum would mostly be tried in vain
            tile_top, tile_total = _row_sums(logits)
            if COLUMNS:
                column = _column_log_sums(logits)
        new = tl.maximum(top, tile_top)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tile_total * tl.exp2(tile_top - base)
        top = new
        if COLUMNS:
            if TRIANGLE:  # a tile that touches the diagonal holds its pairs in both orders: its rows take them all
                column = tl.where(left < above + BLOCK_M, float("-inf"), column)
            tl.store(column_out + block.to(tl.int64) * width + left + tl.arange(0, BLOCK_N), column)
    row = tl.where(top == float("-inf"), top, top + tl.log2(total))
    tl.store(row_out + part.to(tl.int64) * height + block * BLOCK_M + tl.arange(0, BLOCK_M), row)


@triton.jit(do_not_specialize=["length", "stride", "count"])
def _merge_kernel(partial, total, length, stride, count, BLOCK: tl.constexpr, LINES: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    top = tl.load(total + place, mask=inside, other=float("-inf"))
    mass = tl.where(top == float("-inf"), 0.0, 1.0)
    for first in range(0, count, LINES):
        line = first + tl.arange(0, LINES)
        wanted = (line[:, None] < count) & inside[None, :]
        value = tl.load(
            partial + line.to(tl.int64)[:, None] * stride + place[None, :], mask=wanted, other=float("-inf")
        )
        new = tl.maximum(top, tl.max(value, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp2(top - base) + tl.sum(tl.exp2(value - base[None, :]), 0)
        top = new
    tl.store(total + place, tl.where(top == float("-inf"), top, top + tl.log2(mass)), mask=inside)


@triton.jit
def _place(row_start, row_stop, column_start, column_stop, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of this program's tile; eight row blocks walk the columns together and share their keys."""
    high = tl.cdiv(row_stop - row_start, BLOCK_M)
    wide = tl.cdiv(column_stop - column_start, BLOCK_N)
    program = tl.program_id(0)
    band = program // (8 * wide)
    inside = tl.minimum(high - band * 8, 8)
    line = band * 8 + program % (8 * wide) % inside
    return row_start + line * BLOCK_M, column_start + program % (8 * wide) // inside * BLOCK_N


@triton.jit
def _store_weights(weights, value, above, left, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Past the chunk's edge too: its storage ends with a whole tile, and a mask would break the vectors up."""
    corner = weights + above.to(tl.int64) * stride + left
    place = tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_N)[None, :]
    tl.store(corner + place, value.to(weights.dtype.element_ty))


@triton.jit
def _again(values, start, BLOCK: tl.constexpr):
    """`_vector_at`, but never taken for an earlier load (the policy differs), which would have to stay in registers."""
    return tl.load(values + start + tl.arange(0, BLOCK), eviction_policy="evict_last")


@_tuned(["LISTED", "SAME", "PRECISION"])
@triton.jit(do_not_specialize=["row_start", "row_stop", "column_start", "column_stop", "n", "m"])
def _weights_kernel(
    query,
    key,
    scale,
    log_weight,
    listed,
    row_ids,
    column_ids,
    row,
    column,
    row_gradient,
    column_gradient,
    weights,
    row_start,
    row_stop,
    column_start,
    column_stop,
    n,
    m,
    stride,
    D: tl.constexpr,
    LISTED: tl.constexpr,
    SAME: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of ``W_ij = g_i exp(l_ij - row_i) + h_j exp(l_ij - column_j)``."""
    above, left = _place(row_start, row_stop, column_start, column_stop, BLOCK_M, BLOCK_N)
    rows = above + tl.arange(0, BLOCK_M)
    columns = left + tl.arange(0, BLOCK_N)
    safe_rows, safe_columns = tl.minimum(rows, n - 1), tl.minimum(columns, m - 1)
    held = _held(query, safe_rows, D, BLOCK_D)
    similarity = _similarities(query, key, held, safe_rows, safe_columns, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
    logits = similarity * (tl.load(scale) * LOG2_E)
    if log_weight is not None:
        logits += _vector_at(log_weight, left, BLOCK_N)[None, :]
    own, own_ids = _listed_at(listed, above, BLOCK_M, LISTED), _ids_at(row_ids, above, BLOCK_M, SAME)
    other_ids = _ids_at(column_ids, left, BLOCK_N, SAME)
    logits = _drop(logits, own, own_ids, other_ids, columns, left, BLOCK_N, LISTED, SAME)
    r, g = _vector_at(row, above, BLOCK_M), _vector_at(row_gradient, above, BLOCK_M)
    if column is not None:
        c = _vector_at(column, left, BLOCK_N)
        low = tl.minimum(tl.min(r, 0), tl.min(c, 0))
        high = tl.max(tl.where(r == float("inf"), float("-inf"), r), 0)
        high = tl.maximum(high, tl.max(tl.where(c == float("inf"), float("-inf"), c), 0))
        middle = tl.where(high < low, 0.0, (high + low) * 0.5)
        top = _vector_at(column_gradient, left, BLOCK_N) * tl.exp2(middle - c)
        if high - low < SPREAD:  # one exponential serves both sides
            value = tl.exp2(logits - middle) * ((g * tl.exp2(middle - r))[:, None] + top[None, :])
        else:
            value = tl.exp2(logits - _again(column, left, BLOCK_N)[None, :])
            value *= _again(column_gradient, left, BLOCK_N)[None, :]
            value += tl.exp2(logits - r[:, None]) * g[:, None]
    else:
        value = tl.exp2(logits - r[:, None]) * g[:, None]
    _store_weights(weights, value, above - row_start, left - column_start, stride, BLOCK_M, BLOCK_N)


@triton.jit
def _log1p(u):
    """``log(1 + u)`` for u in [0, 1], to 1e-8 of itself: 2 artanh(u / (2 + u)) with a Chebyshev fit in the square.

    The hardware logarithm of 1 + u would lose all of a small u, and with a bias of -10 every pair is small.
    """
    z = u / (2.0 + u)
    w = z * z
    return z * (2.00000001 + w * (0.66666322 + w * (0.40024595 + w * (0.27965158 + w * 0.28157778))))


@_tuned(["PRECISION"])
@triton.jit(do_not_specialize=["n", "m", "span"])
def _softplus_kernel(
    query,
    key,
    scale,
    bias,
    row_out,
    n,
    m,
    span,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of rows against a span of columns: ``row_out [spans, n]`` holds sums of softplus."""
    block, part = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_rows = tl.minimum(rows, n - 1)
    factor, shift = tl.load(scale), tl.load(bias)
    held = _held(query, safe_rows, D, BLOCK_D)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first = part * span
    for left in range(first, tl.minimum(first + span, m), BLOCK_N):
        columns = left + tl.arange(0, BLOCK_N)
        safe_columns = tl.minimum(columns, m - 1)
        x = _similarities(query, key, held, safe_rows, safe_columns, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
        x = x * factor + shift
        value = tl.maximum(x, 0.0) + _log1p(tl.exp2(-tl.abs(x) * LOG2_E))
        if left + BLOCK_N > m:
            value = tl.where(columns[None, :] < m, value, 0.0)
        total += tl.sum(value, 1)
    tl.store(row_out + part.to(tl.int64) * n + rows, total, mask=rows < n)


@_tuned(["PRECISION"])
@triton.jit(do_not_specialize=["row_start", "row_stop", "column_start", "column_stop", "n", "m"])
def _sigmoid_kernel(
    query,
    key,
    scale,
    bias,
    gradient,
    weights,
    sums,
    row_start,
    row_stop,
    column_start,
    column_stop,
    n,
    m,
    stride,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of ``W_ij = g_i sigmoid(l_ij)``, and its sum."""
    above, left = _place(row_start, row_stop, column_start, column_stop, BLOCK_M, BLOCK_N)
    rows = above + tl.arange(0, BLOCK_M)
    columns = left + tl.arange(0, BLOCK_N)
    safe_rows, safe_columns = tl.minimum(rows, n - 1), tl.minimum(columns, m - 1)
    held = _held(query, safe_rows, D, BLOCK_D)
    x = _similarities(query, key, held, safe_rows, safe_columns, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
    x = x * tl.load(scale) + tl.load(bias)
    u = tl.exp2(-tl.abs(x) * LOG2_E)
    value = tl.where(x >= 0, 1.0, u) / (1.0 + u) * _vector_at(gradient, above, BLOCK_M)[:, None]
    inside = (rows[:, None] < row_stop) & (columns[None, :] < column_stop)
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(tl.where(inside, value, 0.0), 1), 0))
    _store_weights(weights, value, above - row_start, left - column_start, stride, BLOCK_M, BLOCK_N)
