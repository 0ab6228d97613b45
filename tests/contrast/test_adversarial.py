"""The symmetric cross entropy and the ascent step are their formulas, whose gradients go where they should."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from counterpoint.contrast.adversarial import ascended, symmetric_cross_entropy
from counterpoint.errors import InputError


def logits(seed, rows=5, classes=4):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_against_sums_by_hand():
    a, b = logits(0), logits(1)
    expected = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (x, y))
        expected.append(-sum(u * math.log(v) + v * math.log(u) for u, v in zip(p, q, strict=True)))
    torch.testing.assert_close(
        symmetric_cross_entropy(a, b, reduction="none"), torch.tensor(expected, dtype=torch.float64)
    )
    torch.testing.assert_close(symmetric_cross_entropy(a, b).item(), sum(expected) / 5)
    torch.testing.assert_close(symmetric_cross_entropy(a, b), symmetric_cross_entropy(b, a))


def test_at_equality_it_is_twice_the_entropy_and_pulls_nowhere():
    a = logits(2).requires_grad_()
    b = a.detach().clone().requires_grad_()
    loss = symmetric_cross_entropy(a, b, reduction="sum")
    p = a.softmax(1)
    torch.testing.assert_close(loss, -2 * (p * p.log()).sum())
    for g in torch.autograd.grad(loss, (a, b)):
        torch.testing.assert_close(g, torch.zeros_like(g))


def test_the_gradient_is_that_of_two_divergences_with_constant_targets_and_not_of_the_symmetric_one():
    a, b = (logits(seed).requires_grad_() for seed in (3, 4))
    found = torch.autograd.grad(symmetric_cross_entropy(a, b, reduction="sum"), (a, b))
    p, q = (x.softmax(1) for x in (a, b))
    torch.testing.assert_close(found[0], (p - q).detach())  # of KL(q || p) by the logits of p, q a constant
    torch.testing.assert_close(found[1], (q - p).detach())
    both = kl_div(a.log_softmax(1), q, reduction="sum") + kl_div(b.log_softmax(1), p, reduction="sum")
    assert (torch.autograd.grad(both, a)[0] - found[0]).abs().max() > 0.05


def test_a_constant_target_leaves_the_first_term():
    a, b = logits(5).requires_grad_(), logits(6)
    found = torch.autograd.grad(symmetric_cross_entropy(a, b, reduction="sum"), a)[0]
    torch.testing.assert_close(found, (a.softmax(1) - b.softmax(1)).detach())


def test_half_precision_is_computed_in_full():
    a, b = logits(7).half(), logits(8).half()
    assert symmetric_cross_entropy(a, b).dtype == torch.float32
    torch.testing.assert_close(symmetric_cross_entropy(a, b), symmetric_cross_entropy(a.float(), b.float()))
    far = torch.tensor([[3e4, -3e4]])
    assert symmetric_cross_entropy(far, -far).isfinite()


@pytest.mark.parametrize("shape", [(5, 3), (4, 4), (5,), (5, 1)])
def test_answers_of_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match="two answers to compare must be of one shape"):
        symmetric_cross_entropy(torch.zeros(shape), logits(0) if shape != (5, 1) else torch.zeros(shape))


def test_the_step_is_as_long_in_each_position_and_points_along_the_gradient():
    delta, g = torch.zeros(2, 3, 4), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    g = g * torch.tensor([[1e-3], [1.0], [1e3]])
    step = ascended(delta, g, rate=0.25)
    torch.testing.assert_close(step.abs().amax(-1), torch.full((2, 3), 0.25), rtol=2e-3, atol=0)
    assert (step * g).ge(0).all()
    torch.testing.assert_close(ascended(delta + 1, g, rate=0.25), 1 + step)
    torch.testing.assert_close(
        ascended(delta, 1e-12 * g, rate=1.0).abs().max().item(), 0.0, atol=1e-2, rtol=0
    )  # the floor


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    delta, g = torch.full((2, 3), 0.5), torch.ones(2, 3)
    g[1, 2] = value
    assert torch.equal(ascended(delta, g, rate=1.0), delta)
