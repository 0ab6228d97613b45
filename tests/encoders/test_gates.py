"""The gate of a pair of classes: symmetric, open or shut by degrees, learned."""

import pytest
import torch

from counterpoint.encoders.gates import PairGate
from counterpoint.errors import InputError


def gate(**options) -> PairGate:
    torch.manual_seed(0)
    return PairGate(5, 8, 6, 12, **options)


@pytest.mark.parametrize("fuse", [True, False])
def test_the_order_of_the_two_classes_does_not_matter(fuse):
    found, (one, other) = gate(fuse=fuse), torch.randint(5, (2, 20))
    torch.testing.assert_close(found(one, other), found(other, one))
    values = found(one, other)
    assert values.shape == (20, 8) and bool(((values > 0) & (values < 1)).all())


def test_fused_looks_at_the_mean_and_unfused_multiplies():
    one, other = torch.randint(5, (2, 20))
    fused, apart = gate().eval(), gate(fuse=False).eval()
    mean = (fused.embedding(one) + fused.embedding(other)) / 2
    torch.testing.assert_close(fused(one, other), fused.layers(mean))
    torch.testing.assert_close(fused(one, one), fused.layers(fused.embedding(one)))
    torch.testing.assert_close(apart(one, other), apart(one, one).sqrt() * apart(other, other).sqrt())


def test_different_pairs_open_different_dimensions_and_everything_learns():
    found = gate()
    one, other = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    values = found(one, other)
    assert len(values.detach().round(decimals=5).unique(dim=0)) == 15  # unordered pairs of five, the identical ones too
    values.square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in found.parameters())


def test_after_training_a_pair_has_one_gate_whatever_else_is_asked():
    found, one, other = gate(), torch.arange(5), torch.arange(5).flip(0)
    for _ in range(3):
        found(one, other)
    found.eval()
    torch.testing.assert_close(found(one, other)[:1], found(one[:1], other[:1]))
    torch.testing.assert_close(found.between(one, other), found(one, other).mean(1))


def test_one_pair_has_no_statistics():
    with pytest.raises(InputError, match="at least two samples"):
        gate()(torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(InputError, match="positive sizes"):
        PairGate(0)
