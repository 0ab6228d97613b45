"""Shards that meet in a ring give what one process gives, and nobody gathers anything.

This file is also the program that the processes run (``python test_ring.py FOLDER``): it compares with the definition
in float64 and writes what it found; the tests look at that record. Processes start once for all group sizes, since
starting them is most of the time this file takes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import counterpoint
from counterpoint.contrast import Listed, Mask, Relation, Same, nt_xent, unit
from counterpoint.contrast.distributed import gather
from counterpoint.contrast.kernels import blocked, executor, log_sum_exp, ring
from counterpoint.contrast.relation import Transposed
from counterpoint.errors import InputError

DIMENSIONS = 5
PLAN = {  # queries and keys of each rank; the queries are their own keys where a case says so
    1: ([7], [5]),
    2: ([5, 3], [4, 6]),
    3: ([1, 6, 4], [5, 1, 7]),
    4: ([4, 1, 5, 2], [2, 3, 1, 6]),
}
UNEVEN_PAIRS = [
    ([1, 1], [1, 1]),
    ([1, 9], [9, 1]),
    ([9, 1], [1, 9]),
]  # rank 0's share of a pair rounds to nothing or all


class Case(NamedTuple):
    """One way to call the kernel; `relation` is of all rows and columns, the rank takes its rows of it."""

    own_keys: bool = False
    columns: bool = False
    temperature: float | str = 0.5
    log_weight: bool = False
    relation: str | None = None
    dtype: torch.dtype = torch.float64
    frozen: str | None = None


CASES = {
    "rows": Case(),
    "rows, sharp": Case(temperature=0.01),
    "rows, no gradient for the keys": Case(frozen="key"),
    "rows, no gradient for the queries": Case(frozen="query"),
    "rows, a temperature per row": Case(temperature="rows"),
    "rows, weights": Case(log_weight=True),
    "rows, relation": Case(relation="between"),
    "both": Case(columns=True),
    "both, sharp": Case(columns=True, temperature=0.01),
    "both, weights": Case(columns=True, log_weight=True),
    "both, a temperature per row": Case(columns=True, temperature="rows"),
    "both, relation": Case(columns=True, relation="between"),
    "both, relation, weights, sharp": Case(columns=True, relation="between", log_weight=True, temperature=0.02),
    "both, float32": Case(columns=True, dtype=torch.float32),
    "both, bfloat16": Case(columns=True, dtype=torch.bfloat16),
    "own keys": Case(own_keys=True, relation="self"),
    "own keys, everything counts": Case(own_keys=True),
    "own keys, sharp": Case(own_keys=True, relation="self", temperature=0.01),
    "own keys, labels": Case(own_keys=True, relation="labels"),
    "own keys, matrix": Case(own_keys=True, relation="matrix", temperature=0.02),
    "own keys, columns": Case(own_keys=True, relation="self", columns=True),
    "own keys, weights": Case(own_keys=True, relation="self", log_weight=True),
    "own keys, weights and columns": Case(own_keys=True, relation="self", log_weight=True, columns=True),
    "own keys, a temperature per row": Case(own_keys=True, relation="self", temperature="rows"),
    "own keys, float32": Case(own_keys=True, relation="self", dtype=torch.float32),
    "own keys, bfloat16": Case(own_keys=True, relation="self", dtype=torch.bfloat16),
}


ON_GPU = ("both, float32", "both, bfloat16", "own keys, float32", "own keys, bfloat16")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relation(kind: str | None, n: int, m: int, rows: slice) -> Relation | None:
    """The rows `rows` of a relation between n rows and m columns."""
    own = Listed(torch.arange(n)[rows])
    if kind is None:
        return None
    if kind == "self":
        return own
    if kind == "labels":  # symmetric
        labels = torch.arange(n) * 5 % 3
        return own | Same(labels[rows], labels)
    if kind == "matrix":  # symmetric
        near = draw(n, n, seed=6) > 0.5
        return Mask((near | near.T)[rows]) | own
    listed = torch.stack([torch.arange(n) % m, torch.full((n,), -1), (torch.arange(n) + 2) % m], dim=1)
    labels, groups = torch.arange(n) % 3, torch.arange(m) % 4
    return (Same(labels[rows], groups) | Listed(listed[rows])) & ~Mask((draw(n, m, seed=7) > 0.5)[rows])


def inputs(case: Case, n: int, m: int) -> dict[str, Tensor]:
    """Leaves of all ranks together, in the precision of the case."""
    leaves = {"query": draw(n, DIMENSIONS, seed=1) / 2}
    if not case.own_keys:
        leaves["key"] = draw(m, DIMENSIONS, seed=2) / 2
    leaves = {name: x.to(case.dtype) for name, x in leaves.items()}
    wide = torch.promote_types(case.dtype, torch.float32)
    rows = draw(n, seed=3).abs() + 0.3
    leaves["temperature"] = (
        rows.to(wide) if isinstance(case.temperature, str) else torch.tensor(case.temperature).to(wide)
    )
    if case.log_weight:
        leaves["log_weight"] = draw(n if case.own_keys else m, seed=4).to(wide)
    return leaves


def definition(case: Case, leaves: dict[str, Tensor]) -> list[Tensor]:
    """Rows, and columns if asked, of the whole matrix, in float64."""
    query, temperature = leaves["query"], leaves["temperature"]
    key = leaves.get("key", query)
    logits = query @ key.T / (temperature.reshape(-1, 1) if temperature.ndim else temperature)
    if case.log_weight:
        logits = logits + leaves["log_weight"]
    dropped = relation(case.relation, len(query), len(key), slice(0, len(query)))
    if dropped is not None:
        logits = logits.masked_fill(dropped.holds(slice(0, len(query)), slice(0, len(key))), -torch.inf)
    return [logits.logsumexp(1), logits.logsumexp(0)] if case.columns else [logits.logsumexp(1)]


def leaf(leaves: dict[str, Tensor], frozen: str | None) -> dict[str, Tensor]:
    return {name: x.clone().requires_grad_(name != frozen) for name, x in leaves.items()}


def weighted(results: list[Tensor], here: list[slice]) -> Tensor:
    """A different weight for every row and column, so that every single gradient counts; empty ones do not."""
    total = results[0].new_zeros(())
    for seed, (values, place) in enumerate(zip(results, here, strict=True)):
        weight = draw(1000, seed=20 + seed)[place].to(values.dtype)
        total = total + (weight * values.masked_fill(values == -torch.inf, 0)).sum()
    return total


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def error(ours: Tensor, exact: Tensor) -> float:
    finite = exact.isfinite()
    if not torch.equal(ours[finite.logical_not()].double(), exact[finite.logical_not()]):
        return torch.inf
    return float((ours[finite].double() - exact[finite]).norm() / exact[finite].norm().clamp(min=1))


def compare(case: Case, sizes: tuple[list[int], list[int]], rank: int) -> dict[str, float]:
    """Largest error over ranks of the values and of each gradient, relative to the size of the whole."""
    sizes = (sizes[0], sizes[0]) if case.own_keys else sizes
    (n, rows), (m, cols) = ((sum(s), slice(sum(s[:rank]), sum(s[: rank + 1]))) for s in sizes)
    whole = leaf(inputs(case, n, m), case.frozen)
    exact = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in whole.items()}
    expected = definition(case, exact)
    expected_gradients = gradients(weighted(expected, [slice(0, n), slice(0, m)][: len(expected)]), exact)
    place = {"query": rows, "key": cols, "log_weight": cols, "temperature": rows}
    scalar = whole["temperature"].ndim == 0
    mine = leaf(
        {
            name: x.detach() if name == "temperature" and scalar else x.detach()[place[name]]
            for name, x in whole.items()
        },
        case.frozen,
    )
    results: Any = ring.log_sum_exp(
        mine["query"],
        mine.get("key"),
        temperature=mine["temperature"],
        without=relation(case.relation, n, m, rows),
        log_weight=mine.get("log_weight"),
        columns=case.columns,
    )
    results = list(results) if case.columns else [results]
    assert all(x.dtype == torch.promote_types(case.dtype, torch.float32) for x in results)
    here = [rows, cols][: len(results)]
    errors = {"value": max(error(x.detach(), e.detach()[at]) for x, e, at in zip(results, expected, here, strict=True))}
    for name, gradient in gradients(weighted(results, here), mine).items():
        assert gradient.dtype == mine[name].dtype
        if name == "temperature" and scalar:  # the shares of the ranks add up
            distributed.all_reduce(gradient)
            errors[name] = error(gradient, expected_gradients[name])
        else:
            errors[name] = error(gradient, expected_gradients[name][place[name]])
    worst = torch.tensor(list(errors.values()), dtype=torch.float64)
    distributed.all_reduce(worst, distributed.ReduceOp.MAX)
    return dict(zip(errors, worst.tolist(), strict=True))


def same_as_gather(sizes: tuple[list[int], list[int]], rank: int) -> float:
    """Also the share of each rank in the gradient of the temperature is that of the gathered form."""
    place = [slice(sum(s[:rank]), sum(s[: rank + 1])) for s in sizes]
    whole = inputs(Case(), sum(sizes[0]), sum(sizes[1]))
    whole |= {"query": whole["query"][place[0]], "key": whole["key"][place[1]]}
    forms = []
    for form in ("ring", "gather"):
        mine = leaf(whole, None)
        if form == "ring":
            row = ring.log_sum_exp(mine["query"], mine["key"], temperature=mine["temperature"])
        else:
            row = log_sum_exp(mine["query"], gather(mine["key"]).rows, temperature=mine["temperature"])
        forms.append([row.detach(), *gradients(weighted([row], [place[0]]), mine).values()])
    return max(error(a, b) for a, b in zip(*forms, strict=True))


def averaged_step(sizes: list[int], rank: int) -> float:
    """NT-Xent on the kernel under the library's convention: the averaged gradient is that of one process."""
    total, start = sum(sizes), sum(sizes[:rank])
    views = draw(2, total, 6, seed=8)
    encoder = draw(6, DIMENSIONS, seed=9).requires_grad_()
    z1, z2 = unit(views[:, start : start + sizes[rank]] @ encoder)
    x = torch.cat([z1, z2])
    own = torch.arange(2 * start, 2 * start + len(x))
    row = ring.log_sum_exp(x, temperature=0.2, without=Listed(own))
    loss = len(sizes) * (row - (z1 * z2).sum(1).repeat(2) / 0.2).sum() / (2 * total)
    (gradient,) = torch.autograd.grad(loss, encoder)
    for tensor in (gradient, loss := loss.detach()):
        distributed.all_reduce(tensor)
        tensor /= len(sizes)
    x = unit(views.flatten(0, 1) @ encoder)
    logits = (x @ x.T / 0.2).masked_fill(torch.eye(2 * total, dtype=torch.bool), -torch.inf)
    alone = torch.nn.functional.cross_entropy(logits, torch.arange(2 * total).roll(total))
    (exact,) = torch.autograd.grad(alone, encoder)
    return max(error(gradient, exact), error(loss, alone.detach()))


