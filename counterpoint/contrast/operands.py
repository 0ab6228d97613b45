"""What every objective does to its operands: check them, bring them to the sphere and to one precision, reduce what comes out."""

import math
from typing import Any

import torch
from torch import Tensor

from counterpoint.contrast.distributed import Gathered, Placed, by_ring, gather, gather_plain, place, world_size
from counterpoint.contrast.kernels import automatic
from counterpoint.contrast.relation import Mask, Relation, Same
from counterpoint.errors import InputError, NotFinite

Temperature = float | Tensor

SMALL = 2**18
"""So many similarities (1 MB) are held at once on a CPU, where the calls around a tile would cost more than the tile."""


def unit(x: Tensor) -> Tensor:
    """Rows of `x` on the unit sphere (at least float32); a row of zeros stays zero and receives no gradient."""
    x = wide(x)
    return x / _length(x) if torch.compiler.is_compiling() else _Unit.apply(x)[0]


def _length(x: Tensor) -> Tensor:
    """Norm of each row, infinite for zeros: a floor of 1e-12 would multiply their gradient by 1e12."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.masked_fill(norm < 1e-12, torch.inf)


class _Unit(torch.autograd.Function):
    """``x / |x|`` and ``|x|``, with half the operations that autograd would record."""

    @staticmethod
    def forward(ctx, x):
        norm = _length(x)
        y = x / norm
        ctx.save_for_backward(y, norm)
        ctx.set_materialize_grads(False)
        return y, norm

    @staticmethod
    def backward(ctx, gradient, norm_gradient):
        y, norm = ctx.saved_tensors
        found = None
        if gradient is not None:
            along = torch.linalg.vecdot(y, gradient).unsqueeze(-1)
            found = torch.addcmul(gradient, y, along, value=-1) / norm
        if norm_gradient is not None:  # of a second derivative
            found = y * norm_gradient if found is None else found + y * norm_gradient
        return found


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """`torch.einsum` in the operands' own precision: autocast would halve it."""
    with torch.autocast(operands[0].device.type, enabled=False):
        return torch.einsum(equation, *operands)


def divide(similarity: Tensor, temperature: Temperature) -> Tensor:
    if isinstance(temperature, Tensor) and temperature.numel() > 1:
        return similarity / temperature.reshape(-1, *[1] * (similarity.ndim - 1))
    return similarity / (temperature.reshape(()) if isinstance(temperature, Tensor) else temperature)


def two_views(z1, z2, temperature, normalize, travel: bool = False) -> tuple[Tensor, Any, Tensor]:
    """Anchors of both views ``[2N, d]``, the rows of all ranks (with `travel` maybe their places only), and each anchor's
    similarity to its partner.
    """
    check_matrix(z1, "z1")
    check_matrix(z2, "z2")
    check_temperature(temperature, 1)
    if z1.shape != z2.shape:
        raise InputError(f"z1 and z2, the two views, must have one shape, not {list(z1.shape)} and {list(z2.shape)}")
    z1, z2 = (unit(z1), unit(z2)) if normalize else (wide(z1), wide(z2))
    query = torch.cat([z1, z2])
    keys = place(query) if travel and by_ring() else gather(query)
    if keys.total < 4:
        raise InputError("a batch of one item has no negatives: use a batch of at least 2")
    return query, keys, (z1 * z2).sum(1).repeat(2)


def own_rows(query: Tensor, keys: Gathered | Placed) -> Tensor:
    return torch.arange(keys.start, keys.start + len(query), device=query.device)


def among_all(marks: Tensor, keys: Gathered | Placed) -> Tensor:
    """Marks of this rank's keys ``[N, M]`` as columns among those of all ranks."""
    everyone = torch.zeros(len(marks), keys.total, dtype=torch.bool, device=marks.device)
    everyone[:, keys.start : keys.start + marks.shape[1]] = marks
    return everyone


