"""Which protocols fit a run's data, each on the trained encoder, the untrained one and raw pixels."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.atomic import save_arrays
from counterpoint.data import Images, omniglot
from counterpoint.data.images import resize
from counterpoint.errors import InputError
from counterpoint.evaluate import image_text, ranking, texts
from counterpoint.evaluate.protocols import Result, geometry, knn, linear_probe, one_shot, raw_pixels, ridge_probe
from counterpoint.train.method import Method
from counterpoint.train.run import Run

log = logging.getLogger("counterpoint")

Encode = Callable[[Tensor], Tensor | np.ndarray]
GALLERY = 1000


def evaluate(
    run: Run, data: Any = None, *, protocols: list[str] | None = None, trained_only: bool = False
) -> list[Result]:
    """Measure a run by every protocol that fits its data, write ``evaluation.json`` and, of images, the report's gallery.

    Sentences are measured on the STS sets, user histories by the rank of the held-out item, images by their labels, images
    with captions by retrieval, gap and, where classes have names, zero-shot classification.
    Labels, where there are any, serve the protocols only: training has not seen them. The classifiers of kNN and
    linear probe are fitted on the training items and scored on held-out ones: the data set's own test part, else a
    stratified fifth of the images (whose pixels, not labels, the training did see; the result says so).

    Args:
        run: a finished (or interrupted) run.
        data: evaluate on other data than the run was trained on.
        protocols: only these.
        trained_only: leave out the untrained encoder and what learned nothing (they were measured elsewhere).

    Returns:
        One result for each protocol and subject: "trained" (the last weights), "best on validation" where the training
        looked, "untrained", and what learned nothing ("raw pixels").

    Raises:
        InputError: data that fits no protocol, or a name that is no protocol.
    """
    config = run.config
    source = config["data"] if data is None else data
    if source is None:
        raise InputError("this run was trained on an array: pass the data to evaluate it on")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = run.model().to(device)
    subjects = {"trained": trained}
    if run.best.is_file():
        subjects["best on validation"] = run.model(best=True).to(device)
    if not trained_only:
        subjects["untrained"] = run.untrained().to(device)
    match trained.family:
        case "sentences":
            encoders: list[tuple[str, Any]] = [(name, method.encode) for name, method in subjects.items()]
            if not trained_only:
                encoders.append(("bag of words", texts.bag_of_words))
            found = list(texts.measure(encoders, protocols))
        case "histories":
            limit = config["fit"]["limit"] if data is None else None
            options: dict[str, Any] = {"splits": ("test", "valid"), "limit": limit, "seed": config["fit"]["seed"]}
            found = ranking.measure(subjects, source, popularity=not trained_only, **options)
            found = [result for result in found if wanted(result.protocol, protocols)]
        case "pairs":
            own = config["fit"]["limit"] if data is None else None
            known = {"limit": own, "seed": config["fit"]["seed"], "trained_on": config["data"]}
            found = image_text.measure(subjects, source, protocols=protocols, **known)
        case _:
            pictures: list[tuple[str, Encode]] = [(name, encoder_of(method)) for name, method in subjects.items()]
            if not trained_only:
                pictures.append(("raw pixels", pixels))
            found = _images(run, trained, pictures, source, data is not None, protocols)
    if not found:
        names = ", ".join(protocols or ("no protocol",))
        raise InputError(f"{names} does not fit {source}: it needs other data or labels")
    if source != config["data"]:
        for result in found:
            result.detail["data"] = str(source)
    _merge(run, found)
    return found


def _images(
    run: Run,
    trained: Method,
    subjects: list[tuple[str, Encode]],
    source: Any,
    other: bool,
    protocols: list[str] | None,
) -> list[Result]:
    known = ("one-shot-20way", "knn-200-0.1", "linear-offline", "ridge-offline", "geometry")
    for name in protocols or ():
        if name.partition(":")[0] not in known:
            raise InputError(f'no protocol named "{name}"; there are {", ".join(known)}')
    if source == "omniglot":
        found = list(_one_shot(subjects)) if wanted("one-shot-20way", protocols) else []
        shown, origin = _some_characters(), "drawings that training saw, without their labels"
    else:
        fit = run.config["fit"]
        train, test, note = _parts(source, trained, None if other else fit["limit"], fit["seed"])
        if note:
            note += _seen(source if other else None, run.config["data"])
        classes = 0 if train.label is None else len(train.label.unique())
        if classes == 1 and protocols is None:
            log.warning("all labels of %s are the same, so there is nothing to classify", train.name)
        classified = classes > 1 or (classes == 1 and protocols is not None)
        vectors = []
        if classified or train.factors:
            vectors = [(subject, encode(train.image), encode(test.image)) for subject, encode in subjects]
        found = list(_classified(vectors, train, test, note, protocols)) if classified else []
        found += _factors(vectors, train, test, note, protocols)
        if wanted("geometry", protocols):
            found += list(_geometry(subjects, test, train.label is None))
        origin = note or "test items that training never saw"
        shown = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:GALLERY])
    if found:
        _save_gallery(run, shown, trained, origin)
    return found


def _merge(run: Run, found: list[Result]) -> None:
    """Keep earlier results of other protocols and other data beside the new ones."""
    path = run.folder / "evaluation.json"
    try:
        before = json.loads(path.read_text()) if path.is_file() else []
    except ValueError:
        before = []
    new = [result.to_dict() for result in found]
    same = {(item["protocol"], item["subject"], item["detail"].get("data")) for item in new}
    kept = [item for item in before if (item["protocol"], item["subject"], item["detail"].get("data")) not in same]
    run.write("evaluation.json", new + kept)


def encoder_of(method: Method, batch_size: int = 512) -> Encode:
    """Embeddings of uint8 images ``[N, C, H, W]`` under `method`."""

    def encode(images: Tensor) -> np.ndarray:
        return method.encode(Images(images, name="images"), batch_size=batch_size)

    return encode


def pixels(images: Tensor) -> Tensor:
    """The baseline that learns nothing: pixels at a side of at most 35."""
    return raw_pixels(images, min(35, images.shape[-1]))


def wanted(name: str, protocols: list[str] | None) -> bool:
    return protocols is None or name in protocols


def _one_shot(subjects: list[tuple[str, Encode]]) -> Iterator[Result]:
    runs = omniglot.runs()
    for subject, encode in subjects:
        yield one_shot(encode, runs, subject=subject)


def _classified(vectors, train: Images, test: Images, note: str, protocols) -> Iterator[Result]:
    assert train.label is not None and test.label is not None
    for name, protocol in (("knn-200-0.1", knn), ("linear-offline", linear_probe)):
        if not wanted(name, protocols):
            continue
        for subject, train_x, test_x in vectors:
            result = protocol(train_x, train.label, test_x, test.label, subject=subject)
            result.detail["chance"] = 100 * float(test.label.bincount().max()) / len(test)
            if note:
                result.detail["note"] = note
            yield result


def _factors(vectors, train: Images, test: Images, note: str, protocols) -> Iterator[Result]:
    """What else is known of the images: a linear probe of each further class, a regression of each value."""
    for factor, values in train.factors.items():
        kind, probe = ("ridge-offline", ridge_probe) if values.is_floating_point() else ("linear-offline", linear_probe)
        if not wanted(f"{kind}:{factor}", protocols):
            continue
        for subject, train_x, test_x in vectors:
            found = probe(train_x, values, test_x, test.factors[factor], subject=subject)
            note_too = {"note": note} if note else {}
            yield replace(found, protocol=f"{kind}:{factor}", detail=found.detail | note_too)


def _geometry(subjects, test: Images, unlabelled: bool) -> Iterator[Result]:
    for subject, encode in subjects:
        shape = geometry(encode(test.image))
        yield Result("geometry", "effective rank", shape["effective_rank"], None, len(test), subject, dict(shape))
    if unlabelled:
        log.warning("the data has no labels, so only the geometry of the embedding can be measured")


def _parts(source: Any, method: Method, limit: int | None, seed: int) -> tuple[Images, Images, str]:
    train = method.read(source, "train", limit=limit, seed=seed, resident=True)
    assert isinstance(train, Images)
    try:
        if isinstance(source, Images):
            raise InputError("items in memory have no parts")
        test = method.read(source, "test", resident=True)
        assert isinstance(test, Images)
        return train, test, ""
    except InputError:
        first, second = train.split(0.2)
        return first, second, "held out by us: a fifth of the images; "


def _seen(data: Any, trained_on: str | None) -> str:
    if data is None or (isinstance(data, str | Path) and str(data) == trained_on):
        return "training saw their pixels, not their labels"
    return "training may have seen their pixels" if trained_on is None else "training used other data"


def _some_characters(count: int = 40) -> Images:
    """All drawings of some characters, so that neighbours can be found."""
    items = omniglot.load()
    assert items.label is not None
    some = torch.randperm(len(items.classes), generator=torch.Generator().manual_seed(0))[:count]
    return items.subset(torch.isin(items.label, some))


def _save_gallery(run: Run, items: Images, method: Method, origin: str) -> None:
    if len(items) < 2:
        return
    side = min(64, items.image.shape[-1])
    arrays = {"image": resize(items.image, side).numpy(), "vector": encoder_of(method)(items.image)}
    arrays["origin"] = np.array(origin)
    if items.label is not None:
        arrays |= {"label": items.label.numpy(), "classes": np.array(items.classes or [""])}
    save_arrays(run.folder / "gallery.npz", arrays)
