"""A checkpoint comes back as it went in, is never half-written, and cannot run code."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from counterpoint import atomic
from counterpoint.errors import InputError
from counterpoint.train import checkpoint
from counterpoint.train.checkpoint import SafeCheckpointIO, load_state, save_state


def test_a_tree_comes_back_with_its_types(tmp_path):
    state = {
        "state_dict": {"a.weight": torch.randn(2, 3), "half": torch.randn(3).bfloat16(), "steps": torch.tensor(7)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "param_groups": [{"lr": 0.1}]}],
        "flags": (True, None, 3, "text", 1e-300, float("inf"), [], {}),
        "mask": torch.tensor([True, False]),
        "turned": torch.arange(6).reshape(2, 3).T,
        "empty": torch.zeros(0, 4),
    }
    save_state(state, tmp_path / "deep" / "c.safetensors")
    found = load_state(tmp_path / "deep" / "c.safetensors")
    assert found["flags"] == state["flags"] and type(found["flags"]) is tuple and found["flags"][0] is True
    assert list(found["optimizer_states"][0]["state"]) == [0, 1]
    assert found["optimizer_states"][0]["param_groups"] == [{"lr": 0.1}]
    for name, value in state["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value) and found["state_dict"][name].dtype == value.dtype
    for name in ("mask", "turned", "empty"):
        assert torch.equal(found[name], state[name])
    assert list(found) == list(state)


def test_names_that_meet_at_one_place_stay_apart(tmp_path):
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "c": {0: torch.zeros(1), "0": torch.ones(1)}}
    save_state(state, tmp_path / "c.safetensors")
    found = load_state(tmp_path / "c.safetensors")
    assert found["a.b"] == 0 and found["a"]["b"] == 1 and found["c"] == {0: torch.zeros(1), "0": torch.ones(1)}


def test_shared_memory_is_written_twice(tmp_path):
    weight = torch.randn(3)
    save_state({"one": weight, "two": weight, "part": weight[1:]}, tmp_path / "c.safetensors")
    found = load_state(tmp_path / "c.safetensors")
    assert torch.equal(found["two"], weight) and torch.equal(found["part"], weight[1:])


def test_objects_are_refused_not_pickled(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(TypeError, match=r"here\.there is a object"):
        save_state({"here": {"there": object()}}, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "c.safetensors"
    save_state({"a": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"c\.safetensors is not a readable checkpoint"):
        load_state(path)


def test_other_files_are_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    for name in ("pickle", "weights"):
        with pytest.raises(InputError, match=f"{name}.safetensors is not a readable checkpoint"):
            load_state(tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="no checkpoint at"):
        load_state(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="no checkpoint at"):
        load_state(tmp_path)


def test_lightning_plugin_round_trip(tmp_path):
    plugin = SafeCheckpointIO()
    plugin.save_checkpoint({"a": torch.ones(2)}, tmp_path / "c.safetensors")
    assert torch.equal(plugin.load_checkpoint(tmp_path / "c.safetensors")["a"], torch.ones(2))
    plugin.remove_checkpoint(tmp_path / "c.safetensors")
    plugin.remove_checkpoint(tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.parametrize("place", ["write", "sync", "rename"])
def test_a_full_disk_is_one_sentence_and_keeps_the_previous_checkpoint(tmp_path, monkeypatch, place):
    path = tmp_path / "c.safetensors"
    save_state({"a": torch.ones(2)}, path)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = {
        "write": (checkpoint, "save_file"),
        "sync": (atomic.os, "fsync"),
        "rename": (atomic.os, "replace"),
    }[place]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*No space left on device.*previous one"):
        save_state({"a": torch.zeros(2)}, path)
    monkeypatch.undo()
    assert torch.equal(load_state(path)["a"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


KILLED = """
import os, sys, torch
from counterpoint import atomic
from counterpoint.train import checkpoint
checkpoint.save_state({"a": torch.ones(1000)}, sys.argv[1])
place = sys.argv[2]
if place == "write":
    whole = checkpoint.save_file
    def half(tensors, path, metadata=None):
        whole(tensors, path, metadata)
        content = open(path, "rb").read()
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            os._exit(9)
    checkpoint.save_file = half
else:
    atomic.os.replace = lambda *paths: os._exit(9)
checkpoint.save_state({"a": torch.zeros(1000)}, sys.argv[1])
"""


@pytest.mark.parametrize("place", ["write", "rename"])
def test_killed_while_writing_leaves_the_previous_checkpoint(tmp_path, place):
    path = tmp_path / "c.safetensors"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), place], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 9
    assert len(list(tmp_path.iterdir())) == 2  # the killed process could not clear up what it was writing
    assert torch.equal(load_state(path)["a"], torch.ones(1000))
    save_state({"a": torch.full((1000,), 2.0)}, path)
    assert torch.equal(load_state(path)["a"], torch.full((1000,), 2.0))
