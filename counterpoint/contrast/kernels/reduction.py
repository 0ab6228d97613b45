r"""Log-sum-exp of similarities and its kin, differentiable; memory O((N + M) d + one tile), forward and backward.

With logits ``l_ij = scale * <query_i, key_j> + log_weight_j`` over the pairs not in `without`:

    row_i = log sum_j exp(l_ij)        column_j = log sum_i exp(l_ij)

While torch.compile traces, each reduction is a registered operator (``torch.ops.counterpoint``), one opaque call; else it
is an ordinary autograd function, whose call costs a tenth of an operator's. Which executor computes it depends on device
and relation, and `executor` overrides it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from counterpoint.contrast.kernels import blocked
from counterpoint.contrast.relation import Relation, pack, unpack
from counterpoint.errors import InputError

EXECUTORS = ("blocked", "triton")
_chosen: ContextVar[str | None] = ContextVar("executor", default=None)


@contextmanager
def executor(name: Literal["blocked", "triton"]) -> Iterator[None]:
    """Compute every reduction inside the block by one executor, whatever the device suggests.

    Raises:
        InputError: no executor has that name.
    """
    if name not in EXECUTORS:
        raise InputError(f'no executor named "{name}"; there are {", ".join(EXECUTORS)}')
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def automatic() -> bool:
    """Whether nobody has chosen an executor."""
    return _chosen.get() is None


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
        InputError: shapes that do not fit together, or an executor that cannot do this.
    """
    query, key, scale, log_weight = _operands(query, key, temperature, log_weight)
    name, precision = which(query, key, without, columns)
    how = columns and key is not None, _keep(query, key, scale, log_weight), name, precision
    if torch.compiler.is_compiling():
        row, column, _ = _log_sum_exp(query, key, scale, log_weight, *pack(without), *how)
    else:
        row, column = _LogSumExp.apply(query, key, scale, log_weight, without, *how)
    if not columns:
        return row
    return row, row if key is None else column


