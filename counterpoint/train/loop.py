"""Training: Lightning underneath, a run folder as the result."""

import inspect
import logging
import math
import os
import shutil
import typing
import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from counterpoint.contrast import distributed
from counterpoint.data import NAMES
from counterpoint.errors import InputError, NotFinite, nearest
from counterpoint.train.batches import Batches
from counterpoint.train.callbacks import Checkpointer, FiniteLoss, Position, Progress, Recorder, Selection, StepSeed
from counterpoint.train.checkpoint import SafeCheckpointIO, load_state
from counterpoint.train.chunks import in_chunks
from counterpoint.train.method import Diverged, Method, checked
from counterpoint.train.optimise import Optimisation, bytes_of_training
from counterpoint.train.run import Run, describe, environment, make_folder, next_folder

log = logging.getLogger("counterpoint")

FOLDER = "COUNTERPOINT_RUN"
"""Environment variable by which the first of several processes tells the others where the run is."""


def fit(
    method: Method,
    data: Any,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    steps: int | None = None,
    optimizer: Literal["sgd", "lars", "adam", "adamw"] = "sgd",
    lr: float = 0.06,
    weight_decay: float = 5e-4,
    sgd_momentum: float = 0.9,
    warmup: float = 0.0,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    chunk: int | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    device: Literal["auto", "cpu", "gpu"] = "auto",
    devices: int = 1,
    exchange: Literal["gather", "ring"] = "gather",
    compile: bool = False,
    workers: int = 2,
    limit: int | None = None,
    validate: int = 0,
    patience: int = 0,
    seed: int = 0,
    run: str | Path | None = None,
    logger: Literal["none", "tensorboard", "wandb"] = "none",
    log_every: int = 10,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
    command: str | None = None,
) -> Run:
    """Train a method on a data set and return its run.

    The same seed on the same machine gives the same weights, also when the training was killed and resumed: the order
    of an epoch is a function of (seed, epoch), and every random draw of a step one of (seed, step).

    Args:
        method: what to train.
        data: known name, folder of images, array file, array or tensor; see `counterpoint.data.load`.
        epochs: passes over the data.
        batch_size: items per step over all devices; views come on top.
        steps: optimiser steps after which the training ends, whatever `epochs` says: equal work on data of any size.
        optimizer: update rule.
        lr: peak learning rate, used as given.
        weight_decay: on weights, not on biases and normalisation.
        sgd_momentum: of sgd and lars.
        warmup: share of all steps with linearly growing rate.
        schedule: cosine or linear to zero, or constant.
        chunk: items that an encoder computes at a time, for batches whose activations do not fit; the loss still sees the
            whole batch. Costs a second forward pass; see `counterpoint.train.chunks.in_chunks`.
        accumulate: batches per optimiser step. It adds no negatives: each batch contrasts only with itself.
        clip: largest gradient norm.
        precision: number format of the forward and backward pass.
        device: where to train; auto takes a GPU when there is one.
        devices: how many of them (data parallel, negatives from all).
        exchange: how rows of several devices meet: each gathers all keys, or key blocks travel from one to the next and
            nobody holds more than a few; see `counterpoint.contrast.distributed.exchange`.
        compile: compile encoder and heads with torch.compile.
        workers: decoding processes for image folders that do not fit in memory.
        limit: train on a random subset of this many items.
        validate: epochs between looks at the validation score (see `counterpoint.evaluate.validation`), whose best weights
            are kept beside the last ones; 0 never looks.
        patience: looks without a better score after which the training ends; 0 goes to the end.
        seed: of the initial weights (when trained from the command line), the order and the views.
        run: folder to create; default runs/METHOD-N.
        logger: besides metrics.jsonl.
        log_every: steps between records.
        checkpoint_seconds: shortest time between two checkpoints.
        progress: show the bar.
        command: the command line, for the record.

    Returns:
        The run; ``run.interrupted`` is True after Ctrl-C.

    Raises:
        InputError: unusable data, option or folder.
        Diverged: a loss that is not finite.
    """
    options = {name: value for name, value in locals().items() if name not in ("method", "data", "run", "command")}
    _check_options(options)
    items = method.training_items(data, limit=limit, seed=seed)
    config = describe(method, _name(data), options, command)
    _check(method, items, options)
    score = _score(method, data, options)
    if devices > 1 and os.environ.get("LOCAL_RANK", "0") != "0":  # started beside the first, which made the folder
        place = Path(os.environ.get(FOLDER) or run or "runs")
        return _train(Run(place, method), method, items, score, options, resume=False)
    folder = next_folder(config["method"].rsplit(":", 1)[-1].lower()) if run is None else Path(run)
    make_folder(folder)
    os.environ[FOLDER] = str(folder)
    result = Run(folder, method)
    try:
        result.write("config.yaml", config)
        result.write("environment.json", environment())
        return _train(result, method, items, score, options, resume=False)
    except BaseException:
        if not (folder / "metrics.jsonl").exists() and not result.checkpoint.exists():
            shutil.rmtree(folder)  # nothing happened: leave the name free for another try
        raise


