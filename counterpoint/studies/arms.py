"""One arm of an experiment: train with a seed, measure, remember. A finished arm is never trained twice."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from counterpoint.errors import InputError
from counterpoint.recipes import Experiment
from counterpoint.train import Run, fit, resume


def run_arm(experiment: Experiment, seed: int, folder: Path, *, protocols: list[str] | None = None) -> dict[str, Any]:
    """Train and evaluate one arm in ``folder``; goes on with a run that was stopped, reads one that is complete.

    Returns:
        ``{"results": {protocol: {subject: value}}, "minutes": .., "memory_mb": .., "coupling": .., "seed": ..}``
    """
    from counterpoint.evaluate.runs import evaluate

    done = folder / "arm.json"
    config = {"method": experiment.method, "data": experiment.data, **experiment.fit, "seed": seed}
    if done.is_file():
        arm = json.loads(done.read_text())
        if arm["config"] != json.loads(json.dumps(config)):
            raise InputError(f"{folder} holds another configuration; remove it or choose another --out")
        return arm
    start = time.perf_counter()
    if (folder / "checkpoints" / "last.safetensors").is_file():
        run = resume(folder)
    else:
        if folder.exists():
            import shutil

            shutil.rmtree(folder)  # stopped before its first checkpoint: nothing to keep
        run = fit(experiment.build(seed), experiment.data, run=folder, **{**experiment.fit, "seed": seed})
    if run.interrupted:
        raise KeyboardInterrupt
    minutes = (time.perf_counter() - start) / 60
    results: dict[str, dict[str, float]] = {}
    for result in evaluate(run, protocols=protocols):
        results.setdefault(result.protocol, {})[result.subject] = result.value
    arm = {
        "config": config,
        "seed": seed,
        "results": results,
        "minutes": round(minutes, 3),
        "memory_mb": round(peak_memory_mb()),
        "coupling": mean_of(run, "coupling"),
    }
    run.write("arm.json", arm)
    return arm


def peak_memory_mb() -> float:
    """Highest memory use of this process so far: of the GPU where there is one, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**10 if sys.platform != "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def mean_of(run: Run, name: str) -> float | None:
    """Mean of a recorded quantity over the training, None when it was not recorded."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    values = [record[name] for record in map(json.loads, lines) if name in record]
    return sum(values) / len(values) if values else None


def interval(values: list[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95 % interval by Student's t (None for fewer than two values)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    from scipy.stats import t

    spread = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
    half = float(t.ppf(0.975, len(values) - 1)) * spread / len(values) ** 0.5
    return mean, (mean - half, mean + half)
