"""Views of histories against what their definitions allow, per sample."""

import math

import pytest
import torch

from counterpoint.errors import InputError
from counterpoint.views.sequence import SequenceViews, crop, mask, reorder

L = 20


def batch(size=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, L + 1, (size,), generator=generator)
    seq = torch.stack([torch.randperm(100, generator=generator)[:L] + 1 for _ in range(size)])
    return seq.masked_fill(torch.arange(L) >= length[:, None], 0), length


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("share", [0.5, 0.3, 1.0])
def test_crop_keeps_items_in_a_row_at_the_front(share):
    seq, length = batch()
    cropped, kept = crop(seq, length, share, generator())
    begins = []
    for before, n, after, m in zip(seq.tolist(), length.tolist(), cropped.tolist(), kept.tolist(), strict=True):
        assert m == (1 if n == 1 else max(1, math.floor(share * n)))
        assert after[m:] == [0] * (L - m)
        begin = before.index(after[0])
        assert begin + m <= n and before[begin : begin + m] == after[:m]
        if n == L:
            begins.append(begin)
    if share == 0.5:
        assert min(begins) <= 2 and max(begins) >= L - L // 2 - 2  # from anywhere


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_mask_hides_its_share(share):
    seq, length = batch()
    masked, after = mask(seq, length, share, generator())
    assert torch.equal(after, length)
    hidden = (seq != 0) & (masked == 0)
    expected = [0 if n == 1 else math.floor(share * n) for n in length.tolist()]
    assert hidden.sum(1).tolist() == expected
    assert torch.equal(torch.where(hidden, seq, masked), seq)
    full = hidden[length == L].float().mean(0)
    assert (full > 0).all() and full.std() < 0.25  # every place, the last one too


@pytest.mark.parametrize("share", [0.8, 0.4])
def test_reorder_shuffles_one_window(share):
    seq, length = batch()
    shuffled, after = reorder(seq, length, share, generator())
    assert torch.equal(after, length)
    moved = 0
    for before, n, now in zip(seq.tolist(), length.tolist(), shuffled.tolist(), strict=True):
        assert sorted(before) == sorted(now) and now[n:] == before[n:]
        changed = [i for i in range(n) if before[i] != now[i]]
        window = 0 if n == 1 else math.floor(share * n)
        assert not changed or changed[-1] - changed[0] < window
        moved += bool(changed)
    assert moved > 0.8 * int((length > 3).sum())


def test_reorder_reaches_every_order():
    seq = torch.tensor([[1, 2, 3]]).repeat(2000, 1)
    orders, count = reorder(seq, torch.full((2000,), 3), 1.0, generator())[0].unique(dim=0, return_counts=True)
    assert len(orders) == 6 and count.min() > 2000 / 6 * 0.8


def test_shares_round_down_as_double_precision_does():
    length = torch.arange(1, L + 1)
    seq = torch.arange(1, L + 1).repeat(L, 1).masked_fill(torch.arange(L) >= length[:, None], 0)
    for share in (0.1, 0.2, 0.6, 0.7, 0.8):
        hidden = ((seq != 0) & (mask(seq, length, share, generator())[0] == 0)).sum(1)
        assert hidden.tolist() == [0, *(math.floor(share * n) for n in range(2, L + 1))]


def test_a_single_item_stays():
    seq, length = torch.zeros(50, L, dtype=torch.int64), torch.ones(50, dtype=torch.int64)
    seq[:, 0] = torch.arange(1, 51)
    for view, kept in SequenceViews()(seq, length, generator()):
        assert torch.equal(view, seq) and torch.equal(kept, length)


def told(seq, length, view, kept):
    """Which operator made a view of a long history of distinct items."""
    if kept != length:
        return "crop"
    return "mask" if (view[:length] == 0).any() else "reorder"


def test_the_two_views_come_from_different_operators_all_pairs_alike():
    seq = torch.stack([torch.randperm(100, generator=generator(i))[:L] + 1 for i in range(1200)])
    length = torch.full((1200,), L)
    one, two = SequenceViews()(seq, length, generator())
    pairs = [
        (told(s, L, a, m), told(s, L, b, n)) for s, a, m, b, n in zip(seq, one[0], one[1], two[0], two[1], strict=True)
    ]
    counts = {pair: pairs.count(pair) for pair in set(pairs)}
    assert len(counts) == 6 and all(first != second for first, second in counts)
    assert min(counts.values()) > 140 and max(counts.values()) < 260
    assert not all(torch.equal(one[0][i], one[0][0]) for i in range(5))


def test_one_operator_serves_both_views():
    seq, length = batch()
    (one, kept), (two, kept2) = SequenceViews(operators=("mask",))(seq, length, generator())
    assert torch.equal(kept, length) and torch.equal(kept2, length) and not torch.equal(one, two)


def test_views_follow_their_generator_and_leave_the_input_alone():
    seq, length = batch()
    before = seq.clone()
    first, again, other = (SequenceViews()(seq, length, generator(seed))[0][0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(seq, before)


def test_bad_choices():
    with pytest.raises(InputError, match="crop is a share of a history"):
        SequenceViews(crop=0.0)
    with pytest.raises(InputError, match='no operator named "insert"'):
        SequenceViews(operators=("insert",))
    with pytest.raises(InputError, match="need one of the operators"):
        SequenceViews(operators=())
