"""Noise contrast is its formula, and learns what it promises: log-density ratios, with and without the noise's help."""

import math

import pytest
import torch
from torch.nn import functional as F

from counterpoint import contrast
from counterpoint.contrast import Same, binary_nce, info_nce, ranking_nce, sigmoid_loss
from counterpoint.contrast.kernels import executor
from counterpoint.errors import InputError

N, D = 6, 4


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


QUERY, KEY, POOL, HARD = drawn(N, D), drawn(N, D, seed=1), drawn(5, D, seed=2), drawn(N, 2, D, seed=3)
LOG_Q, POOL_LOG_Q = drawn(N, seed=4).log_softmax(0), drawn(5, seed=5).log_softmax(0)
TAU = 0.3


def candidates(i, *, pool=None, hard=None, ignore=None, in_batch=True, log_q=None, pool_log_q=None):
    """(logit of the positive, logits of the negatives) of query i, without the log K."""
    q, k = F.normalize(QUERY, dim=1), F.normalize(KEY, dim=1)

    def logit(y, noise):
        return q[i] @ F.normalize(y, dim=0) / TAU - noise

    noise = [0.0] * N if log_q is None else log_q
    others = [logit(k[j], noise[j]) for j in range(N) if in_batch and j != i and (ignore is None or not ignore[i, j])]
    if pool is not None:
        others += [logit(y, 0.0 if pool_log_q is None else pool_log_q[j]) for j, y in enumerate(pool)]
    if hard is not None:
        others += [logit(y, 0.0) for y in hard[i]]
    return logit(k[i], noise[i]), torch.stack(others)


CASES = {
    "batch": {},
    "pool": {"pool": POOL},
    "pool only": {"pool": POOL, "in_batch": False},
    "hard": {"hard": HARD},
    "hard only": {"hard": HARD, "in_batch": False},
    "ignored": {"ignore": torch.rand(N, N, generator=torch.Generator().manual_seed(6)) > 0.7},
    "everything": {"pool": POOL, "hard": HARD, "ignore": torch.eye(N).roll(1, 1).bool()},
    "noise": {"log_q": LOG_Q},
    "noise and pool": {"log_q": LOG_Q, "pool": POOL, "pool_log_q": POOL_LOG_Q},
    "noise of the pool only": {"log_q": LOG_Q, "pool": POOL, "pool_log_q": POOL_LOG_Q, "in_batch": False},
    "noise and ignored": {"log_q": LOG_Q, "ignore": torch.eye(N).roll(2, 1).bool()},
    "noise, pool and ignored": {
        "log_q": LOG_Q, "pool": POOL, "pool_log_q": POOL_LOG_Q, "ignore": torch.eye(N).roll(2, 1).bool() | torch.eye(N).bool()
    },
}  # fmt: skip


def options(case):
    names = {"pool": "negatives", "hard": "hard_negatives", "log_q": "log_noise", "pool_log_q": "negatives_log_noise"}
    return {names.get(name, name): value for name, value in case.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_binary_nce_against_single_questions(name, reduction):
    case, rows = CASES[name], []
    for i in range(N):
        positive, others = candidates(i, **case)
        shift = math.log(len(others)) if "log_q" in case else 0.0
        rows.append(-F.logsigmoid(positive - shift) - F.logsigmoid(-(others - shift)).sum())
    expected = torch.stack(rows)
    found = binary_nce(QUERY, KEY, temperature=TAU, **options(case), reduction=reduction)
    torch.testing.assert_close(found, {"none": expected, "mean": expected.mean(), "sum": expected.sum()}[reduction])


@pytest.mark.parametrize("name", CASES)
def test_ranking_nce_against_a_cross_entropy_of_each_query(name):
    rows = []
    for i in range(N):
        positive, others = candidates(i, **CASES[name])
        rows.append(torch.cat([positive[None], others]).logsumexp(0) - positive)
    found = ranking_nce(QUERY, KEY, temperature=TAU, **options(CASES[name]), reduction="none")
    torch.testing.assert_close(found, torch.stack(rows))


@pytest.mark.parametrize("loss", [binary_nce, ranking_nce])
@pytest.mark.parametrize("name", ["batch", "everything", "noise", "noise and pool", "noise of the pool only"])
def test_gradients(loss, name):
    case = {k: v.clone().requires_grad_() if k in ("pool", "hard") else v for k, v in CASES[name].items()}
    operands = [x.clone().requires_grad_() for x in (QUERY, KEY)]
    temperature = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)

    def value(q, k, t, *further):
        mine = case | dict(zip([n for n in ("pool", "hard") if n in case], further, strict=True))
        return loss(q, k, temperature=t, **options(mine))

    further = [case[n] for n in ("pool", "hard") if n in case]
    assert torch.autograd.gradcheck(value, (*operands, temperature, *further))


