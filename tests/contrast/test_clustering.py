"""Balanced codes and swapped prediction: against the plain iteration and plain sums, and at the limits."""

import pytest
import torch

from counterpoint import contrast
from counterpoint.contrast import assign, sinkhorn, swapped_prediction, unit
from counterpoint.contrast.distributed import log_sum
from counterpoint.errors import InputError


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(n: int = 256, k: int = 30, d: int = 16) -> torch.Tensor:
    """Scores of embeddings that crowd in one direction, so that plain codes use few prototypes."""
    z = unit(rows(n, d) + 2 * rows(1, d, seed=2))
    return z @ unit(rows(k, d, seed=1)).T


def plain_iteration(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """Step by step, with exponentials and sums, in double precision."""
    q = (scores.double() / epsilon).exp().T
    k, b = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("shape", [(16, 10), (7, 30), (1, 4), (5, 1)])
def test_it_is_the_plain_iteration(shape, iterations):
    scores = rows(*shape).tanh()
    expected = plain_iteration(scores, 0.05, iterations)
    found = sinkhorn(scores, 0.05, iterations)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sinkhorn(scores.double(), 0.05, iterations), expected)


def usage(codes: torch.Tensor) -> torch.Tensor:
    """Share of each prototype, 1 is an equal one."""
    return codes.sum(0) * codes.shape[1] / len(codes)


def test_samples_sum_to_one_and_prototypes_are_used_more_evenly_than_by_softmax():
    scores = clustered()
    codes, plain = sinkhorn(scores), (scores / 0.05).softmax(1)
    torch.testing.assert_close(codes.sum(1), torch.ones(256))
    assert usage(codes).std() < 0.5 * usage(plain).std()
    assert (usage(sinkhorn(scores, iterations=100)) - 1).abs().max() < 0.1


def test_at_convergence_it_is_the_transport_of_least_cost_with_entropy():
    """The optimum has the form diag(u) exp(S / epsilon) diag(v): double differences of log Q are those of S / epsilon."""
    scores = rows(12, 5).double().tanh()
    codes = sinkhorn(scores, 0.3, 2000)
    torch.testing.assert_close(usage(codes), torch.ones(5, dtype=torch.float64))

    def double_differences(x):
        return x[1:, 1:] - x[1:, :1] - x[:1, 1:] + x[:1, :1]

    torch.testing.assert_close(double_differences(codes.log()), double_differences(scores / 0.3))


def test_a_constant_of_a_prototype_changes_nothing_and_one_of_a_sample_nothing_at_convergence():
    """Which also tells the order of the scalings: prototypes first."""
    scores, of_sample, of_prototype = rows(20, 6).double(), rows(20, 1, seed=3), rows(1, 6, seed=4)
    torch.testing.assert_close(sinkhorn(scores, 0.5), sinkhorn(scores + of_prototype, 0.5))
    assert (sinkhorn(scores, 0.5) - sinkhorn(scores + of_sample, 0.5)).abs().max() > 0.01
    torch.testing.assert_close(sinkhorn(scores, 0.5, 500), sinkhorn(scores + of_sample, 0.5, 500))


@pytest.mark.parametrize("epsilon", [1e-2, 1e-4, 1e-8])
def test_a_tiny_epsilon_neither_overflows_nor_divides_by_zero(epsilon):
    codes = sinkhorn(clustered(), epsilon)
    assert bool(codes.isfinite().all())
    torch.testing.assert_close(codes.sum(1), torch.ones(256))


def test_a_large_epsilon_gives_uniform_codes():
    torch.testing.assert_close(sinkhorn(rows(9, 4), 1e6), torch.full((9, 4), 0.25), rtol=1e-4, atol=1e-6)


def test_half_precision_scores_are_computed_in_float32_and_have_no_gradient():
    scores = clustered().to(torch.bfloat16).requires_grad_()
    codes = sinkhorn(scores)
    assert codes.dtype == torch.float32 and not codes.requires_grad


