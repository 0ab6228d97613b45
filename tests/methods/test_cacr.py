"""CACR is its formula in each of its forms, moves its copies, and learns."""

import json

import pytest
import torch
from torch.nn import functional as F

from counterpoint.contrast.attraction import attraction, momentum_euclidean, momentum_rbf, queue_repulsion, repulsion
from counterpoint.errors import InputError
from counterpoint.methods.vision.cacr import CACR, MomentumCACR
from counterpoint.recipes import experiment
from counterpoint.train import fit
from counterpoint.views import ImageViews, MultiCrop

SMALL = {"encoder": "convnet-4", "image_size": 16, "projection": (16, 8)}


def build(cls=CACR, **options):
    torch.manual_seed(0)
    return cls(**{**SMALL, **options})


@pytest.fixture
def batch():
    return {
        "image": torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    }


def at(seed, compute):
    torch.manual_seed(seed)
    return compute()


def test_its_two_terms_are_those_of_all_its_views(batch):
    method = build(positives=3, tau_pos=1.5, tau_neg=0.7, alpha=2.0, beta=0.5)
    views = at(7, lambda: [method.views(batch["image"]) for _ in range(4)])
    z = torch.stack([method.projector(method.encoder(view).pooled) for view in views])
    found = at(7, lambda: method.loss(batch))
    assert set(found) == {"attraction", "repulsion"}
    torch.testing.assert_close(found["attraction"], attraction(z, tau=1.5, alpha=2.0))
    torch.testing.assert_close(found["repulsion"], repulsion(z, tau=0.7, beta=0.5))
    assert 0 < float(found["attraction"].detach()) <= 8 and -2 <= float(found["repulsion"].detach()) < 0


@pytest.mark.parametrize(("uniform", "changes"), [("positives", {0}), ("negatives", {1}), ("both", {0, 1})])
def test_an_ablation_makes_one_distribution_even(uniform, changes, batch):
    full, even = ([*at(7, lambda m=m: m.loss(batch)).values()] for m in (build(), build(uniform=uniform)))
    assert {i for i in range(2) if full[i] != even[i]} == changes


def test_with_a_queue_positives_and_queue_are_momentum_keys(batch):
    method = build(positives=2, queue=20, momentum=0.9)
    for part in (method.key_encoder, method.key_projector):
        for p in part.parameters():
            p.data.mul_(1.1)  # so that copy and online differ
    old = method.queue.keys.clone()
    views = at(7, lambda: [method.views(batch["image"]) for _ in range(3)])
    z = torch.stack([method.projector(method.encoder(view).pooled) for view in views])
    keys = torch.stack([F.normalize(method.key_projector(method.key_encoder(view).pooled), dim=1) for view in views])
    found = at(7, lambda: method.loss(batch))
    torch.testing.assert_close(found["attraction"], attraction(z, keys, stop=True))
    torch.testing.assert_close(found["repulsion"], queue_repulsion(z, old, tau=0.9))
    torch.testing.assert_close(method.queue.keys[:8], keys[-1])
    assert torch.equal(method.queue.keys[8:], old[8:]) and method.queue.pointer == 8
    sum(found.values()).backward()  # although the queue has moved on
    assert all(p.grad is not None for p in (*method.encoder.parameters(), *method.projector.parameters()))
    assert all(p.grad is None for p in method.key_encoder.parameters())
    before = [p.clone() for p in method.key_encoder.parameters()]
    method.after_step()
    for old_p, p, online in zip(before, method.key_encoder.parameters(), method.encoder.parameters(), strict=True):
        torch.testing.assert_close(p, 0.9 * old_p + 0.1 * online)


@pytest.mark.parametrize("form", ["rbf", "euclidean"])
@pytest.mark.parametrize("full", [False, True])
def test_on_moco_v3_each_key_meets_the_other_views(form, full, batch):
    small = MultiCrop(2, size=8)
    method = build(MomentumCACR, form=form, full=full, temperature=0.4, small_views=small)
    views = at(7, lambda: [v(batch["image"]) for v in (*method.views, *[small.of(method.views[0])] * 2)])
    large, little = torch.cat(views[:2]), torch.cat(views[2:])
    queries = torch.stack([*method.query(large).chunk(2), *method.query(little).chunk(2)])
    keys = [*method.key(large).chunk(2), *(method.key(little).chunk(2) if full else ())]
    objective = {"rbf": momentum_rbf, "euclidean": momentum_euclidean}[form]
    terms = [objective(queries[[j for j in range(4) if j != i]], key, temperature=0.4) for i, key in enumerate(keys)]
    found = at(7, lambda: method.loss(batch))
    torch.testing.assert_close(found, torch.stack(terms).mean())
    found.backward()
    assert all(p.grad is not None for p in method.predictor.parameters())
    assert all(p.grad is None for p in method.key_projector.parameters())


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="positives must be at least 1"):
        build(positives=0)
    with pytest.raises(InputError, match="uniform must be one of none, positives, negatives, both"):
        experiment("cacr", uniform="neither").build(0)


MILD = ImageViews(
    crop=(0.7, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=(0.5, 0.5, 0.0, 0.0), jitter_p=1.0, grey=0.0, blur=0.0
)


def test_it_learns_to_tell_images_apart(tmp_path):
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    turns = torch.arange(8) * torch.pi / 8
    waves = [
        torch.sin(2 * torch.pi / length * (turn.cos() * x + turn.sin() * y)) for length in (3.0, 6.0) for turn in turns
    ]
    items = (127 + 100 * torch.stack(waves)[:, None]).to(torch.uint8)
    method = build(encoder="convnet-8", channels=1, projection=(64, 32), views=MILD, positives=3)
    run = fit(method, items, run=tmp_path / "run", batch_size=16, epochs=60, optimizer="adam", lr=0.005,
              weight_decay=0.0, progress=False, log_every=1)  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-8:]) / 8 < sum(losses[:8]) / 8 - 0.3
    with torch.no_grad():
        one, two = (F.normalize(method.encoder(MILD(items)).pooled, dim=1) for _ in range(2))
    assert ((one @ two.T).argmax(1) == torch.arange(16)).float().mean() > 0.8
