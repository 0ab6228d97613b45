"""Stopped or killed, then resumed, equals uninterrupted: bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import counterpoint.methods.vision.amcl as amcl
import counterpoint.methods.vision.barlow_twins as barlow_twins
import counterpoint.methods.vision.byol as byol
import counterpoint.methods.vision.cacr as cacr
import counterpoint.methods.vision.dcl as dcl
import counterpoint.methods.vision.moco as moco
import counterpoint.methods.vision.pixpro as pixpro
import counterpoint.methods.vision.simclr as simclr
import counterpoint.methods.vision.simsiam as simsiam
from counterpoint import cli
from counterpoint.encoders.several import AdaptiveHeads
from counterpoint.errors import InputError
from counterpoint.train import Method, Run, fit, resume
from counterpoint.train.checkpoint import load_state

EPOCHS, BATCHES = 3, 5  # 42 images in batches of 8: five batches, two images left out


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    np.save(tmp_path / "d.npy", random.integers(0, 256, (42, 3, 16, 16), dtype=np.uint8))
    return tmp_path / "d.npy"


def build(cls: type, **options) -> Method:
    torch.manual_seed(0)
    return cls(encoder="convnet-4", image_size=16, projection=(16, 8), **options)


def train(method: Method, data, run, **options) -> Run:
    options = {"epochs": EPOCHS, "batch_size": 8, "lr": 0.05, "log_every": 1, "checkpoint_seconds": 0, **options}
    return fit(method, data, run=run, progress=False, **options)


def press_ctrl_c(monkeypatch, batch: int) -> None:
    """A real SIGINT in the middle of the `batch`-th batch, counted from 1."""
    original, seen = Method.training_step, []

    def step(self, *arguments):
        seen.append(1)
        if len(seen) == batch:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(Method, "training_step", step)


def assert_same(one, two, place="") -> None:
    assert type(one) is type(two), place
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), place
    elif isinstance(one, dict):
        assert list(one) == list(two), place
        for key in one:
            if key != "elapsed":
                assert_same(one[key], two[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), place
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{place}.{index}")
    else:
        assert one == two, place


def records(run: Run) -> list[dict]:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    clock = ("time", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def assert_equal_runs(one: Run, two: Run) -> None:
    whole, again = load_state(one.checkpoint), load_state(two.checkpoint)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "callbacks"):
        assert_same(whole[part], again[part], part)
    assert records(one) == records(two)
    live = two.method.state_dict()
    assert all(torch.equal(live[name], value) for name, value in whole["state_dict"].items())


CASES = {
    "simclr": (simclr.SimCLR, {}, {}),
    "dcl": (dcl.DCL, {"weighted": True}, {"optimizer": "adamw", "lr": 0.003, "warmup": 0.3}),
    "moco": (moco.MoCo, {"queue": 20, "momentum": 0.9}, {}),
    "byol": (byol.BYOL, {"momentum": 0.9}, {"optimizer": "adamw", "lr": 0.003}),
    "simsiam": (simsiam.SimSiam, {"bottleneck": 4}, {"optimizer": "lars", "lr": 0.5}),
    "cacr": (cacr.CACR, {"positives": 2}, {}),
    "cacr with a queue": (cacr.CACR, {"positives": 2, "queue": 20, "momentum": 0.9}, {}),
    "pixpro": (pixpro.PixPro, {"instance": 1.0, "momentum": 0.9}, {"optimizer": "adamw", "lr": 0.003}),
    "barlow twins": (barlow_twins.BarlowTwins, {}, {}),
    "amcl": (amcl.AMCL, {"count": 2}, {"optimizer": "adamw", "lr": 0.003}),
    "adaptive heads": (moco.MoCo, {"queue": 20, "heads": AdaptiveHeads(2, hardest=2)}, {}),
    "accumulated": (moco.MoCo, {"queue": 20}, {"accumulate": 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_ctrl_c_and_resume_equal_the_uninterrupted_run(name, data, tmp_path, monkeypatch):
    cls, model, options = CASES[name]
    whole = train(build(cls, **model), data, tmp_path / "whole", **options)
    assert not whole.interrupted
    assert len(records(whole)) == EPOCHS * BATCHES
    for batch in (3, 5, 9):  # inside the first epoch, at its end, and in the last batch but one of the second
        with monkeypatch.context() as patch:
            press_ctrl_c(patch, batch)
            part = train(build(cls, **model), data, tmp_path / f"part{batch}", **options)
        assert part.interrupted
        steps = load_state(part.checkpoint)["global_step"]
        per_epoch = -(-BATCHES // options.get("accumulate", 1))
        assert 0 < steps < EPOCHS * per_epoch
        if "accumulate" not in options:
            assert steps == batch
        torch.manual_seed(1234)  # where the generator stands must not matter
        again = resume(part.folder)
        assert not again.interrupted
        assert_equal_runs(whole, again)


def test_resuming_twice_and_resuming_a_finished_run(data, tmp_path, monkeypatch):
    whole = train(build(byol.BYOL), data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 3)
        train(build(byol.BYOL), data, tmp_path / "part")
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 4)
        assert resume(tmp_path / "part").interrupted
    assert_equal_runs(whole, resume(tmp_path / "part"))
    assert_equal_runs(whole, resume(tmp_path / "part"))


def test_the_momentum_schedule_goes_on_where_it_was(data, tmp_path, monkeypatch):
    seen: list[float] = []
    update = byol.memory.MomentumEncoder.update

    def watched(self, online, progress=None):
        seen.append(progress)
        update(self, online, progress)

    monkeypatch.setattr(byol.memory.MomentumEncoder, "update", watched)
    train(build(byol.BYOL), data, tmp_path / "whole")
    whole = seen[::2]
    assert whole == pytest.approx([step / 15 for step in range(15)])
    seen.clear()
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 7)
        train(build(byol.BYOL), data, tmp_path / "part")
    resume(tmp_path / "part")
    assert seen[::2] == whole


def test_workers_decode_the_same_batches_after_resume(tmp_path, monkeypatch):
    """Files that stream from disk: the position in the epoch is the loader's, not the resident path's."""
    from PIL import Image

    from counterpoint.data import load
    from counterpoint.train.batches import Batches

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, i, 0)).save(folder / f"{i:02}.png")
    files = load(folder, size=16, resident=False)
    whole = [batch["index"].tolist() for batch in Batches(files, 4, seed=3, workers=0)]
    batches = Batches(files, 4, seed=3, workers=0).to(torch.device("cuda"))  # a no-op for what streams
    batches.epoch, batches.batch = 0, 1
    assert [batch["index"].tolist() for batch in batches] == whole[1:]
    assert [batch["index"].tolist() for batch in batches] != whole  # the next epoch, in another order
    resident = Batches(load(folder, size=16), 4, seed=3)
    assert [batch["index"].tolist() for batch in resident] == whole


KILLED = """
import os, signal, sys
import torch
from counterpoint import cli
from counterpoint.train import Method
torch.set_num_threads(1)
step, seen = Method.training_step, []
def dying(self, *arguments):
    seen.append(1)
    if len(seen) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)
