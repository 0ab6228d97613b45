"""Contrast at decoding time against plain loops, at its limits, and where it must refuse."""

import math

import pytest
import torch

from counterpoint.contrast.decoding import (
    contrastive_logprob,
    contrastive_search_score,
    furthest_layer,
    layer_divergence,
    nucleus,
    plausible,
)
from counterpoint.errors import InputError


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_search_score_by_hand():
    context, candidate, share = drawn(2, 4, 3), drawn(2, 5, 3, seed=1), drawn(2, 5, seed=2).softmax(1)
    found = contrastive_search_score(context, candidate, share, alpha=0.6)
    for b in range(2):
        for k in range(5):
            cosines = [torch.cosine_similarity(candidate[b, k], h, dim=0) for h in context[b]]
            assert found[b, k] == pytest.approx(float(0.4 * share[b, k] - 0.6 * max(cosines)), rel=1e-9)


def test_search_is_greedy_without_penalty_and_in_a_space_of_one_direction():
    context, candidate, share = drawn(2, 4, 8), drawn(2, 5, 8, seed=1), drawn(2, 5, seed=2).softmax(1)
    assert torch.equal(contrastive_search_score(context, candidate, share, alpha=0.0), share)
    best = share.argmax(1)
    assert not torch.equal(contrastive_search_score(context, candidate, share, alpha=0.9).argmax(1), best)
    score = contrastive_search_score(context + 1e5, candidate + 1e5, share, alpha=0.9)
    assert torch.equal(score.argmax(1), best)


def test_padding_is_no_context():
    context, candidate, share = drawn(1, 4, 3), drawn(1, 5, 3, seed=1), drawn(1, 5, seed=2).softmax(1)
    context[0, 0] = candidate[0, 1]  # would be the largest cosine of all
    mask = torch.tensor([[0, 1, 1, 1]])
    found = contrastive_search_score(context, candidate, share, mask=mask)
    torch.testing.assert_close(found, contrastive_search_score(context[:, 1:], candidate, share))
    assert found[0, 1] > contrastive_search_score(context, candidate, share)[0, 1]


def test_the_first_of_equals_is_taken():
    candidate = torch.ones(1, 3, 2)
    score = contrastive_search_score(torch.ones(1, 1, 2), candidate, torch.full((1, 3), 0.2))
    assert score.argmax(1).item() == 0


@pytest.mark.parametrize("top", [0.0, 0.1, 0.9, 1.0])
def test_plausible_tokens(top):
    log_share = drawn(6, 9).log_softmax(-1)
    kept = plausible(log_share, top)
    share = log_share.exp()
    assert kept.gather(1, share.argmax(1, keepdim=True)).all()
    if top:
        ratio = share / share.amax(1, keepdim=True)
        assert torch.equal(kept, ratio >= top - 1e-12)
    else:
        assert kept.all()


def test_the_combiner_term_by_term():
    e, a, low_e, low_a, told = (drawn(3, 7, seed=seed) for seed in range(5))
    full = contrastive_logprob(
        e,
        a,
        early=(low_e, low_a),
        truthful=told,
        lower_weight=0.3,
        refocus_weight=0.2,
        relative_top=0.0,
        post_softmax=False,
    )

    def log(x):
        return x - x.logsumexp(-1, keepdim=True)

    expected = log(e) - log(a) + 0.3 * (log(low_e) - log(low_a)) + 0.2 * (log(told) - log(e))
    torch.testing.assert_close(full, expected)
    # without the two weights it is contrastive decoding, and normalising changes no order
    options = {"early": (low_e, low_a), "truthful": told, "lower_weight": 0.0, "refocus_weight": 0.0}
    torch.testing.assert_close(contrastive_logprob(e, a, **options), contrastive_logprob(e, a))
    normalised = contrastive_logprob(e, a, relative_top=0.0)
    torch.testing.assert_close(normalised.logsumexp(-1), torch.zeros(3, dtype=torch.float64))
    # adding a constant to logits changes nothing
    torch.testing.assert_close(contrastive_logprob(e + 3, a - 5), contrastive_logprob(e, a))


def test_an_implausible_token_cannot_win_and_its_mask_is_the_experts():
    expert = torch.tensor([[4.0, 3.9, -9.0]])
    amateur = torch.tensor([[4.0, 3.9, -99.0]])  # the difference would be enormous at the last
    assert contrastive_logprob(expert, amateur, relative_top=0.0).argmax().item() == 2
    found = contrastive_logprob(expert, amateur, relative_top=0.1, relative_top_value=-1000.0)
    assert found.argmax().item() < 2 and found[0, 2] == -1000.0
    assert contrastive_logprob(expert, amateur)[0, 2] == -torch.inf


def test_an_amateur_like_the_expert_leaves_nothing_to_choose_by():
    expert = drawn(2, 5)
    found = contrastive_logprob(expert, expert, relative_top=0.0)
    torch.testing.assert_close(found, torch.full((2, 5), -math.log(5), dtype=torch.float64))


def test_divergence_by_hand_and_the_layer_it_chooses():
    mature, early = drawn(2, 6), drawn(3, 2, 6, seed=1)
    found = layer_divergence(mature, early)
    for c in range(3):
        for t in range(2):
            p, q = mature[t].softmax(0), early[c, t].softmax(0)
            m = (p + q) / 2
            expected = ((m * (m / p).log()).mean() + (m * (m / q).log()).mean()) / 2
            assert found[c, t] == pytest.approx(float(expected), rel=1e-9)
    early[1] = mature
    chosen, logits = furthest_layer(mature, early)
    assert (
        1 not in chosen and torch.equal(logits[0], early[chosen[0], 0]) and torch.equal(logits[1], early[chosen[1], 1])
    )
    same = mature.expand(3, 2, 6)
    assert furthest_layer(mature, same)[0].tolist() == [0, 0]
    # a token that one layer rules out entirely is no trouble
    ruled_out = mature.clone()
    ruled_out[:, 0] = -3000.0
    assert layer_divergence(ruled_out, mature[None]).isfinite().all()


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    share = torch.tensor([[0.5, 0.25, 0.15, 0.1]])
    logits = share.log()[:, [2, 0, 3, 1]]
    torch.testing.assert_close(nucleus(logits, top_p=0.7), torch.tensor([[0.0, 2 / 3, 0.0, 1 / 3]]))
    torch.testing.assert_close(nucleus(logits, top_p=1.0), share[:, [2, 0, 3, 1]])
    torch.testing.assert_close(nucleus(logits, top_k=1, top_p=0.01), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(nucleus(logits, top_k=99), share[:, [2, 0, 3, 1]])
    cold = nucleus(logits, temperature=0.01)
    assert cold.argmax().item() == 1 and cold.max() > 0.999


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: contrastive_search_score(drawn(1, 2, 3), drawn(1, 2, 3), drawn(1, 2), alpha=1.5), "between 0 and 1"),
        (lambda: contrastive_search_score(drawn(1, 2, 3), drawn(1, 2, 3), drawn(1, 4)), r"probability \[B, K\]"),
        (lambda: contrastive_logprob(drawn(2, 5), drawn(2, 6)), "expert and amateur must have one shape"),
        (lambda: contrastive_logprob(drawn(2, 5), drawn(2, 5), relative_top=2.0), "relative_top must lie"),
        (lambda: layer_divergence(drawn(2, 5), drawn(3, 2, 6)), r"early must be \[layers, 2, 5\]"),
        (lambda: nucleus(drawn(1, 4), top_p=0.0), "top_p lies above 0"),
    ],
)
def test_it_refuses(call, message):
    with pytest.raises(InputError, match=message):
        call()