def nothing_counts(sizes: list[int], rank: int) -> bool:
    """A row and column without any pair: -inf, a zero gradient, and no trace elsewhere."""
    total, start = sum(sizes), sum(sizes[:rank])
    rows, lonely = slice(start, start + sizes[rank]), sum(sizes) - 1
    dropped = torch.eye(total, dtype=torch.bool)
    dropped[lonely], dropped[:, lonely] = True, True
    keep = torch.arange(total)[rows] != lonely
    fine = True
    for own_keys in (True, False):
        query = draw(total, 3, seed=1)[rows].requires_grad_()
        key = None if own_keys else draw(total, 3, seed=2)[rows].requires_grad_()
        row, column = ring.log_sum_exp(query, key, temperature=0.01, without=Mask(dropped[rows]), columns=True)
        (row + column).sum().backward()
        for values in (row, column):
            fine &= bool((values[~keep] == -torch.inf).all()) and bool(values[keep].isfinite().all())
        for x in (query,) if key is None else (query, key):
            assert x.grad is not None
            fine &= bool((x.grad[~keep] == 0).all()) and bool((x.grad[keep] != 0).any(1).all())
    return fine


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation, forward or backward, returned."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Entries of all similarity tiles computed, and bytes sent to other ranks."""
    counted = {"entries": 0, "sent": 0}
    logits, exchange, kept = blocked._Tiles.logits, distributed.batch_isend_irecv, blocked.KEPT

    def counted_logits(self, *arguments):
        tile = logits(self, *arguments)
        counted["entries"] += tile.numel()
        return tile

    def counted_exchange(operations):
        for operation in operations:
            if operation.op is distributed.isend:
                counted["sent"] += operation.tensor.numel() * operation.tensor.element_size()
        return exchange(operations)

    blocked._Tiles.logits, blocked.KEPT = counted_logits, 0
    distributed.batch_isend_irecv = counted_exchange
    try:
        yield counted
    finally:
        blocked._Tiles.logits, blocked.KEPT = logits, kept
        distributed.batch_isend_irecv = exchange


