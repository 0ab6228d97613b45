import math
import os
import tempfile

import pytest
import torch
from torch import nn

from counterpoint.errors import InputError
from counterpoint.memory import MomentumEncoder, Queue


def net(width=4):
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


def rows(start, count, dim=2):
    return torch.arange(start, start + count).float()[:, None].expand(count, dim).clone()


# ------------------------------------------------------------------------------------------------------------ momentum


def test_update_is_the_moving_average():
    torch.manual_seed(0)
    online = net()
    slow = MomentumEncoder(online, momentum=0.9)
    expected = [p.detach().clone() for p in online.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for p in online.parameters():
                p.add_(torch.randn_like(p))
        slow.update(online)
        expected = [0.9 * k + 0.1 * p.detach() for k, p in zip(expected, online.parameters(), strict=True)]
    for k, e in zip(slow.module.parameters(), expected, strict=True):
        torch.testing.assert_close(k, e)


def test_cosine_schedule():
    online = nn.Linear(1, 1, bias=False)
    slow = MomentumEncoder(online, momentum=0.996, final=1.0)
    for progress in (0.0, 0.25, 0.5, 1.0):
        expected = 1 - (1 - 0.996) * (math.cos(math.pi * progress) + 1) / 2
        assert slow.momentum_at(progress) == pytest.approx(expected, abs=1e-12)
    assert slow.momentum_at(0) == pytest.approx(0.996) and slow.momentum_at(1) == 1.0
    before = slow.module.weight.clone()
    online.weight.data += 1
    slow.update(online, progress=1.0)
    assert torch.equal(slow.module.weight, before)
    slow.update(online, progress=0.0)
    torch.testing.assert_close(slow.module.weight, before + 0.004)
    with pytest.raises(InputError, match="progress"):
        slow.update(online)


def test_copy_is_separate_and_without_gradient():
    online = net()
    slow = MomentumEncoder(online)
    x = torch.randn(5, 3, requires_grad=True)
    out = slow(x)
    assert not out.requires_grad and not any(p.requires_grad for p in slow.parameters())
    assert all(p.requires_grad for p in online.parameters())
    with torch.no_grad():
        online[0].weight.zero_()
    assert bool(slow.module[0].weight.any())


def test_running_statistics_are_the_copys_own():
    online = net()
    slow = MomentumEncoder(online)
    online(torch.randn(8, 3) + 10)
    before = slow.module[1].running_mean.clone()
    slow.update(online)
    assert torch.equal(slow.module[1].running_mean, before)
    slow(torch.randn(8, 3))
    assert not torch.equal(slow.module[1].running_mean, before)
    parent = nn.ModuleList([slow]).eval()
    assert not slow.module[1].training and parent.train() and slow.module[1].training


def test_another_module_is_refused_by_name_and_by_shape():
    slow = MomentumEncoder(net())
    with pytest.raises(InputError, match=r"0\.bias has shape \[5\]|0\.weight has shape \[5, 3\]"):
        slow.update(net(5))
    with pytest.raises(InputError, match=r"only the copy has a parameter 0\.bias"):
        slow.update(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(InputError, match="between 0 and 1"):
        MomentumEncoder(net(), momentum=1.5)


def test_momentum_checkpoint():
    online = net()
    slow, other = MomentumEncoder(online), MomentumEncoder(net())
    slow(torch.randn(8, 3))
    other.load_state_dict(slow.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(slow.eval()(x), other.eval()(x))


# --------------------------------------------------------------------------------------------------------------- queue


def test_starts_with_random_unit_keys():
    queue = Queue(16, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(32))
    assert queue.keys.shape == (32, 16) and int(queue.filled) == 0 and int(queue.pointer) == 0
    assert torch.linalg.matrix_rank(queue.keys) == 16
    assert torch.equal(queue.keys, Queue(16, 32, generator=torch.Generator().manual_seed(0)).keys)


def test_first_in_first_out_with_wraparound():
    queue = Queue(2, 5)
    queue.enqueue(rows(0, 3))
    assert queue.keys[:3, 0].tolist() == [0, 1, 2] and int(queue.filled) == 3 and int(queue.pointer) == 3
    queue.enqueue(rows(3, 4))
    assert queue.keys[:, 0].tolist() == [5, 6, 2, 3, 4]
    assert int(queue.filled) == 5 and int(queue.pointer) == 2
    queue.enqueue(rows(7, 1))
    assert queue.keys[:, 0].tolist() == [5, 6, 7, 3, 4]


@pytest.mark.parametrize("batch", [1, 2, 5, 7, 12, 13])
def test_holds_the_newest_whatever_the_batch(batch):
    queue = Queue(2, 5)
    for start in range(0, 40, batch):
        queue.enqueue(rows(start, batch))
        newest = list(range(start + batch))[-5:]
        assert set(newest) <= set(queue.keys[:, 0].tolist())
        # the next to be overwritten is the oldest
        if len(newest) == 5:
            assert queue.keys[int(queue.pointer), 0] == newest[0]


def test_empty_start_gives_only_what_was_enqueued():
    queue = Queue(2, 5, start="empty")
    assert queue.keys.shape == (0, 2)
    queue.enqueue(rows(0, 3))
    assert queue.keys[:, 0].tolist() == [0, 1, 2]
    copy = Queue(2, 5, start="empty")
    copy.load_state_dict(queue.state_dict())
    assert copy.keys[:, 0].tolist() == [0, 1, 2]
    for q in (queue, copy):
        q.enqueue(rows(3, 4))
        assert len(q) == 5 and q.keys[:, 0].tolist() == [5, 6, 2, 3, 4]


def test_the_first_keys_may_be_held_whole():
    queue = Queue(2, 5, start="empty", whole_first=True)
    queue.enqueue(rows(0, 7))
    assert len(queue) == 7 and queue.keys[:, 0].tolist() == list(range(7))
    copy = Queue(2, 5, start="empty", whole_first=True)
    copy.load_state_dict(queue.state_dict())
    for q in (queue, copy):
        assert q.oldest_first[:, 0].tolist() == list(range(7))
        q.enqueue(rows(7, 2))
        assert len(q) == 5 and q.oldest_first[:, 0].tolist() == [4, 5, 6, 7, 8]
        q.enqueue(rows(9, 4))
        assert q.oldest_first[:, 0].tolist() == [8, 9, 10, 11, 12]
        q.enqueue(rows(13, 9))  # only the first push is held whole
        assert q.oldest_first[:, 0].tolist() == [17, 18, 19, 20, 21]
    older = Queue(2, 5, start="empty", whole_first=True)
    older.enqueue(rows(0, 9))
    older.load_state_dict(queue.state_dict())
    assert len(older) == 5 and torch.equal(older.oldest_first, queue.oldest_first)


@pytest.mark.parametrize("batch", [1, 3, 5, 8])
def test_oldest_first_is_the_order_of_arrival(batch):
    queue, held = Queue(2, 5, start="empty"), []
    for start in range(0, 40, batch):
        queue.enqueue(rows(start, batch))
        held = [*held, *range(start, start + batch)][-5:]
        assert queue.oldest_first[:, 0].tolist() == held


def test_clear_begins_again():
    for whole in (True, False):
        queue = Queue(2, 5, start="empty", whole_first=whole)
        queue.enqueue(rows(0, 8))
        queue.clear()
        assert len(queue) == 0 and int(queue.filled) == int(queue.pointer) == 0
        queue.enqueue(rows(20, 3))
        assert queue.oldest_first[:, 0].tolist() == [20, 21, 22]
    with pytest.raises(InputError, match="can be cleared"):
        Queue(2, 5).clear()
    with pytest.raises(InputError, match="whole_first"):
        Queue(2, 5, whole_first=True)


def test_queue_checkpoint_continues_where_it_stopped():
    queue, other = Queue(2, 5), Queue(2, 5)
    queue.enqueue(rows(0, 7))
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.enqueue(rows(7, 2))
    assert torch.equal(queue.keys, other.keys) and int(other.pointer) == 4
    assert set(queue.state_dict()) == {"bank", "pointer", "filled"}


def test_a_loss_on_the_old_keys_survives_the_enqueue():
    queue = Queue(3, 4)
    query = torch.randn(2, 3, requires_grad=True)
    keys = queue.keys
    before = keys.clone()
    loss = (query @ keys.T).exp().sum()
    queue.enqueue(torch.randn(2, 3, requires_grad=True))
    loss.backward()
    assert torch.equal(keys, before)
    torch.testing.assert_close(query.grad, (query.detach() @ before.T).exp() @ before)
    assert not queue.keys.requires_grad


def test_half_precision_keys_are_taken_and_other_lengths_refused():
    queue = Queue(3, 4)
    queue.enqueue(torch.ones(1, 3, dtype=torch.bfloat16))
    assert queue.keys.dtype == torch.float32 and queue.keys[0].tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="length 3"):
        queue.enqueue(torch.ones(1, 4))
    with pytest.raises(InputError, match="at least 1"):
        Queue(3, 0)
    with pytest.raises(InputError, match="random"):
        Queue(3, 4, start="zeros")


def _enqueue_on_each_rank(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    queue = Queue(2, 6, generator=torch.Generator().manual_seed(0))
    queue.enqueue(rows(0, 3) if rank == 0 else rows(3, 1))
    queue.enqueue(rows(10, 1) if rank == 0 else rows(11, 2))
    torch.save({"keys": queue.keys, "pointer": queue.pointer}, os.path.join(results, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_all_processes_hold_the_keys_of_all_in_rank_order():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_enqueue_on_each_rank, (os.path.join(folder, "store"), folder), nprocs=2)
        first, second = (torch.load(os.path.join(folder, f"{rank}.pt")) for rank in (0, 1))
    assert torch.equal(first["keys"], second["keys"]) and int(first["pointer"]) == int(second["pointer"]) == 1
    assert first["keys"][:, 0].tolist() == [12, 1, 2, 3, 10, 11]
