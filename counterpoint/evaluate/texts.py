"""Protocols for sentence embeddings: scored pairs (STS) and the geometry of the space. An encoder is a function.

``encode`` takes a list of N strings and returns an array [N, D]. Each distinct sentence is embedded once a protocol.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from counterpoint.contrast import alignment, uniformity
from counterpoint.data import texts
from counterpoint.data.surface import numbered_words, surface_similarity
from counterpoint.errors import InputError
from counterpoint.evaluate.protocols import Array, Result, bootstrap

Encode = Callable[[list[str]], Array]

ALIGNED = 4.0
"""Score (0 to 5) from which a pair of STS-B counts as the same meaning."""

NEAR = 3
"""Words by which the sentences of a pair may differ in length to count as equally long."""


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation x 100; ties share their mean rank. 0 when one side is constant.

    Args:
        x, y: [N]
    """
    return float(_rank_correlation(np.stack([x, y])[:, None])[0])


def _rank_correlation(pairs: np.ndarray) -> np.ndarray:
    """[2, B, N] -> Spearman x 100 of each of B rows."""
    from scipy.stats import rankdata

    ranks = rankdata(pairs, axis=-1)
    centred = ranks - ranks.mean(-1, keepdims=True)
    length = np.sqrt((centred**2).sum(-1)).prod(0)
    return 100 * (centred[0] * centred[1]).sum(-1) / np.where(length > 0, length, np.inf)


def similarity(encode: Encode, pairs: texts.Texts) -> np.ndarray:
    """Cosine [N] of the two sentences of each pair; 0 where one of the embeddings is zero.

    Raises:
        InputError: `encode` returns another number of rows, NaN or infinity.
    """
    vectors, at = _embedded(encode, pairs)
    return (vectors[at["anchor"]] * vectors[at["positive"]]).sum(1)


def sts_b(encode: Encode, *, split: str = "test", subject: str = "") -> Result:
    """Spearman x 100 of cosine and human score on STS-Benchmark: protocol `sts-b` (`sts-b-dev` on the dev part).

    Source: Cer et al. 2017 (arXiv 1708.00055).
    """
    pairs = texts.sts("stsb", split)
    predicted, gold = similarity(encode, pairs), pairs.score
    assert gold is not None
    random = np.random.default_rng(0)
    at = random.integers(len(gold), size=(1000, len(gold)))
    low, high = np.percentile(_rank_correlation(np.stack([predicted[at], gold[at]])), (2.5, 97.5))
    name = "sts-b" if split == "test" else f"sts-b-{split}"
    return Result(name, "spearman", spearman(predicted, gold), (float(low), float(high)), len(gold), subject)


def sts_all(encode: Encode, *, subject: str = "") -> Result:
    """Mean Spearman x 100 over STS12-16, STS-B test and SICK-R test: protocol `sts-all`.

    The "all" setting of SimCSE's tables: the subsets of a year are put together and correlated once.

    Source: Gao et al. 2021 (arXiv 2104.08821), appendix B.

    Returns:
        A result whose detail holds each set's value.
    """
    each, n = {}, 0
    for name in texts.STS:
        pairs = texts.sts(name, "test")
        assert pairs.score is not None
        each[name] = spearman(similarity(encode, pairs), pairs.score)
        n += len(pairs)
    return Result("sts-all", "spearman", float(np.mean([*each.values()])), None, n, subject, dict(each))


def alignment_uniformity(encode: Encode, *, split: str = "test", subject: str = "") -> tuple[Result, Result]:
    """Protocols `sts-b-alignment` (pairs scored 4 or more) and `sts-b-uniformity` (all distinct sentences); low is good.

    Source: Wang and Isola 2020 (arXiv 2005.10242); on STS-B: Gao et al. 2021 (arXiv 2104.08821), section 7.
    """
    pairs = texts.sts("stsb", split)
    assert pairs.score is not None
    vectors, at = _embedded(encode, pairs)
    alike = np.flatnonzero(pairs.score >= ALIGNED)
    x, y = (torch.from_numpy(vectors[at[part][alike]]) for part in ("anchor", "positive"))
    near = Result("sts-b-alignment", "alignment", float(alignment(x, y)), None, len(alike), subject)
    spread = float(uniformity(torch.from_numpy(vectors)))
    detail = {"alignment": near.value}  # neither means much without the other
    return near, Result("sts-b-uniformity", "uniformity", spread, None, len(vectors), subject, detail)


