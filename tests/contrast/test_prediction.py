"""Losses without negatives."""

import pytest
import torch

from counterpoint.contrast import alignment, negative_cosine
from counterpoint.errors import InputError


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_negative_cosine_is_the_mean_of_minus_the_cosines():
    p, z = data(7, 5).requires_grad_(), data(7, 5, seed=1).requires_grad_()
    expected = torch.stack([-(a @ b) / (a.norm() * b.norm()) for a, b in zip(p, z.detach(), strict=True)])
    rows = negative_cosine(p, z, reduction="none")
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(negative_cosine(p, z), expected.mean())
    gradient, none = torch.autograd.grad(rows.sum(), (p, z), allow_unused=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), p)[0])
    assert none is None, "the target is a constant"


def test_squared_distance_is_two_plus_twice_the_value():
    p, z = data(7, 5), data(7, 5, seed=1)
    torch.testing.assert_close(alignment(p, z), 2 + 2 * negative_cosine(p, z))
    torch.testing.assert_close(negative_cosine(3 * p, p), torch.tensor(-1.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    p, z = data(7, 64).to(dtype), data(7, 64, seed=1).to(dtype)
    value = negative_cosine(p, z, reduction="none")
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), negative_cosine(p.double(), z.double(), reduction="none"), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: negative_cosine(x[0], x), "prediction"),
        (lambda x: negative_cosine(x, x.long()), "target"),
        (lambda x: negative_cosine(x, x[:1]), "one shape"),
        (lambda x: negative_cosine(x, x, reduction="avg"), "reduction"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(InputError, match=named):
        call(torch.randn(4, 3))
