"""Ranking metrics against sorting by hand."""

import math

import pytest
import torch

from counterpoint.errors import InputError
from counterpoint.evaluate import ranking
from counterpoint.evaluate.ranking import loo_full_ranking, measure, target_ranks
from counterpoint.methods.recommendation.sasrec import SASRec


def brute_force(users, items, target, seen=None):
    metrics = {f"{name}@{k}": [] for k in (5, 10, 20) for name in ("HR", "NDCG", "MRR")}
    for row, (user, right) in enumerate(zip(users, target.tolist(), strict=True)):
        ranked = [j for j in range(1, len(items)) if seen is None or j == right or j not in seen[row].tolist()]
        ranked.sort(key=lambda j: -float(user @ items[j]))
        rank = ranked.index(right) + 1
        for k in (5, 10, 20):
            hit = rank <= k
            metrics[f"HR@{k}"].append(float(hit))
            metrics[f"NDCG@{k}"].append(1 / math.log2(rank + 1) if hit else 0.0)
            metrics[f"MRR@{k}"].append(1 / rank if hit else 0.0)
    return {name: 100 * sum(values) / len(values) for name, values in metrics.items()}


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(61, 8, generator=generator, dtype=torch.float32)
    target = torch.randint(1, 61, (40,), generator=generator)
    users = torch.randn(40, 8, generator=generator) + 0.8 * items[target]
    items[0] *= 100  # the padding would win every time
    return users, items, target


@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("block", [1, 200, 2**20])
def test_metrics_are_those_of_sorting(task, remove, block, monkeypatch):
    monkeypatch.setitem(ranking.BLOCK, "cpu", block)
    users, items, target = task
    seen = None
    if remove:
        seen = torch.randint(0, 61, (40, 30), generator=torch.Generator().manual_seed(1))
        seen[:5, 0] = target[:5]  # bought again: the target itself is ranked all the same
    result = loo_full_ranking(users, items, target, seen=seen)
    expected = brute_force(users, items, target, seen)
    assert {name: result.detail[name] for name in expected} == pytest.approx(expected)
    assert result.value == pytest.approx(expected["NDCG@20"]) and result.metric == "NDCG@20" and result.n == 40
    assert result.ci[0] < result.value < result.ci[1]
    assert result.detail["items"] == 60
    assert 0 < result.value < 100


def test_other_rankings_are_other_protocols(task):
    users, items, target = task
    names = [
        loo_full_ranking(users, items, target, split=split, seen=seen).protocol
        for split in ("test", "valid")
        for seen in (None, target[:, None])
    ]
    assert names == [
        "loo-full-ranking",
        "loo-full-ranking-unseen",
        "loo-full-ranking-valid",
        "loo-full-ranking-valid-unseen",
    ]


def test_constant_scores_stand_in_the_middle():
    rank = target_ranks(torch.ones(3, 2), torch.ones(101, 2), torch.tensor([1, 50, 100]))
    assert rank.tolist() == [50.5] * 3


def test_ties_share_their_places():
    items = torch.tensor([[9.0], [3.0], [2.0], [2.0], [1.0]])
    assert target_ranks(torch.ones(4, 1), items, torch.tensor([1, 2, 3, 4])).tolist() == [1, 2.5, 2.5, 4]


def test_bad_input(task):
    users, items, target = task
    with pytest.raises(InputError, match="targets are item codes from 1 to 60"):
        target_ranks(users, items, target * 0)
    with pytest.raises(InputError, match="targets are item codes from 1 to 60"):
        target_ranks(users, items, target * 0 + 61)
    with pytest.raises(InputError, match="users have 8 columns but items 5"):
        target_ranks(users, items[:, :5], target)
    with pytest.raises(InputError, match=r"targets of shape \[39\]"):
        target_ranks(users, items, target[1:])
    with pytest.raises(InputError, match="1 of 40 rows of the user features hold NaN"):
        target_ranks(users.index_fill(0, torch.tensor(3), torch.nan), items, target)
    with pytest.raises(InputError, match='not "train"'):
        loo_full_ranking(users, items, target, split="train")


def test_vectors_come_back_in_the_order_of_the_rows():
    torch.manual_seed(0)
    lists = [list(range(1, 3 + i % 9)) for i in range(50)]
    method = SASRec(dim=8, hidden=16, dropout=0.0)
    rows = method.read(lists, "test")
    vectors = ranking.user_vectors(method, rows, batch_size=7)
    assert method.training  # as it was
    method.eval()
    for i in range(len(rows)):
        torch.testing.assert_close(vectors[i], method.embed(rows.take(torch.tensor([i])))[0].detach())


def test_measure_gives_every_subject_and_split():
    torch.manual_seed(0)
    lists = [[1, 2, 3, 1, 2], [2, 3, 1, 2, 3], [3, 1, 2, 3, 1], [1, 2], [2, 3, 4]]
    method, start = SASRec(dim=8, hidden=16), SASRec(dim=8, hidden=16)
    results = measure({"trained": method, "untrained": start}, lists, splits=("valid", "test"))
    assert [(r.protocol, r.subject) for r in results] == [
        (f"loo-full-ranking{split}", subject)
        for split in ("-valid", "")
        for subject in ("trained", "untrained", "popularity")
    ]
    test = results[-1]
    assert test.n == 4 and test.detail["users_not_measured"] == 1
    assert test.detail["targets_not_in_training"] == 1  # item 4
    # training parts: 123 231 312 12 2: counts 4, 5, 3, 0; targets 2, 3, 1, 4 rank 1, 3, 2, 4
    ranks = [1, 3, 2, 4]
    assert test.detail["NDCG@5"] == pytest.approx(100 * sum(1 / math.log2(1 + r) for r in ranks) / 4)
    fresh = measure({"trained": method}, lists, remove_history=True)
    assert fresh[0].protocol == "loo-full-ranking-unseen"


def test_a_model_is_measured_on_other_data_by_the_names_of_its_items():
    torch.manual_seed(0)
    method = SASRec(dim=8, hidden=16)
    method.read([["a", "b", "c", "d"]])
    (trained, _) = measure({"trained": method}, [["d", "b", "x", "a"], ["a", "b", "x"]])
    assert trained.n == 1 and trained.detail["users_not_measured"] == 1 and trained.detail["items"] == 4
    rows = method.read([["d", "b", "x", "a"]], "test")
    assert rows.take(torch.tensor([0]))["item_seq"][0, :3].tolist() == [4, 2, 0]
