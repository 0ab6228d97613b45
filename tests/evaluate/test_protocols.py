"""Protocols against hand-worked cases and brute force; bad features are refused with one sentence."""

import json
import math

import numpy as np
import pytest
import torch

from counterpoint.data.omniglot import Runs
from counterpoint.errors import InputError
from counterpoint.evaluate import Result, bootstrap, geometry, knn, linear_probe, one_shot, protocols, ridge_probe


def blobs(n, classes=4, dim=16, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=generator)
    return centre[y] + noise * torch.randn(n, dim, generator=generator), y


def brute_force(train_x, train_y, test_x, k, temperature):
    """Votes in plain float64 loops."""
    predicted = []
    for query in test_x.double():
        cosine = [float(query @ x / query.norm() / x.norm()) for x in train_x.double()]
        nearest = sorted(range(len(cosine)), key=lambda i: -cosine[i])[:k]
        score = {}
        for i in nearest:
            score[int(train_y[i])] = score.get(int(train_y[i]), 0) + math.exp(cosine[i] / temperature)
        predicted.append(max(sorted(score), key=score.get))
    return torch.tensor(predicted)


def angles(*degrees):
    radians = torch.tensor(degrees).double() * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], 1).float()


def test_knn_by_hand():
    # seen from 0 degrees: one item of class 0 at 10, two of class 1 at 30 and -30
    train, label, query = angles(10, 30, -30), [0, 1, 1], angles(0)
    votes_near, votes_far = math.cos(math.radians(10)), math.cos(math.radians(30))
    # sharp votes: the near one wins; mild votes: the two outvote it
    assert math.exp(votes_near / 0.1) > 2 * math.exp(votes_far / 0.1)
    assert math.exp(votes_near / 1.0) < 2 * math.exp(votes_far / 1.0)
    label = np.array(label)
    assert knn(train, label, query, np.array([0]), k=3, temperature=0.1).value == 100
    assert knn(train, label, query, np.array([1]), k=3, temperature=1.0).value == 100
    # with one neighbour only the nearest counts, whatever the temperature
    assert knn(train, label, query, np.array([0]), k=1, temperature=1.0).value == 100


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (20, 0.02), (50, 1.0), (60, 0.005)])
def test_knn_equals_brute_force(k, temperature):
    train_x, train_y = blobs(60, noise=1.5)
    test_x, _ = blobs(40, noise=1.5, seed=1)
    expected = brute_force(train_x, train_y, test_x, k, temperature)
    assert knn(train_x, train_y, test_x, expected, k=k, temperature=temperature).value == 100


def test_knn_does_not_depend_on_blocks_or_lengths(monkeypatch):
    train_x, train_y = blobs(300, noise=2)
    test_x, test_y = blobs(101, noise=2, seed=1)
    whole = knn(train_x, train_y, test_x, test_y, k=30)
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, rows, *rest: split(self, min(rows, 7), *rest))
    assert knn(train_x * 50, train_y, test_x * 0.01, test_y, k=30).value == whole.value
    assert 30 < whole.value < 100


def test_knn_gives_a_tie_to_the_smaller_class():
    train = angles(20, -20)
    for label in ([1, 0], [0, 1]):
        assert knn(train, np.array(label), angles(0), np.array([0]), k=2).value == 100
    assert knn(train, np.array([9, 4]), angles(0), np.array([4]), k=2).value == 100


def test_knn_says_that_k_was_clipped():
    x, y = blobs(50)
    result = knn(x, y, x, y)
    assert result.protocol == "knn-200-0.1" and result.detail["k"] == 50
    assert "50 instead of 200" in result.detail["clipped"]
    assert "clipped" not in knn(x, y, x, y, k=50).detail


def test_knn_survives_tiny_temperature_and_zero_rows():
    x, y = blobs(40, noise=0.1)
    assert knn(x, y, x, y, k=5, temperature=1e-4).value == 100
    x[0] = 0
    assert math.isfinite(knn(x, y, x, y, k=5).value)


@pytest.mark.parametrize("protocol", [knn, linear_probe])
def test_what_cannot_be_scored_is_refused(protocol):
    x, y = blobs(40)
    bad = x.clone()
    bad[[3, 5], 2] = float("nan")
    bad[7, 0] = float("inf")
    with pytest.raises(InputError, match="3 of 40 rows of the training features hold NaN"):
        protocol(bad, y, x, y)
    with pytest.raises(InputError, match="3 of 40 rows of the test features"):
        protocol(x, y, bad, y)
    with pytest.raises(InputError, match=r"40 training features but training labels of shape \[39\]"):
        protocol(x, y[:-1], x, y)
    with pytest.raises(InputError, match="16 columns but test features 15"):
        protocol(x, y, x[:, :15], y)
    with pytest.raises(InputError, match="non-empty"):
        protocol(x[:0], y[:0], x, y)
    with pytest.raises(InputError, match="whole numbers"):
        protocol(x, y.float(), x, y)
    with pytest.raises(InputError, match="test labels 17, 23;"):
        protocol(x, y, x, torch.where(y == 0, 23, torch.where(y == 1, 17, y)))


