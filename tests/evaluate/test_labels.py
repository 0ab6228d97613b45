"""`zero-shot-text` on scores whose accuracy, precision and ties are known."""

import numpy as np
import pytest

from counterpoint.data import texts
from counterpoint.errors import InputError
from counterpoint.evaluate.labels import average_precision, by_cosine, labelled, zero_shot_text

TABLE = {"text": [f"text {i}" for i in range(8)], "labels": ["a", "b", "c", "d", "a|b", "b", "c|a", "d"]}
ROWS = texts.load(TABLE)


def scores(matrix):
    return lambda sentences, names: np.asarray(matrix, float)[[int(s.split()[1]) for s in sentences]]


TRUTH = np.array([[label in row.split("|") for label in "abcd"] for row in TABLE["labels"]], float)


def test_right_scores_are_right_and_constant_ones_guess():
    found = zero_shot_text(scores(TRUTH), ROWS)
    assert found.value == 100 and found.protocol == "zero-shot-text" and found.n == 8 and found.metric == "accuracy"
    assert found.detail["ap"] == 100 and found.detail["labels"] == 4 and found.detail["among_all"] == 100
    nothing = zero_shot_text(scores(np.zeros((8, 4))), ROWS)
    assert nothing.value == pytest.approx(100 * np.mean([1, 1, 1, 1, 2, 1, 2, 1]) / 4)
    assert nothing.detail["ap_chance"] == pytest.approx(100 * TRUTH.mean())
    assert nothing.detail["mean_per_class"] == pytest.approx(25) and nothing.detail["chance"] == pytest.approx(
        37.5 - 12.5
    )
    minus = zero_shot_text(scores(np.full((8, 4), -np.inf)), ROWS)  # a classifier that knows none of them
    assert minus.value == pytest.approx(nothing.value)


def test_seen_and_unseen_labels_are_kept_apart():
    wrong = TRUTH.copy()
    wrong[:, 2:] = 1 - wrong[:, 2:]  # c and d exchanged; whatever is c or d loses among its own kind
    wrong[:, :2] += 2  # and a seen label always wins among all
    unseen = zero_shot_text(scores(wrong), ROWS, seen=("a", "b"))
    seen = zero_shot_text(scores(wrong), ROWS, seen=("a", "b"), of_seen=True)
    assert (unseen.n, seen.n) == (4, 4) and unseen.value == 0 and seen.value == 100
    assert unseen.detail["among_all"] == 25  # "c|a" is an a, too
    assert seen.protocol == "zero-shot-text-seen" and seen.detail["labels"] == unseen.detail["labels"] == 2


def test_macro_f1_by_hand():
    from sklearn.metrics import f1_score

    random = np.random.default_rng(0)
    said = random.random((8, 4))
    first = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    expected = 100 * f1_score(first, said.argmax(1), average="macro")
    assert zero_shot_text(scores(said), ROWS).detail["macro_f1"] == pytest.approx(expected)


def test_average_precision_is_that_of_scikit_learn_and_the_mean_over_orders_of_ties():
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(0)
    for _ in range(20):
        score, relevant = random.random(12), random.random(12) < 0.4
        relevant[3] = True
        assert average_precision(score, relevant) == pytest.approx(average_precision_score(relevant, score))
    score, relevant = random.integers(3, size=12).astype(float), random.random(12) < 0.4
    orders = [average_precision(score + 1e-6 * random.random(12), relevant) for _ in range(4000)]
    assert average_precision(score, relevant) == pytest.approx(np.mean(orders), abs=5e-3)


def test_names_inside_texts_are_counted():
    rows = texts.load({"text": ["I like tea", "some coffee", "water"], "label": ["tea", "coffee", "tea"]})
    assert zero_shot_text(lambda s, n: np.zeros((3, 2)), rows).detail["named"] == pytest.approx(200 / 3)


def test_an_encoder_scores_by_cosine():
    vectors = {"x": [2, 0], "y": [1, 1], "p": [1, 0], "q": [0, 3]}
    found = by_cosine(lambda sentences: np.array([vectors[s] for s in sentences], np.float32))(["x", "y"], ["p", "q"])
    np.testing.assert_allclose(found, [[1, 0], [2**-0.5, 2**-0.5]], atol=1e-6)


def test_what_cannot_be_measured():
    with pytest.raises(InputError, match="has no labels with names"):
        zero_shot_text(scores(TRUTH), texts.load(["a", "b"]))
    with pytest.raises(InputError, match="has 0 labels that training did not see"):
        zero_shot_text(scores(TRUTH), ROWS, seen="abcd")
    with pytest.raises(InputError, match=r"scores must be \[8, 4\] without NaN"):
        zero_shot_text(scores(TRUTH * np.nan), ROWS)
    assert labelled(TABLE, own=False) is None and labelled({"text": ["a", "b"]}) is None
    assert labelled(TABLE)[0].classes == ("a", "b", "c", "d")
