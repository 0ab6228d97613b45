"""One objective, every modality: the same function, by the same name, from the command line."""

import csv
import json

import numpy as np
import pytest
import yaml

from counterpoint import cli, contrast

WORDS = ("red", "green", "blue", "round", "square", "small", "large", "old")


@pytest.fixture
def data(tmp_path):
    """One small set of each kind, as a user would have it on disk."""
    from PIL import Image

    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice(WORDS, 4)) + f" {i}" for i in range(24)]
    (tmp_path / "sentences.txt").write_text("\n".join(sentences))
    folder = tmp_path / "photos"
    folder.mkdir()
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for i, sentence in enumerate(sentences):
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
            table.writerow([f"photos/{i:02}.png", sentence])
    with (tmp_path / "purchases.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["user", "item", "timestamp"])
        table.writerows((user, (user + step) % 9, step) for user in range(12) for step in range(5))
    return tmp_path


TRAININGS = {
    "simclr": ("photos", "--encoder", "convnet-4", "--image_size", "16", "--projection", "[16, 8]"),
    "simcse": ("sentences.txt", "--encoder", "transformer-32-1", "--dropout", "0.1"),
    "clip": (
        "captions.csv",
        "--encoder",
        "convnet-4",
        "--text",
        "transformer-32-1",
        "--dim",
        "16",
        "--image_size",
        "16",
    ),
    "sasrec": ("purchases.csv", "--dim", "16", "--layers", "1", "--hidden", "16", "--max_length", "8"),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_dcl_takes_the_place_of_any_objective(name, data, monkeypatch, one_thread):
    """Not only the configuration says so: the function of that name computes each step's loss, and no other does."""
    if name in ("simcse", "clip"):
        pytest.importorskip("transformers")
    seen: list[float] = []

    def watched(z1, z2, **options):
        loss = contrast.dcl(z1, z2, **options)
        seen.append(float(loss.detach()))
        return loss

    def refused(*z, **options):
        raise AssertionError("another objective was asked")

    for other in contrast.PAIR_OBJECTIVES:
        monkeypatch.setitem(contrast.PAIR_OBJECTIVES, other, watched if other == "dcl" else refused)
    source, *options = TRAININGS[name]
    run = data / "run"
    arguments = ["train", name, "--objective", "dcl", "--data", str(data / source), "--run", str(run), *options]
    arguments += ["--epochs", "2", "--batch_size", "8", "--log_every", "1", "--lr", "0.01", "--progress", "false"]
    assert cli.main(arguments) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["objective"] == "dcl"
    recorded = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(recorded) >= 4
    np.testing.assert_allclose(recorded, seen, rtol=1e-5, atol=1e-6)


def test_the_objective_is_what_differs(data, one_thread):
    """Same seed, same data: the first batch's loss under each name is that function of the very same embeddings."""
    found = {}
    for name in ("nt_xent", "dcl"):
        run = data / name
        source, *options = TRAININGS["simclr"]
        arguments = ["train", "simclr", "--objective", name, "--data", str(data / source), "--run", str(run), *options]
        arguments += ["--epochs", "1", "--batch_size", "8", "--log_every", "1", "--progress", "false"]
        assert cli.main(arguments) == 0
        found[name] = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert found["nt_xent"]["positive"] == found["dcl"]["positive"]  # the same pairs
    assert found["nt_xent"]["loss"] > found["dcl"]["loss"]  # the positive is gone from a sum of positive terms
