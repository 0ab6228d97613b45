"""What happens around the steps: determinism, records, guards, progress, checkpoints."""

import json
import math
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from counterpoint import contrast
from counterpoint.errors import InputError
from counterpoint.train.batches import Batches
from counterpoint.train.checkpoint import save_state
from counterpoint.train.method import Diverged

BINS = 50
ANSWER = 0.5  # seconds within which several processes notice Ctrl-C together, steps permitting


class StepSeed(lightning.Callback):
    """Every draw of a step comes from (seed, step, rank): resuming needs no generator state, only the step number."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: Any, method: Any, batch: Any, batch_idx: int) -> None:
        position = trainer.current_epoch * 1_000_003 + batch_idx
        torch.manual_seed((self.seed * 2_147_483_647 + position * 1_009 + trainer.global_rank) % 2**63)


class Position(lightning.Callback):
    """Keeps the place in the data in the checkpoint."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.batches.epoch, "batch": self.batches.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches.epoch, self.batches.batch = state["epoch"], state["batch"]


class FiniteLoss(lightning.Callback):
    """Stops at the first loss term that is not finite and names step and term; on GPUs and under several processes it
    looks every few steps.

    Steps count optimiser steps from 1, as in metrics.jsonl.
    """

    def __init__(self, run: Path, every: int = 25):
        self.run, self.every = run, every
        self.seen: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_batch_end(self, trainer: Any, method: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((step_of(trainer, batch_idx), {name: t.detach() for name, t in method.terms.items()}))
        alone = method.device.type == "cpu" and trainer.world_size == 1  # a look costs neither a wait nor a message
        if alone or len(self.seen) >= self.every or trainer.is_last_batch:
            self.check(trainer)

    def check(self, trainer: Any) -> None:
        """Look at the losses of all steps since the last look.

        Raises:
            Diverged: one is not finite, on any rank.
        """
        if not self.seen:
            return
        bad = ~torch.stack([torch.stack(list(terms.values())) for _, terms in self.seen]).isfinite()
        if trainer.world_size > 1:  # every rank stops, or the others would wait for the one that did
            bad = bad.int()
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if bool(bad.any()):
            row, place = bad.nonzero()[0].tolist()
            step, terms = self.seen[row]
            name, value = list(terms.items())[place]
            became = "not finite on another device" if value.isfinite() else float(value)
            raise Diverged(self.advice(f"{name} became {became}", step, trainer))
        self.seen.clear()

    def check_weights(self, trainer: Any, method: Any) -> None:
        """Look at everything that a checkpoint would hold: a finite loss can still have had a gradient that is not.

        Raises:
            Diverged: a weight is not finite.
        """
        weights = {name: value for name, value in method.state_dict().items() if value.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in weights.values()])
        if largest(trainer, not bool(finite.all()))[0]:
            name = next((name for name, fine in zip(weights, finite.tolist(), strict=True) if not fine), "another rank")
            raise Diverged(self.advice(f"the weights {name} are not finite", trainer.global_step, trainer))

    def advice(self, what: str, step: int, trainer: Any) -> str:
        return (
            f"{what} at step {step} (epoch {trainer.current_epoch + 1}): lower lr, raise temperature or use --precision "
            f"32-true; the last checkpoint of {self.run}, if there is one, is from before"
        )


class Recorder(lightning.Callback):
    """Appends one JSON line per recorded step to metrics.jsonl, and passes the scalars to the loggers.

    Every `every` steps: loss, rate, speed. Every `look` records also the geometry of the batch: histograms of positive
    and negative cosine similarity (50 bins over -1..1), alignment, uniformity, effective rank of the projections, and
    the scores that entered the loss: see `geometry`.

    Attributes:
        scores: the last of these scores by their names, for whoever shows them.
    """

    def __init__(self, run: Path, every: int = 10, look: int = 2):
        self.path, self.every, self.look = run / "metrics.jsonl", every, look
        self.elapsed, self.mark, self.images = 0.0, 0.0, 0
        self.scores: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed": self.elapsed + time.perf_counter() - self.mark if self.mark else self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.elapsed = state["elapsed"]

    def on_train_start(self, trainer: Any, method: Any) -> None:
        self.start = self.mark = time.perf_counter()
        if trainer.is_global_zero:
            keep_until(self.path, trainer.global_step)

    def on_train_batch_start(self, trainer: Any, method: Any, batch: Any, batch_idx: int) -> None:
        method.watching = self._due(trainer, batch_idx) and (batch_idx // self.every) % self.look == 0
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # before the schedule moves on to the next step's

    def on_train_batch_end(self, trainer: Any, method: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.images += len(next(iter(batch.values()))) * trainer.world_size
        if not self._due(trainer, batch_idx):
            return
        now = time.perf_counter()
        steps = trainer.num_training_batches
        # every rank takes part in these: they average and gather
        terms = {name: float(trainer.strategy.reduce(term.detach().clone())) for name, term in method.terms.items()}
        shape = {}
        if method.watched:
            shape = geometry(**method.watched, temperature=getattr(method, "temperature", None))
            self.scores = {name: value for name, value in shape.items() if "score_" in name}
            method.watched = {}
        if not trainer.is_global_zero:
            return
        record = {
            "step": step_of(trainer, batch_idx),
            "epoch": round(trainer.current_epoch + (batch_idx + 1) / steps, 4),
            "loss": sum(terms.values()),
            "lr": self.lr,
            "images_per_second": round(self.images / max(now - self.mark, 1e-9), 1),
            "time": round(self.elapsed + now - self.start, 3),
        }
        if len(terms) > 1:
            record["terms"] = terms
        record |= shape
        for logger in trainer.loggers:
            scalars = {name: value for name, value in record.items() if isinstance(value, int | float)}
            logger.log_metrics(scalars, step=record["step"])
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror or error}; the last checkpoint is intact, so make room and "
                f"go on with --resume {self.path.parent}"
            ) from error
        self.elapsed += now - self.start
        self.start = self.mark = time.perf_counter()
        self.images = 0

    def _due(self, trainer: Any, batch_idx: int) -> bool:
        return batch_idx % self.every == 0


