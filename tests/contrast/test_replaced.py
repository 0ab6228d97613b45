"""Replaced token detection counts every real token, and a lucky guess of the generator is an original."""

import math

import pytest
import torch

from counterpoint.contrast.replaced import replaced, replaced_token_loss
from counterpoint.errors import InputError


def case(seed=0, rows=4, length=6):
    g = torch.Generator().manual_seed(seed)
    original = torch.randint(5, 50, (rows, length), generator=g)
    ids = torch.where(
        torch.rand(rows, length, generator=g) < 0.4, torch.randint(5, 50, (rows, length), generator=g), original
    )
    mask = (torch.arange(length) < torch.tensor([[6], [3], [5], [1]])).long()
    return torch.randn(rows, length, generator=g, dtype=torch.float64), ids, original, mask


def test_against_a_loop():
    logits, ids, original, mask = case()
    terms = []
    for i in range(4):
        for t in range(int(mask[i].sum())):
            x, y = logits[i, t].item(), float(ids[i, t] != original[i, t])
            terms.append(math.log1p(math.exp(-x)) + (1 - y) * x)
    loss = replaced_token_loss(logits, ids, original, mask)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    assert replaced_token_loss(logits, ids, original, mask, reduction="sum").item() == pytest.approx(
        sum(terms), rel=1e-12
    )


def test_a_sampled_token_that_is_right_is_an_original():
    ids = torch.tensor([[1, 7, 9, 2]])
    assert replaced(ids, torch.tensor([[1, 7, 8, 2]])).tolist() == [[False, False, True, False]]
    sure = torch.full((1, 4), -30.0)
    assert replaced_token_loss(sure, ids, ids, torch.ones(1, 4)) < 1e-6


def test_every_real_token_gets_gradient_and_the_padding_none():
    logits, ids, original, mask = case(1)
    logits.requires_grad_()
    g = torch.autograd.grad(replaced_token_loss(logits, ids, original, mask), logits)[0]
    assert torch.equal(g != 0, mask > 0)
    real = mask > 0
    assert (g[real & (ids != original)] < 0).all() and (g[real & (ids == original)] > 0).all()
    changed = logits.detach().masked_fill(~real, 1e4)
    torch.testing.assert_close(
        replaced_token_loss(changed, ids, original, mask), replaced_token_loss(logits, ids, original, mask)
    )


def test_nothing_real_is_no_loss_and_half_precision_is_widened():
    logits, ids, original, mask = case(2)
    assert replaced_token_loss(logits, ids, original, torch.zeros_like(mask)) == 0
    assert replaced_token_loss(logits.half(), ids, original, mask).dtype == torch.float32


def test_shapes_that_differ_are_refused():
    logits, ids, original, mask = case()
    with pytest.raises(InputError, match="must be of one shape"):
        replaced_token_loss(logits[:, :3], ids, original, mask)