def test_knn_refuses_senseless_arguments():
    x, y = blobs(10)
    for wrong in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(InputError):
            knn(x, y, x, y, **wrong)


def test_linear_probe_finds_a_linear_rule_that_scales_hide():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long() * 3 + 2  # labels 2 and 5
    x = x * torch.tensor([1e-3, 1e3, 1, 1, 1]) + torch.tensor([0, 5e3, 0, 0, 7])
    x = torch.cat([x, torch.full((400, 1), 0.1)], 1)  # a constant column must not divide by zero
    result = linear_probe(x[:300], y[:300], x[300:], y[300:])
    assert result.protocol == "linear-offline" and result.value >= 97
    assert result.detail["converged"] and result.detail["train"] == 300


def test_linear_probe_never_looks_at_the_test_set_to_choose():
    x, y = blobs(200, noise=3)
    other, other_y = blobs(200, noise=3, seed=5)
    first = linear_probe(x, y, other, other_y).detail
    second = linear_probe(x, y, other, (other_y + 1) % 4).detail
    assert first == second
    best = max(first["validation"].values())
    assert first["validation_accuracy"] == best
    # the strongest penalty among equals
    assert first["C"] == min(float(c) for c, value in first["validation"].items() if value == best)
    assert list(first["validation"]) == ["0.001", "0.01", "0.1", "1", "10", "100"]


def test_linear_probe_refits_on_all_training_items():
    # class 1 has 5 items: 4 on the fitted side, 1 held out; the refit must have seen all 25
    seen = []
    original = protocols.fit_logistic
    x, y = blobs(25, classes=2)
    try:
        protocols.fit_logistic = lambda a, b, c, s: (seen.append((len(a), len(c))), original(a, b, c, s))[1]
        linear_probe(x, y, x[:9], y[:9])
    finally:
        protocols.fit_logistic = original
    (fitted, held_out), refit = seen
    assert refit == (25, 9) and fitted + held_out == 25 and 4 <= held_out <= 6


def test_linear_probe_stops_when_weaker_penalties_only_overfit(monkeypatch):
    x, y = blobs(40, classes=2)
    right = [0.5, 0.9, 0.8, 0.8, 1.0, 1.0]  # share of right answers for each strength: it must not see the last two
    tried = []

    def fake(a, b, new, strengths):
        for strength, share in zip(strengths, right, strict=False):
            tried.append(strength)
            answer = np.asarray(held_out_labels)[: len(new)].copy()
            answer[: round((1 - share) * len(new))] ^= 1
            yield answer, True

    _, held_out = protocols.stratified(torch.as_tensor(y), 0.2, 0)
    held_out_labels = np.asarray(y)[held_out.numpy()]
    monkeypatch.setattr(protocols, "fit_logistic", fake)
    result = linear_probe(x, y, x[held_out.numpy()], held_out_labels)
    assert tried[:-1] == list(protocols.STRENGTHS[:4]) and result.detail["C"] == protocols.STRENGTHS[1]


def test_linear_probe_needs_two_classes_and_something_to_tune_on():
    x, _ = blobs(10)
    with pytest.raises(InputError, match="two classes, but every training label is 3"):
        linear_probe(x, np.full(10, 3), x, np.full(10, 3))
    with pytest.raises(InputError, match="every class has one"):
        linear_probe(x, np.arange(10), x, np.arange(10))


def one_hot_runs():
    """Runs whose 'drawings' hold their character in the first pixel; two of the runs show nothing that is right."""
    generator = torch.Generator().manual_seed(0)
    answer = torch.stack([torch.randperm(20, generator=generator) for _ in range(20)])
    training = torch.arange(20).expand(20, 20)
    shown = answer.clone()
    shown[:2] = (answer[:2] + 1) % 20
    as_images = [x.to(torch.uint8).reshape(20, 20, 1, 1, 1) for x in (training, shown)]
    return Runs(*as_images, answer)


