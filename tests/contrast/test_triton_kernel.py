"""The fused executor against the definition in float64, through Triton's interpreter and, where there is one, on a GPU.

Triton decides at import whether it compiles or interprets. So the whole file runs once more in a process of its own,
with TRITON_INTERPRET=1, and nothing of that reaches the other tests. A GPU runs the same tests, compiled, right here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from counterpoint.contrast import Listed, Mask, Same
from counterpoint.contrast.kernels import log_sum_exp
from counterpoint.contrast.relation import Transposed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
fused = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# Rows, columns and dimensions around and away from the interpreter's blocks of 32 (and the GPU's of 64 to 256).
SHAPES = [(1, 1, 1), (1, 40, 3), (70, 45, 65), (33, 130, 16), (129, 1, 8), (64, 64, 300)]


@pytest.fixture
def kernel():
    pytest.importorskip("triton")
    from counterpoint.contrast.kernels import triton

    return triton


def unit(*shape: int, seed: int = 0) -> Tensor:
    return functional.normalize(draw(*shape, seed=seed), dim=-1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def dropped(without, n: int, m: int) -> Tensor | None:
    return None if without is None else without.holds(slice(0, n), slice(0, m))


def log_sums(logits: Tensor, dim: int) -> Tensor:
    """Log-sum-exp whose gradient is zero, not NaN, where nothing counts."""
    none = (logits == -torch.inf).all(dim)
    return logits.masked_fill(none.unsqueeze(dim), 0).logsumexp(dim).masked_fill(none, -torch.inf)


def check(kernel, query, key, temperature=1.0, log_weight=None, without=None, columns=False, signs=False) -> None:
    """Values and all gradients against the definition, with random incoming gradients.

    Bounds as in conftest's `Compared`: a logit of size 1/T carries errors of a few units u/T, which a softmax turns into
    relative ones. Inputs in half precision are exact in float32, so values are as sharp as ever, but the weights are
    rounded to float16 and the gradients of query and key to the input's precision (by the interpreter: towards zero).
    """
    dtype, other = query.dtype, query if key is None else key
    scale = torch.tensor(1 / temperature, device=DEVICE)
    g, h = torch.rand(len(query), device=DEVICE) + 0.5, torch.rand(len(other), device=DEVICE) + 0.5
    if signs:
        g, h = g * draw(len(g), seed=8).sign(), h * draw(len(h), seed=9).sign()
    exact = {
        name: x.double().requires_grad_()
        for name, x in {"query": query, "key": key, "scale": scale, "log_weight": log_weight}.items()
        if x is not None
    }
    logits = exact["scale"] * (exact["query"] @ exact.get("key", exact["query"]).T)
    if log_weight is not None:
        logits = logits + exact["log_weight"]
    if without is not None:
        logits = logits.masked_fill(dropped(without, *logits.shape), -torch.inf)
    expected_row, expected_column = log_sums(logits, 1), log_sums(logits, 0)
    total = (expected_row.masked_fill(expected_row == -torch.inf, 0) * g).sum()
    if columns and key is not None:
        total = total + (expected_column.masked_fill(expected_column == -torch.inf, 0) * h).sum()
    expected = dict(zip(exact, torch.autograd.grad(total, list(exact.values())), strict=True))

    assert kernel.supports(query, key, without, columns)
    row, column = kernel.forward(query, key, scale, log_weight, without, columns)
    largest = float(logits.detach()[logits.isfinite()].abs().amax())
    sharp = 16 * UNIT[torch.float32] * (1 + largest)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.double(), expected_row.detach(), rtol=1e-5, atol=sharp)
    assert (column is None) != columns
    if column is not None:
        torch.testing.assert_close(column.double(), expected_column.detach(), rtol=1e-5, atol=sharp)
    down = h if columns and key is not None else None
    found = kernel.backward(query, key, scale, log_weight, without, row, column, g, down)
    for name, gradient in zip(("query", "key", "scale", "log_weight"), found, strict=True):
        if name not in expected:
            assert gradient is None
            continue
        assert gradient.dtype == (dtype if name in ("query", "key") else torch.float32)
        assert gradient.shape == expected[name].shape
        size = max(float(expected[name].norm()), float(largest > 0) * 1e-3)
        allowed = max(1e-5, sharp)
        if dtype != torch.float32:
            allowed += UNIT[torch.float16] + (2 * UNIT[dtype] if name in ("query", "key") else 0)
        error = float((gradient.double() - expected[name]).norm())
        assert error <= allowed * size, f"gradient of {name}: off by {error / size:.2e}, allowed {allowed:.2e}"


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_through_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and "passed" in run.stdout, run.stdout[-5000:] + run.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_the_kernels_compile_without_a_card(kernel, tmp_path, monkeypatch):
    """What the interpreter accepts, the compiler may not. The last candidate is the one that every card must take."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = kernel._candidates(100, 2)[-1]
    absent = {"log_weight": None, "row_ids": None, "column_ids": None}
    flags = {"LISTED": 1, "SAME": 0, "COLUMNS": True, "TRIANGLE": True}
    kinds = {"query": "*bf16", "key": "*bf16", "weights": "*fp16", "listed": "*i32"} | dict.fromkeys(
        (
            "scale",
            "bias",
            "row",
            "column",
            "row_gradient",
            "column_gradient",
            "gradient",
            "row_out",
            "column_out",
            "sums",
        ),
        "*fp32",
    )
    for tuned in (kernel._reduce_kernel, kernel._weights_kernel, kernel._softplus_kernel, kernel._sigmoid_kernel):
        names = tuned.fn.arg_names
        known = {"D": 112, "PRECISION": "tf32x3", **flags, **absent, **config.kwargs}
        constants = {name: known[name] for name in names if name in known}
        signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
        compiled = triton.compile(
            ASTSource(fn=tuned.fn, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
        )
        assert "wgmma" in compiled.asm["ptx"]  # on tensor cores
        assert compiled.metadata.shared <= 99 * 1024


@pytest.mark.skipif(INTERPRETED, reason="does not touch the kernels")
def test_nothing_needs_triton_before_the_kernels_are_asked_for():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from counterpoint import contrast; "
        "print(contrast.nt_xent(torch.eye(4), torch.eye(4)).item())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


@fused
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_rows_columns_and_gradients(kernel, n, m, d, columns):
    check(kernel, unit(n, d), unit(m, d, seed=1), 0.2, draw(m, seed=2), None, columns)


@fused
@pytest.mark.parametrize("temperature", [0.005, 10.0])
@pytest.mark.parametrize("own_keys", [False, True])
def test_any_temperature(kernel, temperature, own_keys):
    query = unit(40, 24)
    query[5] = query[17]  # duplicates
    own = Listed(torch.arange(40, device=DEVICE))
    check(kernel, query, None if own_keys else unit(37, 24, seed=1), temperature, None, own, True)


@fused
@pytest.mark.parametrize("n", [1, 2, 31, 33, 97])
def test_the_queries_as_their_own_keys(kernel, n, monkeypatch):
    monkeypatch.setattr(kernel, "FEWEST", 1)
    own = Listed(torch.arange(n, device=DEVICE)) if n > 1 else None
    check(kernel, unit(n, 20), None, 0.3, None, own)
    if n > 2:  # NT-Xent's cousin: without self and partner, both lists in one relation
        check(kernel, unit(n, 20), None, 0.3, None, own | Listed(n - 1 - torch.arange(n, device=DEVICE)[:, None]))


@fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_half_precision(kernel, dtype, temperature):
    query, key = unit(70, 65).to(dtype), unit(45, 65, seed=1).to(dtype)
    check(kernel, query, key, temperature, draw(45, seed=2), None, True)
    check(kernel, query, None, temperature, None, Listed(torch.arange(70, device=DEVICE)))


@fused
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("kind", ["same", "not same", "two columns", "four columns", "labels and columns", "sup_con"])
def test_relations(kernel, kind, columns):
    n, m = 50, 75
    labels = torch.arange(n, device=DEVICE) % 7 + 2**40, torch.arange(m, device=DEVICE) % 5 + 2**40
    here = torch.arange(n, device=DEVICE)
    lists = torch.stack([here, (here * 3 + 40) % m, torch.full_like(here, -1), m - 1 - here], dim=1)
    without = {
        "same": Same(*labels),
        "not same": ~Same(*labels),
        "two columns": Listed(lists[:, :2]),
        "four columns": Listed(lists[:, :1]) | Listed(lists[:, 1:]),
        "labels and columns": Listed(lists[:, 1:3]) | Same(*labels),
        "sup_con": ~Same(*labels) | Listed(here),
    }[kind]
    check(kernel, unit(n, 12), unit(m, 12, seed=1), 0.4, None, without, columns)


@fused
def test_a_listed_column_that_no_int32_holds_is_nowhere(kernel):
    far = torch.full((40, 1), 2**32, device=DEVICE)
    query, key = unit(40, 8), unit(50, 8, seed=1)
    scale = torch.ones((), device=DEVICE)
    row, _ = kernel.forward(query, key, scale, None, Listed(far), False)
    assert torch.equal(row, kernel.forward(query, key, scale, None, None, False)[0])


@fused
@pytest.mark.parametrize("own_keys", [False, True])
def test_a_row_or_column_in_which_nothing_counts(kernel, own_keys):
    n = 45
    labels = torch.zeros(n, dtype=torch.long, device=DEVICE)
    labels[[4, 40]] = torch.tensor([7, 8], device=DEVICE)
    without = ~Same(labels, labels) | Listed(torch.arange(n, device=DEVICE))
    query, key = unit(n, 6), None if own_keys else unit(n, 6, seed=1)
    check(kernel, query, key, 0.1, None, without, True)
    scale = torch.tensor(10.0, device=DEVICE)
    row, column = kernel.forward(query, key, scale, None, without, True)
    ones = torch.ones(n, device=DEVICE)
    for values in (row, column):
        assert bool((values == -torch.inf).nonzero().flatten().tolist() == [4, 40])
    gradients = kernel.backward(query, key, scale, None, without, row, column, ones, None if own_keys else ones)
    for gradient in gradients[: 1 if own_keys else 2]:
        assert bool((gradient[[4, 40]] == 0).all()) and bool(gradient.isfinite().all())
    everything = Same(torch.zeros_like(labels), torch.zeros_like(labels))
    assert bool((kernel.forward(query, key, scale, None, everything, False)[0] == -torch.inf).all())


@fused
@pytest.mark.parametrize("own_keys", [False, True])
def test_rows_and_columns_far_below_the_largest_of_their_tile(kernel, own_keys):
    """The common maximum of a tile would flush them to zero: results 600 apart, forward and backward."""
    query, key = unit(40, 4), unit(50, 4, seed=1)
    query[:, 0], key[:, 0] = torch.linspace(-1, 1, 40, device=DEVICE), 1.0
    key[::3, 0] = -1.0
    check(kernel, query * 30, None if own_keys else key * 10, 1.0, None, None, True)


@fused
@pytest.mark.parametrize("columns", [False, True])
def test_every_way_to_cut_the_matrix(kernel, columns, monkeypatch):
    query, key, weight = unit(110, 24), unit(100, 24, seed=1), draw(100, seed=2)
    scale, g, h = torch.tensor(3.0, device=DEVICE), draw(110, seed=3), draw(100, seed=4)
    arguments = (query, key, scale, weight, Listed(torch.arange(110, device=DEVICE)))

    def results():
        row, column = kernel.forward(*arguments, columns)
        own, _ = kernel.forward(query, None, scale, None, None, False)
        gradients = kernel.backward(*arguments, row, column, g, h if columns else None)
        owns = kernel.backward(query, None, scale, None, None, own, None, g, None)
        return [x for x in (row, column, own, *gradients, *owns) if x is not None]

    once, twice = results(), results()
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    monkeypatch.setattr(kernel, "ROWS", kernel.SPAN)
    monkeypatch.setattr(kernel, "FEWEST", kernel.SPAN)
    monkeypatch.setattr(kernel, "SCRATCH", 4 * kernel.SPAN**2)
    monkeypatch.setattr(kernel, "PARTIALS", 1)
    for a, b in zip(results(), once, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-5)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_incoming_gradients_of_any_sign_and_size(kernel, dtype):
    query, key = unit(50, 8).to(dtype), unit(40, 8, seed=1).to(dtype)
    check(kernel, query, key, 0.5, None, None, True, signs=True)
    scale = torch.tensor(2.0, device=DEVICE)
    row, column = kernel.forward(query, key, scale, None, None, True)
    g, h = draw(50, seed=2), draw(40, seed=3)
    plain = kernel.backward(query, key, scale, None, None, row, column, g, h, dtype=torch.float32)
    tiny = kernel.backward(query, key, scale, None, None, row, column, g * 2**-30, h * 2**-30, dtype=torch.float32)
    for a, b in zip(plain[:3], tiny[:3], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(b * 2**30, a, rtol=1e-3, atol=1e-4)
    zero = kernel.backward(query, key, scale, None, None, row, column, g * 0, h * 0)
    assert all(bool((x == 0).all()) for x in zero[:3])


@fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own_keys", [False, True])
def test_good_positives_leave_a_gradient_in_half_precision(kernel, dtype, own_keys):
    """The attraction takes most of the weight of a positive back: what is left must still be right to a percent."""
    x, noise = unit(64, 32), unit(64, 32, seed=1)
    query, key = x.to(dtype), unit(64, 32).add(0.9 * noise).div(1.35).to(dtype)
    scale, g = torch.tensor(15.0, device=DEVICE), torch.full((64,), 1 / 64, device=DEVICE)
    positive = torch.arange(64, device=DEVICE)
    if own_keys:
        query, key, g = torch.cat([query, key]), None, g.repeat(2) / 2
        positive = torch.arange(128, device=DEVICE).roll(64)
    without = Listed(torch.arange(128, device=DEVICE)) if own_keys else None
    wide = query.double().requires_grad_()
    keys = wide if key is None else key.double()
    logits = scale.double() * (wide @ keys.T)
    if without is not None:
        logits = logits.masked_fill(dropped(without, *logits.shape), -torch.inf)
    loss = functional.cross_entropy(logits, positive)
    assert 0.02 < float(loss) < 0.3
    (expected,) = torch.autograd.grad(loss, wide)
    row, _ = kernel.forward(query, key, scale, None, without, False)
    found, *_ = kernel.backward(query, key, scale, None, without, row, None, g, None, dtype=torch.float32)
    pull = scale * g[:, None] * keys.detach()[positive]
    error = (
        found - pull * (2 if own_keys else 1) - expected
    )  # with own keys every positive pair counts from either side
    assert float(error.norm()) < 0.01 * float(expected.norm())


@fused
def test_large_numbers_in_bfloat16(kernel):
    """Beyond the range of the float16 weights' products."""
    query, key = (unit(40, 8) * 2.0**40).bfloat16(), (unit(50, 8, seed=1) * 2.0**-30).bfloat16()
    scale = torch.tensor(2.0**-8, device=DEVICE)
    plain = query.float() * 2.0**-40, key.float() * 2.0**30
    row, column = kernel.forward(query, key, scale, None, None, True)
    g, h = draw(40, seed=2), draw(50, seed=3)
    found = kernel.backward(query, key, scale, None, None, row, column, g, h, dtype=torch.float32)
    expected = kernel.backward(*plain, scale * 2.0**10, None, None, row, column, g, h)
    for a, b, factor in zip(found, expected, (2.0**40, 2.0**-30, 2.0**-10), strict=False):
        assert float((a * factor - b).norm()) < 1e-3 * float(b.norm())
    of_keys = kernel.backward(query, key, scale, None, None, row, column, g, h, want_query=False)[2]
    torch.testing.assert_close(of_keys, found[2], rtol=1e-2, atol=0)


@fused
def test_only_what_is_wanted(kernel):
    query, key, scale = unit(40, 8), unit(50, 8, seed=1), torch.tensor(2.0, device=DEVICE)
    row, _ = kernel.forward(query, key, scale, None, None, False)
    arguments = (query, key, scale, None, None, row, None, draw(40, seed=2), None)
    both = kernel.backward(*arguments)
    no_key, no_query = kernel.backward(*arguments, want_key=False), kernel.backward(*arguments, want_query=False)
    assert no_key[1] is None and torch.equal(no_key[0], both[0]) and torch.equal(no_key[2], both[2])
    assert no_query[0] is None and torch.equal(no_query[1], both[1])
    torch.testing.assert_close(no_query[2], both[2], rtol=1e-5, atol=1e-6)


@fused
def test_strided_and_offset_inputs(kernel):
    query, key = unit(60, 33), unit(80, 33, seed=1)
    wide = torch.stack([query, query], dim=2)[:, :, 0]
    scale = torch.tensor(5.0, device=DEVICE)
    expected = kernel.forward(query, key[10:], scale, None, None, True)
    found = kernel.forward(wide, key.T.contiguous().T[10:], scale, None, None, True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@fused
@pytest.mark.parametrize("own_keys", [False, True])
def test_agrees_with_the_blocked_executor(kernel, own_keys):
    query, key = unit(70, 40), None if own_keys else unit(90, 40, seed=1)
    without = Listed(torch.arange(70, device=DEVICE))
    leaves = [x.clone().requires_grad_() for x in (query, key) if x is not None]
    scale = torch.tensor(8.0, device=DEVICE)
    values = log_sum_exp(*leaves, temperature=1 / scale, without=without, columns=not own_keys)
    parts = [values] if own_keys else list(values)
    weights = [draw(len(part), seed=5 + i) for i, part in enumerate(parts)]
    expected = torch.autograd.grad(sum((a * b).sum() for a, b in zip(parts, weights, strict=True)), leaves)
    row, column = kernel.forward(query, key, scale, None, without, not own_keys)
    torch.testing.assert_close(row, parts[0].detach(), rtol=1e-5, atol=1e-5)
    down = None if own_keys else weights[1]
    found = kernel.backward(query, key, scale, None, without, row, column, weights[0], down)
    for a, b in zip(found, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (2.0, 0.5), (300.0, -3.0)])
def test_softplus(kernel, scale, bias, dtype, monkeypatch):
    """A bias of -10 makes every term tiny (its relative precision must survive), a scale of 300 leaves exp behind."""
    monkeypatch.setattr(kernel, "ROWS", kernel.SPAN)
    query, key = unit(80, 20).to(dtype), unit(70, 20, seed=1).to(dtype)
    leaves = [x.double().requires_grad_() for x in (query, key, torch.tensor(scale), torch.tensor(bias))]
    q, k, s, b = leaves
    expected = functional.softplus(s * (q @ k.T) + b, threshold=1e9).sum(1)
    g = draw(80, seed=2)
    gradients = torch.autograd.grad((expected * g).sum(), leaves)
    pulls = (s * (q @ k.T) + b).detach().sigmoid().sum(1)  # the sums of both numbers' gradients may cancel
    numbers = [torch.tensor(value, device=DEVICE) for value in (scale, bias)]
    found = kernel.softplus_forward(query, key, *numbers)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=0)
    backward = kernel.softplus_backward(query, key, *numbers, g)
    for a, b in zip(backward, gradients, strict=True):
        allowed = 3e-5 if dtype == torch.float32 else UNIT[torch.float16] + (2 * UNIT[dtype] if a.ndim else 0)
        size = float(b.norm()) if a.ndim else float((g.abs() * pulls).sum())
        assert float((a.double() - b).norm()) <= allowed * size
    half = kernel.softplus_backward(query, key, *numbers, g, want_query=False)
    assert half[0] is None and torch.equal(half[1], backward[1])


@fused
def test_what_is_served(kernel):
    query, key = unit(4, 8), unit(6, 8, seed=1)
    here = torch.arange(4, device=DEVICE)
    same = Same(here, torch.arange(6, device=DEVICE))
    listed = Listed(here)
    for without in (None, listed, same, ~same, listed | ~same, listed | listed | (listed | listed)):
        assert kernel.supports(query, key, without, False) and kernel.supports(query, key, without, True)
    five = Listed(here[:, None].repeat(1, 5))
    matrix = Mask(torch.zeros(4, 6, device=DEVICE))
    for without in (matrix, listed & same, ~listed, same | same, five, listed | matrix, Transposed(same)):
        assert not kernel.supports(query, key, without, False)
    assert not kernel.supports(query, key, Listed(here[:3]), False)
    assert not kernel.supports(query, key, Same(here, here), False)
    assert not kernel.supports(query.double(), key.double(), None, False)
    assert not kernel.supports(query, key.bfloat16(), None, False)
    assert not kernel.supports(query, key[:, :7], None, False)
    assert not kernel.supports(query[:0], key, None, False) and not kernel.supports(query, key[:0], None, False)
    assert not kernel.supports(query[:, :0], key[:, :0], None, False)


@fused
@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="sizes for a real card")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "m", "d"), [(3000, 5000, 512), (9000, 9001, 768), (1000, 2000, 4096), (4097, 777, 100)])
def test_on_a_card(kernel, n, m, d, dtype, monkeypatch):
    query, key = unit(n, d).to(dtype), unit(m, d, seed=1).to(dtype)
    for threshold in (kernel.TUNE_FROM, 0):  # the first candidate, and the one that timing prefers
        monkeypatch.setattr(kernel, "TUNE_FROM", threshold)
        check(kernel, query, key, 0.05, None, None, True)
        check(kernel, query, key, 0.05, draw(m, seed=2), Listed(torch.arange(n, device=DEVICE)), False)
        check(kernel, query, None, 0.05, None, Listed(torch.arange(n, device=DEVICE)))
