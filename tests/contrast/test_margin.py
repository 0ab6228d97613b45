"""Margins: single triplets and pairs by hand, which negative counts, and where nothing is asked for any more."""

import pytest
import torch
from torch.nn import functional as F

from counterpoint.contrast import info_nce, margin, n_pair, pair_margin, triplet
from counterpoint.errors import InputError

N, D = 7, 3


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


QUERY, KEY, POOL, HARD = drawn(N, D), drawn(N, D, seed=1), drawn(4, D, seed=2), drawn(N, 3, D, seed=3)
IGNORE = torch.rand(N, N, generator=torch.Generator().manual_seed(4)) > 0.6
CASES = {
    "batch": {},
    "ignored": {"ignore": IGNORE},
    "pool": {"negatives": POOL},
    "hard only": {"hard_negatives": HARD, "in_batch": False},
    "pool only": {"negatives": POOL, "in_batch": False},
    "everything": {"negatives": POOL, "hard_negatives": HARD, "ignore": IGNORE},
}


def others(i, *, negatives=None, hard_negatives=None, ignore=None, in_batch=True, normalize=True):
    rows = [KEY[j] for j in range(N) if in_batch and j != i and (ignore is None or not ignore[i, j])]
    rows += [] if negatives is None else [*negatives]
    rows += [] if hard_negatives is None else [*hard_negatives[i]]
    found = torch.stack(rows)
    return F.normalize(found, dim=1) if normalize else found


def ready(normalize):
    return (F.normalize(QUERY, dim=1), F.normalize(KEY, dim=1)) if normalize else (QUERY, KEY)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mining", ["hardest", "semi-hard", "all"])
@pytest.mark.parametrize("name", CASES)
def test_triplets_by_hand(name, mining, normalize):
    q, k = ready(normalize)
    rows = []
    for i in range(N):
        own, s = q[i] @ k[i], others(i, **CASES[name], normalize=normalize) @ q[i]
        below = s[s < own]
        chosen = {"all": s, "hardest": s.max()[None], "semi-hard": below.max()[None] if len(below) else s.min()[None]}
        rows.append((0.3 - own + chosen[mining]).clamp(min=0).mean())
    found = triplet(QUERY, KEY, margin=0.3, mining=mining, normalize=normalize, **CASES[name], reduction="none")
    torch.testing.assert_close(found, torch.stack(rows))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_pairs_by_hand(name, normalize):
    q, k = ready(normalize)
    rows = []
    for i in range(N):
        apart = (others(i, **CASES[name], normalize=normalize) - q[i]).norm(dim=1)
        rows.append(((q[i] - k[i]).square().sum() + (1.2 - apart).clamp(min=0).square().mean()) / 2)
    found = pair_margin(QUERY, KEY, margin=1.2, normalize=normalize, **CASES[name], reduction="none")
    torch.testing.assert_close(found, torch.stack(rows))


@pytest.mark.parametrize("loss", [triplet, pair_margin])
@pytest.mark.parametrize("more", [{}, {"temperature": 0.2}, {"negatives": POOL, "hard_negatives": HARD}])
def test_gradients(loss, more):
    operands = [x.clone().requires_grad_() for x in (QUERY, KEY)]
    for mining in ("hardest", "semi-hard", "all") if loss is triplet else (None,):
        choice = {} if mining is None else {"mining": mining}
        assert torch.autograd.gradcheck(lambda q, k, c=choice: loss(q, k, margin=0.4, **more, **c), operands)


def test_what_is_far_enough_is_left_alone():
    eye = torch.eye(4, dtype=torch.float64)
    q = eye.clone().requires_grad_()
    loss = triplet(q, eye, margin=0.9)
    assert loss.item() == 0 and torch.autograd.grad(loss, q)[0].abs().max() == 0
    assert pair_margin(eye, eye, margin=1.0).item() == 0  # orthogonal vectors are 1.41 apart
    torch.testing.assert_close(triplet(eye, eye, margin=1.25).item(), 0.25)
    loss = triplet(q, eye.roll(1, 0), margin=0.5)  # positive and hardest negative exchanged
    pull = -torch.autograd.grad(loss, q)[0]
    assert ((pull * eye.roll(1, 0)).sum(1) > 0).all()


