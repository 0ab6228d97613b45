"""MCL: stages that see only what the stages before cannot tell apart, one embedding of all, and a training that resumes."""

import json
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from counterpoint import encoders, memory
from counterpoint.data import Images
from counterpoint.errors import InputError
from counterpoint.evaluate.image_text import pair_accuracy, pair_scores
from counterpoint.methods.vision.mcl import MCL
from counterpoint.methods.vision.simclr import SimCLR
from counterpoint.train import Method, fit, resume
from counterpoint.train.batches import Batches
from counterpoint.train.checkpoint import load_state
from counterpoint.views import ImageViews

pytestmark = pytest.mark.usefixtures("one_thread")

STILL = ImageViews(crop=(0.7, 1.0), flip=0.0, jitter=(0.2, 0.2, 0.0, 0.0), jitter_p=1.0, grey=0.0, blur=0.0)
HEAD = {"projection": (16, 8)}
COLOURS = torch.tensor([[230, 30, 30], [30, 230, 30], [30, 30, 230]])


def pictures(n=96):
    """Three colours, and a faint bright bar in one of two places, which has nothing to do with the colour."""
    generator = torch.Generator().manual_seed(0)
    colour, place = torch.arange(n) % 3, torch.arange(n) // 3 % 2
    image = COLOURS[colour][:, :, None, None].expand(n, 3, 12, 12).float()
    bar = torch.zeros(n, 1, 12, 12)
    bar[place == 0, :, :, 2:4], bar[place == 1, :, :, 8:10] = 25, 25
    noise = torch.randint(-10, 11, (n, 3, 12, 12), generator=generator)
    return Images((image + bar + noise).clamp(0, 255).to(torch.uint8), colour, factors={"place": place})


def build(seed=0, **options):
    torch.manual_seed(seed)
    given = {"stages": 2, "clusters": 3, "encoder": "convnet-4", "image_size": 12, "views": STILL, "options": HEAD}
    return MCL(**{**given, **options})


def train(method, run, data=None, **options):
    options = {"epochs": 4, "batch_size": 8, "lr": 0.05, "log_every": 1, "checkpoint_seconds": 0, **options}
    return fit(method, pictures() if data is None else data, run=run, progress=False, device="cpu", **options)


def records(run):
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("time", "images_per_second")} for line in lines]


@pytest.fixture
def seen(monkeypatch):
    """The batches that were trained on, as positions of items."""
    found = []
    step = Method.training_step

    def watched(self, batch, at):
        found.append(batch["index"])
        return step(self, batch, at)

    monkeypatch.setattr(Method, "training_step", watched)
    return found


def test_one_stage_is_the_base():
    torch.manual_seed(0)
    base = SimCLR(encoder="convnet-4", image_size=12, projection=(16, 8), views=STILL)
    method, batch = build(stages=1), pictures().take(torch.arange(8))
    torch.manual_seed(7)
    expected = base.loss(batch)
    torch.manual_seed(7)
    assert torch.equal(method.loss(batch), expected)
    torch.testing.assert_close(method.eval().embed(batch), F.normalize(base.eval().embed(batch), dim=1))


def test_stages_begin_alike_or_afresh():
    one, two = build().stages
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    one, two = build(start="fresh").stages
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_second_stage_sees_groups_of_the_first_and_trains_alone(seen, tmp_path, monkeypatch):
    method, frozen, clustered = build(), [], []
    kmeans = memory.kmeans

    def watched(vectors, *rest, **options):
        frozen.append([value.clone() for value in method.stages[0].state_dict().values()])
        clustered.append(vectors)
        return kmeans(vectors, *rest, **options)

    monkeypatch.setattr(memory, "kmeans", watched)
    initial = [p.clone() for p in method.stages[1].parameters()]
    items = pictures()
    train(method, tmp_path / "run", items)
    assert len(seen) == 4 * 12 and len(clustered) == 1
    after = method.stages[0].state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(frozen[0], after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(initial, method.stages[1].parameters(), strict=True))
    torch.testing.assert_close(clustered[0], torch.from_numpy(method.stages[0].encode(items)))
    groups = method.clusterings.groups()
    assert method.clusterings.labels.shape == (1, 96)
    assert all(len(groups[index].unique()) == 1 for index in seen[24:])
    assert any(len(groups[index].unique()) > 1 for index in seen[:24])
    # the easy feature is what the first stage found, so that batches of the second hold one colour
    colours = [items.label[index].bincount().max() / len(index) for index in seen[24:]]
    assert torch.stack(colours).mean() > 0.9


