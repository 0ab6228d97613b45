"""Own images: a folder of files, an .npz or .npy file, or an array in memory."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.data.images import ImageFiles, Images, chosen, physical_memory
from counterpoint.errors import InputError

if TYPE_CHECKING:
    from counterpoint.data.shards import Member

log = logging.getLogger(__name__)

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif", ".tga", ".ico",
)  # fmt: skip
# which folder serves a split, first choice first
VALID = ("valid", "val", "validation", "dev")
SPLITS = {"train": ("train",), "test": ("test", *VALID), **dict.fromkeys(VALID, VALID)}
SHARE_OF_MEMORY = 0.25
DEFAULT_SIZE = 224


class Unreadable(Exception):
    """A file that is no usable image; the text is the reason, in a few words."""


def from_folder(
    root: Path,
    split: str = "train",
    *,
    size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    resident: bool | None = None,
) -> Images | ImageFiles:
    """The images below `root`; see `counterpoint.data.load` for what the arguments mean.

    Raises:
        InputError: no images, none that can be read, or no such split.
    """
    base = split_folder(root, split)
    name = root.resolve().name if base == root else f"{root.resolve().name}/{base.name}"
    files = image_files(base)
    if not files:
        kinds = "jpg, png, webp, bmp, gif, tif ..."
        raise InputError(f"{base}/ holds no images (files are recognised by their extension: {kinds})")
    classes = _classes(root, base, files)
    label = None
    if classes:
        number = {title: i for i, title in enumerate(classes)}
        label = torch.tensor([number[file.split("/")[0]] for file in files], dtype=torch.int64)
    return from_files(
        files, base, f"{name}/", label=label, classes=classes, size=size, limit=limit, seed=seed, resident=resident
    )


def from_files(
    files: Sequence[str],
    base: Path,
    name: str,
    *,
    label: Tensor | None = None,
    classes: tuple[str, ...] = (),
    factors: dict[str, Tensor] | None = None,
    size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    resident: bool | None = None,
) -> Images | ImageFiles:
    """The images in `files`, in that order.

    Args:
        files: paths relative to `base` (or absolute ones).
        base: folder.
        name: what messages call them; that of a folder ends with a slash.
        label, classes, factors: as in `Images`, for each file.
        size, limit, seed, resident: see `counterpoint.data.load`.

    Raises:
        InputError: none that can be read.
    """
    at = chosen(len(files), limit, seed)
    some, numbers = [files[i] for i in at.tolist()], None if label is None else label[at]
    known = {factor: values[at] for factor, values in (factors or {}).items()}
    title = name.rstrip("/")
    found = gather(base, some, title, label=numbers, classes=classes, factors=known, size=size, resident=resident)
    warn_skipped(name, found.skipped, len(some))
    if len(found) == 0:
        where = f"in {base}/" if name.endswith("/") else f"of {name}"
        raise InputError(f"none of the {len(some):,} image files {where} can be read: {listed(found.skipped)}")
    return found


def gather(
    root: Any,
    files: Sequence[str],
    name: str,
    *,
    label: Tensor | None = None,
    classes: tuple[str, ...] = (),
    factors: dict[str, Tensor] | None = None,
    size: int | None = None,
    colour: bool | None = None,
    resident: bool | None = None,
) -> Images | ImageFiles:
    """The readable ones of `files`, in their order, and what could not be read in `skipped`; maybe none is left.

    Args:
        root: folder that `files` are relative to, or anything else whose ``root / file`` opens as a path does.
        files: what to read.
        name: of the set.
        label, classes, factors: as in `Images`, for each file.
        size, resident: see `counterpoint.data.load`.
        colour: 3 channels if true, 1 if false; None takes 3 if any file has colour.
    """
    with ThreadPoolExecutor(_threads()) as pool:
        headers = list(pool.map(lambda file: _attempt(header, root / file), files))
        skipped = [(file, str(head)) for file, head in zip(files, headers, strict=True) if isinstance(head, Unreadable)]
        kept = [i for i, head in enumerate(headers) if not isinstance(head, Unreadable)]
        rgb = any(headers[i][2] for i in kept) if colour is None else colour
        side = common_side([headers[i][:2] for i in kept], name) if size is None else size
        need = len(kept) * (3 if rgb else 1) * side * side
        if resident is None:
            resident = need <= SHARE_OF_MEMORY * physical_memory()
        pixels = np.empty((len(kept) if resident else 0, 3 if rgb else 1, side, side), np.uint8)
        if resident:
            results = list(
                pool.map(
                    lambda i: _attempt(_decode_into, pixels, i, root / files[kept[i]], side, rgb), range(len(kept))
                )
            )
            skipped += [(files[kept[i]], str(result)) for i, result in enumerate(results) if result is not None]
            good = [i for i, result in enumerate(results) if result is None]
            # closing the gaps in place: the set may be too large to be there twice
            for to, at in enumerate(good):
                if to != at:
                    pixels[to] = pixels[at]
            pixels, kept = pixels[: len(good)], [kept[i] for i in good]

    about: dict[str, Any] = {
        "label": None if label is None else label[kept],
        "classes": classes,
        "factors": {factor: values[kept] for factor, values in (factors or {}).items()},
        "name": name,
        "paths": tuple(files[i] for i in kept),
        "skipped": tuple(sorted(skipped)),
    }
    if resident:
        return Images(image=torch.from_numpy(pixels), **about)
    log.info("%s: %s images (%.0f MB decoded) are read from disk when needed", name, f"{len(kept):,}", need / 1e6)
    return ImageFiles(root=root, size=side, colour=rgb, **about)


def _threads() -> int:
    # decoding releases the interpreter lock; a few more threads than cores hide the disk
    return min(32, 2 * (os.cpu_count() or 1))


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def split_folder(root: Path, split: str) -> Path:
    """The folder that holds `split`."""
    known = {name for names in SPLITS.values() for name in names}
    inside = _folders(root)
    has_parts = bool(inside) and set(inside) <= known and any(name in inside for name in SPLITS["train"])
    if has_parts:
        for name in SPLITS.get(split, (split,)):
            if name in inside:
                return root / name
        raise InputError(f"{root}/ has {', '.join(inside)} but no {split}/")
    if split != "train":
        raise InputError(f"{root}/ has no train/ and {split}/; load it whole and use .split() to hold out a part")
    return root


def image_files(base: Path) -> list[str]:
    """Image files below `base` by extension, relative, with forward slashes, sorted; links are followed once."""
    found, seen = [], set()
    for folder, inside, names in os.walk(base, followlinks=True):
        real = os.path.realpath(folder)
        inside[:] = sorted(name for name in inside if not name.startswith(".")) if real not in seen else []
        if real in seen:
            continue
        seen.add(real)
        relative = Path(folder).relative_to(base)
        # a leading dot: the shadow files (._a.jpg) that some systems leave beside the real ones
        names = [name for name in names if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")]
        found += [(relative / name).as_posix() for name in names]
    return sorted(found)


def _classes(root: Path, base: Path, files: list[str]) -> tuple[str, ...]:
    """Names of the class folders, () where images lie directly in `base`; the same for every split of `root`."""
    if any("/" not in file for file in files):
        if any("/" in file for file in files):
            log.info("%s holds images beside its sub-folders, so the sub-folders are not taken as classes", base)
        return ()
    names = {file.split("/")[0] for file in files}
    if base != root:
        for part in _folders(root):
            if part != base.name:
                names |= {file.split("/")[0] for file in image_files(root / part) if "/" in file}
    return tuple(sorted(names))


def _attempt(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Unreadable as reason:
        return reason


def _reason(error: Exception, path: Path | Member) -> Unreadable:
    from PIL import Image, UnidentifiedImageError

    text = str(error).split("\n")[0]
    if isinstance(error, PermissionError):
        return Unreadable("no permission to read it")
    if isinstance(error, FileNotFoundError):
        return Unreadable("missing")
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            return Unreadable("not an image" if file.read(1) else "empty file")
    if isinstance(error, Image.DecompressionBombError):
        return Unreadable("too many pixels")
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return Unreadable("truncated")
    return Unreadable(f"damaged: {text}" if text else "damaged")


def header(path: Path | Member) -> tuple[int, int, bool]:
    """(width, height, has colour) without decoding.

    Raises:
        Unreadable: no image.
    """
    from PIL import Image

    try:
        with path.open("rb") as file, Image.open(file) as image:
            return *image.size, not is_grey(image)
    except Exception as error:  # a broken file makes the decoders raise almost anything
        raise _reason(error, path) from error


def is_grey(image: Any) -> bool:
    return image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;")


def decode(path: Path | Member, size: int, colour: bool) -> np.ndarray:
    """The image in a file, as `square` makes it.

    Raises:
        Unreadable: no image, or not a whole one.
    """
    from PIL import Image

    try:
        with path.open("rb") as file, Image.open(file) as image:
            # lets a JPEG decode at a fraction of its size; twice the target keeps what the resampling needs
            image.draft(None, (2 * size, 2 * size))
            return square(image, size, colour)
    except Exception as error:  # as above
        raise _reason(error, path) from error


def square(image: Any, size: int, colour: bool) -> np.ndarray:
    """uint8 [3 or 1, size, size] of a PIL image: upright, shorter side resized with anti-aliasing, centre cropped.

    Transparency is laid over white; 16-bit grey is scaled to 8 bit.
    """
    from PIL import Image, ImageOps

    image.load()
    flat = _eight_bit(ImageOps.exif_transpose(image), "RGB" if colour else "L")
    width, height = flat.size
    scale = size / min(width, height)
    if scale != 1:
        # only the central square is resampled
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        flat = flat.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    elif width != height:
        left, top = (width - size) // 2, (height - size) // 2
        flat = flat.crop((left, top, left + size, top + size))
    pixels = np.asarray(flat)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if colour else pixels[None].copy()


def _eight_bit(image: Any, mode: str) -> Any:
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image).astype(np.float64)
        # 16-bit integers by their range; floats in [0, 1] by theirs, other floats are taken as 0 to 255
        if image.mode != "F":
            values = values / 257
        elif values.size and np.nanmax(values) <= 1:
            values = values * 255
        grey = np.nan_to_num(values).round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert(mode)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert(mode)
    return image.convert(mode)


def _decode_into(pixels: np.ndarray, i: int, path: Path | Member, size: int, colour: bool) -> None:
    pixels[i] = decode(path, size, colour)


def common_side(sides: Sequence[tuple[int, int]], name: str) -> int:
    """The side of the squares that all images are, else of the squares inside equal rectangles, else 224."""
    distinct = Counter(min(side) for side in sides)
    if len(distinct) == 1 and next(iter(distinct)) <= 256:
        return next(iter(distinct))
    if distinct:
        log.info("%s: the images differ in size or are large and become %d pixels a side", name, DEFAULT_SIZE)
    return DEFAULT_SIZE


def listed(skipped: Iterable[tuple[str, str]], first: int = 5) -> str:
    """'a.jpg (truncated), b.png (not an image) and 7 more'"""
    skipped = sorted(skipped)
    text = ", ".join(f"{file} ({reason})" for file, reason in skipped[:first])
    return text + (f" and {len(skipped) - first:,} more" if len(skipped) > first else "")


def warn_skipped(name: str, skipped: Sequence[tuple[str, str]], total: int) -> None:
    if skipped:
        one = len(skipped) == 1
        log.warning(
            "%s: %s of %s files could not be read and %s left out: %s",
            name,
            f"{len(skipped):,}",
            f"{total:,}",
            "was" if one else "were",
            listed(skipped),
        )


def read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
    """Images, labels (None where there are none) and whatever else lies in an .npz or .npy file.

    Raises:
        InputError: cannot be read, needs unpickling, or holds no images.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None, {}
        with loaded:
            image = next((name for name in ("image", "images", "X", "x") if name in loaded.files), None)
            label = next((name for name in ("label", "labels", "Y", "y") if name in loaded.files), None)
            if image is None:
                held = ", ".join(loaded.files) or "nothing"
                raise InputError(f"{path} holds {held}, but no array named image, images, X or x")
            rest = {name: loaded[name] for name in loaded.files if name not in (image, label)}
            return loaded[image], None if label is None else loaded[label], rest
    except InputError:
        raise
    except Exception as error:  # zip, header and pickle errors alike
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{path} cannot be read as an array file ({reason})") from error


