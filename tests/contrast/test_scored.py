"""Objectives of scores: each anchor by hand, what does not count, and what they are the same as."""

import math

import pytest
import torch
from torch.nn import functional as F

from counterpoint.contrast import binary_nce, info_nce, scored_binary, scored_objective, scored_ranking, scored_triplet
from counterpoint.contrast.replaced import replaced_token_loss, token_nce_loss
from counterpoint.errors import InputError

N, M = 6, 5
GENERATOR = torch.Generator().manual_seed(0)
SCORES = 2 * torch.randn(N, M, generator=GENERATOR, dtype=torch.float64)
POSITIVE = torch.rand(N, M, generator=GENERATOR) > 0.6
POSITIVE[0], POSITIVE[1] = False, True  # nothing right, and nothing wrong
IGNORE = torch.rand(N, M, generator=GENERATOR) > 0.7
IGNORE[2] = True
WEIGHT = torch.rand(N, M, generator=GENERATOR, dtype=torch.float64) + 0.2
LOG_Q = torch.randn(M, generator=GENERATOR, dtype=torch.float64).log_softmax(0)
CASES = {
    "plain": {},
    "ignored": {"ignore": IGNORE},
    "weighted": {"weight": WEIGHT},
    "weighted columns": {"weight": WEIGHT[0]},
    "noise": {"log_noise": LOG_Q},
    "everything": {"ignore": IGNORE, "weight": WEIGHT, "log_noise": LOG_Q},
}


def sides(i, *, ignore=None, weight=None, log_noise=None):
    """(score, weight) of the positives and of the negatives of anchor i."""
    noise = torch.zeros(M) if log_noise is None else log_noise
    factors = torch.ones(N, M) if weight is None else weight.expand(N, M)
    there = [j for j in range(M) if ignore is None or not ignore[i, j]]
    split = [[j for j in there if POSITIVE[i, j] == want] for want in (True, False)]
    return [[(SCORES[i, j] - noise[j], factors[i, j]) for j in part] for part in split]


def by_hand(name, case):
    rows, full = [], []
    for i in range(N):
        yes, no = sides(i, **{k: v for k, v in case.items() if name != "triplet" or k != "log_noise"})
        shift = math.log(max(len(no), 1)) if "log_noise" in case else 0.0
        full.append(bool(yes or no) if name == "binary" else bool(yes and no))
        if not full[-1]:
            rows.append(torch.zeros((), dtype=torch.float64))
        elif name == "binary":
            terms = [-w * F.logsigmoid(s - shift) for s, w in yes] + [-w * F.logsigmoid(shift - s) for s, w in no]
            rows.append(torch.stack(terms).sum())
        elif name == "ranking":
            against = sum(w * s.exp() for s, w in no)
            rows.append(sum(w * -torch.log(s.exp() / (s.exp() + against)) for s, w in yes) / sum(w for _, w in yes))
        else:
            hardest, w = max(no, key=lambda pair: pair[0])
            rows.append(w * (0.7 - min(s for s, _ in yes) + hardest).clamp(min=0))
    return torch.stack(rows), torch.tensor(full)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["binary", "ranking", "triplet"])
def test_each_anchor_by_hand(name, case):
    if name == "triplet" and case == "noise":
        return
    options = {k: v for k, v in CASES[case].items() if name != "triplet" or k != "log_noise"}
    options |= {"margin": 0.7} if name == "triplet" else {}
    loss, (expected, full) = scored_objective(name), by_hand(name, CASES[case])
    torch.testing.assert_close(loss(SCORES, POSITIVE, **options, reduction="none"), expected)
    torch.testing.assert_close(loss(SCORES, POSITIVE, **options), expected.sum() / full.sum())
    torch.testing.assert_close(loss(SCORES, POSITIVE, **options, reduction="sum"), expected.sum())
    scores = SCORES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, POSITIVE, **options), scores)
    (gradient,) = torch.autograd.grad(loss(scores, POSITIVE, **options), scores)
    assert gradient.isfinite().all() and (gradient[POSITIVE] <= 0).all() and (gradient[~POSITIVE] >= 0).all()
    if "ignore" in options:
        assert gradient[IGNORE].abs().max() == 0 and gradient.abs().max() > 0


def test_on_similarities_they_are_the_objectives_of_embeddings():
    x, y = (torch.randn(4, 3, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
    scores, own = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / 0.2, torch.eye(4, dtype=torch.bool)
    noise = torch.randn(4, generator=GENERATOR, dtype=torch.float64).log_softmax(0)
    torch.testing.assert_close(scored_ranking(scores, own), info_nce(x, y, temperature=0.2))
    for more in ({}, {"log_noise": noise}):
        torch.testing.assert_close(scored_binary(scores, own, **more), binary_nce(x, y, temperature=0.2, **more))


def test_binary_probabilities_of_several_labels_are_learned_apart():
    """An anchor with two labels and one with none: the best scores are log odds, which ranking cannot tell."""
    probability = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.2, 0.1]], dtype=torch.float64)
    scores = torch.logit(probability).requires_grad_()
    yes, no = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    loss = scored_binary(scores, yes, weight=probability) + scored_binary(scores, no, weight=1 - probability)
    assert torch.autograd.grad(loss, scores)[0].abs().max() < 1e-12


def test_a_learned_energy_tells_tokens_probabilities():
    """Electric on a vocabulary of four: the best score of a token is its log-probability, whatever proposed it."""
    data, noise = (torch.tensor(p, dtype=torch.float64) for p in ((0.5, 0.3, 0.15, 0.05), (0.1, 0.2, 0.3, 0.4)))
    score = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([score], max_iter=80, line_search_fn="strong_wolfe")
    rate = 0.2
    # every token once as data and once as noise, each so often as it comes
    ids = torch.arange(4).repeat(2)[None]
    original = torch.cat([torch.arange(4), torch.full((4,), 9)])[None]
    often = torch.cat([(1 - rate) * data, rate * noise])

    def closure():
        optimiser.zero_grad()
        log_q, mask = noise.log()[ids], torch.ones_like(ids)
        rows = token_nce_loss(score[ids], log_q, ids, original, mask, rate=rate, reduction="none")
        loss = (rows[0] * often).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(score.detach(), data.log(), rtol=1e-4, atol=1e-4)
    flat = token_nce_loss(
        torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1, 2]]), torch.tensor([[1, 3]]), torch.ones(1, 2), rate=0.5
    )
    torch.testing.assert_close(
        flat, replaced_token_loss(torch.zeros(1, 2), torch.tensor([[1, 2]]), torch.tensor([[1, 3]]), torch.ones(1, 2))
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: scored_binary(SCORES, POSITIVE[:, :3]), r"positives must be bool \[6, 5\]"),
        (lambda: scored_binary(SCORES, POSITIVE.long()), "positives must be bool"),
        (lambda: scored_ranking(SCORES, POSITIVE, ignore=IGNORE[:2]), "ignore must be bool"),
        (lambda: scored_ranking(SCORES, POSITIVE, weight=WEIGHT[:, 0]), "weight must be"),
        (lambda: scored_triplet(SCORES, POSITIVE, margin=-1.0), "cannot be negative"),
        (lambda: scored_objective("binry"), 'named "binry"; did you mean binary'),
        (lambda: token_nce_loss(SCORES, LOG_Q, SCORES, SCORES, SCORES), "log_noise must be of the shape of scores"),
        (lambda: token_nce_loss(SCORES, SCORES, SCORES, SCORES, SCORES, rate=1.0), "rate lies between 0 and 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