def cost(form: str, rank: int, ranks: int) -> dict[str, Any]:
    """What one forward and backward pass over 12 rows of 16 numbers per rank takes."""
    x = draw(12 * ranks, 16, seed=1)[12 * rank : 12 * (rank + 1)].requires_grad_()
    key = draw(12 * ranks, 16, seed=2)[12 * rank : 12 * (rank + 1)].requires_grad_(
        form != "rows, keys without gradient"
    )
    with Largest() as largest, counting() as counted:
        if form == "own keys":
            result = ring.log_sum_exp(x)
        elif form == "both":
            result = torch.cat(ring.log_sum_exp(x, key, columns=True))
        elif form == "gather":
            result = log_sum_exp(x, gather(key).rows)
        else:
            result = ring.log_sum_exp(x, key)
        forward = dict(counted)
        result.sum().backward()
    return {"largest": largest.entries, "forward": forward, "both passes": dict(counted)}


def refused(rank: int, ranks: int, wrong: str) -> str:
    """What a rank hears when the last one brings something else."""
    last = rank == ranks - 1
    x = draw(0 if last and wrong == "rows" else 3, 5 if last and wrong == "dimensions" else 4, seed=1)
    try:
        ring.log_sum_exp(x, x if last and wrong == "arguments" else None)
    except InputError as refusal:
        return str(refusal)
    return "nothing"


