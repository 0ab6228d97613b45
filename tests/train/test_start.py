"""Starting from an earlier run: its weights and its kind of encoder, nothing else of it, and no need of it afterwards."""

import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch

from counterpoint import cli
from counterpoint.errors import InputError
from counterpoint.evaluate.runs import evaluate
from counterpoint.export import export
from counterpoint.methods.vision.core_tuning import CoreTuning
from counterpoint.methods.vision.fine_tuning import FineTuning
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.train import Run, fit, resume
from counterpoint.train.checkpoint import load_state

OPTIONS = {"epochs": 1, "batch_size": 8, "progress": False, "log_every": 1}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (40, 1, 16, 16), dtype=np.uint8)
    np.savez("d.npz", image=image, label=np.arange(40) % 4)
    return "d.npz"


def earlier(folder="earlier", seed: int = 3, encoder: str = "convnet-4") -> Run:
    torch.manual_seed(seed)
    method = SimCLR(encoder=encoder, image_size=16, channels=1, projection=(16, 8))
    return fit(method, "d.npz", run=folder, seed=seed, **OPTIONS)


def weights(module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("cls", [FineTuning, CoreTuning])
def test_the_encoder_is_that_of_the_run(cls):
    run = earlier()
    method = cls(start="earlier", classes=4)
    assert same(weights(method.encoder), weights(run.model().encoder))
    assert (method.encoder.name, method.image_size, method.channels) == ("convnet-4", 16, 1)
    assert (method.arguments["encoder"], method.arguments["image_size"]) == ("convnet-4", 16)
    assert not same(weights(method.encoder), weights(FineTuning("convnet-4", 16, 1).encoder))


def test_only_the_encoder_differs_from_a_start_at_random():
    earlier(seed=3)
    heads = []
    for start in (None, "earlier"):
        torch.manual_seed(7)
        method = FineTuning("convnet-4", 16, 1, classes=4, start=start, eta=0.1)
        heads.append([*weights(method.classifier), *weights(method.contrastor), torch.rand(3)])
    assert same(*heads)


def test_an_exported_encoder_serves_as_well():
    run = earlier()
    path, _ = export(run, "safetensors", "out/encoder.safetensors")
    for start in (str(path), "out"):
        assert same(weights(FineTuning(start=start).encoder), weights(run.model().encoder))


def test_the_run_stands_without_the_one_it_started_from():
    earlier()
    torch.manual_seed(0)
    run = fit(CoreTuning(start="earlier", classes=4), "d.npz", run="tuned", **OPTIONS)
    trained = weights(run.method)
    shutil.rmtree("earlier")
    assert same(weights(Run.open("tuned").model()), trained)
    untrained = Run.open("tuned").untrained()
    torch.manual_seed(0)
    assert same(weights(untrained), weights(CoreTuning(encoder="convnet-4", image_size=16, channels=1, classes=4)))


def test_stopped_and_resumed_it_ends_where_it_would_have(monkeypatch):
    earlier()
    options = {**OPTIONS, "epochs": 3, "checkpoint_seconds": 0}

    def train(folder):
        torch.manual_seed(0)
        return fit(CoreTuning(start="earlier", classes=4), "d.npz", run=folder, **options)

    train("whole")
    original = CoreTuning.loss

    def stop(self, batch):
        if self.global_step == 7:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(CoreTuning, "loss", stop)
        with suppress(KeyboardInterrupt):
            train("stopped")
    shutil.rmtree("earlier")
    resume("stopped", changes={"start": "earlier"})
    one, two = (load_state(Run.open(name).checkpoint)["state_dict"] for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "nowhere"}, "start is nowhere, but there is no such run or file"),
        ({"start": "."}, r"start is \., which is neither a run folder nor an exported encoder"),
        ({"start": "d.npz"}, "d.npz is not an encoder that counterpoint exported"),
        ({"start": "earlier", "encoder": "convnet-8"}, "encoder is convnet-8, but earlier was trained with convnet-4"),
        ({"start": "earlier", "image_size": 32}, "image_size is 32, but earlier was trained with 16"),
        ({"start": "earlier", "channels": 3}, "channels is 3, but earlier was trained with 1"),
        ({"start": "earlier", "pretrained": True}, "leave one out"),
        ({"start": "unfinished"}, "no checkpoint"),
    ],
)
def test_what_cannot_be_started_from_is_named(options, message):
    earlier()
    shutil.copytree("earlier", "unfinished")
    shutil.rmtree("unfinished/checkpoints")
    with pytest.raises(InputError, match=message):
        FineTuning(**options)


def test_from_the_command_line(capsys):
    earlier()
    log = cli.logging.getLogger("counterpoint")
    level = log.level
    try:
        options = ["--epochs", "1", "--batch_size", "8", "--classes", "4", "--run", "tuned", "--progress", "false"]
        assert cli.main(["train", "core-tuning", "--data", "d.npz", "--start", "earlier", *options]) == 0
        assert Run.open("tuned").config["model"]["encoder"] == "convnet-4"
        again = ["train", "core-tuning", "--data", "d.npz", "--start", "nowhere", *options[:-3], "more"]
        assert cli.main(again) == 2 and "no such run or file" in capsys.readouterr().err
    finally:
        log.setLevel(level)


# ---- the classifier that fine-tuning ends with ------------------------------------------------------------------------


def test_labels_that_do_not_fit_are_refused_before_anything_is_made():
    np.save("bare.npy", np.zeros((40, 1, 16, 16), dtype=np.uint8) + np.arange(40, dtype=np.uint8)[:, None, None, None])
    method = FineTuning("convnet-4", 16, 1, classes=3)
    with pytest.raises(InputError, match="built for 3 classes: give --classes 4"):
        fit(method, "d.npz", run="tuned", **OPTIONS)
    with pytest.raises(InputError, match="learns from labels, but bare has none"):
        fit(method, "bare.npy", run="tuned", **OPTIONS)


def test_the_classifier_is_measured_on_unseen_labels_only(caplog):
    torch.manual_seed(0)
    run = fit(FineTuning("convnet-4", 16, 1, classes=4), "d.npz", run="tuned", **OPTIONS)
    found = evaluate(run)
    assert "fine-tune" not in {result.protocol for result in found} and "training saw the labels" in caplog.text
    assert any("and their labels" in result.detail["note"] for result in found if "note" in result.detail)
    image = np.random.default_rng(1).integers(0, 256, (40, 1, 16, 16), dtype=np.uint8)
    np.savez("other.npz", image=image, label=np.arange(40) % 4)
    found = evaluate(run, "other.npz", protocols=["fine-tune"])
    assert [(result.protocol, result.subject) for result in found] == [
        ("fine-tune", s) for s in ("trained", "untrained")
    ]
    from counterpoint.data import load

    held = load("other.npz").split(0.2)[1]
    predicted = run.model().classify(held)
    assert predicted.dtype == np.int64 and predicted.shape == (8,)
    assert found[0].value == pytest.approx(100 * (predicted == held.label.numpy()).mean())
    assert found[0].detail["scatter"] > 0 and found[0].detail["chance"] == 25


def test_a_method_without_classifier_says_so():
    run = earlier()
    with pytest.raises(InputError, match="SimCLR has no classifier of its own"):
        run.model().classify("d.npz")
    with pytest.raises(InputError, match='no protocol named "fine-tune"'):
        evaluate(run, protocols=["fine-tune"])
