"""User histories: who chose what, in which order; and `load`, the one way to get them from a name, a file or a table."""

from __future__ import annotations

import csv
import gzip
import logging
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterpoint.data.images import chosen
from counterpoint.errors import InputError, nearest

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test", "all")

# as published by the papers that use them; the numbers are SHA-256 of the plain files
_ICLREC = "https://raw.githubusercontent.com/salesforce/ICLRec/4afb54a036ebbf4166ed5858122d89c0642251a7/data/"
_RECBOLE = "https://raw.githubusercontent.com/RUCAIBox/RecBole/6af995d83513ebf16777fedf35bfa830680f5d88/dataset/"
NAMES: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "beauty": (
        "recsys/amazon_sequences",
        ("Beauty.txt", "Beauty.txt.gz"),
        _ICLREC + "Beauty.txt",
        "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
    ),
    "toys": (
        "recsys/amazon_sequences",
        ("Toys_and_Games.txt", "Toys_and_Games.txt.gz"),
        _ICLREC + "Toys_and_Games.txt",
        "176c680c688d497598c4a89a03b402c0fe78d795e5db335c2e78dd5f2d778a3f",
    ),
    "sports": (
        "recsys/amazon_sequences",
        ("Sports_and_Outdoors.txt", "Sports_and_Outdoors.txt.gz"),
        _ICLREC + "Sports_and_Outdoors.txt",
        "2a095e0648872beb9982408958290f5d655db5be2911c3756b5446de9f0b8de2",
    ),
    "ml-100k": (
        "recsys/ml-100k",
        ("ml-100k.inter", "ml-100k.inter.tsv.gz"),
        _RECBOLE + "ml-100k/ml-100k.inter",
        "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    ),
}
"""Known sets: folder, file names to look for, original address, SHA-256 of the file there."""

# column names without case, punctuation and RecBole's ":type"
_SYNONYMS = {
    "user": "user userid uid reviewerid customer customerid visitor visitorid session sessionid username account accountid",
    "item": "item itemid iid asin parentasin product productid movie movieid track trackid song songid artist artistid "
    "book bookid article articleid business businessid content contentid video videoid sku isbn",
    "timestamp": "timestamp time ts date datetime createdat unixreviewtime reviewtime eventtime unixtime ratedat timestep",
}
_TENSORS = ("item", "bounds", "begin", "length", "target", "user")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst")
_TABLES = (".csv", ".tsv", ".inter", ".parquet", ".pq")


