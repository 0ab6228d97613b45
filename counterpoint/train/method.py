"""The base of every method: a thin LightningModule that knows `loss` and `embed`, and no training loop."""

import dataclasses
import inspect
import types
import typing
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from counterpoint.contrast import Pairs
from counterpoint.data import load
from counterpoint.errors import CounterpointError, InputError, nearest
from counterpoint.train.batches import Batches
from counterpoint.train.optimise import Optimisation, build_optimiser, decay_groups

Batch = dict[str, Tensor]


class Diverged(CounterpointError):
    """A loss term stopped being a finite number."""


class Method(lightning.LightningModule):
    """What a paper's file fills in: parts in ``__init__``, the objective in `loss`, the embedding in `embed`.

    Constructor arguments are typed; they are the method's configuration, its command-line flags and its documentation,
    and they are recorded in `arguments` so that a run can rebuild the method.

    Subclasses may also override `after_step` (each optimiser step, for a momentum encoder) and `parameter_groups`.
    """

    uses_labels = False
    """Whether the objective reads ``batch["label"]``."""

    parts_rest = False
    """Whether some of its weights take no part in some steps (several processes must know)."""

    family = "images"
    """What it embeds, which decides how it is measured: "images", "sentences", "histories", "pairs" or "language"."""

    searched: str | None = None
    """Of pairs whose anchors are questions, the column that is searched for answers ("positive"): what an index holds."""

    classification: str | None = None
    """Protocol of the method's own classifier: "online-head" if the encoder learns nothing from it, "fine-tune" if it does.

    None: it has none. Otherwise it has `class_scores`, and `classes`, how many it tells apart.
    """

    encoder: Any
    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Method":
        method = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        bound = signature.bind_partial(method, *args, **kwargs)  # copying a method calls this without arguments
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        object.__setattr__(method, "arguments", arguments)
        return method

    def __init__(self) -> None:
        super().__init__()
        self.optimisation = Optimisation()
        self.watching = False
        self.watched: dict[str, Any] = {}

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """The objective on one batch: a scalar, or named scalar terms whose sum is minimised."""

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings ``[B, D]`` of a batch as the world sees them: no random views, no projector."""
        return self.encoder.embed(batch)

    def projected(self, batch: Batch) -> Tensor:
        """What the objective contrasts ``[B, P]``: `embed`, and then the projector that is thrown away after training.

        Raises:
            InputError: the method has no projector.
        """
        if not callable(projector := getattr(self, "projector", None)):
            raise InputError(f"{type(self).__name__} has no projection head: there is nothing to measure after it")
        return projector(self.embed(batch))

    def class_scores(self, batch: Batch) -> Tensor:
        """Scores ``[B, classes]`` of a batch under the method's own classifier: no random views."""
        raise InputError(f"{type(self).__name__} has no classifier of its own: fit one to the vectors of encode")

    def after_step(self) -> None:
        """Called after every optimiser step."""

    def grouping(self, epoch: int, items: Any) -> Tensor | None:
        """Group of each item int64 ``[N]`` if the batches of this epoch shall hold items of one group each; else None.

        Items of a group below 0 sit this epoch out, which has as many batches as any other.

        Asked when the epoch's first batch is (or, after a stop within it, the first that is left), so the weights may be
        looked at; the answer must come from them and from buffers alone.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups; by default weights with weight decay, biases and normalisation without."""
        return decay_groups(self, self.optimisation.weight_decay)

    def watch(
        self,
        query: Tensor,
        key: Tensor,
        pairs: Pairs | None = None,
        *,
        positive: Tensor | None = None,
        negative: Tensor | None = None,
        score: Tensor | None = None,
    ) -> None:
        """Show the embeddings of this batch to whoever looks (metrics, report); free unless a step is recorded.

        Args:
            query: as the encoder made them.
            key: row i belongs to row i, unless `positive` says otherwise.
            pairs: what enters the loss, with its queue and its changes; without, each query among the keys of the batch.
            positive: bool ``[N, M]``, where labels say which keys belong to a query.
            negative: bool ``[N, M]``, which keys repel it; None: all that are not positive. Only beside `positive`.
            score: ``[N, M]``, what enters the loss where that is not the cosine. Only beside `positive`.
        """
        if self.watching:
            self.watched = {"query": query.detach(), "key": key.detach()}
            if pairs is not None:
                self.watched["pairs"] = pairs.detach()
            if positive is not None:
                self.watched |= {"positive": positive, "negative": ~positive if negative is None else negative}
                self.watched["score"] = None if score is None else score.detach()

    def watch_classes(self, embedding: Tensor, label: Tensor) -> None:
        """As `watch`: rows ``[N, d]`` of one class, int64 ``[N]``, belong together."""
        if self.watching:
            same = label[:, None] == label
            self.watch(embedding, embedding, positive=same.clone().fill_diagonal_(False), negative=~same)

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0 to 1."""
        total = self.trainer.estimated_stepping_batches
        return min(1.0, self.global_step / total) if total else 1.0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        terms = loss if isinstance(loss, dict) else {self.__class__.__name__.lower() + " loss": loss}
        self.terms = {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum() if isinstance(loss, dict) else loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.after_step()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning refuses this of fused optimisers in mixed precision, even where no gradient was scaled
        if gradient_clip_val is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def configure_optimizers(self) -> Any:
        return build_optimiser(
            self.parameter_groups(),
            self.optimisation,
            self.trainer.estimated_stepping_batches,
            fused=self.trainer.precision != "16-mixed",
        )

    def read(
        self, data: Any, split: str = "train", *, limit: int | None = None, seed: int = 0, resident: bool | None = None
    ) -> Any:
        """The items of `data` as this method takes them; by default images.

        Args:
            data: whatever `counterpoint.data.load` takes: a known name, a folder, a file of arrays, an array, a tensor.
            split: which part of a data set that has several.
            limit: at most so many, a seeded random subset.
            seed: of that subset.
            resident: True holds the items in memory, False streams them, None decides by their size.
        """
        items = load(data, split, size=self.stored_size, limit=limit, seed=seed, resident=resident)
        channels = getattr(self, "channels", None)
        return items if channels is None else items.channels(channels)

    def training_items(self, data: Any, *, limit: int | None = None, seed: int = 0) -> Any:
        """What to train on: the items of `data`, and whatever the method adds to them."""
        return self.read(data, limit=limit, seed=seed)

    def encode(self, data: Any, *, split: str = "train", batch_size: int = 512) -> np.ndarray:
        """Embeddings of a data set as a float32 array ``[N, D]``.

        Args:
            data: whatever `read` takes.
            split: which part of a data set that has several.
            batch_size: items per forward pass.

        Raises:
            InputError: items of a list that cannot be read: the rows would no longer be those of the list.
        """
        return self._rows(self.embed, data, split, batch_size).numpy()

    def encode_projected(self, data: Any, *, split: str = "train", batch_size: int = 512) -> np.ndarray:
        """As `encode`, of what comes out of the projection head: float32 ``[N, P]``.

        Args:
            data: whatever `read` takes.
            split: which part of a data set that has several.
            batch_size: items per forward pass.

        Raises:
            InputError: the method has no projector; as `encode`.
        """
        return self._rows(self.projected, data, split, batch_size).numpy()

    def classify(self, data: Any, *, split: str = "train", batch_size: int = 512) -> np.ndarray:
        """The class of every item, int64 ``[N]``, under the method's own classifier.

        Args:
            data: whatever `read` takes.
            split: which part of a data set that has several.
            batch_size: items per forward pass.

        Raises:
            InputError: the method has no classifier; as `encode`.
        """
        return self._rows(self.class_scores, data, split, batch_size).argmax(1).numpy()

    @torch.no_grad()
    def _rows(self, function: Callable[[Batch], Tensor], data: Any, split: str, batch_size: int) -> Tensor:
        """What `function` makes of every item, in their order, float32 on the CPU."""
        batches = Batches(self.read(data, split), batch_size, shuffle=False).to(self.device)
        training = self.training
        self.eval()
        try:
            found = torch.cat([function(self.to_device(batch)).float().cpu() for batch in batches])
        finally:
            self.train(training)
        if isinstance(data, list | tuple) and len(found) != len(data):
            raise InputError(f"{len(data) - len(found):,} of {len(data):,} items cannot be embedded: leave them out")
        return found[batches.order().argsort()]

    @property
    def stored_size(self) -> int | None:
        """Side to which larger images are brought once, so that random crops still find detail in them."""
        size = getattr(self, "image_size", None)
        return None if size is None else 2 * size if size <= 112 else round(1.25 * size)

    def to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


def construct(cls: type[Method], arguments: dict[str, Any]) -> Method:
    """Build a method from plain data (YAML): dictionaries become the data classes that the constructor names.

    Raises:
        InputError: an argument the constructor does not have.
    """
    return cls(**typed(cls, arguments))


def typed(cls: type[Method], arguments: dict[str, Any]) -> dict[str, Any]:
    """Plain data as the constructor's arguments: see `construct`.

    Raises:
        InputError: an argument the constructor does not have, or a value that it cannot be.
    """
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base) and issubclass(base, Method):
            hints.update(typing.get_type_hints(base.__init__))
    built = {}
    for name, value in arguments.items():
        if name not in hints:
            raise InputError(f'{cls.__name__} has no argument "{name}"{nearest(name, hints)}')
        built[name] = checked(name, _typed(value, hints[name]), hints[name])
    return built


def checked(name: str, value: Any, hint: Any) -> Any:
    """`value`, if it is of the type that the argument `name` declares.

    Raises:
        InputError: it is not.
    """
    if fits(value, hint):
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    choices = [str(choice) for choice in typing.get_args(hint)] if typing.get_origin(hint) is typing.Literal else []
    meant = f"one of {', '.join(choices)}" if choices else words.get(hint, str(hint))
    raise InputError(f"{name} must be {meant}, not {value!r}{nearest(str(value), choices)}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a declared type; True where the declaration says more than can be checked here."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inside)
    if origin is typing.Literal:
        return value in inside
    if origin is tuple and isinstance(value, tuple):
        kinds = [inside[0]] * len(value) if inside[-1] is ... else inside
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if hint is float or hint is int:
        return isinstance(value, int | hint) and not isinstance(value, bool)
    kind = origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def plain(value: Any) -> Any:
    """The inverse of `construct` for one argument: data classes become dictionaries, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if callable(value):
        return getattr(value, "__name__", str(value))
    return value


def _typed(value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    records = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    if records and isinstance(value, dict):
        # of several kinds of record, the one that has all the fields
        hints = [(record, typing.get_type_hints(record)) for record in records]
        record, inner = next((pair for pair in hints if value.keys() <= pair[1].keys()), hints[0])
        for name in value:
            if name not in inner:
                raise InputError(f'{record.__name__} has no field "{name}"{nearest(name, inner)}')
        return record(**{name: checked(name, _typed(item, inner[name]), inner[name]) for name, item in value.items()})
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list):
            inside = typing.get_args(option)
            inside = inside[:1] * len(value) if inside[-1] is ... else inside
            return tuple(_typed(item, kind) for item, kind in zip(value, inside, strict=False))
    return value
