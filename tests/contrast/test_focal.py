"""Hard pairs and focal contrast: brute force, limits, and where gradients may go."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from counterpoint import contrast
from counterpoint.contrast.focal import focal_sup_con, hardest_pairs, mix_hard_pairs
from counterpoint.errors import InputError


def batch(n: int = 24, d: int = 6, classes: int = 4, seed: int = 0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=random, dtype=dtype).requires_grad_()
    return features, torch.randint(classes, (n,), generator=random)


def mix(features, labels, toward=0.9, away=0.6, **options):
    n = len(features)
    shares = {"lam_negative": torch.full((n,), toward), "lam_positive": torch.full((n,), away)}
    order = torch.arange(n).roll(1)
    return mix_hard_pairs(features, labels, classes=4, permutation=order, **shares, **options)


def test_the_hardest_pairs_are_those_of_a_search():
    features, labels = batch()
    positive, negative = hardest_pairs(features, labels)
    x, y = F.normalize(features.detach(), dim=1).numpy(), labels.numpy()
    for i in range(len(x)):
        similarity = x @ x[i]
        same = [j for j in range(len(x)) if y[j] == y[i] and j != i]
        other = [j for j in range(len(x)) if y[j] != y[i]]
        assert positive[i] == min(same, key=lambda j: similarity[j])
        assert negative[i] == max(other, key=lambda j: similarity[j])


def test_a_row_without_a_candidate_gets_itself():
    features, _ = batch(4)
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.equal(hardest_pairs(features, labels)[0], torch.arange(4))
    assert torch.equal(hardest_pairs(features, torch.zeros(4, dtype=torch.int64))[1], torch.arange(4))


def test_released_mining_finds_no_positive_among_features_that_are_never_negative():
    """Nearly always the row itself, else a stranger: the measured behaviour of the official rule."""
    random = torch.Generator().manual_seed(0)
    features, labels = torch.rand(256, 32, generator=random), torch.randint(10, (256,), generator=random)
    rows = torch.arange(256)
    released, _ = hardest_pairs(features, labels, mining="released")
    itself, same = released == rows, labels[released] == labels
    assert 0.8 < itself.double().mean() < 0.97 and not bool((same & ~itself).any())
    assert bool((labels[~itself] == labels[0]).all())
    masked, _ = hardest_pairs(features, labels)
    assert bool((labels[masked] == labels).all()) and not bool((masked == rows).any())


def test_three_blocks_and_their_labels():
    features, labels = batch()
    mixed, targets = mix(features, labels, toward=0.9, away=0.6)
    n, hot = len(features), F.one_hot(labels, 4).double()
    positive, negative = hardest_pairs(features, labels)
    expected = [
        features,
        0.1 * features + 0.9 * features.roll(1, 0),
        0.6 * features[positive] + 0.4 * features[negative],
    ]
    torch.testing.assert_close(mixed, torch.cat(expected).detach(), rtol=1e-6, atol=1e-6, check_dtype=False)
    soft = [hot, 0.1 * hot + 0.9 * hot.roll(1, 0), 0.6 * hot + 0.4 * hot[negative]]
    torch.testing.assert_close(targets.double(), torch.cat(soft), rtol=1e-6, atol=1e-6)
    assert mixed.shape == (3 * n, 6) and not targets.requires_grad
    # the share of the partner is raised before both are mixed
    torch.testing.assert_close(mix(features, labels, toward=0.1)[0][n : 2 * n], 0.2 * features + 0.8 * features.roll(1, 0),
                               rtol=1e-6, atol=1e-6)  # fmt: skip


def test_a_mixture_within_a_class_keeps_its_very_label():
    """Or rounding would make strangers of them: rows are compared entry by entry."""
    features, _ = batch(500, dtype=torch.float32)
    labels = torch.zeros(500, dtype=torch.int64)
    shares = torch.rand(2, 500, generator=torch.Generator().manual_seed(1))
    _, targets = mix_hard_pairs(
        features, labels, classes=4, permutation=torch.randperm(500), lam_negative=shares[0], lam_positive=shares[1]
    )
    assert torch.equal(targets, F.one_hot(torch.zeros(1500, dtype=torch.int64), 4).float())


def test_gradients_flow_through_the_mixtures_only():
    features, labels = batch()
    n = len(features)
    mixed, _ = mix(features, labels, toward=0.9, away=0.6)
    positive, negative = hardest_pairs(features, labels)
    weights = torch.randn(3 * n, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad((mixed * weights).sum(), features)
    expected = 0.1 * weights[n : 2 * n] + 0.9 * weights[n : 2 * n].roll(-1, 0)
    expected = expected.index_add(0, positive, 0.6 * weights[2 * n :]).index_add(0, negative, 0.4 * weights[2 * n :])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def by_hand(x, targets, temperature, gamma, divide_by):
    x = F.normalize(x, dim=1)
    rows = []
    for a in range(len(x)):
        others = [c for c in range(len(x)) if c != a]
        logits = x[others] @ x[a] / temperature
        log_p = logits - logits.logsumexp(0)
        positive = [k for k, c in enumerate(others) if torch.equal(targets[c], targets[a])]
        if positive:
            terms = -((1 - log_p[positive].exp()) ** gamma) * log_p[positive]
            rows.append(terms.sum() / (len(x) if divide_by == "rows" else len(positive)))
    return torch.stack(rows).mean()


@pytest.mark.parametrize("divide_by", ["rows", "positives"])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_focal_contrast_is_its_formula_with_its_gradient(divide_by, gamma):
    features, labels = batch()
    mixed, targets = mix(features, labels)
    mixed = mixed.detach().requires_grad_()
    options = {"temperature": 0.2, "gamma": gamma, "divide_by": divide_by}
    found, expected = focal_sup_con(mixed, targets, **options), by_hand(mixed, targets, *options.values())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, mixed)[0] for loss in (found, expected)))


def test_without_focus_it_is_supervised_contrast():
    features, labels = batch()
    hot = F.one_hot(labels, 4).float()
    found = focal_sup_con(features, hot, temperature=0.2, gamma=0, divide_by="positives")
    torch.testing.assert_close(found, contrast.sup_con(features, labels, temperature=0.2))


def test_the_focus_takes_most_from_pairs_that_agree():
    """Two classes of two: near pairs weigh nearly nothing, far ones nearly 1."""
    hot = F.one_hot(torch.tensor([0, 0, 1, 1]), 2).float()
    tight = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    mixed_up = torch.tensor([[1.0, 0.1], [-1.0, 0.1], [1.0, -0.1], [-1.0, -0.1]])

    def kept(x):
        return focal_sup_con(x, hot, temperature=0.5) / focal_sup_con(x, hot, temperature=0.5, gamma=0)

    assert kept(tight) < 0.1 and kept(mixed_up) > 0.9


def test_rows_without_positives_do_not_count():
    features, labels = batch()
    hot = F.one_hot(labels, 30).float()
    alone = torch.cat([hot, torch.eye(30)[10:11]])
    more = torch.cat([features, torch.randn(1, 6, dtype=torch.float64)])
    rows = focal_sup_con(more, alone, reduction="none")
    assert rows[-1] == 0
    torch.testing.assert_close(focal_sup_con(more, alone), rows[:-1].mean())
    none = focal_sup_con(features[:4], torch.eye(4))
    assert none == 0 and bool((torch.autograd.grad(none, features)[0] == 0).all())


def test_nearly_equal_labels_are_not_equal():
    features, _ = batch(4)
    near = torch.tensor([[1.0, 0.0], [1.0, 0.0], [float(np.nextafter(np.float32(1), np.float32(0))), 0.0], [0.0, 1.0]])
    rows = focal_sup_con(features, near, reduction="none")
    assert bool((rows[:2] > 0).all()) and bool((rows[2:] == 0).all())


def test_what_cannot_be_meant_is_refused():
    features, labels = batch()
    for call, message in (
        (lambda: hardest_pairs(features, labels, mining="official"), 'mining must be "masked" or "released"'),
        (lambda: hardest_pairs(features, labels[:3]), r"labels \[B\]"),
        (lambda: focal_sup_con(features, torch.eye(3)), r"targets \[M, K\]"),
        (lambda: focal_sup_con(features, torch.eye(24), gamma=0.5), "gamma must be 0 or at least 1"),
        (lambda: focal_sup_con(features, torch.eye(24), divide_by="pairs"), "divide_by must be"),
    ):
        with pytest.raises(InputError, match=message):
            call()
