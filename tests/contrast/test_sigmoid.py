"""The pairwise sigmoid loss against its plain definition."""

import math

import pytest
import torch

from counterpoint.contrast import sigmoid_loss, unit
from counterpoint.errors import InputError


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int, temperature: float, bias: float) -> dict[str, torch.Tensor]:
    """Pairs that do not resemble their partners, so that the loss stays of the size of its terms."""
    x = data(n, 16)
    y = x.roll(1, 0) + data(n, 16, seed=1)
    return {"x": x, "y": y, "temperature": torch.tensor(temperature), "bias": torch.tensor(bias)}


def ours(x, y, temperature, bias):
    return sigmoid_loss(x, y, temperature=temperature, bias=bias, reduction="none")


@pytest.mark.parametrize(
    ("temperature", "bias"), [(0.005, -10.0), (0.05, -10.0), (0.1, -10.0), (1.0, 0.5), (10.0, 2.0)]
)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 19])
def test_values_and_gradients_are_exact(n, temperature, bias, tiles, compare, reference):
    """Also the gradient of the learned bias and of the learned temperature."""

    def plain(x, y, temperature, bias):
        return reference.sigmoid_loss(x, y, temperature=temperature, bias=bias)

    sharp = 1 / (1 / temperature + abs(bias))
    result = compare(ours, plain, inputs(n, temperature, bias)).close(torch.float32, sharp, terms=n)
    if n > 1:
        assert abs(float(result.value.double().mean() / result.expected.mean()) - 1) < 1e-5
    in_double = compare(ours, plain, inputs(n, temperature, bias), torch.float64)
    # torch's softplus is linear above 20: 2e-9 below the exact value at that point.
    torch.testing.assert_close(in_double.value, in_double.expected, rtol=1e-9, atol=n * 3e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
def test_half_precision_inputs(dtype, normalize, small_tiles, compare, reference):
    def call(x, y, temperature, bias):
        return sigmoid_loss(x, y, temperature=temperature, bias=bias, normalize=normalize, reduction="none")

    def plain(x, y, temperature, bias):
        return reference.sigmoid_loss(x, y, temperature=temperature, bias=bias, normalize=normalize)

    arguments = inputs(11, 0.1, -5.0)
    if not normalize:
        arguments |= {"x": unit(arguments["x"]), "y": unit(arguments["y"])}
    result = compare(call, plain, arguments, dtype).close(dtype, 1 / 15, terms=11)
    assert abs(float(result.value.double().mean() / result.expected.mean()) - 1) < 1e-5


def test_gradients_by_finite_differences(small_tiles):
    x, y = data(5, 3).requires_grad_(), data(5, 3, seed=1).requires_grad_()
    temperature = torch.tensor(0.4, dtype=torch.float64).requires_grad_()
    bias = torch.tensor(-1.0, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y, t, b: sigmoid_loss(x, y, temperature=t, bias=b), (x, y, temperature, bias)
    )


def test_a_float_or_a_tensor_of_any_shape_with_one_value():
    x, y = data(5, 3), data(5, 3, seed=1)
    expected = sigmoid_loss(x, y, temperature=0.2, bias=-1.0)
    for shape in ((), (1,), (1, 1)):
        given = {"temperature": torch.full(shape, 0.2, dtype=torch.float64), "bias": torch.full(shape, -1.0)}
        torch.testing.assert_close(sigmoid_loss(x, y, **given), expected)


def test_closed_form_and_symmetry():
    """n pairs on n axes: n positives at 1/T + b, n (n - 1) negatives at b."""
    n, temperature, bias = 6, 0.2, -3.0
    x = torch.eye(n, dtype=torch.float64)
    expected = math.log1p(math.exp(-(1 / temperature + bias))) + (n - 1) * math.log1p(math.exp(bias))
    value = sigmoid_loss(x, x, temperature=temperature, bias=bias)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64))
    a, b = data(7, 4), data(7, 4, seed=1)
    torch.testing.assert_close(sigmoid_loss(a, b), sigmoid_loss(b, a))
    rows = sigmoid_loss(a, b, reduction="none")
    torch.testing.assert_close(sigmoid_loss(a, b), rows.mean())
    torch.testing.assert_close(sigmoid_loss(a, b, reduction="sum"), rows.sum())
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(sigmoid_loss(5 * a[order], b[order], reduction="none"), rows[order])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: sigmoid_loss(x[0], x), "image"),
        (lambda x: sigmoid_loss(x, x.long()), "text"),
        (lambda x: sigmoid_loss(x, x[:3]), "row i"),
        (lambda x: sigmoid_loss(x, x[:, :2]), "row i"),
        (lambda x: sigmoid_loss(x, x, temperature=0.0), "temperature"),
        (lambda x: sigmoid_loss(x, x, temperature=torch.ones(4)), "temperature"),
        (lambda x: sigmoid_loss(x, x, bias=torch.ones(4)), "bias"),
        (lambda x: sigmoid_loss(x, x, reduction="avg"), "reduction"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(InputError, match=named):
        call(torch.randn(4, 3))
