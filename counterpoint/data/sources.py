"""Where the files of a public data set come from, and the loaders of the sets that are read this way.

A file is looked for in `$COUNTERPOINT_DATA`, then in the user's cache (`$COUNTERPOINT_CACHE`, else
`~/.cache/counterpoint`), and else downloaded from the data set's original source into that cache, where it arrives
only after its SHA-256 has been checked. A file that is already there is used as it is.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import os
import tarfile
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np
import torch
from torch import Tensor

from counterpoint.atomic import writing
from counterpoint.data.images import Images, chosen
from counterpoint.errors import InputError

log = logging.getLogger(__name__)

FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# the binary version: the same pixels as the Python one, and nothing has to be unpickled
CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"

SHA256 = {
    FASHION_MNIST + "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    FASHION_MNIST + "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    FASHION_MNIST + "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    FASHION_MNIST + "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    MNIST + "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    MNIST + "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    MNIST + "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    MNIST + "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    CIFAR10: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
}

FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = tuple("0123456789")


def cache() -> Path:
    """The user's cache folder: `$COUNTERPOINT_CACHE`, else `~/.cache/counterpoint`."""
    return Path(os.environ.get("COUNTERPOINT_CACHE") or Path.home() / ".cache" / "counterpoint").expanduser()


def find(folder: str, *files: str) -> Path | None:
    """The first of `files` that lies in `folder` of `$COUNTERPOINT_DATA` or of the cache."""
    roots = [cache()]
    if os.environ.get("COUNTERPOINT_DATA"):
        roots.insert(0, Path(os.environ["COUNTERPOINT_DATA"]).expanduser())
    return next((path for root in roots for file in files if (path := root / folder / file).is_file()), None)


def require(folder: str, file: str, holds: str) -> Path:
    """As `find`, for a file that has no address to be fetched from.

    Raises:
        InputError: it is nowhere; the message says what it `holds` and where to put it.
    """
    path = find(folder, file)
    if path is None:
        raise InputError(
            f"{file} ({holds}) is not on this machine; put it into {folder}/ of the folder that COUNTERPOINT_DATA names"
        )
    return path


def resolve(folder: str, url: str, sha256: str) -> Path:
    """The local path of the file at `url`, downloaded into the cache if neither place has it.

    Raises:
        InputError: it is nowhere and cannot be downloaded, or what was downloaded is not the published file.
    """
    file = url.rsplit("/", 1)[1]
    return find(folder, file) or download(url, cache() / folder / file, sha256)


def download(url: str, path: Path, sha256: str | None, timeout: float = 30) -> Path:
    """Stream `url` to `path`, which appears only when it is whole and has the SHA-256 `sha256` (None: not known).

    Raises:
        InputError: not reachable, cut off, no room, or another content; the message names the folder to put it into.
    """
    log.info("downloading %s to %s", url, path)
    digest, received = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as temporary:
            with urllib.request.urlopen(url, timeout=timeout) as response, open(temporary, "wb") as handle:
                expected = response.headers.get("Content-Length")
                while chunk := response.read(2**20):
                    handle.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
            if expected is not None and received < int(expected):
                raise InputError(f"the download of {url} ended at {received:,} of {int(expected):,} bytes; try again")
            if sha256 is not None and digest.hexdigest() != sha256:
                raise InputError(
                    f"the file at {url} has SHA-256 {digest.hexdigest()} instead of {sha256}, so it was not kept; "
                    f"put the original file into {path.parent}"
                )
    except (URLError, TimeoutError, ConnectionError) as error:
        reason = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
        reason = getattr(reason, "strerror", None) or reason
        raise InputError(
            f"{path.name} is not on this machine and could not be downloaded ({reason}); get it from {url} and put it "
            f"into {path.parent} or into {path.parent.name}/ of the folder that COUNTERPOINT_DATA names"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path} could not be written ({reason}); set COUNTERPOINT_CACHE to another folder") from error
    return path


def read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of unsigned bytes as an array.

    Raises:
        InputError: cut off, or no such file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        if content[:3] != b"\0\0\x08":
            raise ValueError("not an idx file of bytes")
        shape = np.frombuffer(content, ">i4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it and load again") from error


