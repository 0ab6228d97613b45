"""Images as one resident uint8 tensor, and `load`, the one way to get them from a name, a path or an array."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from counterpoint.errors import InputError, nearest

log = logging.getLogger(__name__)


def stratified(label: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two disjoint sorted index sets, the second with about `fraction` of every class.

    A class with at least two members is on both sides; a class with one member stays on the first side.

    Args:
        label: int64 [N]
        fraction: share of the second side, between 0 and 1 exclusive
        seed: of the draw; the same seed gives the same sets on every machine
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction is {fraction}, but a split needs a share between 0 and 1, both excluded")
    generator = torch.Generator().manual_seed(seed)
    kept, held_out = [], []
    for value in label.unique():
        members = (label == value).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        out = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out.append(members[:out])
        kept.append(members[out:])
    return torch.cat(kept).sort().values, torch.cat(held_out).sort().values


def split_index(n: int, label: Tensor | None, fraction: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Rows that stay and the share that is held out, class by class where there are labels; `name` is for the message."""
    first, second = stratified(label if label is not None else torch.zeros(n, dtype=torch.int64), fraction, seed)
    if len(second) == 0 or len(first) == 0:
        raise InputError(f"{name} has {n} images, too few to hold out a share of {fraction:g}")
    return first, second


@dataclass
class Images:
    """A set of images that lies in memory.

    Args:
        image: uint8 [N, C, H, W]
        label: int64 [N], an index into `classes`, or None; self-supervised training never reads it
        classes: class names, () when unlabelled
        name: where they come from, for messages and records ("cifar10/train", "photos")
        paths: file of each item, relative to its folder, when they came from files
        skipped: (file, reason) of what was left out
        factors: what else is known of each image, by name: int64 [N] (another class), float32 [N] (a measured value)
            or int64 [N, g, g] (a class for each cell of a grid over the image);
            a batch holds each under its name
        background: uint8, as `image`: the same images without what was laid over them, for views that take it away (see
            `counterpoint.views.without_overlay`); a batch holds it under this name
        repeats: int64 [N]: how often an epoch shows each image, in the place of as many copies; None shows each once
    """

    image: Tensor
    label: Tensor | None = None
    classes: tuple[str, ...] = ()
    name: str = "images"
    paths: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    factors: dict[str, Tensor] = field(default_factory=dict)
    background: Tensor | None = None
    repeats: Tensor | None = None

    def __post_init__(self) -> None:
        if self.image.dtype != torch.uint8 or self.image.ndim != 4:
            shape = list(self.image.shape)
            raise InputError(f"{self.name}: images must be uint8 [N, C, H, W], got {self.image.dtype} {shape}")
        if self.label is not None and len(self.label) != len(self.image):
            raise InputError(f"{self.name} has {len(self.image):,} images but {len(self.label):,} labels")
        for factor, values in self.factors.items():
            if factor in ("image", "index", "label", "background") or len(values) != len(self.image):
                raise InputError(f"{self.name}: factor {factor} needs another name, or one value for each image")
        if self.background is not None and self.background.shape != self.image.shape:
            raise InputError(f"{self.name}: backgrounds must have the shape of the images, {list(self.image.shape)}")
        if self.repeats is not None and (len(self.repeats) != len(self.image) or int(self.repeats.min()) < 0):
            raise InputError(f"{self.name}: repeats needs one number for each image, none of them negative")

    def __len__(self) -> int:
        return len(self.image)

    @property
    def lengths(self) -> None:
        """Images have no length."""
        return None

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + (0 if self.background is None else self.background.nbytes)

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """A batch: image uint8 [B, C, H, W], index int64 [B], label int64 [B] where there are labels, factors, background."""
        batch = {"image": self.image[index], "index": index}
        if self.background is not None:
            batch["background"] = self.background[index]
        batch |= {name: values[index] for name, values in self.factors.items()}
        return batch if self.label is None else {**batch, "label": self.label[index]}

    def to(self, device: torch.device) -> Images:
        """The same images on another device."""
        label = None if self.label is None else self.label.to(device)
        factors = {name: values.to(device) for name, values in self.factors.items()}
        background = None if self.background is None else self.background.to(device)
        return replace(self, image=self.image.to(device), label=label, factors=factors, background=background)

    def subset(self, index: Tensor | np.ndarray | Sequence[int] | slice) -> Images:
        """The items at `index` (positions, a boolean mask or a slice), in that order."""
        if isinstance(index, slice):
            index = range(*index.indices(len(self)))
        at = index if isinstance(index, Tensor) else torch.as_tensor(np.asarray(index))
        at = at.nonzero().flatten() if at.dtype == torch.bool else at.to(torch.int64)
        return replace(
            self,
            image=self.image[at.to(self.image.device)],
            label=None if self.label is None else self.label[at.to(self.label.device)],
            paths=tuple(self.paths[i] for i in at.tolist()) if self.paths else (),
            factors={name: values[at.to(values.device)] for name, values in self.factors.items()},
            background=None if self.background is None else self.background[at.to(self.background.device)],
            repeats=None if self.repeats is None else self.repeats[at.to(self.repeats.device)],
        )

    def known(self) -> Images:
        """The images whose label is known: -1 says that it is not (of a generated image, for example)."""
        if self.label is None or not len(self) or int(self.label.min()) >= 0:
            return self
        return self.subset(self.label >= 0)

    def split(self, fraction: float = 0.2, seed: int = 0) -> tuple[Images, Images]:
        """(train, test): a fixed random `fraction` is held out, from every class alike when labels are known."""
        train, test = split_index(len(self), self.label, fraction, seed, self.name)
        return self.subset(train), self.subset(test)

    def channels(self, c: int) -> Images:
        """The same images with `c` channels: grey is repeated to 3, colour becomes luma (ITU-R BT.601)."""
        have = self.image.shape[1]
        if have == c:
            return self
        if (have, c) in ((1, 3), (3, 1)):
            background = None if self.background is None else _converted(self.background, c)
            return replace(self, image=_converted(self.image, c), background=background)
        raise InputError(f"{self.name}: images with {have} channels cannot get {c}; only 1 and 3 convert")


