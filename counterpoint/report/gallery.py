"""Images and their trained vectors made small enough to travel inside the page.

The page gets one sprite sheet, one 2-D position and one short int8 vector per image; neighbours are then searched in
the browser.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint.errors import InputError

MOST = 1500  # images in a page
DIRECTIONS = 128  # leading directions of the vectors that travel
SHEET = 1_400_000  # bytes of the sprite sheet that are aimed at
NEIGHBOURS = 8


@dataclass(frozen=True)
class Items:
    """What gallery.npz holds, cleaned: `vector` rows have unit length or are zero."""

    image: np.ndarray  # uint8 [N, C, H, W]
    vector: np.ndarray  # float32 [N, D]
    label: np.ndarray | None  # int64 [N]
    classes: tuple[str, ...]
    labels_used: bool | None
    origin: str = ""  # where the items come from: did training see them?
    dropped: int = 0
    total: int = 0


def read(path: Path) -> Items | None:
    """Read gallery.npz; None when there is none or nothing in it can be shown.

    Raises:
        InputError: the arrays do not fit each other.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{path} is not a readable npz file of plain arrays; restore it or delete it to leave its part out"
        ) from error
    image, vector, label = held.get("image"), held.get("vector"), held.get("label")
    if image is None or vector is None:
        raise InputError(
            f"{path} lacks the array {'image' if image is None else 'vector'}; "
            "a gallery holds image [N,C,H,W] and vector [N,D]"
        )
    if image.ndim != 4 or image.dtype != np.uint8 or image.shape[1] not in (1, 3):
        raise InputError(f"image in {path} is {image.dtype} {list(image.shape)}; it must be uint8 [N,1 or 3,H,W]")
    if vector.ndim != 2 or len(vector) != len(image) or (label is not None and label.shape != (len(image),)):
        raise InputError(
            f"{path} holds {len(image)} images but vectors {list(vector.shape)}; "
            "there must be one vector (and label) per image"
        )
    vector = vector.astype(np.float32)
    index = np.nonzero(np.isfinite(vector).all(axis=1))[0]
    dropped, total = len(image) - len(index), len(image)
    if len(index) > MOST:
        index = np.sort(np.random.default_rng(0).choice(index, MOST, replace=False))
    if not len(index):
        return None
    vector = vector[index]
    classes = tuple(str(c) for c in held["classes"]) if "classes" in held else ()
    used = held.get("labels_used_in_training")
    return Items(
        image=image[index],
        vector=vector / np.maximum(np.linalg.norm(vector, axis=1, keepdims=True), 1e-12),
        label=None if label is None else label[index].astype(np.int64),
        classes=classes,
        labels_used=None if used is None else bool(np.all(used)),
        origin=str(held["origin"]) if "origin" in held else "",
        dropped=dropped,
        total=total,
    )


def positions(vector: np.ndarray, seed: int = 0) -> tuple[np.ndarray, str]:
    """A 2-D map of unit vectors [N, D] -> positions [N, 2] and the method's name.

    PCA to 50, then t-SNE (perplexity 30, started from the PCA, fixed seed). Fewer than 30 items are only turned by PCA:
    they have no neighbourhoods for t-SNE to keep.
    """
    centred = vector - vector.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    turned = u * s
    if len(vector) < 30 or s[0] < 1e-6:
        flat = np.zeros((len(vector), 2), dtype=np.float32)
        flat[:, : min(2, turned.shape[1])] = turned[:, :2]
        return flat, "PCA"
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(vector) - 1) / 3)
    start = turned[:, :2] if turned.shape[1] > 1 else np.pad(turned, ((0, 0), (0, 1)))
    tsne = TSNE(perplexity=perplexity, init=start / max(start[:, 0].std(), 1e-12) * 1e-4, random_state=seed)
    return tsne.fit_transform(
        turned[:, :50]
    ), f"t-SNE (perplexity {perplexity:.0f}, after PCA to {min(50, turned.shape[1])})"


def short(vector: np.ndarray) -> tuple[np.ndarray, float, tuple[float, float]]:
    """Unit vectors [N, D] made short: int8 [N, min(D, 128)], squared length kept, (mean, largest) error of a cosine.

    The axes are the leading directions of the vectors themselves: centring them first would change every cosine.
    """
    if vector.shape[1] > DIRECTIONS:
        _, _, axes = np.linalg.svd(vector, full_matrices=False)
        turned = vector @ axes[:DIRECTIONS].T
    else:
        turned = vector
    kept = float((turned**2).sum() / max(float((vector**2).sum()), 1e-12))
    scale = np.maximum(np.abs(turned).max(axis=1, keepdims=True), 1e-12)
    coded = np.round(turned / scale * 127).astype(np.int8)
    again = coded / np.maximum(np.linalg.norm(coded.astype(np.float32), axis=1, keepdims=True), 1e-12)
    error = np.abs(again @ again.T - vector @ vector.T)
    return coded, kept, (float(error.mean()), float(error.max()))


