"""The same reduction over several processes: nobody ever holds the keys of all, nor a gathered copy of anything.

Every rank keeps its shard of queries and keys. Key blocks travel: in each step a rank passes the block at hand to the
next rank, receives another from the previous one, and meanwhile reduces its own rows against the block at hand. What
it finds out about that block (column sums; in the backward pass the gradient of the keys) travels with the block,
grows at every rank and comes home at the end. Memory per rank: a few blocks of its own size.

With P ranks a full turn shows every block to every rank. When the keys are the queries half a turn is enough: what
rank r finds out about the block of rank s are the row sums that s would have found itself. If P is even, two ranks meet
each other's block in the last step of the half turn; each of them then does one half of that rectangle.

A visit is computed by the executor that `reduction` would take, so the arithmetic of a tile is the same everywhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from counterpoint.contrast.distributed import rank, world_size
from counterpoint.contrast.kernels import reduction
from counterpoint.contrast.relation import Relation
from counterpoint.errors import InputError


def log_sum_exp(
    query: Tensor,
    key: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    without: Relation | None = None,
    log_weight: Tensor | None = None,
    columns: bool = False,
) -> Any:
    r"""Log-sum-exp of the similarities between this rank's queries and the keys of all ranks.

    .. math:: \text{row}_i = \log \sum_{j \notin \text{without}(i)} W_j \exp(\langle q_i, k_j \rangle / \tau_i)

    Every rank calls it, with the same options, and every rank runs its backward pass. Gradients are those of the sum of
    what all ranks make of their results: a key receives what every rank says about it, as behind
    `counterpoint.contrast.distributed.gather`. The gradient of a scalar temperature is each rank's share, and the
    shares add up to the whole. Without a process group this is the blocked executor.

    Args:
        query: ``[n_r, d]``, this rank's queries, used as given. Blocks travel in the precision in which they are given.
        key: ``[m_r, d]``, this rank's keys; None takes the queries themselves, and then `without` must be symmetric.
        temperature: positive scalar or 0-d tensor, the same on every rank, or (with a key) one value per row ``[n_r]``.
        without: pairs that do not count: this rank's rows x the columns of all ranks, in rank order.
        log_weight: additive log-weight of each of this rank's keys, ``[m_r]``.
        columns: also return the log-sum-exp down each column.

    Returns:
        ``row [n_r]``, or ``(row [n_r], column [m_r])``, the columns being this rank's keys over the queries of all
        ranks. At least float32. A row or column in which no pair counts is -inf, with zero gradient.

    Raises:
        InputError: shapes that do not fit together, on this rank or between ranks.
    """
    reduction.check(query, key, temperature, log_weight)
    wide = query if key is None else key
    several = isinstance(temperature, Tensor) and temperature.numel() > 1
    ring = _meet(wide, (key is not None, log_weight is not None, columns), several)
    if not ring.half:
        key = wide
    # decided together: one row has one temperature either way
    query, scale = reduction.scaled(query, temperature, ring.per_row)
    log_weight = None if log_weight is None else log_weight.to(scale.dtype)
    row, column = _RingLogSumExp.apply(query, key, scale, log_weight, without, columns and key is not None, ring)
    if not columns:
        return row
    return row, row if key is None else column


def softplus_sum(query: Tensor, key: Tensor, *, scale: float | Tensor = 1.0, bias: float | Tensor = 0.0) -> Tensor:
    r"""Row sums of the pairwise softplus of this rank's queries with the keys of all ranks.

    .. math:: \text{out}_i = \sum_j \log(1 + \exp(\text{scale} \langle q_i, k_j \rangle + \text{bias}))

    Gradients as those of `log_sum_exp` here: a key receives what every rank says about it, scale and bias each rank's share.

    Args:
        query: ``[n_r, d]``, this rank's queries.
        key: ``[m_r, d]``, this rank's keys.
        scale: positive scalar or 0-d tensor, the same on every rank.
        bias: scalar or 0-d tensor, the same on every rank.

    Returns:
        ``[n_r]``, at least float32.

    Raises:
        InputError: shapes that do not fit together, on this rank or between ranks.
    """
    reduction.check(query, key, 1.0, None)
    ring = _meet(key, (True, False, False), False)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale, bias = (torch.as_tensor(value, dtype=dtype, device=query.device).reshape(()) for value in (scale, bias))
    return _RingSoftplusSum.apply(query.to(dtype), key.to(dtype), scale, bias, ring)


class _Ring(NamedTuple):
    """What all ranks agreed on: who has how many keys, whether half a turn is enough, whether each row has its own
    temperature; and this rank's place.
    """

    rank: int
    sizes: list[int]
    half: bool
    per_row: bool

    @property
    def visits(self) -> int:
        """How many blocks a rank sees, its own included."""
        return len(self.sizes) // 2 + 1 if self.half else len(self.sizes)

    def owner(self, step: int) -> int:
        """Whose block is here in this step."""
        return (self.rank - step) % len(self.sizes)

    def share(self, step: int, n: int, m: int) -> tuple[slice, slice]:
        """The part of own rows x visiting columns that falls to this rank: all of it, or one half of a shared visit.

        Of two ranks that hold each other's block the lower one keeps the upper half of its own rows, and the higher one
        takes the lower half of them, which are columns to it.
        """
        owner = self.owner(step)
        if not self.half or step == 0 or 2 * step != len(self.sizes):
            return slice(0, n), slice(0, m)
        if self.rank < owner:
            return slice(0, (n + 1) // 2), slice(0, m)
        return slice(0, n), slice((m + 1) // 2, m)


class _RingLogSumExp(torch.autograd.Function):
    """Rows and columns over all ranks; see the module docstring."""

    @staticmethod
    def forward(ctx, query, key, scale, log_weight, without, columns, ring):
        row = scale.new_full((len(query),), -torch.inf)

        def visit(step: int, block: list[Tensor]) -> list[Tensor]:
            here = _visit(query, block, log_weight is not None, without, step, ring)
            if ring.half and step == 0:
                return [_forward(here.query, None, scale, None, here.without, False)[0]]
            column = row.new_full((len(block[0]),), -torch.inf)
            if len(here.query) and len(here.key):
                downwards = columns or ring.half
                along, down = _forward(here.query, here.key, scale, here.log_weight, here.without, downwards)
                row[here.rows] = torch.logaddexp(row[here.rows], along)
                if down is not None:
                    column[here.columns] = down
            return [column] if columns or ring.half else []

        with torch.autocast(query.device.type, enabled=False):
            found = _turn(ring, _block(query, key, log_weight), visit, torch.logaddexp)
        if ring.half:
            row = torch.logaddexp(row, found[0])
        column = found[0] if columns else row.new_empty(0)
        ctx.without, ctx.columns, ctx.ring = without, columns, ring
        ctx.save_for_backward(query, key, scale, log_weight, row, column)
        return row, column

    @staticmethod
    @once_differentiable
    def backward(ctx, row_gradient, column_gradient):
        query, key, scale, log_weight, row, column = ctx.saved_tensors
        ring, columns, (_, want_key, _, want_weight) = ctx.ring, ctx.columns, ctx.needs_input_grad[:4]
        want_key = want_key or ring.half
        query_gradient = torch.zeros_like(query, dtype=row.dtype)
        scale_gradient = torch.zeros_like(scale)
        block = _block(query, key, log_weight)
        if ring.half:
            block += [row, row_gradient.contiguous()]
        elif columns:
            block += [column, column_gradient.contiguous()]

        def visit(step: int, block: list[Tensor]) -> list[Tensor]:
            here = _visit(query, block, log_weight is not None, ctx.without, step, ring)
            triangle = ring.half and step == 0
            both = (ring.half or columns) and not triangle
            key_gradient = torch.zeros_like(block[0], dtype=row.dtype) if want_key else None
            weight_gradient = None
            if len(here.query) and len(here.key):
                along, down, by_scale, weight_gradient = _backward(
                    here.query,
                    None if triangle else here.key,
                    scale,
                    here.log_weight,
                    here.without,
                    row[here.rows],
                    block[-2][here.columns] if both else None,
                    row_gradient[here.rows],
                    block[-1][here.columns] if both else None,
                    want_key=want_key,
                )
                scale_gradient.add_(by_scale)
                target = key_gradient if triangle and key_gradient is not None else query_gradient
                target[here.rows] += along
                if key_gradient is not None and down is not None:
                    key_gradient[here.columns] += down
            return [x for x in (key_gradient, weight_gradient if want_weight else None) if x is not None]

        with torch.autocast(query.device.type, enabled=False):
            found = _turn(ring, block, visit, torch.add)
        if ring.half:
            query_gradient += found[0]
        return (
            query_gradient.to(query.dtype) if ctx.needs_input_grad[0] else None,
            found[0].to(key.dtype) if ctx.needs_input_grad[1] else None,
            scale_gradient if ctx.needs_input_grad[2] else None,
            found[-1] if want_weight else None,
            None,
            None,
            None,
        )


class _RingSoftplusSum(torch.autograd.Function):
    """Row sums over all ranks; see the module docstring."""

    @staticmethod
    def forward(ctx, query, key, scale, bias, ring):
        total = query.new_zeros(len(query))

        def visit(step: int, block: list[Tensor]) -> list[Tensor]:
            how = reduction.which(query, block[0], None, False)
            total.add_(reduction.softplus_forward(query, block[0], scale, bias, "", *how)[0])
            return []

        _turn(ring, [key.contiguous()], visit, torch.add)
        ctx.ring = ring
        ctx.save_for_backward(query, key, scale, bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, scale, bias = ctx.saved_tensors
        own = [torch.zeros_like(x) for x in (query, scale, bias)]

        def visit(step: int, block: list[Tensor]) -> list[Tensor]:
            how = reduction.which(query, block[0], None, False)
            known = (query, block[0], scale, bias, gradient, None, True)
            by_query, by_key, *shared = reduction.softplus_backward(*known, *how)
            for total, found in zip(own, (by_query, *shared), strict=True):
                total.add_(found)
            return [by_key]

        (key_gradient,) = _turn(ctx.ring, [key.contiguous()], visit, torch.add)
        return own[0], key_gradient, *own[1:], None


def _meet(keys: Tensor, form: tuple[bool, bool, bool], per_row: bool) -> _Ring:
    """Tell all ranks how this one calls and learn how they do; one small all-reduce.

    Args:
        keys: this rank's.
        form: whether a key, a log_weight and the columns were given or asked for.
        per_row: whether this rank has several temperatures.

    Raises:
        InputError: on every rank, when one has no rows, another dimension or another form.
    """
    ranks = world_size()
    table = torch.zeros(ranks, 4, dtype=torch.int64)
    table[rank()] = torch.tensor([*keys.shape, form[0] + 2 * form[1] + 4 * form[2], per_row])
    if ranks > 1:
        table = table.to(keys.device)
        dist.all_reduce(table)
    sizes, dimensions, forms, several = table.T.tolist()
    if 0 in sizes:
        raise InputError(f"rank {sizes.index(0)} has no rows: every rank needs at least one")
    if len(set(dimensions)) > 1:
        raise InputError(f"the rows of all ranks must have one dimension, but by rank they have {dimensions}")
    if len(set(forms)) > 1:
        raise InputError("every rank must pass the same arguments: key, log_weight and columns on all ranks or on none")
    per_row = any(several)
    return _Ring(rank(), sizes, not (form[0] or form[1] or per_row), per_row)


class _Visit(NamedTuple):
    """One visiting block as this rank works on it: the part of the rectangle that is its own."""

    rows: slice
    columns: slice
    query: Tensor
    key: Tensor
    log_weight: Tensor | None
    without: Relation | None


def _visit(
    query: Tensor,
    block: list[Tensor],
    weighted: bool,
    without: Relation | None,
    step: int,
    ring: _Ring,
) -> _Visit:
    rows, columns = ring.share(step, len(query), len(block[0]))
    left = sum(ring.sizes[: ring.owner(step)])
    there = slice(left + columns.start, left + columns.stop)
    return _Visit(
        rows,
        columns,
        query[rows],
        block[0][columns],
        block[1][columns] if weighted else None,
        None if without is None else without.window(rows, there),
    )


def _block(query: Tensor, key: Tensor | None, log_weight: Tensor | None) -> list[Tensor]:
    """What this rank sends round, in the precision in which it was given."""
    block = [(query if key is None else key).contiguous()]
    return block if log_weight is None else [*block, log_weight.contiguous()]


def _forward(query, key, scale, log_weight, without, columns) -> tuple[Tensor, Tensor | None]:
    """Row and column log-sum-exp of one rectangle (without a key: of the triangle), by the executor that fits it."""
    name, _ = reduction.which(query, key, without, columns)
    row, column, _ = reduction.forward(query, key, scale, log_weight, without, columns, "", name, "")
    return row, column


def _backward(
    query, key, scale, log_weight, without, row, column, row_gradient, column_gradient, *, want_key
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """What that rectangle adds to the gradients of query, key, scale and log_weight; `row` and `column` are whole."""
    name, _ = reduction.which(query, key, without, column is not None)
    known = (row, column, row_gradient, column_gradient, None, want_key, name, "")
    found: tuple[Tensor, Tensor | None, Tensor, Tensor | None]
    found = reduction.backward(query, key, scale, log_weight, without, *known)
    return found


def _turn(
    ring: _Ring,
    block: list[Tensor],
    visit: Callable[[int, list[Tensor]], list[Tensor]],
    merge: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """Send the own block round the ring and return what all ranks found out about it.

    Args:
        ring: who is who.
        block: contiguous tensors, one row per key.
        visit: ``visit(step, block)`` works on the block at hand and returns what it found out, one row per key.
        merge: joins what two ranks found out about one block.
    """
    ranks = len(ring.sizes)
    following, previous = (ring.rank + 1) % ranks, (ring.rank - 1) % ranks
    own: list[Tensor] = []
    found: list[Tensor] = []
    for step in range(ring.visits):
        leaving = block if step < ring.visits - 1 else []
        coming = [x.new_empty((ring.sizes[ring.owner(step + 1)], *x.shape[1:])) for x in leaving]
        joining = [x.new_empty((ring.sizes[ring.owner(step)], *x.shape[1:])) for x in own if step > 1]
        works = _exchange(found + leaving, following, joining + coming, previous)
        here = visit(step, block)
        for work in works:
            work.wait()
        if step == 0:
            own = here
        else:
            found = [merge(a, b) for a, b in zip(here, joining, strict=True)] if joining else here
        block = coming
    if ring.visits == 1 or not own:
        return own
    home = [torch.empty_like(x) for x in own]
    for work in _exchange(found, ring.owner(ring.visits - 1), home, (ring.rank + ring.visits - 1) % ranks):
        work.wait()
    return [merge(a, b) for a, b in zip(own, home, strict=True)]


def _exchange(sent: list[Tensor], to: int, received: list[Tensor], source: int) -> list[dist.Work]:
    """Start to send and to receive, all at once: neither side waits for the other, and work may go on meanwhile.

    NCCL knows no tags: both sides list what passes between them in the same order, findings before the next block.
    """
    operations = [dist.P2POp(dist.isend, x, to) for x in sent] + [dist.P2POp(dist.irecv, x, source) for x in received]
    return dist.batch_isend_irecv(operations) if operations else []
