"""Folders that appear whole or not at all, and that say whose they are."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterpoint.errors import InputError

MARK = "counterpoint.json"
"""File by which a folder is known as an export of ours, so that it may be replaced."""


@contextmanager
def replacing(path: str | Path, description: dict[str, str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on failure it is removed.

    An earlier export at `path` stays until the new one is whole.

    Args:
        path: of the folder.
        description: written into it as counterpoint.json.

    Raises:
        InputError: `path` is taken by something that is no export of ours.
    """
    path = Path(path)
    if path.exists() and not (path / MARK).is_file():
        raise InputError(f"{path} exists and is no folder that an export wrote; choose another with --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, earlier = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("partial", "earlier"))
    try:
        temporary.mkdir()
        yield temporary
        (temporary / MARK).write_text(json.dumps(description, indent=1) + "\n")
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            path.rename(earlier)
        temporary.rename(path)
    finally:
        if earlier.exists() and not path.exists():
            earlier.rename(path)
        for folder in (temporary, earlier):
            shutil.rmtree(folder, ignore_errors=True)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors, also such as share memory (tied weights), as safetensors.

    Raises:
        InputError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    apart = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    try:
        save_file(apart, path, metadata=metadata)
    except SafetensorError as error:
        raise InputError(f"cannot write into {path.parent}: {' '.join(str(error).split())}") from error


def description(encoder: Any, **about: str) -> dict[str, str]:
    """What an encoder is, in words by name."""
    import counterpoint

    facts = {"encoder": label(encoder)} | {
        name: str(getattr(encoder, name))
        for name in ("dim", "image_size", "channels", "pooling", "max_length")
        if hasattr(encoder, name)
    }
    return {"counterpoint": counterpoint.__version__, **about, **facts}


def label(encoder: Any) -> str:
    """The name an encoder was built by; of paths only the last part, because the rest is nobody else's business."""
    return " and ".join(map(_without_folders, getattr(encoder, "name", type(encoder).__name__).split(" and ")))


def _without_folders(name: str) -> str:
    scheme, colon, place = name.rpartition(":")
    pieces = place.split("/")
    for i in range(len(pieces)):
        path = Path("/".join(pieces[i:])).expanduser()
        if path.exists():
            return scheme + colon + "/".join([*pieces[:i], path.name])
    return name
