"""The protocols for frozen features. A protocol's name fixes every choice, so equal names mean comparable numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.data.images import resize, stratified
from counterpoint.errors import InputError

if TYPE_CHECKING:
    from counterpoint.data.omniglot import Runs

Array = np.ndarray | Tensor

# regularisation strengths that the linear probe chooses from, weakest last
STRENGTHS = tuple(10.0**power for power in range(-3, 3))


@dataclass(frozen=True)
class Result:
    """What a protocol found.

    Args:
        protocol: its name, which fixes every choice ("knn-200-0.1")
        metric: what was measured ("accuracy")
        value: in % where it is a share
        ci: 95 % interval in the unit of `value`, over the test items (or runs); it does not hold the spread over seeds
        n: number of test items
        subject: what was measured: "trained", "untrained", "raw pixels"
        detail: choices that the protocol made (neighbours after clipping, the strength it tuned) and side results
    """

    protocol: str
    metric: str
    value: float
    ci: tuple[float, float] | None
    n: int
    subject: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        plain = asdict(self)
        return plain | {"ci": None if self.ci is None else list(self.ci)}


def knn(
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    *,
    k: int = 200,
    temperature: float = 0.1,
    subject: str = "",
) -> Result:
    r"""Weighted nearest-neighbour accuracy of frozen features: protocol `knn-200-0.1`.

    score(c) = sum over the k most similar training items i with label c of exp(cos(x, x_i) / temperature)

    The class with the highest score wins, the smaller one among equals. Similarities are computed for blocks of test
    rows (at most 128 MB at once), on the device of `train_x`.

    Args:
        train_x, test_x: features [N, D] and [M, D]; rows are L2-normalised here, in float32
        train_y, test_y: whole-number labels [N] and [M]
        k: neighbours; clipped to N, which `detail` then says
        temperature: of the votes

    Raises:
        InputError: empty, NaN or infinite features, lengths or widths that differ, a test label that training lacks.

    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4; k = 200 is theirs, their temperature is 0.07.
    """
    if k < 1 or temperature <= 0:
        raise InputError(f"knn needs k >= 1 and temperature > 0, got k={k} and temperature={temperature}")
    train, test, train_label, test_label, classes = _task(train_x, train_y, test_x, test_y)
    train = torch.nn.functional.normalize(train, dim=1)
    test = torch.nn.functional.normalize(test.to(train.device), dim=1)
    train_label = train_label.to(train.device)
    used = min(k, len(train))
    predicted = []
    for rows in test.split(max(1, 2**25 // len(train))):
        similarity, neighbour = (rows @ train.T).topk(used, dim=1)
        # relative to the nearest one: exp cannot overflow, and the winner stays the same
        vote = ((similarity - similarity[:, :1]).double() / temperature).exp()
        score = vote.new_zeros(len(rows), len(classes)).scatter_add_(1, train_label[neighbour], vote)
        predicted.append(score.argmax(1))
    correct = (torch.cat(predicted).cpu() == test_label).numpy()
    detail: dict[str, Any] = {"k": used, "temperature": temperature, "train": len(train)}
    if used < k:
        detail["clipped"] = f"k is {used} instead of {k}: there are no more training items"
    return _accuracy(f"knn-{k}-{temperature:g}", correct, subject, detail)


def linear_probe(
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    *,
    groups: Array | None = None,
    seed: int = 0,
    subject: str = "",
) -> Result:
    """Accuracy of a linear classifier on frozen features: protocol `linear-offline`.

    Multinomial logistic regression with an L2 penalty (lbfgs) on features standardised by training statistics. The
    inverse strength C in 10^-3 ... 10^2 is the best one on 20 % of the training items (stratified; the strongest
    penalty among equals; tried upwards until two in a row are worse than the best); the classifier
    is then fitted to all of them and the test set is looked at once.

    Args:
        train_x, test_x: features [N, D] and [M, D]
        train_y, test_y: whole-number labels [N] and [M]
        groups: [M]; the interval resamples whole groups of test items (locations of one image)
        seed: of the validation split

    Returns:
        A result whose detail holds `C`, `validation` (accuracy in % for each C) and `converged`.

    Raises:
        InputError: as `knn`; and one class only, or no class with two training items.
    """
    train, test, train_label, test_label, classes = _task(train_x, train_y, test_x, test_y)
    if len(classes) < 2:
        raise InputError(f"a linear probe needs at least two classes, but every training label is {classes[0]}")
    fitted, held_out = stratified(train_label, 0.2, seed)
    if len(held_out) == 0:
        raise InputError("a linear probe needs a class with two training items to tune on, but every class has one")
    x, y = train.cpu().numpy(), train_label.numpy()
    a, b = fitted.numpy(), held_out.numpy()
    validation: dict[float, float] = {}
    for strength, (predicted, _) in zip(STRENGTHS, fit_logistic(x[a], y[a], x[b], STRENGTHS), strict=False):
        validation[strength] = 100 * float((predicted == y[b]).mean())
        if len(validation) > 2 and max([*validation.values()][-2:]) < max(validation.values()):
            break  # weaker penalties only overfit further, and cost the most
    best = max(validation, key=lambda strength: (validation[strength], -strength))
    ((predicted, converged),) = fit_logistic(x, y, test.cpu().numpy(), [best])
    detail = {
        "C": best,
        "validation_accuracy": validation[best],
        "validation": {f"{strength:g}": value for strength, value in validation.items()},
        "converged": converged,
        "train": len(x),
        "seed": seed,
    }
    where = None if groups is None else np.asarray(groups)
    return _accuracy("linear-offline", predicted == test_label.numpy(), subject, detail, where)


def fit_logistic(
    x: np.ndarray, y: np.ndarray, new: np.ndarray, strengths: Sequence[float]
) -> Iterator[tuple[np.ndarray, bool]]:
    """Predicted labels of `new`, and whether the fit converged, for each strength; each starts from the one before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, deviation = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    # a feature that never changes (up to rounding) says nothing; dividing by its deviation would blow up the noise
    deviation[deviation <= 1e-7 * np.abs(mean)] = 1
    x, new = (((part - mean) / deviation).astype(np.float32) for part in (x, new))
    model = LogisticRegression(max_iter=500, warm_start=True)
    for strength in strengths:
        model.C = strength
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(x, y)
        yield model.predict(new), not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def own_classifier(protocol: str, predicted: Array, test_x: Array, test_y: Array, *, subject: str = "") -> Result:
    """Accuracy of the classifier that a method trained itself: protocols `online-head` and `fine-tune`.

    `online-head`: trained beside the encoder, which learns nothing from it. `fine-tune`: encoder and classifier learn
    together. Nothing is fitted here, and the last weights count.

    Args:
        protocol: which of the two
        predicted: classes [M] that the method gave the test items
        test_x: their features [M, D], for the details `scatter` and those of `separation`
        test_y: whole-number labels [M]

    Raises:
        InputError: lengths that differ, labels that are no whole numbers.
    """
    truth, found = (checked_labels(y, "test", len(test_x)) for y in (test_y, predicted))
    spread = scatter(test_x, truth)
    detail = {} if spread is None else {"scatter": spread}
    return _accuracy(protocol, found == truth, subject, detail | separation(test_x, truth))