def test_each_stage_has_a_whole_schedule(tmp_path):
    run = train(build(), tmp_path / "run", schedule="cosine", warmup=0.25)
    rates = [record["lr"] for record in records(run)]
    assert rates[:24] == rates[24:] and rates[0] < rates[5] and rates[23] < 0.001 < rates[24]
    with pytest.raises(InputError, match="a multiple of 2 as epochs"):
        train(build(), tmp_path / "odd", epochs=3)
    with pytest.raises(InputError, match="no steps"):
        train(build(), tmp_path / "steps", steps=12)


def test_a_control_without_groups(seen, tmp_path):
    method = build(negatives="batch")
    train(method, tmp_path / "run")
    assert len(method.clusterings) == 0 and len(seen) == 48
    orders = Batches(pictures(), 8, seed=0)
    orders.epoch = 3
    assert torch.equal(torch.cat(seen[36:]), orders.order()[:96])


@pytest.mark.parametrize("stop", [1, 23, 24, 25, 30, 47])  # around the border between the stages
def test_ctrl_c_and_resume_equal_the_uninterrupted_run(stop, tmp_path, monkeypatch, whole):
    step, count = Method.training_step, []

    def stopping(self, *arguments):
        count.append(1)
        if len(count) == stop:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", stopping)
        assert train(build(), tmp_path / "part").interrupted
    again = resume(tmp_path / "part", pictures())
    one, two = load_state(whole.checkpoint), load_state(again.checkpoint)
    assert list(one["state_dict"]) == list(two["state_dict"]) and one["global_step"] == two["global_step"] == 48
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    assert records(whole) == records(again)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(build(), tmp_path_factory.mktemp("whole") / "run")


def test_a_finished_run_opens_with_its_clusters(whole):
    method = whole.model()
    assert torch.equal(method.clusterings.labels, whole.method.clusterings.labels) and len(method.clusterings) == 1
    vectors = method.encode(pictures())
    assert vectors.shape == (96, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    # the ensemble encoder, for whoever exports it, is the same function
    batch = pictures().take(torch.arange(5))
    torch.testing.assert_close(method.encoder.eval().embed(batch), method.embed(batch))
    assert method.encoder.dim == 64 and not any(name.startswith("encoder.") for name in method.state_dict())
    with pytest.raises(InputError, match="images only"):
        method.encode_text(["a word"])


def test_three_stages_intersect_all_clusterings_or_take_the_last(tmp_path):
    methods = {}
    for labels in ("all", "last"):
        methods[labels] = build(stages=3, clusters=2, labels=labels)
        train(methods[labels], tmp_path / labels, epochs=3, batch_size=4)
        assert methods[labels].clusterings.labels.shape == (2, 96)
    method = methods["all"]
    codes = method.clusterings.labels[0] * 2 + method.clusterings.labels[1]
    for labels, code in (("all", codes), ("last", methods["last"].clusterings.labels[1])):
        groups = methods[labels].clusterings.groups(labels == "last")
        assert torch.equal(groups[:, None] == groups, code[:, None] == code)


def test_intersection_and_kmeans():
    labels = torch.tensor([[0, 0, 1, 1, 2, 0], [1, 1, 0, 1, 0, 0]])
    assert memory.intersection(labels).tolist() == [1, 1, 2, 3, 4, 0]
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, 16, generator=generator), dim=1)
    of = torch.arange(200) % 4
    x = (centres[of] + 0.05 * torch.randn(200, 16, generator=generator)) * torch.rand(200, 1, generator=generator)
    label, found = memory.kmeans(x, 4, seed=1)  # the length of a vector does not matter
    assert torch.equal(label[:, None] == label, of[:, None] == of) and found.shape == (4, 16)
    assert torch.equal(label, memory.kmeans(x, 4, seed=1)[0])
    assert len(memory.kmeans(torch.ones(6, 3), 3)[0].unique()) == 1
    with pytest.raises(InputError, match="6 items cannot be put into 7 clusters"):
        memory.kmeans(torch.ones(6, 3), 7)


