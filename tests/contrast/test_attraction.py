"""Attraction and repulsion: against the sums written out, their limits, and which way each gradient points."""

import pytest
import torch

from counterpoint.contrast import info_nce, unit
from counterpoint.contrast.attraction import (
    attraction,
    attraction_weights,
    momentum_euclidean,
    momentum_rbf,
    queue_repulsion,
    repulsion,
    repulsion_weights,
)
from counterpoint.errors import InputError


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(x, y):
    return (x - y).square().sum(-1)


def by_hand(views, tau_pos, tau_neg, stop=False):
    """Both terms, one query after the other."""
    count, n = views.shape[:2]
    pull, push, pairs = 0.0, 0.0, 0
    for v in range(count):
        for b in range(n):
            d = torch.stack([distance(views[v, b], views[u, b]) for u in range(count) if u != v])
            weight = (tau_pos * d).softmax(0)
            pull = pull + ((weight.detach() if stop else weight) * d).sum() / (count * n)
        for u in range(v + 1, count):
            pairs += 1
            for b in range(n):
                d = torch.stack([distance(views[v, b], views[u, j]) for j in range(n) if j != b])
                weight = (-tau_neg * d).softmax(0)
                push = push - ((weight.detach() if stop else weight) * d).sum() / n
    return pull, push / pairs


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 5), (4, 9, 6)])
def test_both_terms_are_their_sums_and_so_are_their_gradients(shape, normalize, stop, tiles):
    x = rows(*shape).requires_grad_()
    given = unit(x) if normalize else x
    pull, push = by_hand(given, 1.3, 0.7, stop)
    found = (
        attraction(x, tau=1.3, stop=stop, normalize=normalize),
        repulsion(x, tau=0.7, stop=stop, normalize=normalize),
    )
    for ours, expected in zip(found, (pull, push), strict=True):
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(gradient(ours, x), gradient(expected, x), rtol=1e-9, atol=1e-9)


def test_the_factors_scale_the_cost_and_not_the_weights():
    x = rows(3, 5, 4)
    torch.testing.assert_close(attraction(x, alpha=3.0), 3 * attraction(x))
    torch.testing.assert_close(repulsion(x, beta=3.0), 3 * repulsion(x))


def test_far_positives_and_near_negatives_weigh_most():
    x = unit(rows(5, 8, 4))
    other = [distance(x[-1], x[u]) for u in range(4)]
    weight = attraction_weights(x)[-1]
    assert torch.equal(weight.argsort(1), torch.stack(other, 1).argsort(1))
    negative = repulsion_weights(x[0], x[1], tau=0.9)
    off = ~torch.eye(8, dtype=torch.bool)
    similar = (x[0] @ x[1].T)[off].view(8, 7)
    assert torch.equal(negative.argsort(1), similar.argsort(1))
    for found in (weight, negative):
        torch.testing.assert_close(found.sum(1), torch.ones(8, dtype=torch.float64))


def test_limits_of_sharpness():
    """Without sharpness all weigh the same; with much of it the farthest positive and the nearest negative are all there is."""
    x = unit(rows(3, 6, 4))
    torch.testing.assert_close(attraction(x, tau=0.0), attraction(x, uniform=True))
    torch.testing.assert_close(repulsion(x, tau=1e-9), repulsion(x, uniform=True))
    torch.testing.assert_close(repulsion(x, tau=0.0), repulsion(x, uniform=True))
    assert attraction(x, tau=2.0) > attraction(x, uniform=True)
    assert repulsion(x, tau=2.0) > repulsion(x, uniform=True)
    own = torch.eye(6, dtype=torch.bool)
    nearest = [
        torch.cdist(x[a], x[b]).square().masked_fill(own, 9).min(1).values.mean() for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    torch.testing.assert_close(repulsion(x, tau=1e4), -torch.stack(nearest).mean())
    all_pairs = torch.stack([distance(x[v], x[u]) for v in range(3) for u in range(3) if v != u]).view(3, 2, 6)
    torch.testing.assert_close(attraction(x, tau=1e4), all_pairs.amax(1).mean())


def test_uniform_terms_are_plain_means():
    x = unit(rows(3, 6, 4))
    off = ~torch.eye(6, dtype=torch.bool)
    means = [torch.cdist(x[a], x[b]).square()[off].mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(repulsion(x, uniform=True), -torch.stack(means).mean())
    pairs = [distance(x[v], x[u]).mean() for v in range(3) for u in range(3) if v != u]
    torch.testing.assert_close(attraction(x, uniform=True), torch.stack(pairs).mean())


def test_two_views_have_a_single_positive_and_agreeing_views_no_cost():
    x = unit(rows(2, 6, 4)).requires_grad_()
    torch.testing.assert_close(attraction(x), distance(x[0], x[1]).mean())
    same = x[:1].detach().repeat(4, 1, 1).requires_grad_()
    loss = attraction(same)
    assert abs(float(loss.detach())) < 1e-12 and gradient(loss, same).abs().max() < 1e-12  # and no NaN


def test_a_step_brings_the_farthest_positive_nearer_and_the_nearest_negative_farther():
    x = rows(3, 8, 4).requires_grad_()
    near = unit(x)

    def worst(z):
        pulls = torch.stack([distance(z[0], z[u]) for u in (1, 2)]).amax(0).mean()
        own = torch.eye(8, dtype=torch.bool)
        return pulls, torch.cdist(z[0], z[1]).square().masked_fill(own, 9).min(1).values.mean()

    for loss, place, sign in ((attraction(x, tau=20.0), 0, -1), (repulsion(x, tau=20.0), 1, 1)):
        moved = unit(x.detach() - 0.05 * gradient(loss, x))
        assert sign * (worst(moved)[place] - worst(near)[place]) > 0


def test_momentum_keys_are_constants_and_leave_out_the_own_view():
    x, keys = rows(3, 5, 4).requires_grad_(), rows(3, 5, 4, seed=1).requires_grad_()
    loss = attraction(x, keys, tau=0.8, stop=True)
    q, k = unit(x), unit(keys)
    expected = 0.0
    for v in range(3):
        d = torch.stack([distance(q[v], k[u].detach()) for u in range(3) if u != v])
        expected = expected + ((0.8 * d).softmax(0).detach() * d).sum(0).mean() / 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, x), gradient(expected, x))
    assert torch.autograd.grad(attraction(x, keys), keys, allow_unused=True)[0] is None