def scatter(x: Array, y: Array) -> float | None:
    """Mean distance of items from the mean of their class, over the mean distance between these means; lower is tighter.

    None where all class means are the same, or there is one class only.

    Args:
        x: features [N, D]
        y: whole-number labels [N]
    """
    features = checked_features(x, "given").double().cpu()
    classes, member = np.unique(checked_labels(y, "given", len(features)), return_inverse=True)
    of = torch.from_numpy(member)
    sums = features.new_zeros(len(classes), features.shape[1]).index_add_(0, of, features)
    centres = sums / of.bincount()[:, None]
    apart = float(torch.pdist(centres).mean()) if len(classes) > 1 else 0.0
    return float((features - centres[of]).norm(dim=1).mean()) / apart if apart else None


def separation(x: Array, y: Array, *, rows: int = 2000, seed: int = 0) -> dict[str, float]:
    """How far classes lie apart on the unit sphere; empty where there is one class only, or a class for each item.

    `within` and `between` are the mean distances of two items of one class and of two; `silhouette` the mean of (b - a) / max(a,
    b), a an item's mean distance to its class and b that to the nearest other one: 1 apart, 0 touching, below 0 mixed up.

    Args:
        x: features [N, D]; rows are L2-normalised here
        y: whole-number labels [N]
        rows: at most so many items, a seeded random subset
        seed: of it

    Source: silhouette: Rousseeuw 1987.
    """
    from sklearn.metrics import silhouette_score

    features = checked_features(x, "given").double().cpu()
    label = torch.from_numpy(checked_labels(y, "given", len(features)))
    at = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:rows]
    unit, label = torch.nn.functional.normalize(features[at], dim=1), label[at]
    if not 1 < len(label.unique()) < len(label):
        return {}
    distance = torch.cdist(unit, unit)
    same = label[:, None] == label
    apart = ~torch.eye(len(label), dtype=torch.bool)
    # rounding leaves a distance of an item to itself, which scikit-learn refuses
    silhouette = float(silhouette_score(distance.fill_diagonal_(0).numpy(), label.numpy(), metric="precomputed"))
    within, between = float(distance[same & apart].mean()), float(distance[~same].mean())
    return {"silhouette": silhouette, "within": within, "between": between}


