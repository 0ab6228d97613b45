"""The one quadratic reduction: exact at every tiling, with every argument, and never holding a matrix."""

import math

import pytest
import torch

from counterpoint.contrast import Listed, Mask, Same, log_sum_exp
from counterpoint.contrast.kernels import blocked, softplus_sum
from counterpoint.errors import InputError

SIZES = [(1, 1), (1, 9), (2, 2), (5, 1), (9, 13), (12, 12), (23, 8)]


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(query, key, temperature, dropped=None, log_weight=None):
    logits = query @ key.T / (temperature.reshape(-1, 1) if isinstance(temperature, torch.Tensor) else temperature)
    if log_weight is not None:
        logits = logits + log_weight
    return logits if dropped is None else logits.masked_fill(dropped, -torch.inf)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_rows_and_columns_equal_the_dense_ones(n, m, tiles, compare):
    def ours(query, key, temperature):
        return torch.cat(log_sum_exp(query, key, temperature=temperature, columns=True))

    def plain(query, key, temperature):
        logits = dense(query, key, temperature)
        return torch.cat([logits.logsumexp(1), logits.logsumexp(0)])

    inputs = {"query": data(n, 5) / 3, "key": data(m, 5, seed=1) / 3, "temperature": torch.tensor(0.7)}
    compare(ours, plain, inputs).close(torch.float32, 0.7)
    compare(ours, plain, inputs, torch.float64).close(torch.float64, 0.7)


@pytest.mark.parametrize("temperature", [0.7, 0.01], ids=["one-shift", "online"])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 21])
def test_the_queries_as_their_own_keys(n, temperature, tiles, compare):
    """The triangle visits each unordered pair of tiles once: also when tiles are not square or do not divide n."""
    own = Listed(torch.arange(n))

    def ours(query, temperature):
        return log_sum_exp(query, temperature=temperature, without=own)

    def plain(query, temperature):
        return dense(query, query, temperature, torch.eye(n, dtype=torch.bool)).logsumexp(1)

    inputs = {"query": data(n, 5) / 3, "temperature": torch.tensor(temperature)}
    compare(ours, plain, inputs).close(torch.float32, temperature)
    compare(ours, plain, inputs, torch.float64).close(torch.float64, temperature)


def test_the_triangle_does_half_of_the_work(monkeypatch):
    monkeypatch.setitem(blocked.TILE, "cpu", (4, 6))
    visited = [(r.start, c.start) for r, c in blocked._tiles(12, 12, torch.device("cpu"), triangle=True)]
    assert visited == [(0, 0), (0, 4), (0, 8), (4, 4), (4, 8), (8, 8)]
    covered = torch.zeros(11, 13)
    for rows, columns in blocked._tiles(11, 13, torch.device("cpu")):
        covered[rows, columns] += 1
    assert bool((covered == 1).all())


@pytest.mark.parametrize("temperature", [0.3, 0.01], ids=["one-shift", "online"])
def test_relations_decide_who_counts(temperature, tiles, compare):
    n, m = 11, 14
    rows, columns = torch.arange(n) % 3, torch.arange(m) % 4
    listed = torch.stack([torch.arange(n), torch.full((n,), -1), torch.arange(n) + 2], dim=1)
    relation = (Same(rows, columns) | Listed(listed)) & ~Mask(data(n, m, seed=2) > 0.5)
    dropped = relation.holds(slice(0, n), slice(0, m))

    def ours(query, key):
        return torch.cat(log_sum_exp(query, key, temperature=temperature, without=relation, columns=True))

    def plain(query, key):
        logits = dense(query, key, temperature, dropped)
        return torch.cat([logits.logsumexp(1), logits.logsumexp(0)])

    inputs = {"query": data(n, 5) / 3, "key": data(m, 5, seed=1) / 3}
    compare(ours, plain, inputs).close(torch.float32, temperature)


@pytest.mark.parametrize("own_keys", [False, True])
def test_column_weights_and_one_temperature_per_row(own_keys, tiles, compare):
    n, m = 10, 10 if own_keys else 13

    def ours(query, temperature, log_weight, key=None):
        return log_sum_exp(query, key, temperature=temperature, log_weight=log_weight)

    def plain(query, temperature, log_weight, key=None):
        return dense(query, query if key is None else key, temperature, log_weight=log_weight).logsumexp(1)

    inputs = {"query": data(n, 5) / 3, "temperature": data(n, seed=3).abs() + 0.2, "log_weight": data(m, seed=4)}
    if not own_keys:
        inputs["key"] = data(m, 5, seed=1) / 3
    compare(ours, plain, inputs).close(torch.float32, 0.2)
    compare(ours, plain, inputs, torch.float64).close(torch.float64, 0.2)


@pytest.mark.parametrize("temperature", [1.0, 1e-3], ids=["one-shift", "online"])
@pytest.mark.parametrize("own_keys", [False, True])
def test_a_row_or_column_in_which_nothing_counts(temperature, own_keys, small_tiles):
    """-inf with a zero gradient, and no trace in any other row."""
    n = 9
    dropped = torch.eye(n, dtype=torch.bool)
    dropped[4], dropped[:, 4] = True, True
    query = data(n, 5).float().requires_grad_()
    key = None if own_keys else data(n, 5, seed=1).float().requires_grad_()
    row, column = log_sum_exp(query, key, temperature=temperature, without=Mask(dropped), columns=True)
    keep = torch.arange(n) != 4
    for values in (row, column):
        assert values[4] == -torch.inf
        assert bool(values[keep].isfinite().all())
    (row + column).sum().backward()
    for x in (query,) if key is None else (query, key):
        assert x.grad is not None and bool(x.grad.isfinite().all())
        assert bool((x.grad[4] == 0).all())
        assert bool((x.grad[keep] != 0).any(1).all())


