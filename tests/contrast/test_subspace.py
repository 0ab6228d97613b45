"""Arbitrary pairs in gated subspaces: the formula row by row, who attracts whom, and what a gate is good for."""

import pytest
import torch
from torch.nn import functional as F

from counterpoint.contrast.subspace import gated_similarity, partner_labels, partner_loss
from counterpoint.errors import InputError

VARIANTS = ("gate_squared", "subspace")


def problem(b: int = 12, d: int = 6, classes: int = 4, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(b, d, generator=random, dtype=torch.float64).requires_grad_() for _ in range(2))
    gate = torch.rand(b, d, generator=random, dtype=torch.float64).requires_grad_()
    labels = torch.randint(classes, (b,), generator=random)
    partners = labels[torch.randperm(b, generator=random)]
    return query, key, gate, labels, partners


def by_hand(query, key, gate, labels, partners, temperature, variant, reduction):
    """With the tensor [B, B, D], item by item."""
    total, rows, count = 0.0, [], 0
    for i in range(len(query)):
        if variant == "subspace":
            s = F.cosine_similarity(query[i] * gate[i], key * gate[i], dim=1) / temperature
        else:
            s = (F.normalize(query[i], dim=0) * gate[i] ** 2 * F.normalize(key, dim=1)).sum(1) / temperature
        positive = [j for j in range(len(key)) if labels[j] == partners[i]]
        negative = [j for j in range(len(key)) if labels[j] not in (partners[i], labels[i])]
        terms = [(torch.stack([s[j], *s[negative]]).logsumexp(0) - s[j]) for j in positive]
        total, count = total + sum(terms), count + len(terms)
        rows.append(sum(terms) / max(1, len(terms)))
    return sum(rows) / len(rows) if reduction == "row" else total / count


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", ["pair", "row"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_its_formula_with_its_gradients(variant, reduction, seed):
    query, key, gate, labels, partners = problem(seed=seed)
    options = {"temperature": 0.3, "variant": variant, "reduction": reduction}
    found = partner_loss(query, key, gate, labels, partners, **options)
    expected = by_hand(query, key, gate, labels, partners, *options.values())
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, (query, key, gate)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_open_gate_is_the_cosine_in_both_variants():
    query, key, _, labels, partners = problem()
    cosine = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
    for variant in VARIANTS:
        torch.testing.assert_close(gated_similarity(query, key, torch.ones_like(query), variant=variant), cosine)
        one = partner_loss(query, key, None, labels, partners, variant=variant)
        assert one == partner_loss(query, key, torch.ones_like(query), labels, partners, variant=variant)


def test_the_gate_is_the_anchors():
    """A dimension that only the key's own gate would open must not count."""
    query, key = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = gated_similarity(query, key, gate, variant="subspace")
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))


def test_a_cosine_does_not_see_the_scale_of_the_gate_but_the_weighted_product_does():
    query, key, gate, *_ = problem()
    for scale in (1e-3, 1e-12):
        same = gated_similarity(query.float(), key.float(), scale * gate.float(), variant="subspace")
        torch.testing.assert_close(same, gated_similarity(query, key, gate, variant="subspace").float())
    weighted = gated_similarity(query, key, 0.5 * gate)
    torch.testing.assert_close(weighted, 0.25 * gated_similarity(query, key, gate))
    assert bool((weighted.abs() <= (0.5 * gate).square().amax(1, keepdim=True)).all())


def test_a_closed_gate_has_no_direction_and_no_gradient():
    query, key, gate, labels, partners = problem()
    shut = (0 * gate).detach().requires_grad_()
    for variant in VARIANTS:
        loss = partner_loss(query, key, shut, labels, partners, variant=variant)
        gradients = torch.autograd.grad(loss, (query, key, shut))
        assert all(bool((g == 0).all()) for g in gradients)


def test_the_own_class_is_neither_pulled_nor_pushed():
    query, key, gate, labels, partners = problem()
    partners = torch.full_like(labels, -1)  # nobody but the first anchor has a partner
    partners[0] = labels[labels != labels[0]][0]
    (pull,) = torch.autograd.grad(partner_loss(query, key, gate, labels, partners), key)
    own, partner = labels == labels[0], labels == partners[0]
    assert bool((pull[own] == 0).all()) and bool((pull[partner].abs().sum(1) > 0).all())
    # a step against the gradient brings partners nearer (in the gated subspace) and takes others away
    before, after = (gated_similarity(query, x, gate)[0] for x in (key, key - 0.01 * pull))
    assert bool((after[partner] > before[partner]).all())
    assert bool((after[~own & ~partner] < before[~own & ~partner]).all())


