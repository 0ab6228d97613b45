"""Adaptive temperatures: the written formula pair by pair, its limits, and the best temperature of a Gaussian."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from counterpoint import contrast
from counterpoint.contrast import Pairs, adaptive
from counterpoint.contrast.adaptive import (
    adaptive_barlow_twins,
    adaptive_contrast,
    adaptive_prediction,
    attraction,
    regulariser,
    repulsion,
)
from counterpoint.errors import InputError

C, D = 3, 4


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Constant:
    def __init__(self, tau: float):
        self.tau = tau

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.full_like(first[..., 0], self.tau)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        return first.new_full((first.shape[1], len(first), len(second)), self.tau)


class Ordered:
    """Differs for every pair, head and order of the pair."""

    def __init__(self) -> None:
        self.x, self.y = rows(C, D, seed=8), rows(C, D, seed=9)

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return 0.1 + torch.sigmoid((first * self.x).sum(-1) + 2 * (second * self.y).sum(-1))

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        return self(first[:, None], second[None]).permute(2, 0, 1)


def pairs_of(kind: str, z1: Tensor, z2: Tensor, queue: Tensor) -> Pairs:
    if kind == "moco":
        return Pairs(z1, z2, negatives=queue, in_batch=False)
    return Pairs.under(contrast.objective(kind), z1, z2)


def by_hand(kind, z1, z2, queue, temperature, beta, hardest, decoupled) -> Tensor:
    """Anchor by anchor, pair by pair."""
    heads = [z.unflatten(1, (C, D)) / z.unflatten(1, (C, D)).norm(dim=-1, keepdim=True) for z in (z1, z2, queue)]
    view1, view2, keys = heads
    n = len(z1)

    def anchors():
        for i in range(n):
            rest = [j for j in range(n) if j != i]
            if kind == "moco":
                yield view1[i], view2[i], list(keys)
            elif kind == "info_nce":
                yield view1[i], view2[i], [view2[j] for j in rest]
            elif kind == "clip_loss":
                yield view1[i], view2[i], [view2[j] for j in rest]
                yield view2[i], view1[i], [view1[j] for j in rest]
            else:
                yield view1[i], view2[i], [v[j] for v in (view1, view2) for j in rest]
                yield view2[i], view1[i], [v[j] for v in (view1, view2) for j in rest]

    def omega(tau):
        return D / 2 * math.log(tau) + 1 / tau if not isinstance(tau, Tensor) else D / 2 * tau.log() + 1 / tau

    losses = []
    for anchor, positive, negatives in anchors():
        total = z1.new_zeros(())
        for c in range(C):

            def pair(other, anchor=anchor, c=c):
                return anchor[c] @ other[c], temperature(anchor, other)[c]

            s, tau = pair(positive)
            total = total - s / tau + beta * omega(tau)
            candidates = [pair(other) for other in negatives] + ([] if decoupled else [(s, tau)])
            if hardest is None:
                logits = torch.stack([s / tau for s, tau in candidates])
                w = logits.detach().softmax(0)
                total = total + logits.logsumexp(0) - beta * sum(w[i] * omega(t) for i, (_, t) in enumerate(candidates))
            else:
                candidates = sorted(candidates, key=lambda pair: -float(pair[0].detach()))[:hardest]
                total = total + sum(s / tau - beta * omega(tau) for s, tau in candidates) / len(candidates)
        losses.append(total)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["nt_xent", "info_nce", "clip_loss", "moco"])
@pytest.mark.parametrize("hardest", [None, 1, 2])
@pytest.mark.parametrize("decoupled", [True, False])
def test_value_and_gradient_are_the_written_formula(kind, hardest, decoupled):
    z1, z2, queue = rows(5, C * D).requires_grad_(), rows(5, C * D, seed=1).requires_grad_(), rows(6, C * D, seed=2)
    temperature = Ordered()
    temperature.x.requires_grad_()
    given = (z1, z2, temperature.x)
    options = {"beta": 0.3, "hardest": hardest, "decoupled": decoupled}
    found = adaptive_contrast(pairs_of(kind, z1, z2, queue), temperature, count=C, **options)
    expected = by_hand(kind, z1, z2, queue, temperature, **options)
    torch.testing.assert_close(found, expected)
    pairs = zip(torch.autograd.grad(found, given), torch.autograd.grad(expected, given), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("kind", "decoupled", "objective"),
    [("nt_xent", True, "dcl"), ("nt_xent", False, "nt_xent"), ("info_nce", False, "info_nce"), ("clip_loss", False, "clip_loss")],
)  # fmt: skip
def test_a_constant_temperature_without_price_is_the_plain_loss_of_each_head(kind, decoupled, objective):
    z1, z2 = rows(6, C * D), rows(6, C * D, seed=1)
    found = adaptive_contrast(
        Pairs.under(contrast.objective(kind), z1, z2), Constant(0.3), count=C, beta=0.0, decoupled=decoupled
    )
    plain = contrast.objective(objective)
    heads = zip(z1.chunk(C, 1), z2.chunk(C, 1), strict=True)
    torch.testing.assert_close(found, sum(plain(one, two, temperature=0.3) for one, two in heads))


def test_moco_with_one_head_and_a_constant_temperature_is_moco():
    query, key, queue = rows(5, D), rows(5, D, seed=1), rows(9, D, seed=2)
    pairs = Pairs(query, key, negatives=queue, in_batch=False)
    found = adaptive_contrast(pairs, Constant(0.2), count=1, beta=0.0, decoupled=False)
    torch.testing.assert_close(found, pairs.loss(contrast.info_nce, temperature=0.2))


def test_the_regularisers_of_positive_and_negative_cancel_for_a_constant_temperature():
    """Theirs have opposite signs: added instead, the loss would move with beta."""
    pairs = Pairs.under(contrast.nt_xent, rows(6, C * D), rows(6, C * D, seed=1))
    for hardest in (None, 1, 3):
        losses = [
            adaptive_contrast(pairs, Constant(0.7), count=C, beta=beta, hardest=hardest) for beta in (0.0, 0.1, 5.0)
        ]
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(losses[2], losses[0])


@pytest.mark.parametrize(("s", "dim"), [(0.9, 8), (0.2, 128), (-0.5, 16)])
def test_the_best_temperature_of_a_positive_is_the_variance_of_the_gaussian(s, dim):
    """beta = 1 is maximum likelihood: 2 (1 - s) / d, found here by Newton steps on log tau."""
    log_tau = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(60):
        loss = attraction(torch.tensor(s, dtype=torch.float64), log_tau.exp(), beta=1.0, dim=dim)
        (gradient,) = torch.autograd.grad(loss, log_tau, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient, log_tau)
        step = (gradient / curvature.abs().clamp(min=1e-9)).detach().clamp(-0.5, 0.5)
        log_tau = (log_tau.detach() - step).requires_grad_()
    assert float(log_tau.detach().exp()) == pytest.approx(2 * (1 - s) / dim, rel=1e-6)


def test_it_is_the_likelihood_of_a_gaussian_up_to_a_constant():
    x, y, dim = F.normalize(rows(5, 6), dim=1), F.normalize(rows(5, 6, seed=1), dim=1), 6
    tau = rows(5, seed=2).exp()
    likelihood = torch.distributions.MultivariateNormal(y, tau[:, None, None] * torch.eye(6, dtype=torch.float64))
    found = attraction((x * y).sum(1), tau, beta=1.0, dim=dim)
    rest = -likelihood.log_prob(x) - found
    torch.testing.assert_close(rest, torch.full_like(rest, dim / 2 * math.log(2 * math.pi)))


def test_temperatures_run_to_their_bounds_as_the_analysis_says():
    """s > beta: a positive wants a smaller temperature, a hard negative a larger one."""
    tau = torch.full((1,), 0.3, dtype=torch.float64, requires_grad=True)
    s, price = torch.tensor([0.8], dtype=torch.float64), {"beta": 0.1, "dim": 128}
    assert torch.autograd.grad(attraction(s, tau, **price).sum(), tau)[0] > 0
    assert torch.autograd.grad(repulsion(s, tau, **price, soft=False).sum(), tau)[0] < 0


def test_the_soft_form_tends_to_the_hardest():
    """Small temperatures leave one candidate in the log-sum-exp, and its price."""
    s, tau = rows(4, 7).tanh(), torch.full((4, 7), 1e-3, dtype=torch.float64)
    soft = repulsion(s, tau, beta=0.2, dim=16)
    top = s.max(1).values
    hard = repulsion(top[:, None], tau[:, :1], beta=0.2, dim=16, soft=False)
    torch.testing.assert_close(soft, hard)


def test_what_is_left_out_does_not_count_and_gives_no_gradient():
    s, tau = rows(3, 5).requires_grad_(), (rows(3, 5, seed=1).exp()).requires_grad_()
    without = torch.tensor([False, True, False, True, False])
    for soft in (True, False):
        found = repulsion(s, tau, beta=0.2, dim=8, soft=soft, without=without)
        torch.testing.assert_close(found, repulsion(s[:, ~without], tau[:, ~without], beta=0.2, dim=8, soft=soft))
        for gradient in torch.autograd.grad(found.sum(), (s, tau)):
            assert bool(gradient.isfinite().all()) and not bool(gradient[:, without].any())


def test_temperatures_are_never_broadcast():
    s = rows(6)
    for shape in ((6, 1), (1,), (6, 6)):
        with pytest.raises(InputError, match="one temperature belongs to each pair"):
            attraction(s, rows(*shape).exp(), beta=0.1, dim=4)
        with pytest.raises(InputError, match="one temperature belongs to each pair"):
            repulsion(s, rows(*shape).exp(), beta=0.1, dim=4)


def test_the_length_of_the_vectors_stands_before_the_logarithm():
    tau = torch.tensor([0.5], dtype=torch.float64)
    assert float(regulariser(tau, 128)) == pytest.approx(64 * math.log(0.5) + 2)


def test_pairs_of_one_item_do_not_repel_each_other():
    z1, z2, items = rows(5, C * D), rows(5, C * D, seed=1), torch.tensor([0, 1, 0, 2, 3])
    found = adaptive_contrast(
        Pairs.under(contrast.clip_loss, z1, z2, items=items), Constant(0.4), count=C, beta=0.0, decoupled=False
    )
    plain = [Pairs.under(contrast.clip_loss, one, two, items=items).loss(contrast.clip_loss, temperature=0.4)
             for one, two in zip(z1.chunk(C, 1), z2.chunk(C, 1), strict=True)]  # fmt: skip
    torch.testing.assert_close(found, sum(plain))
    assert bool(adaptive_contrast(Pairs(z1, z2, items=items), Ordered(), count=C, hardest=4).isfinite())


def test_groups_are_contrasted_apart_and_given_negatives_repel():
    z1, z2 = rows(8, C * D), rows(8, C * D, seed=1)
    whole = adaptive_contrast(Pairs(z1, z2, groups=2), Ordered(), count=C)
    halves = [adaptive_contrast(Pairs(z1[at], z2[at]), Ordered(), count=C) for at in (slice(4), slice(4, 8))]
    torch.testing.assert_close(whole, sum(halves) / 2)
    further = adaptive_contrast(Pairs(z1[:4], z2), Constant(0.3), count=1, beta=0.0, decoupled=False)
    torch.testing.assert_close(further, Pairs(z1[:4], z2).loss(contrast.info_nce, temperature=0.3))


def test_simsiam_is_its_row_of_the_table_and_stops_the_gradient():
    p1, p2, z1, z2 = (rows(6, C * D, seed=seed).requires_grad_() for seed in range(4))
    tau, beta = Ordered(), 0.3
    found = sum(adaptive_prediction(p, z, tau, count=C, beta=beta) for p, z in ((p1, z2), (p2, z1))) / 2
    expected = 0
    for p, z in ((p1, z2), (p2, z1)):
        x, y = (F.normalize(v.unflatten(1, (C, D)), dim=-1) for v in (p, z.detach()))
        t = tau(x, y)
        expected = expected + (-(x * y).sum(-1) / (2 * t) + beta * (D / 2 * t.log() + 1 / t)).sum(1).mean()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert z1.grad is None and z2.grad is None and p1.grad is not None
    plain = adaptive_prediction(p1, z2, Constant(1.0), count=C, beta=0.0)
    heads = zip(p1.chunk(C, 1), z2.chunk(C, 1), strict=True)
    torch.testing.assert_close(plain, sum(contrast.negative_cosine(p, z) for p, z in heads))


def test_barlow_twins_is_its_row_of_the_table():
    matrices, weight, beta = rows(C, D, D).tanh(), 0.2, 0.05
    tau = Ordered()
    found = adaptive_barlow_twins(matrices, tau, weight=weight, beta=beta)
    expected = 0.0
    for c in range(C):
        for i in range(D):
            for j in range(D):
                one, two = F.normalize(matrices[c, i], dim=0), F.normalize(matrices[c, :, j], dim=0)
                t = tau(one.expand(C, D), two.expand(C, D))[c]
                price = beta * (D / 2 * t.log() + 1 / t)
                own = (1 - matrices[c, i, j] / t) ** 2 + price
                expected = expected + (own if i == j else weight * matrices[c, i, j] ** 2 / t - price)
    torch.testing.assert_close(found, expected)
    plain = adaptive_barlow_twins(matrices, Constant(1.0), weight=weight, beta=0.0)
    own = matrices.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(
        plain, (1 - own).square().sum() + weight * (matrices.square().sum() - own.square().sum())
    )


def test_bad_input_is_named():
    z = rows(4, C * D)
    with pytest.raises(InputError, match="cannot be shared evenly by 5 heads"):
        adaptive_contrast(Pairs(z, z), Constant(0.3), count=5)
    with pytest.raises(InputError, match="not negatives of a single anchor"):
        adaptive_contrast(Pairs(z, z, hard_negatives=rows(4, 2, C * D)), Constant(0.3), count=C)
    with pytest.raises(InputError, match="nothing repels"):
        adaptive_contrast(Pairs.under(contrast.nt_xent, z[:1], z[:1]), Constant(0.3), count=C)
    with pytest.raises(InputError, match="must have one shape"):
        adaptive_prediction(z, z[:2], Constant(0.3), count=C)
    assert adaptive.apart(z, C).shape == (4, C, D)