def _converted(image: Tensor, c: int) -> Tensor:
    return image.repeat(1, 3, 1, 1) if c == 3 else torch.cat([_luma(part) for part in image.split(4096)])


def _luma(image: Tensor) -> Tensor:
    # 16-bit fixed point weights of 0.299, 0.587, 0.114: they sum to 65,536, so that white stays 255
    red, green, blue = image.to(torch.int32).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[:, None]


@dataclass
class ImageFiles(Dataset[dict[str, Any]]):
    """Images that are decoded when asked for, for folders that do not fit in memory.

    Item: {"image": uint8 [C, size, size], "index": int, "label": int when labelled, and the factors}. A file that turns out to be
    unreadable is named once in a warning and replaced by the next readable one, so that a long run survives it.

    Args:
        root: folder that `paths` are relative to
        paths: file of each item
        label, classes, name, skipped, factors: as in `Images`
        size: output side in pixels
        colour: 3 channels if true, else 1
    """

    root: Path
    paths: tuple[str, ...]
    size: int
    colour: bool = True
    label: Tensor | None = None
    classes: tuple[str, ...] = ()
    name: str = "images"
    skipped: tuple[tuple[str, str], ...] = ()
    factors: dict[str, Tensor] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from counterpoint.data.folder import Unreadable, decode

        for offset in range(len(self)):
            at = (index + offset) % len(self)
            try:
                image = decode(self.root / self.paths[at], self.size, self.colour)
            except Unreadable as reason:
                file = self.paths[at]
                if file not in self._warned:
                    self._warned.add(file)
                    log.warning("%s: %s could not be read (%s); another takes its place", self.name, file, reason)
                continue
            item: dict[str, Any] = {"image": torch.from_numpy(image), "index": at}
            item |= {name: values[at] for name, values in self.factors.items()}
            if self.label is not None:
                item["label"] = int(self.label[at])
            return item
        raise InputError(f"{self.name}: none of the {len(self):,} files can be read")

    def channels(self, c: int) -> ImageFiles:
        """The same files, decoded to `c` channels (1 or 3)."""
        return replace(self, colour=c == 3)

    def subset(self, index: Tensor | np.ndarray | Sequence[int]) -> ImageFiles:
        """The items at `index`, in that order."""
        at = torch.as_tensor(np.asarray(index), dtype=torch.int64)
        label = None if self.label is None else self.label[at]
        factors = {name: values[at] for name, values in self.factors.items()}
        return replace(self, paths=tuple(self.paths[i] for i in at.tolist()), label=label, factors=factors)

    def split(self, fraction: float = 0.2, seed: int = 0) -> tuple[ImageFiles, ImageFiles]:
        """(train, test), as `Images.split`."""
        train, test = split_index(len(self), self.label, fraction, seed, self.name)
        return self.subset(train), self.subset(test)


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, W] -> uint8 [N, C, size, size].

    A side that shrinks is averaged over area (each output pixel is the exact mean of the input area it covers, so no
    aliasing); a side that grows is interpolated linearly.
    """
    if images.shape[-2:] == (size, size):
        return images
    rows = _resampling(images.shape[-2], size).to(images.device)
    columns = _resampling(images.shape[-1], size).to(images.device)
    # about 64 MB of float32 at a time, whatever the size of the set
    step = max(1, 2**24 // max(1, images[0].numel())) if len(images) else 1
    parts = [((rows @ part.float()) @ columns.T).round_().clamp_(0, 255).to(torch.uint8) for part in images.split(step)]
    return torch.cat(parts) if parts else images.new_zeros(0, images.shape[1], size, size)


def _resampling(length: int, size: int) -> Tensor:
    """Weights [size, length] of one axis; each row sums to 1."""
    if size <= length:
        edges = torch.linspace(0, length, size + 1, dtype=torch.float64)
        pixel = torch.arange(length, dtype=torch.float64)
        low, high = edges[:-1, None], edges[1:, None]
        weights = (torch.minimum(high, pixel + 1) - torch.maximum(low, pixel)).clamp_min(0)
    else:
        centre = ((torch.arange(size, dtype=torch.float64) + 0.5) * length / size - 0.5).clamp(0, length - 1)
        weights = (1 - (centre[:, None] - torch.arange(length, dtype=torch.float64)).abs()).clamp_min(0)
    return (weights / weights.sum(1, keepdim=True)).float()


def chosen(n: int, limit: int | None, seed: int) -> Tensor:
    """Sorted positions of a seeded random subset of `limit` of `n` items; a larger limit contains the smaller one's."""
    if limit is None or limit >= n:
        return torch.arange(n)
    if limit < 1:
        raise InputError(f"limit is {limit}, but at least one image is needed")
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:limit].sort().values