def ignored_pairs(ignore: Relation | Tensor, keys: Gathered | Placed, n: int, local: int) -> Relation:
    """What does not count, as a relation of n local queries and the keys of all ranks.

    Args:
        ignore: a relation, or bool ``[n, local]`` or ``[n, keys of all]``.
        keys: of all ranks.
        n: local queries.
        local: keys of this rank.

    Raises:
        InputError: a matrix of another shape, or a relation that cannot say anything of other processes.
    """
    if isinstance(ignore, Tensor) and keys.ranks > 1 and ignore.shape == (n, keys.total):
        return Mask(ignore.bool())
    if isinstance(ignore, Tensor):
        if ignore.shape != (n, local):
            raise InputError(f"ignore must mark queries x keys, [{n}, {local}], not {list(ignore.shape)}")
        return Mask(among_all(ignore.bool(), keys))
    if keys.ranks > 1 and isinstance(ignore, Same):
        return Same(ignore.row_ids, gather_plain(ignore.column_ids).rows)
    if keys.ranks > 1:
        raise InputError(
            "a relation of this kind cannot say what to ignore on other processes: pass ignore as a bool matrix"
        )
    return ignore


def fits_at_once(query: Tensor, keys: Gathered | Placed, gain: int = 1) -> bool:
    """Whether all similarities may be held at once, which is fastest for few of them and means the same.

    `gain` says how many times less the tiles cost where they are better than the plain operations for other reasons too.
    """
    here = keys.ranks == 1 and query.device.type == "cpu" and automatic()
    return here and len(query) * keys.total * gain <= SMALL


def logit_matrix(query: Tensor, key: Tensor, temperature: Temperature) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        return divide(query, temperature) @ key.T


def reduce(loss: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """Reduce per-row losses; `counted` (bool, same shape) marks the rows that a mean divides by.

    Under a process group "mean" returns ``world_size * local sum / global count`` and "sum" ``world_size * local sum``,
    whose averages over ranks (of value and of gradient) are the global mean and sum.
    """
    if reduction == "none":
        return loss
    ranks = world_size()
    if reduction == "sum":
        return loss.sum() * ranks
    if reduction != "mean":
        raise InputError(f'reduction must be "mean", "sum" or "none", not "{reduction}"')
    if ranks == 1 and counted is None:
        return loss.mean()
    count = loss.new_tensor(float(len(loss))) if counted is None else counted.sum().to(loss.dtype)
    if ranks > 1:
        count = count.clone()
        torch.distributed.all_reduce(count)
    return loss.sum() * ranks / count.clamp(min=1)


def check_matrix(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} must be a floating-point tensor [rows, dimensions], not {what}")
    if 0 in x.shape:
        raise InputError(f"{name} is empty: {list(x.shape)}")
    # only where nobody has to wait for the answer: a GPU would, and the other processes if this one stopped
    free = x.device.type == "cpu" and world_size() == 1 and not torch.compiler.is_compiling()
    if free and not math.isfinite(x.detach().sum().item()):
        bad = int((~x.detach().isfinite().all(1)).sum())
        if bad:  # else the sum alone was too large
            raise NotFinite(f"{name} holds NaN or infinite values in {bad:,} of its {len(x):,} rows")


def check_pair(query: Tensor, key: Tensor, temperature: Temperature) -> None:
    check_matrix(query, "query")
    check_matrix(key, "key")
    check_dimensions(key, "key", query)
    check_temperature(temperature, 1, len(query))


def check_dimensions(x: Tensor, name: str, query: Tensor) -> None:
    if x.shape[-1] != query.shape[1]:
        raise InputError(f"{name} has {x.shape[-1]} dimensions and query {query.shape[1]}: they must agree")


def check_temperature(temperature: Temperature, *sizes: int) -> None:
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise InputError(f"temperature must be positive, not {temperature}")
    if isinstance(temperature, Tensor) and temperature.numel() not in sizes:
        what = "one value" if len(sizes) == 1 else f"one value or one per query ({sizes[-1]})"
        raise InputError(f"temperature must be {what}, not {temperature.numel()}")
