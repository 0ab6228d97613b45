"""Image-text pairs: `load` gets images and their captions from a name, a table, a folder or WebDataset shards."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.data import folder, images, shards, sources, texts
from counterpoint.data.images import ImageFiles, Images, chosen
from counterpoint.data.pairs import PairFiles, PairItems, Pairs, used
from counterpoint.errors import InputError, nearest

log = logging.getLogger("counterpoint")

__all__ = ["NAMES", "TEMPLATES", "PairFiles", "PairItems", "Pairs", "from_classes", "load", "spoken"]

# what a column of a table may be called, by the part it plays
IMAGE = ("image", "image_path", "path", "file", "filepath", "file_path", "file_name", "filename", "image_name")
CAPTION = ("caption", "captions", "text", "title", "sentence", "description")
TEMPLATES = (
    "{a}",
    "a picture of {a}",
    "a small picture of {a}",
    "this picture shows {a}",
    "here you see {a}",
    "{a} in the middle of the picture",
)
"""What `from_classes` says about an image; {} is the name of its class, {a} the name with its article."""


# ------------------------------------------------------------------------------------------------------------- reading


def load(
    data: Any,
    split: str = "train",
    *,
    size: int | None = None,
    channels: int = 3,
    columns: tuple[str, str] | Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    resident: bool | None = None,
) -> Pairs:
    """Image-text pairs from a known name, a table, a folder or WebDataset shards.

    Args:
        data: one of

            * a name in `NAMES`, its split after a colon if you like (``"flickr8k:test"``);
            * a table: a .csv, .tsv, .jsonl or .parquet file (also .gz), a DataFrame, a dictionary of columns or a list of
              (image path, caption); several rows with one image, and a list in a cell, are several captions of it. Paths
              are relative to the table's folder (of tables in memory: the working folder), to ``images/`` or to
              ``images.tar`` in it;
            * a folder that holds such a table as ``captions.csv`` (.tsv, .jsonl, .parquet; or .txt with image, tab or
              comma, caption in a line), images with a .txt of the same name (a caption a line), or shards;
            * shards: a .tar, a list, a glob or a pattern such as ``"shards/{000..099}.tar"``, also with file://. Those
              behind http:// and https:// are downloaded once into the user's cache, whole. They are read by position,
              not as a stream: order, limit and an exact resume do not depend on how many processes load.
        split: "train", or another part where there are parts: those of a known set, a column ``split``, or a folder that
            consists of train/ and test/ (or valid/). Any other data is all "train", and `Pairs.split` holds out images.
        size: output side of the images: shorter side resized, centre cropped; None keeps the side that all share, or
            takes 224. Known sets with smaller images keep them.
        channels: 3 or 1.
        columns: names of the table's columns of images and of captions; None finds them by their names.
        limit: at most so many images, a seeded random subset.
        seed: of that subset.
        resident: True holds the images in memory, False decodes them when asked for; None holds them if they need at most
            a quarter of the machine's memory.

    Raises:
        InputError: nothing there, no such column (with the columns found) or split, a line that is not UTF-8 or an archive
            that cannot be read (by its name), or no image with a caption that can be read.
    """
    if size is not None and size < 1:
        raise InputError(f"size is {size}, but the side of an image is at least 1 pixel")
    if channels not in (1, 3):
        raise InputError(f"images have 1 or 3 channels, not {channels}")
    name, _, part = data.partition(":") if isinstance(data, str) else ("", "", "")
    if isinstance(data, Pairs):
        some = data if limit is None or limit >= len(data) else data.subset(chosen(len(data), limit, seed))
        return replace(some, images=images.load(some.images, size=size).channels(channels))
    if name in NAMES:
        pairs = NAMES[name](part or split, size=size, channels=channels, limit=limit, seed=seed, resident=resident)
    else:
        found = _own(data, split, columns)
        pairs = _pairs(found, size=size, channels=channels, limit=limit, seed=seed, resident=resident)
    if isinstance(pairs.images, Images):
        images.check(pairs.images)
    return pairs


@dataclass
class _Found:
    """Captions by image in order of appearance, before an image is opened; `root / image` is the place of it."""

    root: Any
    captions: dict[str, list[str]]
    name: str
    skipped: Sequence[tuple[str, str]] = ()
    where: str = ""


def _pairs(
    found: _Found, *, size: int | None, channels: int, limit: int | None, seed: int, resident: bool | None
) -> Pairs:
    captions = {image: [line.strip() for line in lines if line.strip()] for image, lines in found.captions.items()}
    if empty := sum(map(len, found.captions.values())) - sum(map(len, captions.values())):
        log.warning("%s: %s empty captions left out", found.name, f"{empty:,}")
    skipped = [*found.skipped, *((image, "no caption") for image, lines in captions.items() if not lines)]
    files = [image for image, lines in captions.items() if lines]
    some = [files[i] for i in chosen(len(files), limit, seed).tolist()] if files else []
    read = folder.gather(found.root, some, found.name, size=size, colour=channels == 3, resident=resident)
    skipped = sorted([*skipped, *read.skipped])
    total = len(some) + len(skipped) - len(read.skipped)
    if len(read) == 0:
        why = f"none of the {total:,} images can be used: {folder.listed(skipped)}{found.where}"
        raise InputError(f"{found.name}: {why}" if total else f"{found.name} holds no pair of image and caption")
    if skipped:
        what = f"{len(skipped):,} of {total:,} images {'was' if len(skipped) == 1 else 'were'} left out"
        log.warning("%s: %s: %s", found.name, what, folder.listed(skipped))
    number: dict[str, int] = {}
    rows = [[number.setdefault(line, len(number)) for line in captions[image]] for image in read.paths]
    return Pairs(replace(read, skipped=tuple(skipped)), tuple(number), _padded(rows), found.name, tuple(skipped))


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [N, K], filled up with -1."""
    count = np.array([len(row) for row in rows])
    table = np.full((len(rows), int(count.max())), -1, np.int64)
    table[np.arange(table.shape[1]) < count[:, None]] = [value for row in rows for value in row]
    return torch.from_numpy(table)