def test_one_shot_counts_by_run():
    calls = []

    def encode(images):
        calls.append(images.shape)
        return torch.nn.functional.one_hot(images.flatten().long(), 20) * 1.0

    result = one_shot(encode, one_hot_runs(), subject="trained")
    assert result.value == 90 and result.n == 400 and result.subject == "trained"
    assert (result.detail["worst_run"], result.detail["best_run"]) == (0, 100)
    assert calls == [(800, 1, 1, 1)]
    # whole runs are resampled: two bad ones of 20 may be none or five; single trials would give 87 to 93
    assert result.ci == (pytest.approx(75), pytest.approx(100))


def test_one_shot_refuses_what_encode_must_not_return():
    with pytest.raises(InputError, match="returned 799 rows for 800 images"):
        one_shot(lambda images: torch.ones(799, 3), one_hot_runs())
    with pytest.raises(InputError, match="800 of 800 rows"):
        one_shot(lambda images: np.full((800, 3), np.nan), one_hot_runs())


def test_bootstrap_interval_is_that_of_the_mean():
    correct = np.arange(1000) < 700
    low, high = bootstrap(correct, draws=20_000)
    deviation = math.sqrt(0.7 * 0.3 / 1000)
    assert low == pytest.approx(0.7 - 1.96 * deviation, abs=2e-3)
    assert high == pytest.approx(0.7 + 1.96 * deviation, abs=2e-3)
    assert bootstrap(correct) == bootstrap(correct) != bootstrap(correct, seed=1)
    assert bootstrap(np.ones(7)) == (1.0, 1.0)


def test_bootstrap_of_scores_that_are_no_shares():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high


def test_bootstrap_resamples_whole_groups():
    # ten groups of 100 equal outcomes: ten independent observations, not a thousand
    correct, groups = np.repeat([1, 0] * 5, 100), np.repeat(np.arange(10), 100)
    items, runs = bootstrap(correct), bootstrap(correct, groups=groups, draws=20_000)
    assert items[1] - items[0] < 0.07
    assert runs == (pytest.approx(0.2), pytest.approx(0.8))
    # groups of different size: the mean stays one over items
    low, high = bootstrap(np.array([1, 0, 0, 0]), groups=np.array([0, 1, 1, 1]))
    assert (low, high) == (0.0, 1.0)
    with pytest.raises(InputError):
        bootstrap(correct, groups=groups[:-1])
    with pytest.raises(InputError):
        bootstrap(np.array([]))


def test_result_goes_into_json():
    x, y = blobs(30)
    result = knn(x, y, x, y, subject="untrained")
    back = json.loads(json.dumps(result.to_dict()))
    assert back["protocol"] == "knn-200-0.1" and back["subject"] == "untrained" and len(back["ci"]) == 2
    assert json.loads(json.dumps(linear_probe(x, y, x, y).to_dict()))["detail"]["C"] > 0
    assert Result("p", "m", 1.0, None, 3).to_dict()["ci"] is None


def test_geometry_of_known_shapes():
    pytest.importorskip("counterpoint.contrast")
    # four points of a square: pairwise squared distances 2, 2, 4 and rank 2
    square = angles(0, 90, 180, 270)
    found = geometry(square, square)
    assert found["alignment"] == pytest.approx(0, abs=1e-6)
    assert found["uniformity"] == pytest.approx(math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6), abs=1e-4)
    assert found["effective_rank"] == pytest.approx(2, abs=1e-3)
    assert geometry(square, angles(90, 180, 270, 0))["alignment"] == pytest.approx(2, abs=1e-5)
    assert "alignment" not in geometry(square)
    with pytest.raises(InputError):
        geometry(square, square[:3])
    with pytest.raises(InputError, match="NaN"):
        geometry(square * float("nan"))


def test_ridge_reads_a_linear_value_and_nothing_from_noise():
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 6)).astype(np.float32)
    y = 3 * x[:, 0] - 2 * x[:, 3] + 10
    found = ridge_probe(x[:300], y[:300], x[300:], y[300:])
    assert found.value < 0.05 and found.detail["spearman"] > 0.999 and found.protocol == "ridge-offline"
    noise = ridge_probe(x[:300], random.permutation(y[:300]), x[300:], y[300:])
    assert noise.value > 0.9 * noise.detail["guess"] and noise.detail["penalty"] > found.detail["penalty"]


def test_ridge_names_what_it_cannot_use():
    x, y = np.zeros((10, 2), np.float32), np.arange(10.0)
    with pytest.raises(InputError, match="one finite value for each item"):
        ridge_probe(x, y * np.nan, x, y)
    with pytest.raises(InputError, match="one finite value for each item"):
        ridge_probe(x, y[:4], x, y)
    with pytest.raises(InputError, match="at least five"):
        ridge_probe(x[:4], y[:4], x, y)
