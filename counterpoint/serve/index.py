"""Nearest neighbours among embeddings: an index is built once, lies in a folder, opens at no cost and answers queries."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.atomic import writing
from counterpoint.errors import InputError, nearest

log = logging.getLogger("counterpoint")

METRICS = ("cosine", "dot", "euclidean")
KINDS = ("exact", "hnsw", "int8")
EF_CONSTRUCTION = 100
"""Candidates that HNSW looks at when it links a new vector: more makes a better graph and a slower build."""

BLOCK = 65_536
# of the arrays in a file: which holds the vectors, which names the rows; the first that is there counts
_VECTORS = ("vector", "vectors", "embedding", "embeddings", "x", "X")
_NAMES = ("id", "ids", "path", "paths", "sentence", "text", "item", "user")
_OURS = re.compile(r"(index(-\d+)?\.faiss|items(-\d+)?\.(bin|npy)|\..*\.partial)$")
SUGGEST_AMONG = 20_000


# --------------------------------------------------------------------------------------------------------------- index


@dataclass(eq=False)
class Index:
    """Embeddings to be searched, in memory (`build`) or mapped from a folder (`open`).

    A score is the cosine or the inner product, where more is nearer, or the Euclidean distance, where less is nearer;
    answers are sorted, the nearest first. Vectors of a cosine index are normalised, queries are too.

    * "exact" compares a query with every vector: N x D floats, the right answer.
    * "hnsw" walks a graph: the same floats and about 8 M bytes a vector more; built slowly, searched in logarithmic time.
      It nearly always finds the nearest (`ef_search` trades time for that), but under dot, where vectors differ much in
      length, it misses more.
    * "int8" keeps one byte a number (each dimension between its smallest and largest value): a quarter of the memory,
      scores right to about two digits.

    Attributes:
        vectors: the faiss index.
        names: id of each row, or None: a row's number is its id.
        metric, kind: as above.
        about: where the vectors come from; what ``index.json`` holds besides.
        folder: where it lies, None before `save`.
    """

    vectors: Any
    names: Names | None
    metric: str
    kind: str
    about: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def build(
        cls,
        vectors: Any,
        ids: Iterable[Any] | None = None,
        *,
        metric: str = "cosine",
        kind: str = "exact",
        M: int = 32,
        ef_search: int = 128,
        about: dict[str, Any] | None = None,
    ) -> Index:
        """An index of `vectors`, in memory.

        Args:
            vectors: [N, D] numbers; array (also memory-mapped) or tensor.
            ids: a name for each row (turned into text; a name may repeat); None numbers the rows from 0.
            metric: "cosine", "dot" or "euclidean".
            kind: "exact", "hnsw" or "int8"; see `Index`.
            M: links of a vector in the graph of "hnsw".
            ef_search: candidates that a search in that graph keeps.
            about: notes to keep with it.

        Raises:
            InputError: no vectors, vectors with NaN, a zero vector under cosine, another number of ids, or an unknown
                metric or kind.
        """
        import faiss

        for word, name, known in (("metric", metric, METRICS), ("kind", kind, KINDS)):
            if name not in known:
                raise InputError(f'no {word} "{name}"{nearest(name, known)}; there are {", ".join(known)}')
        if kind == "hnsw" and (M < 2 or ef_search < 1):
            raise InputError(f"M must be at least 2 and ef_search at least 1, not {M} and {ef_search}")
        rows = _rows(vectors, "the vectors")
        count, dim = rows.shape
        if count == 0:
            raise InputError("there are no vectors, and an empty index answers nothing")
        names = None if ids is None else Names.of(ids)
        if names is not None and len(names) != count:
            raise InputError(f"there are {count:,} vectors but {len(names):,} ids")
        measure = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
        index: Any
        if kind == "hnsw":
            index = faiss.IndexHNSWFlat(dim, M, measure)
            index.hnsw.efConstruction, index.hnsw.efSearch = EF_CONSTRUCTION, ef_search
        elif kind == "int8":
            index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, measure)
            low, high = np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)
            for block in _blocks(rows, metric, "the vectors"):
                low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
            index.train(np.stack([low, high]))  # the range of each dimension is all that it learns
        else:
            index = faiss.IndexFlat(dim, measure)
        for block in _blocks(rows, metric, "the vectors"):
            index.add(block)
        return cls(index, names, metric, kind, dict(about or {}))

    @classmethod
    def open(cls, folder: str | Path, *, metric: str | None = None) -> Index:
        """The index in `folder`, memory-mapped: vectors and ids are read from disk when a search touches them.

        Args:
            folder: that `save` wrote.
            metric: refuse an index of another one.

        Raises:
            InputError: no index, a damaged one, or another metric.
        """
        import faiss

        folder = Path(folder)
        try:
            state = json.loads((folder / "index.json").read_text())
            files = state.pop("files")
            known = {name: state.pop(name) for name in ("metric", "kind", "dim", "count")}
        except OSError as error:
            raise InputError(f"{folder} is no index: it holds no index.json") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder}/index.json is damaged ({error}); make the index again") from error
        if metric is not None and metric != known["metric"]:
            raise InputError(
                f"{folder} was made for {known['metric']}, not for {metric}; make another with counterpoint index --metric"
            )
        try:
            # maps flat, 8-bit and graph indexes alike; the older IO_FLAG_MMAP maps inverted lists only
            vectors = faiss.read_index(
                str(folder / files["vectors"]), getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
            )
            names = Names.open(*(folder / file for file in files["items"])) if files["items"] else None
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[-200:]
            raise InputError(f"{folder} is damaged ({reason}); make the index again") from error
        if (vectors.d, vectors.ntotal) != (known["dim"], known["count"]) or (
            names is not None and len(names) != known["count"]
        ):
            raise InputError(f"{folder} is damaged: its files do not belong together; make the index again")
        return cls(vectors, names, known["metric"], known["kind"], state, folder)

    def save(self, folder: str | Path) -> Path:
        """Write the index into `folder`, in the place of one that is there.

        Files get names of their own and count from the moment ``index.json`` names them, in one rename: whenever a process is
        killed, the old index or the new one is whole.

        Raises:
            InputError: the folder holds something else, or it cannot be written.
        """
        import faiss

        folder = Path(folder)
        if folder.exists() and not (folder / "index.json").exists():
            foreign = [] if not folder.is_dir() else [file for file in folder.iterdir() if not _OURS.match(file.name)]
            if foreign or not folder.is_dir():
                raise InputError(f"{folder} is there and is no index; choose another folder with --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken = {file.name for file in folder.iterdir()}
            ends = ["", *(f"-{number}" for number in range(2, len(taken) + 3))]
            end = next(end for end in ends if not {f"index{end}.faiss", f"items{end}.bin"} & taken)
            files: dict[str, Any] = {"vectors": f"index{end}.faiss", "items": None}
            with writing(folder / files["vectors"]) as temporary:
                faiss.write_index(self.vectors, str(temporary))
            if self.names is not None:
                files["items"] = [f"items{end}.bin", f"items{end}.npy"]
                self.names.save(*(folder / file for file in files["items"]))
            state = {"metric": self.metric, "kind": self.kind, "dim": self.dim, "count": len(self), **self.about}
            run = self.about.get("run")
            if run and folder.resolve().is_relative_to(run):  # they move together
                state["run"] = os.path.relpath(run, folder.resolve())
            state["files"] = files
            with writing(folder / "index.json") as temporary:
                temporary.write_text(json.dumps(state, indent=1) + "\n")
            current = {"index.json", files["vectors"], *(files["items"] or ())}
            for file in folder.iterdir():
                if file.name not in current and _OURS.match(file.name):
                    file.unlink()
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise InputError(f"cannot write the index {folder} ({reason}); one that was there is intact") from error
        self.folder = folder
        return folder

    def __len__(self) -> int:
        return self.vectors.ntotal

    @property
    def dim(self) -> int:
        return self.vectors.d

    def search(
        self, queries: Any, k: int = 10, *, without: Sequence[int] | np.ndarray = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `k` nearest rows of each query.

        Args:
            queries: [Q, D] numbers, or one query [D].
            k: how many, at most as many as there are.
            without: rows that are no answer.

        Returns:
            Scores float32 [Q, k] and ids [Q, k]: text, or int64 row numbers where rows have no names.

        Raises:
            InputError: another dimension than the index's, NaN, a zero vector under cosine, or k below 1.
        """
        if k < 1:
            raise InputError(f"k is {k}, but an answer has at least one row")
        rows = _rows(queries, "the query")
        if rows.shape[1] != self.dim:
            raise InputError(
                f"the query has {rows.shape[1]} dimensions, but the index has {self.dim}: it is of another encoder"
            )
        left_out = np.unique(np.asarray(without, dtype=np.int64))
        fetched = min(k + len(left_out), len(self))
        found = [self._nearest(block, fetched) for block in _blocks(rows, self.metric, "the query")]
        if not found:
            return np.empty((0, 0), np.float32), np.empty((0, 0), np.int64)
        scores, places = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if len(left_out):
            kept = min(k, len(self) - len(left_out))
            order = np.isin(places, left_out).argsort(axis=1, kind="stable")[:, :kept]
            scores, places = np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)
        if self.names is None:
            return scores, places
        ids = np.array([self.names[place] for place in places.flat], dtype=object)
        return scores, ids.reshape(places.shape)

    def like(self, item: Any, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The `k` rows nearest to a row of the index, itself left out: scores [k] and ids [k].

        Args:
            item: an id of the index.
            k: how many.

        Raises:
            InputError: no such id (with the nearest names), or k below 1.
        """
        rows = self.rows(item)
        if not len(rows):
            raise InputError(f'the index has no "{item}"{self.hint(str(item))}')
        scores, ids = self.search(self.vector(rows[0]), k, without=rows)
        return scores[0], ids[0]

    def rows(self, item: Any) -> np.ndarray:
        """The rows called `item`, int64; none, one, or several where an id repeats."""
        if self.names is not None:
            return self.names.find(str(item))
        number = int(item) if isinstance(item, int | np.integer) or str(item).isdecimal() else -1
        return np.array([number] if 0 <= number < len(self) else [], dtype=np.int64)

    def vector(self, row: int) -> np.ndarray:
        """The vector of a row [D], as the index keeps it (normalised under cosine, rounded in "int8")."""
        return self.vectors.reconstruct(int(row))

    @cached_property
    def method(self) -> Any:
        """The trained method whose run made the index; it embeds queries.

        Raises:
            InputError: it was made of a file, the run is gone, or has been trained on since.
        """
        from counterpoint.train import Run

        if not self.about.get("run"):
            raise InputError(
                "the index was made of vectors, so it cannot embed queries: ask with an id of it, with --vector, or make it"
                " again from a run"
            )
        folder = Path(os.path.normpath((self.folder or Path()).resolve() / self.about["run"]))
        if not folder.is_dir():
            raise InputError(
                f"the run {folder} that embeds queries for this index is gone; ask with an id of the index or --vector"
            )
        run = Run.open(folder)
        if _digest(run.checkpoint) != self.about.get("checkpoint"):
            raise InputError(
                f"{folder} is not what it was when the index was made, so its vectors do not compare; make the index again"
            )
        return run.model()

    def _nearest(self, block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        options: dict[str, Any] = {}
        if self.kind == "hnsw":
            ef = max(k, self.vectors.hnsw.efSearch)
            options["params"] = faiss.SearchParametersHNSW(efSearch=ef)  # type: ignore[attr-defined]
        scores, places = self.vectors.search(block, k, **options)
        if (lost := (places < 0).any(1)).any():  # the walk through the graph ended before it had seen k rows
            scores[lost], places[lost] = self.vectors.storage.search(block[lost], k)
        return (np.sqrt(scores.clip(min=0)) if self.metric == "euclidean" else scores), places

    def hint(self, item: str) -> str:
        """What to say after an id that is not there: the nearest one, or how rows are numbered."""
        if self.names is None:
            return f": its rows are numbered from 0 to {len(self) - 1:,}"
        return nearest(item, (self.names[i] for i in range(min(len(self), SUGGEST_AMONG))))


class Names:
    """Ids of rows as one run of UTF-8 bytes, each after a zero byte, so that a million of them opens as a memory map.

    Args:
        text: the bytes, with a zero byte at the end too.
        start: int64 [N + 1], where each id starts, and where one more would.
    """

    def __init__(self, text: bytes | mmap.mmap, start: np.ndarray):
        self.text, self.start = text, start

    @classmethod
    def of(cls, ids: Iterable[Any]) -> Names:
        encoded = [str(name).replace("\0", "").encode() for name in ids]
        start = np.cumsum([1, *(len(name) + 1 for name in encoded)], dtype=np.int64)
        return cls(b"".join(b"\0" + name for name in encoded) + b"\0", start)

    @classmethod
    def open(cls, text: Path, start: Path) -> Names:
        with text.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        offsets = np.load(start, mmap_mode="r", allow_pickle=False)
        if len(offsets) == 0 or offsets[-1] != len(mapped):
            raise ValueError(f"{text.name} does not fit {start.name}")
        return cls(mapped, offsets)

    def save(self, text: Path, start: Path) -> None:
        with writing(text) as temporary:
            temporary.write_bytes(self.text[:])
        with writing(start) as temporary, temporary.open("wb") as file:
            np.save(file, self.start)

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, row: int) -> str:
        return bytes(self.text[self.start[row] : self.start[row + 1] - 1]).decode()

    def find(self, name: str) -> np.ndarray:
        """Rows that are called `name`."""
        wanted, found, place = b"\0" + name.encode() + b"\0", [], 0
        while (place := self.text.find(wanted, place)) >= 0:
            place += len(wanted) - 1
            found.append(place - len(wanted) + 2)
        return np.searchsorted(self.start, np.array(found, dtype=np.int64))


# ------------------------------------------------------------------------------------------------------------- sources


def of_file(path: str | Path) -> tuple[np.ndarray, list[str] | None]:
    """Vectors [N, D] of an embedding file, and the names of their rows where it has some.

    Args:
        path: .npz as ``counterpoint embed`` writes it (`vector`, and maybe `path`, `sentence`, `item` or `id`), .npy, or
            .safetensors.

    Raises:
        InputError: no such file, not readable, or without vectors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False), None
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files if name in (*_VECTORS, *_NAMES)}
                held = ", ".join(file.files)
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                held = ", ".join(file.keys())
                arrays = {name: file.get_tensor(name).float().numpy() for name in file.keys() if name in _VECTORS}  # noqa: SIM118 (no mapping)
        else:
            raise InputError(f"{path} is no embedding file: those are .npz, .npy and .safetensors")
    except InputError:
        raise
    except Exception as error:  # zip, header and pickle errors alike
        raise InputError(f"{path} cannot be read as an embedding file ({' '.join(str(error).split())})") from error
    vectors = next((arrays[name] for name in _VECTORS if name in arrays), None)
    if vectors is None:
        raise InputError(f"{path} holds {held or 'nothing'}, but no array named vector")
    names = next((arrays[name] for name in _NAMES if name in arrays), None)
    return vectors, None if names is None else [str(name) for name in names.tolist()]


