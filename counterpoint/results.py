"""Tracked records of what was measured: the only source of numbers in tables and pages."""

import json
import os
from pathlib import Path
from typing import Any

from counterpoint.atomic import writing
from counterpoint.errors import InputError

VERDICTS = ("reproduced", "not_reproduced", "untestable")


def folder() -> Path:
    """Where records lie: ``$COUNTERPOINT_RESULTS``, else ``results/`` of a source checkout, else the packaged copy."""
    chosen = os.environ.get("COUNTERPOINT_RESULTS")
    if chosen:
        return Path(chosen).expanduser()
    package = Path(__file__).resolve().parent
    checkout = package.parent / "results"
    # an installed package may have an unrelated neighbour called results; a checkout has its pyproject.toml
    if checkout.is_dir() and (package.parent / "pyproject.toml").is_file():
        return checkout
    return package / "results"


def study(slug: str) -> dict[str, Any] | None:
    """The study record of a method, or None when its claim was never run.

    It holds at least ``verdict`` (one of `VERDICTS`), ``effect``, ``ci`` and ``record`` (its path below `folder`).

    Raises:
        InputError: the record is no readable study record.
    """
    path = folder() / "studies" / f"{slug}.json"
    found = read(path)
    if found is None:
        return None
    if not isinstance(found, dict) or found.get("verdict") not in VERDICTS:
        raise InputError(f'{path} is no study record: its "verdict" must be one of {", ".join(VERDICTS)}')
    return {"effect": None, "ci": None, "record": f"studies/{slug}.json", **found}


def parity(slug: str) -> dict[str, int] | None:
    """Golden cases passed and failed by a method's ops, as last recorded, or None when none were run.

    Raises:
        InputError: the record is not readable.
    """
    path = folder() / "parity.json"
    found = read(path)
    if found is None or slug not in found:
        return None
    try:
        return {"passed": int(found[slug]["passed"]), "failed": int(found[slug]["failed"])}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f'{path}: the entry "{slug}" must hold the numbers "passed" and "failed"') from error


def save(path: str | Path, obj: Any) -> Path:
    """Write `obj` as indented JSON with sorted keys: the file appears whole or not at all.

    Raises:
        ValueError: `obj` holds NaN or infinity, which JSON has no word for.
    """
    path = Path(path)
    text = json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def read(path: Path) -> Any:
    """The JSON at `path`, or None when there is no such file.

    Raises:
        InputError: the file is not readable JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
