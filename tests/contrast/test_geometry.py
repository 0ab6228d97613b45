"""Alignment, uniformity and effective rank: against their definitions, and where the answer is known."""

import math

import pytest
import torch

from counterpoint import contrast
from counterpoint.contrast import Pairs, alignment, effective_rank, score_stats, uniformity, unit
from counterpoint.errors import InputError


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simplex(n: int) -> torch.Tensor:
    """n unit vectors, all equally far from each other: squared distance 2 n / (n - 1)."""
    return unit(torch.eye(n, dtype=torch.float64) - 1 / n)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("t", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("n", [2, 3, 8, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_uniformity_is_exact(n, t, normalize, dtype, tiles, compare, reference):
    def ours(x):
        return uniformity(x, t=t, normalize=normalize)

    def plain(x):
        return reference.uniformity(x, t=t, normalize=normalize)

    # Exponents of up to 4 t (here 2 t |x|^2 of up to 10 when not normalised) play the part of 1/T.
    result = compare(ours, plain, {"x": data(n, 8) / (1 if normalize else 3)}, dtype).close(dtype, 1 / (10 * t))
    assert abs(float(result.value.double() / result.expected) - 1) < 1e-5


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_alignment_is_exact(n, alpha, normalize, dtype, compare, reference):
    def ours(x, y):
        return alignment(x, y, alpha=alpha, normalize=normalize)

    def plain(x, y):
        return reference.alignment(x, y, alpha=alpha, normalize=normalize)

    arguments = {"x": data(n, 8), "y": data(n, 8, seed=1)}
    result = compare(ours, plain, arguments, dtype)
    torch.testing.assert_close(result.value.double(), result.expected, rtol=1e-6, atol=0)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 1e-6)
    for name, gradient in result.gradient.items():
        expected = result.expected_gradient[name]
        assert float((gradient.double() - expected).norm()) <= rounding * float(expected.norm())


def test_gradients_by_finite_differences(small_tiles):
    x, y = data(7, 3).requires_grad_(), data(7, 3, seed=1).requires_grad_()
    for normalize in (True, False):
        assert torch.autograd.gradcheck(lambda x, n=normalize: uniformity(x, normalize=n), (x,))
        assert torch.autograd.gradcheck(lambda x, y, n=normalize: alignment(x, y, normalize=n), (x, y))


@pytest.mark.parametrize("value", [1.0, 1e-3, 0.0])
def test_identical_rows_have_uniformity_zero(value, small_tiles):
    """Collapse must never look like an even spread, not even when the collapsed encoder sends nothing but zeros."""
    x = torch.full((9, 5), value)
    torch.testing.assert_close(uniformity(x), torch.tensor(0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(uniformity(x, normalize=False), torch.tensor(0.0), rtol=0, atol=1e-5)


def test_some_rows_of_zeros(reference):
    x = data(6, 4)
    x[1] = 0
    expected = reference.uniformity(torch.where(torch.arange(6)[:, None] == 1, x, unit(x)), normalize=False)
    torch.testing.assert_close(uniformity(x), expected)


@pytest.mark.parametrize("n", [2, 3, 6, 17])
def test_the_simplex_is_the_most_even_spread(n):
    t = 2.0
    best = uniformity(simplex(n), t=t)
    torch.testing.assert_close(best, torch.tensor(-t * 2 * n / (n - 1), dtype=torch.float64))
    for seed in range(20):
        assert uniformity(data(n, n, seed=seed), t=t) > best
        nearby = simplex(n) + 0.1 * data(n, n, seed=seed)
        assert uniformity(nearby, t=t) > best
    x = simplex(n).requires_grad_()
    uniformity(x, t=t).backward()
    torch.testing.assert_close(x.grad, torch.zeros(n, n, dtype=torch.float64), rtol=0, atol=1e-12)


def test_alignment_known_values():
    x = data(5, 4)
    assert float(alignment(x, 3 * x)) < 1e-30
    torch.testing.assert_close(alignment(x, -x), torch.tensor(4.0, dtype=torch.float64))
    torch.testing.assert_close(alignment(x, -2 * x, alpha=1), torch.tensor(2.0, dtype=torch.float64))
    axes = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(alignment(axes, axes.roll(1, 0)), torch.tensor(2.0, dtype=torch.float64))
    same = x.clone().requires_grad_()
    alignment(same, x).backward()
    assert same.grad is not None and bool((same.grad == 0).all()), "perfect alignment: no gradient, no NaN"


@pytest.mark.parametrize("d", [1, 2, 7, 32])
def test_effective_rank_of_the_identity_and_of_one_direction(d):
    torch.testing.assert_close(effective_rank(torch.eye(d)), torch.tensor(float(d)), rtol=1e-5, atol=0)
    torch.testing.assert_close(effective_rank(torch.eye(d).repeat(3, 1) * 7), torch.tensor(float(d)), rtol=1e-5, atol=0)
    one = data(20, 1).float() @ data(1, d, seed=1).float()
    torch.testing.assert_close(effective_rank(one), torch.tensor(1.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(effective_rank(torch.zeros(4, d)), torch.tensor(1.0))


def test_effective_rank_is_the_exponential_of_the_entropy(reference):
    for seed in range(5):
        x = data(30, 6, seed=seed) * torch.tensor([1, 0.5, 0.2, 0.1, 0.01, 0.001])
        torch.testing.assert_close(effective_rank(x).double(), reference.effective_rank(x), rtol=1e-5, atol=0)
        assert 1 < float(effective_rank(x)) < 6
    two = torch.diag(torch.tensor([0.75, 0.25]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(effective_rank(two), torch.tensor(math.exp(entropy)))
    assert not effective_rank(data(4, 3).requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: uniformity(x[:1]), "two rows"),
        (lambda x: uniformity(x[0]), "x must be"),
        (lambda x: uniformity(x.long()), "x must be"),
        (lambda x: uniformity(x, t=0.0), "t must"),
        (lambda x: uniformity(x, t=-1.0), "t must"),
        (lambda x: alignment(x, x[:2]), "one shape"),
        (lambda x: alignment(x, x[0]), "y must be"),
        (lambda x: effective_rank(x[0]), "x must be"),
        (lambda x: effective_rank(x[:0]), "empty"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(InputError, match=named):
        call(torch.randn(4, 3))


def plain_stats(query, key, rows, tau):
    """Query by query, of the rows that are its own."""
    found = []
    for q, k, own in zip(query, key, rows, strict=True):
        s = own @ q
        found.append(torch.stack([s.mean(), s.var(), q @ k, (s / tau).exp().mean(), (q @ k / tau).exp()]))
    return torch.stack(found).float()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_score_stats_are_those_of_the_scores(normalize, dtype, tiles):
    query, key, negatives = data(7, 6) / 2, data(7, 6, seed=1) / 2, data(40, 6, seed=2) / 2
    own, without = data(7, 3, 6, seed=3) / 2, torch.stack([torch.arange(7), torch.arange(20, 27)], dim=1)
    q, k, n, h = (unit(x) if normalize else x for x in (query, key, negatives, own))
    kept = [torch.cat([n[[j for j in range(40) if j not in out.tolist()]], h[i]]) for i, out in enumerate(without)]
    given = (x.to(dtype).requires_grad_() for x in (query, key, negatives))
    options = {"without": without, "hard_negatives": own.to(dtype), "normalize": normalize}
    found = score_stats(*given, 0.5, **options)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, plain_stats(q, k, kept, 0.5), rtol=1e-4, atol=1e-5)


def test_score_stats_keep_a_small_variance_beside_a_large_mean():
    """Scores within 0.001 of 0.9: squares of the scores themselves would lose it in float32."""
    query = torch.tensor([[1.0, 0.0]])
    score = 0.9 + 1e-3 * data(500).float()
    negatives = torch.stack([score, (1 - score.square()).sqrt()], dim=1)
    found = score_stats(query, query, negatives, 0.1)
    assert float(found[0, 1]) == pytest.approx(float(score.double().var()), rel=1e-3)


def test_score_stats_of_too_few_negatives_are_not_a_number():
    query = data(2, 4)
    one = score_stats(query, query, data(1, 4, seed=1))
    assert bool(one[:, 1].isnan().all()) and bool(one[:, [0, 2, 3]].isfinite().all())
    none = score_stats(query, query, data(0, 4))
    assert bool(none[:, [0, 1, 3]].isnan().all()) and bool(none[:, 2].isfinite().all())
    alone = Pairs(query[:1], query[:1]).scores()
    assert not bool(alone[:, [0, 1]].isfinite().any())
    with pytest.raises(InputError, match="one shape"):
        score_stats(query, query[:1], query)


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "info_nce", "clip_loss", "queue"])
def test_scores_of_pairs_are_those_that_the_objective_compares(name):
    """From the scores alone: -log p of the positive is the loss, for as many negatives as there are."""
    n, tau = 6, 0.3
    z1, z2, tensors = data(n, 5).float(), data(n, 5, seed=1).float(), {"temperature": tau, "reduction": "none"}
    own = data(2 * n, 2, 5, seed=2).float()
    if name == "queue":
        objective, count = contrast.info_nce, 9 + 2
        pairs = Pairs(z1, z2, negatives=data(9, 5, seed=3).float(), hard_negatives=own[:n], in_batch=False)
    else:
        objective = contrast.objective(name)
        count = {"nt_xent": 2 * n - 2, "dcl": 2 * n - 2, "info_nce": n - 1, "clip_loss": n - 1}[name] + 2
        pairs = Pairs.under(objective, z1, z2, hard_negatives=own if name != "info_nce" else own[:n])
    seen = pairs.scores(tau)
    repel, attract = count * seen[:, 3], 0 if name == "dcl" else seen[:, 4]
    expected = (repel + attract).log() - seen[:, 2] / tau
    if name == "clip_loss":
        expected = expected.view(2, n).mean(0)
    torch.testing.assert_close(pairs.loss(objective, **tensors), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pairs.scores(tau, most=4)[:4], seen[:4])
    assert len(pairs.scores(tau, most=4)) == 4 * len(seen) // n