def of_run(run: Any, data: Any = None, split: str | None = None) -> tuple[np.ndarray, list[str] | None, dict[str, Any]]:
    """What the trained encoder of `run` makes of data: vectors, names of rows, and notes for `Index.build`.

    Images are called by their file (numbered where they come from no files), sentences by themselves (each once; of questions
    and what answers them, the answers). A run on user histories gives the embeddings of the items that it knows, which need
    no data.

    Args:
        run: a run, or its folder.
        data: what to embed; by default what the run was trained on.
        split: part of a data set that has several.

    Raises:
        InputError: no data named and the run was trained on an array, or data that the method cannot read.
    """
    import torch

    from counterpoint.data import corpus, folder, texts
    from counterpoint.train import Run

    run = run if isinstance(run, Run) else Run.open(run)
    method = run.model().to("cuda" if torch.cuda.is_available() else "cpu")
    about = {"of": method.family, "run": str(run.folder.resolve()), "checkpoint": _digest(run.checkpoint)}
    if method.family == "histories":
        if data is not None:
            raise InputError("an index of a run on histories holds the items that it knows; leave --data away")
        table = method.encoder.table[1:].detach().float().cpu().numpy()
        return table, list(method.encoder.catalogue), about
    data = run.config["data"] if data is None else data
    if data is None:
        raise InputError(f"{run.folder} was trained on an array, so say with --data what to index")
    if isinstance(data, str | Path):
        about["data"] = str(data)
    part = split or "train"
    if method.family == "sentences":
        rows = texts.load(data, part)
        if method.searched in rows.columns:
            rows = texts.Texts({"anchor": rows.columns[method.searched]})
        sentences = rows.sentences()
        return method.encode(sentences), sentences, about
    if method.family == "language":
        documents = corpus.load(data, split or "all")
        return method.encode(documents), documents, about
    items = getattr(method, "images", method.read)(data, part)
    vectors = method.encode(items)
    if not items.paths:
        return vectors, None, about
    if isinstance(data, str | Path) and Path(data).expanduser().is_dir():
        about["folder"] = str(folder.split_folder(Path(data).expanduser(), part).resolve())
    return vectors, list(items.paths), about