def isotropy_cosine(encode: Encode, sentences: Sequence[str] | None = None, *, subject: str = "") -> Result:
    """Mean cosine of two different sentences: protocol `isotropy-cosine`; 0 is isotropic, 1 a single direction.

    Args:
        encode: the encoder.
        sentences: at least two different ones; None takes those of STS-B's test part.
        subject: for the record.

    Source: Ethayarajh 2019 (arXiv 1909.00512), section 3.3.
    """
    x = _directions(encode, sentences)
    n = len(x)
    value = float((np.square(x.sum(0)).sum() - np.square(x).sum()) / (n * (n - 1)))
    return Result("isotropy-cosine", "mean cosine", value, None, n, subject)


def isotropy_partition(encode: Encode, sentences: Sequence[str] | None = None, *, subject: str = "") -> Result:
    r"""How evenly directions are used: protocol `isotropy-partition`; 1 is isotropic.

    .. math:: \min_c Z(c) / \max_c Z(c), \quad Z(c) = \sum_v e^{c \cdot v}

    over unit vectors v of the sentences; c are the eigenvectors of :math:`V^T V` in both directions.

    Args:
        encode: the encoder.
        sentences: as in `isotropy_cosine`.
        subject: for the record.

    Source: Mu and Viswanath 2018 (arXiv 1702.01417), equation 1.
    """
    x = _directions(encode, sentences)
    n, dim = x.shape
    if n < dim:  # the other eigenvectors are orthogonal to every sentence: Z = n
        values, left = np.linalg.eigh(x @ x.T)
        along = left * np.sqrt(values.clip(0))
    else:
        along = x @ np.linalg.eigh(x.T @ x)[1]
    z = np.concatenate([np.exp(along).sum(0), np.exp(-along).sum(0), [n] * (n < dim)])
    return Result("isotropy-partition", "partition ratio", float(z.min() / z.max()), None, n, subject)


def _directions(encode: Encode, sentences: Sequence[str] | None) -> np.ndarray:
    given = texts.sts("stsb", "test").sentences() if sentences is None else list(dict.fromkeys(sentences))
    if len(given) < 2:
        raise InputError("isotropy looks at pairs of sentences; hand in at least two different ones")
    return unit_vectors(encode(given), len(given)).astype(np.float64)


def length_bias(encode: Encode, *, split: str = "test", subject: str = "") -> Result:
    """How much more alike equally long sentences seem than people find them: protocol `sts-b-length-bias`.

    mean(cosine - score / 5) over the pairs of STS-B whose lengths differ by at most 3 words, minus the same over the
    others; x 100. 0 is unbiased, above 0 equal length is taken for equal meaning.

    Source: Wu et al. 2022 (arXiv 2109.04380), section 1, which compares the two groups' predicted similarities.
    """
    pairs = texts.sts("stsb", split)
    assert pairs.score is not None
    excess = similarity(encode, pairs) - pairs.score / 5
    lengths = np.array([[len(s.split()) for s in pairs.columns[part]] for part in ("anchor", "positive")])
    near = np.abs(lengths[0] - lengths[1]) <= NEAR
    gap = 100 * float(excess[near].mean() - excess[~near].mean())
    ends = [bootstrap(part) for part in (excess[near], excess[~near])]
    # the groups are independent: their intervals add in squares
    half = 100 * sum(((high - low) / 2) ** 2 for low, high in ends) ** 0.5
    detail: dict[str, Any] = {
        "near": int(near.sum()),
        "far": int((~near).sum()),
        "excess_near": 100 * float(excess[near].mean()),
        "excess_far": 100 * float(excess[~near].mean()),
    }
    return Result("sts-b-length-bias", "gap", gap, (gap - half, gap + half), len(pairs), subject, detail)


def overlap_bias(encode: Encode, *, split: str = "test", subject: str = "") -> Result:
    r"""How far similarity follows shared words where people do not: protocol `sts-b-overlap-bias`.

    Rank correlation x 100, over the pairs of STS-B, of the cosine and the surface similarity "overlap" (mean of the Jaccard
    index of the words and of 1 - normalised edit distance over words), given the human score:

    .. math:: \rho_{cw \cdot g} = \frac{\rho_{cw} - \rho_{cg} \rho_{wg}}{\sqrt{(1 - \rho_{cg}^2)(1 - \rho_{wg}^2)}}

    0 is unbiased; above 0, shared words are taken for shared meaning. In the detail, `size` is the absolute value and
    `difference` the plain rank correlation of (cosine - score / 5) and overlap, which says little: cosines spread less than
    scores, so the difference falls with the score, and with it with the overlap, for any encoder.

    Source: the bias is that of Miao et al. 2023 (arXiv 2309.07396); the measure is ours.
    """
    pairs = texts.sts("stsb", split)
    assert pairs.score is not None
    every = torch.arange(len(pairs))
    words = numbered_words(pairs.columns["anchor"], pairs.columns["positive"])
    one, other = (rows.padded(every, -1)[0] for rows in words)
    surface, cosine = surface_similarity(one, other).numpy(), similarity(encode, pairs)
    random = np.random.default_rng(0)
    at = random.integers(len(pairs), size=(1000, len(pairs)))
    low, high = np.percentile(_partial(cosine[at], surface[at], pairs.score[at]), (2.5, 97.5))
    value = float(_partial(cosine[None], surface[None], pairs.score[None])[0])
    detail = {"size": abs(value), "difference": spearman(cosine - pairs.score / 5, surface)}
    return Result(
        "sts-b-overlap-bias", "partial spearman", value, (float(low), float(high)), len(pairs), subject, detail
    )


