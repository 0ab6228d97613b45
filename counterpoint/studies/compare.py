"""Any methods side by side: same data, encoder, budget and seeds."""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from counterpoint import methods
from counterpoint.errors import InputError
from counterpoint.recipes import Experiment, experiment, fit_options, model_options, size_for
from counterpoint.studies.arms import BEST, interval, run_arm
from counterpoint.train.batches import Batches
from counterpoint.train.method import Method

SHARED = (
    *("data", "limit", "encoder", "pretrained", "image_size", "channels", "text", "layers", "pooling", "max_length"),
    *("epochs", "steps", "batch_size", "accumulate", "precision", "validate", "patience"),
)


@dataclass(frozen=True)
class Comparison:
    """What came out: for each name and protocol the values over seeds, and the rows that learned nothing."""

    names: list[str]
    seeds: list[int]
    arms: dict[str, list[dict[str, Any]]]
    shared: dict[str, Any]

    @property
    def protocols(self) -> list[str]:
        first, *others = [arm["results"] for arms in self.arms.values() for arm in arms]
        return [name for name in first if name != "geometry" and all(name in results for results in others)]

    def rows(self) -> list[dict[str, Any]]:
        """One row a method (mean and standard deviation per protocol, minutes, memory); baselines first."""
        rows: list[dict[str, Any]] = []
        first = next(iter(self.arms.values()))
        subjects = first[0]["results"][self.protocols[0]]
        for subject in reversed([name for name in subjects if name not in ("trained", BEST)]):
            row: dict[str, Any] = {"name": subject}
            for protocol in self.protocols:
                if subject in first[0]["results"][protocol]:  # pixels have no classifier of their own
                    row[protocol] = _spread([arm["results"][protocol][subject] for arm in first])
            rows.append(row)
        for name in self.names:
            arms = self.arms[name]
            row = {"name": name, "minutes": interval([arm["minutes"] for arm in arms])[0]}
            row["memory_mb"] = max(arm["memory_mb"] for arm in arms)
            if all("items" in arm for arm in arms):  # those of an earlier version do not say
                row["items"] = arms[0]["items"]
            for protocol in self.protocols:
                row[protocol] = _spread([arm["results"][protocol]["trained"] for arm in arms])
            rows.append(row)
            if BEST in arms[0]["results"][self.protocols[0]]:
                best = {p: _spread([arm["results"][p][BEST] for arm in arms]) for p in self.protocols}
                rows.append({**row, **best, "name": f"{name} ({BEST})"})
        return rows

    def to_dict(self) -> dict[str, Any]:
        from counterpoint.train.run import environment

        machine = {name: value for name, value in environment().items() if name != "started"}
        return {"shared": self.shared, "seeds": self.seeds, "rows": self.rows(), "environment": machine}

    def plot(self, path: str | Path) -> Path:
        """Dots for every seed and a bar at the mean, one panel a protocol, four side by side."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        from counterpoint.atomic import writing

        across = min(4, len(self.protocols))
        down = -(-len(self.protocols) // across)
        figure, panels = pyplot.subplots(
            down, across, figsize=(4.2 * across, down * (0.45 * len(self.names) + 1.6)), squeeze=False
        )
        for panel in panels.flat[len(self.protocols) :]:
            panel.remove()
        for panel, protocol in zip(panels.flat, self.protocols, strict=False):
            rows = [row for row in self.rows() if protocol in row]
            for height, row in enumerate(reversed(rows)):
                values = row[protocol]["values"]
                learned = "minutes" in row
                panel.plot(values, [height] * len(values), "o", color="#2a6f97" if learned else "#9a9a9a", alpha=0.6)
                panel.plot([row[protocol]["mean"]] * 2, [height - 0.3, height + 0.3], color="#222222", lw=1.5)
            panel.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
            panel.set_xlabel(protocol)
            panel.grid(axis="x", alpha=0.25)
            panel.spines[["top", "right", "left"]].set_visible(False)
        figure.tight_layout()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as temporary:
            figure.savefig(temporary, format=path.suffix.lstrip(".") or "svg")
        pyplot.close(figure)
        return path


def compare(
    names: list[str],
    *,
    seeds: list[int],
    out: str | Path = "runs/compare",
    changes: dict[str, Any] | None = None,
) -> Comparison:
    """Train and evaluate every named recipe or method at one budget.

    Equal are the items that training sees (epochs or steps, and batch size), not the time: views of an item are the method's
    own choice, and what they cost stands in the columns of minutes and memory.

    Args:
        names: recipes or methods.
        seeds: of weights, order and views; the same for all.
        out: where the runs go; finished ones are not run again.
        changes: options for all of them, on top of their recipes.

    Raises:
        InputError: fewer than one name, or settings that make the comparison unfair (the difference is listed).
    """
    if not names or not seeds:
        raise InputError("compare needs at least one method and one seed")
    for given in (names, seeds):
        if len({*given}) < len(given):
            raise InputError(f"compare takes each method and seed once, not {' '.join(map(str, given))}")
    experiments = {name: _sized(experiment(name, **(changes or {}))) for name in names}
    shared = _shared(experiments)
    _check_epochs(experiments)
    import_module("sklearn.linear_model")  # what measuring loads belongs to the memory of every row, also the first
    arms: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in seeds:
        for name, arm in experiments.items():
            place = Path(out) / f"{name}-seed{seed}"
            arms[name].append(run_arm(arm, seed, place, trained_only=name != names[0]))
    return Comparison(names, seeds, arms, shared)


def _sized(item: Experiment) -> Experiment:
    """As in `counterpoint train`: small images are seen at their own size unless someone chose another."""
    size = model_options(methods.get(item.method)).get("image_size")
    if size is None or item.data is None or "image_size" in item.model:
        return item
    return replace(item, model={**item.model, "image_size": size_for(item.data, size)})


def _shared(experiments: dict[str, Experiment]) -> dict[str, Any]:
    """Everything that a fair comparison holds fixed."""
    settings = {}
    for name, item in experiments.items():
        defaults = {**fit_options(), **model_options(methods.get(item.method))}
        settings[name] = {**defaults, **item.fit, **item.model, "data": item.data}
    first, *others = settings
    # layers are those of the encoder where it reads sequences; elsewhere of a projector, which is the method's own choice
    shared = [key for key in SHARED if key != "layers" or "max_length" in settings[first]]
    for other in others:
        for key in shared:
            if (settings[first].get(key) or None) != (
                settings[other].get(key) or None
            ):  # not to have it is not to use it
                raise InputError(
                    f"{first} and {other} differ in {key} ({settings[first].get(key)} and {settings[other].get(key)}), "
                    f"so they cannot be compared fairly; give --{key} for both"
                )
    if settings[first]["data"] is None:
        raise InputError("compare needs data: give --data")
    return {key: settings[first].get(key) for key in shared}


def _check_epochs(experiments: dict[str, Experiment]) -> None:
    """Refuse a method that adds items of its own to the data where epochs are counted: it would see more of them.

    Raises:
        InputError: one epoch is longer than that of the others.
    """
    for name, item in experiments.items():
        cls = methods.get(item.method)
        if item.fit.get("steps") is not None or cls.training_items is Method.training_items or len(experiments) == 1:
            continue
        method, limit = item.build(0), item.fit.get("limit")
        own, plain = method.training_items(item.data, limit=limit, seed=0), method.read(item.data, limit=limit, seed=0)
        if (seen := Batches(own, 2).count) != len(plain):
            raise InputError(
                f"an epoch of {name} has {seen:,} items, that of the data {len(plain):,}: give --steps, so that all methods "
                "see equally many"
            )


def _spread(values: list[float]) -> dict[str, Any]:
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
    return {"mean": mean, "deviation": deviation, "values": values}
