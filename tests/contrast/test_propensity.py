"""Inverse propensity prefers what the naive rule overlooks; draws follow the weights; balancing removes hubs."""

import math

import pytest
import torch

from counterpoint.contrast import info_nce
from counterpoint.contrast.balanced import balanced_info_nce
from counterpoint.contrast.propensity import draw_candidates, inverse_propensity_logits, propensity
from counterpoint.errors import InputError


def test_propensities_follow_the_surface_and_the_roles_are_opposite():
    surface = torch.tensor([[0.1, 0.4, 0.7], [0.5, 0.5, 0.5]])
    positive, negative = (propensity(surface, role) for role in ("positive", "negative"))
    torch.testing.assert_close(positive + negative, torch.ones(2, 3))
    assert positive[0, 0] < positive[0, 1] < positive[0, 2] and positive[1].tolist() == [0.5] * 3
    assert positive[0, 2].item() == pytest.approx(1 / (1 + math.exp(-3)))
    among = torch.tensor([[True, False, False], [True, True, True]])
    assert propensity(surface, "positive", among=among)[0, 0] == 0.5


def test_weights_by_hand():
    semantic, likely = torch.tensor([[0.8, 0.9, 0.7, 0.9]]), torch.tensor([[0.5, 0.9, 0.2, 0.01]])
    allowed = torch.tensor([[True, True, False, True]])
    found = inverse_propensity_logits(semantic, allowed, likely).softmax(1)[0].tolist()
    weights = [math.exp(0.8 / 0.05) / 0.5, math.exp(0.9 / 0.05) / 0.9, 0.0, math.exp(0.9 / 0.05) * 10]
    assert found == pytest.approx([w / sum(weights) for w in weights], rel=1e-4)
    # negatives: the less alike, the heavier; without propensities only meaning counts
    found = inverse_propensity_logits(semantic, allowed, role="negative").softmax(1)[0].tolist()
    weights = [math.exp(-16), math.exp(-18), 0.0, math.exp(-18)]
    assert found == pytest.approx([w / sum(weights) for w in weights], rel=1e-4)


@pytest.mark.parametrize("floor, most, expected", [(0.05, 10, 10), (0.05, 100, 20), (0.2, 10, 5), (0.001, 1, 1)])
def test_inverse_propensities_are_clipped(floor, most, expected):
    options = {"floor": floor, "most": most}
    rare = inverse_propensity_logits(torch.zeros(1, 1), torch.ones(1, 1).bool(), torch.tensor([[1e-6]]), **options)
    assert rare.exp().item() == pytest.approx(expected)


def test_draws_follow_the_weights_and_never_repeat():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(20000, -1)
    drawn = draw_candidates(logits, 2, generator=generator)
    first = drawn[:, 0].bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(first, torch.tensor([0.5, 0.3, 0.2, 0.0]), atol=0.015, rtol=0)
    second = drawn[drawn[:, 0] == 0, 1].bincount(minlength=4).float()
    torch.testing.assert_close(second / second.sum(), torch.tensor([0.0, 0.6, 0.4, 0.0]), atol=0.02, rtol=0)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    again = draw_candidates(logits, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn)


def test_where_nobody_is_left_the_draw_says_so():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf], [-torch.inf] * 3])
    assert draw_candidates(logits, 2).tolist() == [[1, -1], [-1, -1]]
    with pytest.raises(InputError, match="4 of 3 candidates cannot be drawn"):
        draw_candidates(logits, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: propensity(x, "positive", sharpness=0), "sharpness of a propensity must be positive"),
        (lambda x: propensity(x, "neutral"), 'not "neutral"'),
        (lambda x: inverse_propensity_logits(x, x > 0, temperature=0), "must be positive"),
        (lambda x: inverse_propensity_logits(x, x > 0, role="neutral"), 'not "neutral"'),
    ],
)
def test_nonsense_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.rand(2, 3))


# ----------------------------------------------------------------------------------------------------------- balancing


def pairs(n=6, m=6, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, m)]


def test_no_rounds_are_info_nce():
    query, key = pairs(m=9)
    own, ignore = torch.tensor([3, 0, 8, 1, 2, 5]), torch.rand(6, 9) > 0.6
    for options in ({"positives": own}, {"positives": own, "ignore": ignore}):
        expected = info_nce(query, key, temperature=0.2, **options)
        torch.testing.assert_close(balanced_info_nce(query, key, temperature=0.2, rounds=0, **options), expected)


def test_rounds_are_sinkhorns():
    query, key = (torch.nn.functional.normalize(x, dim=1) for x in pairs())
    kernel = (query @ key.T / 0.3).exp()
    u = torch.ones(6, dtype=torch.float64)
    for rounds in range(1, 4):
        v = 1 / (u @ kernel)
        u = 1 / (kernel @ v)
        expected = -(u[:, None] * kernel * v).diagonal().log()
        found = balanced_info_nce(query, key, temperature=0.3, rounds=rounds, reduction="none")
        torch.testing.assert_close(found, expected)


def test_a_hub_counts_less_and_a_key_that_all_ignore_not_at_all():
    query, key = pairs(m=7)
    own = torch.arange(6)
    hub = torch.cat([key[:6], query.mean(0, keepdim=True)])
    harm = [
        (balanced_info_nce(query, hub, positives=own, rounds=r) - balanced_info_nce(query, key[:6], rounds=r)).item()
        for r in (0, 1)
    ]
    assert harm[0] > 0 and harm[1] < harm[0]
    ignore = torch.zeros(6, 7, dtype=torch.bool)
    ignore[:, 6] = True
    query.requires_grad_()
    loss = balanced_info_nce(query, hub, positives=own, ignore=ignore, rounds=3)
    torch.testing.assert_close(loss, balanced_info_nce(query, key[:6], rounds=3))
    assert torch.autograd.grad(loss, query)[0].isfinite().all()


def test_balancing_has_the_right_gradient_and_refuses_nonsense():
    query, key = pairs(4, 4)
    inputs = [x.requires_grad_() for x in (query, key)]
    assert torch.autograd.gradcheck(lambda q, k: balanced_info_nce(q, k, temperature=0.5, rounds=2), inputs)
    for options, message in (
        ({"rounds": -1}, "rounds must not be negative"),
        ({"key": pairs(m=7)[1]}, "4 queries and 7 keys"),
        ({"ignore": torch.zeros(3, 3, dtype=torch.bool)}, r"queries x keys, \[4, 4\], not \[3, 3\]"),
        ({"positives": torch.zeros(3, dtype=torch.int64)}, r"positives must be int64 \[4\]"),
    ):
        with pytest.raises(InputError, match=message):
            balanced_info_nce(query, options.pop("key", key), **options)