def _own(data: Any, split: str, columns: Sequence[str] | None) -> _Found:
    if isinstance(data, str | Path):
        path, given = Path(data).expanduser(), str(data)
        if os.path.isdir(path):
            return _folder(path, split, columns)
        if os.path.isfile(path) and not shards.are_shards(data):
            return _file(path, split, columns)
        if not shards.are_shards(data):
            known = ", ".join(NAMES)
            raise InputError(
                f"{texts.short(given)} is neither a file or folder nor one of {known}{nearest(given, NAMES)}"
            )
    if shards.are_shards(data):
        return _shards(shards.find_shards(data), _title(data), split)
    if isinstance(data, Mapping) or hasattr(data, "columns"):  # a DataFrame, without importing pandas
        if alone := [title for title in data if isinstance(data[title], str)]:
            raise InputError(f"column {alone[0]} of the table is one string, not a list of them")
        return _table(texts.as_columns(data), Path(), "the table", split, columns)
    if isinstance(data, list | tuple):
        for number, row in enumerate(data):
            if not (isinstance(row, list | tuple) and len(row) == 2 and isinstance(row[0], str | Path)):
                raise InputError(f"item {number} of the list is {texts.short(row)}, not a pair (image path, caption)")
        pairs = list(zip(*data, strict=True)) or [(), ()]
        return _table({"image": [*pairs[0]], "caption": [*pairs[1]]}, Path(), "the list", split, None)
    kinds = "a known name, a table, a folder, shards or a list of (image path, caption)"
    wrong = "; pairs of labelled images come from from_classes" if isinstance(data, Images | ImageFiles) else ""
    raise InputError(f"image-text pairs come from {kinds}, not from {type(data).__name__}{wrong}")


def _title(data: Any) -> str:
    return str(data) if isinstance(data, str | Path) else f"{len(data):,} archives"


def _only_train(split: str, what: str) -> None:
    if split != "train":
        raise InputError(f"{what} has no split {split!r}; load it whole and use .split() to hold out a part")


def _file(path: Path, split: str, columns: Sequence[str] | None) -> _Found:
    kind = texts.kind_of(path)
    if kind != ".txt" and kind not in texts.TABLES:
        raise InputError(f"{path} is no kind of file we read: a table is .txt, {', '.join(texts.TABLES)}")
    table = _lines(path) if kind == ".txt" else texts.read_table(path)
    return _table(table, path.parent, path.name, split, columns)


def _lines(path: Path) -> dict[str, list[Any]]:
    """Columns of a text file whose lines are image, tab or comma, caption, with or without titles."""
    lines = texts.read_lines(path)
    separator = "\t" if lines and "\t" in lines[0] else ","
    titles = [title.strip().lower() for title in lines[0].split(separator)] if lines else []
    if any(title in IMAGE for title in titles) and any(title in CAPTION for title in titles):
        return texts.separated(lines, separator, path.name)
    table: dict[str, list[Any]] = {"image": [], "caption": []}
    for number, line in enumerate(lines, 1):
        image, found, caption = line.partition(separator)
        if found:
            # Flickr8k.token.txt numbers the captions of an image: a.jpg#0, a.jpg#1 ...
            table["image"].append(re.sub(r"#\d+$", "", image.strip()))
            table["caption"].append(caption)
        elif line.strip():
            raise InputError(f"line {number:,} of {path.name} is {texts.short(line)}, not image, tab or comma, caption")
    return table