@dataclass
class Histories:
    """Histories of users over a catalogue of items, as the rows of one split of the leave-one-out convention.

    The last item of a user is the test target, the one before it the validation target, the rest is for training.
    Users with fewer than 3 items have nothing held out: all of theirs trains. The rows of the split

    * ``"train"`` are sliding prefixes: every item of the training part but the first is a target once, after all that
      came before it;
    * ``"valid"`` and ``"test"`` are one per user: everything before the held-out item, and that item;
    * ``"all"`` are one per user: the whole history, without a target (0).

    Args:
        item: int64 [T], codes from 1 (0 is padding), the histories of all users one after the other
        bounds: int64 [U, 5], places in `item`: start, end of training, validation target, test target, stop; -1 where
            there is no such target
        catalogue: name of each item; the item with code c is ``catalogue[c - 1]``
        users: name of each user
        begin, length, target, user: int64 [N], the rows: places ``begin ... begin + length - 1`` of `item`, what came
            next (0: unknown), and whose it is (a position in `users`)
        name: where they come from, for messages and records
        split: what the rows are
        max_length: longest history that a row holds; of longer ones the last items count
    """

    item: Tensor
    bounds: Tensor
    catalogue: tuple[str, ...]
    users: tuple[str, ...]
    begin: Tensor
    length: Tensor
    target: Tensor
    user: Tensor
    name: str = "histories"
    split: str = "train"
    max_length: int = 50

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def lengths(self) -> Tensor | None:
        """Length of each row where rows may be read in that order; None for training, whose batches are mixed."""
        return None if self.split == "train" else self.length

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in _TENSORS)

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The rows at `index` (int64 [B]) as a batch.

        Returns:
            ``item_seq`` int64 [B, max_length], right-padded with 0; ``item_seq_len``, ``target``, ``user`` and
            ``index`` int64 [B].
        """
        index = index.to(self.begin.device)
        length = self.length[index]
        place = torch.arange(self.max_length, device=index.device)
        at = (self.begin[index][:, None] + place).clamp(max=len(self.item) - 1)
        return {
            "item_seq": self.item[at].masked_fill(place >= length[:, None], 0),
            "item_seq_len": length,
            "target": self.target[index],
            "user": self.user[index],
            "index": index,
        }

    def to(self, device: torch.device | str) -> Histories:
        """The same histories on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def subset(self, index: Tensor | np.ndarray | Sequence[int]) -> Histories:
        """The rows at `index` (positions or a boolean mask); histories and catalogue stay."""
        at = index if isinstance(index, Tensor) else torch.as_tensor(np.asarray(index))
        at = at.nonzero().flatten() if at.dtype == torch.bool else at.to(torch.int64)
        at = at.to(self.begin.device)
        return replace(self, **{name: getattr(self, name)[at] for name in ("begin", "length", "target", "user")})

    def part(self, split: str) -> Histories:
        """The rows of another split of the same users.

        Raises:
            InputError: no such split, or no user who has a row in it.
        """
        if split not in SPLITS:
            raise InputError(f'{self.name} has no split "{split}"; there are {", ".join(SPLITS)}')
        start, train, valid, test, stop = self.bounds.unbind(1)
        everyone = torch.arange(len(self.users), device=start.device)
        if split == "train":
            count = (train - start - 1).clamp(min=0)
            user = everyone.repeat_interleave(count)
            within = torch.arange(len(user), device=start.device) - (count.cumsum(0) - count)[user]
            end = start[user] + within + 1
        else:
            place = {"valid": valid, "test": test, "all": stop}[split]
            user = everyone[place > start]  # -1, or nothing before it: no row
            end = place[user]
        if len(user) == 0:
            lacks = {
                "train": "no user has two items that are not held out, so there is nothing to train on",
                "all": "no user has an item",
            }.get(split, "no user has three items, so nothing is held out")
            raise InputError(f"{self.name}: {lacks}")
        begin = torch.maximum(start[user], end - self.max_length)
        target = torch.zeros_like(end) if split == "all" else self.item[end]
        return replace(self, begin=begin, length=end - begin, target=target, user=user, split=split)

    def popularity(self) -> Tensor:
        """How often each item occurs in the training parts: int64 [items + 1], the count of the padding (0) first."""
        start, train = self.bounds[:, 0], self.bounds[:, 1]
        place = torch.arange(len(self.item), device=self.item.device)
        owner = torch.searchsorted(self.bounds[:, 4].contiguous(), place, right=True)
        trains = (place >= start[owner]) & (place < train[owner])
        return torch.bincount(self.item[trains], minlength=len(self.catalogue) + 1)


def load(
    data: Any,
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 0,
    max_length: int = 50,
    catalogue: Sequence[str] | None = None,
) -> Histories:
    """User histories from a known name, a file, a table or lists.

    Timestamps need not be sorted: they are here, and ties keep the order of the file. Without timestamps the order of
    the file is the order of events. Items get codes from 1, in numerical order of their names if these are numbers,
    else in alphabetical order.

    Args:
        data: a name in `NAMES`; a CSV, TSV or Parquet file or a data frame with columns for user, item and (optionally)
            timestamp, found by their usual names; a RecBole ``.inter`` file, or a folder that holds one; a text file
            with a line ``user item item ...`` per user; a mapping from users to lists of items; or a list or
            Series of such lists.
        split: "train", "valid", "test" or "all"; see `Histories`.
        limit: at most so many users, a seeded random subset; the catalogue is then that of their items.
        seed: of that subset.
        max_length: longest history that a row holds.
        catalogue: the items that a model knows. Interactions with others are left out, and said; a user whose held-out
            item is among them is not measured.

    Raises:
        InputError: nothing there, nothing readable, columns that cannot be told apart, or no row in the split.
    """
    if max_length < 1:
        raise InputError(f"max_length is {max_length}, but a history holds at least one item")
    if isinstance(data, Histories):
        return _again(data, split, limit, seed, max_length, catalogue)
    user, item, time, name = _read(data)
    if len(user) == 0:
        raise InputError(f"{name} holds no interactions")
    who, users = _coded(user)
    what, items = _coded(item)
    order = np.argsort(who, kind="stable") if time is None else np.lexsort((time, who))
    count = np.bincount(who, minlength=len(users))
    found = _histories(what[order], count, users, items, name, limit, seed, max_length, catalogue)
    short = int((np.diff(found.bounds[:, [0, 4]].numpy(), axis=1) < 3).sum()) if catalogue is None else 0
    if short:
        log.warning(
            "%s: %s of %s users have fewer than 3 items: these all train, and nothing of theirs is held out",
            name,
            f"{short:,}",
            f"{len(found.users):,}",
        )
    return found.part(split)