def check(images: Images) -> Images:
    """Warn when the set cannot teach anything because all images are the same; returns it unchanged."""
    if len(images) > 1 and bool((images.image == images.image[:1]).flatten(1).all(1).all()):
        log.warning(
            "%s: all %s images are identical, so every embedding will be too; check how they were made",
            images.name,
            f"{len(images):,}",
        )
    return images


def _omniglot(split: str, limit: int | None, seed: int) -> Images:
    from counterpoint.data import omniglot

    return omniglot.load(split, limit=limit, seed=seed)


def _fashion_mnist(split: str, limit: int | None, seed: int) -> Images:
    from counterpoint.data import sources

    return sources.fashion_mnist(split, limit=limit, seed=seed)


def _cifar10(split: str, limit: int | None, seed: int) -> Images:
    from counterpoint.data import sources

    return sources.cifar10(split, limit=limit, seed=seed)


def _mnist(split: str, limit: int | None, seed: int) -> Images:
    from counterpoint.data import sources

    return sources.mnist(split, limit=limit, seed=seed)


def _cifar_fashion(split: str, limit: int | None, seed: int) -> Images:
    from counterpoint.data import composites

    return composites.cifar_fashion(split, limit=limit, seed=seed)


def _cifar_digits(split: str, limit: int | None, seed: int) -> Images:
    from counterpoint.data import composites

    return composites.cifar_digits(split, limit=limit, seed=seed)


def _fashion_angles(split: str, limit: int | None, seed: int) -> Images:
    from counterpoint.data import composites

    return composites.fashion_angles(split, limit=limit, seed=seed)


def _fashion_pair(split: str, limit: int | None, seed: int) -> Images:
    from counterpoint.data import composites

    return composites.fashion_pair(split, limit=limit, seed=seed)


def _cifar10_few(split: str, limit: int | None, seed: int) -> Images:
    from counterpoint.data import composites

    return composites.cifar10_few(split, limit=limit, seed=seed)


def _cifar10_surrogate(split: str, limit: int | None, seed: int) -> Images:
    from counterpoint.data import composites

    return composites.cifar10_surrogate(split, limit=limit, seed=seed)


def _made(maker: str, **options: str) -> Callable[[str, int | None, int], Images]:
    def read(split: str, limit: int | None, seed: int) -> Images:
        from counterpoint.data import composites

        made: Images = getattr(composites, maker)(split, limit=limit, seed=seed, **options)
        return made

    return read


