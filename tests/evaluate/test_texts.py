"""Protocols for sentences against brute force, on small STS files made here."""

import gzip
import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from counterpoint.data import texts
from counterpoint.errors import InputError
from counterpoint.evaluate import texts as protocols

WORDS = ["red", "dog", "cat", "runs", "sleeps", "house", "sea", "old", "new", "bird"]


@pytest.fixture(autouse=True)
def sets(tmp_path, monkeypatch):
    """All seven sets with 30 random pairs each (60 for STS12, in two subsets)."""
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path))
    (tmp_path / "sts").mkdir()
    random = np.random.default_rng(0)

    def sentence():
        return " ".join(random.choice(WORDS, random.integers(1, 12)))

    def rows(count, *first):
        return [",".join([*first, f"{random.integers(0, 11) / 2}", sentence(), sentence()]) for _ in range(count)]

    files = {
        "stsb": ["split,score,sentence1,sentence2", *rows(30, "test"), *rows(10, "dev")],
        "sick": ["split,relatedness,sentence1,sentence2", *rows(30, "test"), *rows(9, "train")],
        "sts12_16": ["task,subset,split,score,sentence1,sentence2"]
        + [row for year in range(12, 17) for row in rows(30, f"STS{year}", "a", "test")]
        + rows(30, "STS12", "b", "test") + rows(20, "STS12", "b", "train"),
    }  # fmt: skip
    for name, lines in files.items():
        (tmp_path / "sts" / f"{name}.csv.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))


def encode(sentences):
    """Fixed random vectors of words, summed: float16 tensors, so that conversion is tested too."""
    table = torch.randn(len(WORDS), 6, generator=torch.Generator().manual_seed(0))
    return torch.stack([sum(table[WORDS.index(word)] for word in s.split()) for s in sentences]).half()


def cosine(a, b):
    x, y = (encode([s])[0].double().numpy() for s in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def brute(name, split="test"):
    pairs = texts.sts(name, split)
    predicted = [cosine(a, b) for a, b in zip(*pairs.columns.values(), strict=True)]
    return 100 * stats.spearmanr(predicted, pairs.score).statistic


def test_spearman_is_scipys_also_with_ties():
    random = np.random.default_rng(1)
    for _ in range(5):
        x, y = random.integers(0, 5, 40), random.normal(size=40)
        assert protocols.spearman(x, y) == pytest.approx(100 * stats.spearmanr(x, y).statistic)
    assert protocols.spearman(np.ones(4), np.arange(4)) == 0


def test_sts_b_is_the_rank_correlation_of_the_test_part():
    result = protocols.sts_b(encode, subject="trained")
    assert result.value == pytest.approx(brute("stsb"), abs=1e-3)
    assert (result.protocol, result.n, result.subject) == ("sts-b", 30, "trained")
    assert result.ci[0] < result.value < result.ci[1]
    dev = protocols.sts_b(encode, split="dev")
    assert dev.protocol == "sts-b-dev" and dev.n == 10 and dev.value == pytest.approx(brute("stsb", "dev"), abs=1e-3)


def test_sts_all_puts_the_subsets_of_a_year_together_and_averages_the_seven():
    result = protocols.sts_all(encode)
    expected = {name: brute(name) for name in texts.STS}
    assert result.detail == pytest.approx(expected, abs=1e-3) and list(result.detail) == list(texts.STS)
    assert result.value == pytest.approx(np.mean([*expected.values()]), abs=1e-3) and result.n == 8 * 30


def test_alignment_of_pairs_scored_four_or_more_and_uniformity_of_all_sentences():
    near, spread = protocols.alignment_uniformity(encode)
    pairs = texts.sts("stsb")
    alike = [(a, b) for a, b, s in zip(*pairs.columns.values(), pairs.score, strict=True) if s >= 4]
    assert near.n == len(alike) > 3
    assert near.value == pytest.approx(np.mean([2 - 2 * cosine(a, b) for a, b in alike]), abs=1e-3)
    sentences = list(dict.fromkeys([*pairs.columns["anchor"], *pairs.columns["positive"]]))
    potential = [np.exp(-2 * (2 - 2 * cosine(a, b))) for a, b in itertools.combinations(sentences, 2)]
    assert spread.value == pytest.approx(np.log(np.mean(potential)), abs=1e-3) and spread.n == len(sentences)


def both(encoder, sentences):
    return [f(encoder, sentences).value for f in (protocols.isotropy_cosine, protocols.isotropy_partition)]


def test_isotropy():
    few = ["red dog", "cat", "sea old house", "new bird runs", "red"]  # fewer than the 6 dimensions
    for sentences in (few, [*few, "dog", "house", "old cat"]):
        x = encode(sentences).double().numpy()
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        _, vectors = np.linalg.eigh(x.T @ x)
        z = [np.exp(x @ (sign * c)).sum() for c in vectors.T for sign in (1, -1)]
        mean, partition = both(encode, sentences)
        assert mean == pytest.approx(np.mean([cosine(a, b) for a, b in itertools.combinations(sentences, 2)]), abs=1e-4)
        assert partition == pytest.approx(min(z) / max(z), abs=1e-3)
    cross = np.concatenate([np.eye(4), -np.eye(4)])
    assert both(lambda s: cross[: len(s)], [str(i) for i in range(8)]) == pytest.approx([-1 / 7, 1])
    assert both(lambda s: np.eye(4)[[0] * len(s)], ["a", "b"]) == pytest.approx([1, np.exp(-2)])
    assert protocols.isotropy_cosine(encode).n > 40
    with pytest.raises(InputError, match="at least two different"):
        protocols.isotropy_partition(encode, ["a", "a"])


def test_length_bias_is_the_excess_of_equally_long_pairs():
    result = protocols.length_bias(encode)
    pairs = texts.sts("stsb")
    groups = {True: [], False: []}
    for a, b, score in zip(*pairs.columns.values(), pairs.score, strict=True):
        groups[abs(len(a.split()) - len(b.split())) <= 3].append(cosine(a, b) - score / 5)
    assert result.value == pytest.approx(100 * (np.mean(groups[True]) - np.mean(groups[False])), abs=1e-2)
    assert (result.detail["near"], result.detail["far"]) == (len(groups[True]), len(groups[False]))
    assert result.ci[0] < result.value < result.ci[1]


def test_an_encoder_that_sees_only_length_is_found_out():
    def length_only(sentences):
        angle = np.array([len(s.split()) for s in sentences]) / 10 * np.pi / 2
        return np.stack([np.cos(angle), np.sin(angle)], 1)

    # bag of words agrees with no score here either, but has no such cue
    assert protocols.length_bias(length_only).value > protocols.length_bias(protocols.bag_of_words).value + 10


def test_overlap_bias_is_the_partial_rank_correlation():
    result = protocols.overlap_bias(encode)
    pairs = texts.sts("stsb")
    rows = [*zip(*pairs.columns.values(), strict=True)]
    x, surface, gold = [], [], stats.rankdata(pairs.score)
    for a, b in rows:
        x.append(cosine(a, b))
        one, other = {*a.split()}, {*b.split()}
        table = np.add.outer(np.arange(len(a.split()) + 1), np.arange(len(b.split()) + 1))
        for i, j in itertools.product(range(len(a.split())), range(len(b.split()))):
            near = table[i, j] + (a.split()[i] != b.split()[j])
            table[i + 1, j + 1] = min(near, table[i, j + 1] + 1, table[i + 1, j] + 1)
        edit = 1 - table[-1, -1] / max(len(a.split()), len(b.split()))
        surface.append((len(one & other) / len(one | other) + edit) / 2)
    # what is left of the ranks of both after a linear fit to those of the score
    left = [ranks - np.polyval(np.polyfit(gold, ranks, 1), gold) for ranks in map(stats.rankdata, (x, surface))]
    assert result.value == pytest.approx(100 * np.corrcoef(*left)[0, 1], abs=0.1)
    assert result.detail["size"] == abs(result.value) and result.ci[0] < result.value < result.ci[1]
    difference = stats.spearmanr(np.array(x) - pairs.score / 5, surface).statistic
    assert result.detail["difference"] == pytest.approx(100 * difference, abs=0.1)


def test_an_encoder_that_sees_only_words_is_found_out():
    assert protocols.overlap_bias(protocols.bag_of_words).value > 60
    assert protocols.overlap_bias(lambda s: np.ones((len(s), 2))).value == 0


def test_bag_of_words_counts_hashed_words():
    x = protocols.bag_of_words(["The dog, the DOG", "dog", "", "?"])
    assert x.shape == (4, 4096) and x.sum(1).tolist() == [4, 1, 0, 0] and x.max() == 2
    assert np.array_equal(x, protocols.bag_of_words(["The dog, the DOG", "dog", "", "?"]))


def test_measure_embeds_each_sentence_once_a_subject():
    seen = []

    def counted(sentences):
        seen.extend(sentences)
        return encode(sentences)

    found = list(protocols.measure([("trained", counted), ("bag of words", protocols.bag_of_words)]))
    assert len(seen) == len(set(seen))
    assert [(r.subject, r.protocol) for r in found] == [
        (subject, name) for subject in ("trained", "bag of words") for name in protocols.PROTOCOLS
    ]
    assert [r.protocol for r in protocols.measure([("x", encode)], ["sts-b"])] == ["sts-b"]
    assert found[0].value == pytest.approx(protocols.sts_b(encode).value)
    with pytest.raises(InputError, match='no protocol named "sts"; there are sts-b, sts-all'):
        list(protocols.measure([("x", encode)], ["sts"]))


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda s: encode(s)[:-1], r"returned shape \[\d+, 6\] for"),
        (lambda s: encode(s)[:, 0], r"returned shape \[\d+\] for"),
        (lambda s: encode(s) * torch.tensor([float("nan")] + [1.0] * 5), "hold NaN or infinity"),
    ],
)
def test_broken_encoders_are_refused(broken, message):
    with pytest.raises(InputError, match=message):
        protocols.sts_b(broken)


def test_sets_that_are_not_here(monkeypatch, tmp_path):
    monkeypatch.setenv("COUNTERPOINT_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("COUNTERPOINT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"sts12_16\.csv\.gz .* is not on this machine"):
        protocols.sts_all(encode)
