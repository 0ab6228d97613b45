"""AdaInf: real images count as often as their copies would, copies attract, views weaken by one number."""

import json

import numpy as np
import pytest
import torch

from counterpoint import contrast
from counterpoint.data import NAMES, Images
from counterpoint.errors import InputError
from counterpoint.evaluate.runs import evaluate
from counterpoint.methods.vision.adainf import AdaInf
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.train import fit, resume
from counterpoint.train.checkpoint import load_state
from counterpoint.views import MOCO_V2, SIMCLR, SIMCLR_ADAINF, with_strength

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"encoder": "convnet-4", "image_size": 16, "projection": (16, 8)}


def build(cls=AdaInf, **options):
    torch.manual_seed(0)
    return cls(**{**SMALL, **options})


def loss_at(method, batch):
    torch.manual_seed(7)
    return method.loss(batch)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return {"image": image, "index": torch.arange(8)}


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    real = random.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", image=real, label=np.arange(40) % 4)
    np.savez(tmp_path / "made.npz", image=random.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8), label=[7] * 30)
    return tmp_path


def by_hand(z, index, temperature):
    """-log(pos / (pos + neg)) row by row, in double precision."""
    z = torch.nn.functional.normalize(z.double(), dim=1)
    s = (z @ z.T / temperature).exp()
    rows = []
    for i in range(len(z)):
        positive = sum(s[i, j] for j in range(len(z)) if j != i and index[j] == index[i])
        negative = sum(s[i, j] for j in range(len(z)) if index[j] != index[i])
        rows.append(-(positive / (positive + negative)).log())
    return torch.stack(rows).mean()


def test_without_copies_the_loss_is_nt_xent(batch):
    base, method = build(SimCLR), build(strength=1.0)
    torch.testing.assert_close(loss_at(method, batch), loss_at(base, batch))
    torch.testing.assert_close(loss_at(build(strength=1.0, duplicates="negatives"), batch), loss_at(base, batch))


def test_copies_in_a_batch_are_positives_summed_inside_the_log(batch):
    batch["index"] = torch.tensor([0, 1, 2, 0, 4, 1, 0, 7])
    method = build()
    torch.manual_seed(7)
    z = torch.cat([method.project(method.views(batch["image"])) for _ in range(2)])
    expected = by_hand(z, batch["index"].repeat(2), 0.2)
    found = loss_at(method, batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert found < loss_at(build(duplicates="negatives"), batch)
    # the mean over positives inside the log, which SupCon has, is another loss
    inside = contrast.sup_con(z, batch["index"].repeat(2), temperature=0.2, mean="inside")
    assert inside > found + 0.1


def test_one_number_weakens_the_views():
    assert with_strength(SIMCLR, 1.0) == SIMCLR
    half = with_strength(SIMCLR, 0.5)
    assert half.jitter == pytest.approx(SIMCLR_ADAINF.jitter) and half.crop == pytest.approx(SIMCLR_ADAINF.crop)
    assert half.jitter_p == pytest.approx(SIMCLR_ADAINF.jitter_p) and half.grey == 0.2 and half.blur == 0.5
    ladder = [with_strength(SIMCLR, s) for s in (0.0, 0.25, 0.5, 1.0, 1.5)]
    assert [v.crop[0] for v in ladder] == sorted([v.crop[0] for v in ladder], reverse=True)
    assert [v.jitter[0] for v in ladder] == sorted(v.jitter[0] for v in ladder) and ladder[0].jitter_p == 0
    assert with_strength(MOCO_V2, 0.0).crop[0] <= 1 and max(v.jitter_p for v in ladder) <= 1
    method = build(strength=0.5)
    assert method.views.crop == pytest.approx((0.2, 1.0)) and method.views.size == 16 == method.other_views.size
    with pytest.raises(InputError, match="strength"):
        with_strength(SIMCLR, -1.0)


def test_it_trains_on_both_and_embeds_the_data_alone(folder):
    method = build(generated=str(folder / "made.npz"), generated_limit=20, replication=3)
    items = method.training_items(str(folder / "real.npz"), limit=30, seed=1)
    assert len(items) == 50 and items.repeats.tolist() == [3] * 30 + [1] * 20
    assert (items.label[:30] >= 0).all() and (items.label[30:] == -1).all()  # whatever label they came with
    real = method.read(str(folder / "real.npz"), limit=30, seed=1)
    assert torch.equal(items.image[:30], real.image) and real.repeats is None
    assert method.encode(str(folder / "real.npz")).shape == (40, 32)
    alone = build().training_items(str(folder / "real.npz"))
    assert len(alone) == 40 and alone.repeats is None


def test_train_resume_and_evaluate(folder, monkeypatch):
    import signal

    from counterpoint.train import Method

    def train(name):
        method = build(generated=str(folder / "made.npz"), replication=2)
        options = {"steps": 9, "batch_size": 16, "lr": 0.05, "log_every": 1, "checkpoint_seconds": 0}
        return fit(method, str(folder / "real.npz"), run=folder / name, progress=False, device="cpu", **options)

    whole = train("whole")
    step, seen = Method.training_step, []

    def stopping(self, *arguments):
        seen.append(1)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", stopping)
        assert train("part").interrupted
    again = resume(folder / "part")
    one, two = (load_state(run.checkpoint)["state_dict"] for run in (whole, again))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    records = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 9 and records[5]["epoch"] == 1.0  # 2 * 40 + 30 images are an epoch of six batches
    found = evaluate(whole, protocols=["knn-200-0.1"])
    assert {result.n for result in found} == {8}  # a fifth of the real images


def test_images_without_a_known_label_are_not_measured(tmp_path, monkeypatch):
    random = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8, generator=random)
    label = torch.where(torch.arange(60) < 40, torch.arange(60) % 2, -1)
    monkeypatch.setitem(NAMES, "mixed", lambda split, limit, seed: Images(image, label, ("a", "b"), f"mixed/{split}"))
    run = fit(build(SimCLR), "mixed", epochs=1, batch_size=16, run=tmp_path / "run", progress=False, validate=1)
    for result in evaluate(run, protocols=["knn-200-0.1", "linear-offline"]):
        assert result.n == 40 and result.detail["train"] == 40 and result.detail["chance"] == 50


def test_what_makes_no_sense_is_refused(folder):
    for options, message in (
        ({"replication": 0}, "replication must be at least 1"),
        ({"duplicates": "both"}, 'duplicates must be "positives" or "negatives"'),
        ({"objective": "dcl"}, "take duplicates=negatives"),
    ):
        with pytest.raises(InputError, match=message):
            build(**options)
    build(objective="dcl", duplicates="negatives")
    large = Images(torch.zeros(5, 3, 24, 24, dtype=torch.uint8))
    method = build(generated=str(folder / "made.npz"))
    with pytest.raises(InputError, match="size and the channels"):
        method.training_items(large)