def fashion_mnist(split: str = "train", *, limit: int | None = None, seed: int = 0) -> Images:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): uint8 [60000 or 10000, 1, 28, 28], 10 classes."""
    return _idx_set("fashion-mnist", "fashion_mnist", FASHION_MNIST, FASHION_CLASSES, split, limit, seed)


def mnist(split: str = "test", *, limit: int | None = None, seed: int = 0) -> Images:
    """MNIST digits (LeCun et al. 1998): uint8 [60000 or 10000, 1, 28, 28], 10 classes."""
    return _idx_set("mnist", "mnist", MNIST, DIGITS, split, limit, seed)


def _idx_set(
    name: str, folder: str, url: str, classes: tuple[str, ...], split: str, limit: int | None, seed: int
) -> Images:
    part = {"train": "train", "test": "t10k"}[_known_split(name, split)]
    images, labels = (
        read_idx(resolve(folder, address, SHA256[address]))
        for address in (f"{url}{part}-images-idx3-ubyte.gz", f"{url}{part}-labels-idx1-ubyte.gz")
    )
    if len(images) != len(labels):
        raise InputError(f"{name}/{split} has {len(images):,} images but {len(labels):,} labels; replace its files")
    at = chosen(len(images), limit, seed).numpy()
    label = torch.from_numpy(labels[at].astype(np.int64))
    return Images(torch.from_numpy(images[at][:, None]), label, classes, f"{name}/{split}")


def cifar10(split: str = "train", *, limit: int | None = None, seed: int = 0) -> Images:
    """CIFAR-10 (Krizhevsky 2009): uint8 [50000 or 10000, 3, 32, 32], 10 classes.

    Read from `cifar10/<split>.npz` with JPEG bytes (`jpeg`, `offsets`, `labels`: a smaller, lossy form) where that is
    at hand, else from the official binary archive.
    """
    _known_split("cifar10", split)
    compressed = find("cifar10", f"{split}.npz")
    if compressed is not None:
        image, label = _cifar_jpeg(compressed, limit, seed)
    else:
        image, label = _cifar_binary(resolve("cifar10", CIFAR10, SHA256[CIFAR10]), split, limit, seed)
    return Images(image, label, CIFAR_CLASSES, f"cifar10/{split}")


def _known_split(name: str, split: str) -> str:
    if split not in ("train", "test"):
        raise InputError(f"{name} has the splits train and test, not {split!r}")
    return split


def _cifar_binary(path: Path, split: str, limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    numbers = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    try:
        with tarfile.open(path) as archive:
            members = {member.name.rsplit("/", 1)[-1]: member for member in archive.getmembers() if member.isfile()}
            rows = [np.frombuffer(archive.extractfile(members[name]).read(), np.uint8) for name in numbers]  # type: ignore[union-attr]
        # one byte of label, then 32 x 32 of red, of green, of blue
        records = np.concatenate(rows).reshape(-1, 1 + 3 * 32 * 32)
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it and load again") from error
    records = records[chosen(len(records), limit, seed).numpy()]
    image = records[:, 1:].reshape(-1, 3, 32, 32)
    return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(records[:, 0].astype(np.int64))


def _cifar_jpeg(path: Path, limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            offsets, labels = arrays["offsets"], arrays["labels"]
            at = chosen(len(labels), limit, seed).numpy()
            decoded = _decoded_name(path)
            if decoded.is_file():
                images = np.load(decoded, mmap_mode="r")[at]
            else:
                jpeg = arrays["jpeg"]
                images = _decode([jpeg[offsets[i] : offsets[i + 1]] for i in at])
                if len(at) == len(labels):
                    _keep(decoded, images)
    except (OSError, KeyError, ValueError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}); replace or remove it") from error
    return torch.from_numpy(images), torch.from_numpy(labels[at].astype(np.int64))


def _decode(jpegs: list[np.ndarray]) -> np.ndarray:
    from PIL import Image

    images = np.empty((len(jpegs), 3, 32, 32), np.uint8)

    def one(i: int) -> None:
        with Image.open(io.BytesIO(jpegs[i].tobytes())) as image:
            images[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)

    def some(start: int) -> None:
        for i in range(start, min(start + 500, len(jpegs))):
            one(i)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(some, range(0, len(jpegs), 500)))
    return images


def _decoded_name(path: Path) -> Path:
    # the name holds what would change if the source file did, so that a stale array is never read
    state = path.stat()
    mark = hashlib.sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
    return cache() / "decoded" / f"cifar10-{path.stem}-{mark}.npy"


def _keep(path: Path, array: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as temporary, open(temporary, "wb") as handle:
            np.save(handle, array)
    except OSError as error:
        # only a saving of time: a full or read-only cache must not stop anyone
        log.info("decoded images were not kept in %s (%s)", path.parent, error)
