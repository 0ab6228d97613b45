"""Which protocols a run gets, on which items, for which subjects; what is written."""

import json
import logging

import numpy as np
import pytest
import torch

from counterpoint.data import Images, load
from counterpoint.errors import InputError
from counterpoint.evaluate import knn, linear_probe
from counterpoint.evaluate.runs import evaluate
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.train import Run, fit

SUBJECTS = ["trained", "untrained", "raw pixels"]


def images(n: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)


def train(data, folder, **options) -> Run:
    torch.manual_seed(options.pop("weights", 0))
    method = SimCLR(encoder="convnet-4", image_size=16, projection=(16, 8))
    options = {"epochs": 1, "batch_size": 8, **options}
    return fit(method, data, run=folder / "run", progress=False, **options)


def written(run: Run) -> list[dict]:
    return json.loads((run.folder / "evaluation.json").read_text())


def split_folder(root, counts) -> str:
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in counts.items():
        for kind in range(2):
            inside = root / part / f"kind{kind}"
            inside.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                pixels[8 * kind : 8 * kind + 8] //= 4
                Image.fromarray(pixels).save(inside / f"{i}.png")
    return str(root)


def test_own_labelled_data_hold_out_a_fifth(tmp_path):
    np.savez(tmp_path / "d.npz", image=images(), label=np.arange(40) % 4)
    run = train(str(tmp_path / "d.npz"), tmp_path)
    found = evaluate(run)
    assert [(result.protocol, result.subject) for result in found] == [
        (protocol, subject) for protocol in ("knn-200-0.1", "linear-offline", "geometry") for subject in SUBJECTS
    ]
    assert written(run) == [result.to_dict() for result in found]
    held_out = load(tmp_path / "d.npz").split(0.2)
    assert [len(part) for part in held_out] == [32, 8]
    for result in found[:6]:
        assert result.n == 8 and result.metric == "accuracy" and result.detail["chance"] == 25
        assert "a fifth of the images" in result.detail["note"] and "pixels, not their labels" in result.detail["note"]
    train_part, test_part = held_out
    trained, untrained = run.model(), run.untrained()
    for protocol, offset in ((knn, 0), (linear_probe, 3)):
        for subject, method in (("trained", trained), ("untrained", untrained)):
            x, y = method.encode(train_part), method.encode(test_part)
            expected = protocol(x, train_part.label, y, test_part.label)
            result = next(item for item in found[offset : offset + 3] if item.subject == subject)
            assert result.value == expected.value and result.ci == expected.ci
        pixels = [part.image.flatten(1).float() / 255 for part in held_out]
        expected = protocol(pixels[0], train_part.label, pixels[1], test_part.label)
        assert found[offset + 2].value == expected.value


def test_the_gallery_shows_held_out_items_under_the_trained_encoder(tmp_path):
    np.savez(tmp_path / "d.npz", image=images(), label=np.arange(40) % 4)
    run = train(str(tmp_path / "d.npz"), tmp_path)
    evaluate(run, protocols=["geometry"])
    gallery = np.load(run.folder / "gallery.npz", allow_pickle=False)
    assert gallery["image"].shape == (8, 3, 16, 16) and gallery["image"].dtype == np.uint8
    assert gallery["vector"].shape == (8, 32) and gallery["vector"].dtype == np.float32
    assert gallery["classes"].tolist() == ["0", "1", "2", "3"]
    np.testing.assert_allclose(gallery["vector"], run.model().encode(torch.from_numpy(gallery["image"])), atol=1e-5)
    _, held_out = load(tmp_path / "d.npz").split(0.2)
    shown = {image.tobytes(): label for image, label in zip(gallery["image"], gallery["label"], strict=True)}
    assert shown == {
        image.numpy().tobytes(): int(label) for image, label in zip(held_out.image, held_out.label, strict=True)
    }


def test_a_test_part_is_used_whole_and_without_the_note(tmp_path):
    run = train(split_folder(tmp_path / "photos", {"train": 10, "test": 7}), tmp_path, limit=12)
    found = evaluate(run, protocols=["knn-200-0.1"])
    assert [result.n for result in found] == [14] * 3
    assert all("note" not in result.detail and result.detail["train"] == 12 for result in found)
    assert found[2].value > 90  # the kinds are dark in different halves


def test_other_data_is_said_to_be_other(tmp_path):
    np.save(tmp_path / "d.npy", images())
    np.savez(tmp_path / "other.npz", image=images(seed=1), label=np.arange(40) % 4)
    run = train(str(tmp_path / "d.npy"), tmp_path)
    found = evaluate(run, tmp_path / "other.npz", protocols=["knn-200-0.1"])
    assert all(result.detail["note"].endswith("training used other data") for result in found)


