"""Protocols for images and texts in one space: zero-shot classification, retrieval both ways, the gap between the two.

The protocols take arrays. Similarity is the cosine: rows are brought to the unit sphere here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.contrast import unit
from counterpoint.data import NAMES, Images, captions, load
from counterpoint.errors import InputError
from counterpoint.evaluate.protocols import Array, Result, bootstrap, checked_features, checked_labels, fit_logistic
from counterpoint.evaluate.texts import unit_vectors

log = logging.getLogger("counterpoint")

TEMPLATES = (
    "a photo of {a}.",
    "a picture of {a}.",
    "a small photo of {a}.",
    "a blurry photo of {a}.",
    "this is {a}.",
    "{a}",
)
"""Sentences that a class name is set into: {a} is the name with "a" or "an". Ours; chosen before any result was seen."""

CUTOFFS = (1, 5, 10)
BLOCK = 2**24  # similarities held at once
LEVEL = 1e-6  # cosines closer than this are equal: in float32 even equal rows differ by where they stand in a product
SEPARABLE = 2000  # pairs that the test of separability looks at
SEEN = "pairs that training saw"
PROTOCOLS = ("zero-shot", "retrieval-text", "retrieval-image", "retrieval-mean", "modality-gap")


# ---------------------------------------------------------------------------------------------------------- zero-shot


def class_vectors(
    encode_text: Callable[[list[str]], Array], classes: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> np.ndarray:
    """One unit vector a class, float32 [C, D]: the mean of its prompts' unit vectors.

    Args:
        encode_text: N strings -> [N, D].
        classes: their names, written as one says them (`counterpoint.data.captions.spoken`).
        templates: sentences with {} where the name goes, or {a} for the name with "a" or "an".

    Raises:
        InputError: no class, no template, or a template without {} and {a}.

    Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.4.
    """
    if not classes or not templates:
        raise InputError("zero-shot classification needs at least one class name and one template")
    if wrong := [template for template in templates if "{}" not in template and "{a}" not in template]:
        raise InputError(
            f'the template "{wrong[0]}" does not name the class: write {{}} or {{a}} where its name belongs'
        )
    prompts = [_said(template, captions.spoken(name)) for name in classes for template in templates]
    vectors = unit_vectors(encode_text(prompts), len(prompts)).reshape(len(classes), len(templates), -1)
    return unit_vectors(vectors.mean(1), len(classes))


def _said(template: str, name: str) -> str:
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return template.replace("{a}", f"{article} {name}").replace("{}", name)


def zero_shot(
    image_vectors: Array,
    labels: Array,
    class_vectors: Array,
    *,
    classes: Sequence[str] | None = None,
    subject: str = "",
) -> Result:
    """Accuracy of taking the class whose text is most similar: protocol `zero-shot`.

    A class that ties with others wins its share of the draw, so that constant vectors score what guessing scores.

    Args:
        image_vectors: [N, D].
        labels: whole numbers [N], positions in `class_vectors`.
        class_vectors: [C, D], see `class_vectors`.
        classes: names for the record.
        subject: what was measured.

    Returns:
        Top-1 in %; `detail` holds top-5 (of five classes and more), chance (the share of the largest class), the mean over
        classes and each class, all in %.

    Raises:
        InputError: a label that is no class, or arrays that do not fit.

    Source: Radford et al. 2021 (arXiv 2103.00020), section 3.1.
    """
    images, texts = _pair(image_vectors, class_vectors, "class")
    at = checked_labels(labels, "image", len(images))
    if at.min() < 0 or at.max() >= len(texts):
        raise InputError(f"labels must lie between 0 and {len(texts) - 1}, one class vector each, not at {at.max()}")
    names = [str(i) for i in range(len(texts))] if classes is None else list(classes)
    if len(names) != len(texts):
        raise InputError(f"there are {len(names)} class names but {len(texts)} class vectors")
    hits = first_hits(images, texts, torch.from_numpy(at)[:, None], (1, 5))
    correct = hits[1].numpy()
    count = np.bincount(at, minlength=len(names))
    each = np.bincount(at, weights=correct, minlength=len(names)) / count.clip(1)
    low, high = bootstrap(correct)
    detail: dict[str, Any] = {
        **({"top-5": 100 * float(hits[5].mean())} if len(names) >= 5 else {}),
        "chance": 100 * float(count.max()) / len(at),
        "mean_per_class": 100 * float(each[count > 0].mean()),
        "per_class": {name: 100 * float(value) for name, value, n in zip(names, each, count, strict=True) if n},
    }
    value = 100 * float(correct.mean())
    return Result("zero-shot", "accuracy", value, (100 * low, 100 * high), len(at), subject, detail)


# ---------------------------------------------------------------------------------------------------------- retrieval


def retrieval(
    image_vectors: Array, text_vectors: Array, image_of_text: Array, *, subject: str = ""
) -> tuple[Result, Result, Result]:
    """Finding the caption of an image and the image of a caption: `retrieval-text`, `retrieval-image`, `retrieval-mean`.

    `retrieval-text` goes from image to text: a hit at k if any of the image's captions is among the k most similar texts.
    `retrieval-image` goes from text to image. `retrieval-mean` is the mean of the two. Among equally similar candidates the
    order is drawn at random, and the results hold the expectation over that draw: constant vectors score chance.

    A text row that belongs to several images (a caption that repeats, given once) counts as found with any of them. Text
    rows are never compared as strings: of a caption given twice, each row is right for its own image only.

    Args:
        image_vectors: [N, D].
        text_vectors: [M, D].
        image_of_text: int64 [M], the image of each text; or [M, P], its images, filled up with -1. What has no partner is
            no query, but stands among the candidates.
        subject: what was measured.

    Returns:
        R@1 in %, with a bootstrap interval over queries (of captions: over images, where each has its own); `detail` holds
        R@1, R@5, R@10, and what chance scores on each.

    Raises:
        InputError: arrays that do not fit, or no pair at all.

    Source: the protocol of Karpathy and Fei-Fei 2015 (arXiv 1412.2306), section 4.1, without its folds.
    """
    images, texts = _pair(image_vectors, text_vectors, "text")
    owner = _owners(image_of_text, len(images), len(texts))
    found = []
    single = owner.shape[1] == 1
    for name, query, candidates, relevant in (
        ("retrieval-text", images, texts, inverse(owner, len(images))),
        ("retrieval-image", texts, images, owner),
    ):
        asked = (relevant >= 0).any(1)
        hits = first_hits(query[asked], candidates, relevant[asked], CUTOFFS)
        chance = guesses((relevant[asked] >= 0).sum(1), len(candidates), CUTOFFS)
        groups = relevant[asked, 0] if name == "retrieval-image" and single else None
        low, high = bootstrap(hits[1], groups=groups)
        detail: dict[str, Any] = {f"R@{k}": 100 * float(hits[k].mean()) for k in CUTOFFS}
        detail |= {f"chance R@{k}": 100 * float(chance[k].mean()) for k in CUTOFFS}
        detail["candidates"] = len(candidates)
        ci = (100 * low, 100 * high)
        found.append(Result(name, "R@1", detail["R@1"], ci, int(asked.sum()), subject, detail))
    there, back = found
    mean = {name: (there.detail[name] + back.detail[name]) / 2 for name in there.detail if "R@" in name}
    return there, back, Result("retrieval-mean", "R@1", mean["R@1"], None, there.n + back.n, subject, mean)


def first_hits(query: Tensor, candidates: Tensor, relevant: Tensor, cutoffs: Sequence[int]) -> dict[int, Tensor]:
    """Probability, for each cut-off k, that one of a query's relevant candidates is among its k nearest: float64 [N] each.

    It is 0 or 1 unless candidates tie, whose order is random. Only blocks of similarities are held.

    Args:
        query: unit vectors [N, D].
        candidates: unit vectors [M, D].
        relevant: int64 [N, P], -1 fills up; at least one a row.
        cutoffs: values of k.
    """
    ahead, good, bad = standing(query, candidates, relevant)
    return {k: _drawn(good, bad, (k - ahead).clamp(min=0), k).cpu() for k in cutoffs}


def standing(query: Tensor, candidates: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the best of a query's relevant candidates stands: how many others are ahead, relevant ones level, others level.

    Args:
        query: unit vectors [N, D].
        candidates: unit vectors [M, D].
        relevant: int64 [N, P], -1 fills up; at least one a row.

    Returns:
        Three int64 [N]; the order within a level is random, and one relevant candidate at least is level (the best).
    """
    parts = []
    step = max(1, BLOCK // len(candidates))
    for start in range(0, len(query), step):
        mine = relevant[start : start + step].to(query.device)
        score = query[start : start + step] @ candidates.T
        right = torch.zeros(len(mine), len(candidates) + 1, dtype=torch.bool, device=score.device)
        right = right.scatter_(1, mine.remainder(len(candidates) + 1), True)[:, :-1]  # -1 falls into the extra column
        best = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ahead = ((score > best + LEVEL) & ~right).sum(1)
        level = (score - best).abs() <= LEVEL
        parts.append((ahead, (level & right).sum(1), (level & ~right).sum(1)))
    ahead, good, bad = (torch.cat(part) for part in zip(*parts, strict=True))
    return ahead, good, bad


def reciprocal_rank(ahead: Tensor, good: Tensor, bad: Tensor, most: int) -> Tensor:
    """Expected 1 / rank of the first relevant candidate, 0 beyond rank `most`: float64 [N].

    Args:
        ahead, good, bad: int64 [N], as `standing` tells them; the order within a level is random.
        most: the last rank that counts.
    """
    found = torch.zeros(len(ahead), dtype=torch.float64, device=ahead.device)
    none = torch.ones_like(found)  # probability that the first so many of the level are all others
    for others in range(min(most, int(bad.max()) + 1)):
        rank = ahead + 1 + others
        left = (bad - others).clamp(min=0).double() / (good + bad - others).clamp(min=1)
        found += torch.where(rank <= most, none * (1 - left) / rank, 0)
        none = none * left
    return found


def guesses(relevant: Tensor, candidates: int, cutoffs: Sequence[int]) -> dict[int, Tensor]:
    """What `first_hits` gives to constant vectors: float64 [N] each.

    Args:
        relevant: int64 [N], how many candidates are relevant.
        candidates: how many there are.
        cutoffs: values of k.
    """
    return {k: _drawn(relevant, candidates - relevant, torch.full_like(relevant, k), k) for k in cutoffs}


def _drawn(good: Tensor, bad: Tensor, draws: Tensor, most: int) -> Tensor:
    """Probability that `draws` [N] of good + bad items, without putting back, hold a good one; `most` bounds `draws`."""
    none = torch.ones(len(good), dtype=torch.float64, device=good.device)
    for i in range(most):
        left = (bad - i).clamp(min=0) / (good + bad - i).clamp(min=1)
        none = torch.where(i < draws, none * left, none)
    return 1 - none


def _pair(image_vectors: Array, text_vectors: Array, name: str) -> tuple[Tensor, Tensor]:
    """Unit vectors of images and of texts on one device, checked."""
    images, texts = checked_features(image_vectors, "image"), checked_features(text_vectors, name)
    if images.shape[1] != texts.shape[1]:
        raise InputError(f"image vectors have {images.shape[1]} dimensions but {name} vectors {texts.shape[1]}")
    return unit(images), unit(texts.to(images.device))


def _owners(image_of_text: Array, images: int, texts: int) -> Tensor:
    owner = torch.as_tensor(np.asarray(image_of_text.cpu() if isinstance(image_of_text, Tensor) else image_of_text))
    owner = owner[:, None] if owner.ndim == 1 else owner
    if owner.is_floating_point() or owner.ndim != 2 or len(owner) != texts:
        raise InputError(f"image_of_text must hold whole numbers [{texts}] or [{texts}, P], not {list(owner.shape)}")
    owner = owner.long()
    if bool((owner >= images).any()):
        raise InputError(f"image_of_text names image {int(owner.max())}, but there are {images}, counted from 0")
    if not bool((owner >= 0).any()):
        raise InputError("image_of_text pairs no text with any image")
    # the images first, -1 last, so that the first column says whose a text is
    return owner.clamp(min=-1).sort(1, descending=True).values


def inverse(owner: Tensor, images: int) -> Tensor:
    """The texts of each image, int64 [N, P], -1 fills up, from the images of each text [M, P']."""
    text, place = (owner >= 0).nonzero(as_tuple=True)
    image = owner[text, place]
    order = image.argsort(stable=True)
    text, image = text[order], image[order]
    count = image.bincount(minlength=images)
    column = torch.arange(len(image)) - (count.cumsum(0) - count)[image]
    inverse = torch.full((images, int(count.max())), -1)
    inverse[image, column] = text
    return inverse


# ------------------------------------------------------------------------------------------------- pairs that are alike


def pair_scores(images: Array, texts: Array, *, scale: float = 100.0) -> Tensor:
    """Which of two images a statement is about: softmax over the images of scale * cosine, [P, 2 images, 2 statements].

    Args:
        images: [P, 2, D], two images a pair.
        texts: [P, 2, D], two statements a pair.
        scale: logit scale.

    Raises:
        InputError: no such arrays.
    """
    x, y = (unit(torch.as_tensor(rows)) for rows in (images, texts))
    if x.ndim != 3 or x.shape[1] != 2 or x.shape != y.shape:
        raise InputError(
            f"pairs need two images and two statements each, [P, 2, D] both, not {[*x.shape]} and {[*y.shape]}"
        )
    return (scale * x @ y.transpose(1, 2)).softmax(1)


def pair_accuracy(images: Array, texts: Array, *, patterns: Sequence[str] | None = None, subject: str = "") -> Result:
    """Pairs of images that look alike but for one thing, and a statement about each: protocol `pair-accuracy`.

    A pair counts only if both statements are more similar to their own image than to the other. Guessing scores 25 %;
    of equal similarities neither is right.

    Args:
        images: [P, 2, D].
        texts: [P, 2, D]; statement j of a pair is about its image j.
        patterns: what each pair differs in; `detail` holds the accuracy of each, and the value is their mean.
        subject: what was measured.

    Raises:
        InputError: arrays or patterns that do not fit.

    Source: Tong et al. 2024 (arXiv 2401.06209), MMVP-VLM: 9 patterns of 15 pairs, "a photo of " before each statement.
    """
    scores = pair_scores(images, texts)
    right = (scores.diagonal(dim1=1, dim2=2) > scores.flip(1).diagonal(dim1=1, dim2=2)).all(1).cpu().numpy()
    names = np.array(["all"] * len(right) if patterns is None else list(patterns))
    if len(names) != len(right) or not len(right):
        raise InputError(f"there are {len(right)} pairs but {len(names)} patterns; at least one pair is needed")
    each = {str(name): 100 * float(right[names == name].mean()) for name in dict.fromkeys(names.tolist())}
    low, high = bootstrap(right)
    ci = (100 * low, 100 * high) if len(each) == 1 else None
    detail = {"chance": 25.0, "patterns": each}
    return Result("pair-accuracy", "accuracy", float(np.mean([*each.values()])), ci, len(right), subject, detail)


# ---------------------------------------------------------------------------------------------------------------- gap


def modality_gap(image_vectors: Array, text_vectors: Array, *, seed: int = 0, subject: str = "") -> Result:
    r"""Distance of the images' centre from the texts': protocol `modality-gap`; 0 is none, 2 opposite points.

    .. math:: \Big\lVert \tfrac1N \sum_i \hat u_i - \tfrac1N \sum_i \hat v_i \Big\rVert

    over unit vectors. `detail` also holds `separability`: the accuracy in %, on held-out pairs (5 folds; both members of a
    pair lie in the same), of a logistic regression on standardised vectors that tells images from texts, 50 when it cannot;
    and the mean cosine of pairs and of non-pairs.

    Args:
        image_vectors: [N, D].
        text_vectors: [N, D]; row i belongs to row i.
        seed: of the folds, and of the at most 2,000 pairs that separability is measured on.
        subject: what was measured.

    Raises:
        InputError: arrays that do not fit, or fewer than 10 pairs.

    Source: Liang et al. 2022 (arXiv 2203.02053), section 4.2; separability as in Fahim et al. 2024 (arXiv 2405.18570), who
    hold out one fifth.
    """
    images, texts = _pair(image_vectors, text_vectors, "text")
    if images.shape != texts.shape:
        raise InputError(f"row i is paired with row i, but the shapes are {list(images.shape)} and {list(texts.shape)}")
    n = len(images)
    if n < 10:
        raise InputError(f"the gap is measured on at least 10 pairs, not {n}")
    x, y = images.double().cpu(), texts.double().cpu()
    pairs = (x * y).sum(1)
    others = (x.sum(0) @ y.sum(0) - pairs.sum()) / (n * (n - 1))
    detail = {
        "separability": _separability(x.numpy(), y.numpy(), seed),
        "cosine_of_pairs": float(pairs.mean()),
        "cosine_of_non_pairs": float(others),
    }
    return Result("modality-gap", "distance", float((x.mean(0) - y.mean(0)).norm()), None, n, subject, detail)


def _separability(x: np.ndarray, y: np.ndarray, seed: int) -> float:
    order = np.random.default_rng(seed).permutation(len(x))[:SEPARABLE]
    right = []
    for fold in range(5):
        out = order[fold::5]
        kept = np.setdiff1d(order, out)
        known = np.repeat([0, 1], len(kept))
        ((predicted, _),) = fit_logistic(
            np.concatenate([x[kept], y[kept]]), known, np.concatenate([x[out], y[out]]), [1.0]
        )
        right.append(predicted == np.repeat([0, 1], len(out)))
    return 100 * float(np.concatenate(right).mean())


# ------------------------------------------------------------------------------------------------------------ methods


def measure(
    subjects: Mapping[str, Any],
    data: Any,
    *,
    protocols: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    limit: int | None = None,
    seed: int = 0,
    trained_on: str | None = None,
) -> list[Result]:
    """Every protocol that fits the data, on image-text methods.

    Pairs are measured by retrieval and gap, and by zero-shot classification where they have labels with names; labelled
    images by zero-shot classification alone. The test part is taken where there is one, else all of the data. Of data that
    training saw only pairs that its `limit` left out are scored; if there are none, only the gap is measured, which is a
    property and no score. A note in the results says which.

    Args:
        subjects: what to measure, by name: ``{"trained": method, "untrained": another}``; a method here has `encode` and
            `encode_text`.
        data: what `counterpoint.data.captions.load` or `counterpoint.data.load` takes.
        protocols: only these; None takes all that fit.
        templates: for the class names.
        limit: the subset of own pairs that it was trained on.
        seed: of that subset.
        trained_on: the data of the training, as its run names it.

    Raises:
        InputError: a name that is no protocol, or data that fits none.
    """
    for name in protocols or ():
        if name not in PROTOCOLS:
            raise InputError(f'no protocol named "{name}"; there are {", ".join(PROTOCOLS)}')
    method = next(iter(subjects.values()))
    pairs, images, note = _test_items(method, data, limit, seed, trained_on)
    seen = note == SEEN
    if seen:
        log.warning(
            "training saw every pair of %s, so that finding them again would prove nothing: only the gap is measured; give "
            "--data with other pairs, or say in a column called split which rows are test",
            images.name,
        )
    found: list[Result] = []
    for subject, each in subjects.items():
        vectors = each.encode(images)
        if not seen and images.label is not None and any(images.classes) and _wanted(("zero-shot",), protocols):
            names = class_vectors(each.encode_text, images.classes, templates)
            result = zero_shot(vectors, images.label, names, classes=images.classes, subject=subject)
            result.detail["templates"] = list(templates)
            found.append(result)
        if pairs is not None and _wanted(PROTOCOLS[1:], protocols):
            found += _of_pairs(pairs, vectors, each, subject, scored=not seen)
    found = [result for result in found if _wanted((result.protocol,), protocols)]
    for result in found:
        result.detail.update({"note": note} if note else {})
    if not found and pairs is None:
        raise InputError(f"{images.name} has no captions and no named classes, and one of the two is needed")
    return sorted(found, key=lambda result: PROTOCOLS.index(result.protocol))


def _of_pairs(pairs: captions.Pairs, vectors: np.ndarray, method: Any, subject: str, scored: bool) -> list[Result]:
    of = torch.as_tensor(pairs.captions)
    used, place = of[of >= 0].unique(return_inverse=True)
    local = torch.full_like(of, -1)
    local[of >= 0] = place
    sentences = [pairs.texts[i] for i in used.tolist()]
    text = method.encode_text(sentences)
    found = list(retrieval(vectors, text, inverse(local, len(sentences)), subject=subject)) if scored else []
    for result in found:
        result.detail["distinct_texts"] = len(sentences)
    if len(vectors) >= 10:
        found.append(modality_gap(vectors, text[local[:, 0]], subject=subject))
    return found


def _test_items(
    method: Any, data: Any, limit: int | None, seed: int, trained_on: str | None
) -> tuple[captions.Pairs | None, Images, str]:
    """Pairs if there are any, the images to measure, and what must be said about them."""
    size: dict[str, Any] = {"size": method.stored_size, "resident": True}
    if isinstance(data, Images) or (isinstance(data, str) and data in NAMES):
        images, note = _labelled(data, size)
        return None, images.channels(method.channels), note
    own = trained_on is not None and str(data) == trained_on
    size["channels"] = method.channels
    try:
        pairs, note = captions.load(data, "test", **size), ""
    except InputError:
        try:
            pairs = captions.load(data, "train", **size)
        except InputError as reason:
            del size["channels"]
            images, note = _labelled(data, size, reason)
            return None, images.channels(method.channels), note
        note = "all pairs of the data; training used other data"
        if own:
            learned = captions.load(data, "train", limit=limit, seed=seed, **size) if limit else pairs
            pairs, note = _left_out(pairs, learned)
    assert isinstance(pairs.images, Images)
    return pairs, pairs.images, note


def _left_out(pairs: captions.Pairs, learned: captions.Pairs) -> tuple[captions.Pairs, str]:
    """The pairs whose images are not among those `learned`, if they are enough to score; else all, and that they were seen."""
    used = {*learned.images.paths}
    rest = [i for i, path in enumerate(pairs.images.paths) if path not in used]
    if len(rest) < 10:
        return pairs, SEEN
    return pairs.subset(rest), "pairs that the training's limit left out"


def _labelled(data: Any, size: dict[str, Any], reason: InputError | None = None) -> tuple[Images, str]:
    """Labelled images, or the `reason` for which they are no pairs either."""
    try:
        images, note = load(data, "test", **size), ""
    except InputError:
        try:
            images, note = load(data, "train", **size), "all images of the data"
        except InputError as error:
            raise reason or error from None
    assert isinstance(images, Images)
    if images.label is None and reason is not None:
        raise reason
    return images, note


def _wanted(names: Sequence[str], protocols: Sequence[str] | None) -> bool:
    return protocols is None or any(name in protocols for name in names)