Method.training_step = dying
cli.main(sys.argv[1:])
"""

TRAIN = [
    *("train", "moco", "--data", "d.npy", "--encoder", "convnet-4", "--projection", "[16, 8]", "--queue", "20"),
    *("--batch_size", "8", "--lr", "0.05", "--log_every", "1", "--checkpoint_seconds", "0", "--progress", "false"),
]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_kill_9_during_training_then_resume_equals_uninterrupted(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TRAIN, "--epochs", "3", "--device", "cpu", "--run", "whole"]) == 0
    command = [sys.executable, "-c", KILLED, *TRAIN, "--epochs", "3", "--device", "cpu", "--run", "killed"]
    assert subprocess.run(command, env=environment()).returncode == -signal.SIGKILL
    killed = Run.open("killed")
    assert len(records(killed)) == 7  # two records are newer than the checkpoint and must be told again, once
    assert load_state(killed.checkpoint)["global_step"] == BATCHES
    with (killed.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # and the last line may be half-written
    (killed.folder / "checkpoints" / ".last.safetensors.77.partial").write_bytes(b"half")
    assert cli.main(["train", "--resume", "killed"]) == 0
    assert_same(load_state(Run.open("whole").checkpoint)["state_dict"], load_state(killed.checkpoint)["state_dict"])
    assert records(killed) == records(Run.open("whole"))
    assert [file.name for file in (killed.folder / "checkpoints").iterdir()] == ["last.safetensors"]


def test_ctrl_c_at_the_terminal(data, tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "counterpoint.cli", *TRAIN, "--epochs", "100", "--run", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    limit = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "counterpoint train --resume run" in errors and "Traceback" not in errors
    monkeypatch.chdir(tmp_path)
    stopped = load_state(Run.open("run").checkpoint)["global_step"]
    assert 2 < stopped < 500
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == stopped
    assert cli.main(["train", "--resume", "run"]) == 0
    assert [record["step"] for record in records(Run.open("run"))] == list(range(1, 501))


def test_a_second_ctrl_c_does_not_wait_and_the_handler_comes_back(data, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    original, seen = Method.training_step, []

    def step(self, *arguments):
        seen.append(1)
        if len(seen) == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(Method, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(build(simclr.SimCLR), data, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert len(seen) == 7
    assert load_state(tmp_path / "run" / "checkpoints" / "last.safetensors")["global_step"] == BATCHES


def test_another_configuration_is_refused_with_the_difference(data, tmp_path):
    run = train(build(simclr.SimCLR), data, tmp_path / "run", epochs=1)
    resume(run.folder, changes={"epochs": 1, "temperature": 0.2, "projection": [16, 8], "views.flip": 0.5})
    with pytest.raises(InputError, match=r"epochs: 1 in the run, 2 now; temperature: 0\.2 in the run, 0\.3 now"):
        resume(run.folder, changes={"epochs": 2, "temperature": 0.3, "lr": 0.05})
    with pytest.raises(InputError, match="method: simclr in the run, dcl now"):
        resume(run.folder, changes={"method": "dcl"})
    with pytest.raises(InputError, match=r"views.rotate: 0.0 in the run, 20 now"):
        resume(run.folder, changes={"views.rotate": 20})
    for unknown in ("epochz", "views.rotat", "epochs.x"):
        with pytest.raises(InputError, match=f"has no option {unknown}"):
            resume(run.folder, changes={unknown: 1})


def test_resume_of_what_cannot_be_resumed(data, tmp_path):
    with pytest.raises(InputError, match=r"no run folder: it holds no config\.yaml"):
        resume(tmp_path)
    run = train(build(simclr.SimCLR), data, tmp_path / "run", epochs=1)
    content = run.checkpoint.read_bytes()
    run.checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"last\.safetensors is not a readable checkpoint"):
        resume(run.folder)
    run.checkpoint.unlink()
    with pytest.raises(InputError, match="has no checkpoint yet"):
        resume(run.folder)
    run.checkpoint.write_bytes(content)
    for damage in ("", "[1, 2]", "method: simclr\n", "a: [1\n", "method: 3\nmodel: {}\ndata: x\nfit: {}\n"):
        (run.folder / "config.yaml").write_text(damage)
        with pytest.raises(InputError, match=r"config\.yaml is damaged"):
            resume(run.folder)
    (run.folder / "config.yaml").write_text("method: simclr\nmodel: {}\ndata: x\nfit: {epochs: 1}\n")
    with pytest.raises(InputError, match=r"does not say batch_size, .*another version wrote it"):
        resume(run.folder)
    (run.folder / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"holds no config\.yaml"):
        resume(run.folder)


def test_a_run_trained_on_an_array_needs_the_array(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = train(build(simclr.SimCLR), images, tmp_path / "whole")
    assert whole.config["data"] is None
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 3)
        train(build(simclr.SimCLR), images, tmp_path / "part")
    with pytest.raises(InputError, match="trained on an array: pass the same data again"):
        resume(tmp_path / "part")
    assert_equal_runs(whole, resume(tmp_path / "part", images))
