"""Router losses: known values, and who gets gradient."""

import pytest
import torch

from counterpoint.contrast.routing import load_balancing, specified_expert
from counterpoint.errors import InputError


def test_balance_is_one_when_all_experts_are_used_alike_and_e_when_one_gets_everything():
    even = 50 * torch.eye(4)[None]
    assert load_balancing(even).item() == pytest.approx(1, abs=1e-5)
    assert load_balancing(50 * torch.eye(4)[:1].expand(1, 8, 4)).item() == pytest.approx(4, abs=1e-5)


def test_balance_pools_over_layers_and_pushes_down_what_is_used_most():
    torch.manual_seed(0)
    logits = torch.randn(3, 10, 4, requires_grad=True)
    rows = logits.flatten(0, 1)
    share = rows.argmax(1).bincount(minlength=4) / 30
    expected = sum(4 * rows.softmax(1)[:, e].mean() * share[e] for e in range(4))
    torch.testing.assert_close(load_balancing(logits), expected)
    (gradient,) = torch.autograd.grad(load_balancing(logits), logits)
    assert gradient.sum((0, 1))[share.argmax()] > 0 > gradient.sum((0, 1))[share.argmin()]


def test_the_specified_expert_is_learned_from_the_mean_of_the_layers():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 3, requires_grad=True), torch.tensor([0, 1, 2, 1, 0])
    loss = specified_expert(logits, labels)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.mean(0), labels))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient.gather(2, labels[None, :, None].expand(2, 5, 1)) < 0).all()  # towards the right one in every layer


def test_bad_input():
    with pytest.raises(InputError, match=r"\[layers, sentences, experts\]"):
        load_balancing(torch.ones(3, 4))
    with pytest.raises(InputError, match=r"labels must be int64 \[5\]"):
        specified_expert(torch.ones(2, 5, 3), torch.zeros(4, dtype=torch.int64))