def ask(index: Index, query: str, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Answer a query in words: scores [k] and ids [k].

    An id of the index comes first: the rows like it, itself left out. Anything else is embedded by the run that the index
    was made from: a path as the image in that file (one that is in the index counts as its id), a sentence as such; and
    items, one after the other as a user chose them ("3 17 4"), as that history, its items left out of the answer.

    Args:
        index: to search.
        query: an id, a path, a sentence, or several items.
        k: how many.

    Raises:
        InputError: neither an id nor anything the run can embed; the message names what comes near.
    """
    if len(index.rows(query)):
        return index.like(query, k)
    of, folder = index.about.get("of"), index.about.get("folder")
    path = Path(query).expanduser()
    if folder is not None and path.is_file() and path.resolve().is_relative_to(folder):
        item = path.resolve().relative_to(folder).as_posix()
        if len(index.rows(item)):
            return index.like(item, k)
    if not query.strip():
        raise InputError("the query is empty")
    if of == "histories":
        items = re.split(r"[\s,]+", query.strip())
        rows = [index.rows(item) for item in items]
        for item, found in zip(items, rows, strict=True):
            if not len(found):
                raise InputError(f'the index has no "{item}"{index.hint(item)}')
        vector, without = index.method.encode([items]), [int(found[0]) for found in rows]
    elif of in ("images", "pairs") and path.is_file():
        vector, without = index.method.encode([path]), []
    elif of in ("sentences", "language"):
        vector, without = index.method.encode([query]), []
    elif of == "pairs":
        vector, without = index.method.encode_text([query]), []
    else:
        file = ", nor an image file" if of == "images" else ""
        raise InputError(f'the index has no "{query}"{file}{index.hint(query)}')
    scores, ids = index.search(vector, k, without=without)
    return scores[0], ids[0]


def _rows(vectors: Any, what: str) -> np.ndarray:
    """Numbers [N, D], still of their own type and maybe on disk; one vector [D] becomes [1, D]."""
    if hasattr(vectors, "detach"):
        vectors = vectors.detach().float().cpu().numpy()
    rows = np.asanyarray(vectors)
    if rows.dtype.kind not in "fiu":
        raise InputError(f"{what}: {rows.dtype} values are not numbers")
    if rows.ndim == 1:
        rows = rows[None]
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise InputError(f"{what} has shape {list(rows.shape)}, but embeddings are [N, D]")
    return rows


def _blocks(rows: np.ndarray, metric: str, what: str) -> Iterable[np.ndarray]:
    """Float32 blocks, so that no second copy of all vectors is needed; of length 1 where the metric is cosine."""
    for start in range(0, len(rows), BLOCK):
        with np.errstate(over="ignore"):
            block = np.ascontiguousarray(rows[start : start + BLOCK], dtype=np.float32)
        bad = ~np.isfinite(block).all(1)
        if bad.any():
            raise InputError(f"{what}: row {start + int(bad.argmax()):,} holds NaN or infinity; remove or repair it")
        if metric == "cosine":
            length = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
            if not length.all():
                raise InputError(
                    f"{what}: row {start + int((length == 0).argmax()):,} is zero, which has no direction to compare; "
                    "leave it out, or use the metric dot or euclidean"
                )
            block = (block / length[:, None]).astype(np.float32)
        yield block


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