def test_nothing_counts_anywhere():
    query = data(3, 4).requires_grad_()
    value = log_sum_exp(query, without=Mask(torch.ones(3, 3)))
    assert bool((value == -torch.inf).all())
    value.sum().backward()
    assert query.grad is not None and bool((query.grad == 0).all())


@pytest.mark.parametrize("scale", [39.0, 41.0, 1e3])
def test_any_range_of_logits(scale):
    """Across the border between one common shift and the online reduction; sums of identical terms are known exactly."""
    query = torch.tensor([[1.0], [-1.0]]).requires_grad_()
    row, column = log_sum_exp(query, query.detach()[:1].repeat(8, 1), temperature=1 / scale, columns=True)
    expected = torch.tensor([scale + math.log(8), -scale + math.log(8)])
    torch.testing.assert_close(row, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(column, torch.full((8,), scale), rtol=1e-6, atol=1e-5)
    row.sum().backward()
    torch.testing.assert_close(query.grad, torch.full((2, 1), scale), rtol=1e-4, atol=0)


def test_gradients_by_finite_differences(small_tiles):
    query, key = data(7, 3).requires_grad_(), data(9, 3, seed=1).requires_grad_()
    temperature, weight = torch.tensor(0.6, dtype=torch.float64).requires_grad_(), data(9, seed=2).requires_grad_()
    per_row = (data(7, seed=5).abs() + 0.3).requires_grad_()
    without = Same(torch.arange(7) % 3, torch.arange(9) % 4)

    def both(q, k, t, w):
        return log_sum_exp(q, k, temperature=t, log_weight=w, without=without, columns=True)

    assert torch.autograd.gradcheck(both, (query, key, temperature, weight))
    assert torch.autograd.gradcheck(lambda q, k, t: log_sum_exp(q, k, temperature=t), (query, key, per_row))
    own = Listed(torch.arange(7))
    assert torch.autograd.gradcheck(lambda q, t: log_sum_exp(q, temperature=t, without=own), (query, temperature))
    bias = torch.tensor(-0.4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, s, b: softplus_sum(q, k, scale=s, bias=b), (query, key, temperature, bias)
    )


def test_only_what_needs_a_gradient_receives_one(small_tiles):
    key = data(9, 3, seed=1).requires_grad_()
    log_sum_exp(data(7, 3), key).sum().backward()
    expected = key.detach().clone().requires_grad_()
    dense(data(7, 3), expected, 1.0).logsumexp(1).sum().backward()
    torch.testing.assert_close(key.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_half_precision_inputs_accumulate_in_float32(dtype, temperature, small_tiles, compare):
    def ours(query, key):
        return torch.cat(log_sum_exp(query, key, temperature=temperature, columns=True))

    def plain(query, key):
        logits = dense(query, key, temperature)
        return torch.cat([logits.logsumexp(1), logits.logsumexp(0)])

    inputs = {"query": data(17, 8) / 3, "key": data(13, 8, seed=1) / 3}
    compare(ours, plain, inputs, dtype).close(dtype, temperature)


def test_autocast_changes_nothing():
    query, key = data(33, 16).float().requires_grad_(), data(21, 16, seed=1).float()
    bias, scale = torch.tensor(-1.0), torch.tensor(3.0)

    def results():
        outputs = [log_sum_exp(query, temperature=0.1), *log_sum_exp(query, key, temperature=0.1, columns=True)]
        outputs.append(softplus_sum(query, key, scale=scale, bias=bias))
        gradients = [torch.autograd.grad(output.sum(), query, retain_graph=True)[0] for output in outputs]
        return outputs + gradients

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results()
    for a, b in zip(cast, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_softplus_sum(n, m, tiles, compare):
    def ours(query, key, scale, bias):
        return softplus_sum(query, key, scale=scale, bias=bias)

    def plain(query, key, scale, bias):
        return torch.logaddexp(torch.zeros((), dtype=torch.float64), scale * (query @ key.T) + bias).sum(1)

    inputs = {"query": data(n, 5), "key": data(m, 5, seed=1), "scale": torch.tensor(2.0), "bias": torch.tensor(-3.0)}
    compare(ours, plain, inputs).close(torch.float32, 0.1)
    big = {**inputs, "scale": torch.tensor(500.0)}  # logits in the thousands: no overflow
    result = compare(ours, plain, big)
    torch.testing.assert_close(result.value.double(), result.expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"query": torch.zeros(3)}, "query"),
        ({"query": torch.zeros(3, 2), "key": torch.zeros(3, 4)}, "key"),
        ({"query": torch.zeros(3, 2), "log_weight": torch.zeros(1)}, "log_weight"),
        ({"query": torch.zeros(3, 2), "temperature": torch.ones(2)}, "temperature"),
    ],
)
def test_shapes_that_do_not_fit_are_named(arguments, named):
    with pytest.raises(InputError, match=named):
        log_sum_exp(**arguments)
