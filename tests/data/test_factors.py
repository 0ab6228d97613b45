"""Further columns of own data become factors, where they say something; the angle of a turned picture is what it says."""

import logging

import numpy as np
import pytest
import torch

from counterpoint.data import Images, composites, load, sources
from counterpoint.data.folder import factors_in


def pictures(n: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


COLUMNS = {
    "age": np.linspace(0, 1, 20),
    "year": np.array([1.0, 2.0] * 10),
    "room": np.array([1901, 7] * 10),
    "place": np.array(["b", "a"] * 10),
    "dark": np.array([True, False] * 10),
}


def check(items) -> None:
    assert set(items.factors) == set(COLUMNS)
    for value in ("age", "year"):
        assert items.factors[value].dtype == torch.float32
        assert items.factors[value].numpy() == pytest.approx(COLUMNS[value].astype(np.float32))
    for kind in ("room", "place", "dark"):
        assert items.factors[kind].dtype == torch.int64 and items.factors[kind][:2].tolist() == [1, 0]
    assert items.factors["place"].tolist() == [1, 0] * 10


def test_arrays_beside_the_images_of_a_file(tmp_path):
    np.savez(tmp_path / "a.npz", image=pictures(), label=np.arange(20) % 2, vector=np.zeros((20, 3)), **COLUMNS)
    items = load(tmp_path / "a.npz")
    check(items)
    assert items.take(torch.tensor([4, 2]))["age"].tolist() == pytest.approx([4 / 19, 2 / 19])
    some = load(tmp_path / "a.npz", limit=5)
    at = torch.tensor([int((items.image == image).flatten(1).all(1).nonzero()) for image in some.image])
    assert torch.equal(some.factors["age"], items.factors["age"][at])


def test_columns_beside_the_images_of_a_table(tmp_path):
    from PIL import Image

    pandas = pytest.importorskip("pandas")
    images = [Image.fromarray(picture) for picture in pictures()]
    check(
        load(
            pandas.DataFrame(
                {"image": images, "label": [0, 1] * 10, "note": [f"nr. {i}" for i in range(20)], **COLUMNS}
            )
        )
    )
    check(load({"image": [*pictures()], "mask": [*pictures()], **COLUMNS}))
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    table = pandas.DataFrame({"path": paths, **COLUMNS})
    check(load(table))
    streamed = load(table, resident=False)
    check(streamed)
    assert streamed[3]["age"] == streamed.factors["age"][3] and streamed.subset([3]).factors["room"].tolist() == [0]
    paths[0].write_text("no image")
    left = load(table)
    assert len(left) == 19 and torch.equal(left.factors["age"], streamed.factors["age"][1:])


def test_what_is_no_factor_stays_out(caplog):
    columns = {
        "id": np.arange(20),
        "caption": np.array([f"a picture of {i}" for i in range(20)]),
        "constant": np.ones(20),
        "classes": np.array(["cat", "dog"]),
        "index": np.arange(20.0),
        "when": np.array(["2020-01-01"] * 20, dtype="datetime64[D]"),
    }
    with caplog.at_level(logging.WARNING, "counterpoint"):
        assert factors_in(columns, 20, "mine") == {}
    assert not caplog.text
    with caplog.at_level(logging.WARNING, "counterpoint"):
        assert factors_in({"age": np.array([1.0, np.nan, 3.0]), "dose": np.ones(2)}, 3, "mine") == {}
    assert "mine: age lacks a finite value for 1 of 3 images" in caplog.text
    assert "mine: dose has 2 values for 3 images" in caplog.text


def test_turned_by_a_right_angle_is_turned_exactly():
    images = torch.from_numpy(pictures(3)).permute(0, 3, 1, 2).contiguous()
    found = composites.turned(images, torch.tensor([0.0, 90.0, 45.0]))
    assert torch.equal(found[0], images[0])
    assert int((found[1].int() - torch.rot90(images[1], 1, (1, 2)).int()).abs().max()) <= 1  # counter-clockwise
    assert not found[2, :, 0, 0].any()  # black where nothing was


def test_fashion_angles_are_one_draw_for_the_set(monkeypatch):
    whole = Images(torch.from_numpy(pictures(50)).permute(0, 3, 1, 2).contiguous(), torch.arange(50) % 3)
    monkeypatch.setattr(sources, "fashion_mnist", lambda split: whole)
    every, some = load("fashion-angles"), load("fashion-angles", limit=7, seed=3)
    angle = every.factors["angle"]
    assert angle.dtype == torch.float32 and 0 <= angle.min() < 15 and 75 < angle.max() <= 90
    at = torch.tensor([int((every.image == image).flatten(1).all(1).nonzero()) for image in some.image])
    assert torch.equal(some.factors["angle"], angle[at]) and torch.equal(some.label, every.label[at])
    assert not torch.equal(load("fashion-angles", "test").factors["angle"], angle)