def _again(
    data: Histories, split: str, limit: int | None, seed: int, max_length: int, catalogue: Sequence[str] | None
) -> Histories:
    """Histories that are there already, in another form."""
    same = catalogue is None or tuple(catalogue) == data.catalogue
    if same and (limit is None or limit >= len(data.users)):
        found = data if max_length == data.max_length else replace(data, max_length=max_length)
        return found if found is data and split == data.split else found.part(split)
    if len(data) and split == data.split and len(data) < len(data.part(split)):
        raise InputError(
            f"{data.name}: chosen rows cannot get another catalogue, limit or max_length; choose them after"
        )
    bounds = data.bounds.cpu().numpy()
    count = bounds[:, 4] - bounds[:, 0]
    codes = data.item.cpu().numpy() - 1
    return _histories(
        codes, count, data.users, data.catalogue, data.name, limit, seed, max_length, catalogue, bounds
    ).part(split)


def _histories(
    code: np.ndarray,
    count: np.ndarray,
    users: tuple[str, ...],
    items: tuple[str, ...],
    name: str,
    limit: int | None,
    seed: int,
    max_length: int,
    catalogue: Sequence[str] | None,
    bounds: np.ndarray | None = None,
) -> Histories:
    """From codes (positions in `items`) user after user, `count` of each; the rows are those of no split yet."""
    if bounds is None:
        bounds = _bounds(count)
    if limit is not None and limit < len(users):
        if limit < 1:
            raise InputError(f"limit is {limit}, but at least one user is needed")
        kept = chosen(len(users), limit, seed).numpy()
        code, bounds = _of_users(code, bounds, kept)
        users = tuple(users[i] for i in kept)
        if catalogue is None:
            seen, code = np.unique(code, return_inverse=True)
            items = tuple(items[i] for i in seen)
    if catalogue is not None and tuple(catalogue) != items:
        number = {item: i for i, item in enumerate(catalogue)}
        known = np.array([number.get(item, -1) for item in items], dtype=np.int64)[code]
        missing = known < 0
        if missing.all():
            raise InputError(f"{name} has no item of the {len(catalogue):,} that the model was trained on")
        if missing.any():
            targets = bounds[:, 2:4]
            lost = int(missing[targets[targets >= 0]].sum())
            log.warning(
                "%s: %s of %s interactions are with %s items that the model has not seen and are left out"
                " (%s of them are held-out targets, which are then not measured)",
                name,
                f"{int(missing.sum()):,}",
                f"{len(code):,}",
                f"{len(np.unique(code[missing])):,}",
                f"{lost:,}",
            )
            # places move down by what is missing before them; a target that is missing itself is none
            before = np.concatenate([[0], np.cumsum(~missing)])
            gone = np.zeros_like(bounds, dtype=bool)
            gone[:, 2:4] = (targets >= 0) & missing[targets.clip(min=0)]
            bounds = np.where((bounds < 0) | gone, -1, before[bounds.clip(min=0)])
            known = known[~missing]
        code, items = known, tuple(catalogue)
    nothing = torch.empty(0, dtype=torch.int64)
    return Histories(
        item=torch.from_numpy(np.ascontiguousarray(code, dtype=np.int64) + 1),
        bounds=torch.from_numpy(np.ascontiguousarray(bounds, dtype=np.int64)),
        catalogue=items,
        users=users,
        begin=nothing,
        length=nothing,
        target=nothing,
        user=nothing,
        name=name,
        max_length=max_length,
    )


