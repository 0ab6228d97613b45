"""PixPro is its formula, its propagation smooths what is alike, and its copies move."""

import pytest
import torch
from torch.nn import functional as F

from counterpoint.contrast import negative_cosine
from counterpoint.contrast.pixel import pixel_consistency, pixel_contrast
from counterpoint.encoders.propagation import Propagation
from counterpoint.errors import InputError
from counterpoint.methods.vision.pixpro import PixPro
from counterpoint.train import fit
from counterpoint.views import BYOL_1, HANDWRITING

SMALL = {"encoder": "convnet-4", "image_size": 32, "projection": (16, 8)}


def build(**options):
    torch.manual_seed(0)
    return PixPro(**{**SMALL, **options})


def images(n=8):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# ---- propagation -----------------------------------------------------------------------------------------------------


def features(seed=0):
    return torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "clamp"), [(1.0, 0.0), (2.0, 0.0), (0.5, 0.1)])
@pytest.mark.parametrize("layers", [0, 1])
def test_propagation_is_its_sum(gamma, clamp, layers):
    part, x = Propagation(5, gamma, clamp, layers).double(), features().requires_grad_()
    found = part(x)
    value = part.transform(x)
    expected = torch.zeros_like(x)
    for b in range(2):
        for i in range(12):
            total = 0.0
            for j in range(12):
                u, v = x[b].flatten(1)[:, i], x[b].flatten(1)[:, j]
                weight = F.cosine_similarity(u, v, dim=0).clamp(min=clamp)
                total = total + (weight + (1e-6 if gamma < 1 else 0)) ** gamma * F.normalize(
                    value[b].flatten(1)[:, j], dim=0
                )
            expected[b, :, i // 4, i % 4] = total
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(y.sin().sum(), x, retain_graph=True)[0] for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_opposite_locations_do_not_speak_for_each_other():
    x = torch.zeros(1, 2, 1, 3)
    x[0, 0] = torch.tensor([[2.0, 3.0, -1.0]])
    assert torch.equal(Propagation(2, layers=0)(x)[0, 0, 0], torch.tensor([2.0, 2.0, -1.0]))


def test_propagation_smooths_and_sharpness_limits_it():
    """The higher gamma, the less a location hears from others; none is left in the limit."""

    def spread(y):
        u = F.normalize(y.flatten(2), dim=1)
        return (u.transpose(1, 2) @ u).mean()

    x = features()
    found = [spread(x)] + [spread(Propagation(5, gamma, layers=0)(x)) for gamma in (1000.0, 4.0, 1.0)]
    torch.testing.assert_close(found[0], found[1])
    assert found[1] < found[2] < found[3]


def test_propagation_refuses_what_makes_no_sense():
    with pytest.raises(InputError, match="gamma > 0 and 0, 1 or 2 layers"):
        Propagation(4, layers=3)


# ---- the method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["propagation", "consistency", "contrast"])
def test_it_is_its_formula_in_both_directions(task):
    method, batch = build(task=task, near=0.9, instance=0.5), {"image": images()}
    for part in (method.target_encoder, method.target_projector, method.target_instance):
        for p in part.parameters():
            p.data.mul_(1.1)  # so that target and online differ
    torch.manual_seed(7)
    (v1, b1), (v2, b2) = method.views.with_geometry(batch["image"]), method.other_views.with_geometry(batch["image"])
    m1, m2 = method.encoder(v1).map, method.encoder(v2).map
    t1, t2 = method.target_encoder(v1).map, method.target_encoder(v2).map
    q1, q2 = method.projector(m1), method.projector(m2)
    if task == "propagation":
        q1, q2 = method.propagate(q1), method.propagate(q2)
    k1, k2 = method.target_projector(t1), method.target_projector(t2)
    if task == "contrast":
        pixel = sum(pixel_contrast(*pair, near=0.9, temperature=0.3) for pair in ((q1, k2, b1, b2), (q2, k1, b2, b1)))
    else:
        pixel = sum(pixel_consistency(*pair, near=0.9) for pair in ((q1, k2, b1, b2), (q2, k1, b2, b1)))
    p1, p2 = (method.instance_predictor(method.instance_projector(m)).mean((2, 3)) for m in (m1, m2))
    z1, z2 = (method.target_instance(t).mean((2, 3)) for t in (t1, t2))
    torch.manual_seed(7)
    found = method.loss(batch)
    torch.testing.assert_close(found["pixel"], pixel)
    torch.testing.assert_close(found["instance"], negative_cosine(p1, z2) + negative_cosine(p2, z1))
    sum(found.values()).backward()
    online = [method.encoder, method.projector, method.propagate, method.instance_projector, method.instance_predictor]
    assert all(p.grad is not None for part in online for p in part.parameters())
    targets = (method.target_encoder, method.target_projector, method.target_instance)
    assert all(p.grad is None for part in targets for p in part.parameters())


def test_without_the_instance_branch_there_is_one_term():
    torch.manual_seed(7)
    loss = build().loss({"image": images()})
    assert isinstance(loss, torch.Tensor) and -4 <= float(loss.detach()) <= 4
    assert build().projected({"image": images()}).shape == (8, 8)


def test_the_copies_approach_as_training_ends(tmp_path):
    method = build(momentum=0.5)
    fit(method, images(), run=tmp_path / "run", batch_size=4, epochs=2, lr=0.05, progress=False)
    assert method.target_encoder.momentum_at(0.0) == 0.5 and method.target_encoder.momentum_at(1.0) == 1
    pairs = zip(method.target_projector.parameters(), method.projector.parameters(), strict=True)
    assert all(bool(copy.isfinite().all()) and not torch.equal(copy, online) for copy, online in pairs)


def test_what_has_no_map_or_no_box_is_refused():
    with pytest.raises(InputError, match="gives no feature map"):
        method = build(encoder="vit_tiny_patch16_224", views=BYOL_1)
        method.loss({"image": images()})
    with pytest.raises(InputError, match="only crops and mirrors have a geometry"):
        build(views=HANDWRITING).loss({"image": images()})