def autocast_changes_nothing(rank: int) -> bool:
    query, key = draw(9, 8, seed=rank).float().requires_grad_(), draw(7, 8, seed=10 + rank).float()

    def results() -> list[Tensor]:
        values = [ring.log_sum_exp(query, temperature=0.1), *ring.log_sum_exp(query, key, columns=True)]
        return values + [torch.autograd.grad(value.sum(), query, retain_graph=True)[0] for value in values[:2]]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results()
    with torch.no_grad():
        plain = ring.log_sum_exp(query, temperature=0.1)
    return torch.equal(plain, expected[0]) and all(torch.equal(a, b) for a, b in zip(cast, expected, strict=True))


def everywhere(value: Any, ranks: int) -> list[Any]:
    values = [None] * ranks
    distributed.all_gather_object(values, value)
    return values


def work(rank: int, folder: str) -> None:
    """One process: every plan in which it takes part."""
    torch.set_num_threads(1)
    blocked.TILE["cpu"] = (2, 3)
    record: dict[str, Any] = {}
    for ranks, sizes in PLAN.items():
        if rank >= ranks:
            continue
        distributed.init_process_group(
            "gloo", f"file://{folder}/meeting-{ranks}", timedelta(seconds=100), world_size=ranks, rank=rank
        )
        found: dict[str, Any] = {"cases": {name: compare(case, sizes, rank) for name, case in CASES.items()}}
        found["gather"] = max(everywhere(same_as_gather(sizes, rank), ranks))
        found["step"] = max(everywhere(averaged_step(sizes[0], rank), ranks))
        found["lonely"] = all(everywhere(nothing_counts(sizes[0], rank), ranks))
        found["autocast"] = all(everywhere(autocast_changes_nothing(rank), ranks))
        if ranks in (2, 3) and find_spec("triton"):  # its interpreter stands in for the GPU
            with executor("triton"):
                found["triton"] = {name: compare(CASES[name], sizes, rank) for name in ON_GPU}
        if ranks == 2:
            names = ("own keys", "own keys, columns", "both")
            found["uneven"] = [
                error for pair in UNEVEN_PAIRS for name in names for error in compare(CASES[name], pair, rank).values()
            ]
        if ranks > 1:
            found["refused"] = {
                wrong: everywhere(refused(rank, ranks, wrong), ranks) for wrong in ("rows", "dimensions", "arguments")
            }
            blocked.TILE["cpu"] = (4, 6)
            forms = ("rows", "rows, keys without gradient", "both", "own keys", "gather")
            found["cost"] = {form: everywhere(cost(form, rank, ranks), ranks) for form in forms}
            blocked.TILE["cpu"] = (2, 3)
        record[str(ranks)] = found
        distributed.barrier()
        distributed.destroy_process_group()
    if rank == 0:
        (Path(folder) / "record.json").write_text(json.dumps(record))