@pytest.mark.parametrize("uniform", [False, True])
def test_the_queue_and_the_batch_share_one_distribution(uniform, tiles):
    x, queue = rows(3, 6, 4).requires_grad_(), unit(rows(11, 4, seed=1))
    loss = queue_repulsion(x, queue, tau=1.4, uniform=uniform)
    z, off = unit(x), ~torch.eye(6, dtype=torch.bool)
    expected = 0.0
    for v in range(3):
        d = torch.cat([2 - 2 * z[v] @ queue.T, torch.stack([distance(z[v], z[v][j]) for j in range(6)], 1)], dim=1)
        d = d[torch.cat([torch.ones(6, 11, dtype=torch.bool), off], dim=1)].view(6, 16)
        weight = torch.full_like(d, 1 / 16) if uniform else (-1.4 * d).softmax(1)
        # what the queue weighs is a constant
        weight = torch.cat([weight[:, :11].detach(), weight[:, 11:]], dim=1)
        expected = expected - (weight * d).sum(1).mean() / 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, x), gradient(expected, x), rtol=1e-9, atol=1e-9)


def momentum_by_hand(q, k, temperature, rbf):
    q, k = unit(q), unit(k).detach()
    weight = (torch.stack([distance(one, k) for one in q]) / temperature).softmax(0).detach()
    terms = []
    for one in q:
        s = one @ k.T
        if rbf:
            terms.append(2 * temperature * (s / temperature).log_softmax(1).diagonal().neg() / len(k))
        else:
            off = s.masked_fill(torch.eye(len(k), dtype=torch.bool), -torch.inf)
            terms.append(1 - s.diagonal() + ((off / temperature).softmax(1).detach() * (s - 1)).sum(1))
    return (weight * torch.stack(terms)).sum()


@pytest.mark.parametrize("rbf", [True, False])
@pytest.mark.parametrize("views", [1, 3])
def test_momentum_forms_are_their_sums(views, rbf, tiles):
    q, k = rows(views, 7, 5).requires_grad_(), rows(7, 5, seed=1).requires_grad_()
    loss = momentum_rbf(q, k, temperature=0.3) if rbf else momentum_euclidean(q, k, temperature=0.3, reduction="sum")
    expected = momentum_by_hand(q, k, 0.3, rbf)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, q), gradient(expected, q), rtol=1e-9, atol=1e-9)
    assert torch.autograd.grad(momentum_rbf(q, k), k, allow_unused=True)[0] is None


def test_one_query_view_is_moco_v3():
    q, k = rows(1, 6, 4), rows(6, 4, seed=1)
    torch.testing.assert_close(
        momentum_rbf(q, k, temperature=0.2), 0.4 * info_nce(q[0], k, temperature=0.2), rtol=1e-9, atol=1e-9
    )


def test_rows_of_a_loss_average_to_it():
    x, k, queue = rows(3, 5, 4), rows(5, 4, seed=1), rows(7, 4, seed=2)
    for loss, inputs in (
        (attraction, (x,)),
        (repulsion, (x,)),
        (queue_repulsion, (x, queue)),
        (momentum_rbf, (x, k)),
        (momentum_euclidean, (x, k)),
    ):
        torch.testing.assert_close(loss(*inputs, reduction="none").mean(), loss(*inputs))
        assert loss(*[part.half() for part in inputs]).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attraction(torch.randn(1, 4, 3)), "at least two views"),
        (lambda: attraction(torch.randn(2, 4, 3), torch.randn(2, 4, 2)), "one shape"),
        (lambda: repulsion(torch.randn(2, 1, 3)), "a batch of one item has nothing to repel"),
        (lambda: repulsion(torch.randn(2, 4, 3), tau=-1.0), "tau cannot be negative"),
        (lambda: repulsion(torch.randn(4, 3)), r"views must be floating point \[V, N, d\]"),
        (lambda: momentum_rbf(torch.randn(2, 4, 3), torch.randn(5, 3)), r"queries must be \[V, N, d\]"),
        (lambda: momentum_euclidean(torch.randn(2, 4, 3), torch.randn(4, 3), temperature=0.0), "must be positive"),
        (lambda: momentum_euclidean(torch.randn(2, 1, 3), torch.randn(1, 3)), "a batch of one item"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
