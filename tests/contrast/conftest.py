"""What the tests of the mathematics share: the plain definitions, small tiles, and one comparison of values and gradients."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from counterpoint.contrast import operands
from counterpoint.contrast.kernels import blocked

EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """`reference.py` beside this file, whatever pytest's import mode."""
    spec = importlib.util.spec_from_file_location("contrast_reference", Path(__file__).with_name("reference.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def tiled(monkeypatch):
    """No problem is too small for the tiles here; what small ones do instead has its own tests."""
    monkeypatch.setattr(operands, "SMALL", 0)


@pytest.fixture(params=[(4, 6), (7, 5), (512, 1024)], ids=["tiles-4x6", "tiles-7x5", "one-tile"])
def tiles(request, monkeypatch) -> tuple[int, int]:
    """Run at tiles so small that a few dozen rows need many of them, and at the real size."""
    monkeypatch.setitem(blocked.TILE, "cpu", request.param)
    return request.param


@pytest.fixture
def small_tiles(monkeypatch) -> tuple[int, int]:
    monkeypatch.setitem(blocked.TILE, "cpu", (4, 6))
    return 4, 6


class Compared(NamedTuple):
    """Ours and the definition: values, and gradients of a random weighting of the rows."""

    value: Tensor
    expected: Tensor
    gradient: dict[str, Tensor]
    expected_gradient: dict[str, Tensor]

    def close(self, dtype: torch.dtype, temperature: float, terms: int = 1) -> "Compared":
        """Check against the bounds that rounding allows.

        A logit of size 1/T carries rounding errors of a few units u/T (u = 2^-24 in float32: scale, dot product, shift),
        and a softmax term turns an absolute error of its logit into a relative one. Hence an absolute error of c u/T per
        row, and a gradient wrong by c u (1 + 1/T) of its own norm. c = 16 covers dot products of up to 16 dimensions in
        any order of summation; the largest error met is about a quarter of the bound. Inputs in half precision are exact
        in float32, so only the gradient is rounded once more, to its own precision. A loss that adds the `terms` of a row
        (instead of taking their log-sum-exp) adds their errors.
        """
        work = torch.promote_types(dtype, torch.float32)
        sharp = 16 * EPS[work] * (1 + 1 / temperature)
        assert self.value.dtype == work
        torch.testing.assert_close(self.value.double(), self.expected, rtol=16 * EPS[work], atol=sharp * terms)
        assert self.gradient.keys() == self.expected_gradient.keys()
        for name, expected in self.expected_gradient.items():
            error = float((self.gradient[name].double() - expected).norm())
            size = float(expected.norm())
            # Attraction and repulsion of size 1/T each may cancel to nothing; their rounding remains.
            size = (
                size + self.expected.numel() / temperature**2 if "temperature" in name else max(size, 1 / temperature)
            )
            allowed = sharp + (EPS[dtype] if dtype != work else 0)
            assert error <= allowed * size, f"gradient of {name}: off by {error / size:.2e}, allowed {allowed:.2e}"
        return self


@pytest.fixture(scope="session")
def compare() -> Callable[..., Compared]:
    """``compare(ours, plain, inputs, dtype)``: run both on the same numbers, ours in `dtype`, the definition in float64.

    Inputs that are not half precision in the wild (temperatures) stay in float32 or wider. Rows are weighted by random
    numbers before the backward pass, so that the gradient of every single row is tested, not of their mean alone.
    """

    def run(ours, plain, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32, **context: Any) -> Compared:
        def leaf(name: str, x: Tensor) -> Tensor:
            wide = torch.promote_types(dtype, torch.float32)
            return x.detach().to(wide if "temperature" in name or name in ("bias", "log_weight") else dtype)

        mine = {name: leaf(name, x).clone().requires_grad_() for name, x in inputs.items()}
        exact = {name: x.detach().double().clone().requires_grad_() for name, x in mine.items()}
        value, expected = ours(**mine), plain(**exact)
        assert value.shape == expected.shape
        generator = torch.Generator().manual_seed(11)
        weight = torch.rand(expected.shape, generator=generator, dtype=torch.float64) + 0.5
        gradient = torch.autograd.grad((value * weight.to(value.dtype)).sum(), list(mine.values()))
        expected_gradient = torch.autograd.grad((expected * weight).sum(), list(exact.values()))
        return Compared(
            value.detach(),
            expected.detach(),
            dict(zip(mine, gradient, strict=True)),
            dict(zip(exact, expected_gradient, strict=True)),
        )

    return run
