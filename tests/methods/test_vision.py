"""Each image method computes its paper's formula, moves what it must, and learns."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from counterpoint import contrast
from counterpoint.errors import InputError
from counterpoint.methods.vision.byol import BYOL
from counterpoint.methods.vision.dcl import DCL
from counterpoint.methods.vision.moco import MoCo
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.methods.vision.simsiam import SimSiam
from counterpoint.train import fit
from counterpoint.views import ImageViews

SMALL = {"encoder": "convnet-4", "image_size": 16, "projection": (16, 8)}


def build(cls, seed: int = 0, **options):
    torch.manual_seed(seed)
    return cls(**{**SMALL, **options})


@pytest.fixture
def batch():
    return {"image": torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def both_views(method, batch):
    """The two views that `loss` draws when the generator stands at seed 7."""
    torch.manual_seed(7)
    return method.views(batch["image"]), getattr(method, "other_views", method.views)(batch["image"])


def loss_at(method, batch):
    torch.manual_seed(7)
    return method.loss(batch)


def cosines(x, y):
    return F.normalize(x.double(), dim=1) @ F.normalize(y.double(), dim=1).T


def nt_xent(z1, z2, temperature, decoupled, weight=None):
    """Row by row, in double precision."""
    z = torch.cat([z1, z2])
    s, n = cosines(z, z) / temperature, len(z1)
    terms = []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        kept = [j for j in range(2 * n) if j != i and not (decoupled and j == partner)]
        pull = s[i, partner] * (1 if weight is None else weight[i % n])
        terms.append(-pull + s[i, kept].logsumexp(0))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("cls", [SimCLR, DCL])
def test_simclr_and_dcl_are_their_formulas(cls, batch):
    method = build(cls, temperature=0.2)
    v1, v2 = both_views(method, batch)
    z1, z2 = method.project(v1), method.project(v2)
    found = loss_at(method, batch)
    torch.testing.assert_close(found.double(), nt_xent(z1, z2, 0.2, cls is DCL), rtol=1e-5, atol=1e-6)
    assert found == {SimCLR: contrast.nt_xent, DCL: contrast.dcl}[cls](z1, z2, temperature=0.2)


def test_dcl_differs_from_simclr_only_in_the_denominator(batch):
    simclr, dcl = build(SimCLR, temperature=0.2), build(DCL, temperature=0.2, views=build(SimCLR).views)
    assert [*simclr.state_dict()] == [*dcl.state_dict()]
    dcl.load_state_dict(simclr.state_dict())
    assert loss_at(dcl, batch) < loss_at(simclr, batch)  # a term of the sum is missing


def test_dclw_weighs_easy_positives_less(batch):
    method = build(DCL, temperature=0.2, weighted=True, sigma=0.5)
    z1, z2 = (method.project(view) for view in both_views(method, batch))
    weight = 2 - 12 * (cosines(z1, z2).diagonal() / 0.5).softmax(0)
    expected = nt_xent(z1, z2, 0.2, True, weight)
    torch.testing.assert_close(loss_at(method, batch).double(), expected, rtol=1e-5, atol=1e-6)
    assert loss_at(method, batch) != loss_at(build(DCL, temperature=0.2), batch)


def test_an_objective_is_swapped_by_name(batch):
    losses = {}
    for name in contrast.PAIR_OBJECTIVES:
        method = build(SimCLR, objective=name)
        z1, z2 = (method.project(view) for view in both_views(method, batch))
        losses[name] = loss_at(method, batch)
        assert losses[name] == contrast.objective(name)(z1, z2, temperature=0.2)
    assert losses["dcl"] == loss_at(build(DCL, temperature=0.2, views=build(SimCLR).views), batch)
    assert losses["nt_xent"] != losses["info_nce"] != losses["dclw"] != losses["sigmoid_loss"]
    with pytest.raises(InputError, match='no objective named "nt_xnet"; did you mean nt_xent'):
        build(SimCLR, objective="nt_xnet")


def test_moco_is_its_formula_with_its_queue(batch):
    method = build(MoCo, queue=20, temperature=0.3)
    old = method.queue.keys.clone()
    v1, v2 = both_views(method, batch)
    query = F.normalize(method.projector(method.encoder(v1).pooled).double(), dim=1)
    key = F.normalize(method.key_projector(method.key_encoder(v2).pooled).double(), dim=1)
    positive, negative = (query * key).sum(1) / 0.3, query @ old.double().T / 0.3
    expected = (-positive + torch.cat([positive[:, None], negative], 1).logsumexp(1)).mean()
    found = loss_at(method, batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.queue.keys[:12].double(), key, rtol=1e-5, atol=1e-6)
    assert torch.equal(method.queue.keys[12:], old[12:]) and method.queue.pointer == 12
    found.backward()  # although the queue has moved on
    assert all(p.grad is not None for p in (*method.encoder.parameters(), *method.projector.parameters()))
    assert all(p.grad is None for p in (*method.key_encoder.parameters(), *method.key_projector.parameters()))


def test_one_layer_is_the_head_of_version_one():
    head = build(MoCo, queue=8, layers=1).projector
    assert len(head) == 1 and head[0].weight.shape == (8, 32)


def test_byol_is_its_formula_and_its_target_gets_no_gradient(batch):
    method = build(BYOL)
    for part in (method.target_encoder, method.target_projector):
        for p in part.parameters():
            p.data.mul_(1.1)  # so that target and online differ
    v1, v2 = both_views(method, batch)
    p1, p2 = method.predict(v1), method.predict(v2)
    z1, z2 = (method.target_projector.module(method.target_encoder.module(v).pooled).detach() for v in (v1, v2))

    def distance(p, z):
        return (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(1).mean()

    found = loss_at(method, batch)
    torch.testing.assert_close(found, distance(p1, z2) + distance(p2, z1))
    found.backward()
    online = (method.encoder, method.projector, method.predictor)
    assert all(p.grad is not None for part in online for p in part.parameters())
    targets = (*method.target_encoder.parameters(), *method.target_projector.parameters())
    assert all(p.grad is None and not p.requires_grad for p in targets)


def test_byol_views_differ():
    method = build(BYOL)
    assert (method.views.blur, method.other_views.blur, method.other_views.solarise) == (1.0, 0.1, 0.2)


def test_simsiam_stops_the_gradient_at_the_target(batch):
    method = build(SimSiam, bottleneck=4)

    def gradient(loss):
        method.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in method.projector.parameters()])

    def by_hand(stop):
        v1, v2 = both_views(method, batch)
        z1, z2 = method.project(v1), method.project(v2)
        p1, p2 = method.predictor(z1), method.predictor(z2)
        t1, t2 = (z1.detach(), z2.detach()) if stop else (z1, z2)
        return -(F.cosine_similarity(p1, t2).mean() + F.cosine_similarity(p2, t1).mean()) / 2

    torch.testing.assert_close(loss_at(method, batch), by_hand(True))
    found = gradient(loss_at(method, batch))
    torch.testing.assert_close(found, gradient(by_hand(True)))
    assert (found - gradient(by_hand(False))).norm() > 0.1 * found.norm()


# ---- what moves after a step -----------------------------------------------------------------------------------------


def watch_steps(monkeypatch, method, copies):
    """The copies before every update and the online modules at it, in order."""
    seen = []
    original = type(method).after_step

    def after_step(self):
        before = {name: [p.clone() for p in copy.module.parameters()] for name, (copy, _) in copies.items()}
        online = {name: [p.detach().clone() for p in source.parameters()] for name, (_, source) in copies.items()}
        original(self)
        after = {name: [p.clone() for p in copy.module.parameters()] for name, (copy, _) in copies.items()}
        seen.append((before, online, after))

    monkeypatch.setattr(type(method), "after_step", after_step)
    return seen


def images(n=24):
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("cls", "options", "rates"),
    [
        (MoCo, {"queue": 16, "momentum": 0.9}, [0.9] * 4),
        (BYOL, {"momentum": 0.9}, [1 - 0.1 * (math.cos(math.pi * step / 4) + 1) / 2 for step in range(4)]),
    ],
)
def test_the_momentum_copy_moves_by_its_rate_after_every_step(cls, options, rates, monkeypatch, tmp_path):
    method = build(cls, **options)
    name = "key" if cls is MoCo else "target"
    copies = {part: (getattr(method, f"{name}_{part}"), getattr(method, part)) for part in ("encoder", "projector")}
    for copy, source in copies.values():
        for p, q in zip(copy.module.parameters(), source.parameters(), strict=True):
            assert torch.equal(p, q)
    seen = watch_steps(monkeypatch, method, copies)
    fit(method, images(32), batch_size=8, epochs=1, lr=0.3, run=tmp_path / "run", progress=False)
    assert len(seen) == 4
    for m, (before, online, after) in zip(rates, seen, strict=True):
        for part in copies:
            for old, new, moved in zip(before[part], online[part], after[part], strict=True):
                assert torch.equal(moved, torch.lerp(old, new, 1 - m))
                torch.testing.assert_close(moved, m * old + (1 - m) * new, rtol=1e-5, atol=1e-6)
                assert not torch.equal(old, new)


def test_the_copy_moves_once_per_step_not_once_per_batch(monkeypatch, tmp_path):
    method = build(MoCo, queue=16)
    seen = watch_steps(monkeypatch, method, {"encoder": (method.key_encoder, method.encoder)})
    fit(method, images(40), batch_size=8, epochs=1, accumulate=2, run=tmp_path / "run", progress=False)
    assert len(seen) == 3  # five batches: two pairs and a single one


def test_the_queue_holds_the_last_keys(monkeypatch, tmp_path):
    method, keys = build(MoCo, queue=20), []
    enqueue = method.queue.enqueue
    monkeypatch.setattr(method.queue, "enqueue", lambda new: (keys.append(new), enqueue(new)))
    fit(method, images(32), batch_size=8, epochs=1, run=tmp_path / "run", progress=False)
    every = torch.cat(keys)
    assert len(every) == 32 and method.queue.filled == 20 and method.queue.pointer == 32 % 20
    torch.testing.assert_close(every.norm(dim=1), torch.ones(32))
    newest = {tuple(key.tolist()) for key in every[-20:]}
    assert {tuple(key.tolist()) for key in method.queue.keys} == newest


# ---- learning --------------------------------------------------------------------------------------------------------


def gratings() -> torch.Tensor:
    """Waves of eight directions and four lengths: uint8 [32, 1, 16, 16]."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    turns = [math.pi * angle / 8 for angle in range(8)]
    waves = [
        torch.sin(2 * math.pi / length * (math.cos(turn) * x + math.sin(turn) * y))
        for length in (2.5, 3.5, 5.0, 8.0)
        for turn in turns
    ]
    return (127 + 100 * torch.stack(waves)[:, None]).to(torch.uint8)


