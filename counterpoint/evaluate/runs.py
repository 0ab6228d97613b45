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
from counterpoint.evaluate import classes, code, dense, image_text, labels, language, pairs, ranking, texts
from counterpoint.evaluate.protocols import (
    Result,
    geometry,
    knn,
    linear_probe,
    one_shot,
    own_classifier,
    raw_pixels,
    ridge_probe,
)
from counterpoint.train.method import Method
from counterpoint.train.run import Run
from counterpoint.train.start import language_model

log = logging.getLogger("counterpoint")

Encode = Callable[[Tensor], Tensor | np.ndarray]
GALLERY = 1000
HEAD = "@head"
"""What the name of a protocol ends with when it measures what comes out of the projection head."""


def evaluate(
    run: Run,
    data: Any = None,
    *,
    protocols: list[str] | None = None,
    trained_only: bool = False,
    head: bool = False,
) -> list[Result]:
    """Measure a run by every protocol that fits its data, write ``evaluation.json`` and, of images, the report's gallery.

    Language models are measured on held-out text, or on questions where they were trained on facts.
    Sentences are measured on the STS sets, and on labelled pairs or texts where the data hold any; code by where the answer to
    a question stands; a classifier of the method's own by what it says of rows that it has not learned from; user histories
    by the rank of the held-out item, images by their labels, images with captions by retrieval, gap and, where classes
    have names, zero-shot classification.
    Labels, where there are any, serve the protocols only: training has not seen them, unless the method says that it uses
    them. The classifiers of kNN and linear probe are fitted on the training items and scored on held-out ones: the data
    set's own test part, else a stratified fifth of the images (whose pixels, not labels, the training did see; the result
    says so). A classifier that the method itself trained is scored where there are items whose labels it has not seen.

    Args:
        run: a finished (or interrupted) run.
        data: evaluate on other data than the run was trained on.
        protocols: only these; with "@head" at the end of a name, after the projection head. Such a result's detail holds
            the value `before` the head.
        head: measure by each protocol before and after the projection head (images only).
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
    if (head or any(name.endswith(HEAD) for name in protocols or ())) and trained.family != "images":
        raise InputError(f"protocols after the projection head measure images, and {source} holds none")
    found: list[Result] = []
    options: dict[str, Any]
    match trained.family:
        case "sentences":
            encoders: list[tuple[str, Any]] = [(name, method.encode) for name, method in subjects.items()]
            if not trained_only:
                encoders.append(("bag of words", texts.bag_of_words))
            asked_pairs = [name for name in protocols or () if name.partition(":")[0] == pairs.PAIR_F1]
            asked_search = [name for name in protocols or () if name.partition(":")[0] == code.CODE_SEARCH]
            asked_labels = [name for name in protocols or () if name.partition(":")[0] in labels.PROTOCOLS]
            own = trained.classification
            asked_linear = [name for name in protocols or () if name.partition(":")[0] == classes.LINEAR]
            elsewhere = {*asked_pairs, *asked_search, *asked_labels, *asked_linear, own}
            others = [name for name in protocols or () if name not in elsewhere]
            unseen = data is not None and not (isinstance(data, str | Path) and _place(data) == config["data"])
            options = {"own": unseen, "bag": not trained_only}
            if own is not None and wanted(own, protocols):
                fit = config["fit"]
                found += classes.measure(subjects, source, other=unseen, limit=fit["limit"], seed=fit["seed"])
            everything = protocols is None and trained.searched is None and own is None
            if asked_search or (protocols is None and (trained.searched is not None or code.is_code(source))):
                found += code.measure(subjects, source, asked_search or [code.CODE_SEARCH], **options)
            if everything or asked_pairs:
                found += pairs.measure(subjects, source, asked_pairs or None, **options)
            if everything or asked_labels:
                options |= {"own": unseen or not trained.uses_labels, "trained_on": config["data"]}
                found += labels.measure(subjects, source, asked_labels or None, **options)
            found += classes.measure_linear(encoders, source, asked_linear, own=unseen or not trained.uses_labels)
            if others or (everything and not (data is not None and found)):
                found += texts.measure(encoders, others or None)
        case "histories":
            limit = config["fit"]["limit"] if data is None else None
            options = {"splits": ("test", "valid"), "limit": limit, "seed": config["fit"]["seed"]}
            found = ranking.measure(subjects, source, popularity=not trained_only, **options)
            found = [result for result in found if wanted(result.protocol, protocols)]
        case "language":
            judge = language_model(str(trained.scorer), device)[0] if trained.scorer else None
            part = "test" if _place(source) == config["data"] or source == config["data"] else "all"
            found = [*language.measure(subjects, source, protocols, split=part, scorer=judge)]
        case "pairs":
            own = config["fit"]["limit"] if data is None else None
            known = {"limit": own, "seed": config["fit"]["seed"], "trained_on": config["data"]}
            found = image_text.measure(subjects, source, protocols=protocols, **known)
        case _:
            pictures: list[tuple[str, Encode]] = [(name, encoder_of(method)) for name, method in subjects.items()]
            if not trained_only:
                pictures.append(("raw pixels", pixels))
            asked = None if protocols is None else [name.removesuffix(HEAD) for name in protocols]
            found = _images(run, subjects, pictures, source, data is not None, asked)
            if head or asked != protocols:
                pictures = [(name, encoder_of(method, after_head=True)) for name, method in subjects.items()]
                after = _images(run, subjects, pictures, source, data is not None, asked, gallery=False)
                found += _after(after, found)
                if protocols is not None:
                    every = {*protocols, *(name + HEAD for name in asked or () if head)}
                    found = [result for result in found if result.protocol in every]
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
    methods: dict[str, Method],
    subjects: list[tuple[str, Encode]],
    source: Any,
    other: bool,
    protocols: list[str] | None,
    gallery: bool = True,
) -> list[Result]:
    trained = methods["trained"]
    known = ["one-shot-20way", "knn-200-0.1", "linear-offline", "ridge-offline", "dense-linear", "geometry"]
    known += [trained.classification] if trained.classification else []
    for name in protocols or ():
        if name.partition(":")[0] not in known:
            raise InputError(f'no protocol named "{name}"; there are {", ".join(known)}')
    if source == "omniglot":
        found = list(_one_shot(subjects)) if wanted("one-shot-20way", protocols) else []
        shown, origin = _some_characters(), "drawings that training saw, without their labels"
    else:
        fit = run.config["fit"]
        train, test, note = _parts(source, trained, None if other else fit["limit"], fit["seed"])
        train, test = train.known(), test.known()  # generated images, whose label nobody knows, are not measured
        if note:
            seen = _seen(source if other else None, run.config["data"])
            note += seen if not trained.uses_labels else seen.replace(", not their labels", " and their labels")
        classes = 0 if train.label is None else len(train.label.unique())
        if classes == 1 and protocols is None:
            log.warning("all labels of %s are the same, so there is nothing to classify", train.name)
        classified = classes > 1 or (classes == 1 and protocols is not None)
        vectors = []
        if classified or any(values.ndim == 1 for values in train.factors.values()):
            vectors = [(subject, encode(train.image), encode(test.image)) for subject, encode in subjects]
        found = list(_classified(vectors, train, test, note, protocols)) if classified else []
        found += _factors(vectors, train, test, note, protocols)
        if gallery:  # places of a map have no projection head of their own
            found += _dense(methods, subjects, train, test, note, protocols)
        # the method's own classifier has its one place, which gallery=False (after the head) is not
        if gallery and classified and trained.classification and wanted(trained.classification, protocols):
            found += _own_classifier(methods, vectors, test, note, other)
        if wanted("geometry", protocols):
            found += list(_geometry(subjects, test, train.label is None))
        origin = note or "test items that training never saw"
        shown = test.subset(torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:GALLERY])
    if found and gallery:
        _save_gallery(run, shown, trained, origin)
    return found


def _place(data: str | Path) -> str:
    return str(Path(data).expanduser().resolve())


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


def _after(found: list[Result], before: list[Result]) -> list[Result]:
    """Results after the head, by their names, each with the value of the same subject before it."""
    values = {(result.protocol, result.subject): result.value for result in before}
    return [
        replace(
            result,
            protocol=result.protocol + HEAD,
            detail=result.detail | {"before": values[result.protocol, result.subject]},
        )
        for result in found
    ]


def encoder_of(method: Method, batch_size: int = 512, *, after_head: bool = False) -> Encode:
    """Embeddings of uint8 images ``[N, C, H, W]`` under `method`, or what its projection head makes of them."""

    def encode(images: Tensor) -> np.ndarray:
        function = method.encode_projected if after_head else method.encode
        return function(Images(images, name="images"), batch_size=batch_size)

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


def _own_classifier(methods: dict[str, Method], vectors, test: Images, note: str, other: bool) -> Iterator[Result]:
    """Accuracy of the classifiers that training made, on items whose labels they have not seen."""
    name = methods["trained"].classification
    assert test.label is not None and name is not None
    if note and not other:
        log.warning("%s left out: training saw the labels of all items; give --data with others", name)
        return
    features = {subject: test_x for subject, _, test_x in vectors}
    for subject, method in methods.items():
        predicted = method.classify(Images(test.image, name="images"))
        result = own_classifier(name, predicted, features[subject], test.label, subject=subject)
        result.detail["chance"] = 100 * float(test.label.bincount().max()) / len(test)
        if note:
            result.detail["note"] = note
        yield result


def _factors(vectors, train: Images, test: Images, note: str, protocols) -> Iterator[Result]:
    """What else is known of the images: a linear probe of each further class, a regression of each value."""
    for factor, values in train.factors.items():
        if values.ndim > 1:
            continue
        kind, probe = ("ridge-offline", ridge_probe) if values.is_floating_point() else ("linear-offline", linear_probe)
        if not wanted(f"{kind}:{factor}", protocols):
            continue
        for subject, train_x, test_x in vectors:
            try:
                found = probe(train_x, values, test_x, test.factors[factor], subject=subject)
            except InputError as error:  # a column that nobody asked for must not end the evaluation
                if protocols is not None:
                    raise
                log.warning("%s:%s left out: %s", kind, factor, error)
                break
            note_too = {"note": note} if note else {}
            yield replace(found, protocol=f"{kind}:{factor}", detail=found.detail | note_too)


def _dense(
    methods: dict[str, Method], subjects: list[tuple[str, Encode]], train: Images, test: Images, note: str, protocols
) -> Iterator[Result]:
    """A linear probe of single locations for each label map."""
    maps = [(name, dense.maps_of(method)) for name, method in methods.items()]
    maps += [(name, dense.patches) for name, _ in subjects if name not in methods]
    for factor, values in train.factors.items():
        if values.ndim != 3 or not wanted(f"dense-linear:{factor}", protocols):
            continue
        for subject, encode in maps:
            try:
                result = dense.dense_linear(encode, train, test, factor, subject=subject)
            except InputError as error:  # as above
                if protocols is not None:
                    raise
                log.warning("dense-linear:%s left out: %s", factor, error)
                break
            if note:
                result.detail["note"] = note
            yield result


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
