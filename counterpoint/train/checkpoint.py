"""Checkpoints as one safetensors file: tensors as tensors, everything else as JSON; nothing that could run code."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from counterpoint.atomic import writing
from counterpoint.errors import InputError


class SafeCheckpointIO(CheckpointIO):
    """Lightning's state tree, flattened into a safetensors file that appears whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_state(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load_state(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def save_state(state: dict[str, Any], path: str | Path) -> None:
    """Write a tree of dictionaries, lists, tensors and plain values."""
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "", tensors)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(path) as temporary:
            save_file(tensors, temporary, metadata={"tree": json.dumps(tree)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write the checkpoint {path}: {error}; the previous one is intact") from error


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        InputError: missing or damaged file.
    """
    if not Path(path).is_file():
        raise InputError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            tree = json.loads(file.metadata()["tree"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a readable checkpoint: {error}") from error
    return _join(tree, tensors)


def _split(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while place in tensors:  # {"a.b": x, "a": {"b": y}} meet at one place
            place += "'"
        tensors[place] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": place}
    if isinstance(value, dict):
        return {
            "dict": [
                [key, _split(item, f"{place}.{key}" if place else str(key), tensors)] for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_split(item, f"{place}.{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the state entry {place} is a {type(value).__name__}, which a checkpoint cannot hold")


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _join(item, tensors) for key, item in content}
    items = [_join(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