def _folder(root: Path, split: str, columns: Sequence[str] | None) -> _Found:
    """A folder, whose parts may have a table of their own, or share one."""
    found = _captions_file(root)
    base = root if found else folder.split_folder(root, split)
    found = found or _captions_file(base)
    name = root.resolve().name if base == root else f"{root.resolve().name}/{base.name}"
    if found:
        told = _file(found, split if base == root else "train", columns)
        return replace(told, name=f"{name}/{told.name}")
    lines = {}
    for file in folder.image_files(base):
        beside = (base / file).with_suffix(".txt")
        lines[file] = texts.read_lines(beside) if beside.is_file() else []
    if any(lines.values()):
        # an empty line between captions is no caption that was forgotten
        return _Found(base, {file: [line for line in of if line.strip()] for file, of in lines.items()}, name)
    if archives := sorted(path for path in base.glob("*.tar")):
        return _shards(archives, name, "train")
    raise InputError(f"{base}/ holds no captions: no captions.csv, no .txt beside an image, no .tar")


def _captions_file(base: Path) -> Path | None:
    kinds = (*texts.TABLES, ".txt")
    found = sorted(path for path in base.glob("captions.*") if path.is_file() and texts.kind_of(path) in kinds)
    if len(found) > 1:
        raise InputError(f"{base}/ holds {' and '.join(path.name for path in found)}: name the file to read")
    return found[0] if found else None


def _shards(archives: list[Path], name: str, split: str) -> _Found:
    _only_train(split, name)
    places, captions, skipped = shards.samples(archives)
    if not captions:
        kinds = f"{', '.join(shards.IMAGE_KINDS)} with {' or '.join(shards.CAPTION_KINDS)}"
        raise InputError(f"{name} holds no samples: members that share a key, {kinds}")
    return _Found(places, captions, name, skipped)


def _table(table: Mapping[str, list[Any]], base: Path, name: str, split: str, columns: Sequence[str] | None) -> _Found:
    image, caption = _columns(table, name, columns)
    if len({len(column) for column in table.values()}) > 1:
        sizes = ", ".join(f"{title} {len(column):,}" for title, column in table.items())
        raise InputError(f"the columns of {name} differ in length: {sizes}")
    if not table[image]:
        raise InputError(f"{name} has no row")
    strings = [cell for cell in table[caption] if isinstance(cell, str)]
    if texts.holds_numbers(strings) or not all(map(_is_caption, table[caption])):
        raise InputError(
            f"column {caption} of {name} holds something that is no caption; its columns are {_listed(table)}"
        )
    rows: Iterable[int] = range(len(table[image]))
    parts = next((title for title in table if title.strip().lower() == "split" and title not in (image, caption)), None)
    if parts is None:
        _only_train(split, name)
    else:
        marks = [texts.as_text(cell).strip().lower() for cell in table[parts]]
        mark = next((mark for mark in folder.SPLITS.get(split, (split,)) if mark in marks), None)
        if mark is None:
            raise InputError(f"{name} has the splits {', '.join(sorted(set(marks)))}, not {split!r}")
        rows = [i for i in rows if marks[i] == mark]
        name = f"{name}/{mark}"
    captions: dict[str, list[str]] = {}
    skipped = []
    for i in rows:
        cell = table[image][i]
        if not isinstance(cell, str | Path) and not texts.is_missing(cell):
            raise InputError(f"column {image} of {name} holds {type(cell).__name__}, not paths")
        path = texts.as_text(cell).strip().removeprefix("./")
        if "://" in path:
            raise InputError(f"column {image} of {name} holds web addresses: save the images and give their paths")
        if not path:
            skipped.append((f"row {i + 1:,}", "no image named"))
            continue
        value = table[caption][i]
        told = value if isinstance(value, list | tuple | np.ndarray) else [value]
        captions.setdefault(path, []).extend(map(texts.as_text, told))
    return _Found(_places(captions, base), captions, name, skipped, f" (paths are relative to {base.resolve()}/)")


def _is_caption(cell: Any) -> bool:
    if isinstance(cell, list | tuple | np.ndarray):
        return all(isinstance(item, str) for item in cell)
    return isinstance(cell, str) or texts.is_missing(cell)


def _listed(table: Mapping[str, Any]) -> str:
    return ", ".join(table) or "none"


def _columns(table: Mapping[str, Any], name: str, columns: Sequence[str] | None) -> tuple[str, str]:
    """The columns of images and of captions."""
    if columns is not None:
        if isinstance(columns, str) or len(columns) != 2:
            raise InputError(f"columns names two, of images and of captions, not {columns!r}")
        for title in columns:
            if title not in table:
                raise InputError(f"{name} has no column {title}{nearest(title, table)}; it has {_listed(table)}")
        return columns[0], columns[1]
    pair = []
    for part, known in (("images", IMAGE), ("captions", CAPTION)):
        titles = [title for title in table if title.strip().lower() in known]
        if len(titles) != 1:
            which = f"{' and '.join(titles)} could both hold" if titles else "none is known to hold"
            raise InputError(
                f"{name} has the columns {_listed(table)}, and {which} {part}: say columns=(images, captions), or call them"
                " image and caption"
            )
        pair += titles
    return pair[0], pair[1]