class Selection(lightning.Callback):
    """Scores the weights on the validation part every few epochs and keeps the best in ``checkpoints/best.safetensors``.

    Each look is a line of validation.jsonl. Ties keep the earlier weights.

    Args:
        run: where to keep them.
        score: from a method to an `evaluate.Result`; higher is better.
        every: epochs between two looks.
        patience: looks without a better score before the training stops; 0 never stops it.
    """

    def __init__(self, run: Any, score: Any, every: int, patience: int):
        self.run, self.score, self.every, self.patience = run, score, every, patience
        self.path = run.folder / "validation.jsonl"
        self.best, self.waited = -math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]

    def on_train_start(self, trainer: Any, method: Any) -> None:
        if trainer.is_global_zero:
            keep_until(self.path, trainer.global_step)
        trainer.should_stop = self.exhausted

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.waited

    def on_train_batch_end(self, trainer: Any, method: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 < trainer.num_training_batches or (trainer.current_epoch + 1) % self.every:
            return
        result = self.score(method) if trainer.is_global_zero else None
        value = trainer.strategy.broadcast(None if result is None else result.value)
        better = value > self.best
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        if self.exhausted:
            trainer.should_stop = True
        if result is None:
            return
        record = {"step": step_of(trainer, batch_idx), "epoch": trainer.current_epoch + 1, "best": better}
        with self.path.open("a") as file:
            file.write(json.dumps(record | {"protocol": result.protocol, result.metric: value}) + "\n")
        if better:
            save_state({"state_dict": method.state_dict(), **record}, self.run.best)


class Checkpointer(lightning.Callback):
    """Keeps ``checkpoints/last.safetensors``: at the end of an epoch at most every `seconds`, at the end, and on Ctrl-C.

    Several processes must stop and save after the same step. To agree costs a message and a wait for the device, so they
    agree about every half second and at the end of an epoch: each time they share how fast steps went, and with it
    the step at which to ask again. The step after which they stop is in any case a whole one, and the checkpoint is of it.
    """

    def __init__(self, run: Path, guard: FiniteLoss, seconds: float = 30.0):
        self.path, self.guard, self.seconds = run / "checkpoints" / "last.safetensors", guard, seconds
        self.saved = time.perf_counter()
        self.stopped = False
        self.before: Any = None
        self.asked, self.asked_at, self.ask = 0, 0.0, 0  # last step at which all ranks agreed, its time, the next one

    def on_train_start(self, trainer: Any, method: Any) -> None:
        self.asked = self.ask = trainer.global_step
        self.asked_at = time.perf_counter()

        def stop(number: int, frame: Any) -> None:
            self.stopped = True
            signal.signal(number, signal.default_int_handler)  # a second Ctrl-C does not wait

        with suppress(ValueError):  # not in the main thread: nobody can press Ctrl-C there
            self.before = signal.signal(signal.SIGINT, stop)

    def on_train_batch_end(self, trainer: Any, method: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not stepped(trainer, batch_idx):  # half-accumulated gradients are in no checkpoint
            return
        last = batch_idx + 1 == trainer.num_training_batches
        done = trainer.current_epoch + 1 == trainer.max_epochs or trainer.should_stop
        final = (last and done) or trainer.global_step == trainer.max_steps
        if trainer.world_size > 1 and not (last or final) and trainer.global_step < self.ask:  # the same on all ranks
            return
        now = time.perf_counter()
        waited = now - self.saved
        due = final or (last and waited >= self.seconds) or waited >= 20 * max(self.seconds, 1)
        pace = (now - self.asked_at) / max(trainer.global_step - self.asked, 1)
        stopped, due, pace = largest(trainer, self.stopped, due, pace)
        self.stopped = bool(stopped)
        self.asked, self.asked_at = trainer.global_step, now
        self.ask = self.asked + min(max(int(ANSWER / max(pace, 1e-6)), 1), 100)
        if self.stopped or due:
            self.guard.check(trainer)
            self.guard.check_weights(trainer, method)
            trainer.save_checkpoint(self.path)
            self.saved = time.perf_counter()
        if self.stopped:
            trainer.should_stop = True

    def teardown(self, trainer: Any, method: Any, stage: str) -> None:
        if self.before is not None:  # after an exception Lightning gives it back
            signal.signal(signal.SIGINT, self.before)


class Progress(lightning.Callback):
    """One bar for the whole training: epoch, loss, scores of positives and negatives where a step showed them, speed, time
    left. Piped output gets a line per tenth instead.
    """

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def on_train_start(self, trainer: Any, method: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        if not trainer.is_global_zero:
            return
        self.total = int(trainer.num_training_batches) * trainer.max_epochs
        if trainer.max_steps > 0:
            self.total = min(self.total, trainer.max_steps * trainer.accumulate_grad_batches)
        self.done = trainer.current_epoch * int(trainer.num_training_batches)
        self.images, self.mark, self.said = 0, time.perf_counter(), -1
        console = Console(stderr=True)
        self.bar: Bar | None = None
        if console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.bar = Bar(*columns, console=console, refresh_per_second=4)
            self.bar.start()
            self.task = self.bar.add_task("train", total=self.total, completed=self.done, status="")

    def on_train_batch_end(self, trainer: Any, method: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        steps = int(trainer.num_training_batches)
        self.done = trainer.current_epoch * steps + batch_idx + 1
        self.images += len(next(iter(batch.values()))) * trainer.world_size
        now = time.perf_counter()
        tenth = 10 * self.done // self.total
        if (now - self.mark < 0.5 or not self.bar) and (self.bar or tenth == self.said) and self.done != self.total:
            return
        speed = self.images / max(now - self.mark, 1e-9)
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        seen = self.recorder.scores
        scores = [f"{side} {seen[f'score_{side}']:.2f}" for side in ("positive", "negative") if f"score_{side}" in seen]
        parts = [epoch, f"loss {total(method):.3f}", *scores, f"{speed:,.0f} {method.family}/s"]
        if self.bar and self.bar.console.width < 100:
            parts = [part for part in parts if part not in scores]
        status = "  ".join(parts)
        if self.bar:
            self.bar.update(self.task, completed=self.done, status=status)
        else:
            print(f"{100 * self.done // self.total:3d} %  {status}", file=sys.stderr, flush=True)
            self.said = tenth
        self.images, self.mark = 0, now

    def teardown(self, trainer: Any, method: Any, stage: str) -> None:
        bar = getattr(self, "bar", None)
        if bar is not None:
            bar.stop()

    def on_exception(self, trainer: Any, method: Any, exception: BaseException) -> None:
        self.teardown(trainer, method, "fit")


def stepped(trainer: Any, batch_idx: int) -> bool:
    """Whether this batch ended with an optimiser step (under accumulation not every one does)."""
    done = batch_idx + 1
    return done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches


def step_of(trainer: Any, batch_idx: int) -> int:
    """Number, from 1, of the optimiser step to which a finished batch contributes."""
    return trainer.global_step + (not stepped(trainer, batch_idx))


def largest(trainer: Any, *values: float) -> list[float]:
    """Each value, the largest of all ranks (for a flag: does any rank say so?): ranks that act apart would wait for each
    other forever.
    """
    if trainer.world_size == 1:
        return list(values)
    votes = torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
    return votes.tolist()


def total(method: Any) -> float:
    """The last batch's loss, its terms added up."""
    return sum(float(term.detach()) for term in method.terms.values())


def geometry(
    query: Tensor,
    key: Tensor,
    *,
    pairs: contrast.Pairs | None = None,
    positive: Tensor | None = None,
    negative: Tensor | None = None,
    score: Tensor | None = None,
    temperature: Any = None,
    most: int = 512,
) -> dict[str, Any]:
    """How one batch of pairs lies on the sphere (at most `most` pairs, so that looking costs nothing noticeable).

    With a temperature also `coupling`, the mean factor q = 1 - p(positive) that NT-Xent's gradients carry.

    The scores that enter the loss, those of `pairs` (without them, of each query among the keys), as means over the
    anchors: `score_positive`, `score_negative`, the variance of an anchor's negatives `score_negative_variance`, that of
    the positives `score_positive_variance`, and with a temperature `exp_score_positive`, `exp_score_negative` (of s / tau) and
    `score_negative_soft`, tau log mean exp(s / tau), where the softmax sees the negatives. `proxy_accuracy` is the share of
    anchors whose positive beats all of its negatives.

    Where labels say who belongs to whom, `positive` and `negative` (bool ``[N, M]``) and, unless it is the cosine, `score`
    take the place of `pairs`: then an anchor has several positives, of which it counts the mean, and the accuracy is the
    share of positive pairs. There is no coupling.
    """
    if positive is not None and negative is not None:
        return _among(query[:most], key[:most], positive[:most, :most], negative[:most, :most], score, temperature)
    pairs = contrast.Pairs(query, key) if pairs is None else pairs
    query, key = contrast.unit(query[:most]), contrast.unit(key[:most])
    similarity = query @ key.T
    off = ~torch.eye(len(query), dtype=torch.bool, device=query.device)
    record: dict[str, Any] = {
        "positive": torch.histc(similarity.diagonal().clamp(-1, 1), BINS, -1, 1).int().tolist(),
        "negative": torch.histc(similarity[off].clamp(-1, 1), BINS, -1, 1).int().tolist(),
        "alignment": float(contrast.alignment(query, key)),
        "effective_rank": float(contrast.effective_rank(query)),
    }
    if len(query) > 1:
        record["uniformity"] = float(contrast.uniformity(query))
        if temperature is not None:
            record["coupling"] = float(contrast.coupling(query, key, temperature=temperature).mean())
    record |= _scores(pairs, temperature, most)
    return {name: value for name, value in record.items() if isinstance(value, list) or math.isfinite(value)}


def _among(
    query: Tensor, key: Tensor, positive: Tensor, negative: Tensor, score: Tensor | None, temperature: Any
) -> dict[str, Any]:
    """What `geometry` says where labels choose the pairs."""
    query, key = contrast.unit(query), contrast.unit(key)
    similarity = query @ key.T
    seen = (similarity if score is None else score[: len(query), : len(key)]).double()
    record: dict[str, Any] = {
        name: torch.histc(similarity[chosen].clamp(-1, 1), BINS, -1, 1).int().tolist()
        for name, chosen in (("positive", positive), ("negative", negative))
    }
    record |= {
        "alignment": float((2 - 2 * similarity[positive]).mean()),
        "effective_rank": float(contrast.effective_rank(query)),
    }
    if len(query) > 1:
        record["uniformity"] = float(contrast.uniformity(query))
    both = positive.any(1) & negative.any(1)  # an anchor without the one or the other says nothing
    seen, positive, negative = seen[both], positive[both], negative[both]
    if len(seen):
        near, far = (mean_where(seen, chosen) for chosen in (positive, negative))
        spread = mean_where((seen - far[:, None]).square(), negative)
        count = negative.sum(1)
        record |= {"score_positive": float(near.mean()), "score_negative": float(far.mean())}
        record["score_negative_variance"] = float((spread * count / (count - 1)).nanmean())  # one has no variance
        best = seen.masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
        record["proxy_accuracy"] = float((seen > best)[positive].float().mean())
        if len(seen) > 1:
            record["score_positive_variance"] = float(near.var())
        if temperature is not None:
            tau = float(torch.as_tensor(temperature).detach())
            powers = (seen / tau).exp()
            record["exp_score_positive"] = float(mean_where(powers, positive).mean())
            soft = mean_where(powers, negative)
            record |= {
                "exp_score_negative": float(soft.mean()),
                "score_negative_soft": float((tau * soft.log()).mean()),
            }
    return {name: value for name, value in record.items() if isinstance(value, list) or math.isfinite(value)}


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of each row of `values` ``[N, M]`` over its `chosen` entries: ``[N]``."""
    return values.where(chosen, 0.0).sum(1) / chosen.sum(1)


def _scores(pairs: contrast.Pairs, temperature: Any, most: int) -> dict[str, float]:
    tau = 1.0 if temperature is None else float(torch.as_tensor(temperature).detach())
    seen = pairs.scores(tau, most=most).double()
    negative, variance, positive, exp_negative, exp_positive = seen.mean(0).tolist()
    record = {"score_positive": positive, "score_negative": negative, "score_negative_variance": variance}
    record["proxy_accuracy"] = float(pairs.proxy_accuracy(most=most))
    if len(seen) > 1:
        record["score_positive_variance"] = float(seen[:, 2].var())
    if temperature is not None:
        record |= {"exp_score_positive": exp_positive, "exp_score_negative": exp_negative}
        record["score_negative_soft"] = float((tau * seen[:, 3].log()).mean())
    return record


def keep_until(path: Path, step: int) -> None:
    """Drop records after `step` (and a half-written last line), so that a resumed run does not tell a step twice."""
    from counterpoint.atomic import writing

    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line)
    with writing(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept))
