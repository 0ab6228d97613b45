"""Folders are replaced whole or not at all, and never over somebody else's work."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from counterpoint.errors import InputError
from counterpoint.export.checks import largest_difference
from counterpoint.export.folder import label, replacing


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "deep" / "out"
    for text in ("first", "second"):
        with replacing(path, {"encoder": text}) as folder:
            assert folder.parent == path.parent and folder != path  # a rename between disks would copy
            (folder / "inside").mkdir()
            (folder / "inside" / text).write_text(text)
            assert path.exists() == (text == "second")
    assert contents(path) == {"second": "second", "counterpoint.json": '{\n "encoder": "second"\n}\n'}
    assert [*path.parent.iterdir()] == [path]


def test_on_failure_the_earlier_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(RuntimeError), replacing(path, {}) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError
        assert not [*tmp_path.iterdir()]
    with replacing(path, {}) as folder:
        (folder / "good").write_text("x")
    rename = Path.rename

    def full(self, target):
        if self.name.endswith(".partial"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="disk full"), replacing(path, {}) as folder:
        (folder / "new").write_text("y")
    assert "good" in contents(path) and "new" not in contents(path) and [*tmp_path.iterdir()] == [path]


def test_somebody_elses_folder_or_file_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name in ("thesis", "file"):
        taken = pytest.raises(InputError, match=f"{name} exists and is no folder that an export wrote")
        with taken, replacing(tmp_path / name, {}):
            raise AssertionError
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "dear"


def test_the_limit_is_a_share_of_large_vectors_and_nan_never_passes():
    one = torch.ones(2, 3)
    assert largest_difference(one, one + 9e-4, "x") == pytest.approx(9e-4, rel=1e-3)
    assert largest_difference(100 * one, 100 * one + 0.05, "x") == pytest.approx(0.05, rel=1e-3)
    others = (one + 2e-3, one * float("nan"), one[:, :2], torch.ones(1, 3))
    for other in others:
        with pytest.raises(InputError, match=r"x answers differently \(by .*\), so nothing was kept"):
            largest_difference(one, other, "x")
    with pytest.raises(InputError):
        largest_difference(one * float("nan"), one * float("nan"), "x")


def test_names_do_not_tell_where_on_this_machine_things_lie(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "weights.pt").write_text("")
    names = {
        "resnet18": "resnet18",
        "package:gt/model": "package:gt/model",
        "owner/model": "owner/model",
        f"{tmp_path}/model": "model",
        f"local-dir:{tmp_path}/model": "local-dir:model",
        f"open_clip:ViT-B-32/{tmp_path}/weights.pt": "open_clip:ViT-B-32/weights.pt",
        f"convnet-4 and {tmp_path}/model": "convnet-4 and model",
    }
    for name, expected in names.items():
        assert label(SimpleNamespace(name=name)) == expected
