"""Contrast of places: near in the image, whatever the crops and mirrors; against sums written out location by location."""

import math

import pytest
import torch

from counterpoint.contrast import unit
from counterpoint.contrast.pixel import bin_distances, pixel_consistency, pixel_contrast
from counterpoint.errors import InputError

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
MIRRORED = torch.tensor([[1.0, 0.0, 0.0, 1.0]])


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = 0.4 + 0.4 * torch.rand(count, 2, generator=generator)
    corner = (1 - size) * torch.rand(count, 2, generator=generator)
    box = torch.cat([corner, corner + size], dim=1).double()
    mirrored = torch.arange(count) % 2 == 1
    return torch.where(mirrored[:, None], box[:, [2, 1, 0, 3]], box)


def by_hand(q, k, box_q, box_k, near):
    """Similarity of every pair of locations of one item, and whether they are near."""
    found = []
    for r in range(q.shape[1]):
        for c in range(q.shape[2]):
            row = []
            for s in range(k.shape[1]):
                for d in range(k.shape[2]):
                    places, diagonals = [], []
                    for box, y, x, m in ((box_q, r, c, q), (box_k, s, d, k)):
                        left, top, right, bottom = box.tolist()
                        wide, high = (right - left) / m.shape[2], (bottom - top) / m.shape[1]
                        places.append((left + (x + 0.5) * wide, top + (y + 0.5) * high))
                        diagonals.append(math.hypot(wide, high))
                    row.append((q[:, r, c] @ k[:, s, d], math.dist(*places) / max(diagonals) < near))
            found.append(row)
    return found


@pytest.mark.parametrize("near", [0.3, 0.7, 1.5])
def test_both_losses_are_their_sums(near):
    q, k = maps(4, 3, 3, 2).requires_grad_(), maps(4, 3, 2, 4, seed=1)
    box_q, box_k = boxes(4), boxes(4, seed=5)
    box_k[3] = torch.tensor([0.0, 0.0, 0.05, 0.05])  # far from the other view: no near locations
    box_q[3] = torch.tensor([0.9, 0.9, 1.0, 1.0])
    consistency, contrast = [], []
    for b in range(4):
        pairs = by_hand(unit(q[b].permute(1, 2, 0)).permute(2, 0, 1), unit(k[b].permute(1, 2, 0)).permute(2, 0, 1),
                        box_q[b], box_k[b], near)  # fmt: skip
        positive = [s for row in pairs for s, is_near in row if is_near]
        zero = 0.0 * q.sum()
        consistency.append(-2 * torch.stack(positive).mean() if positive else zero)
        terms = []
        for row in pairs:
            every = torch.stack([s for s, _ in row]) / 0.3
            mine = [s / 0.3 for s, is_near in row if is_near]
            if mine:
                terms.append(every.logsumexp(0) - torch.stack(mine).logsumexp(0))
        contrast.append(torch.stack(terms).mean() if terms else zero)
    for loss, expected in ((pixel_consistency, consistency), (pixel_contrast, contrast)):
        found = loss(q, k, box_q, box_k, near=near, reduction="none")
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-7)
        ours, theirs = (torch.autograd.grad(x, q, retain_graph=True)[0] for x in (found.mean(), sum(expected) / 4))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        assert found[3] == 0 and loss(q, k, box_q, box_k, near=near) == found.mean()


def test_a_view_is_nearest_to_itself_and_to_its_mirror_image():
    size = (4, 4)
    same = bin_distances(WHOLE, WHOLE, size, size)[0]
    assert torch.equal(same.diagonal(), torch.zeros(16)) and (same + torch.eye(16)).min() > 0.7
    torch.testing.assert_close(same[0, 1], torch.tensor(1 / math.sqrt(2)))  # the neighbour: no positive at 0.7
    mirrored = bin_distances(WHOLE, MIRRORED, size, size)[0].view(4, 4, 4, 4)
    for row in range(4):
        for column in range(4):
            assert mirrored[row, column, row, 3 - column] < 1e-6


def test_the_larger_bins_are_the_measure():
    """Of a crop of a quarter all four locations are near the one location of the whole image that holds them."""
    quarter = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    distance = bin_distances(WHOLE, quarter, (2, 2), (2, 2))
    torch.testing.assert_close(distance[0, 0], torch.full((4,), 0.25))
    assert (distance[0, 1:] > 0.5).all()
    assert torch.equal(bin_distances(quarter, WHOLE, (2, 2), (2, 2)), distance.transpose(1, 2))


def test_what_is_the_same_place_agrees_best():
    """Features that are a function of the place alone: the right mirror and crop give the lowest loss."""

    def seen(box):
        left, top, right, bottom = box[0].tolist()
        share = (torch.arange(8) + 0.5) / 8
        x, y = left + share * (right - left), top + share * (bottom - top)
        x, y = x.expand(8, 8), y[:, None].expand(8, 8)
        return torch.stack([f(3 * z) for f in (torch.sin, torch.cos) for z in (x, y)])[None]

    crop = torch.tensor([[0.9, 0.1, 0.3, 0.8]])
    right = pixel_consistency(seen(WHOLE), seen(crop), WHOLE, crop)
    for wrong in (torch.tensor([[0.3, 0.1, 0.9, 0.8]]), torch.tensor([[0.6, 0.4, 0.0, 1.0]])):
        assert right < pixel_consistency(seen(WHOLE), seen(crop), WHOLE, wrong) - 0.01


def test_keys_are_constants_and_half_precision_is_summed_in_full():
    q, k = maps(2, 3, 4, 4).requires_grad_(), maps(2, 3, 4, 4, seed=1).requires_grad_()
    box = boxes(2)
    for loss in (pixel_consistency, pixel_contrast):
        assert torch.autograd.grad(loss(q, k, box, box), k, allow_unused=True)[0] is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert loss(q.bfloat16(), k.bfloat16(), box.float(), box.float()).dtype == torch.float32


def test_what_does_not_fit_is_refused():
    q, box = maps(2, 3, 4, 4), boxes(2)
    with pytest.raises(InputError, match=r"maps \[N, C, H, W\] of equal N and C"):
        pixel_consistency(q, maps(2, 5, 4, 4), box, box)
    with pytest.raises(InputError, match="each of 2 views needs a box of four numbers"):
        pixel_consistency(q, q, box, boxes(3))