def _places(names: Iterable[str], base: Path) -> Any:
    """`base` where all files lie in it, else the place of each: in `base`, in images/ or in images.tar beside it."""
    # os.path and not Path: text that someone took for a path may be longer than a name can be, which Path refuses loudly
    lost = [name for name in names if not os.path.isfile(base / name)]
    inside, packed = base / "images", base / "images.tar"
    if not lost or not (inside.is_dir() or packed.is_file()):
        return base
    places = shards.Places({name: (str(base / name), -1, -1) for name in names})
    index = shards.members(packed) if packed.is_file() else {}
    alone: dict[str, tuple[str, int, int] | None] = {}
    for member, place in index.items():
        file = member.rpartition("/")[2]
        alone[file] = None if file in alone else place
    for name in lost:
        if os.path.isfile(inside / name):
            places.at[name] = (str(inside / name), -1, -1)
        elif there := index.get(name) or index.get(f"images/{name}") or alone.get(name):
            places.at[name] = there
    return places


# ---------------------------------------------------------------------------------------------------------- known sets


def from_classes(labelled: Images | ImageFiles, templates: str | Sequence[str] = TEMPLATES) -> Pairs:
    """Captions made of class names, so that any labelled set of images trains and tests an image-text method.

    Every image gets one caption for each template; images of one class share them (the same numbers in `captions`), so a
    batch has many false negatives unless these are masked.

    Args:
        labelled: images with labels and class names.
        templates: sentences in which {} is the name of the class (see `spoken`), {a} the name with "a" or "an".

    Raises:
        InputError: no labels, no class names, or a template that names no class.
    """
    if labelled.label is None or not labelled.classes:
        raise InputError(f"{labelled.name} has no labels with names, so there is nothing to make captions of")
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates or (wrong := [line for line in templates if "{}" not in line and "{a}" not in line]):
        said = f"template {wrong[0]!r}" if templates else "an empty list of templates"
        raise InputError(f"{said} does not name the class: write {{}} or {{a}} where its name belongs")
    number: dict[str, int] = {}
    of_class = []
    for name in map(spoken, labelled.classes):
        article = "an" if name[:1].lower() in "aeiou" else "a"
        lines = [line.replace("{a}", f"{article} {name}").replace("{}", name) for line in templates]
        of_class.append([number.setdefault(line, len(number)) for line in lines])
    captions, strings = used(torch.tensor(of_class)[labelled.label.cpu()], [*number])
    return Pairs(labelled, strings, captions, labelled.name, labelled.skipped)


def spoken(name: str) -> str:
    """A class name as one says it: "T-shirt/top" becomes "T-shirt or top", "polar_bear" "polar bear"."""
    return " ".join(name.replace("_", " ").replace("/", " or ").split())


def _of_classes(name: str) -> Callable[..., Pairs]:
    def made(split: str, *, size: int | None, channels: int, limit: int | None, seed: int, resident: Any) -> Pairs:
        found = images.load(name, split, size=size, limit=limit, seed=seed).channels(channels)
        return replace(from_classes(found), name=f"{name}-captions/{split}")

    return made


def _flickr8k(split: str, **options: Any) -> Pairs:
    """1,000 images of Flickr8k (Hodosh, Young and Hockenmaier 2013), five captions each, read from where they are.

    The parts are ours: the images in the order of their names, permuted with seed 0; the first 100 are the test part, the
    next 100 the valid part, the other 800 train. The set has no address to be downloaded from: its authors send it on request.
    """
    places = {"test": slice(0, 100), "valid": slice(100, 200), "train": slice(200, None)}
    part = next((part for part in folder.SPLITS.get(split, ()) if part in places), None)
    if part is None:
        raise InputError(f"flickr8k has the splits train, valid and test, not {split!r}")
    path = sources.require("image_text/flickr8k_1k", "captions.csv.gz", "image, caption")
    found = _file(path, "train", None)
    names = sorted(found.captions)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    some = sorted(names[i] for i in order[places[part]])
    return _pairs(replace(found, captions={i: found.captions[i] for i in some}, name=f"flickr8k/{part}"), **options)


NAMES: dict[str, Callable[..., Pairs]] = {
    "flickr8k": _flickr8k,
    "fashion-mnist-captions": _of_classes("fashion-mnist"),
    "cifar10-captions": _of_classes("cifar10"),
}
"""Known sets; each takes a split and the options of `load`."""