def agreement(vector: np.ndarray, label: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Mean share of the k nearest neighbours that have the item's own class, and the share that chance would give."""
    cosine = vector @ vector.T
    np.fill_diagonal(cosine, -np.inf)
    k = min(k, len(vector) - 1)
    near = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
    found = float((label[near] == label[:, None]).mean())
    _, counts = np.unique(label, return_counts=True)
    return found, float((counts * (counts - 1)).sum() / (len(label) * (len(label) - 1)))


def sheet(image: np.ndarray) -> tuple[str, int, int]:
    """Images [N, C, H, W] on one sprite sheet: its data URL, side of a tile, tiles in a row.

    Few grey levels or few colours stay exact as PNG; photographs become JPEG where PNG would be large,
    then smaller tiles.
    """
    from PIL import Image

    high, wide = image.shape[2:]
    columns = math.ceil(math.sqrt(len(image)))
    rows = math.ceil(len(image) / columns)
    best = b""
    native = min(max(high, wide), 64)
    for side in (native, *(smaller for smaller in (48, 32) if smaller < native)):
        canvas = Image.new("L" if image.shape[1] == 1 else "RGB", (columns * side, rows * side))
        for k, picture in enumerate(image):
            tile = Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0))
            scale = side / max(high, wide)
            size = (max(1, round(wide * scale)), max(1, round(high * scale)))
            if size != tile.size:
                tile = tile.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
            left, top = (side - size[0]) // 2, (side - size[1]) // 2
            canvas.paste(tile, (k % columns * side + left, k // columns * side + top))
        best, kind = _encode(canvas), "png"
        if len(best) > SHEET and side % 8 == 0:
            buffer = io.BytesIO()
            canvas.save(buffer, "JPEG", quality=88, subsampling=0)
            if len(buffer.getvalue()) < len(best):
                best, kind = buffer.getvalue(), "jpeg"
        if len(best) <= SHEET:
            break
    return f"data:image/{kind};base64," + base64.b64encode(best).decode(), side, columns


def _encode(image: Any) -> bytes:
    buffer = io.BytesIO()
    if image.mode == "L":
        used = sum(1 for count in image.histogram() if count)
        if used <= 16:
            image = image.quantize(max(used, 2))
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def paper(image: np.ndarray) -> int | None:
    """0 or 255 when grey images are figures on that plain ground (handwriting, cut-out objects), else None."""
    if image.shape[1] != 1:
        return None
    border = np.concatenate([image[:, 0, 0, :], image[:, 0, -1, :], image[:, 0, :, 0], image[:, 0, :, -1]], axis=1)
    for ground in (0, 255):
        if (np.abs(border.astype(int) - ground) < 8).mean() > 0.85:
            return ground
    return None


def groups(items: Items) -> tuple[list[int] | None, list[str], str]:
    """Colour group of each class, the groups' names, and what a group is.

    Classes named "alphabet/character" are too many to tell apart by colour: the part before the slash gets it.
    """
    if items.label is None:
        return None, [], ""
    present = sorted({int(v) for v in items.label})
    names = {v: items.classes[v] if 0 <= v < len(items.classes) else f"class {v}" for v in present}
    heads = list(dict.fromkeys(n.split("/")[0] for n in names.values()))
    if len(present) > 12 and all("/" in n for n in names.values()) and 1 < len(heads) <= 24:
        return [heads.index(names[int(v)].split("/")[0]) for v in items.label], heads, "first part of the class name"
    return [present.index(int(v)) for v in items.label], [names[v] for v in present], "class"


def payload(items: Items, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the page's script needs, and what its text says about it."""
    place, how = positions(items.vector, seed)
    # A map may be turned freely: its longest direction goes along the screen.
    _, _, turn = np.linalg.svd(place - place.mean(axis=0), full_matrices=False)
    place = place @ turn.T if len(place) > 1 else place
    extent = np.maximum(place.max(axis=0) - place.min(axis=0), 1e-12)
    place = (place - (place.max(axis=0) + place.min(axis=0)) / 2) / extent.max()
    coded, kept, error = short(items.vector)
    sprite, side, columns = sheet(items.image)
    group, names, kind = groups(items)
    count = len(items.image)
    queries = np.random.default_rng(seed).choice(count, min(NEIGHBOURS, count), replace=False)
    label = None if items.label is None else items.label.tolist()
    data = {
        "count": count,
        "side": side,
        "columns": columns,
        "paper": paper(items.image),
        "place": [[round(float(a), 4), round(float(b), 4)] for a, b in place],
        "extent": [round(float(e), 4) for e in extent / extent.max()],
        "label": label,
        "classes": {
            str(v): items.classes[v] if 0 <= v < len(items.classes) else f"class {v}" for v in sorted(set(label or []))
        },
        "group": group,
        "groups": names,
        "vector": base64.b64encode(coded.tobytes()).decode(),
        "size": coded.shape[1],
        "queries": queries.tolist(),
        "sprite": sprite,
    }
    said = {
        "how": how, "kept": kept, "error": error, "kind": kind, "groups": len(names), "size": coded.shape[1],
        "from": items.vector.shape[1],
        "agreement": agreement(items.vector, items.label) if items.label is not None and count > 1 else None,
    }  # fmt: skip
    return data, said
