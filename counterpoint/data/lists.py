"""Images as people hold them in Python: a list of paths, of PIL images or of arrays, or a table with a column of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.data import folder
from counterpoint.data.images import ImageFiles, Images, chosen
from counterpoint.errors import InputError

IMAGE = (
    "image", "images", "img", "image_path", "path", "paths", "file", "files", "filename", "file_name", "filepath",
    "file_path",
)  # fmt: skip
LABEL = ("label", "labels", "class")
"""What the columns of images, and of what they show, may be called in a table; the first that is there counts."""


def from_list(
    data: Any, *, size: int | None = None, limit: int | None = None, seed: int = 0, resident: bool | None = None
) -> Images | ImageFiles:
    """Images from a list, tuple or Series of paths, PIL images, arrays or tensors, or from a table with a column of them.

    Args:
        data: all of one kind; arrays of one shape. A table is a DataFrame or a mapping from names to columns.
        size, limit, seed, resident: see `counterpoint.data.load`.

    Raises:
        InputError: nothing there, something that is no image (with its number), arrays of several shapes, or no column
            of images (with the columns found).
    """
    values, label, columns, name = _values(data)
    if not values:
        raise InputError(f"{name} holds no images")
    first = _kind(values[0])
    for number, value in enumerate(values):
        if not first or _kind(value) != first:
            meant = f"{first}, as the first is" if first else "a path, a PIL image, an array or a tensor"
            raise InputError(f"item {number} of {name} is of type {type(value).__name__}, not {meant}")
    if first == "an array":
        return folder.from_array(_stacked(values, name), label, name, columns=columns, limit=limit, seed=seed)
    if label is not None and len(label) != len(values):
        raise InputError(f"{name} has {len(values):,} images but {len(label):,} labels")
    # numbered before the subset is drawn, so that a class keeps its number whatever the limit
    numbers, classes = folder.numbered(label, name)
    factors = folder.factors_in(columns, len(values), name)
    if first == "a path":
        files = [os.fspath(value) for value in values]
        options: dict[str, Any] = {"size": size, "limit": limit, "seed": seed, "resident": resident}
        return folder.from_files(files, Path(), name, label=numbers, classes=classes, factors=factors, **options)
    at = chosen(len(values), limit, seed)
    pictures = [values[i] for i in at.tolist()]
    colour = not all(map(folder.is_grey, pictures))
    side = folder.common_side([picture.size for picture in pictures], name) if size is None else size
    image = torch.from_numpy(np.stack([folder.square(picture, side, colour) for picture in pictures]))
    known = {factor: values[at] for factor, values in factors.items()}
    return Images(image, None if numbers is None else numbers[at], classes, name, factors=known)


def _values(data: Any) -> tuple[list[Any], np.ndarray | None, dict[str, np.ndarray], str]:
    """The images one by one, labels and further columns where a table has them, and what messages call it."""
    if hasattr(data, "columns") or isinstance(data, Mapping):
        titles = {str(title).lower(): title for title in (data if isinstance(data, Mapping) else data.columns)}
        column = next((titles[word] for word in IMAGE if word in titles), None)
        if column is None:
            found = ", ".join(map(str, titles.values())) or "none"
            raise InputError(f"the table has no column of images, but {found}; name it image or path")
        label = next((titles[word] for word in LABEL if word in titles), None)
        others = [title for title in titles.values() if title not in (column, label)]
        columns = {str(title): np.array([*data[title]]) for title in others if _is_plain(data[title])}
        return [*data[column]], None if label is None else np.array([*data[label]]), columns, "the table"
    if isinstance(data, np.ndarray | Sequence) or hasattr(data, "tolist"):
        return [*data], None, {}, "the list"
    raise InputError(
        "images come from a folder, a file, an array, a list of paths or images, or a table, not from "
        f"{type(data).__name__}"
    )


def _is_plain(column: Any) -> bool:
    """Whether a column starts with a number or a word, and not with another image or an array."""
    return isinstance(next(iter(column), None), str | int | float | np.generic)


def _kind(value: Any) -> str:
    """What one item of a list is; an empty word for what is no image."""
    from PIL import Image

    if isinstance(value, np.ndarray | Tensor):
        return "an array"
    if isinstance(value, Image.Image):
        return "a PIL image"
    return "a path" if isinstance(value, str | os.PathLike) else ""


def _stacked(values: Sequence[np.ndarray | Tensor], name: str) -> np.ndarray:
    arrays = [np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value) for value in values]
    for number, array in enumerate(arrays):
        if (array.dtype, array.shape) != (arrays[0].dtype, arrays[0].shape):
            raise InputError(
                f"item {number} of {name} is {array.dtype} {list(array.shape)}, but the first is {arrays[0].dtype} "
                f"{list(arrays[0].shape)}: bring them to one shape, or pass paths or PIL images"
            )
    return np.stack(arrays)
