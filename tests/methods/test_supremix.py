"""SupReMix trains on measured values, follows them, and says what it lacks."""

import math

import numpy as np
import pytest
import torch

from counterpoint.contrast.regression import supremix
from counterpoint.data import Images
from counterpoint.errors import InputError
from counterpoint.evaluate import runs
from counterpoint.evaluate.protocols import ordinality
from counterpoint.methods.vision.supremix import SupReMix, target_of
from counterpoint.recipes import experiment
from counterpoint.train import fit
from counterpoint.views import ImageViews

SMALL = {"encoder": "convnet-8", "image_size": 16, "channels": 1, "projection": (32, 16)}
MILD = ImageViews(crop=(0.8, 1.0), ratio=(1, 1), flip=0, jitter=(0.3, 0.3, 0, 0), grey=0, blur=0)


def gratings(n: int = 240) -> Images:
    """Waves in a direction between 0 and 90 degrees, of any phase: the pixels themselves say little about it."""
    generator = torch.Generator().manual_seed(0)
    angle, phase = 90 * torch.rand(n, generator=generator), 2 * math.pi * torch.rand(n, generator=generator)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    turn = angle.deg2rad()[:, None, None]
    wave = torch.sin(1.4 * (turn.cos() * x + turn.sin() * y) + phase[:, None, None])
    return Images((127 + 100 * wave[:, None]).to(torch.uint8), factors={"angle": angle}, name="gratings")


def test_the_loss_is_the_formula_on_rounded_labels():
    torch.manual_seed(0)
    method = SupReMix(**SMALL, rounding=2, window=7.0, temperature=0.3, shift="separate")
    batch = gratings(12).take(torch.arange(12))
    torch.manual_seed(7)
    found = method.loss(batch)
    torch.manual_seed(7)
    z = [method.project(method.views(batch["image"])) for _ in range(2)]
    label = 2 * (batch["angle"] / 2).round()
    assert found == supremix(torch.stack(z, 1), label, temperature=0.3, window=7.0, shift="separate")
    plain = SupReMix(**SMALL, mix_negative=False, mix_positive=False, distance_weight="none")
    assert plain.options["share"] is plain.options["window"] is None


def test_the_embedding_follows_the_value(tmp_path):
    items = gratings()
    torch.manual_seed(0)
    method = SupReMix(**SMALL, rounding=5, window=20.0, temperature=0.2, views=MILD)
    before = ordinality(method.encode(items), items.factors["angle"])
    settings = {"batch_size": 60, "epochs": 30, "optimizer": "adam", "lr": 0.003, "weight_decay": 0.0}
    run = fit(method, items, run=tmp_path / "run", progress=False, **settings)
    after = ordinality(method.encode(items), items.factors["angle"])
    assert after > 0.85 and after > before + 0.05
    found = {(r.protocol, r.subject): r for r in runs.evaluate(run, items, protocols=["ridge-offline:angle"])}
    trained = found["ridge-offline:angle", "trained"]
    assert trained.value < 0.5 * found["ridge-offline:angle", "raw pixels"].value
    assert set(trained.detail) >= {"ordinality", "guess", "spearman"}


def test_own_arrays_train_from_a_file(tmp_path):
    items = gratings(16)
    np.savez(tmp_path / "d.npz", image=items.image.numpy(), angle=items.factors["angle"].numpy())
    run = fit(SupReMix(**SMALL), str(tmp_path / "d.npz"), batch_size=8, epochs=1, run=tmp_path / "run", progress=False)
    assert "labels_used_in_training: true" in (run.folder / "config.yaml").read_text()


def test_ordinality_knows_order():
    angle = torch.linspace(0, 1.5, 50)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    assert ordinality(circle, angle) == pytest.approx(1, abs=1e-3)
    assert abs(ordinality(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), angle)) < 0.15


def test_the_value_to_follow():
    values = {
        "image": torch.zeros(3, 1, 2, 2),
        "index": torch.arange(3),
        "label": torch.arange(3),
        "age": torch.rand(3),
    }
    assert torch.equal(target_of(values, None), values["age"])
    assert target_of(values, "label").tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(InputError, match="measured values age, dose: say which with target=: label, age, dose"):
        target_of(values | {"dose": torch.rand(3)}, None)
    with pytest.raises(InputError, match="no measured value: say which with target=: label"):
        target_of({name: values[name] for name in ("image", "index", "label")}, None)
    with pytest.raises(InputError, match="it needs one float a picture"):
        target_of({name: values[name] for name in ("image", "index")}, None)
    with pytest.raises(InputError, match='no value "weight"; it has label, age'):
        target_of(values, "weight")


def test_the_recipe_keeps_the_angle():
    method = experiment("supremix-angles").build(0)
    assert (method.views.flip, method.views.rotate, method.views.shear, method.views.ratio) == (0, 0, 0, (1, 1))