# ------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ring")
    environment = os.environ | {
        "PYTHONPATH": str(Path(counterpoint.__file__).parent.parent),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, str(Path(__file__)), str(folder)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads((folder / "record.json").read_text())


every_size = pytest.mark.parametrize("ranks", [str(ranks) for ranks in PLAN])
several = pytest.mark.parametrize("ranks", [str(ranks) for ranks in PLAN if ranks > 1])


@every_size
@pytest.mark.parametrize("name", CASES)
def test_the_ranks_together_equal_the_definition(name, ranks, record):
    """Float64 leaves only the order of summation; the bounds of the others are a few roundings of their precision."""
    case, errors = CASES[name], record[ranks]["cases"][name]
    wanted = {"value", "query", "key", "temperature"} | ({"log_weight"} if case.log_weight else set())
    assert set(errors) == wanted - {"key" if case.own_keys else None, case.frozen}
    for what, off in errors.items():
        rounded = case.dtype == torch.bfloat16 and what in ("query", "key")  # the gradient itself is rounded
        bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2 if rounded else 1e-5}[case.dtype]
        assert off < bound, f"{what} is off by {off:.1e}"


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("ranks", ["2", "3"])
@pytest.mark.parametrize("name", ON_GPU)
def test_visits_by_the_kernels_of_a_gpu(name, ranks, record):
    """Bfloat16 rounds weights and gradients (2^-8); the log-sum-exp and everything in float32 keep full precision."""
    for what, off in record[ranks]["triton"][name].items():
        assert off < (1e-2 if "bfloat16" in name and what != "value" else 1e-5), f"{what} is off by {off:.1e}"


@every_size
def test_every_rank_gets_what_the_gathered_form_gives_it(ranks, record):
    assert record[ranks]["gather"] < 1e-12


@every_size
def test_the_averaged_gradient_of_a_training_step_is_that_of_one_process(ranks, record):
    assert record[ranks]["step"] < 1e-12


@every_size
def test_a_row_or_column_in_which_nothing_counts(ranks, record):
    assert record[ranks]["lonely"]


@every_size
def test_autocast_and_no_grad_change_nothing(ranks, record):
    assert record[ranks]["autocast"]


def test_a_pair_of_shards_of_very_different_size(record):
    assert len(record["2"]["uneven"]) == 3 * (3 + 3 + 4)
    assert max(record["2"]["uneven"]) < 1e-12


@several
def test_nobody_holds_the_rows_of_all(ranks, record):
    """Not one tensor is larger than the own shard (12 x 16): neither gathered rows nor a row of similarities."""
    cost = record[ranks]["cost"]
    for form in ("rows", "both", "own keys"):
        assert [found["largest"] for found in cost[form]] == [12 * 16] * int(ranks)
    assert all(found["largest"] >= 12 * 16 * int(ranks) for found in cost["gather"])  # the measurement sees it


@several
def test_half_a_turn_visits_every_pair_once_and_burdens_all_alike(ranks, record):
    """Every rank computes its part of N (N + 4) / 2 similarities: tiles are 4 x 4 along the diagonal."""
    rows, count = 12 * int(ranks), int(ranks)
    for found in record[ranks]["cost"]["own keys"]:
        assert found["forward"]["entries"] == rows * (rows + 4) // 2 // count
        assert found["both passes"]["entries"] == 2 * found["forward"]["entries"]
    for form in ("rows", "both"):  # both directions cost one pass
        assert all(found["forward"]["entries"] == rows * 12 for found in record[ranks]["cost"][form])