def test_the_tiled_sum_is_the_one_with_everything_written_out():
    """`ignore` holds all scores; ignoring nobody must change nothing, whatever the executor."""
    nobody = torch.zeros(N, N, dtype=torch.bool)
    for more in ({}, {"log_noise": LOG_Q}, {"log_noise": -2.0}, {"log_noise": LOG_Q.exp(), "negatives": POOL,
                                                                  "negatives_log_noise": POOL_LOG_Q}):  # fmt: skip
        for loss in (binary_nce, ranking_nce):
            dense = loss(QUERY, KEY, temperature=TAU, ignore=nobody, **more)
            with executor("blocked"):
                torch.testing.assert_close(loss(QUERY, KEY, temperature=TAU, **more), dense)
    temperature = torch.linspace(0.2, 1, N, dtype=torch.float64)
    torch.testing.assert_close(
        binary_nce(QUERY, KEY, temperature=temperature, ignore=nobody, reduction="none")[2],
        binary_nce(QUERY, KEY, temperature=float(temperature[2]), reduction="none")[2],
    )


def test_without_noise_it_is_negative_sampling_and_with_uniform_noise_a_bias():
    torch.testing.assert_close(
        binary_nce(QUERY, KEY, temperature=TAU), sigmoid_loss(QUERY, KEY, temperature=TAU, bias=0.0)
    )
    uniform = binary_nce(QUERY, KEY, temperature=TAU, log_noise=-math.log(N))
    torch.testing.assert_close(uniform, sigmoid_loss(QUERY, KEY, temperature=TAU, bias=math.log(N / (N - 1))))
    as_values = binary_nce(QUERY, KEY, temperature=TAU, log_noise=torch.full((N,), -math.log(N), dtype=torch.float64))
    torch.testing.assert_close(as_values, uniform)


def test_uniform_noise_is_info_nce_and_equal_scores_are_log_k():
    plain = info_nce(QUERY, KEY, temperature=TAU, negatives=POOL, reduction="none")
    for noise in (-3.0, torch.full((N,), -3.0, dtype=torch.float64)):
        further = {"negatives_log_noise": noise if isinstance(noise, float) else torch.full((5,), -3.0).double()}
        found = ranking_nce(QUERY, KEY, temperature=TAU, log_noise=noise, negatives=POOL, **further, reduction="none")
        torch.testing.assert_close(found, plain)
    same = torch.ones(N, D, dtype=torch.float64)
    assert ranking_nce(same, same).item() == pytest.approx(math.log(N))  # log(K + 1): the bound on information is 0


def test_positives_are_named_and_equal_items_do_not_repel():
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    shuffled = torch.empty_like(KEY)
    shuffled[order] = KEY
    for loss in (binary_nce, ranking_nce):
        for more in ({}, {"log_noise": LOG_Q}):
            there = more | ({"log_noise": torch.empty_like(LOG_Q).index_copy(0, order, LOG_Q)} if more else {})
            torch.testing.assert_close(
                loss(QUERY, shuffled, temperature=TAU, positives=order, reduction="none", **there),
                loss(QUERY, KEY, temperature=TAU, reduction="none", **more),
            )
        items = torch.tensor([0, 1, 0, 2, 1, 3])
        alike = (items[:, None] == items) & ~torch.eye(N, dtype=torch.bool)
        torch.testing.assert_close(loss(QUERY, KEY, ignore=Same(items, items)), loss(QUERY, KEY, ignore=alike))


# ---- what they learn -------------------------------------------------------------------------------------------------

JOINT = torch.tensor([[0.30, 0.04, 0.06], [0.02, 0.18, 0.10], [0.05, 0.05, 0.20]], dtype=torch.float64)
NOISE = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)


