"""The spectral loss is its formula, and in a linear net the layers share what it wants of each feature."""

import pytest
import torch

from counterpoint.contrast.spectral import linear_spectral_loss, linear_strengths, spectral_contrastive
from counterpoint.errors import InputError


def rows(n: int = 6, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def by_hand(z1, z2, mu):
    short = [z * torch.where(z.norm(dim=1) > mu**0.5, mu**0.5 / z.norm(dim=1), 1.0)[:, None] for z in (z1, z2)]
    s = short[0] @ short[1].T
    n = len(s)
    return (-2 * s.diagonal().mean() + s[~torch.eye(n, dtype=torch.bool)].square().sum() / (n * (n - 1))) / mu


@pytest.mark.parametrize("shape", [(6, 4), (4, 9), (2, 2)])
@pytest.mark.parametrize("mu", [0.5, 3.0, 100.0])
def test_it_is_the_formula_whatever_way_it_is_summed(shape, mu):
    z1, z2 = rows(*shape), rows(*shape, seed=1)
    found, expected = spectral_contrastive(z1, z2, mu=mu), by_hand(z1, z2, mu)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(spectral_contrastive(z1, z2, mu=mu, reduction="none").mean(), expected)


def test_only_what_lies_outside_the_ball_is_moved():
    z1, z2 = rows(), rows(seed=1)
    torch.testing.assert_close(spectral_contrastive(50 * z1, 50 * z2), spectral_contrastive(60 * z1, 60 * z2))
    inside = [0.01 * z for z in (z1, z2)]
    torch.testing.assert_close(spectral_contrastive(*inside, mu=1), 4 * spectral_contrastive(*inside, mu=4))
    zero = torch.zeros(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(spectral_contrastive(zero, zero.detach()), zero)
    assert bool(gradient.isfinite().all())


def test_bad_inputs_are_named():
    with pytest.raises(InputError, match="one shape"):
        spectral_contrastive(rows(), rows(5))
    with pytest.raises(InputError, match="batch of one"):
        spectral_contrastive(rows(1), rows(1))
    with pytest.raises(InputError, match="mu is a squared radius"):
        spectral_contrastive(rows(), rows(), mu=0)


def test_the_expected_loss_is_the_mean_of_the_sampled_one():
    deviation, correlation = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 0.9]).double()
    generator = torch.Generator().manual_seed(0)
    weights = [
        0.3 * torch.randn(3, 2, generator=generator).double(),
        0.3 * torch.randn(2, 3, generator=generator).double(),
    ]
    shared, one, other = (torch.randn(20000, 2, generator=generator).double() for _ in range(3))
    parts = correlation.sqrt() * shared, (1 - correlation).sqrt()
    z = [deviation * (parts[0] + parts[1] * own) @ (weights[1] @ weights[0]).T for own in (one, other)]
    sampled = spectral_contrastive(*z, mu=1e6) * 1e6  # no row is that long
    assert sampled.item() == pytest.approx(linear_spectral_loss(weights, deviation, correlation).item(), rel=0.05)


@pytest.mark.parametrize(("layers", "start"), [(2, "small"), (2, "balanced"), (3, "balanced")])
def test_before_the_head_a_feature_has_the_root_of_its_weight(layers, start):
    """The paper's theory, by gradient descent: procedure A of our card, from small weights or from equal singular values."""
    deviation, correlation = torch.tensor([1.0, 1.0, 2.0, 0.5]), torch.tensor([1.0, 0.5, 1.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 4, generator=generator) for _ in range(layers)]
    weights = [0.1 * weight if start == "small" else 0.6 * torch.linalg.qr(weight).Q for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    for _ in range(4000 if start == "small" else 2500):
        gradients = torch.autograd.grad(linear_spectral_loss(weights, deviation, correlation), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 0.02 * gradient
    # converged to the minimum, minus the sum of squared correlations
    assert linear_spectral_loss(weights, deviation, correlation).item() == pytest.approx(-3.25, abs=1e-3)
    product = torch.eye(4)
    for weight, expected in zip(weights, linear_strengths(deviation, correlation, layers), strict=True):
        product = weight.detach() @ product
        assert product.norm(dim=0) == pytest.approx(expected, rel=0.05)


def test_every_layer_is_more_even_than_the_next():
    strengths = linear_strengths(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 0.01, 1.0]), layers=4)
    spread = [float(w.max() / w.min()) for w in strengths]
    assert spread == sorted(spread) and spread[-1] == pytest.approx(10)