def ridge_probe(
    train_x: Array, train_y: Array, test_x: Array, test_y: Array, *, seed: int = 0, subject: str = ""
) -> Result:
    """Mean absolute error of a linear regression on frozen features: protocol `ridge-offline`; lower is better.

    Ridge regression on features standardised by training statistics. The penalty in 10^-2 ... 10^5 is the best one (by
    absolute error) on 20 % of the training items (a seeded random fifth); the regression is then fitted to all of
    them and the test set is looked at once.

    Args:
        train_x, test_x: features [N, D] and [M, D]
        train_y, test_y: values [N] and [M]
        seed: of the validation split

    Returns:
        A result in the unit of the values, whose detail holds the `penalty`, `guess` (the error of always saying the
        training median), `spearman` (between predicted and true values) and `ordinality` of the test features.

    Raises:
        InputError: empty, NaN or infinite features or values, lengths or widths that differ, fewer than five items.
    """
    from scipy.stats import spearmanr
    from sklearn.linear_model import Ridge

    train, test = checked_features(train_x, "training"), checked_features(test_x, "test")
    if train.shape[1] != test.shape[1]:
        raise InputError(f"training features have {train.shape[1]} columns but test features {test.shape[1]}")
    y, truth = (np.asarray(torch.as_tensor(values).cpu(), dtype=np.float64) for values in (train_y, test_y))
    if y.shape != (len(train),) or truth.shape != (len(test),) or not np.isfinite([*y, *truth]).all():
        raise InputError("a regression probe needs one finite value for each item")
    if len(y) < 5:
        raise InputError(f"a regression probe needs at least five training items, got {len(y)}")
    order = np.random.default_rng(seed).permutation(len(y))
    held_out, fitted = order[: len(y) // 5], order[len(y) // 5 :]

    def error(penalty: float, fit: np.ndarray, x: np.ndarray, new: np.ndarray, new_y: np.ndarray) -> Any:
        mean, deviation = x[fit].mean(0), x[fit].std(0)
        deviation[deviation <= 1e-7 * np.abs(mean)] = 1
        model = Ridge(alpha=penalty).fit((x[fit] - mean) / deviation, y[fit])
        predicted = model.predict((new - mean) / deviation)
        return np.abs(predicted - new_y), predicted

    x, new = train.cpu().double().numpy(), test.cpu().double().numpy()
    penalties = [10.0**power for power in range(5, -3, -1)]  # the strongest among equals
    best = min(penalties, key=lambda penalty: error(penalty, fitted, x, x[held_out], y[held_out])[0].mean())
    missed, predicted = error(best, np.arange(len(y)), x, new, truth)
    guess = float(np.abs(np.median(y) - truth).mean())
    detail = {"penalty": best, "guess": guess, "spearman": float(spearmanr(predicted, truth).statistic), "seed": seed}
    detail["ordinality"] = ordinality(new, truth)
    return Result(
        "ridge-offline", "mean absolute error", float(missed.mean()), bootstrap(missed), len(new), subject, detail
    )


def ordinality(x: Array, y: Array, *, rows: int = 1000, seed: int = 0) -> float:
    """Spearman correlation, over pairs of items, between cosine distance of the features and distance of the values.

    1: the farther apart two values are, the farther apart their features; 0: the features know nothing of the order.

    Args:
        x: features [N, D]
        y: values [N]
        rows: at most so many items, a seeded random subset
    """
    from scipy.stats import spearmanr

    features = checked_features(x, "given").double()
    values = torch.as_tensor(y).cpu().double()
    at = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:rows]
    some, value = torch.nn.functional.normalize(features.cpu()[at], dim=1), values[at]
    one, other = torch.triu_indices(len(at), len(at), offset=1)
    return float(spearmanr(1 - (some @ some.T)[one, other], (value[one] - value[other]).abs()).statistic)