def resume(folder: str | Path, data: Any = None, *, changes: dict[str, Any] | None = None) -> Run:
    """Go on with a run where its last checkpoint left it, exactly.

    Args:
        folder: the run.
        data: needed only when the run was trained on an array or tensor.
        changes: options someone asked for now; they must agree with the run's.

    Raises:
        InputError: no run, no checkpoint, or a different configuration (the difference is listed).
    """
    result = Run.open(folder)
    config = result.config
    different = []
    known = {"method": config["method"], "data": config["data"], **config["model"], **config["fit"]}
    for name, value in (changes or {}).items():
        value = _name(value) if name == "data" else value
        before: Any = known
        for part in name.split("."):
            if not isinstance(before, dict) or part not in before:
                raise InputError(f"{folder} has no option {name}{nearest(name, known)}")
            before = before[part]
        if before != value:
            different.append(f"{name}: {before} in the run, {value} now")
    if different:
        raise InputError(f"{folder} was trained with another configuration ({'; '.join(different)}); start a new run")
    if not result.checkpoint.is_file():
        raise InputError(f"{folder} has no checkpoint yet: it was stopped before its first one; start again")
    load_state(result.checkpoint)
    for rest in result.checkpoint.parent.glob(".*.partial"):  # of a process that was killed while it wrote
        rest.unlink(missing_ok=True)
    options = config["fit"]
    missing = [name for name in _options() if name not in options]
    if missing:
        raise InputError(f"{folder}/config.yaml does not say {', '.join(missing)}: another version wrote it")
    if data is None and config["data"] is None:
        raise InputError(f"{folder} was trained on an array: pass the same data again")
    method = result.model().train()  # what it has learned may decide how it reads its data
    data = config["data"] if data is None else data
    items = method.training_items(data, limit=options["limit"], seed=options["seed"])
    result.method = method
    return _train(result, method, items, _score(method, data, options), options, resume=True)


def _score(method: Method, data: Any, options: dict[str, Any]) -> Any:
    """What `validate` looks at, as a function of the method; made before the run folder, since the data may not do."""
    if not options["validate"]:
        return None
    from counterpoint.evaluate.validation import scorer

    return scorer(method, data, limit=options["limit"], seed=options["seed"])