def test_integration_keeps_the_weight_of_each_stage():
    one, two = torch.randn(4, 3), torch.randn(4, 5)
    found = encoders.integrated([10 * one, two])
    torch.testing.assert_close(found, F.normalize(torch.cat([10 * one, two], 1), dim=1))
    assert (found[:, :3].norm(dim=1) > found[:, 3:].norm(dim=1)).all()
    again = encoders.integrated([F.normalize(10 * one, dim=1), F.normalize(two, dim=1)])
    assert not torch.allclose(found, again, atol=0.05)


def test_pair_accuracy_needs_both_statements():
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    images = apart.expand(4, 2, 2)
    texts = torch.stack([apart, apart.flip(0), apart[:1].expand(2, 2), torch.ones(2, 2)])
    result = pair_accuracy(images, texts)  # right, swapped, both the first image, undecided
    assert result.value == 25 and result.detail["chance"] == 25 and result.n == 4
    scores = pair_scores(images, texts, scale=2.0)
    torch.testing.assert_close(scores.sum(1), torch.ones(4, 2))
    torch.testing.assert_close(scores[0, 0, 0], torch.tensor(1 / (1 + np.exp(-2))).float())
    named = pair_accuracy(images, texts, patterns=["colour", "size", "size", "size"])
    assert named.detail["patterns"] == {"colour": 100.0, "size": 0.0} and named.value == 50
    with pytest.raises(InputError, match="two images and two statements"):
        pair_scores(images[:, :1], texts)
    with pytest.raises(InputError, match="4 pairs but 3 patterns"):
        pair_accuracy(images, texts, patterns=["a", "b", "c"])


def test_stages_of_clip(tmp_path):
    from counterpoint.data import captions

    items = pictures(48)
    texts = tuple(f"{word} {place}" for word in ("red", "green", "blue") for place in (0, 1))
    pairs = captions.Pairs(items, texts, (2 * items.label + items.factors["place"])[:, None])
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    method = MCL("clip", stages=2, clusters=3, encoder="convnet-4", image_size=12,
                 options={"text": tower, "dim": 8, "max_length": 16})  # fmt: skip
    fit(method, pairs, epochs=2, batch_size=8, lr=0.05, run=tmp_path / "run", progress=False, device="cpu")
    assert method.family == "pairs" and method.clusterings.labels.shape == (1, 48)
    images, texts = method.encode(pairs), method.encode_text(["red 0", "blue 1"])
    assert images.shape == (48, 16) and texts.shape == (2, 16)
    one, two = method.stages
    both = np.concatenate([one.encode_text(["red 0"]), two.encode_text(["red 0"])], axis=1)
    np.testing.assert_allclose(texts[:1], both / np.linalg.norm(both), rtol=1e-4, atol=1e-6)


def test_what_makes_no_sense_is_refused():
    for options, message in (
        ({"stages": 0}, "at least one stage"),
        ({"clusters": 1}, "two clusters"),
        ({"base": "moco"}, "base must be one of simclr, dcl, clip"),
        ({"labels": "first"}, "labels must be one of all, last"),
        ({"options": {"projektion": (16, 8)}}, 'no argument "projektion"; did you mean projection'),
    ):
        with pytest.raises(InputError, match=message):
            build(**options)