def one_shot(encode: Callable[[Tensor], Array], runs: Runs, *, subject: str = "") -> Result:
    """Omniglot's official one-shot test: protocol `one-shot-20way`.

    In each of the 20 runs, each of 20 test drawings goes to the most similar (cosine) of 20 training drawings made by
    another person; chance is 5 %. The interval resamples whole runs, because the trials of a run share their drawings.

    Args:
        encode: uint8 [N, 1, S, S] -> features [N, D]
        runs: `counterpoint.data.omniglot.runs()`

    Raises:
        InputError: `encode` returns another number of rows, NaN or infinity.

    Source: Lake et al. 2015; the test's own baseline (modified Hausdorff distance) has 61.2 % correct.
    """
    count, ways = runs.answer.shape
    both = torch.cat([runs.training.flatten(0, 1), runs.test.flatten(0, 1)])
    x = checked_features(encode(both), "one-shot")
    if len(x) != len(both):
        raise InputError(f"encode returned {len(x):,} rows for {len(both):,} images, but one for each is needed")
    x = torch.nn.functional.normalize(x, dim=1).cpu()
    training, test = x.unflatten(0, (2, count, ways)).unbind(0)
    correct = (test @ training.transpose(1, 2)).argmax(2) == runs.answer
    groups = torch.arange(count).repeat_interleave(ways).numpy()
    share = 100 * correct.double().mean(1)
    detail = {"runs": count, "ways": ways, "worst_run": share.min().item(), "best_run": share.max().item()}
    return _accuracy("one-shot-20way", correct.flatten().numpy(), subject, detail, groups)


def raw_pixels(images: Tensor, side: int = 35) -> Tensor:
    """The baseline that learns nothing: uint8 [N, C, H, W], area-resized -> float32 [N, C * side * side] in [0, 1]."""
    return resize(images, side).flatten(1).float() / 255