MILD = ImageViews(
    crop=(0.7, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=(0.5, 0.5, 0.0, 0.0), jitter_p=1.0, grey=0.0, blur=0.0
)


def found_again(method, items) -> float:
    """Share of views whose nearest other view shows the same image (chance: 1 / 32)."""
    method.eval()
    generator, right = torch.Generator().manual_seed(3), []
    with torch.no_grad():
        for _ in range(5):
            one, two = (F.normalize(method.encoder(MILD(items, generator)).pooled, dim=1) for _ in range(2))
            right.append((one @ two.T).argmax(1) == torch.arange(len(items)))
    return torch.stack(right).float().mean().item()


@pytest.mark.parametrize(
    ("cls", "options", "fitting", "drop"),
    [
        (SimCLR, {}, {}, 1.5),
        (DCL, {}, {}, 3.0),
        (MoCo, {"temperature": 0.1, "queue": 64, "momentum": 0.9}, {"epochs": 200}, 0.2),
        (BYOL, {"momentum": 0.9, "other_views": MILD}, {"optimizer": "sgd", "lr": 0.1}, 1.0),
        (SimSiam, {"bottleneck": 16, "layers": 2}, {"optimizer": "sgd", "lr": 0.1}, 0.5),
    ],
)
def test_methods_learn(cls, options, fitting, drop, tmp_path):
    items = gratings()
    method = build(cls, encoder="convnet-8", channels=1, projection=(64, 32), views=MILD, **options)
    before = found_again(method, items)
    settings = {"batch_size": 32, "epochs": 150, "optimizer": "adam", "lr": 0.005, "weight_decay": 0.0, **fitting}
    run = fit(method, items, run=tmp_path / "run", progress=False, log_every=1, **settings)
    losses = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-8:]) / 8 < sum(losses[:8]) / 8 - drop
    after = found_again(method, items)
    if cls in (BYOL, SimSiam):  # nothing here pushes apart: what counts is that nothing collapses
        assert after > 0.25
    else:
        assert after > before + 0.05
