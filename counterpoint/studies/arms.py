"""One arm of an experiment: train with a seed, measure, remember. A finished arm is never trained twice."""

import json
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from counterpoint.errors import InputError
from counterpoint.recipes import Experiment, plain
from counterpoint.train import Run, fit, resume
from counterpoint.train.checkpoint import load_state

BEST = "best on validation"


def run_arm(
    experiment: Experiment,
    seed: int,
    folder: Path,
    *,
    protocols: list[str] | None = None,
    trained_only: bool = False,
) -> dict[str, Any]:
    """Train and evaluate one arm in ``folder``; goes on with a run that was stopped, reads one that is complete.

    Returns:
        ``{"results": {protocol: {subject: value}}, "minutes": .., "memory_mb": .., "items": .., "coupling": ..,
        "seed": ..}``; with ``"recorded"`` the means over training of the geometry and scores, and with ``"detail"`` in the
        place of ``"results"`` the further numbers of each result, by their names
    """
    if experiment.fit.get("devices", 1) > 1:
        raise InputError("the runs of a study or comparison train on one device each; leave --devices out")
    done = folder / "arm.json"
    config = plain(
        {"method": experiment.method, "data": experiment.data, **experiment.model, **experiment.fit, "seed": seed}
    )
    if done.is_file():
        arm = json.loads(done.read_text())
        before = arm["config"]
        if different := [name for name in sorted({*before, *config}) if before.get(name) != config.get(name)]:
            raise InputError(
                f"{folder} holds another configuration (other {', '.join(different)}); remove it or choose another --out"
            )
        known = [subjects for name, subjects in arm["results"].items() if protocols is None or name in protocols]
        alone = any(subjects.keys() <= {"trained", BEST} for subjects in known)
        if not set(protocols or ()) <= arm["results"].keys() or (alone and not trained_only):
            run = Run.open(folder)
            arm["results"] |= _measured(run, protocols, trained_only)
            run.write("arm.json", arm)
        return {**arm, "detail": _details(folder)}
    start = time.perf_counter()
    forget_peak_memory()
    if (folder / "checkpoints" / "last.safetensors").is_file():
        run = resume(folder, changes=config)
    else:
        if folder.exists():
            import shutil

            if not (folder / "config.yaml").is_file() and any(folder.iterdir()):
                raise InputError(f"{folder} is in the way and no run; remove it or choose another --out")
            shutil.rmtree(folder)  # stopped before its first checkpoint: nothing to keep
        run = fit(experiment.build(seed), experiment.data, run=folder, **{**experiment.fit, "seed": seed})
    if run.interrupted:
        raise KeyboardInterrupt
    minutes, memory = (time.perf_counter() - start) / 60, peak_memory_mb()
    arm = {
        "config": config,
        "seed": seed,
        "results": _measured(run, protocols, trained_only),
        "minutes": round(minutes, 3),
        "memory_mb": round(memory),
        "items": items_seen(run),
        "coupling": mean_of(run, "coupling"),
        "recorded": {name: mean_of(run, name) for name in recorded(run)},
    }
    run.write("arm.json", arm)
    return {**arm, "detail": _details(folder)}


def _details(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for result in json.loads((folder / "evaluation.json").read_text()):
        numbers = {name: value for name, value in result["detail"].items() if isinstance(value, int | float)}
        found.setdefault(result["protocol"], {})[result["subject"]] = numbers
    return found


def _measured(run: Run, protocols: list[str] | None, trained_only: bool) -> dict[str, dict[str, float]]:
    from counterpoint.evaluate.runs import evaluate

    results: dict[str, dict[str, float]] = {}
    for result in evaluate(run, protocols=protocols, trained_only=trained_only):
        results.setdefault(result.protocol, {})[result.subject] = result.value
    return results


def forget_peak_memory() -> None:
    """Start the peak anew, so that an arm does not inherit that of the arm before it, nor what that one left behind."""
    import ctypes
    import gc

    import torch

    gc.collect()
    with suppress(OSError, AttributeError):  # glibc keeps freed memory for itself until it is asked
        ctypes.CDLL("libc.so.6").malloc_trim(0)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux only
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Highest memory use since `forget_peak_memory`: of the GPU where there is one, else resident memory.

    Where the system cannot start anew, the highest of the whole process.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    unit = 2**10 if sys.platform != "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def items_seen(run: Run) -> int:
    """Items in all steps of a finished training, an item as often as it was drawn; views come on top.

    An incomplete last accumulation of an epoch counts as a whole one.
    """
    fit, steps = run.config["fit"], load_state(run.checkpoint)["global_step"]
    return steps * fit["accumulate"] * fit["batch_size"]


def mean_of(run: Run, name: str) -> float | None:
    """Mean of a recorded quantity over the training, None when it was not recorded."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    values = [record[name] for record in map(json.loads, lines) if name in record]
    return sum(values) / len(values) if values else None


def recorded(run: Run) -> list[str]:
    """Names of the geometry and scores that the training recorded, one number a look."""
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    first: dict[str, Any] = next((record for record in lines if "alignment" in record), {})
    usual = ("step", "epoch", "loss", "lr", "images_per_second", "time")
    return [name for name, value in first.items() if isinstance(value, int | float) and name not in usual]


def interval(values: list[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95 % interval by Student's t (None for fewer than two values)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    from scipy.stats import t

    spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    half = float(t.ppf(0.975, len(values) - 1)) * spread / len(values) ** 0.5
    return mean, (mean - half, mean + half)
