"""Recipes: named, ready configurations. Data, not code; an entry says only what differs from the defaults."""

import inspect
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from counterpoint.errors import InputError, nearest


@dataclass(frozen=True)
class Experiment:
    """What one training needs: a method with its arguments, a data set, and how to fit."""

    name: str
    method: str
    model: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    fit: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int) -> Any:
        """The method, its weights drawn from `seed`."""
        import torch

        from counterpoint import methods
        from counterpoint.train.method import construct

        torch.manual_seed(seed)
        return construct(methods.get(self.method), self.model)


@cache
def entries() -> dict[str, dict[str, Any]]:
    """All recipes by name."""
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for file in sorted(files(__package__).iterdir(), key=lambda item: item.name):
        if file.name.endswith(".yaml"):
            found |= yaml.safe_load(file.read_text())
    return found


def experiment(name: str, **changes: Any) -> Experiment:
    """The recipe `name`, or the method `name` with its defaults, with `changes` on top.

    Raises:
        InputError: no such recipe or method, or a change that neither the method nor `fit` knows.
    """
    from counterpoint import methods

    if name not in entries() and ":" not in name:
        known = [*methods.names(), *entries()]
        if name not in known:
            planned = {line.slug for line in methods.CATALOGUE}
            if name in planned:
                methods.get(name)
            raise InputError(f'no method or recipe named "{name}"{nearest(name, known)}')
    recipe = {**entries().get(name, {"method": name}), **changes}
    recipe.pop("about", None)
    recipe.pop("budget", None)
    method, data = recipe.pop("method"), recipe.pop("data", None)
    return Experiment(name, method, *_sort(name, methods.get(method), recipe, data))


def fit_options() -> dict[str, Any]:
    """Name and default of every option of `fit` that a recipe may set."""
    from counterpoint.train.loop import fit

    parameters = inspect.signature(fit).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("run", "command")}


def model_options(cls: type) -> dict[str, Any]:
    """Name and default of every constructor argument of a method, those it hands on to its base included."""
    options: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        plain = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        options = {p.name: p.default for p in plain} | options
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return options


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as a run's config.yaml holds them: named views spelled out, tuples as lists."""
    from counterpoint.train.method import plain as as_data

    return {key: as_data(_named(key, value)) for key, value in options.items()}


def size_for(data: str, most: int | None) -> int | None:
    """Side of the views for data whose images are smaller than the method's default (larger ones stay at the default)."""
    if most is None:  # the method decides: an open_clip model has a size of its own
        return None
    import logging

    from counterpoint.data import Images, load

    said = logging.getLogger("counterpoint.data")
    level = said.level
    said.setLevel(logging.ERROR)  # the training loads them again and says then what there is to say
    try:
        items = load(data, limit=8, resident=True)
        return min(max(items.image.shape[-2:]), most) if isinstance(items, Images) else most
    except InputError:
        return most
    finally:
        said.setLevel(level)


def _sort(name: str, cls: type, recipe: dict[str, Any], data: Any) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    model, fit = model_options(cls), fit_options()
    for key in recipe:
        if key not in model and key not in fit:
            raise InputError(
                f'{name}: neither {cls.__name__} nor fit has an option "{key}"{nearest(key, [*model, *fit])}'
            )
    chosen = {key: _named(key, value) for key, value in recipe.items() if key in model}
    return chosen, data, {key: value for key, value in recipe.items() if key not in model}


def _named(key: str, value: Any) -> Any:
    """Views, heads, mixing and mined negatives may be named: ``views: simclr-small``, ``mixing: mochi``."""
    if key == "mixing":
        from counterpoint.memory.mixing import NAMED

        if isinstance(value, str):  # a name, several, or fields as YAML has them
            import yaml

            value = yaml.safe_load(value) or []
        parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, dict) else value
        return [_of("mixing part", part.strip(), NAMED) if isinstance(part, str) else part for part in parts]
    if key == "heads" and isinstance(value, str):  # a name, or fields as YAML has them
        import yaml

        from counterpoint.encoders.several import NAMED as HEADS

        value = yaml.safe_load(value)
        return _of("heads", value, HEADS) if isinstance(value, str) else value
    if key == "mined" and isinstance(value, str):
        import yaml

        from counterpoint.memory.mined import NAMED as MINING

        value = yaml.safe_load(value)
        return _of("way to mine", value, MINING) if isinstance(value, str) else value
    if key.endswith("views") and isinstance(value, str):
        from counterpoint import views

        if value.startswith("{"):  # fields as YAML has them
            import yaml

            return yaml.safe_load(value)
        small = key == "small_views"
        known = {name: kind for name, kind in views.NAMED.items() if isinstance(kind, views.MultiCrop) == small}
        return None if value == "none" else _of("small views" if small else "views", value, known)
    return value


def _of(what: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        hint = nearest(name, known)
        raise InputError(f'no {what} named "{name}"{hint}{" T" if hint else "; t"}here are {", ".join(known)}')
    return known[name]
