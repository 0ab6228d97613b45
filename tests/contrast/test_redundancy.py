"""Barlow Twins: the formula, its zero, what it does not see, and the gradient."""

import pytest
import torch

from counterpoint import contrast
from counterpoint.contrast.redundancy import correlation, off_diagonal
from counterpoint.errors import InputError


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(z1: torch.Tensor, z2: torch.Tensor, weight: float) -> torch.Tensor:
    n, d = z1.shape
    z1, z2 = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z1, z2))
    total = z1.new_zeros(())
    for i in range(d):
        for j in range(d):
            c = (z1[:, i] * z2[:, j]).sum() / n
            total = total + ((1 - c) ** 2 if i == j else weight * c**2)
    return total


def test_the_loss_and_its_gradient_are_the_formula():
    z1, z2 = rows(7, 4).requires_grad_(), (3 * rows(7, 4, seed=1) + 2).requires_grad_()
    found, expected = contrast.barlow_twins(z1, z2, weight=0.3), by_hand(z1, z2, 0.3)
    torch.testing.assert_close(found, expected)
    for got, wanted in zip(torch.autograd.grad(found, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_correlation_is_numpys():
    import numpy as np

    z1, z2 = rows(50, 3), rows(50, 3, seed=1)
    expected = np.corrcoef(z1.T.numpy(), z2.T.numpy())[:3, 3:]
    np.testing.assert_allclose(correlation(z1, z2).numpy(), expected, atol=1e-4)


def test_decorrelated_twins_cost_nothing_and_repeated_dimensions_do():
    z = torch.linalg.qr(rows(64, 5) - rows(64, 5).mean(0)).Q * 8  # orthogonal columns of mean 0 and variance 1
    assert float(contrast.barlow_twins(z, z)) < 1e-8
    repeated = z[:, [0, 0, 1, 1, 2]]
    assert float(contrast.barlow_twins(repeated, repeated, weight=1.0)) == pytest.approx(4, rel=1e-3)
    # the worst agreement there is: every dimension turned round
    assert float(contrast.barlow_twins(z, -z, weight=0.0)) == pytest.approx(4 * 5, rel=1e-3)


def test_scale_and_shift_of_a_dimension_and_the_order_of_items_do_not_matter():
    z1, z2, order = rows(20, 4), rows(20, 4, seed=1), torch.randperm(20)
    scale = torch.tensor([2.0, 5, 100, 9], dtype=torch.float64)
    expected = contrast.barlow_twins(z1, z2)
    torch.testing.assert_close(contrast.barlow_twins(scale * z1 + 7, z2), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(contrast.barlow_twins(z1[order], z2[order]), expected)
    torch.testing.assert_close(contrast.barlow_twins(z2, z1), expected)
    assert abs(float(contrast.barlow_twins(z1[order], z2)) - float(expected)) > 0.1


def test_a_dead_dimension_costs_one_and_stays_finite():
    z1, z2 = rows(9, 3), rows(9, 3, seed=1)
    z1[:, 1] = 4
    z1.requires_grad_()
    loss = contrast.barlow_twins(z1, z2, weight=0.0)
    loss.backward()
    alive = contrast.barlow_twins(z1[:, [0, 2]].detach(), z2[:, [0, 2]], weight=0.0)
    torch.testing.assert_close(loss.detach(), alive + 1)
    assert bool(z1.grad.isfinite().all())


def test_half_precision_is_computed_in_float32():
    z1, z2 = rows(64, 8).float(), rows(64, 8, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrast.barlow_twins(z1, z2) == contrast.barlow_twins(z1, z2)
        found = contrast.barlow_twins(z1, z2)
    torch.testing.assert_close(found, contrast.barlow_twins(z1, z2), rtol=1e-5, atol=1e-5)


def test_off_diagonal_is_everything_else():
    matrix = torch.arange(18.0).reshape(2, 3, 3)
    assert off_diagonal(matrix).tolist() == [[1, 2, 3, 5, 6, 7], [10, 11, 12, 14, 15, 16]]
    assert off_diagonal(torch.ones(1, 1)).shape == (0,)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="must have one shape"):
        contrast.barlow_twins(rows(4, 3), rows(5, 3))
    with pytest.raises(InputError, match="batch of at least 2"):
        contrast.barlow_twins(rows(1, 3), rows(1, 3))
    with pytest.raises(InputError, match="weight must not be negative"):
        contrast.barlow_twins(rows(4, 3), rows(4, 3), weight=-1)