def test_with_identical_pairs_the_anchor_itself_is_a_positive():
    """Two items of two classes: each has only itself, and the other as negative."""
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1])
    found = partner_loss(z, z, None, labels, labels, temperature=0.5)
    torch.testing.assert_close(found, F.softplus(torch.tensor((0.0 - 1.0) / 0.5)))


@pytest.mark.parametrize("reduction", ["pair", "row"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_to_compare_is_zero_with_a_gradient_of_zero(variant, reduction):
    query, key, gate, labels, _ = problem()
    nobody, single = torch.full_like(labels, 99), torch.zeros_like(labels)
    options = {"variant": variant, "reduction": reduction}
    for own, partners in ((labels, nobody), (single, single)):  # no positive; no negative
        loss = partner_loss(query, key, gate, own, partners, **options)
        assert loss == 0
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(loss, (query, key, gate)))


def test_extreme_similarities_stay_finite():
    query, key, gate, labels, partners = problem()
    loss = partner_loss(query, key, gate, labels, partners, temperature=1e-4)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (query, key, gate)))


def test_half_precision_inputs_are_compared_in_single():
    query, key, gate, labels, partners = (x.detach() for x in problem())
    half = [x.to(torch.bfloat16) for x in (query, key, gate)]
    with torch.autocast("cpu", torch.bfloat16):
        found = partner_loss(*half, labels, partners)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, partner_loss(*(x.float() for x in half), labels, partners))


def test_kinds_of_partners():
    torch.manual_seed(0)
    labels = torch.arange(5).repeat(400)
    assert torch.equal(partner_labels(labels, "identical"), labels)
    arbitrary = partner_labels(labels, "arbitrary")
    assert torch.equal(arbitrary.sort().values, labels.sort().values) and 300 < int((arbitrary == labels).sum()) < 500
    distinct = partner_labels(labels, "distinct", classes=5)
    assert not bool((distinct == labels).any())
    counts = torch.zeros(5, 5).index_put_((labels, distinct), torch.tensor(1.0), accumulate=True)
    assert bool((counts.diagonal() == 0).all()) and counts[~torch.eye(5, dtype=torch.bool)].min() > 60


def test_what_cannot_be_meant_is_refused():
    query, key, gate, labels, partners = problem()
    with pytest.raises(InputError, match='no pairs named "arbitary"; did you mean arbitrary'):
        partner_labels(labels, "arbitary")
    with pytest.raises(InputError, match="at least two classes"):
        partner_labels(labels, "distinct", classes=1)
    with pytest.raises(InputError, match='no variant named "gated"'):
        partner_loss(query, key, gate, labels, partners, variant="gated")
    with pytest.raises(InputError, match='reduction must be "pair" or "row"'):
        partner_loss(query, key, gate, labels, partners, reduction="mean")
    with pytest.raises(InputError, match="12 queries need as many keys, labels and partners, not 11"):
        partner_loss(query, key[:11], gate, labels, partners)
    with pytest.raises(InputError, match=r"query and gate must be \[N, d\]"):
        gated_similarity(query, key, gate[:, :3])


def test_arbitrary_pairs_need_a_gate():
    """Four classes, one free point each, every pair of classes in turn: without a gate nothing can satisfy all of them."""
    labels, partners = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T

    def lowest(gated: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        points, gates = torch.nn.Parameter(torch.randn(4, 8)), torch.nn.Parameter(torch.zeros(4, 4, 8))
        optimiser = torch.optim.Adam([points, gates], lr=0.05)
        for _ in range(300):
            gate = torch.sigmoid(gates + gates.transpose(0, 1))[labels, partners] if gated else None
            loss = partner_loss(points[labels], points[labels], gate, labels, partners)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        near = F.normalize(points.detach(), dim=1)
        return float(loss.detach()), float((near @ near.T)[~torch.eye(4, dtype=torch.bool)].mean())

    (with_gate, apart), (without, together) = lowest(True), lowest(False)
    assert with_gate < 0.25 * without
    assert together > apart
