"""Token states: the margin between them by loops, its gradient, and isotropy as its measure."""

import pytest
import torch

from counterpoint.contrast import isotropy, token_margin
from counterpoint.errors import InputError


def by_loops(hidden, mask, margin):
    total, pairs = 0.0, 0
    for states, counts in zip(hidden, mask, strict=True):
        n = int(counts.sum())
        pairs += n * (n - 1)
        for i in range(n):
            for j in range(n):
                if i != j and counts[i]:
                    cosine = torch.cosine_similarity(states[i], states[j], dim=0)
                    total = total + (margin - 1 + cosine).clamp(min=0)
    return total / pairs


@pytest.fixture
def states():
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5


def test_the_margin_by_loops_and_its_gradient(states):
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    states.requires_grad_()
    found = token_margin(states, mask, margin=0.5)
    expected = by_loops(states, mask, 0.5)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(loss, states)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs)
    assert ours[1, 3:].abs().sum() == ours[2].abs().sum() == 0  # padding, and a text of one token


def test_a_masked_token_inside_a_text_is_no_anchor_but_counts(states):
    mask = torch.tensor([[1, 0, 1, 1, 0]] * 3)
    torch.testing.assert_close(token_margin(states, mask, margin=0.9), by_loops(states, mask, 0.9))


def test_limits():
    same, apart = torch.ones(2, 4, 3), torch.eye(4).expand(2, 4, 4)
    every = torch.ones(2, 4)
    assert token_margin(same, every, margin=0.5) == pytest.approx(0.5)
    assert token_margin(apart, every, margin=0.5) == 0 and token_margin(apart, every, margin=1.5) == pytest.approx(0.5)
    assert token_margin(torch.ones(2, 1, 3), torch.ones(2, 1)) == 0  # no pair: not 0 / 0


def test_a_step_down_the_gradient_raises_isotropy(states):
    states = states + 2
    mask, lengths = torch.ones(3, 5), torch.tensor([5, 5, 5])
    before = isotropy(states.flatten(0, 1), lengths)
    moved = states.clone().requires_grad_()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(token_margin(moved, mask), moved)
        moved = (moved - 5.0 * gradient).detach().requires_grad_()
    assert isotropy(moved.detach().flatten(0, 1), lengths) > before + 0.1


def test_isotropy_is_pooled_over_the_pairs_of_each_text(states):
    rows, lengths = states.flatten(0, 1)[:9], torch.tensor([5, 1, 3])
    cosines = []
    for text in rows.split(lengths.tolist()):
        cosines += [
            torch.cosine_similarity(a, b, dim=0) for i, a in enumerate(text) for j, b in enumerate(text) if i != j
        ]
    assert isotropy(rows, lengths).item() == pytest.approx(1 - float(torch.stack(cosines).mean()), rel=1e-9)
    assert isotropy(torch.ones(4, 3), torch.tensor([4])).item() == pytest.approx(0, abs=1e-9)
    assert isotropy(torch.eye(4), torch.tensor([4])).item() == pytest.approx(1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: token_margin(torch.ones(2, 3, 4), torch.ones(2, 4)), r"hidden is \[B, L, E\]"),
        (lambda: token_margin(torch.ones(2, 3, 4), torch.ones(2, 3), margin=3.0), "margin must lie between"),
        (lambda: isotropy(torch.ones(4, 3), torch.tensor([3])), "lengths sum to 3, but there are 4"),
        (lambda: isotropy(torch.ones(2, 3), torch.tensor([1, 1])), "a text of at least two tokens"),
    ],
)
def test_it_refuses(call, message):
    with pytest.raises(InputError, match=message):
        call()
