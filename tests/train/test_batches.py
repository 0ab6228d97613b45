"""Batches of one group: the released sampler's semantics, purity, and an order that a position alone resumes."""

import pytest
import torch

from counterpoint.data import Images
from counterpoint.errors import InputError
from counterpoint.train.batches import Batches, grouped_batches


def by_hand(groups, permutations, batch_size, world_size, rank):
    """Lists that are popped from, one item at a time."""
    lists, start = [], 0
    for c in range(max(groups) + 1):
        members = [i for i, group in enumerate(groups) if group == c]
        drawn = [members[j] for j in permutations[start : start + len(members)]]
        start += len(members)
        kept = drawn[: len(members) // world_size // batch_size * batch_size * world_size]
        lists.append(kept[rank::world_size])
    found = []
    while any(lists):
        for mine in lists:
            if mine:
                found.append([mine.pop() for _ in range(batch_size)])
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 3), (2, 4), (3, 2)])
def test_grouped_batches_are_the_released_sampler(seed, world_size, batch_size):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 5, (60,), generator=generator)
    groups[groups == 3] = 4  # an empty group
    groups[0] = 4
    counts = groups.bincount().tolist()
    drawn = torch.cat([torch.randperm(count, generator=generator) for count in counts])
    taken = []
    for rank in range(world_size):
        found = grouped_batches(groups, drawn, batch_size, world_size=world_size, rank=rank)
        assert found.tolist() == by_hand(groups.tolist(), drawn.tolist(), batch_size, world_size, rank)
        assert (groups[found] == groups[found[:, :1]]).all()
        taken += found.flatten().tolist()
    assert len(taken) == len(set(taken))  # no item twice, on any rank


GROUPS = torch.tensor([0] * 23 + [1] * 9 + [2] * 3 + [3] * 14)[
    torch.randperm(49, generator=torch.Generator().manual_seed(5))
]


def items(n=49):
    return Images(torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 2, 2).contiguous())


def batches(rank=0, ranks=1, **options):
    made = Batches(items(), 4, seed=2, **options).to(torch.device("cpu"), rank, ranks)
    made.grouping = lambda epoch, _: GROUPS if epoch else None
    return made


def test_an_epoch_of_groups():
    made = batches()
    plain = [batch["index"] for batch in made]
    assert len(plain) == 12 and any(len(GROUPS[index].unique()) > 1 for index in plain)
    pure = [batch["index"] for batch in made]
    assert len(pure) == 12  # as many as in any epoch
    assert all(len(GROUPS[index].unique()) == 1 for index in pure)
    assert {int(GROUPS[index[0]]) for index in pure} == {0, 1, 3}  # three items make no batch of four
    assert [int(GROUPS[index[0]]) for index in pure[:6]] == [0, 1, 3, 0, 1, 3]
    assert len(torch.cat(pure[:10]).unique()) == 40  # the first pass (5 + 2 + 3 batches) repeats nothing
    third = [batch["index"] for batch in made]
    assert not torch.equal(torch.cat(third), torch.cat(pure))
    again = batches()
    again.epoch, again.batch = 1, 5  # where a stopped run stood
    assert torch.equal(torch.cat([batch["index"] for batch in again]), torch.cat(pure[5:]))


def test_ranks_share_the_batches_of_one_group():
    whole = batches()
    whole.epoch = 1
    parts = [batches(rank, 2) for rank in range(2)]
    for part in parts:
        part.epoch = 1
    for batch, one, two in zip(whole, *parts, strict=True):
        assert torch.equal(batch["index"], torch.cat([one["index"], two["index"]]))


def test_groups_that_are_too_small_are_named():
    made = batches()
    made.grouping = lambda *_: torch.arange(49) // 3
    with pytest.raises(InputError, match="the largest of 17 groups has 3 items, and batches of one group need 4"):
        next(iter(made))


def test_items_of_a_group_below_zero_sit_the_epoch_out():
    made = Batches(items(), 4, seed=2)
    out = torch.arange(49) % 3 == 0
    made.grouping = lambda epoch, _: torch.where(out, -1, 0) if epoch == 1 else torch.zeros(49, dtype=torch.int64)
    first, second, third = ([batch["index"] for batch in made] for _ in range(3))
    assert len(first) == len(second) == len(third) == 12  # as many batches, of fewer items
    assert not out[torch.cat(second)].any() and out[torch.cat(first)].any() and out[torch.cat(third)].any()
    assert torch.cat(second[:8]).unique().numel() == 32 == int((~out).sum())  # each once, and then again
    made.grouping = lambda *_: torch.full((49,), -1)
    with pytest.raises(InputError, match="batches of one group need 4"):
        next(iter(made))
