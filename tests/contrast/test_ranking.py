"""Multiple negatives ranking and the CLIP loss whose targets are read off the embeddings, against their definitions."""

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from counterpoint import contrast
from counterpoint.errors import InputError


def vectors(n=6, d=4, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(size * torch.randn(n, d, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)]


def plain(a, b, t):
    """Row by row, as the paper's code has it; also the targets."""
    n = len(a)
    share = ((a @ a.T + b @ b.T) / 2 * t).softmax(1).detach()
    there = [max(range(n), key=lambda j: (share[i, j].item(), -j)) for i in range(n)]
    back = [max(range(n), key=lambda i: (share[i, j].item(), -i)) for j in range(n)]
    logits = a @ b.T / t
    loss = (cross_entropy(logits, torch.tensor(there)) + cross_entropy(logits.T, torch.tensor(back))) / 2
    return loss, there, back


@pytest.mark.parametrize("size", [0.2, 0.5, 1.0, 6.0])
@pytest.mark.parametrize("seed", range(3))
def test_relabelled_clip_is_its_definition(size, seed):
    a, b = vectors(size=size, seed=seed)
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    found, (expected, _, _) = contrast.relabelled_clip(a, b, temperature=t, normalize=False), plain(a, b, t)
    torch.testing.assert_close(found, expected)
    inputs = (a, b, t)
    for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_short_vectors_have_targets_off_the_diagonal_and_long_ones_do_not():
    a, b = (x * torch.linspace(0.1, 2, 6)[:, None] for x in vectors(seed=3))  # long ones draw short ones to them
    expected, there, back = plain(a, b, 0.7)
    assert there != list(range(6)) and there != back
    torch.testing.assert_close(contrast.relabelled_clip(a, b, temperature=0.7, normalize=False), expected)
    a, b = (30 * normalize(x, dim=1) for x in (a, b))
    clip = contrast.clip_loss(a, b, temperature=0.7, normalize=False)
    torch.testing.assert_close(contrast.relabelled_clip(a, b, temperature=0.7, normalize=False), clip)


def test_on_the_sphere_it_is_the_loss_of_clip():
    a, b = vectors(n=20)
    torch.testing.assert_close(
        contrast.relabelled_clip(a, b, temperature=0.2), contrast.clip_loss(a, b, temperature=0.2)
    )


def test_of_equal_targets_the_first_counts():
    a, b = torch.zeros(3, 2), torch.eye(3, 2)
    a[2], b[2] = a[1], b[1]  # rows 1 and 2 are one pair
    logits = a @ b.T / 0.5
    expected = plain(a, b, 0.5)
    assert expected[1][2] == 1
    torch.testing.assert_close(contrast.relabelled_clip(a, b, temperature=0.5, normalize=False), expected[0])
    assert logits.shape == (3, 3)


def test_exchanging_the_sides_changes_nothing_on_the_sphere():
    a, b = vectors(n=9)
    torch.testing.assert_close(contrast.relabelled_clip(a, b), contrast.relabelled_clip(b, a))


def test_mnr_is_a_softmax_of_scaled_cosines_in_one_direction():
    a, b = vectors(n=7)
    cosine = normalize(a, dim=1) @ normalize(b, dim=1).T
    torch.testing.assert_close(contrast.mnr(a, b), cross_entropy(20 * cosine, torch.arange(7)))
    torch.testing.assert_close(contrast.mnr(a, b, scale=1.0, normalize=False), cross_entropy(a @ b.T, torch.arange(7)))
    assert not torch.allclose(contrast.mnr(a, b), contrast.mnr(b, a))


def test_bad_input():
    with pytest.raises(InputError, match="row i is paired with row i, but there are 2 and 3"):
        contrast.relabelled_clip(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(InputError, match="scale must be positive"):
        contrast.mnr(torch.ones(2, 3), torch.ones(2, 3), scale=0)