def _train(result: Run, method: Method, items: Any, score: Any, options: dict[str, Any], *, resume: bool) -> Run:
    import lightning

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    fields = ("optimizer", "lr", "weight_decay", "warmup", "schedule")
    method.optimisation = Optimisation(**{name: options[name] for name in fields}, momentum=options["sgd_momentum"])
    torch.manual_seed(options["seed"])
    batches = Batches(items, options["batch_size"], seed=options["seed"], workers=options["workers"])
    guard = FiniteLoss(result.folder)
    checkpointer = Checkpointer(result.folder, guard, options["checkpoint_seconds"])
    recorder = Recorder(result.folder, options["log_every"])
    callbacks: list[Any] = [StepSeed(options["seed"]), Position(batches), guard, recorder]
    if score is not None:
        callbacks.append(Selection(result, score, options["validate"], options["patience"]))
    callbacks.append(checkpointer)  # last, so that a checkpoint holds what the others know
    if options["progress"]:
        callbacks.append(Progress(recorder))
    steps, epochs = options["steps"], options["epochs"]
    if steps is not None:
        epochs = -(-steps // -(-len(batches) // options["accumulate"]))
    parallel = "ddp_find_unused_parameters_true" if method.parts_rest else "ddp"
    trainer = lightning.Trainer(
        max_epochs=epochs,
        max_steps=-1 if steps is None else steps,
        accelerator=options["device"],
        devices=options["devices"],
        strategy=parallel if options["devices"] > 1 else "auto",
        sync_batchnorm=options["devices"] > 1 and torch.cuda.is_available() and options["device"] != "cpu",
        precision=options["precision"],
        accumulate_grad_batches=options["accumulate"],
        gradient_clip_val=options["clip"],
        plugins=[SafeCheckpointIO()],
        callbacks=callbacks,
        logger=_logger(options["logger"], result.folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    batches.to(trainer.strategy.root_device, trainer.global_rank, trainer.world_size)
    batches.grouping = method.grouping
    if options["compile"]:
        for part in method.children():
            part.compile()
    method.train()
    try:
        with in_chunks(method, options["chunk"]), distributed.exchange(options["exchange"]):
            trainer.fit(method, batches, ckpt_path=str(result.checkpoint) if resume else None)
    except NotFinite as error:  # embeddings, before there was a loss to look at
        raise Diverged(guard.advice(str(error), trainer.global_step + 1, trainer)) from error
    except SystemExit:  # what Lightning makes of a second Ctrl-C
        raise KeyboardInterrupt from None
    if trainer.world_size > 1:
        result.folder = Path(trainer.strategy.broadcast(str(result.folder)))
        torch.distributed.destroy_process_group()  # or the next loss that someone computes would wait for the others
    result.interrupted = checkpointer.stopped
    method.eval()
    return result


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what no training can mean, before anything is loaded or created."""
    hints = typing.get_type_hints(fit)
    for name, value in options.items():
        checked(name, value, hints[name])
    limits: dict[str, tuple[float, float]] = {
        **dict.fromkeys(("epochs", "accumulate", "devices", "log_every"), (1, math.inf)),
        **dict.fromkeys(("weight_decay", "workers", "checkpoint_seconds", "validate", "patience"), (0, math.inf)),
        **dict.fromkeys(("sgd_momentum", "warmup"), (0, 1)),
    }
    for name, (low, high) in limits.items():
        if not low <= options[name] <= high:
            between = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise InputError(f"{name} must be {between}, not {options[name]}")
    if options["steps"] is not None and options["steps"] < 1:
        raise InputError(f"steps must be at least 1, not {options['steps']}")
    for name in ("lr", "clip"):
        value = options[name]
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} must be a positive number, not {value}")
    if options["chunk"] is not None and options["chunk"] < 2:
        raise InputError(f"chunk must be at least 2 items, not {options['chunk']}")
    if options["patience"] and not options["validate"]:
        raise InputError("patience counts looks at the validation score: say with validate how often to look")
    if options["device"] == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise InputError("device is gpu, but torch finds none here; use --device cpu or auto")
    if options["devices"] > 1 and options["device"] != "cpu" and options["devices"] > torch.cuda.device_count() > 0:
        raise InputError(f"devices is {options['devices']}, but there are {torch.cuda.device_count()} GPUs")
    if options["batch_size"] < 2 * options["devices"]:
        each = "" if options["devices"] == 1 else f" on each of the {options['devices']} devices"
        raise InputError(
            f"contrast needs at least two items in a batch{each}, but batch_size is {options['batch_size']}"
        )


def _check(method: Method, items: Any, options: dict[str, Any]) -> None:
    batch_size, accumulate = options["batch_size"], options["accumulate"]
    if len(items) < 2:
        raise InputError(f"contrast needs at least two items in a batch, but the data has {len(items)}")
    if method.classification is not None:
        _check_classes(method, items)
    if not method.automatic_optimization and (accumulate > 1 or options["clip"] is not None):
        raise InputError(f"{type(method).__name__} takes its own optimiser steps: leave accumulate and clip out")
    _check_memory(method, options)
    for part in getattr(getattr(method, "mixing", None), "parts", ()):
        waits = getattr(part, "warmup_epochs", 0)
        if options["steps"] is None and waits >= options["epochs"]:
            log.warning(
                "%s waits for %d epochs and the training has %d: it will change nothing; give a smaller warmup_epochs",
                type(part).__name__,
                waits,
                options["epochs"],
            )
    if batch_size > len(items):
        log.warning("batch_size %d is larger than the data: using %d", batch_size, len(items))
    if accumulate > 1:
        log.warning(
            "accumulate=%d averages gradients but adds no negatives: each batch of %d contrasts only with itself "
            "(chunk= computes large batches in little memory)",
            accumulate,
            batch_size,
        )


def _check_memory(method: Method, options: dict[str, Any]) -> None:
    """Refuse what cannot fit whatever the batch, before it brings the machine to swap."""
    on_gpu = options["device"] != "cpu" and torch.cuda.is_available()
    needed = bytes_of_training(method, options["optimizer"])
    if on_gpu:
        needed += sum(x.nbytes for x in (*method.parameters(), *method.buffers()))
    else:
        needed *= options["devices"]
    free = torch.cuda.mem_get_info()[0] if on_gpu else _free()
    if free is not None and needed > free:
        weights = sum(p.numel() for p in method.parameters() if p.requires_grad)
        raise InputError(
            f"the {weights / 1e6:,.0f} million weights of {type(method).__name__} need {needed / 1e9:.1f} GB for gradients and "
            f"{options['optimizer']} alone, and {free / 1e9:.1f} GB are free: give a smaller encoder or projection"
        )


def _free() -> int | None:
    """Bytes of main memory that a program can have without swapping, where the system says it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _check_classes(method: Any, items: Any) -> None:
    label, name = getattr(items, "label", None), getattr(items, "name", "the data")
    if label is None:
        raise InputError(f"{type(method).__name__} learns from labels, but {name} has none")
    most = int(label.max()) + 1
    if int(label.min()) < 0 or most > method.classes:
        raise InputError(
            f"{name} has labels from {int(label.min())} to {most - 1}, but {type(method).__name__} was built for "
            f"{method.classes} classes: give --classes {most} and number them from 0"
        )


def _options() -> list[str]:
    parameters = inspect.signature(fit).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("run", "command")]


def _name(data: Any) -> str | None:
    """What the run remembers of its data: a known name, or a place that holds from every working directory."""
    if not isinstance(data, str | Path):
        return None
    place = Path(data).expanduser()
    return str(place.resolve()) if place.exists() and str(data) not in NAMES else str(data)


def _logger(name: str, folder: Path) -> Any:
    if name == "none":
        return False
    from lightning.pytorch import loggers

    try:
        if name == "tensorboard":
            return loggers.TensorBoardLogger(folder, name="tensorboard", version="")
        return loggers.WandbLogger(save_dir=folder)
    except ModuleNotFoundError as error:
        raise InputError(f"the {name} logger needs its package: pip install counterpoint[loggers]") from error
