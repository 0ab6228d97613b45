"""Whitening gives each group of channels unit covariance, moves nothing else, and knows its gradient."""

import pytest
import torch

from counterpoint.contrast.whitening import covariance, shuffled_group_whitening, whitening_matrix
from counterpoint.errors import InputError


def features(rows=40, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(rows, dim, generator=generator, dtype=torch.float64) @ mix + 3


def shuffles(views, dim, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(dim, generator=generator) for _ in range(views)])


def by_hand(x, permutations, groups, eps=0.0):
    """Chunk by chunk, group by group; the root by a singular value decomposition."""
    out = torch.zeros_like(x)
    n, width = len(x) // len(permutations), x.shape[1] // groups
    for v, permutation in enumerate(permutations):
        rows = slice(v * n, (v + 1) * n)
        for channels in permutation.split(width):
            part = x[rows][:, channels]
            part = part - part.mean(0)
            u, s, vh = torch.linalg.svd(part.T @ part / n + eps * torch.eye(width, dtype=x.dtype))
            out[rows, channels] = part @ (u @ torch.diag(s**-0.5) @ vh)
    return out


@pytest.mark.parametrize("groups, views, eps", [(1, 1, 0.0), (3, 2, 0.0), (4, 4, 0.1), (12, 2, 0.0)])
@pytest.mark.parametrize("solver", ["eigh", "newton"])
def test_it_is_what_loops_compute(groups, views, eps, solver):
    x, permutations = features(rows=20 * views), shuffles(views, 12)
    found = shuffled_group_whitening(x, permutations, groups=groups, eps=eps, solver=solver)
    torch.testing.assert_close(found, by_hand(x, permutations, groups, eps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["zca", "cholesky"])
def test_groups_have_mean_zero_and_unit_covariance_and_other_channels_stay_correlated(kind):
    x, permutations = features(), shuffles(1, 12)
    y = shuffled_group_whitening(x, permutations, groups=3, kind=kind)
    whole = covariance(y)
    torch.testing.assert_close(y.mean(0), torch.zeros(12, dtype=y.dtype), atol=1e-9, rtol=0)
    for channels in permutations[0].split(4):
        torch.testing.assert_close(whole[channels][:, channels], torch.eye(4, dtype=y.dtype), atol=1e-9, rtol=0)
    assert (whole - torch.eye(12, dtype=y.dtype)).abs().max() > 0.2


def test_white_features_stay_and_single_channels_are_standardised():
    x = features()
    white = shuffled_group_whitening(x, groups=1)
    torch.testing.assert_close(shuffled_group_whitening(white, groups=1), white)
    torch.testing.assert_close(shuffled_group_whitening(x, groups=12), (x - x.mean(0)) / x.std(0, correction=0))


def test_a_shuffle_changes_groups_but_not_places():
    x = features()
    one, other = (shuffled_group_whitening(x, shuffles(1, 12, seed), groups=3) for seed in (1, 2))
    assert (one - other).abs().max() > 0.1
    together = shuffled_group_whitening(
        torch.cat([x, x]), torch.cat([shuffles(1, 12, 1), shuffles(1, 12, 2)]), groups=3
    )
    torch.testing.assert_close(together, torch.cat([one, other]))  # each chunk under its own
    for y in (one, other):  # a whitened channel still goes with its own values
        cross = (x - x.mean(0)).T @ y
        assert (cross.diagonal() > 0).all()
    torch.testing.assert_close(  # one group: the symmetric root does not mind the order
        shuffled_group_whitening(x, shuffles(1, 12, 1), groups=1), shuffled_group_whitening(x, groups=1)
    )


def test_a_large_mean_costs_no_digits_and_half_precision_is_whitened_in_float32():
    x = features().float()
    expected = by_hand(x.double(), shuffles(1, 12), 3)
    for shift in (0.0, 100.0):
        found = shuffled_group_whitening(x + shift, shuffles(1, 12), groups=3)
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        found = shuffled_group_whitening(x, shuffles(1, 12), groups=3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_matrix_is_a_constant_unless_asked():
    x, w = features(), torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    permutation = shuffles(1, 12)
    x.requires_grad_()
    (constant,) = torch.autograd.grad((shuffled_group_whitening(x, permutation, groups=3) * w).sum(), x)
    expected = torch.zeros_like(x)
    for channels in permutation[0].split(4):
        part = x.detach()[:, channels]
        matrix = whitening_matrix(covariance(part - part.mean(0)))
        back = w[:, channels] @ matrix.T
        expected[:, channels] = back - back.mean(0)
    torch.testing.assert_close(constant, expected)
    for kind, solver in (("zca", "eigh"), ("zca", "newton"), ("cholesky", "auto")):
        options = {"groups": 3, "detach": False, "kind": kind, "solver": solver}
        few = features(9).requires_grad_()
        assert torch.autograd.gradcheck(lambda z, o=options: shuffled_group_whitening(z, permutation, **o), few)
        (other,) = torch.autograd.grad((shuffled_group_whitening(x, permutation, **options) * w).sum(), x)
        assert (other - constant).abs().max() > 1e-3


def test_newton_is_as_good_as_eigh_on_badly_conditioned_matrices():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(5, 6, 6, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.logspace(-4, 0, 6, dtype=torch.float64)) @ basis.mT
    exact = whitening_matrix(matrix)
    torch.testing.assert_close(whitening_matrix(matrix, solver="newton"), exact, rtol=1e-6, atol=1e-6)
    in_single = whitening_matrix(matrix.float(), solver="newton").double()
    assert (in_single - exact).norm() / exact.norm() < 5e-3


def test_a_dead_channel_is_left_at_zero_with_eps():
    x = features()
    x[:, 3] = 1.0
    assert not shuffled_group_whitening(x, groups=3).isfinite().all()
    for options in ({}, {"solver": "newton"}, {"kind": "cholesky"}):
        y = shuffled_group_whitening(x, groups=3, eps=1e-5, **options)
        assert y.isfinite().all() and y[:, 3].abs().max() < 1e-6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"groups": 5}, "12 channels cannot be put into 5 groups evenly"),
        ({"groups": 0}, "cannot be put into 0 groups"),
        ({"groups": 1, "x": features(12)}, "whitening 12 channels needs more than 12 rows, not 12"),
        ({"groups": 3, "permutations": shuffles(3, 12)}, "40 rows cannot be cut into 3 chunks"),
        ({"groups": 3, "permutations": shuffles(1, 11)}, "permutations must be int64"),
        ({"groups": 3, "eps": -1.0}, "eps must not be negative"),
        ({"groups": 3, "kind": "pca"}, 'not "pca"'),
    ],
)
def test_it_refuses(options, message):
    x = options.pop("x", features())
    with pytest.raises(InputError, match=message):
        shuffled_group_whitening(x, **options)
