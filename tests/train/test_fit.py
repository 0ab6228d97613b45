"""`fit`: seeds, batches, records, guards, run folders, bad input."""

import errno
import json
import logging
import math
import os
import signal
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from counterpoint import contrast
from counterpoint.data import Images
from counterpoint.errors import InputError
from counterpoint.memory.mixing import HardMixing
from counterpoint.methods.vision.dcl import DCL
from counterpoint.methods.vision.moco import MoCo
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.train import Method, Run, callbacks, fit, loop
from counterpoint.train.batches import Batches
from counterpoint.train.callbacks import Recorder, geometry, keep_until
from counterpoint.train.checkpoint import load_state
from counterpoint.train.method import Diverged, construct, plain
from counterpoint.train.run import next_folder
from counterpoint.views import BYOL_2, HANDWRITING, ImageViews


@pytest.fixture
def images():
    return torch.randint(0, 256, (42, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def simclr(seed: int = 0, **options) -> SimCLR:
    torch.manual_seed(seed)
    return SimCLR(**{"encoder": "convnet-4", "image_size": 16, "projection": (16, 8), **options})


def train(method: Method, data, run, **options) -> Run:
    return fit(method, data, run=run, **{"epochs": 1, "batch_size": 8, "progress": False, **options})


def weights(method: Method) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in method.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def records(run: Run | Path) -> list[dict]:
    folder = run if isinstance(run, Path) else run.folder
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Plain(Method):
    """No randomness and no normalisation: gradients can be computed by hand."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, width))

    def loss(self, batch):
        x = batch["image"].float() / 255
        return contrast.nt_xent(self.encoder(x), self.encoder(x.flip(-1)), temperature=0.5)


class Bad(Plain):
    """Breaks in the batch `at`, counted from 1."""

    def __init__(self, at: int, how: str = "term", value: float = math.nan):
        super().__init__()
        self.at, self.how, self.value, self.seen = at, how, value, 0

    def loss(self, batch):
        self.seen += 1
        loss = super().loss(batch)
        broken = self.seen == self.at
        if self.how == "gradient":  # sqrt has an infinite slope at 0, so that the gradient is inf * 0
            return loss + (torch.sqrt(0 * self.encoder[1].weight).sum() if broken else 0)
        return {"attraction": loss, "repulsion": loss * (self.value if broken else 1)}


# ---- seeds and batches -----------------------------------------------------------------------------------------------


def test_same_seed_same_weights_other_seed_other_weights(images, tmp_path):
    found = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        method = simclr(0)
        torch.manual_seed(ord(name))  # where the generator stands when fit is called must not matter
        train(method, images, tmp_path / name, seed=seed, epochs=2)
        found[name] = weights(method)
    assert same(found["a"], found["b"])
    assert not torch.equal(found["a"]["encoder.stem.0.weight"], found["c"]["encoder.stem.0.weight"])


def test_an_epoch_sees_every_item_once_in_an_order_of_seed_and_epoch(images):
    def epochs(seed):
        batches = Batches(Images(images), 8, seed=seed)
        return [[index for batch in batches for index in batch["index"].tolist()] for _ in range(3)]

    first, second, third = epochs(0)
    for order in (first, second, third):
        assert len(order) == 40 and len({*order}) == 40
    assert first != second != third
    assert epochs(0) == [first, second, third] and epochs(1)[0] != first


def test_unshuffled_batches_keep_the_order_and_the_partial_last_one(images):
    batches = Batches(Images(images, torch.arange(42)), 8, shuffle=False)
    found = list(batches)
    assert len(batches) == len(found) == 6 and len(found[-1]["image"]) == 2
    assert torch.equal(torch.cat([batch["image"] for batch in found]), images)
    assert torch.equal(torch.cat([batch["label"] for batch in found]), torch.arange(42))


def test_ranks_share_a_batch_without_overlap(images):
    parts = [Batches(Images(images), 9, seed=1).to(torch.device("cpu"), rank, 2) for rank in range(2)]
    whole = next(iter(Batches(Images(images), 9, seed=1)))["index"]
    found = [next(iter(part))["index"] for part in parts]
    assert [len(index) for index in found] == [5, 4]
    assert torch.equal(torch.cat(found), whole)


def test_images_get_the_channels_of_the_method(images):
    method = simclr(channels=1)
    batch = next(iter(Batches(Images(images).channels(method.channels), 4)))
    assert batch["image"].shape == (4, 1, 16, 16)
    assert method.encode(images[:5].numpy()).shape == (5, 32)


def test_encode_equals_the_whole_batch_and_keeps_the_mode(images):
    method = simclr().train()
    vectors = method.encode(images, batch_size=8)
    assert method.training and vectors.dtype == np.float32
    method.eval()
    with torch.no_grad():
        whole = method.encoder(images / 255).pooled
    np.testing.assert_allclose(vectors, whole, atol=1e-5)


def test_a_batch_larger_than_the_data_takes_all_of_it(images, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "counterpoint"):
        run = train(simclr(), images[:5], tmp_path / "run", batch_size=256, epochs=3, log_every=1)
    assert "batch_size 256 is larger than the data: using 5" in caplog.text
    assert [record["step"] for record in records(run)] == [1, 2, 3]


def test_a_mixing_that_never_begins_is_said(images, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "counterpoint"):
        train(simclr(mixing=(HardMixing(4, 2, 0, warmup_epochs=1),)), images, tmp_path / "late")
    assert "HardMixing waits for 1 epochs and the training has 1: it will change nothing" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "counterpoint"):
        train(simclr(mixing=(HardMixing(4, 2, 0, warmup_epochs=1),)), images, tmp_path / "soon", epochs=2)
    assert "waits" not in caplog.text


def test_identical_images_warn_and_stay_finite(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "counterpoint"):
        run = train(simclr(), torch.full((16, 3, 16, 16), 80, dtype=torch.uint8), tmp_path / "run", epochs=2)
    assert "identical" in caplog.text
    assert all(value.isfinite().all() for value in load_state(run.checkpoint)["state_dict"].values())


# ---- gradient accumulation -------------------------------------------------------------------------------------------


def test_accumulation_is_the_gradient_of_the_average_and_says_that_it_adds_no_negatives(images, tmp_path, caplog):
    torch.manual_seed(0)
    method = Plain()
    before = weights(method)
    options = {"lr": 0.5, "sgd_momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "accumulate": 2}
    with caplog.at_level(logging.WARNING, "counterpoint"):
        run = train(method, images[:32], tmp_path / "run", log_every=1, **options)
    assert "accumulate=2" in caplog.text and "adds no negatives" in caplog.text
    after = weights(method)
    method.load_state_dict(before)
    batches = list(Batches(Images(images[:32]), 8, seed=0))
    losses = []
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        pair = [method.loss(first), method.loss(second)]
        gradients = torch.autograd.grad(sum(pair) / 2, list(method.parameters()))
        with torch.no_grad():
            for p, gradient in zip(method.parameters(), gradients, strict=True):
                p -= 0.5 * gradient
        losses += [loss.item() for loss in pair]
    for name, value in method.state_dict().items():
        torch.testing.assert_close(after[name], value)
    found = records(run)
    assert [record["loss"] for record in found] == pytest.approx(losses)
    assert [record["step"] for record in found] == [1, 1, 2, 2]


def test_no_warning_without_accumulation(images, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "counterpoint"):
        train(simclr(), images, tmp_path / "run")
    assert caplog.text == ""


# ---- guards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 5, 6, 8])
def test_a_term_that_is_not_finite_is_named_with_its_step(images, tmp_path, at, value):
    with pytest.raises(Diverged, match=rf"^repulsion became {value} at step {at} \(epoch {1 + (at > 5)}\)"):
        train(Bad(at, value=value), images, tmp_path / "run", epochs=2, checkpoint_seconds=0, log_every=1)
    path = tmp_path / "run" / "checkpoints" / "last.safetensors"
    assert path.exists() == (at > 5)
    if path.exists():
        state = load_state(path)
        assert state["global_step"] == 5
        assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    told = records(tmp_path / "run") if at > 1 else []
    assert len(told) == at - 1 and all(math.isfinite(record["loss"]) for record in told)


def test_under_accumulation_the_step_is_the_optimisers(images, tmp_path):
    with pytest.raises(Diverged, match="at step 2 "):
        train(Bad(3), images, tmp_path / "run", accumulate=2)


@pytest.mark.parametrize(("at", "step"), [(5, 5), (4, 5)])
def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(images, tmp_path, at, step):
    """The loss of the last step is finite, the weights after it are not."""
    with pytest.raises(Diverged, match=rf"at step {step} "):
        train(Bad(at, "gradient"), images, tmp_path / "run", epochs=1, checkpoint_seconds=0)
    assert not (tmp_path / "run" / "checkpoints" / "last.safetensors").exists()


def test_ctrl_c_gets_its_meaning_back_after_a_failure(images, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Diverged):
        train(Bad(2), images, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


# ---- records ---------------------------------------------------------------------------------------------------------


def test_records_say_what_a_step_used(images, tmp_path):
    run = train(simclr(), images, tmp_path / "run", epochs=2, log_every=2, lr=0.1, warmup=0.5)
    found = records(run)
    assert [record["step"] for record in found] == [1, 3, 5, 6, 8, 10]
    assert [record["epoch"] for record in found] == [0.2, 0.6, 1.0, 1.2, 1.6, 2.0]
    expected = [
        0.1 * (step / 5 if step <= 5 else 0.5 * (1 + math.cos(math.pi * (step - 6) / 5)))
        for step in (1, 3, 5, 6, 8, 10)
    ]
    assert [record["lr"] for record in found] == pytest.approx(expected)
    assert all(earlier["time"] <= later["time"] for earlier, later in pairwise(found))
    looked = [record for record in found if "positive" in record]
    assert [record["step"] for record in looked] == [1, 5, 6, 10]
    for record in looked:
        assert sum(record["positive"]) == 8 and sum(record["negative"]) == 8 * 7
        assert len(record["positive"]) == len(record["negative"]) == 50
        assert record["alignment"] >= 0 and record["uniformity"] <= 0 and 1 <= record["effective_rank"] <= 8
        assert 0 <= record["coupling"] <= 1
        assert -1 <= record["score_negative"] <= record["score_negative_soft"] <= 1
        assert record["score_positive"] == pytest.approx(1 - record["alignment"] / 2, abs=1e-5)


def test_several_terms_are_told_and_add_up(images, tmp_path):
    found = records(train(Bad(99), images, tmp_path / "run", log_every=1))
    assert all(record["loss"] == pytest.approx(sum(record["terms"].values())) for record in found)
    assert set(found[0]["terms"]) == {"attraction", "repulsion"}


def test_geometry_of_a_known_batch():
    query = torch.eye(4)
    found = geometry(query, query.clone(), temperature=0.5)
    assert found["positive"][-1] == 4 and sum(found["positive"]) == 4
    assert found["negative"][25] == 12 and sum(found["negative"]) == 12
    assert found["alignment"] == 0 and found["effective_rank"] == pytest.approx(4)
    assert found["uniformity"] == pytest.approx(-4)  # all distances are sqrt 2, so log exp(-2 * 2)
    assert found["coupling"] == pytest.approx(1 - math.exp(2) / (math.exp(2) + 6))
    assert "uniformity" not in geometry(query[:1], query[:1])
    assert found["score_positive"] == 1 and found["score_positive_variance"] == 0
    assert found["score_negative"] == pytest.approx(0, abs=1e-7) and found["score_negative_variance"] < 1e-7
    assert found["exp_score_positive"] == pytest.approx(math.exp(2))
    assert found["score_negative_soft"] == pytest.approx(0, abs=1e-7)
    assert "score_negative" not in geometry(query[:1], query[:1])  # of one pair there is none
    assert not [name for name in geometry(query, query) if "exp" in name or "soft" in name]  # no temperature


def test_the_scores_shown_are_those_that_enter_the_loss(images, tmp_path):
    from counterpoint.memory.mixing import Transformation

    part = Transformation(target="pos")
    plain, hard = (
        records(train(simclr(mixing=mixing), images, tmp_path / name, epochs=1, lr=1e-6, log_every=1))[0]
        for name, mixing in (("plain", ()), ("hard", (part,)))
    )
    assert hard["alignment"] == plain["alignment"] and hard["positive"] == plain["positive"]  # of the embeddings
    assert hard["score_positive"] < plain["score_positive"]  # of the loss
    eye, tau = torch.eye(4), torch.tensor(0.01, requires_grad=True)
    many = geometry(eye, eye, pairs=contrast.Pairs(eye, -eye), temperature=tau)
    assert many["score_positive"] == -1 and many["alignment"] == 0
    steep = geometry(torch.eye(4), torch.eye(4), temperature=0.01)
    assert "exp_score_positive" not in steep and steep["score_positive"] == 1  # e^100 is no float32


def test_watching_leaves_the_training_as_it_is(images, tmp_path):
    weights = [
        train(simclr(), images, tmp_path / str(every), log_every=every).model().state_dict() for every in (1, 1000)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_second_telling_replaces_the_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    keep_until(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n{"step": 5, "lo')
    keep_until(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_tensorboard_gets_the_scalars(images, tmp_path):
    pytest.importorskip("tensorboard")
    train(simclr(), images, tmp_path / "run", logger="tensorboard")
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


# ---- run folders -----------------------------------------------------------------------------------------------------


def test_the_folder_rebuilds_the_method_and_its_weights(images, tmp_path):
    np.savez(tmp_path / "d.npz", image=images.numpy(), label=np.arange(42) % 3)
    method = simclr(views=HANDWRITING, temperature=0.3, objective="dcl")
    run = train(method, tmp_path / "d.npz", tmp_path / "run", seed=0, lr=0.1)
    config = Run.open(run.folder).config
    assert config["method"] == "simclr" and config["data"] == str(tmp_path / "d.npz")
    assert config["model"]["projection"] == [16, 8] and config["model"]["views"]["crop"] is None
    assert config["fit"]["lr"] == 0.1 and config["labels_used_in_training"] is False
    again = Run.open(run.folder).model()
    assert type(again) is SimCLR and not again.training
    assert again.views == method.views and again.arguments == method.arguments
    assert same(weights(method), weights(again))
    untrained = run.untrained()
    assert same(weights(untrained), weights(simclr(0)))
    assert not same(weights(untrained), weights(again))
    assert json.loads((run.folder / "environment.json").read_text())["torch"] == version("torch")
    assert (run.encode(images) == again.encode(images)).all()


def test_nothing_in_a_run_folder_could_be_unpickled(images, tmp_path):
    run = train(MoCo(encoder="convnet-4", image_size=16, projection=(16, 8), queue=16), images, tmp_path / "run")
    files = sorted(str(file.relative_to(run.folder)) for file in run.folder.rglob("*") if file.is_file())
    assert files == ["checkpoints/last.safetensors", "config.yaml", "environment.json", "metrics.jsonl"]


@dataclass(frozen=True)
class Inner:
    pair: tuple[float, float] = (1.0, 2.0)
    maybe: tuple[int, int] | None = None


class Outer(Plain):
    def __init__(self, inner: Inner | None = None, sizes: tuple[int, ...] = (3,), name: str = "x"):
        super().__init__()
        self.inner, self.sizes = inner, sizes


def test_arguments_survive_plain_data():
    method = Outer(Inner(maybe=(3, 4)), sizes=(1, 2, 3))
    data = json.loads(json.dumps({name: plain(value) for name, value in method.arguments.items()}))
    assert data == {"inner": {"pair": [1.0, 2.0], "maybe": [3, 4]}, "sizes": [1, 2, 3], "name": "x"}
    again = construct(Outer, data)
    assert again.inner == method.inner and again.sizes == (1, 2, 3)
    assert construct(Outer, {"inner": None}).inner is None
    with pytest.raises(InputError, match=r'Outer has no argument "nam"; did you mean name\?'):
        construct(Outer, {"nam": 1})
    with pytest.raises(InputError, match=r'Inner has no field "pairs"; did you mean pair\?'):
        construct(Outer, {"inner": {"pairs": 1}})
    view = construct(SimCLR, {"encoder": "convnet-4", "views": plain(BYOL_2)}).views
    assert view == ImageViews(**{**vars(BYOL_2), "size": 64})


def test_folders_are_numbered_and_never_reused(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fit(simclr(), images, epochs=1, batch_size=8, progress=False).folder == Path("runs/simclr-1")
    assert fit(simclr(), images, epochs=1, batch_size=8, progress=False).folder == Path("runs/simclr-2")
    assert next_folder("simclr") == Path("runs/simclr-3")
    with pytest.raises(InputError, match=r"the run folder .*simclr-1 exists; .*--resume"):
        train(simclr(), images, Path("runs/simclr-1"))


def test_an_unusable_place_is_refused_before_training(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot create the run folder .*file/run: Not a directory"):
        train(simclr(), images, tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(images, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match=r"cannot create the run folder .*Permission denied"):
        train(simclr(), images, tmp_path / "closed" / "run")


def test_a_full_disk_at_a_record_is_one_sentence(images, tmp_path, monkeypatch):
    original = Path.open

    def full(self, *arguments, **options):
        if self.name == "metrics.jsonl" and self.exists() and self.stat().st_size > 300:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: No space left on device; .*--resume"):
        train(simclr(), images, tmp_path / "run", epochs=3, log_every=1, checkpoint_seconds=0)


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(images, tmp_path, monkeypatch):
    from counterpoint.train import checkpoint

    original, written = checkpoint.save_file, []

    def full(*arguments, **options):
        written.append(1)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"cannot write the checkpoint .*No space left on device"):
        train(simclr(), images, tmp_path / "run", epochs=3, checkpoint_seconds=0)
    assert load_state(tmp_path / "run" / "checkpoints" / "last.safetensors")["global_step"] == 5


def test_checkpoints_come_at_epoch_ends_when_enough_time_went_by(images, tmp_path, monkeypatch):
    import lightning

    saved = []
    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", lambda trainer, path: saved.append(trainer.global_step))
    train(simclr(), images, tmp_path / "a", epochs=3, checkpoint_seconds=0)
    assert saved == [5, 10, 15]
    saved.clear()
    train(simclr(), images, tmp_path / "b", epochs=3, checkpoint_seconds=1000)
    assert saved == [15]
    saved.clear()
    monkeypatch.setattr(callbacks.time, "perf_counter", count(step=601.0).__next__)
    train(simclr(), images, tmp_path / "c", checkpoint_seconds=30)
    assert saved == [1, 2, 3, 4, 5]  # an epoch that takes hours is saved inside, after 20 such waits


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"devices": 0}, "devices must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"lr": math.nan}, "lr must be a positive number"),
        ({"clip": -1.0}, "clip must be a positive number"),
        ({"warmup": 1.5}, "warmup must be between 0 and 1"),
        ({"sgd_momentum": -0.1}, "sgd_momentum must be between 0 and 1"),
        ({"weight_decay": math.nan}, "weight_decay must be at least 0"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"batch_size": 1}, "at least two items in a batch, but batch_size is 1"),
        ({"batch_size": 2, "devices": 2, "device": "cpu"}, "on each of the 2 devices, but batch_size is 2"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 1}, "at least two items in a batch, but the data has 1"),
    ],
)
def test_impossible_numbers_are_refused_before_a_folder_exists(images, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(simclr(), images, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_made_a_step_leaves_the_name_free(images, tmp_path):
    with pytest.raises(InputError, match="temperature must be positive"):
        train(simclr(temperature=0.0), images, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(simclr(), images, tmp_path / "run")


def test_a_full_disk_at_the_start_says_where(images, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*config\.yaml"):
        train(simclr(), images, tmp_path / "run")


def test_a_method_can_be_copied(images):
    method = Bad(3, how="gradient")
    copy = deepcopy(method)
    assert copy.arguments == {"at": 3, "how": "gradient", "value": method.value} and same(
        weights(method), weights(copy)
    )
    with pytest.raises(TypeError, match="at"):
        Bad()
    with pytest.raises(TypeError, match="att"):
        Bad(att=3)


def test_one_image_is_refused(images, tmp_path):
    with pytest.raises(InputError, match="the data has 1"):
        train(simclr(), images[:1], tmp_path / "run")


def test_a_model_that_cannot_be_trained_here_is_refused(images, tmp_path, monkeypatch):
    monkeypatch.setattr("counterpoint.train.loop._free", lambda: 1000)
    with pytest.raises(
        InputError, match=r"million weights of SimCLR need .* and 0\.0 GB are free: give a smaller encoder"
    ):
        train(simclr(), images, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision(images, tmp_path, precision):
    before = simclr()
    moved = {}
    for clip in (None, 1e-3):
        method = simclr()
        options = {"optimizer": "sgd", "lr": 1.0, "sgd_momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
        train(
            method, images, tmp_path / f"run-{clip}", steps=1, clip=clip, precision=precision, device="cpu", **options
        )
        change = [(a - b).flatten() for a, b in zip(method.parameters(), before.parameters(), strict=True)]
        moved[clip] = torch.cat(change).norm().item()
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-3) and moved[None] > 0.01


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is one")
def test_no_gpu_is_said(images, tmp_path):
    with pytest.raises(InputError, match="device is gpu, but torch finds none"):
        train(simclr(), images, tmp_path / "run", device="gpu")


def test_wandb_says_what_to_install(images, tmp_path, monkeypatch):
    from lightning.pytorch import loggers

    def missing(**options):
        raise ModuleNotFoundError("wandb")

    monkeypatch.setattr(loggers, "WandbLogger", missing)
    with pytest.raises(InputError, match=r"pip install counterpoint\[loggers\]"):
        train(simclr(), images, tmp_path / "run", logger="wandb")


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precisions_train(images, tmp_path, precision):
    run = train(
        DCL(encoder="convnet-4", image_size=16, projection=(16, 8)), images, tmp_path / "r", precision=precision
    )
    assert all(value.dtype != torch.bfloat16 for value in load_state(run.checkpoint)["state_dict"].values())


def test_clip_bounds_the_step(images, tmp_path):
    torch.manual_seed(0)
    method = Plain()
    before = weights(method)
    options = {"lr": 1.0, "sgd_momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "clip": 0.01}
    train(method, images, tmp_path / "run", batch_size=42, **options)
    moved = torch.cat([(before[name] - value).flatten() for name, value in method.state_dict().items()]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_the_clock_goes_on_after_a_resume(tmp_path):
    recorder = Recorder(tmp_path)
    assert recorder.state_dict() == {"elapsed": 0.0}
    recorder.load_state_dict({"elapsed": 12.5})
    assert recorder.state_dict() == {"elapsed": 12.5}


def test_every_option_of_fit_is_written_down(images, tmp_path):
    run = train(simclr(), images, tmp_path / "run")
    assert set(run.config["fit"]) == set(loop._options())


def test_embeddings_that_are_no_numbers_end_the_training_with_advice(images, tmp_path):
    class Breaks(Plain):
        def loss(self, batch):
            x = batch["image"].float() / 255
            factor = float("nan") if self.global_step == 2 else 1.0
            return contrast.nt_xent(factor * self.encoder(x), self.encoder(x.flip(-1)), temperature=0.5)

    with pytest.raises(Diverged, match=r"z1 holds NaN .* at step 3 .* lower lr"):
        train(Breaks(), images, tmp_path / "run", epochs=2, checkpoint_seconds=0)
