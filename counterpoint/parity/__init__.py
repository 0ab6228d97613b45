"""Golden cases: values and gradients of the papers' own code, recomputed with our public functions.

A case is a pair ``NAME.npz`` and ``NAME.json``. The archive holds ``in.*``, ``out.*`` and ``grad.*``; the JSON holds
``op``, ``params`` and ``tolerance`` (``rtol``, ``atol``). ``grad.X`` is the gradient, with respect to the input (or
number among the parameters) X, of the scalar that the op names: see `counterpoint.parity.ops`.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterpoint import results
from counterpoint.errors import CounterpointError, InputError, one_line

if TYPE_CHECKING:
    import numpy as np

    from counterpoint.parity.ops import Op

NOT_IMPLEMENTED = "not implemented"


class Unusable(CounterpointError):
    """A case that cannot be compared, and why."""


@dataclass(frozen=True)
class Outcome:
    """What came of one case.

    Attributes:
        case: path of the pair below the directory, without suffix.
        op: its op; "" when the case could not be read.
        difference: largest absolute difference over all outputs and gradients; None when nothing was compared.
        allowance: largest share of the tolerance that was used up, 1 at the limit; None when nothing was compared.
        reason: why it failed, one line; "" when it passed.
    """

    case: str
    op: str
    difference: float | None = None
    allowance: float | None = None
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Report:
    """All outcomes of one run; `status` is the exit status of the command."""

    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> int:
        return sum(outcome.ok for outcome in self.outcomes)

    @property
    def failed(self) -> int:
        return len(self.outcomes) - self.passed

    @property
    def status(self) -> int:
        return int(self.failed > 0)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed"


def run(directory: str | Path, *, save: bool = False) -> Report:
    """Check every golden case below `directory`, print a line for each, and end with "N passed, M failed".

    Args:
        directory: any folder that holds cases, at any depth.
        save: record the counts of each method met in ``parity.json`` of the records (`counterpoint.results.folder`).

    Raises:
        InputError: no such directory, or no case in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory: parity needs one that holds NAME.npz and NAME.json pairs")
    stems = _stems(directory)
    if not stems:
        raise InputError(f"{directory} holds no golden cases (pairs NAME.npz and NAME.json)")
    width = min(60, max(len(str(stem.relative_to(directory))) for stem in stems))
    outcomes = []
    for stem in stems:
        outcomes.append(check(stem, str(stem.relative_to(directory))))
        _print(outcomes[-1], width)
    report = Report(tuple(outcomes))
    if save:
        _save(report)
    missing = Counter(outcome.op for outcome in outcomes if outcome.reason == NOT_IMPLEMENTED)
    if missing:
        print(f"not implemented: {', '.join(missing)}")
    print(report, flush=True)
    return report


def check(stem: Path, name: str | None = None) -> Outcome:
    """Compare one case, the pair ``stem.npz`` and ``stem.json``. Never raises: what goes wrong is the reason."""
    case, op_name = name or stem.name, ""
    try:
        description = _description(stem)
        op_name = description["op"]
        arrays = _arrays(stem)
        from counterpoint.parity import ops

        if op_name not in ops.OPS:
            raise Unusable(NOT_IMPLEMENTED)
        ours = _compute(ops.OPS[op_name], arrays, description["params"])
        difference, allowance, reason = _compare(ours, arrays, description["tolerance"])
        return Outcome(case, op_name, difference, allowance, reason)
    except CounterpointError as error:
        return Outcome(case, op_name, reason=one_line(error, 300))
    except KeyError as error:
        return Outcome(case, op_name, reason=f"the case lacks the input or parameter {error}")
    except Exception as error:  # a broken case or op must not hide the verdict on the others
        return Outcome(case, op_name, reason=one_line(f"{type(error).__name__}: {error}", 300))


def _stems(directory: Path) -> list[Path]:
    found = set()
    for folder, inner, files in os.walk(directory, followlinks=False):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found |= {
            Path(folder, name).with_suffix("")
            for name in files
            if name.endswith((".npz", ".json")) and not name.startswith(".")
        }
    return sorted(found)


def _beside(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _description(stem: Path) -> dict[str, Any]:
    path = _beside(stem, ".json")
    if not path.exists():
        raise Unusable(f"{path.name} is missing beside {stem.name}.npz")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("op"), str):
        raise Unusable(f'{path.name} names no "op"')
    params: Any = found.get("params") or {}
    tolerance: Any = found.get("tolerance")
    if not isinstance(params, dict):
        raise Unusable(f'{path.name}: "params" must be an object')
    try:
        bounds = {key: float(tolerance[key]) for key in ("rtol", "atol")}
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable(f'{path.name}: "tolerance" must hold the numbers rtol and atol') from error
    if not all(0 <= bound < math.inf for bound in bounds.values()):
        raise Unusable(f'{path.name}: "tolerance" must not be negative or infinite')
    return {"op": found["op"], "params": params, "tolerance": bounds}


def _arrays(stem: Path) -> dict[str, "np.ndarray"]:
    import numpy as np

    path = _beside(stem, ".npz")
    if not path.exists():
        raise Unusable(f"{path.name} is missing beside {stem.name}.json")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib each have their own way to say "corrupt"
        raise Unusable(f"{path.name} cannot be read: {type(error).__name__}: {error}") from error
    if not any(name.startswith("out.") for name in arrays):
        raise Unusable(f"{path.name} holds no out.* array, so there is nothing to compare")
    return arrays


