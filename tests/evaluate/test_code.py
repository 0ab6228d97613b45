"""Code search against brute force: ranks, ties, candidates, domains, and which data can be searched."""

import itertools

import numpy as np
import pytest
import torch

from counterpoint.data import domains, texts
from counterpoint.errors import InputError
from counterpoint.evaluate import code
from counterpoint.evaluate.image_text import reciprocal_rank, standing

ROWS = texts.Texts({"anchor": ["a", "b", "a", "", "c"], "positive": ["A", "B", "A2", "X", ""]}, name="own")


def table(vectors):
    """An encoder that knows its texts by heart."""
    return lambda sentences: np.array([vectors[s] for s in sentences], dtype=np.float32)


def test_what_is_asked_and_looked_for():
    task = domains.Search.of(ROWS, ["more", "A"])
    assert task.queries == ("a", "b") and task.candidates == ("A", "B", "A2", "X", "more")
    assert task.relevant.tolist() == [[0, 2], [1, -1]]
    labelled = texts.Texts({"anchor": ["a", "a"], "positive": ["A", "B"]}, label=np.array([1, 0]))
    assert domains.Search.of(labelled).relevant.tolist() == [[0]] and domains.Search.of(labelled).candidates == (
        "A",
        "B",
    )
    with pytest.raises(InputError, match="own holds no pairs"):
        domains.Search.of(texts.Texts({"anchor": ["a"]}, name="own"))
    with pytest.raises(InputError, match="no row with both a question and an answer"):
        domains.Search.of(texts.Texts({"anchor": ["a", ""], "positive": ["", "b"]}))


@pytest.mark.parametrize("seed", range(4))
def test_the_value_is_that_of_sorting(seed):
    random = np.random.default_rng(seed)
    queries, candidates = random.normal(size=(30, 5)), random.normal(size=(50, 5))
    relevant = np.stack([random.permutation(50)[:3] for _ in range(30)])
    relevant[:10, 1:] = -1
    task = domains.Search(tuple(f"q{i}" for i in range(30)), tuple(f"c{i}" for i in range(50)), relevant)
    known = {f"q{i}": x for i, x in enumerate(queries)} | {f"c{i}": 3 * x for i, x in enumerate(candidates)}
    result = code.code_search(table(known), task, subject="trained")
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, candidates)]
    order = np.argsort(-(unit[0] @ unit[1].T), axis=1)
    rank = np.array(
        [min(int(np.flatnonzero(o == r)[0]) + 1 for r in row if r >= 0) for o, row in zip(order, relevant, strict=True)]
    )
    assert result.value == pytest.approx(100 * (1 / rank).mean())
    assert (result.protocol, result.metric, result.n, result.subject) == ("code-search", "MRR", 30, "trained")
    for k in (1, 5, 10):
        assert result.detail[f"R@{k}"] == pytest.approx(100 * (rank <= k).mean())
    assert result.ci[0] <= result.value <= result.ci[1] and result.detail["candidates"] == 50


@pytest.mark.parametrize("ahead, good, bad", [(0, 1, 0), (0, 1, 4), (2, 2, 3), (1, 3, 0), (3, 1, 2)])
def test_ties_count_as_their_expectation_over_all_orders(ahead, good, bad):
    for most in (1, 3, 1000):
        ranks = [ahead + 1 + order.index(1) for order in itertools.permutations([1] * good + [0] * bad)]
        expected = np.mean([1 / rank if rank <= most else 0 for rank in ranks])
        found = reciprocal_rank(*(torch.tensor([x]) for x in (ahead, good, bad)), most)
        assert found.item() == pytest.approx(expected)


def test_constant_vectors_score_chance_and_far_answers_nothing():
    task = domains.Search(("q",), tuple(map(str, range(1500))), np.array([[1499]]))
    blind = code.code_search(lambda sentences: np.ones((len(sentences), 2)), task)
    harmonic = sum(1 / rank for rank in range(1, 1001)) / 1500
    assert blind.value == pytest.approx(100 * harmonic) == blind.detail["chance"]
    assert blind.detail["R@10"] == pytest.approx(100 * 10 / 1500) == pytest.approx(blind.detail["chance R@10"])
    angle = {str(i): (np.cos(i / 1500), np.sin(i / 1500)) for i in range(1500)} | {"q": (1.0, 0.0)}
    last = code.code_search(table(angle), task)
    assert last.value == 0  # rank 1500 is beyond 1000
    ahead, good, bad = standing(
        torch.tensor([[1.0, 0.0]]), torch.tensor([*angle.values()][:1500]).float(), torch.tensor([[999]])
    )
    assert (ahead.item(), good.item(), bad.item()) == (999, 1, 0) and reciprocal_rank(
        ahead, good, bad, 1000
    ).item() == 1e-3


def test_each_domain_has_its_own_candidates(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("query,code,domain\na,A,java\nb,B,java\nc,C,go\n,D,go\n")
    tasks = code.task_of(str(file))
    assert {name: task.candidates for name, task in tasks.items()} == {"go": ("C", "D"), "java": ("A", "B")}
    known = {"a": (1, 0), "A": (1, 0), "b": (0, 1), "B": (0, 1), "c": (1, 0), "C": (0, 1), "D": (1, 0)}
    result = code.searched(table(known), tasks)
    assert result.detail["java"] == 100 and result.detail["go"] == 50 and result.value == 75 and result.n == 3
    assert result.detail["R@1"] == 50 and result.detail["candidates"] == 4


def test_which_data_can_be_searched(tmp_path):
    (tmp_path / "pairs.csv").write_text("query,code\na,A\nb,B\n")
    (tmp_path / "plain.txt").write_text("a\nb\n")
    assert code.task_of(str(tmp_path / "pairs.csv"))[""].candidates == ("A", "B")
    assert code.task_of(str(tmp_path / "pairs.csv"), own=False) == {} == code.task_of(str(tmp_path / "plain.txt"))
    assert code.task_of("brown") == {} and code.task_of({"sentence1": ["a"], "sentence2": ["b"], "score": [1.5]}) == {}
    both = code.task_of("same-topic-pairs+same-statement-pairs", "dev")
    assert both.keys() == {"same-topic", "same-statement"} and both["same-topic"].relevant.min() >= 0
    assert code.is_code("cosqa-pairs") and code.is_code("cosqa-pairs+codenn-pairs") and not code.is_code("arxiv-pairs")
    with pytest.raises(InputError, match="has the splits dev, test to search in"):
        domains.search("same-topic-pairs", "train")


def test_rows_that_do_not_fit_are_named():
    task = domains.Search.of(ROWS)
    with pytest.raises(InputError, match="but one for each text is needed"):
        code.code_search(lambda sentences: np.ones((3, 2)), task)


def test_the_bag_takes_names_apart():
    found = code.bag_of_names(["read a line", "def readLine(x): read_a"])
    assert (found[0] * found[1]).sum() == 4  # read twice, line and a once
