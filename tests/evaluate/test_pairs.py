"""F1max and its protocol against brute force, and what is measured on which data."""

import numpy as np
import pytest

from counterpoint.data import texts
from counterpoint.errors import InputError
from counterpoint.evaluate import pairs


def brute(score, label):
    best = (-1.0, 0.0)
    for t in sorted(set(score), reverse=True):
        said = score >= t
        f1 = 2 * (said & (label == 1)).sum() / (said.sum() + label.sum())
        if f1 > best[0] + 1e-12:
            best = (f1, t)
    return best


@pytest.mark.parametrize("seed", range(5))
def test_f1_max_and_auc_are_those_of_brute_force(seed):
    random = np.random.default_rng(seed)
    label = random.integers(0, 2, 40)
    label[0] = 1
    score = np.round(0.4 * label + random.random(40), 1)  # many ties
    found, expected = pairs.f1_max(score, label), brute(score, label)
    assert found == pytest.approx(expected)
    wins = [(p > n) + (p == n) / 2 for p in score[label == 1] for n in score[label == 0]]
    assert pairs.auc(score, label) == pytest.approx(np.mean(wins))


def test_known_values():
    assert pairs.f1_max(np.array([0.9, 0.8, 0.1]), np.array([1, 1, 0])) == (1.0, 0.8)
    assert pairs.f1_max(np.full(4, 0.5), np.array([1, 0, 1, 0]))[0] == pytest.approx(2 / 3)  # always yes
    assert np.isnan(pairs.auc(np.array([1.0]), np.array([1])))
    with pytest.raises(InputError, match="there is none"):
        pairs.f1_max(np.array([0.1, 0.2]), np.array([0, 0]))


PAIRED = texts.Texts(
    {"anchor": ["a", "a", "b", "b"], "positive": ["a2", "b2", "b2", "a2"]},
    label=np.array([1, 0, 1, 0]),
    domain=np.array([0, 0, 1, 1]),
    domains=("skin cancer", "cvd"),
)


def good(sentences):
    return np.stack([np.eye(2)["ab".index(s[0])] for s in sentences])


def blind(sentences):
    return np.ones((len(sentences), 2))


def test_the_value_is_the_mean_over_domains_and_each_has_its_encoder():
    result = pairs.pair_f1({"skin cancer": good, "": blind}, PAIRED, subject="trained")
    assert (result.protocol, result.metric, result.n, result.subject) == ("pair-f1", "F1max", 4, "trained")
    assert result.detail["skin_cancer"] == 100 and result.detail["cvd"] == pytest.approx(66.667, abs=0.01)
    assert result.value == pytest.approx((100 + 200 / 3) / 2) and result.detail["always_yes"] == pytest.approx(200 / 3)
    assert result.detail["skin_cancer_auc"] == 100 and result.detail["cvd_auc"] == 50
    assert result.detail["skin_cancer_accuracy"] == 100 and result.detail["cvd_accuracy"] == 50
    low, high = result.ci
    assert low <= high <= 100


def test_pairs_of_one_kind_have_plain_names():
    one = texts.Texts(PAIRED.columns, label=PAIRED.label)
    assert pairs.pair_f1(good, one).detail["auc"] == 100
    with pytest.raises(InputError, match="no labels"):
        pairs.pair_f1(good, texts.Texts(PAIRED.columns))


def test_which_data_hold_labelled_pairs(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("sentence1,sentence2,label\na,b,1\nc,d,0\n")
    assert len(pairs.labelled(str(table))) == 2 and pairs.labelled(str(table), own=False) is None
    assert pairs.labelled("same-topic-pairs").label is not None
    assert pairs.labelled("same-topic-pairs+same-statement-pairs", "dev").domains == ("same-topic", "same-statement")
    assert pairs.labelled("brown") is None and pairs.labelled(str(tmp_path / "nothing.csv")) is None
    (tmp_path / "plain.txt").write_text("a\nb\n")
    assert pairs.labelled(str(tmp_path / "plain.txt")) is None
    assert pairs.labelled({"sentence1": ["a"], "sentence2": ["b"], "label": [1]}).label.tolist() == [1]
