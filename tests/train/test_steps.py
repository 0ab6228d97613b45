"""A training of so many steps ends after them, with its schedule, and resumes exactly."""

import json

import pytest
import torch

from counterpoint.errors import InputError
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.train import Method, fit, resume
from counterpoint.train.checkpoint import load_state

pytestmark = pytest.mark.usefixtures("one_thread")


def train(run, **options):
    torch.manual_seed(0)
    method = SimCLR(encoder="convnet-4", image_size=16, projection=(16, 8))
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = {"batch_size": 8, "lr": 0.05, "log_every": 1, "checkpoint_seconds": 0, **options}
    return fit(method, images, run=run, progress=False, **options), images


def records(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("steps", [3, 5, 12])  # within an epoch of five batches, one, several
def test_steps_end_the_training_and_its_schedule(steps, tmp_path):
    run, _ = train(tmp_path / "run", steps=steps, epochs=100)
    state = load_state(run.checkpoint)
    assert state["global_step"] == steps == len(records(run))
    rates = [record["lr"] for record in records(run)]
    assert rates == pytest.approx([0.025 * (1 + torch.tensor(torch.pi * i / steps).cos().item()) for i in range(steps)])
    assert all(torch.equal(value, state["state_dict"][name]) for name, value in run.method.state_dict().items())


def test_steps_equal_the_epochs_that_hold_them(tmp_path):
    one, _ = train(tmp_path / "steps", steps=10)
    two, _ = train(tmp_path / "epochs", epochs=2)
    assert [r["loss"] for r in records(one)] == [r["loss"] for r in records(two)]


def test_accumulated_batches_are_one_step(tmp_path):
    run, _ = train(tmp_path / "run", steps=4, accumulate=2)
    assert load_state(run.checkpoint)["global_step"] == 4


def test_a_stopped_training_goes_on_to_its_last_step(tmp_path, monkeypatch):
    import signal

    whole, images = train(tmp_path / "whole", steps=8)
    step, seen = Method.training_step, []

    def stopping(self, *arguments):
        seen.append(1)
        if len(seen) == 6:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", stopping)
        part, _ = train(tmp_path / "part", steps=8)
    assert part.interrupted
    again = resume(tmp_path / "part", images)
    one, two = load_state(whole.checkpoint), load_state(again.checkpoint)
    assert one["global_step"] == two["global_step"] == 8
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    assert [r["loss"] for r in records(whole)] == [r["loss"] for r in records(again)]


def test_no_steps_are_no_training(tmp_path):
    with pytest.raises(InputError, match="steps must be at least 1"):
        train(tmp_path / "run", steps=0)
