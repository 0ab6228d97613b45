"""Methods with state of their own under two processes: both hold the same weights, queues, prototypes and clusters."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

SCRIPT = '''
"""Lightning starts this file again for the second process."""
import os

import torch

from counterpoint.recipes import experiment
from counterpoint.train import fit

HEAD = {"projection": [16, 8]}
QUEUE = {**HEAD, "queue": 24, "momentum": 0.9}
CASES = {
    "swav": {**HEAD, "prototypes": 6, "frozen_steps": 3, "queue": 16, "queue_start": 0, "small_views": None},
    "mochi": {**QUEUE, "hard": 8, "mixed": 4, "mixed_with_query": 2, "warmup_epochs": 1},
    "mcl": {"stages": 2, "clusters": 2, "options": HEAD},
    "core-tuning": {"classes": 3, "contrast_dim": 8},
    "cacr": {**QUEUE, "positives": 2},
    "hydra": {**HEAD, "classes": 3, "gate_widths": [6, 12]},
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, options in CASES.items():
        method = experiment(name, encoder="convnet-4", image_size=12, **options).build(0)
        settings = {"epochs": 2, "batch_size": 8, "lr": 0.02, "log_every": 1, "progress": False, "device": "cpu"}
        run = fit(method, "d.npz", devices=2, run=name, **settings)
        torch.save(run.method.state_dict(), f"{name}-{os.environ.get('LOCAL_RANK', '0')}.pt")
'''
OWN = {  # state that no gradient makes, and what it must be after 2 epochs of 4 batches of 8
    "swav": {"queues.0.filled": 16, "queues.1.filled": 16, "prototypes.steps": 8},
    "mochi": {"queue.filled": 24, "queue.pointer": 64 % 24},
    "cacr": {"queue.filled": 24, "queue.pointer": 64 % 24},
    "mcl": {},
    "core-tuning": {},
    "hydra": {},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "script.py").write_text(SCRIPT)
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (33, 3, 12, 12), dtype=np.uint8)
    np.savez(folder / "d.npz", image=image, label=np.arange(33) % 3)
    ours = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "COUNTERPOINT_RUN")}
    finished = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env={**ours, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.mark.parametrize("name", OWN)
def test_both_processes_hold_the_same(place, name):
    first, second = (torch.load(place / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    for key, value in first.items():
        if "running_" not in key and "key_" not in key:  # statistics of each process's own last batch
            assert torch.equal(value, second[key]), key
        assert value.isfinite().all(), key
    for key, value in OWN[name].items():
        assert int(first[key]) == value, key
    if name == "mcl":
        (labels,) = [value for key, value in first.items() if key.startswith("clusterings.")]
        assert labels.shape == (1, 33) and len(labels.unique()) == 2