def _partial(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Rank correlation x 100 of x and y [B, N] that is left once each one's with `given` is taken away."""
    xy, xz, yz = (_rank_correlation(np.stack(pair)) / 100 for pair in ((x, y), (x, given), (y, given)))
    return 100 * (xy - xz * yz) / np.sqrt(np.maximum((1 - xz**2) * (1 - yz**2), 1e-12))


def bag_of_words(sentences: Sequence[str], dim: int = 4096) -> np.ndarray:
    """The baseline that learns nothing: counts of hashed words, float32 [N, dim]."""
    vectors = np.zeros((len(sentences), dim), np.float32)
    for row, sentence in zip(vectors, sentences, strict=True):
        for word in re.findall(r"\w+", sentence.lower()):
            row[zlib.crc32(word.encode()) % dim] += 1
    return vectors


PROTOCOLS: dict[str, Callable[..., Result | tuple[Result, ...]]] = {
    "sts-b": sts_b,
    "sts-all": sts_all,
    "sts-b-alignment": lambda encode, subject: alignment_uniformity(encode, subject=subject)[0],
    "sts-b-uniformity": lambda encode, subject: alignment_uniformity(encode, subject=subject)[1],
    "isotropy-cosine": isotropy_cosine,
    "isotropy-partition": isotropy_partition,
    "sts-b-length-bias": length_bias,
    "sts-b-overlap-bias": overlap_bias,
}
"""Every protocol by its name, as ``f(encode, subject=...)``."""


def measure(subjects: Sequence[tuple[str, Encode]], protocols: Sequence[str] | None = None) -> Iterator[Result]:
    """Every protocol on every subject; sentences are embedded once a subject.

    Args:
        subjects: what to measure: ("trained", encode), ("untrained", encode), ("bag of words", `bag_of_words`).
        protocols: names in `PROTOCOLS`; None takes all.

    Raises:
        InputError: a name that is no protocol, or STS sets that are not on this machine.
    """
    for name in protocols or ():
        if name not in PROTOCOLS:
            raise InputError(f'no protocol named "{name}"; there are {", ".join(PROTOCOLS)}')
    for subject, encode in subjects:
        remembering = _remembering(encode)
        for name in protocols or PROTOCOLS:
            result = PROTOCOLS[name](remembering, subject=subject)
            assert isinstance(result, Result)
            yield result


def _remembering(encode: Encode) -> Encode:
    """`encode` that embeds no sentence twice."""
    known: dict[str, np.ndarray] = {}

    def remember(sentences: list[str]) -> np.ndarray:
        if new := [sentence for sentence in dict.fromkeys(sentences) if sentence not in known]:
            known.update(zip(new, _array(encode(new), len(new)), strict=True))
        return np.stack([known[sentence] for sentence in sentences])

    return remember


def _embedded(encode: Encode, pairs: texts.Texts) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Unit vectors of the distinct sentences, and for each column where its sentences stand among them."""
    sentences = pairs.sentences()
    place = {sentence: i for i, sentence in enumerate(sentences)}
    at = {part: np.array([place[sentence] for sentence in column]) for part, column in pairs.columns.items()}
    return unit_vectors(encode(sentences), len(sentences)), at


def unit_vectors(x: Array, n: int) -> np.ndarray:
    """float32 [n, D] on the unit sphere, checked."""
    vectors = _array(x, n)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def _array(x: Array, n: int) -> np.ndarray:
    vectors = x.detach().cpu().float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32)
    if vectors.ndim != 2 or len(vectors) != n:
        raise InputError(f"encode returned shape {list(vectors.shape)} for {n:,} sentences, but [{n}, D] is needed")
    if bad := int((~np.isfinite(vectors).all(1)).sum()):
        raise InputError(f"{bad:,} of {n:,} embeddings hold NaN or infinity")
    return vectors