def test_the_corner_has_the_hinge_as_its_limit_and_the_logistic_loss_beyond_it():
    hinge = triplet(QUERY, KEY, margin=0.4, reduction="none")
    for width in (0.1, 0.01, 0.001):
        soft = triplet(QUERY, KEY, margin=0.4, temperature=width, reduction="none")
        assert (soft >= hinge - 1e-12).all() and (soft - hinge).max() <= width * 0.6932
    one = triplet(QUERY[:2], KEY[:2], margin=0.0, temperature=0.5, reduction="none") / 0.5
    torch.testing.assert_close(one, info_nce(QUERY[:2], KEY[:2], temperature=0.5, reduction="none"))


def test_the_search_in_blocks_finds_what_one_search_finds(monkeypatch):
    entire = [
        triplet(QUERY, KEY, mining=how, negatives=POOL, hard_negatives=HARD, ignore=IGNORE)
        for how in ("hardest", "semi-hard")
    ]
    monkeypatch.setattr(margin, "BLOCK", 20)
    again = [
        triplet(QUERY, KEY, mining=how, negatives=POOL, hard_negatives=HARD, ignore=IGNORE)
        for how in ("hardest", "semi-hard")
    ]
    torch.testing.assert_close(again, entire)


def test_queries_without_a_negative_do_not_dilute_the_mean():
    ignore = torch.zeros(N, N, dtype=torch.bool)
    ignore[2] = True
    rows = triplet(QUERY, KEY, ignore=ignore, reduction="none")
    assert rows[2] == 0
    torch.testing.assert_close(triplet(QUERY, KEY, ignore=ignore), rows.sum() / (N - 1))


@pytest.mark.parametrize("name", CASES)
def test_n_pair_by_hand(name):
    rows = []
    for i in range(N):
        own, s = QUERY[i] @ KEY[i], others(i, **CASES[name], normalize=False) @ QUERY[i]
        lengths = QUERY[i].square().sum() + KEY[i].square().sum()
        rows.append(torch.log(1 + torch.exp(s - own).sum()) + 0.5 / 4 * lengths)
    torch.testing.assert_close(n_pair(QUERY, KEY, l2=0.5, **CASES[name], reduction="none"), torch.stack(rows))


def test_n_pair_of_one_negative_is_a_soft_triplet_and_its_second_term_shrinks():
    soft = triplet(QUERY[:2], KEY[:2], margin=0.0, temperature=1.0, normalize=False, reduction="none")
    torch.testing.assert_close(n_pair(QUERY[:2], KEY[:2], l2=0.0, reduction="none"), soft)
    with_term, without = (torch.autograd.grad(n_pair(q, KEY, l2=l2), q)[0] for l2 in (0.4, 0.0)
                          for q in [QUERY.clone().requires_grad_()])  # fmt: skip
    torch.testing.assert_close(with_term - without, 0.4 / 2 * QUERY / N)
    torch.testing.assert_close(
        n_pair(QUERY, KEY, l2=0.0, normalize=True, temperature=0.2), info_nce(QUERY, KEY, temperature=0.2)
    )
    moved = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    back = torch.empty_like(moved).index_copy(0, moved, torch.arange(N))
    torch.testing.assert_close(n_pair(QUERY, KEY[moved], positives=back), n_pair(QUERY, KEY))


@pytest.mark.parametrize(
    "loss, more, message",
    [
        (triplet, {"mining": "random"}, 'mining must be "hardest", "semi-hard" or "all", not "random"'),
        (triplet, {"margin": -0.1}, "margin cannot be negative"),
        (pair_margin, {"temperature": -1.0}, "temperature must be positive"),
        (triplet, {"hard_negatives": POOL}, r"hard_negatives must be \[7, S, d\]"),
        (triplet, {"positives": torch.zeros(3, dtype=torch.long)}, r"positives must be int64 \[7\]"),
        (pair_margin, {"in_batch": False}, "no negatives"),
        (n_pair, {"l2": -1.0}, "l2 cannot be negative"),
    ],
)
def test_bad_input(loss, more, message):
    with pytest.raises(InputError, match=message):
        loss(QUERY, KEY, **more)
