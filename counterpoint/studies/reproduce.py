"""A paper's claim, re-run: baseline and method differ in one decision, share everything else, and are paired by seed."""

import ast
import itertools
import operator
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from counterpoint import methods, results
from counterpoint.errors import InputError, nearest
from counterpoint.recipes import Experiment, experiment
from counterpoint.recipes import plain as as_data
from counterpoint.studies.arms import BEST, interval, run_arm

CELL = re.compile(r"\b[a-z_]\w*(@[\w.]+)?(:[a-z]\w*)?")
START = "start"
BEFORE = (START, "scorer")
"""Entries of a budget that are no arms: what is trained first and handed to the arms as their argument of that name."""
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@dataclass(frozen=True)
class Study:
    """An entry of ``studies/*.yaml``; see `vision.yaml` for the form."""

    slug: str
    claim: str
    metric: str
    effect: str
    expect: list[str]
    seeds: list[int]
    budgets: dict[str, dict[str, dict[str, Any]]]
    over: dict[str, list[Any]]
    source: str = ""
    diagnose: str | None = None
    note: str = ""  # what a reader of the verdict must know, written after the first record
    subject: str = "trained"  # or "best on validation", where the recipes look at one
    runs: str | None = None  # the study whose runs this one measures in another way

    def arms(self, budget: str) -> dict[str, Experiment]:
        """Every arm by its name: ``"method@32"``, or ``"method"`` when nothing varies."""
        if budget not in self.budgets:
            raise InputError(f'study {self.slug} has no budget "{budget}"; it has {", ".join(self.budgets)}')
        found = {}
        for arm, changes in self.budgets[budget].items():
            if arm in BEFORE:
                continue
            changes = {key: value for key, value in changes.items() if key != "protocol"}
            name = changes.pop("recipe")
            for values in itertools.product(*self.over.values()):
                cell = arm + "".join(f"@{value}" for value in values)
                found[cell] = experiment(name, **{**changes, **dict(zip(self.over, values, strict=True))})
        return found

    def before(self, budget: str) -> dict[str, Experiment]:
        """What is trained first, once a seed, by the argument that every arm gets that run as, unless it says otherwise."""
        found = {}
        for role in BEFORE:
            changes = {key: value for key, value in self.budgets[budget].get(role, {}).items() if key != "protocol"}
            if changes:
                found[role] = experiment(changes.pop("recipe"), **changes)
        return found

    def protocol(self, cell: str, budget: str) -> str:
        """What measures an arm: the study's metric, or the arm's own ``protocol``."""
        return self.budgets[budget][cell.partition("@")[0]].get("protocol", self.metric)


@cache
def entries() -> dict[str, Study]:
    """All studies by slug."""
    import yaml

    found = {}
    for file in files(__package__).iterdir():
        if file.name.endswith(".yaml"):
            for slug, entry in yaml.safe_load(file.read_text()).items():
                found[slug] = Study(slug=slug, **{"over": {}, **entry})
    return found


def reproduce(
    slug: str,
    *,
    budget: str = "cpu",
    seeds: list[int] | None = None,
    out: str | Path = "runs/studies",
    save: bool = True,
) -> dict[str, Any]:
    """Run the study of a paper and judge it.

    Every expectation must hold with its 95 % interval over seeds (Student's t on the paired differences) for the verdict
    "reproduced"; anything else is "not_reproduced", with the numbers.

    Args:
        slug: the method.
        budget: which size of the study.
        seeds: other seeds than the study's (then nothing is recorded as its verdict unless there are at least 3).
        out: where the runs go; finished ones are not run again.
        save: write ``results/studies/SLUG[-BUDGET].json``.

    Returns:
        The record.

    Raises:
        InputError: no such study or budget.
    """
    if slug not in entries():
        raise InputError(f'no study for "{slug}"{nearest(slug, entries())}; there are {", ".join(entries())}')
    study = entries()[slug]
    seeds = study.seeds if seeds is None else seeds
    arms = study.arms(budget)
    folder = Path(out) / (study.runs or slug) / budget
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    # arms that differ in nothing but how they are measured are measured on one run
    owner = {name: next(other for other in arms if arms[other] == arm) for name, arm in arms.items()}
    first = next(iter(arms))
    before = study.before(budget)
    for seed in seeds:
        given = {role: str(folder / f"{role}-seed{seed}") for role in before}
        for role, common in before.items():
            # what is common may have no classifier that the metric asks for
            images = methods.get(common.method).family == "images"
            asked = "knn-200-0.1" if images else study.protocol(role, budget)
            run_arm(common, seed, Path(given[role]), protocols=[asked], trained_only=True)
        for name, arm in arms.items():
            arm = replace(arm, model={**given, **arm.model})
            protocols, place = [study.protocol(name, budget)], folder / f"{owner[name]}-seed{seed}"
            cells[name].append(run_arm(arm, seed, place, protocols=protocols, trained_only=name != first))
    record = judge(study, budget, seeds, cells)
    for role, common in before.items():
        record[role] = as_data({"method": common.method, "data": common.data, **common.model, **common.fit})
    if save and len(seeds) >= 3:
        suffix = "" if budget == "cpu" else f"-{budget}"
        results.save(results.folder() / "studies" / f"{slug}{suffix}.json", record)
    return record