def bootstrap(correct: Array, *, draws: int = 2000, seed: int = 0, groups: Array | None = None) -> tuple[float, float]:
    """95 % percentile interval of the mean of `correct`, in its unit.

    Args:
        correct: [N], one value (0 or 1, or any score) for each test item
        draws: resamplings
        seed: of the resampling
        groups: [N]; whole groups are resampled instead of items (trials of one run, captions of one image)

    Source: Efron 1979; percentile method.
    """
    values = np.asarray(correct.cpu() if isinstance(correct, Tensor) else correct, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise InputError(f"a bootstrap needs a non-empty list of values, got shape {list(values.shape)}")
    random = np.random.default_rng(seed)
    if groups is None:
        # how often each distinct value is drawn is multinomial, so 0/1 outcomes cost the same for any N
        distinct, count = np.unique(values, return_counts=True)
        step = max(1, 2**22 // len(distinct))
        sizes = [min(step, draws - start) for start in range(0, draws, step)]
        drawn = [random.multinomial(len(values), count / len(values), size) @ distinct for size in sizes]
        means = np.concatenate(drawn) / len(values)
    else:
        of = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
        if of.shape != values.shape:
            raise InputError(f"groups has shape {list(of.shape)}, but there are {len(values):,} values")
        _, index = np.unique(of, return_inverse=True)
        total, size = np.bincount(index, weights=values), np.bincount(index)
        times = random.multinomial(len(size), np.full(len(size), 1 / len(size)), draws)
        means = (times @ total) / (times @ size)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def geometry(x: Array, x2: Array | None = None, *, rows: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Shape of a set of features: `uniformity`, `effective_rank`, and `alignment` where x2 holds the positives of x.

    Args:
        x: [N, D]
        x2: [N, D], row i a positive of row i of x
        rows: at most so many rows, a seeded random subset, since uniformity looks at all pairs

    Source: Wang and Isola 2020 (arXiv 2005.10242); Roy and Vetterli 2007 (effective rank).
    """
    from counterpoint.contrast import alignment, effective_rank, uniformity

    first = checked_features(x, "given")
    if len(first) < 2:
        raise InputError("the geometry of a single vector says nothing; hand in at least two")
    at = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    found: dict[str, float] = {}
    if x2 is not None:
        second = checked_features(x2, "second")
        if second.shape != first.shape:
            raise InputError(f"x is {list(first.shape)} but x2 is {list(second.shape)}; pairs need equal shapes")
        found["alignment"] = float(alignment(first[at], second[at].to(first.device)))
    found["uniformity"] = float(uniformity(first[at]))
    found["effective_rank"] = float(effective_rank(first[at]))
    return found


def _accuracy(
    protocol: str, correct: np.ndarray, subject: str, detail: dict[str, Any], groups: np.ndarray | None = None
) -> Result:
    low, high = bootstrap(correct, groups=groups)
    value = 100 * float(correct.mean())
    return Result(protocol, "accuracy", value, (100 * low, 100 * high), len(correct), subject, detail)


def checked_features(x: Array, name: str) -> Tensor:
    """float32 [N, D], checked."""
    features = (x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))).float()
    if features.ndim != 2 or features.numel() == 0:
        raise InputError(f"the {name} features must be a non-empty [N, D] array, got shape {list(features.shape)}")
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        raise InputError(f"{bad:,} of {len(features):,} rows of the {name} features hold NaN or infinity")
    return features


def checked_labels(y: Array, name: str, n: int) -> np.ndarray:
    """int64 [N], checked."""
    labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
    if labels.shape != (n,):
        raise InputError(f"there are {n:,} {name} features but {name} labels of shape {list(labels.shape)}")
    if labels.dtype.kind not in "bui":
        raise InputError(f"{name} labels must be whole numbers, got {labels.dtype}")
    return labels.astype(np.int64)


def _task(
    train_x: Array, train_y: Array, test_x: Array, test_y: Array
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Checked features, labels as positions in the sorted training classes, and those classes."""
    train, test = checked_features(train_x, "training"), checked_features(test_x, "test")
    if train.shape[1] != test.shape[1]:
        raise InputError(f"training features have {train.shape[1]} columns but test features {test.shape[1]}")
    known, train_label = np.unique(checked_labels(train_y, "training", len(train)), return_inverse=True)
    labels = checked_labels(test_y, "test", len(test))
    unseen = sorted(set(labels.tolist()) - set(known.tolist()))
    if unseen:
        listed = ", ".join(map(str, unseen[:10])) + (f" and {len(unseen) - 10} more" if len(unseen) > 10 else "")
        what = "label" if len(unseen) == 1 else "labels"
        raise InputError(f"no training item has the test {what} {listed}; both need the same classes")
    test_label = np.searchsorted(known, labels)
    return train, test, torch.from_numpy(train_label.astype(np.int64)), torch.from_numpy(test_label), known.tolist()