def learned(loss, steps=60):
    """A table of scores fitted to (x, y) drawn so often as the joint says; all noise samples of a pair are enumerated."""
    table = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(3, dtype=torch.float64)
    optimiser = torch.optim.LBFGS([table], max_iter=steps, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = loss(table, eye)
        value.backward()
        return value

    optimiser.step(closure)
    return table.detach()


def enumerated(nce, noise, corrected):
    """Expected loss over pairs of the joint and one noise sample each, scores being rows of the table at basis vectors."""

    def value(table, eye):
        total = torch.zeros((), dtype=torch.float64)
        for x in range(3):
            for y in range(3):
                for other in range(3):
                    more = (
                        {"log_noise": noise.log()[[y]], "negatives_log_noise": noise.log()[[other]]}
                        if corrected
                        else {}
                    )
                    found = nce(table[[x]], eye[[y]], negatives=eye[[other]], in_batch=False, temperature=1.0,
                                normalize=False, reduction="sum", **more)  # fmt: skip
                    total = total + JOINT[x, y] * noise[other] * found
        return total

    return value


CONDITIONAL = JOINT / JOINT.sum(1, keepdim=True)


def test_binary_nce_learns_log_probabilities_and_without_noise_their_ratio():
    torch.testing.assert_close(learned(enumerated(binary_nce, NOISE, True)), CONDITIONAL.log(), rtol=1e-4, atol=1e-4)
    ratio = (CONDITIONAL / NOISE).log()
    torch.testing.assert_close(learned(enumerated(binary_nce, NOISE, False)), ratio, rtol=1e-4, atol=1e-4)


def test_ranking_nce_learns_them_up_to_a_constant_of_each_anchor():
    def centred(x):
        return x - x.mean(1, keepdim=True)

    with_noise = centred(learned(enumerated(ranking_nce, NOISE, True)))
    torch.testing.assert_close(with_noise, centred(CONDITIONAL.log()), rtol=1e-3, atol=1e-3)
    without = centred(learned(enumerated(ranking_nce, NOISE, False)))
    torch.testing.assert_close(without, centred((CONDITIONAL / NOISE).log()), rtol=1e-3, atol=1e-3)
    assert (with_noise - without).abs().max() > 0.3  # the correction is not nothing


def test_ranking_nce_bounds_information():
    """Two correlated normal numbers, whose information and best score are known."""
    rho, k = 0.9, 64
    generator = torch.Generator().manual_seed(0)
    x, e = (torch.randn(400, k, generator=generator, dtype=torch.float64) for _ in range(2))
    y = rho * x + math.sqrt(1 - rho**2) * e
    # log p(y | x) / p(y) up to a function of x, as a dot product of (x, 1) and (a y, -b y^2)
    a, b = rho / (1 - rho**2), rho**2 / (2 * (1 - rho**2))
    losses = [
        ranking_nce(
            torch.stack([p, torch.ones_like(p)], 1), torch.stack([a * q, -b * q * q], 1), temperature=1.0, normalize=False
        )
        for p, q in zip(x, y, strict=True)
    ]  # fmt: skip
    bound, information = math.log(k) - torch.stack(losses).mean().item(), -0.5 * math.log(1 - rho**2)
    assert information - 0.1 < bound < information + 0.01 and bound < math.log(k)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, message",
    [
        ({"log_noise": LOG_Q[:3]}, r"log_noise must hold one value per key, \[6\], not \[3\]"),
        ({"log_noise": LOG_Q, "negatives": POOL}, "the noise of 5 negatives is not known: give negatives_log_noise"),
        ({"log_noise": LOG_Q, "negatives": POOL, "negatives_log_noise": LOG_Q}, "one value per negative"),
        ({"negatives": POOL, "negatives_log_noise": POOL_LOG_Q}, "log_noise, that of the keys, is not"),
        ({"log_noise": LOG_Q, "hard_negatives": HARD}, "hard negatives have no noise of their own"),
        ({"in_batch": False, "log_noise": LOG_Q}, "no negatives"),
        ({"positives": torch.tensor([0, 1, 2, 3, 4, 6]), "log_noise": LOG_Q}, "must name key rows from 0 to 5"),
        ({"temperature": 0.0, "log_noise": LOG_Q}, "temperature must be positive"),
    ],
)
@pytest.mark.parametrize("loss", [binary_nce, ranking_nce])
def test_bad_input(loss, more, message):
    with pytest.raises(InputError, match=message):
        loss(QUERY, KEY, **more)


def test_they_are_objectives_of_pairs():
    for name in ("binary_nce", "ranking_nce", "triplet", "pair_margin", "n_pair"):
        assert contrast.objective(name) is getattr(contrast, name)
