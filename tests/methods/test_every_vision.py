"""What holds for every image method: it resumes exactly, shows its scores, and says in one sentence what it cannot use."""

import json
import signal

import pytest
import torch

from counterpoint import methods
from counterpoint.atomic import save_arrays
from counterpoint.data import Images
from counterpoint.errors import InputError
from counterpoint.recipes import experiment
from counterpoint.train import Method, fit, resume
from counterpoint.train.checkpoint import load_state

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS, BATCHES = 2, 4  # 34 images in batches of 8
STOP = 6  # the batch, counted from 1, in which Ctrl-C is pressed

HEAD = {"projection": [16, 8]}
QUEUE = {**HEAD, "queue": 20, "momentum": 0.9}
SMALL_VIEWS = "{count: 2, size: 8}"
CASES: dict[str, dict] = {
    "simclr": {**HEAD, "small_views": SMALL_VIEWS},
    "moco": {**QUEUE, "small_views": SMALL_VIEWS, "layers": 1, "views": "moco-v1"},
    "byol": {**HEAD, "small_views": SMALL_VIEWS},
    "simsiam": {**HEAD, "bottleneck": 4, "small_views": SMALL_VIEWS},
    "fine-tuning": {"classes": 3, "eta": 0.1, "contrast_dim": 8},
    "barlow-twins": {**HEAD, "small_views": SMALL_VIEWS},
    "feature-transformation": {**QUEUE, "elementwise": "pos"},
    "mcl": {"stages": 2, "clusters": 2, "options": HEAD},
    "hydra": {**HEAD, "classes": 3, "gate_widths": [6, 12]},
    "pixpro": {**HEAD, "instance": 1.0, "momentum": 0.9},
    "supremix": {**HEAD, "window": 30.0},
    "swav": {**HEAD, "prototypes": 6, "frozen_steps": 3, "queue": 16, "queue_start": 0, "small_views": SMALL_VIEWS},
    "mochi": {**QUEUE, "hard": 8, "mixed": 4, "mixed_with_query": 2, "warmup_epochs": 1},
    "core-tuning": {"classes": 3, "contrast_dim": 8},
    "cacr": {**QUEUE, "positives": 2},
    "projection-head": {**HEAD, "objective": "sup_con"},
    "dcl": {**HEAD, "small_views": SMALL_VIEWS},
    "amcl": {**HEAD, "count": 2},
    "hallucinator": QUEUE,
    "adainf": {**HEAD, "generated": "made.npz", "replication": 1},
    "counterpoint.methods.vision.cacr:MomentumCACR": {**HEAD, "small_views": SMALL_VIEWS},
}
NEED = {  # and what they say without it
    "fine-tuning": "FineTuning learns from labels, but images has none",
    "core-tuning": "CoreTuning learns from labels, but images has none",
    "hydra": "Hydra learns from labels, but images has none",
    "supremix": "a regression needs one value for each picture",
    "projection-head": 'the objective sup_con contrasts classes, and the data has none called "label"',
}


def pictures(n: int = 34) -> Images:
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=random)
    return Images(image, torch.arange(n) % 3, ("a", "b", "c"), factors={"angle": torch.arange(n) % 5 * 10.0})


def build(slug: str) -> Method:
    return experiment(slug, encoder="convnet-4", image_size=16, **CASES[slug]).build(0)


def train(slug: str, run) -> object:
    options = {"epochs": EPOCHS, "batch_size": 8, "lr": 0.02, "log_every": 1, "checkpoint_seconds": 0}
    return fit(build(slug), pictures(), run=run, progress=False, device="cpu", **options)


def records(run) -> list[dict]:
    clock = ("time", "images_per_second")
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in clock} for line in lines]


def test_every_image_method_is_here():
    lines = (*methods.BASELINES, *methods.CATALOGUE)
    ready = {line.slug for line in lines if line.domain == "vision" and line.status == "ready"}
    assert ready == {name for name in CASES if ":" not in name}


@pytest.fixture(params=CASES)
def slug(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    save_arrays("made.npz", {"image": made.numpy()})
    return request.param


def test_ctrl_c_and_resume_equal_the_uninterrupted_run_and_scores_are_shown(slug, monkeypatch):
    whole = train(slug, "whole")
    lines = records(whole)
    assert len(lines) >= EPOCHS * BATCHES
    shown = [line for line in lines if "score_positive" in line]
    assert len(shown) >= 4 and all(sum(line[side]) > 0 for line in shown for side in ("positive", "negative"))
    step, seen = Method.training_step, []

    def stopping(self, *arguments):
        seen.append(1)
        if len(seen) == STOP:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", stopping)
        part = train(slug, "part")
    assert part.interrupted and load_state(part.checkpoint)["global_step"] == STOP
    torch.manual_seed(99)  # where the generator stands must not matter
    again = resume("part", pictures())
    one, two = (load_state(run.checkpoint) for run in (whole, again))
    assert one["global_step"] == two["global_step"] >= EPOCHS * BATCHES
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    assert records(again) == lines
    vectors = whole.method.encode(pictures())
    assert vectors.shape[0] == 34 and (vectors == again.method.encode(pictures())).all()


def test_one_item_is_refused_or_has_a_loss(slug):
    """The command refuses such batches; whoever calls the loss gets a number or a sentence."""
    method, items = build(slug).train(), pictures(2)
    with pytest.raises(InputError, match="at least two items in a batch"):
        fit(method, pictures(), batch_size=1, run="run", progress=False, device="cpu")
    batch = items.take(torch.tensor([0]))
    try:
        loss = method.loss(batch)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 200
    else:
        terms = loss.values() if isinstance(loss, dict) else [loss]
        assert all(torch.isfinite(term) for term in terms)


def test_images_alone_do_or_it_is_said_what_is_missing(slug, tmp_path):
    bare = Images(pictures().image)
    options = {"epochs": 2, "batch_size": 8, "progress": False, "device": "cpu", "run": "bare"}
    if slug in NEED:
        with pytest.raises(InputError) as refused:
            fit(build(slug), bare, **options)
        assert NEED[slug] in str(refused.value) and "\n" not in str(refused.value)
        assert not (tmp_path / "bare").exists()
    else:
        fit(build(slug), bare, **options)


def test_other_channels_are_refused_or_converted(slug):
    """Grey images for an encoder of colours."""
    grey = Images(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.zeros(4).long())
    method = build(slug)
    assert method.encode(grey).shape[0] == 4
    with pytest.raises(InputError):
        method.encode(torch.zeros(4, 16, dtype=torch.uint8))
