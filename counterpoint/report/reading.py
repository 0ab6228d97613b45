"""A run folder as plain data; whatever is missing stays None and its part of the page is left out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.errors import InputError

BINS = 50  # histogram bins over cosine -1..1, as the trainer writes them


@dataclass(frozen=True)
class Run:
    """What a run folder holds. `metrics` is one dict per logged step, steps strictly rising."""

    folder: Path
    metrics: list[dict[str, Any]]
    seconds: float | None = None
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one logged scalar where it is a finite number: two float arrays [T]."""
        found = [(line["step"], line[name]) for line in self.metrics if _finite(line.get(name))]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)

    def histograms(self, name: str) -> dict[int, np.ndarray]:
        """Step -> share of pairs in each cosine bin, [50] summing to 1."""
        found = {}
        for line in self.metrics:
            counts = line.get(name)
            if isinstance(counts, list) and len(counts) == BINS and all(_finite(c) for c in counts) and sum(counts) > 0:
                found[int(line["step"])] = np.asarray(counts, dtype=float) / sum(counts)
        return found


def read(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: the folder is missing, holds no finished line of metrics, or one of its files is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a run folder; give the folder that `counterpoint train` wrote")
    metrics, seconds = _metrics(folder / "metrics.jsonl")
    if not metrics:
        raise InputError(
            f"{folder} has no metrics to report (metrics.jsonl is missing or empty); train for at least one step"
        )
    config_text = _text(folder / "config.yaml")
    return Run(
        folder=folder,
        metrics=metrics,
        seconds=seconds,
        config=_mapping(config_text, folder / "config.yaml"),
        config_text=config_text,
        environment=_environment(folder / "environment.json"),
        results=_results(folder / "evaluation.json"),
    )


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _metrics(path: Path) -> tuple[list[dict[str, Any]], float | None]:
    """Lines that can be read, and the seconds spent.

    A killed run leaves half a line, and a resumed run repeats the steps after its checkpoint: the repeated ones replace
    the lost ones, and a clock that starts again is added to the time already spent.
    """
    lines: list[dict[str, Any]] = []
    spent = offset = 0.0
    timed = False
    for text in (_text(path) or "").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict) or not _finite(line.get("step")):
            continue
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        if _finite(line.get("time")):
            timed = True
            if line["time"] + offset < spent and (not lines or line["time"] < lines[-1].get("time", 0.0)):
                offset = spent
            spent = max(spent, line["time"] + offset)
        lines.append(line)
    return lines, spent if timed else None


def _mapping(text: str | None, path: Path) -> dict[str, Any]:
    if text is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"{path} is not readable YAML; restore it or delete it to leave the configuration out"
        ) from error
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> Any:
    text = _text(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON; restore it or delete it to leave its part out") from error


def _environment(path: Path) -> dict[str, Any]:
    found = _json(path)
    return found if isinstance(found, dict) else {}


def _results(path: Path) -> list[dict[str, Any]]:
    found = _json(path)
    if not isinstance(found, list):
        return []
    return [r for r in found if isinstance(r, dict) and r.get("protocol") and _finite(r.get("value"))]