def from_array(
    image: np.ndarray | Tensor,
    label: np.ndarray | None,
    name: str,
    *,
    columns: Mapping[str, np.ndarray] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Images:
    """Images from an array, uint8 or float in [0, 1], [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels.

    `columns` are what else is known of them; see `factors_in`.

    Raises:
        InputError: another shape, an ambiguous one, values out of range, NaN, or labels of another number.
    """
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.ascontiguousarray(_native(image, name)))
    array = _planes(image.detach().cpu(), name)
    if len(array) == 0:
        raise InputError(f"{name} holds no images (shape {list(image.shape)})")
    if label is not None:
        label = np.asarray(label).squeeze()
        label = label[None] if label.ndim == 0 else label
        if label.shape != (len(array),):
            raise InputError(f"{name} has {len(array):,} images but labels of shape {list(label.shape)}")
    # numbered before the subset is drawn, so that a class keeps its number whatever the limit
    number, classes = numbered(label, name)
    factors = factors_in(columns or {}, len(array), name)
    if limit is not None:
        at = chosen(len(array), limit, seed)
        array, number = array[at], None if number is None else number[at]
        factors = {factor: values[at] for factor, values in factors.items()}
    return Images(_bytes(array, name).contiguous(), number, classes, name, factors=factors)


def _native(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "buif":
        raise InputError(f"{name} holds values of type {array.dtype}, not numbers")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # torch has no arithmetic for the wider unsigned types
    return array.astype(np.int64) if array.dtype.kind == "u" and array.dtype.itemsize > 1 else array


def _planes(array: Tensor, name: str) -> Tensor:
    """Any accepted layout as [N, C, H, W]."""
    shape = list(array.shape)
    if array.ndim == 3:
        if shape[0] == 3 or (shape[2] in (1, 3, 4) and shape[1] != shape[2]):
            raise InputError(f"{name} has shape {shape}, maybe a single image; use [N, H, W, C] or [N, C, H, W]")
        return array[:, None]
    if array.ndim == 4:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first and last:
            raise InputError(f"{name} has shape {shape}: the channels could be its second or its last axis")
        if first:
            return array
        if last:
            return array.permute(0, 3, 1, 2)
    layouts = "[N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels"
    raise InputError(f"{name} has shape {shape}; images are {layouts}")


def _bytes(array: Tensor, name: str) -> Tensor:
    if array.dtype == torch.uint8:
        return array
    if array.dtype == torch.bool:
        return array.to(torch.uint8) * 255
    low, high = array.min().item(), array.max().item()
    if array.is_floating_point():
        bad = int((~array.isfinite()).flatten(1).any(1).sum())
        if bad:
            raise InputError(f"{name}: {bad:,} of {len(array):,} images hold NaN or infinity; remove or repair them")
        if low < 0 or high > 1:
            raise InputError(f"{name} holds floats from {low:g} to {high:g}; use floats in [0, 1] or uint8")
        return torch.cat([(part * 255).round().to(torch.uint8) for part in array.split(4096)])
    if low < 0 or high > 255:
        raise InputError(f"{name} holds integers from {low} to {high}; use uint8, 0 to 255")
    return array.to(torch.uint8)


def factors_in(columns: Mapping[str, np.ndarray], n: int, name: str) -> dict[str, Tensor]:
    """Those of the further columns of `n` images that say something to be learned or probed, as `Images.factors`.

    Floating columns are measured values; whole numbers, booleans and names are classes where they come in groups (at least
    two items each on average). Texts, identifiers and constants stay out in silence; a column of numbers that is not whole
    stays out with a warning, since somebody may have meant it.
    """
    found: dict[str, Tensor] = {}
    for column, values in columns.items():
        values = np.asarray(values)
        if values.ndim != 1 or values.dtype.kind not in "buifU" or column in ("image", "index", "label", "background"):
            continue
        numbers = values.dtype.kind == "f"
        if len(values) != n:
            if numbers:
                log.warning("%s: %s has %s values for %s images, so it is left out", name, column, len(values), n)
            continue
        missing = int((~np.isfinite(values)).sum()) if numbers else 0
        if missing:
            log.warning("%s: %s lacks a finite value for %s of %s images, so it is left out", name, column, missing, n)
            continue
        distinct = len(np.unique(values))
        if distinct > 1 and (numbers or 2 * distinct <= n):
            number = None if numbers else numbered(values, f"{name}: {column}")[0]
            found[column] = torch.from_numpy(values.astype(np.float32)) if number is None else number
    return found


def numbered(label: np.ndarray | None, name: str) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels as int64 and class names; integers from 0 keep their numbers, all else is numbered in sorted order."""
    if label is None:
        return None, ()
    if label.dtype.kind == "f":
        if not (np.isfinite(label).all() and (label == label.round()).all()):
            raise InputError(f"{name}: labels must be whole numbers or names, but some are not")
        label = label.astype(np.int64)
    if label.dtype.kind not in "buiU":
        raise InputError(f"{name}: labels of type {label.dtype} are neither whole numbers nor names")
    values, index = np.unique(label, return_inverse=True)
    if label.dtype.kind in "bui" and values[0] >= 0 and values[-1] < max(2 * len(values), 10):
        return torch.from_numpy(label.astype(np.int64)), tuple(str(i) for i in range(int(values[-1]) + 1))
    return torch.from_numpy(index.astype(np.int64)), tuple(str(value) for value in values)
