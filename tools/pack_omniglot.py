"""Pack Omniglot's two small background sets and its one-shot test into the package data file.

    python tools/pack_omniglot.py FOLDER

FOLDER holds the three archives of github.com/brendenlake/omniglot (folder `python/`, commit 057f034):
images_background_small1.zip, images_background_small2.zip and all_runs.zip (or one-shot-classification/all_runs.zip).
Prints the SHA-256 of what it wrote; `counterpoint/data/OMNIGLOT.md` records it.
"""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from counterpoint.atomic import writing

SHA256 = {
    "images_background_small1.zip": "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    "images_background_small2.zip": "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
    "all_runs.zip": "437c1eeab0af8484112e1b4cc0f3d541ec727f7c47b9b202da738af9dfd6c325",
}
TARGET = Path(__file__).parents[1] / "counterpoint" / "data" / "omniglot.npz"
SIDE = 105


def archive(folder: Path, name: str) -> zipfile.ZipFile:
    """Open one of the three source archives after checking that it is the published one."""
    path = next((p for p in (folder / name, folder / "one-shot-classification" / name) if p.exists()), None)
    if path is None:
        sys.exit(f"{folder} holds no {name}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        sys.exit(f"{path} has SHA-256 {found}, expected {SHA256[name]}")
    return zipfile.ZipFile(io.BytesIO(content))


def ink(zipped: zipfile.ZipFile, member: str) -> np.ndarray:
    """One drawing as packed bits, 1 where there is ink (black in the source)."""
    pixels = np.asarray(Image.open(io.BytesIO(zipped.read(member))).convert("L"))
    if pixels.shape != (SIDE, SIDE) or not np.isin(pixels, (0, 255)).all():
        sys.exit(f"{member} is not a binary {SIDE} x {SIDE} image")
    return np.packbits(pixels == 0)


def background(folder: Path) -> dict[str, np.ndarray]:
    """Every distinct drawing of the two sets once, ordered by alphabet, character, drawer."""
    drawings: dict[tuple[str, int, int], np.ndarray] = {}
    member_of: dict[tuple[str, int, int], int] = {}
    for number in (1, 2):
        zipped = archive(folder, f"images_background_small{number}.zip")
        for member in zipped.namelist():
            if not member.endswith(".png"):
                continue
            _, alphabet, character, file = member.split("/")
            key = (alphabet, int(character.removeprefix("character")), int(file.removesuffix(".png").split("_")[1]))
            bits = ink(zipped, member)
            if key in drawings and not np.array_equal(drawings[key], bits):
                sys.exit(f"{member} differs between the two sets")
            drawings[key] = bits
            member_of[key] = member_of.get(key, 0) | number
    keys = sorted(drawings)
    bits = np.stack([drawings[key] for key in keys])
    if len(np.unique(bits, axis=0)) != len(bits):
        sys.exit("two different names hold the same drawing")
    alphabets = sorted({alphabet for alphabet, _, _ in keys})
    return {
        "bits": bits,
        "alphabet": np.array([alphabets.index(alphabet) for alphabet, _, _ in keys], np.uint8),
        "character": np.array([character for _, character, _ in keys], np.uint8),
        "drawer": np.array([drawer for _, _, drawer in keys], np.uint8),
        "sets": np.array([member_of[key] for key in keys], np.uint8),
        "alphabets": np.array(alphabets),
    }


def one_shot(folder: Path) -> dict[str, np.ndarray]:
    """The 20 runs: 20 training and 20 test drawings each, and which training drawing each test drawing belongs to."""
    zipped = archive(folder, "all_runs.zip")
    training, test, answer = [], [], []
    for run in range(1, 21):
        training.append([ink(zipped, f"run{run:02}/training/class{i:02}.png") for i in range(1, 21)])
        test.append([ink(zipped, f"run{run:02}/test/item{i:02}.png") for i in range(1, 21)])
        lines = zipped.read(f"run{run:02}/class_labels.txt").decode().splitlines()
        pairs = dict(line.split() for line in lines if line)
        answers = [pairs[f"run{run:02}/test/item{i:02}.png"] for i in range(1, 21)]
        answer.append([int(Path(name).stem.removeprefix("class")) - 1 for name in answers])
    return {
        "run_training": np.array(training, np.uint8),
        "run_test": np.array(test, np.uint8),
        "run_answer": np.array(answer, np.uint8),
    }


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    arrays = background(Path(sys.argv[1])) | one_shot(Path(sys.argv[1]))
    with writing(TARGET) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, allow_pickle=False, **arrays)
    sets = arrays["sets"]
    first, second, both = (sets & 1 > 0).sum(), (sets & 2 > 0).sum(), (sets == 3).sum()
    print(f"{len(sets)} distinct drawings: {first} in small1, {second} in small2, {both} in both")
    content = TARGET.read_bytes()
    print(f"{TARGET.name}: {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
