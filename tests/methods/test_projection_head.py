"""Every head trains and is what it says; protocols see what lies before and after it, for any method that has one."""

import numpy as np
import pytest
import torch

from counterpoint import contrast
from counterpoint.cli import main
from counterpoint.contrast.spectral import spectral_contrastive
from counterpoint.data import Images
from counterpoint.encoders import heads
from counterpoint.errors import InputError
from counterpoint.evaluate import linear_probe
from counterpoint.evaluate.runs import evaluate
from counterpoint.methods.vision.projection_head import ProjectionHead
from counterpoint.methods.vision.simsiam import SimSiam
from counterpoint.train import Run, fit
from counterpoint.train.method import Method

SMALL = {"encoder": "convnet-4", "image_size": 16, "projection": (16, 8)}


def batch(n: int = 12) -> dict[str, torch.Tensor]:
    image = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"image": image, "label": torch.arange(n) % 3, "kind": torch.arange(n) % 2}


def labelled(n: int = 60) -> Images:
    items = batch(n)
    return Images(items["image"], items["label"], ("a", "b", "c"), factors={"kind": items["kind"]}, name="made")


@pytest.mark.parametrize("head", ["mlp", "none", "reweight", "symmetric_relu"])
@pytest.mark.parametrize("objective", ["nt_xent", "sup_con", "spectral"])
def test_the_loss_is_the_objective_of_the_projections(head, objective):
    torch.manual_seed(0)
    method = ProjectionHead(**SMALL, head=head, objective=objective, temperature=0.3, mu=2.0, target="kind")
    torch.manual_seed(7)
    z1, z2 = (method.project(method.views(batch()["image"])) for _ in range(2))
    torch.manual_seed(7)
    found = method.loss(batch())
    expected = {
        "nt_xent": lambda: contrast.nt_xent(z1, z2, temperature=0.3),
        "sup_con": lambda: contrast.sup_con(torch.stack([z1, z2], 1), batch()["kind"], temperature=0.3),
        "spectral": lambda: spectral_contrastive(z1, z2, mu=2.0),
    }[objective]()
    assert found == expected and method.uses_labels == (objective == "sup_con")
    found.backward()
    assert all(p.grad is not None for p in method.parameters())


def test_heads_are_what_they_say():
    x = torch.randn(5, 32)
    assert torch.equal(heads.identity_projector(32)(x), x) and torch.equal(heads.symmetric_relu(x, 0), x)
    soft = torch.sign(x) * (x.abs() - 0.4).clamp(min=0)
    torch.testing.assert_close(heads.symmetric_relu(x, 0.4), soft)
    torch.testing.assert_close(heads.Reweight(2.0)(torch.ones(1, 4)), torch.tensor([[1, 1 / 2, 1 / 4, 1 / 8]]))
    assert not [*heads.Reweight().parameters()] and bool(heads.reweight(torch.ones(1, 2048), 1.05).isfinite().all())
    with pytest.raises(InputError, match="kappa must be positive"):
        heads.Reweight(0)


def test_views_lose_the_overlay():
    method = ProjectionHead(**SMALL, drop_overlay=1.0)
    items = batch() | {"background": torch.zeros(12, 3, 16, 16, dtype=torch.uint8)}
    method.views = lambda images: images.float()  # what arrives there
    seen = []
    method.project = lambda images: (seen.append(images), torch.randn(12, 8))[1]
    method.loss(items)
    assert len(seen) == 2 and not any(images.any() for images in seen)
    with pytest.raises(InputError, match="no overlay to lose"):
        method.loss(batch())


def test_classes_that_are_not_there():
    method = ProjectionHead(**SMALL, objective="sup_con", target="superclass")
    with pytest.raises(InputError, match='none called "superclass"'):
        method.loss(batch())


def run_of(method: Method, folder, **options) -> Run:
    return fit(method, labelled(), epochs=1, batch_size=20, run=folder / "run", progress=False, **options)


def test_probes_after_the_head_of_any_method(tmp_path):
    torch.manual_seed(0)
    run = run_of(SimSiam(**SMALL), tmp_path)
    items = labelled()
    found = {(r.protocol, r.subject): r for r in evaluate(run, items, head=True)}
    protocols = {"knn-200-0.1", "linear-offline", "linear-offline:kind", "geometry"}
    assert {name for name, _ in found} == protocols | {name + "@head" for name in protocols}
    assert ("linear-offline@head", "raw pixels") not in found
    train, test = items.split(0.2)
    method = run.model()
    z = [method.encode_projected(part) for part in (train, test)]
    assert z[0].shape == (48, 8) and not np.allclose(z[0], method.encode(train)[:, :8])
    with torch.no_grad():
        direct = method.projector(method.encoder(test.image.float() / 255).pooled)
    np.testing.assert_allclose(z[1], direct.numpy(), rtol=1e-4, atol=1e-5)
    expected = linear_probe(z[0], train.label, z[1], test.label)
    after = found["linear-offline@head", "trained"]
    assert after.value == expected.value and after.detail["before"] == found["linear-offline", "trained"].value
    only = evaluate(run, items, protocols=["linear-offline:kind@head"], trained_only=True)
    assert [(r.protocol, r.subject) for r in only] == [("linear-offline:kind@head", "trained")]
    assert only[0].detail["before"] == found["linear-offline:kind", "trained"].value
    asked = {r.protocol for r in evaluate(run, items, protocols=["geometry"], head=True)}
    assert asked == {"geometry", "geometry@head"}


def test_without_a_head_before_is_after(tmp_path):
    run = run_of(ProjectionHead(**SMALL, head="none"), tmp_path)
    for result in evaluate(run, labelled(), protocols=["linear-offline@head", "knn-200-0.1@head"]):
        assert result.value == result.detail["before"]


def test_methods_without_a_head_say_so(tmp_path):
    class Bare(ProjectionHead):
        def __init__(self):
            super().__init__(**SMALL)
            self.encoder, self.projector = self.encoder, None

    with pytest.raises(InputError, match="Bare has no projection head"):
        Bare().encode_projected(labelled())


def test_the_command_line_measures_both(tmp_path, capsys):
    np.savez(tmp_path / "d.npz", image=labelled().image.numpy(), label=labelled().label.numpy())
    run = fit(ProjectionHead(**SMALL), str(tmp_path / "d.npz"), epochs=1, run=tmp_path / "run", progress=False)
    assert main(["evaluate", str(run.folder), "--head", "--protocol", "knn-200-0.1"]) == 0
    assert "knn-200-0.1@head" in capsys.readouterr().out
    assert "labels_used_in_training: false" in (run.folder / "config.yaml").read_text()
    assert main(["evaluate", str(run.folder), "--protocol", "knn@head"]) == 2