NAMES: dict[str, Callable[[str, int | None, int], Images]] = {
    "omniglot": _omniglot,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "mnist": _mnist,
    "cifar-fashion": _cifar_fashion,
    "fashion-angles": _fashion_angles,
    "cifar-digits": _cifar_digits,
    "fashion-pair": _fashion_pair,
    "cifar10-few": _cifar10_few,
    "cifar10-surrogate": _cifar10_surrogate,
    "cifar10-linear": _made("imbalanced_set", of="cifar10", profile="linear"),
    "cifar10-exponential": _made("imbalanced_set", of="cifar10", profile="exponential"),
    "fashion-linear": _made("imbalanced_set", of="fashion-mnist", profile="linear"),
    "fashion-exponential": _made("imbalanced_set", of="fashion-mnist", profile="exponential"),
    "cifar10-mosaic": _made("mosaic_set", of="cifar10"),
    "fashion-mosaic": _made("mosaic_set", of="fashion-mnist"),
}


def load(
    data: Any,
    split: str = "train",
    *,
    size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    resident: bool | None = None,
) -> Images | ImageFiles:
    """Images from a known name, a folder, an array file, an array, a list or a table.

    Args:
        data: a name in `NAMES`; a folder (searched through; its immediate sub-folders are the classes when the images
            lie in sub-folders); an .npz (`image`, `images`, `X` or `x`, optionally `label`, `labels`, `Y` or `y`) or
            .npy file; an array or tensor, uint8 or float in [0, 1], [N, H, W], [N, H, W, C] or [N, C, H, W]; a list of
            paths, of PIL images or of such arrays of one shape; or a DataFrame with a column ``image`` or ``path`` of
            them (and ``label`` or ``class``, where it has one). Further arrays of an .npz and columns of a table, one value
            an image, become `Images.factors`.
        split: "train" or "test". A folder that consists of train/ and test/ (or val/) has them; any other own data is
            all "train", and `.split()` holds out a part of it.
        size: output side in pixels. Files: shorter side resized, centre cropped; None keeps the side that all files
            share, or takes 224. Arrays and named sets: larger images are resized with anti-aliasing,
            smaller ones and all with None stay as they are.
        limit: at most so many images, a seeded random subset.
        seed: of that subset.
        resident: True holds a folder in memory, False streams it; None holds it if it needs at most a quarter of the
            machine's memory.

    Raises:
        InputError: nothing there, nothing readable, or something that is no set of images; the message says which.
    """
    if size is not None and size < 1:
        raise InputError(f"size is {size}, but the side of an image is at least 1 pixel")
    if isinstance(data, Images | ImageFiles):
        found: Images | ImageFiles = data
        if limit is not None and limit < len(data):
            found = data.subset(chosen(len(data), limit, seed))
        if isinstance(found, ImageFiles):
            return found if size is None else replace(found, size=size)
    elif isinstance(data, Tensor) or (isinstance(data, np.ndarray) and data.dtype.kind not in "OU"):
        from counterpoint.data import folder

        _only_train(split, "an array")
        found = folder.from_array(data, None, "array", limit=limit, seed=seed)
    elif not isinstance(data, str | Path):
        from counterpoint.data.lists import from_list

        _only_train(split, "a list or table")
        found = from_list(data, size=size, limit=limit, seed=seed, resident=resident)
        if isinstance(found, ImageFiles):
            return found
    elif data in NAMES:
        found = NAMES[str(data)](split, limit, seed)
    else:
        found = _own(Path(data).expanduser(), str(data), split, size, limit, seed, resident)
        if isinstance(found, ImageFiles):
            return found
    if size is not None and max(found.image.shape[-2:]) > size:
        background = None if found.background is None else resize(found.background, size)
        found = replace(found, image=resize(found.image, size), background=background)
    return check(found)


def _own(
    path: Path, given: str, split: str, size: int | None, limit: int | None, seed: int, resident: bool | None
) -> Images | ImageFiles:
    from counterpoint.data import folder

    if path.is_dir():
        return folder.from_folder(path, split, size=size, limit=limit, seed=seed, resident=resident)
    if not path.exists():
        if os.sep in given or path.suffix:
            raise InputError(f"there is no folder or file {given}")
        known = ", ".join(NAMES)
        raise InputError(f"{given!r} is neither a folder or file nor one of {known}{nearest(given, NAMES)}")
    if path.suffix not in (".npz", ".npy"):
        raise InputError(f"{given} is a single file; images come from a folder, an .npz or an .npy file")
    _only_train(split, given)
    image, label, columns = folder.read_arrays(path)
    return folder.from_array(image, label, path.stem, columns=columns, limit=limit, seed=seed)


def _only_train(split: str, what: str) -> None:
    if split != "train":
        raise InputError(f"{what} has no split {split!r}; load it whole and use .split() to hold out a part")


def physical_memory() -> int:
    """Bytes of memory this process may use: the machine's, or the container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        total = 8 * 2**30
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        limit = total
    return min(total, limit)
