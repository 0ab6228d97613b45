"""SwAV: its formula, its queue, its frozen prototypes, what resumes, and that the balance is what keeps it from collapsing."""

import json

import pytest
import torch
from torch.nn import functional as F

from counterpoint.contrast import sinkhorn
from counterpoint.errors import InputError
from counterpoint.methods.vision.swav import SwAV
from counterpoint.recipes import experiment
from counterpoint.train import fit, resume
from counterpoint.views import SIMCLR_SMALL, MultiCrop, by_size, crops

SMALL = MultiCrop(count=2, size=8, crop=(0.1, 0.3))


def build(**options):
    torch.manual_seed(0)
    given = {"encoder": "convnet-4", "image_size": 16, "projection": (16, 8), "prototypes": 5, "frozen_steps": 0}
    return SwAV(**{**given, "views": SIMCLR_SMALL, "small_views": SMALL, **options})


def images(count=24):
    return torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(1)).byte()


def test_it_is_its_formula_in_double_precision():
    method, batch = build(), {"image": images()}
    torch.manual_seed(7)
    found = method.loss(batch)
    torch.manual_seed(7)
    pooled = by_size(lambda x: method.encoder(x).pooled, crops(batch["image"], method.views, SMALL))
    z = F.normalize(method.projector(torch.cat(pooled)).double(), dim=1).view(4, 24, 8)
    c = F.normalize(method.prototypes.weight.double(), dim=1)
    expected = 0.0
    for a in (0, 1):
        q = (z[a] @ c.T / 0.05).exp().T.detach()
        q = q / q.sum()
        for _ in range(3):
            q = q / q.sum(1, keepdim=True) / 5
            q = q / q.sum(0, keepdim=True) / 24
        for v in range(4):
            if v != a:
                expected = expected - (24 * q.T * (z[v] @ c.T / 0.1).log_softmax(1)).sum(1).mean() / (2 * 3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    found.backward()
    assert all(p.grad is not None for p in method.parameters())


def test_two_views_alone_do():
    method = build(small_views=None)
    assert bool(method.loss({"image": images()}).isfinite())


def test_small_views_are_never_assigned(monkeypatch):
    method, assigned = build(), []
    monkeypatch.setattr(method, "assign", lambda z, view: (assigned.append(view), SwAV.assign(method, z, view))[1])
    method.loss({"image": images()})
    assert assigned == [0, 1]


def test_the_queue_is_not_used_until_it_is_full(monkeypatch):
    """24 images a step, 40 places: full after two steps, used in the third, each view with a queue of its own."""
    method, used = build(queue=40, queue_start=0), []
    monkeypatch.setattr(
        "counterpoint.contrast.assign", lambda z, c, *, queue, **rest: (used.append(queue), sinkhorn(z @ c.T))[1]
    )
    for step in range(3):
        torch.manual_seed(step)
        method.loss({"image": images()})
        filled = [len(queue) for queue in method.queues]
        assert filled == [min(40, 24 * (step + 1))] * 2
    assert used[:4] == [None] * 4
    assert [len(queue) for queue in used[4:]] == [40, 40] and not torch.equal(*used[4:])
    assert all(torch.allclose(queue.norm(dim=1), torch.ones(40)) for queue in used[4:])


def test_the_queue_begins_after_its_epochs(monkeypatch):
    method = build(queue=40, queue_start=3)
    for epoch, expected in ((2, 0), (3, 24)):
        monkeypatch.setattr(SwAV, "current_epoch", epoch)
        method.loss({"image": images()})
        assert [len(queue) for queue in method.queues] == [expected] * 2


def test_prototypes_stay_for_their_steps_and_move_then(tmp_path, monkeypatch):
    method, seen = build(frozen_steps=3), []
    after = SwAV.after_step
    monkeypatch.setattr(
        SwAV, "after_step", lambda self: (seen.append(self.prototypes.weight.detach().clone()), after(self))
    )
    method.prototypes.normalise()
    start = method.prototypes.weight.detach().clone()
    encoder = method.encoder.stem[0].weight.detach().clone()
    options = {"batch_size": 8, "epochs": 2, "lr": 0.5, "weight_decay": 0.1}
    fit(method, images(), run=tmp_path / "run", progress=False, **options)
    moved = [float((weight - start).abs().max()) for weight in seen]
    assert len(moved) == 6 and max(moved[:3]) < 1e-6 and min(moved[3:]) > 1e-3
    assert not torch.equal(encoder, method.encoder.stem[0].weight)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_training_is_the_uninterrupted_one(stop, tmp_path, monkeypatch):
    """Stopped while the prototypes are frozen and the queue fills, and after both."""
    options = {"batch_size": 8, "lr": 0.1, "seed": 3, "progress": False, "epochs": 3, "checkpoint_seconds": 0.0}
    given = {"frozen_steps": 5, "queue": 16, "queue_start": 1}
    whole = fit(build(**given), images(), run=tmp_path / "whole", **options)

    class Stop(Exception):
        pass

    loss = SwAV.loss

    def stopping(self, batch):
        if self.current_epoch == stop and self.global_step == 3 * stop + 1:
            raise Stop
        return loss(self, batch)

    monkeypatch.setattr(SwAV, "loss", stopping)
    with pytest.raises(Stop):
        fit(build(**given), images(), run=tmp_path / "cut", **options)
    monkeypatch.setattr(SwAV, "loss", loss)
    again = resume(tmp_path / "cut", images())
    expected, found = whole.method.state_dict(), again.method.state_dict()
    assert {"prototypes.steps", "queues.0.bank", "queues.1.filled"} <= expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_codes_see_no_temperature_and_predictions_do():
    """Only the prediction gets sharper: the codes of both are the same."""
    batch, codes = {"image": images()}, []
    for temperature in (0.1, 0.2):
        method = build(temperature=temperature)
        torch.manual_seed(7)
        z = method.project(crops(batch["image"], method.views, SMALL))
        codes.append(method.assign(z[0].detach(), 0))
    assert torch.equal(*codes)


def entropy_of_usage(method, items) -> float:
    """Of the prototypes' shares in hard assignments, in units of its largest value."""
    method.eval()
    with torch.no_grad():
        nearest = method.prototypes(method.project(crops(items, method.views))[0]).argmax(1)
    share = nearest.bincount(minlength=len(method.prototypes.weight)) / len(nearest)
    return float(torch.special.entr(share).sum() / torch.tensor(float(len(share))).log())


def stripes() -> torch.Tensor:
    """Images of four kinds, 16 of each: stripes of two directions and two widths, in noise."""
    torch.manual_seed(2)
    at = torch.arange(16)
    kinds = [(at // width % 2).float().expand(16, 16) for width in (1, 4)]
    kinds += [kind.T for kind in kinds]
    every = torch.stack(kinds).repeat_interleave(16, 0)[:, None].expand(-1, 3, -1, -1)
    return (200 * every + 50 * torch.rand(64, 3, 16, 16)).byte()


def test_the_balance_keeps_it_from_collapsing(tmp_path):
    used = {}
    for codes in ("sinkhorn", "softmax"):
        method = build(encoder="convnet-8", codes=codes, prototypes=8, small_views=None)
        options = {"batch_size": 64, "epochs": 20, "optimizer": "adam", "lr": 0.005, "weight_decay": 0.0}
        run = fit(method, stripes(), run=tmp_path / codes, progress=False, log_every=1, **options)
        losses = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        used[codes] = (entropy_of_usage(method, stripes()), losses[-1])
    assert used["softmax"][0] < 0.3 and used["softmax"][1] < 0.3  # one prototype takes all, which is easily predicted
    assert used["sinkhorn"][0] > 0.6 and used["sinkhorn"][1] > 0.3


def test_it_is_built_from_plain_data():
    built = experiment("swav", small_views="none").build
    assert experiment("swav", small_views="none").model["small_views"] is None and callable(built)
    chosen = experiment("swav", small_views="{count: 3, size: 8}", encoder="convnet-4", image_size=16).build(0)
    assert chosen.small_views == MultiCrop(count=3, size=8)
    with pytest.raises(InputError, match='MultiCrop has no field "cuont"'):
        experiment("swav", small_views="{cuont: 3}", encoder="convnet-4").build(0)
    with pytest.raises(InputError, match="codes must be one of sinkhorn, softmax"):
        experiment("swav", codes="hard", encoder="convnet-4").build(0)