@several
def test_what_is_sent(ranks, record):
    """Blocks travel P - 1 hops (own keys: P // 2), and what was found out about them as many; nothing else is sent."""
    hops, half, block, line = int(ranks) - 1, int(ranks) // 2, 12 * 16 * 8, 12 * 8
    expected = {
        "rows": (hops * block, hops * 2 * block),
        "rows, keys without gradient": (hops * block, hops * block),
        "both": (hops * (block + line), hops * (2 * block + 2 * line)),
        "own keys": (half * (block + line), half * (2 * block + 2 * line)),
    }
    for form, (forward, backward) in expected.items():
        for found in record[ranks]["cost"][form]:
            assert found["forward"]["sent"] == forward
            assert found["both passes"]["sent"] == forward + backward


@several
def test_every_rank_hears_that_one_brings_something_else(ranks, record):
    last = int(ranks) - 1
    assert all(f"rank {last} has no rows" in heard for heard in record[ranks]["refused"]["rows"])
    dimensions = [4] * last + [5]
    assert all(f"{dimensions}" in heard for heard in record[ranks]["refused"]["dimensions"])
    assert all("same arguments" in heard for heard in record[ranks]["refused"]["arguments"])


def test_without_a_process_group_it_is_the_blocked_executor():
    x, key = draw(9, 4, seed=1), draw(7, 4, seed=2)
    own = Listed(torch.arange(9))
    assert torch.equal(ring.log_sum_exp(x, without=own), log_sum_exp(x, without=own))
    forms: list[Callable[..., Any]] = [ring.log_sum_exp, log_sum_exp]
    for ours, theirs in zip(*(form(x, key, temperature=0.1, columns=True) for form in forms), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=1e-15)
    z1, z2 = unit(draw(5, 4, seed=3)), unit(draw(5, 4, seed=4))
    both = torch.cat([z1, z2])
    row = ring.log_sum_exp(both, temperature=0.1, without=Listed(torch.arange(10)))
    expected = nt_xent(z1, z2, normalize=False, reduction="none")
    torch.testing.assert_close(row - (z1 * z2).sum(1).repeat(2) / 0.1, expected)


class Odd(Relation):
    """A relation of a kind that the library does not know."""

    def holds(self, rows: slice, columns: slice) -> Tensor:
        place = torch.arange(rows.start, rows.stop)[:, None] + torch.arange(columns.start, columns.stop)
        return place % 2 == 1


def test_a_visit_sees_its_window_of_a_relation():
    n, m = 9, 11
    listed = Listed(torch.stack([torch.arange(n), torch.full((n,), -1), (torch.arange(n) + 4) % m], dim=1))
    labels = Same(torch.arange(n) % 3, torch.arange(m) % 4)
    turned = Transposed(Mask(draw(m, n, seed=7) > 0.5))
    for whole in (listed, labels, turned, Odd(), labels | listed, labels & ~turned, ~(listed | Odd())):
        everything = whole.holds(slice(0, n), slice(0, m))
        window = whole.window(slice(2, 8), slice(3, 10))
        assert torch.equal(window.holds(slice(0, 6), slice(0, 7)), everything[2:8, 3:10])
        assert torch.equal(window.holds(slice(1, 5), slice(2, 6)), everything[3:7, 5:9])
        assert torch.equal(window.fill_(torch.zeros(4, 4), slice(1, 5), slice(2, 6), 1.0).bool(), everything[3:7, 5:9])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"query": torch.zeros(3)}, "query"),
        ({"query": torch.zeros(3, 2), "key": torch.zeros(3, 4)}, "key"),
        ({"query": torch.zeros(3, 2), "log_weight": torch.zeros(1)}, "log_weight"),
        ({"query": torch.zeros(3, 2), "temperature": torch.ones(2)}, "temperature"),
        ({"query": torch.zeros(3, 2), "key": torch.zeros(0, 2)}, "no rows"),
    ],
)
def test_shapes_that_do_not_fit_are_named(arguments, named):
    with pytest.raises(InputError, match=named):
        ring.log_sum_exp(**arguments)


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=max(PLAN))
