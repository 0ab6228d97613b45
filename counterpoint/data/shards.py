"""Files inside tar archives by their place, and WebDataset shards: images and captions that share a key."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from counterpoint.data import sources
from counterpoint.errors import InputError

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
CAPTION_KINDS = ("txt", "json")
CAPTION_FIELDS = ("caption", "captions", "text")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


# --------------------------------------------------------------------------------------------------------- by position


@dataclass(frozen=True)
class Member:
    """A file inside a tar archive: opens as a path does, without reading what lies around it."""

    archive: str
    offset: int
    size: int

    def open(self, mode: str = "rb") -> BinaryIO:
        """The bytes of this file alone."""
        return cast(BinaryIO, io.BufferedReader(_Window(self.archive, self.offset, self.size)))


class _Window(io.RawIOBase):
    def __init__(self, path: str, offset: int, size: int):
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with this window)
        self.offset, self.size, self.place = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        self.place = max(0, origin + offset)
        return self.place

    def readinto(self, buffer: Any) -> int | None:
        view = memoryview(buffer)[: max(0, self.size - self.place)]
        self.file.seek(self.offset + self.place)
        count = self.file.readinto(view)
        self.place += count or 0
        return count

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


@dataclass
class Places:
    """Where each file of a set lies; stands in for the folder of a set whose files do not share one.

    ``places / name`` opens as a path does. A name that is nowhere opens as a missing file.

    Args:
        at: (path, -1, -1) of a plain file, (archive, offset, size) of a member of an archive, by name
    """

    at: dict[str, tuple[str, int, int]] = field(default_factory=dict, repr=False)

    def __truediv__(self, name: str) -> Path | Member:
        path, offset, size = self.at.get(name, (name, -1, -1))
        return Path(path) if offset < 0 else Member(path, offset, size)


def members(path: Path) -> dict[str, tuple[str, int, int]]:
    """(archive, offset, size) of every plain file in an uncompressed tar, by its name there.

    Raises:
        InputError: no tar, a compressed one, or one that is cut off.
    """
    found = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile() and not member.issparse():
                    name = member.name.removeprefix("./")
                    found[name] = (str(path), member.offset_data, member.size)
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a tar ({_reason(path, error)})") from error
    return found


def _reason(path: Path, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError:
        start = b""
    if start[:2] == b"\x1f\x8b" or start in (b"BZh9", b"\xfd7zX", b"\x28\xb5\x2f\xfd"):
        return "it is compressed, and its files are read by their places: decompress it"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# --------------------------------------------------------------------------------------------------------------- names


def braces(pattern: str, most: int = 1_000_000) -> list[str]:
    """Every name that a pattern with ranges ``{000..099}`` and choices ``{a,b}`` stands for, from left to right.

    A bound with leading zeros gives all numbers its width. Anything else in braces stays as it is.

    Raises:
        InputError: more than `most` names.
    """
    for found in _BRACES.finditer(pattern):
        inside, options = found.group(1), list[str]()
        if bounds := _RANGE.fullmatch(inside):
            first, last = map(int, bounds.groups())
            if abs(last - first) >= most:
                raise InputError(f"{pattern} stands for too many files")
            padded = any(len(bound) > 1 and bound[0] == "0" for bound in bounds.groups())
            width, step = max(map(len, bounds.groups())) if padded else 0, 1 if last >= first else -1
            options = [f"{number:0{width}d}" for number in range(first, last + step, step)]
        elif "," in inside:
            options = inside.split(",")
        if options:
            before, after, left = pattern[: found.start()], pattern[found.end() :], most // len(options)
            return [name for option in options for name in braces(before + option + after, left)]
    return [pattern]


def are_shards(data: Any) -> bool:
    """Whether `data` names tar archives: a path, glob, brace or URL pattern that ends in .tar, or a list of them."""
    if isinstance(data, str | Path):
        text = str(data)
        return (urlsplit(text).path if "://" in text else text).endswith((".tar", ".tar.gz", ".tgz"))
    return (
        isinstance(data, list | tuple)
        and len(data) > 0
        and all(isinstance(i, str | Path) and are_shards(i) for i in data)
    )


def find_shards(data: str | Path | Sequence[str | Path]) -> list[Path]:
    """The archives that a path, a glob, a brace pattern, a URL or a list of them names, in that order, each once.

    An http(s) archive is downloaded once into the user's cache and read from there. No checksum is known for it; only
    its length is checked, where the server tells it.

    Raises:
        InputError: an archive that is not there (the missing ones are named), a glob that matches nothing, an address
            of another kind, or a failed download.
    """
    found: list[Path] = []
    missing: list[str] = []
    for item in [data] if isinstance(data, str | Path) else data:
        # an existing file is that file, whatever characters are in its name
        for name in [str(item)] if os.path.isfile(item) else braces(str(item)):
            scheme = urlsplit(name).scheme if "://" in name else ""
            if scheme in ("http", "https"):
                found.append(_fetched(name))
                continue
            if scheme not in ("", "file"):
                raise InputError(
                    f"{name}: archives are read from paths, file://, http:// and https://, not {scheme}://"
                )
            path = Path(url2pathname(urlsplit(name).path) if scheme else name).expanduser()
            if os.path.isfile(path):
                found.append(path)
            elif glob.has_magic(str(path)):
                matching = sorted(glob.glob(str(path), recursive=True))
                if not matching:
                    raise InputError(f"no file matches {name}")
                found += map(Path, matching)
            else:
                missing.append(name)
    if missing:
        total = len(found) + len(missing)
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        where = "" if total == 1 else f"{len(missing):,} of {total:,} archives are missing: "
        raise InputError(f"{where}there is no file {', '.join(missing[:5])}{more}")
    return list(dict.fromkeys(found))


def _fetched(url: str) -> Path:
    folder = f"shards-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    file = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    if not file.endswith(".tar"):
        raise InputError(f"{url} is no address of a .tar file")
    return sources.find(folder, file) or sources.download(
        url.replace(" ", "%20"), sources.cache() / folder / file, None
    )


# ------------------------------------------------------------------------------------------------------------- samples


def samples(shards: Iterable[Path]) -> tuple[Places, dict[str, list[str]], list[tuple[str, str]]]:
    """The images of WebDataset shards and their captions.

    Members of one archive that share a key (their name up to the first dot after the last slash) are one sample. Its
    image is a jpg, jpeg, png or webp; its caption a txt (one caption), else a json with ``caption`` or ``text`` (one, or
    a list of several).

    Returns:
        where the images lie; the captions of each, [] where there are none; (sample, reason) of captions without image

    Raises:
        InputError: an archive that cannot be read, or a caption that is no UTF-8 or JSON (with its name).
    """
    paths = list(shards)
    plain = {path.name for path in paths}
    places, captions, skipped = Places(), dict[str, list[str]](), list[tuple[str, str]]()
    for path in paths:
        title = path.name if len(plain) == len(paths) else str(path)
        keys: dict[str, dict[str, str]] = {}
        index = members(path)
        for name in index:
            folder, slash, file = name.rpartition("/")
            key, dot, kind = file.partition(".")
            if key and dot:
                keys.setdefault(folder + slash + key, {}).setdefault(kind.lower(), name)
        with open(path, "rb") as archive:
            for key, kinds in keys.items():
                image = next((kinds[kind] for kind in IMAGE_KINDS if kind in kinds), None)
                told = [kinds[kind] for kind in CAPTION_KINDS if kind in kinds]
                if image is None:
                    skipped += [(f"{title}/{key}", "a caption without an image")] if told else []
                    continue
                places.at[f"{title}/{image}"] = index[image]
                captions[f"{title}/{image}"] = []
                for name in told[:1]:
                    archive.seek(index[name][1])
                    captions[f"{title}/{image}"] = _captions(archive.read(index[name][2]), name, title)
    return places, captions, skipped


def _captions(content: bytes, name: str, archive: str) -> list[str]:
    try:
        text = content.decode("utf-8-sig")
        if name.lower().endswith(".txt"):
            return [" ".join(text.split())]
        record = json.loads(text)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"line {line:,} of {name} in {archive} is not UTF-8 (byte {content[error.start]:#04x})"
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{name} in {archive} is not JSON ({error.msg})") from error
    value = (
        next((record[title] for title in CAPTION_FIELDS if title in record), None) if isinstance(record, dict) else None
    )
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