def judge(study: Study, budget: str, seeds: list[int], cells: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The record of a study from its finished arms."""
    by = {name: study.protocol(name, budget) for name in cells}
    measured = {name: [arm["results"][by[name]] for arm in arms] for name, arms in cells.items()}
    scores = {name: [subjects[study.subject] for subjects in arms] for name, arms in measured.items()}
    details = {name: [_detail(arm, by[name], study.subject) for arm in arms] for name, arms in cells.items()}
    known = {
        name: [arm.get("recorded", {}) | found for arm, found in zip(arms, details[name], strict=True)]
        for name, arms in cells.items()
    }
    per_seed = [
        {name: values[i] for name, values in scores.items()}
        | {f"{name}:{key}": number for name, found in known.items() for key, number in found[i].items()}
        for i in range(len(seeds))
    ]
    effect, ci = interval([value_of(study.effect, cell) for cell in per_seed])
    expectations = []
    for text in study.expect:
        margin, margin_ci = interval([margin_of(text, cell) for cell in per_seed])
        holds = margin_ci is not None and (margin_ci[0] >= 0 if ">=" in text or "<=" in text else margin_ci[0] > 0)
        expectations.append({"expect": text, "margin": margin, "ci": margin_ci, "holds": holds})
    first = next(iter(measured.values()))[0]
    environment = _environment()
    return {
        "slug": study.slug,
        "claim": study.claim,
        "budget": budget,
        "metric": study.metric,
        "subject": study.subject,
        "seeds": seeds,
        "effect_of": study.effect,
        "effect": effect,
        "ci": ci,
        "expectations": expectations,
        "verdict": "reproduced" if all(item["holds"] for item in expectations) else "not_reproduced",
        **({"reason": study.note} if study.note else {}),
        "arms": {
            name: {
                "values": scores[name],
                "mean": interval(scores[name])[0],
                "detail": _means(details[name]),
                **({"last": [subjects["trained"] for subjects in measured[name]]} if study.subject == BEST else {}),
                **({"protocol": by[name]} if by[name] != study.metric else {}),
                "config": {key: value for key, value in arms[0]["config"].items() if key not in ("seed", *BEFORE)},
                "minutes": [arm["minutes"] for arm in arms],
                **({study.diagnose: [_recorded(arm, study.diagnose) for arm in arms]} if study.diagnose else {}),
            }
            for name, arms in cells.items()
        },
        "reference": {subject: value for subject, value in first.items() if subject not in ("trained", BEST)},
        "environment": environment,
    }


def _detail(arm: dict[str, Any], protocol: str, subject: str) -> dict[str, float]:
    return arm.get("detail", {}).get(protocol, {}).get(subject, {})


def _recorded(arm: dict[str, Any], name: str) -> Any:
    """Mean over the training of a recorded quantity; arms of before keep the coupling apart."""
    return arm[name] if name in arm else arm.get("recorded", {}).get(name)


def _means(details: list[dict[str, float]]) -> dict[str, float]:
    """Mean over seeds of the numbers that a result has besides its value."""
    return {
        name: interval([detail[name] for detail in details])[0]
        for name in details[0]
        if all(name in d for d in details)
    }


def value_of(text: str, cell: dict[str, float]) -> float:
    """An arithmetic expression over arms, such as ``method@32 - baseline@32``, for one seed.

    ``method:NAME`` is another number of that arm: a detail of its result, or else the mean over its training of something
    recorded.

    Raises:
        InputError: a name that is no arm, or anything but numbers, + - * / and brackets.
    """

    def number(match: re.Match[str]) -> str:
        if match.group(0) not in cell:
            raise InputError(f'"{text}" names {match.group(0)}, which is no arm; there are {", ".join(cell)}')
        return repr(cell[match.group(0)])

    try:
        return _compute(ast.parse(CELL.sub(number, text).strip(), mode="eval").body, text)
    except (SyntaxError, ZeroDivisionError) as error:
        raise InputError(f'"{text}" cannot be computed: {error.args[0]}') from error


def margin_of(text: str, cell: dict[str, float]) -> float:
    """By how much ``left > right`` (or >=, <, <=) holds for one seed; negative when it does not."""
    parts = re.split(r"(>=|<=|>|<)", text)
    if len(parts) != 3:
        raise InputError(f'an expectation compares two sides, unlike "{text}"')
    left, right = value_of(parts[0].strip(), cell), value_of(parts[2].strip(), cell)
    return left - right if parts[1].startswith(">") else right - left


def _compute(node: ast.AST, text: str) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_compute(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_compute(left, text), _compute(right, text))
    raise InputError(f'"{text}" may hold arms, numbers, + - * / and brackets only')


def _environment() -> dict[str, Any]:
    from counterpoint.train.run import environment

    return {name: value for name, value in environment().items() if name != "started"}