def test_the_queue_takes_part_in_the_balance_and_gets_no_code():
    z, prototypes, queue = unit(rows(6, 8)), unit(rows(5, 8, seed=1)), unit(rows(40, 8, seed=2))
    found = assign(z, prototypes, queue=queue)
    expected = sinkhorn(torch.cat([queue, z]) @ prototypes.T)[-6:]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, assign(z, prototypes, queue=queue.flip(0)), rtol=1e-4, atol=1e-6)
    assert (found - assign(z, prototypes)).abs().max() > 0.01
    torch.testing.assert_close(assign(z, prototypes, balanced=False), (z @ prototypes.T / 0.05).softmax(1))


def test_swapped_prediction_is_its_double_sum():
    scores, codes = rows(4, 5, 7), rows(2, 5, 7, seed=1).softmax(2)
    for assigned in ([0, 1], [3, 1]):
        expected = 0.0
        for place, a in enumerate(assigned):
            for v in range(4):
                if v != a:
                    log_p = (scores[v] / 0.2).log_softmax(1)
                    expected = expected - (codes[place] * log_p).sum(1) / (2 * 3)
        found = swapped_prediction(scores, codes, assigned=assigned, temperature=0.2, reduction="none")
        torch.testing.assert_close(found, expected)
        mean = swapped_prediction(scores, codes, assigned=assigned, temperature=0.2)
        torch.testing.assert_close(mean, expected.mean())


def test_its_mean_does_not_depend_on_how_many_views_there_are():
    one, code = rows(1, 5, 7), rows(1, 5, 7, seed=1).softmax(2)
    losses = [swapped_prediction(one.repeat(v, 1, 1), code.repeat(2, 1, 1)) for v in (2, 3, 8)]
    torch.testing.assert_close(losses[1:], losses[:1] * 2)


def test_uniform_predictions_cost_the_log_of_the_number_of_prototypes():
    loss = swapped_prediction(torch.zeros(3, 4, 50), sinkhorn(rows(4, 50))[None])
    torch.testing.assert_close(loss, torch.tensor(50.0).log())


def test_gradient_goes_through_the_predicting_views_only():
    """Of codes of view 0 alone, view 0 learns nothing; nor do codes; prototypes learn through the others' scores."""
    z, prototypes = unit(rows(3, 6, 8)).requires_grad_(), unit(rows(5, 8, seed=1)).requires_grad_()
    codes = assign(z[0], prototypes)[None]
    assert not codes.requires_grad
    loss = swapped_prediction(z @ prototypes.T, codes, temperature=0.1)
    gradient, of_prototypes = torch.autograd.grad(loss, (z, prototypes))
    assert bool((gradient[0] == 0).all())
    assert bool((gradient[1:].abs().amax((1, 2)) > 0).all()) and bool((of_prototypes != 0).any())
    # the well-known one: (p - q) / tau, times the prototypes
    p = (z[1] @ prototypes.T / 0.1).softmax(1)
    expected = (p - codes[0]) @ prototypes / 0.1 / (6 * 2)
    torch.testing.assert_close(gradient[1], expected)


def test_without_a_process_group_the_log_of_the_sum_is_the_value():
    x = rows(4)
    assert torch.equal(log_sum(x), x)


def test_bad_input_says_what_is_wrong():
    with pytest.raises(InputError, match="epsilon must be positive, not 0"):
        sinkhorn(rows(4, 3), 0.0)
    with pytest.raises(InputError, match="at least 1 iteration, not 0"):
        sinkhorn(rows(4, 3), 0.05, 0)
    with pytest.raises(InputError, match="at least two views"):
        swapped_prediction(rows(1, 4, 3), rows(1, 4, 3))
    with pytest.raises(InputError, match="each code's own view among them, got 2 views and codes of \\[0, 2\\]"):
        swapped_prediction(rows(2, 4, 3), rows(2, 4, 3), assigned=[0, 2])
    with pytest.raises(InputError, match=r"not \[2, 4, 3\] and \[2, 4, 5\]"):
        swapped_prediction(rows(2, 4, 3), rows(2, 4, 5))
    assert contrast.sinkhorn is sinkhorn