def test_only_the_protocols_asked_for(tmp_path):
    np.savez(tmp_path / "d.npz", image=images(), label=np.arange(40) % 4)
    run = train(str(tmp_path / "d.npz"), tmp_path)
    assert {result.protocol for result in evaluate(run, protocols=["linear-offline"])} == {"linear-offline"}
    before = (run.folder / "evaluation.json").read_text()
    with pytest.raises(InputError, match=r'no protocol named "knn"; there are .*knn-200-0\.1'):
        evaluate(run, protocols=["geometry", "knn"])
    with pytest.raises(InputError, match="one-shot-20way does not fit"):
        evaluate(run, protocols=["one-shot-20way"])
    assert (run.folder / "evaluation.json").read_text() == before


def test_without_labels_there_is_geometry_only(tmp_path, caplog):
    np.save(tmp_path / "d.npy", images())
    run = train(str(tmp_path / "d.npy"), tmp_path)
    with caplog.at_level(logging.WARNING, "counterpoint"):
        found = evaluate(run)
    assert "no labels" in caplog.text
    assert [(result.protocol, result.subject) for result in found] == [("geometry", subject) for subject in SUBJECTS]
    for result in found:
        assert result.metric == "effective rank" and result.value == result.detail["effective_rank"] >= 1
    assert "label" not in np.load(run.folder / "gallery.npz").files
    with pytest.raises(InputError, match=r"knn-200-0\.1 does not fit"):
        evaluate(run, protocols=["knn-200-0.1"])


def test_one_class_is_no_task(tmp_path, caplog):
    np.savez(tmp_path / "d.npz", image=images(), label=np.zeros(40, int))
    run = train(str(tmp_path / "d.npz"), tmp_path)
    with caplog.at_level(logging.WARNING, "counterpoint"):
        found = evaluate(run)
    assert {result.protocol for result in found} == {"geometry"} and "nothing to classify" in caplog.text
    with pytest.raises(InputError, match="a linear probe needs at least two classes"):
        evaluate(run, protocols=["linear-offline"])


def test_a_run_trained_on_an_array_is_evaluated_on_what_one_passes(tmp_path):
    run = train(torch.from_numpy(images()), tmp_path)
    with pytest.raises(InputError, match="trained on an array: pass the data"):
        evaluate(run)
    labelled = Images(torch.from_numpy(images(seed=1)), torch.arange(40) % 2, ("a", "b"), name="mine")
    found = evaluate(run, labelled, protocols=["knn-200-0.1"])
    assert [result.n for result in found] == [8] * 3
    assert all(result.detail["note"].endswith("training may have seen their pixels") for result in found)
    assert np.load(run.folder / "gallery.npz")["classes"].tolist() == ["a", "b"]


def test_untrained_is_what_the_training_started_from(tmp_path):
    """From the command line the seed decides the weights; the row must be those, whatever the generator did since."""
    np.savez(tmp_path / "d.npz", image=images(), label=np.arange(40) % 4)
    run = train(str(tmp_path / "d.npz"), tmp_path, weights=5, seed=5)
    torch.manual_seed(99)
    first = run.untrained().state_dict()
    torch.manual_seed(5)
    start = SimCLR(encoder="convnet-4", image_size=16, projection=(16, 8)).state_dict()
    assert all(torch.equal(first[name], value) for name, value in start.items())


def test_characters_are_tested_one_shot(tmp_path):
    torch.manual_seed(0)
    method = SimCLR(encoder="convnet-4", image_size=16, channels=1, projection=(16, 8))
    run = fit(method, "omniglot", epochs=1, batch_size=64, limit=64, run=tmp_path / "run", progress=False)
    found = evaluate(run)
    assert [(result.protocol, result.subject, result.n) for result in found] == [
        ("one-shot-20way", subject, 400) for subject in SUBJECTS
    ]
    assert all(0 < result.value < 60 for result in found)
    gallery = np.load(run.folder / "gallery.npz")
    assert len(np.unique(gallery["label"])) == 40 and len(gallery["vector"]) == len(gallery["image"]) == 800
    with pytest.raises(InputError, match=r"knn-200-0\.1 does not fit omniglot"):
        evaluate(run, protocols=["knn-200-0.1"])


def test_factors_are_probed_by_their_kind(tmp_path):
    angle = torch.arange(40) / 40
    pixels = (255 * angle).to(torch.uint8)[:, None, None, None].expand(40, 3, 16, 16)
    data = Images(pixels, factors={"angle": angle, "half": (angle > 0.5).long()}, name="made")
    found = evaluate(train(data, tmp_path), data)
    by = {(result.protocol, result.subject): result.value for result in found}
    assert by["ridge-offline:angle", "raw pixels"] < 0.02
    assert by["linear-offline:half", "raw pixels"] > 80
    assert {protocol for protocol, _ in by} == {"ridge-offline:angle", "linear-offline:half", "geometry"}
    only = evaluate(train(data, tmp_path / "b"), data, protocols=["ridge-offline:angle"])
    assert {result.protocol for result in only} == {"ridge-offline:angle"}