def softmax_mean(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    without: Relation | None = None,
    log_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log-sum-exp of each row and the mean of its logits under the softmax, in one pass.

    .. math:: m_i = \sum_j p_{ij} l_{ij}, \quad p_{ij} = \exp(l_{ij} - \text{row}_i), \quad
        l_{ij} = \langle q_i, k_j \rangle / \tau_i + \log W_j

    The softmax-weighted mean is what attraction and repulsion with hardness weights need: with the cost -s as logit it
    is the expected cost under the distribution that the cost itself defines. ``row - m`` is the entropy.

    Args:
        query, key, temperature, without, log_weight: as in `log_sum_exp`.

    Returns:
        ``(row [N], mean [N])``; a row in which no pair counts is (-inf, 0), with zero gradient.

    Raises:
        InputError: shapes that do not fit together.
    """
    operands = _operands(query, key, temperature, log_weight)
    return _SoftmaxMean.apply(*operands, without)


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
    how = _keep(query, key, scale, bias), *which(query, key, None, False)
    if torch.compiler.is_compiling():
        return _softplus_sum(query, key, scale, bias, *how)[0]
    return _SoftplusSum.apply(query, key, scale, bias, *how)


def _keep(query: Tensor, key: Tensor | None, *others: Tensor | None) -> str:
    """Whether a backward pass follows, and wants the gradient of the "query" or of "both"; "" for none."""
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in (query, key, *others)):
        return ""
    return "both" if key is not None and key.requires_grad else "query"


def check(query: Tensor, key: Tensor | None, temperature: float | Tensor, log_weight: Tensor | None) -> None:
    """Raises InputError when the operands of a reduction do not fit together."""
    wide = query if key is None else key
    if query.ndim != 2 or wide.ndim != 2 or query.shape[1] != wide.shape[1]:
        raise InputError(f"query and key must be [N, d] and [M, d], not {list(query.shape)} and {list(wide.shape)}")
    if log_weight is not None and log_weight.shape != wide.shape[:1]:
        raise InputError(f"log_weight must hold one value per key, [{len(wide)}], not {list(log_weight.shape)}")
    if isinstance(temperature, Tensor) and temperature.numel() not in (1, len(query)):
        raise InputError(f"temperature must be one value or one per query ({len(query)}), not {temperature.numel()}")


def scaled(query: Tensor, temperature: float | Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """The queries and one factor of all logits, at least float32: values per row go into the queries."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    one = query.new_ones((), dtype=dtype)
    if per_row:
        return query.to(dtype) / torch.as_tensor(temperature, dtype=dtype, device=query.device).reshape(-1, 1), one
    return query, one / (temperature.to(dtype).reshape(()) if isinstance(temperature, Tensor) else temperature)


def _operands(query, key, temperature, log_weight) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Checked, in at least float32, with the temperature as one factor."""
    check(query, key, temperature, log_weight)
    per_row = isinstance(temperature, Tensor) and temperature.ndim > 0 and temperature.numel() > 1
    if key is None and (per_row or log_weight is not None):
        key = query
    query, scale = scaled(query, temperature, per_row)
    dtype = scale.dtype
    return (
        query.to(dtype),
        None if key is None else key.to(dtype),
        scale,
        None if log_weight is None else log_weight.to(dtype),
    )


@cache
def _triton() -> ModuleType | None:
    """The fused kernels, where triton is installed."""
    try:
        from counterpoint.contrast.kernels import triton
    except ImportError:
        return None
    return triton


def which(query: Tensor, key: Tensor | None, without: Relation | None, columns: bool) -> tuple[str, str]:
    """Which executor computes this, and in which precision it multiplies ("" is that of its operands).

    Raises:
        InputError: the executor that somebody chose cannot.
    """
    chosen = _chosen.get()
    if chosen == "blocked" or (chosen is None and query.device.type != "cuda"):
        return "blocked", ""
    kernels = _triton()
    if kernels is None or not kernels.supports(query, key, without, columns):
        if chosen is not None:
            lacks = "is not installed" if kernels is None else "cannot compute this relation, type or device"
            raise InputError(f"the executor triton {lacks}: leave the choice open, or take blocked")
        return "blocked", ""
    half = torch.is_autocast_enabled(query.device.type)
    return "triton", str(torch.get_autocast_dtype(query.device.type)).removeprefix("torch.") if half else ""


def _narrow(x: Tensor | None, precision: str) -> Tensor | None:
    return x if x is None or not precision else x.to(getattr(torch, precision))


def _gpu() -> ModuleType:
    found = _triton()
    assert found is not None  # `which` has asked
    return found


def forward(query, key, scale, log_weight, without, columns, keep, executor, precision) -> Any:
    """Row and column results, and what `backward` may go on with; None where there is none."""
    with torch.autocast(query.device.type, enabled=False):
        if executor == "triton":
            q, k = _narrow(query, precision), _narrow(key, precision)
            return *_gpu().forward(q, k, scale, log_weight, without, columns), None
        query, key = query.to(scale.dtype), None if key is None else key.to(scale.dtype)
        return blocked.forward(query, key, scale, log_weight, without, columns, keep)


def backward(
    query,
    key,
    scale,
    log_weight,
    without,
    row,
    column,
    row_gradient,
    column_gradient,
    kept,
    want_key,
    executor,
    precision,
) -> Any:
    """Gradients of query, key, scale and log_weight; None where there is none."""
    rest = (scale, log_weight, without, row, column, row_gradient, column_gradient)
    with torch.autocast(query.device.type, enabled=False):
        if executor == "triton":  # gradients in full precision: what attracts and what repels nearly cancel
            q, k = _narrow(query, precision), _narrow(key, precision)
            return _gpu().backward(q, k, *rest, want_key=want_key, dtype=scale.dtype)
        query, key = query.to(scale.dtype), None if key is None else key.to(scale.dtype)
        return blocked.backward(query, key, *rest, kept=kept, want_key=want_key)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, scale, log_weight, without, columns, keep, *how):
        row, column, kept = forward(query, key, scale, log_weight, without, columns, keep, *how)
        ctx.save_for_backward(query, key, scale, log_weight, row, column, kept)
        ctx.without, ctx.how = without, how
        return row, column

    @staticmethod
    @once_differentiable
    def backward(ctx, row_gradient, column_gradient):
        query, key, scale, log_weight, row, column, kept = ctx.saved_tensors
        operands = (query, key, scale, log_weight)
        want = [need and x is not None for need, x in zip(ctx.needs_input_grad, operands, strict=False)]
        gradients = backward(
            *operands, ctx.without, row, column, row_gradient, column_gradient, kept, want[1], *ctx.how
        )
        found = (gradient if wanted else None for gradient, wanted in zip(gradients, want, strict=True))
        return *found, *[None] * (3 + len(ctx.how))


@torch.library.custom_op("counterpoint::log_sum_exp", mutates_args=())
def _log_sum_exp(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    log_weight: Tensor | None,
    form: str,
    relation: Sequence[Tensor],
    columns: bool,
    keep: str,
    executor: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    without = unpack(form, relation)
    found = forward(query, key, scale, log_weight, without, columns, keep, executor, precision)
    row, column, kept = (query.new_empty(0) if part is None else part for part in found)
    return row, column, kept


@_log_sum_exp.register_fake
def _(query, key, scale, log_weight, form, relation, columns, keep, executor, precision):
    column = query.new_empty(key.shape[0] if columns else 0)
    size = torch.library.get_ctx().new_dynamic_size() if keep and executor == "blocked" else 0
    return query.new_empty(query.shape[0]), column, query.new_empty(size)


@torch.library.custom_op("counterpoint::log_sum_exp_backward", mutates_args=())
def _log_sum_exp_backward(
    query: Tensor,
    key: Tensor | None,
    scale: Tensor,
    log_weight: Tensor | None,
    form: str,
    relation: Sequence[Tensor],
    row: Tensor,
    column: Tensor | None,
    row_gradient: Tensor,
    column_gradient: Tensor | None,
    kept: Tensor,
    want_key: bool,
    executor: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known = (row, column, row_gradient, column_gradient, kept if len(kept) else None)
    gradients = backward(query, key, scale, log_weight, unpack(form, relation), *known, want_key, executor, precision)
    query_gradient, key_gradient, scale_gradient, weight_gradient = (
        row.new_empty(0) if gradient is None else gradient for gradient in gradients
    )
    return query_gradient, key_gradient, scale_gradient, weight_gradient


@_log_sum_exp_backward.register_fake
def _(query, key, scale, log_weight, form, relation, row, column, row_gradient, column_gradient, kept, want_key, *_):
    return (
        torch.empty_like(query),
        row.new_empty(0) if key is None or not want_key else torch.empty_like(key),
        torch.empty_like(scale),
        row.new_empty(0) if log_weight is None else torch.empty_like(log_weight),
    )


def _remember(ctx, inputs, output):
    query, key, scale, log_weight, ctx.form, relation, ctx.columns, _, *ctx.how = inputs
    ctx.count = len(relation)
    ctx.save_for_backward(query, key, scale, log_weight, *output, *relation)


def _gradients(ctx, row_gradient, column_gradient, _):
    query, key, scale, log_weight, row, column, kept, *relation = ctx.saved_tensors
    want_query, want_key, want_scale, want_weight = ctx.needs_input_grad[:4]
    found = _log_sum_exp_backward(
        query,
        key,
        scale,
        log_weight,
        ctx.form,
        relation,
        row,
        column if ctx.columns else None,
        row_gradient.contiguous(),
        column_gradient.contiguous() if ctx.columns else None,
        kept,
        bool(want_key) and key is not None,
        *ctx.how,
    )
    wanted = (want_query, want_key and key is not None, want_scale, want_weight and log_weight is not None)
    kept = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    return *kept, None, [None] * ctx.count, None, None, None, None


_log_sum_exp.register_autograd(_gradients, setup_context=_remember)


def softplus_forward(query, key, scale, bias, keep, executor, precision) -> tuple[Tensor, Tensor | None]:
    with torch.autocast(query.device.type, enabled=False):
        if executor == "triton":
            return _gpu().softplus_forward(_narrow(query, precision), _narrow(key, precision), scale, bias), None
        return blocked.softplus_forward(query, key, scale, bias, keep)


def softplus_backward(query, key, scale, bias, gradient, kept, want_key, executor, precision) -> Any:
    """Gradients of query, key, scale and bias; None where there is none."""
    with torch.autocast(query.device.type, enabled=False):
        if executor == "triton":
            q, k = _narrow(query, precision), _narrow(key, precision)
            return _gpu().softplus_backward(q, k, scale, bias, gradient, dtype=query.dtype)
        return blocked.softplus_backward(query, key, scale, bias, gradient, kept=kept, want_key=want_key)


class _SoftplusSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, scale, bias, keep, *how):
        total, kept = softplus_forward(query, key, scale, bias, keep, *how)
        ctx.save_for_backward(query, key, scale, bias, kept)
        ctx.how = how
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, scale, bias, kept = ctx.saved_tensors
        found = softplus_backward(query, key, scale, bias, gradient, kept, ctx.needs_input_grad[1], *ctx.how)
        return *found, None, None, None


@torch.library.custom_op("counterpoint::softplus_sum", mutates_args=())
def _softplus_sum(
    query: Tensor, key: Tensor, scale: Tensor, bias: Tensor, keep: str, executor: str, precision: str
) -> tuple[Tensor, Tensor]:
    total, kept = softplus_forward(query, key, scale, bias, keep, executor, precision)
    return total, query.new_empty(0) if kept is None else kept


@_softplus_sum.register_fake
def _(query, key, scale, bias, keep, executor, precision):
    size = torch.library.get_ctx().new_dynamic_size() if keep and executor == "blocked" else 0
    return query.new_empty(query.shape[0]), query.new_empty(size)


@torch.library.custom_op("counterpoint::softplus_sum_backward", mutates_args=())
def _softplus_sum_backward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    bias: Tensor,
    gradient: Tensor,
    kept: Tensor,
    want_key: bool,
    executor: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known = kept if len(kept) else None
    by_query, by_key, by_scale, by_bias = softplus_backward(
        query, key, scale, bias, gradient, known, want_key, executor, precision
    )
    return by_query, query.new_empty(0) if by_key is None or not want_key else by_key, by_scale, by_bias


@_softplus_sum_backward.register_fake
def _(query, key, scale, bias, gradient, kept, want_key, executor, precision):
    by_key = torch.empty_like(key) if want_key else query.new_empty(0)
    return torch.empty_like(query), by_key, torch.empty_like(scale), torch.empty_like(bias)


def _remember_softplus(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.how = inputs[5:]


def _softplus_gradients(ctx, gradient, _):
    *operands, kept = ctx.saved_tensors
    want_key = bool(ctx.needs_input_grad[1])
    found = _softplus_sum_backward(*operands, gradient.contiguous(), kept, want_key, *ctx.how)
    return *(x if want else None for x, want in zip(found, ctx.needs_input_grad, strict=False)), None, None, None


_softplus_sum.register_autograd(_softplus_gradients, setup_context=_remember_softplus)


class _SoftmaxMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, scale, log_weight, without):
        with torch.autocast(query.device.type, enabled=False):
            row, mean = blocked.mean_forward(query, key, scale, log_weight, without)
        ctx.save_for_backward(query, key, scale, log_weight, row, mean)
        ctx.without = without
        return row, mean

    @staticmethod
    @once_differentiable
    def backward(ctx, row_gradient, mean_gradient):
        query, key, scale, log_weight, row, mean = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            found = blocked.mean_backward(
                query, key, scale, log_weight, ctx.without, row, mean, row_gradient, mean_gradient
            )
        return *found, None
