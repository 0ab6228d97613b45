"""How far classes lie apart, by brute force and in limits; which rows a classifier of texts is measured on."""

import numpy as np
import pytest
import torch
from sklearn.metrics import silhouette_score

from counterpoint.data import texts
from counterpoint.errors import InputError
from counterpoint.evaluate.classes import linear_text, measure, measure_linear, tuned
from counterpoint.evaluate.protocols import own_classifier, separation
from counterpoint.methods.language.fine_tuning_text import FineTuningText

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def test_separation_by_brute_force():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 5)) * random.uniform(0.1, 9, (40, 1)), random.integers(0, 3, 40)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    found = separation(x, y)
    distance = {True: [], False: []}
    for i in range(40):
        for j in range(i):
            distance[bool(y[i] == y[j])].append(np.linalg.norm(unit[i] - unit[j]))
    assert found["within"] == pytest.approx(np.mean(distance[True]), abs=1e-6)
    assert found["between"] == pytest.approx(np.mean(distance[False]), abs=1e-6)
    assert found["silhouette"] == pytest.approx(silhouette_score(unit, y), abs=1e-6)


def test_separation_in_limits():
    points = np.repeat(np.eye(3), 5, axis=0)
    y = np.repeat(np.arange(3), 5)
    apart = separation(points * 7, y)  # lengths do not count
    assert apart["silhouette"] == pytest.approx(1) and apart["within"] == pytest.approx(0, abs=1e-6)
    assert apart["between"] == pytest.approx(2**0.5)
    assert separation(points, np.tile(np.arange(3), 5))["silhouette"] < 0
    assert separation(points, np.zeros(15, dtype=int)) == {} == separation(points[:3], np.arange(3))
    many = np.random.default_rng(0).normal(size=(500, 4))
    some = separation(many, np.arange(500) % 2, rows=100)
    assert some == separation(many, np.arange(500) % 2, rows=100) != separation(many, np.arange(500) % 2)


def test_every_classifier_of_a_methods_own_has_it():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    result = own_classifier("fine-tune", np.arange(20) % 2, x, np.arange(20) % 2)
    assert result.value == 100 and {"scatter", "silhouette", "within", "between"} <= result.detail.keys()


def test_scores_of_three_classes():
    torch.manual_seed(0)
    method = FineTuningText(encoder=dict(TINY), max_length=16, classes=3).eval()
    table = {"sentence": [f"{i} word" for i in range(9)], "label": [str(i % 3) for i in range(9)]}
    items = method.read(table)
    with torch.no_grad():
        method.classifier.weight.zero_()
        method.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    found = tuned(method, items)
    assert found.value == pytest.approx(100 / 3) == pytest.approx(found.detail["chance"])
    assert found.detail["macro_f1"] == pytest.approx(100 * (0.5 / 3)) and found.detail["matthews"] == 0
    assert "f1" not in found.detail  # of class 1, where there are two


def test_rows_must_have_classes_that_the_model_knows():
    torch.manual_seed(0)
    method = FineTuningText(encoder=dict(TINY), max_length=16)
    with pytest.raises(InputError, match="has no labels: fine-tune needs a column label"):
        [*measure({"trained": method}, {"sentence": ["a", "b"]}, other=True)]
    with pytest.raises(InputError, match="has the class 4, but there are 2, from 0"):
        [*measure({"trained": method}, {"sentence": ["a", "b"], "label": ["0", "4"]}, other=True)]


# ---- frozen embeddings ---------------------------------------------------------------------------------------------------


def spelled(sentences):
    """Counts of letters: what it embeds can be reasoned about."""
    return np.array([[s.count(letter) for letter in "abcdef"] for s in sentences], np.float32)


def rows_of(columns, label):
    return texts.load({**columns, "label": label}, classes=True)


def letters(n, seed):
    """Rows of two letters each, class 1 where there is an a."""
    random = np.random.default_rng(seed)
    sentences = ["".join(random.choice([*"bcdef"], 40)) + "a" * 5 * (i % 2) + str(seed * n + i) for i in range(n)]
    return rows_of({"sentence": sentences}, [str(i % 2) for i in range(n)])


def test_what_an_embedding_says_linearly_is_read():
    train, test = letters(80, 1), letters(60, 2)
    found = linear_text(spelled, train, test, subject="letters")
    assert found.value == 100 and found.n == 60 and found.subject == "letters" and found.detail["chance"] == 50
    blind = linear_text(lambda s: spelled(s)[:, 1:] * 0 + 1, train, test)
    assert blind.value == 50


def test_pairs_are_read_by_difference_and_product():
    random = np.random.default_rng(0)

    def pairs(n):
        first = ["".join(random.choice([*"abcdef"], 12)) + str(random.random()) for _ in range(n)]
        second = [x if i % 2 else "".join(random.choice([*"abcdef"], 12)) + str(i) for i, x in enumerate(first)]
        return rows_of(
            {"sentence1": first, "sentence2": [f"{x} {i}" for i, x in enumerate(second)]},
            [str(i % 2) for i in range(n)],
        )

    found = linear_text(spelled, pairs(200), pairs(100))
    assert found.value > 90  # neither sentence alone says whether both are the same
    with pytest.raises(InputError, match="as many texts in a row"):
        linear_text(spelled, pairs(20), letters(20, 0))


def test_a_part_of_a_file_is_held_out(tmp_path):
    rows = letters(50, 3)
    table = {"sentence": [*rows.columns["anchor"]], "label": [str(c) for c in rows.first_class]}
    (found,) = measure_linear([("trained", spelled)], table, ["linear-text"])
    assert found.n == 10 and found.value == 100 and "held out by us" in found.detail["note"]
    with pytest.raises(InputError, match="has no labels"):
        list(measure_linear([("trained", spelled)], ["a", "b"], ["linear-text"]))
    with pytest.raises(InputError, match="training saw the labels of"):
        list(measure_linear([("trained", spelled)], table, ["linear-text"], own=False))


def test_few_of_many_rows_are_fitted(monkeypatch):
    monkeypatch.setattr("counterpoint.evaluate.classes.PROBED", 30)
    found = linear_text(spelled, letters(80, 1), letters(60, 2))
    assert found.detail["train"] == 30