def _bounds(count: np.ndarray) -> np.ndarray:
    stop = np.cumsum(count)
    start = stop - count
    held = count >= 3
    columns = (start, np.where(held, stop - 2, stop), np.where(held, stop - 2, -1), np.where(held, stop - 1, -1), stop)
    return np.stack(columns, axis=1)


def _of_users(code: np.ndarray, bounds: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bounds = bounds[kept]
    count = bounds[:, 4] - bounds[:, 0]
    shift = bounds[:, 0] - (np.cumsum(count) - count)
    places = np.arange(count.sum()) + np.repeat(shift, count)
    return code[places], np.where(bounds < 0, -1, bounds - shift[:, None])


def _coded(names: Iterable[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes from 0 in the order of the distinct names, numerical if all are whole numbers."""
    seen: dict[Any, int] = {}
    code = np.fromiter((seen.setdefault(name, len(seen)) for name in names), np.int64)
    distinct = [str(name) for name in seen]
    numbers = all(re.fullmatch(r"-?\d+", name) for name in distinct)
    order = sorted(range(len(distinct)), key=(lambda i: int(distinct[i])) if numbers else distinct.__getitem__)
    place = np.empty(len(distinct), np.int64)
    place[order] = np.arange(len(distinct))
    return place[code], tuple(distinct[i] for i in order)


# ---- reading: (user, item, time or None) of every interaction, and a name ---------------------------------------------

_Read = tuple[Sequence[Any], Sequence[Any], np.ndarray | None, str]


def _read(data: Any) -> _Read:
    if isinstance(data, str | Path):
        return _read_path(data)
    if hasattr(data, "columns") and hasattr(data, "__getitem__"):
        return _columns(data, "the data frame", "table")
    if isinstance(data, Mapping):
        return _listed(data.items(), "the mapping")
    lines = data.tolist() if hasattr(data, "tolist") else data  # a Series or an array
    if isinstance(lines, list | tuple) and all(isinstance(line, list | tuple | np.ndarray) for line in lines):
        return _listed(enumerate(lines), "the lists")
    raise InputError(
        f"histories come from a file, a known name, a data frame, a mapping or lists of items, not {type(data).__name__}"
    )


def _listed(histories: Iterable[tuple[Any, Any]], name: str) -> _Read:
    user: list[Any] = []
    item: list[Any] = []
    for who, what in histories:
        if isinstance(what, str) or not isinstance(what, Iterable):
            raise InputError(f"{name}: the history of user {who} is {what!r}, not a list of items")
        line = list(what)
        item += line
        user += [who] * len(line)
    return [str(who) for who in user], [str(what) for what in item], None, name.removeprefix("the ")


def _read_path(data: str | Path) -> _Read:
    from counterpoint.data import sources

    if data in NAMES:
        folder, files, address, sha256 = NAMES[str(data)]
        path = sources.find(folder, *files) or sources.download(address, sources.cache() / folder / files[0], sha256)
        given = str(data)
    else:
        path, given = Path(data).expanduser(), str(data)
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if ".inter" in file.suffixes)
            if len(inside) != 1:
                held = ", ".join(file.name for file in inside) or "none"
                raise InputError(f"{given}/ should hold one RecBole .inter file, but there is {held}; name the file")
            path = inside[0]
        if not path.is_file():
            if len(path.parts) == 1 and not path.suffix:
                known = ", ".join(NAMES)
                raise InputError(f"{given!r} is neither a file nor one of {known}{nearest(given, NAMES)}")
            raise InputError(f"there is no file {given}")
    suffixes = [suffix for suffix in map(str.lower, path.suffixes) if suffix not in _COMPRESSED]
    if any(suffix in _TABLES for suffix in suffixes):
        return _read_table(path, suffixes, given)
    return _read_lines(path, given)


def _read_table(path: Path, suffixes: list[str], given: str) -> _Read:
    pandas = _pandas()
    try:
        if suffixes[-1] in (".parquet", ".pq"):
            frame = pandas.read_parquet(path)
        else:
            comma = ".csv" in suffixes
            # as text: 007 and NA are names, and a missing cell must not make floats of the others
            cells = {"sep": ",", "quoting": csv.QUOTE_MINIMAL} if comma else {"sep": "\t", "quoting": csv.QUOTE_NONE}
            frame = pandas.read_csv(path, dtype=str, keep_default_na=False, **cells)
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install counterpoint[tables]") from error
    except Exception as error:  # parsers, decoders and decompressors each have their own way to say "damaged"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{given} cannot be read as a table ({reason})") from error
    return _columns(frame, given, path.name.split(".")[0])


def _pandas() -> Any:
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise InputError("tables of interactions need pandas: pip install counterpoint[tables]") from error
    return pandas


def _columns(frame: Any, where: str, name: str) -> _Read:
    """Interactions of a data frame (pandas or polars)."""
    plain = {re.sub(r"[^a-z0-9]", "", str(column).split(":")[0].lower()): column for column in frame.columns}
    role = {
        kind: next((plain[word] for word in words.split() if word in plain), None) for kind, words in _SYNONYMS.items()
    }
    missing = [kind for kind in ("user", "item") if role[kind] is None]
    if missing:
        found = ", ".join(map(str, frame.columns)) or "none"
        raise InputError(
            f"{where} has no column for the {' and the '.join(missing)}; its columns are {found}:"
            " name them user, item and timestamp"
        )
    user, item = (_names(frame[role[kind]].to_numpy()) for kind in ("user", "item"))
    time = None if role["timestamp"] is None else frame[role["timestamp"]].to_numpy()
    whole = np.array([a is not None and b is not None for a, b in zip(user, item, strict=True)], dtype=bool)
    if not whole.all():
        lost = int((~whole).sum())
        log.warning(
            "%s: %s of %s rows lack the user or the item and are left out", where, f"{lost:,}", f"{len(whole):,}"
        )
        user, item = ([value for value, keep in zip(values, whole, strict=True) if keep] for values in (user, item))
        time = None if time is None else time[whole]
    if time is None:
        log.info("%s has no timestamps: the order of its rows is taken as the order of events", where)
        return user, item, None, name
    return user, item, _times(time, str(role["timestamp"]), where), name


def _names(values: np.ndarray) -> list[str | None]:
    """Values of a column as text; None where a cell is empty."""
    if values.dtype.kind in "iub":
        return [str(value) for value in values.tolist()]
    if values.dtype.kind == "f":  # whole numbers beside missing ones
        return [None if value != value else str(int(value)) if value == int(value) else str(value) for value in values]
    return [
        None if value is None or value != value or str(value) == "" else str(value).strip() for value in values.tolist()
    ]


def _times(values: np.ndarray, column: str, where: str) -> np.ndarray:
    """Numbers that order the values: themselves, or the moments that they write down."""
    if values.dtype.kind == "M":
        bad = np.isnat(values)
        time = values.astype("datetime64[ns]").astype(np.int64)
    elif values.dtype.kind in "iuf":
        time, bad = values, np.isnan(values)
    else:
        pandas = _pandas()
        text = pandas.Series(values)
        time = pandas.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        bad = np.isnan(time)
        if bad.all():
            moments = pandas.to_datetime(text, errors="coerce", utc=True, format="mixed")
            bad = moments.isna().to_numpy()
            time = moments.dt.tz_localize(None).to_numpy().astype("datetime64[ns]").astype(np.int64)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"{where}: {int(bad.sum()):,} of {len(bad):,} values of {column} are no timestamps,"
            f" the first is {values[first]!r} in row {first + 1:,}"
        )
    return time


def _read_lines(path: Path, given: str) -> _Read:
    """Lines ``user item item ...`` in the order of time; a user may have several."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{given} cannot be read as a text file of histories ({error})") from error
    lines = [line for line in map(str.split, text.splitlines()) if line]
    if lines and re.search(r"[,;]", lines[0][0]):
        raise InputError(
            f'{given} looks like a table ("{" ".join(lines[0])[:60]}"); call it .csv or .tsv, or write "user item item ..." lines'
        )
    empty = sum(len(line) == 1 for line in lines)
    if empty:
        log.warning(
            "%s: %s of %s lines name a user without items and are left out", given, f"{empty:,}", f"{len(lines):,}"
        )
    user = [line[0] for line in lines for _ in line[1:]]
    item = [what for line in lines for what in line[1:]]
    return user, item, None, given if given in NAMES else path.name.split(".")[0]
