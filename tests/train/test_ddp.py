"""Two processes that share a batch equal one process that holds it: weights, queue, records, guards, resume."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from counterpoint.train import fit

SCRIPT = '''
"""Lightning starts this file again for the second process."""
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from counterpoint import contrast, memory
from counterpoint.train import Method, fit, resume
from counterpoint.train.method import Diverged


class Pairs(Method):
    """No batch normalisation and no random views, so that the number of processes cannot matter."""

    breaks = stops = None  # number of the batch that goes wrong

    def __init__(self, temperature: float = 0.3):
        super().__init__()
        self.temperature, self.seen = temperature, 0
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 8))
        self.key_encoder = memory.MomentumEncoder(self.encoder, 0.9)
        self.queue = memory.Queue(8, 24)

    def loss(self, batch):
        self.seen += 1
        x = batch["image"].float() / 255
        z1, z2 = self.encoder(x), self.encoder(0.9 * x.flip(-1))
        self.watch(z1, z2)
        key = contrast.unit(self.key_encoder(x.flip(-1)))
        terms = {
            "pairs": contrast.nt_xent(z1, z2, temperature=self.temperature),
            "queue": contrast.info_nce(z1, key, negatives=self.queue.keys, in_batch=False),
        }
        self.queue.enqueue(key)
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if self.seen == self.breaks and rank == 1:
            terms["queue"] = terms["queue"] * float("nan")
        if self.seen == self.stops and rank == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return terms

    def after_step(self):
        self.key_encoder.update(self.encoder)


OPTIONS = {"epochs": 3, "batch_size": 9, "lr": 0.2, "log_every": 1, "progress": False, "device": "cpu"}


def build():
    torch.manual_seed(0)
    return Pairs()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = fit(build(), "d.npy", devices=2, run="two", checkpoint_seconds=0, **OPTIONS)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    assert run.folder == Path("two") and not torch.distributed.is_initialized()
    torch.save(run.method.state_dict(), f"two-{rank}.pt")
    contrast.nt_xent(torch.randn(4, 3), torch.randn(4, 3))  # waits for nobody
    Pairs.breaks = 3
    try:
        fit(build(), "d.npy", devices=2, **OPTIONS)
    except Diverged as error:
        Path(f"diverged-{rank}").write_text(str(error))
    Pairs.breaks, Pairs.stops = None, 4
    part = fit(build(), "d.npy", devices=2, run="part", **OPTIONS)
    assert part.interrupted and part.folder == Path("part")
    Pairs.stops = None
    again = resume("part")
    assert not again.interrupted
    Path(f"done-{rank}").write_text("")
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "script.py").write_text(SCRIPT)
    random = np.random.default_rng(0)
    np.save(folder / "d.npy", random.integers(0, 256, (29, 3, 8, 8), dtype=np.uint8))
    ours = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "COUNTERPOINT_RUN")}
    finished = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env={**ours, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (folder / "done-0").exists() and (folder / "done-1").exists(), finished.stderr
    return folder


@pytest.fixture(scope="module")
def one(place):
    """The same training in this process alone."""
    spec = importlib.util.spec_from_file_location("script", place / "script.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["script"] = module
    spec.loader.exec_module(module)
    try:
        return fit(module.build(), place / "d.npy", run=place / "one", **module.OPTIONS)
    finally:
        del sys.modules["script"]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_weights_equal_those_of_one_process(place, one):
    """Batches of nine: five rows on one rank, four on the other."""
    whole = one.method.state_dict()
    for rank in range(2):
        found = torch.load(place / f"two-{rank}.pt", weights_only=True)
        assert list(found) == list(whole)
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_queues_of_all_ranks_are_equal(place, one):
    first, second = (torch.load(place / f"two-{rank}.pt", weights_only=True) for rank in range(2))
    for name in ("queue.bank", "queue.pointer", "queue.filled"):
        assert torch.equal(first[name], second[name])
    assert first["queue.pointer"] == (9 * 9) % 24 and first["queue.filled"] == 24


def test_records_are_of_all_ranks_and_told_once(place, one):
    whole, found = records(place / "one"), records(place / "two")
    assert [record["step"] for record in found] == list(range(1, 10)) == [record["step"] for record in whole]
    for ours, theirs in zip(found, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        for term in ("pairs", "queue"):
            assert ours["terms"][term] == pytest.approx(theirs["terms"][term], rel=1e-4)
    assert sum("coupling" in record for record in found) == sum("coupling" in record for record in whole) > 0


def test_all_ranks_stop_when_one_diverges(place):
    first, second = ((place / f"diverged-{rank}").read_text() for rank in range(2))
    assert first.startswith("queue became not finite on another device at step 3 (epoch 1)")
    assert second.startswith("queue became nan at step 3 (epoch 1)")
    assert [folder.name for folder in (place / "runs").iterdir()] == ["pairs-1"]


def test_ctrl_c_on_one_rank_stops_all_and_resume_equals_uninterrupted(place):
    from counterpoint.train.checkpoint import load_state

    whole, again = (load_state(place / name / "checkpoints" / "last.safetensors") for name in ("two", "part"))
    assert whole["global_step"] == again["global_step"] == 9
    for name, value in whole["state_dict"].items():
        assert torch.equal(again["state_dict"][name], value), name
    assert [r["loss"] for r in records(place / "part")] == [r["loss"] for r in records(place / "two")]
