"""The score by which a training may choose among its own weights: of a validation part, never of the test part."""

from collections.abc import Callable
from typing import Any

import torch

from counterpoint.data import Images, captions
from counterpoint.errors import InputError
from counterpoint.evaluate import classes, code, image_text, labels, pairs, ranking, texts
from counterpoint.evaluate.protocols import Result, knn
from counterpoint.train.method import Method

Score = Callable[[Method], Result]


def scorer(method: Method, data: Any, *, limit: int | None = None, seed: int = 0) -> Score:
    """What ``fit(validate=...)`` looks at, decided by what the method embeds.

    Sentences: Spearman on the dev part of STS-B; on their own dev part F1max where the data are named pairs (code and
    questions: mean reciprocal rank), and accuracy where the method learns the labels of a named set
    (with a classifier of its own: on rows that are held out, or the dev part of a known set). Histories: NDCG@20 of
    each user's second-to-last item among all items.
    Images with captions: R@1, the mean of both directions, on the validation part.
    Images: kNN accuracy of a fifth of the training images among the others, which needs labels (they choose the
    weights, and train nothing).

    Args:
        method: what is trained.
        data: what it is trained on.
        limit, seed: the subset of it.

    Raises:
        InputError: images without labels, or data that hold nothing out.
    """
    match method.family:
        case "sentences" if method.classification is not None:
            unseen = classes.validation_rows(method, data, limit=limit, seed=seed)
            return lambda trained: classes.tuned(trained, unseen, name=f"{method.classification}-dev")
        case "sentences":
            if method.searched is not None or code.is_code(data):
                if code.task_of(data, "dev", own=False):
                    return lambda trained: code.score_of(data, trained)
                if method.searched is not None:
                    raise InputError(
                        f"validate looks for answers in the dev part of named pairs, which {data} has not; leave validate out"
                    )
            if pairs.labelled(data, "dev", own=False) is not None:
                return lambda trained: pairs.score_of(data, trained)
            if method.uses_labels and (of_labels := labels.scorer(data)) is not None:
                return of_labels
            texts.texts.sts("stsb", "dev")  # say now, not after an epoch, that it is not here
            return lambda trained: texts.sts_b(trained.encode, split="dev")
        case "histories":
            rows = method.read(data, "valid", limit=limit, seed=seed)
            target = rows.take(torch.arange(len(rows)))["target"]

            def next_item(trained: Any) -> Result:
                items = trained.encoder.table.detach()
                return ranking.loo_full_ranking(ranking.user_vectors(trained, rows), items, target, split="valid")

            return next_item
        case "pairs":
            return _retrieval(method, data)
        case "language":
            raise InputError("the text that is held out of a language model is its test: leave validate out")
    images = method.read(data, limit=limit, seed=seed, resident=True)
    if not isinstance(images, Images) or images.label is None or len(images.label.unique()) < 2:
        raise InputError(
            f"validate scores images by their classes, but {images.name} has no labels; leave validate out"
        )
    bank, held = images.known().split(0.2)
    bank_y, held_y = bank.label, held.label
    assert bank_y is not None and held_y is not None

    def neighbours(trained: Method) -> Result:
        return knn(trained.encode(bank), bank_y, trained.encode(held), held_y)

    return neighbours


def _retrieval(method: Any, data: Any) -> Score:
    try:
        held = captions.load(data, "valid", size=method.stored_size, channels=method.channels, resident=True)
    except InputError as error:
        raise InputError(f"validate needs pairs that training does not see ({error}); leave validate out") from error
    return lambda trained: next(
        result
        for result in image_text.measure({"trained": trained}, held, protocols=["retrieval-mean"])
        if result.protocol == "retrieval-mean"
    )