def _part(arrays: dict[str, "np.ndarray"], prefix: str) -> dict[str, "np.ndarray"]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _compute(op: "Op", arrays: dict[str, "np.ndarray"], params: dict[str, Any]) -> dict[str, "np.ndarray"]:
    """Our values under the names of the archive: ``out.*`` and, where the case has them, ``grad.*``."""
    import numpy as np
    import torch

    wanted = list(_part(arrays, "grad."))
    # strings stay numpy arrays: no tensor holds them
    inputs: dict[str, Any] = {
        name: torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
        if array.dtype.kind in "biuf"
        else array
        for name, array in _part(arrays, "in.").items()
    }
    params = dict(params)
    leaves = {}
    for name in wanted:
        if name not in inputs:  # the gradient of a number that stands among the parameters
            params[name] = torch.tensor(float(params[name]))
        leaf = inputs[name] if name in inputs else params[name]
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            raise Unusable(f"grad.{name} is asked for, but {name} is no floating-point array")
        leaves[name] = leaf.requires_grad_()
    with torch.set_grad_enabled(bool(wanted)):
        outputs = op.function(inputs, params)
        ours = {f"out.{name}": _numpy(value) for name, value in outputs.items()}
        if wanted:
            scalar = op.scalar(outputs, inputs)
            if not scalar.requires_grad:
                raise Unusable(f"no gradient reaches {', '.join(wanted)}")
            gradients = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True)
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                ours[f"grad.{name}"] = _numpy(torch.zeros_like(leaf) if gradient is None else gradient)
    return ours


def _numpy(value: Any) -> "np.ndarray":
    import numpy as np
    import torch

    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _compare(
    ours: dict[str, "np.ndarray"], arrays: dict[str, "np.ndarray"], tolerance: dict[str, float]
) -> tuple[float | None, float | None, str]:
    """Largest difference, largest share of the tolerance, and the first reason to fail ("" if there is none)."""
    import numpy as np

    difference, allowance, reason = None, None, ""
    for name in sorted((name for name in arrays if name.startswith(("out.", "grad."))), reverse=True):
        expected = arrays[name]
        if name not in ours:
            return difference, allowance, f"the op returns no {name.partition('.')[2]}"
        found = ours[name]
        if found.shape != expected.shape:
            return difference, allowance, f"{name} has shape {list(found.shape)}, not {list(expected.shape)}"
        if expected.dtype.kind not in "biuf":
            wrong = int((found.astype(expected.dtype.kind) != expected).sum()) if expected.size else 0
            reason = reason or (f"{wrong} of {expected.size} entries of {name} differ" if wrong else "")
            continue
        if found.dtype.kind not in "biuf":
            return difference, allowance, f"{name} is not numeric"
        wide = np.int64 if expected.dtype.kind in "biu" and found.dtype.kind in "biu" else np.float64
        a, b = found.astype(wide), expected.astype(wide)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            apart = np.where(same, 0.0, np.abs(a - b))
            bound = tolerance["atol"] + tolerance["rtol"] * np.abs(b)
            share = np.where(same, 0.0, apart / bound)
        # NaN or infinity on one side only is as far apart as can be
        apart, share = (np.where(np.isnan(x), np.inf, x) for x in (apart, share))
        share = np.where(np.isinf(apart), np.inf, share)
        difference = max(difference or 0.0, float(apart.max(initial=0.0)))
        allowance = max(allowance or 0.0, float(share.max(initial=0.0)))
        if not reason and share.max(initial=0.0) > 1:
            worst = tuple(int(i) for i in np.unravel_index(int(share.argmax()), share.shape))
            where = f"{name}{list(worst)}" if worst else name
            reason = f"{where} is {_figure(a[worst])}, not {_figure(b[worst])}"
    return difference, allowance, reason


def _figure(value: "np.generic") -> str:
    return str(value) if value.dtype.kind == "i" else f"{value:.8g}"


def _print(outcome: Outcome, width: int) -> None:
    """One line: verdict, case, op, largest difference and its share of the tolerance, reason."""
    from rich.console import Console
    from rich.text import Text

    figures = "" if outcome.difference is None else f"{outcome.difference:.1e} ({outcome.allowance:.2g} of tolerance)"
    verdict = Text("ok  ", "green") if outcome.ok else Text("FAIL", "bold red")
    rest = f" {outcome.case:<{width}} {outcome.op:<34} {figures:<28} {outcome.reason}"
    Console(soft_wrap=True, highlight=False).print(verdict + Text(rest.rstrip()))


def _save(report: Report) -> None:
    """Record the counts per method; methods that this run did not meet keep theirs."""
    path = results.folder() / "parity.json"
    record = results.read(path) or {}
    for slug, outcomes in _by_method(report):
        apart = [outcome.difference for outcome in outcomes if outcome.ok and outcome.difference is not None]
        record[slug] = {
            "passed": sum(outcome.ok for outcome in outcomes),
            "failed": sum(not outcome.ok for outcome in outcomes),
            "largest_difference": max(apart, default=None),
        }
    results.save(path, record)


def _by_method(report: Report) -> Iterator[tuple[str, list[Outcome]]]:
    # an op is called after its method, but some with underscores where the method's slug has hyphens
    slugs = [outcome.op.partition(".")[0].replace("_", "-") for outcome in report.outcomes]
    for slug in sorted(set(slugs) - {""}):
        yield slug, [outcome for own, outcome in zip(slugs, report.outcomes, strict=True) if own == slug]
