"""`validate` keeps the weights with the best validation score, `patience` stops, and both survive a kill."""

import json

import numpy as np
import pytest
import torch

from counterpoint.data import Images
from counterpoint.errors import InputError
from counterpoint.evaluate import validation
from counterpoint.evaluate.protocols import Result
from counterpoint.evaluate.runs import evaluate
from counterpoint.methods.recommendation.mclrec import MCLRec
from counterpoint.methods.recommendation.sasrec import SASRec
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.train import Run, fit, resume
from counterpoint.train.checkpoint import load_state


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(40) % 2, ("a", "b"))


def simclr() -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(encoder="convnet-4", image_size=16, projection=(16, 8))


def train(data, run, **options) -> Run:
    options = {"epochs": 5, "batch_size": 8, "lr": 0.05, "progress": False, "checkpoint_seconds": 0, **options}
    return fit(simclr(), data, run=run, **options)


def scores(monkeypatch, values: list[float]) -> list[dict[str, torch.Tensor]]:
    """Let the looks of a training see `values`; returns the weights at each look."""
    seen: list[dict[str, torch.Tensor]] = []

    def scorer(method, data, **options):
        def score(trained):
            seen.append({name: value.clone() for name, value in trained.state_dict().items()})
            return Result("made-up", "score", values[trained.current_epoch], None, 1)

        return score

    monkeypatch.setattr(validation, "scorer", scorer)
    return seen


def looks(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_best_weights_are_those_of_the_best_look(images, tmp_path, monkeypatch):
    seen = scores(monkeypatch, [1.0, 3.0, 2.0, 3.0, 0.0])
    run = train(images, tmp_path / "run", validate=1)
    assert [(line["epoch"], line["score"], line["best"]) for line in looks(run)] == [
        (1, 1.0, True),
        (2, 3.0, True),
        (3, 2.0, False),
        (4, 3.0, False),  # a tie keeps the earlier weights
        (5, 0.0, False),
    ]
    assert same(run.model(best=True).state_dict(), seen[1])
    assert same(run.model().state_dict(), seen[4]) and not same(seen[1], seen[4])


def test_looks_come_every_so_many_epochs(images, tmp_path, monkeypatch):
    scores(monkeypatch, [0.0] * 5)
    assert [line["epoch"] for line in looks(train(images, tmp_path / "run", validate=2))] == [2, 4]


def test_without_validate_nothing_is_scored(images, tmp_path):
    run = train(images, tmp_path / "run", epochs=1)
    assert not run.best.exists() and not (run.folder / "validation.jsonl").exists()


def test_patience_ends_the_training_for_good(images, tmp_path, monkeypatch):
    seen = scores(monkeypatch, [1.0, 2.0, 0.0, 1.5, 9.0])
    run = train(images, tmp_path / "run", validate=1, patience=2)
    assert len(seen) == 4  # the fifth epoch, which would have been the best, is never trained
    assert same(run.model().state_dict(), seen[3]) and same(run.model(best=True).state_dict(), seen[1])
    again = resume(run.folder, images)
    assert len(seen) == 4 and same(again.model().state_dict(), seen[3])


def test_looking_does_not_change_the_training(images, tmp_path):
    plain, watched = train(images, tmp_path / "a"), train(images, tmp_path / "b", validate=1)
    assert same(plain.model().state_dict(), watched.model().state_dict())


@pytest.mark.parametrize("killed_in", [1, 3])
def test_a_killed_training_selects_as_an_uninterrupted_one(images, tmp_path, monkeypatch, killed_in):
    whole = train(images, tmp_path / "whole", validate=1)
    original = SimCLR.training_step

    def step(self, batch, batch_idx):
        if self.trainer.current_epoch == killed_in and batch_idx == 2:
            raise RuntimeError("killed")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(SimCLR, "training_step", step)
        train(images, tmp_path / "parts", validate=1)
    parts = resume(tmp_path / "parts", images)
    assert looks(parts) == looks(whole) and len(looks(whole)) == 5
    assert same(load_state(parts.best)["state_dict"], load_state(whole.best)["state_dict"])


def test_evaluation_reports_both(images, tmp_path):
    np.savez(tmp_path / "d.npz", image=images.image.numpy(), label=images.label.numpy())
    run = train(str(tmp_path / "d.npz"), tmp_path / "run", validate=1, epochs=2)
    found = evaluate(run, protocols=["knn-200-0.1"], trained_only=True)
    assert [result.subject for result in found] == ["trained", "best on validation"]
    assert [r.subject for r in evaluate(run, protocols=["knn-200-0.1"])] == [
        "trained",
        "best on validation",
        "untrained",
        "raw pixels",
    ]


def test_images_are_scored_on_those_that_the_bank_does_not_hold(images):
    """A method that tells every image apart scores chance, not 100 %, when a copy of the image is not in the bank."""
    score = validation.scorer(simclr(), images)
    method = simclr()
    method.encode = lambda data, **options: np.eye(40)[: len(data)] if len(data) == 32 else np.eye(40)[32:]
    assert score(method).n == 8 and score(method).value <= 75


def test_histories_are_scored_by_the_validation_target(tmp_path):
    lists = [[str((start + i) % 12) for i in range(7)] for start in range(12)] * 3
    torch.manual_seed(0)
    method = SASRec(dim=16, layers=1, heads=1, hidden=32, dropout=0.1, attention_dropout=0.1, max_length=8)
    options = {"epochs": 8, "batch_size": 16, "optimizer": "adam", "lr": 0.01, "weight_decay": 0.0}
    run = fit(method, lists, run=tmp_path / "run", validate=1, progress=False, schedule="constant", **options)
    found = looks(run)
    assert {line["protocol"] for line in found} == {"loo-full-ranking-valid"}
    assert found[-1]["NDCG@20"] > found[0]["NDCG@20"] and found[-1]["NDCG@20"] > 60


def test_images_without_labels_cannot_be_scored(images, tmp_path):
    with pytest.raises(InputError, match="no labels; leave validate out"):
        train(images.image, tmp_path / "run", validate=1)
    assert not (tmp_path / "run").exists()


def test_patience_needs_validate(images, tmp_path):
    with pytest.raises(InputError, match="say with validate how often"):
        train(images, tmp_path / "run", patience=2)


@pytest.mark.parametrize("option", [{"accumulate": 2}, {"clip": 1.0}])
def test_methods_with_their_own_steps_refuse_what_would_be_ignored(option, tmp_path):
    lists = [["a", "b", "c", "d"]] * 4
    with pytest.raises(InputError, match="takes its own optimiser steps"):
        fit(MCLRec(dim=8, layers=1, heads=1, hidden=8, max_length=4), lists, run=tmp_path / "run", **option)
