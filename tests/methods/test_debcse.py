"""DebCSE takes its teacher when it should, draws what its weights say, and goes on exactly after a stop."""

import math
import shutil
import signal

import pytest
import torch

from counterpoint.contrast import info_nce
from counterpoint.data import texts
from counterpoint.errors import InputError
from counterpoint.memory.candidates import Pools
from counterpoint.methods.language.debcse import DebCSE
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.train import Method, Run, fit, resume
from counterpoint.train.checkpoint import load_state

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SENTENCES = [f"{who} {what} {where}." for who in ("A dog", "The cats", "Anna") for what in ("runs", "is asleep")
             for where in ("there", "in the garden", "on top of the old house", "at sea")]  # fmt: skip
OPTIONS = {"batch_size": 8, "optimizer": "adamw", "lr": 3e-3, "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed=0, cls=DebCSE, **options):
    torch.manual_seed(seed)
    more = {"pool": 6} if cls is DebCSE else {}
    return cls(**{"encoder": dict(TINY), "max_length": 60, **more, **options}).train()


def taught(seed=0, **options):
    """A method whose pools are made, and its items."""
    method = build(seed, teacher_epochs=0, **options)
    items = method.training_items(SENTENCES)
    method.grouping(0, items)
    return method, items


def weights(module):
    return [p.clone() for p in module.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------------------------- teacher


def test_before_there_is_a_teacher_it_is_simcse():
    method, simcse = build(dropout=0.1), build(cls=SimCSE, dropout=0.1)
    items = method.training_items(SENTENCES)
    method.grouping(0, items)
    assert method.pools is None
    simcse.load_state_dict(method.state_dict(), strict=False)
    losses = []
    for each in (method, simcse):
        torch.manual_seed(3)
        losses.append(each.loss(items.take(torch.arange(8))))
    torch.testing.assert_close(*losses)


def test_the_teacher_is_taken_when_its_epochs_are_over_and_again_when_refreshed():
    method = build(refresh=2)
    items = method.training_items(SENTENCES)
    seen = []
    for epoch in range(5):
        with torch.no_grad():
            for p in method.encoder.parameters():
                p.add_(0.1)
        now = weights(method.encoder)
        method.grouping(epoch, items)
        seen.append(same(weights(method.teacher.module), now))
        again = method.pools
        method.grouping(epoch, items)  # asked again within the epoch, as after a stop: nothing moves
        assert method.pools is again
    assert seen == [False, True, False, True, False] and int(method.taught) == 3
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_pools_depend_on_the_teacher_alone_and_training_draws_no_less():
    method, items = taught()
    state, before = torch.get_rng_state(), method.pools
    with torch.no_grad():
        next(method.encoder.parameters()).add_(1.0)
    method.pools = None
    method.grouping(0, items)
    for name in ("neighbours", "semantic", "surface", "vectors"):
        assert torch.equal(getattr(method.pools, name), getattr(before, name))
    assert torch.equal(torch.get_rng_state(), state) and method.training


# ------------------------------------------------------------------------------------------------------------- sampler


def planted(method, semantic, surface):
    """Put a pool of the first sentence by hand: K neighbours, itself, copies."""
    pools = method.pools
    method.pools = Pools(pools.neighbours, pools.semantic.clone(), pools.surface.clone(), pools.vectors)
    method.pools.semantic[0], method.pools.surface[0] = torch.tensor(semantic), torch.tensor(surface)
    return method


COSINES = {"thresholds": "cosine", "positive_from": 0.75, "negative_to": 0.45, "false_from": 0.85}


def test_near_in_meaning_and_different_in_words_is_preferred():
    #          near, unlike | near, alike | between | far, alike | far, unlike | near, a duplicate | itself | copies
    semantic = [0.9, 0.9, 0.6, 0.3, 0.3, 0.9, 1.0, 0.95, 0.95, 0.7]
    surface = [0.2, 0.7, 0.5, 0.7, 0.1, 0.96, 1.0, 0.9, 0.9, 0.9]
    mean, index = sum(surface) / len(surface), torch.tensor([0])

    def e(s):
        return 1 / (1 + math.exp(-(s - mean) / 0.1))

    method = planted(taught(**COSINES)[0], semantic, surface)
    odds = method.sampler.positive_logits(method.pools, index)[0].exp()
    assert (odds > 0).tolist() == [True, True, False, False, False, False, False, True, True, False]
    assert (odds[0] / odds[1]).item() == pytest.approx(min(1 / max(e(0.2), 0.05), 10) / (1 / e(0.7)), rel=1e-4)
    odds = method.sampler.negative_logits(method.pools, index)[0].exp()
    assert (odds > 0).tolist() == [False, False, False, True, True, False, False, False, False, False]
    inverse = [min(1 / max(1 - e(s), 0.05), 10) for s in (0.7, 0.1)]
    assert (odds[3] / odds[4]).item() == pytest.approx(inverse[0] / inverse[1], rel=1e-4) and inverse[0] > inverse[1]
    by_meaning = planted(taught(**COSINES, debias=False)[0], semantic, surface)
    for logits, (a, b) in (
        (by_meaning.sampler.positive_logits(by_meaning.pools, index), (0, 1)),
        (by_meaning.sampler.negative_logits(by_meaning.pools, index), (3, 4)),
    ):
        assert logits[0, a] == logits[0, b]
    lets_in = planted(taught(**COSINES, duplicate=1.0)[0], semantic, surface)
    assert lets_in.sampler.positive_logits(lets_in.pools, index)[0, [5, 6]].isfinite().all()


def test_draws_stay_in_the_pool_and_nobody_is_both():
    method, items = taught(positive_from=0.8, negative_to=0.5, hard_negatives=3)
    index = torch.arange(len(items))
    positive, negative = (
        method.sampler.positive_logits(method.pools, index).isfinite(),
        method.sampler.negative_logits(method.pools, index).isfinite(),
    )
    assert not (positive & negative).any() and not negative[:, 6:].any()
    generator = torch.Generator().manual_seed(0)
    draws = [method.choose(index, generator) for _ in range(20)]
    for row, others in draws:
        own = row % len(items) == index
        near = (method.pools.neighbours == row[:, None]).any(1)
        assert (own | near).all() and (others < len(items)).all() and (others != index[:, None]).all()
    assert torch.equal(method.choose(index, torch.Generator().manual_seed(0))[0], draws[0][0])
    assert len({tuple(row.tolist()) for row, _ in draws}) > 1


def test_the_last_resorts_are_the_sentence_itself_and_random_others():
    method, items = taught(thresholds="cosine", positive_from=2.0, negative_to=-2.0, hard_negatives=2)
    index = torch.arange(len(items))
    drawn = [method.choose(index) for _ in range(50)]
    assert all(torch.equal(positive, index) for positive, _ in drawn)
    others = torch.stack([negatives for _, negatives in drawn], 1).flatten(1)
    assert (others != index[:, None]).all() and all(len(row.unique()) > 15 for row in others)


def test_a_step_by_hand():
    method, items = taught(dropout=0.0, hard_negatives=2, positive_from=0.7, negative_to=0.6, false_from=0.9)
    batch = items.take(torch.tensor([3, 17, 8, 11]))
    torch.manual_seed(5)
    loss = method.loss(batch)
    torch.manual_seed(5)
    positive, negatives = method.choose(batch["index"])
    rows = torch.cat([batch["index"], positive, negatives[:, 0], negatives[:, 1]])
    ids, mask = items.variants.padded(rows, items.pad)
    z = method.head(method.encoder(ids, mask).pooled)
    sentence = rows % len(items)
    alike = method.pools.vectors[sentence[:4]] @ method.pools.vectors[sentence[4:]].T >= method.pools.quantile(0.9)
    expected = info_nce(z[:4], z[4:], temperature=0.05, positives=torch.arange(4), ignore=alike)
    torch.testing.assert_close(loss, expected)
    assert alike.any() and not alike.all()
    loss.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.encoder.parameters())


@pytest.mark.parametrize(
    "options", [{"balance": 2}, {"hard_negatives": 0}, {"false_from": None}, {"rewordings": ()}, {"surface": "rouge-l"},
                {"shard": 8}, {"false_from": None, "mixing": (), "heads": None}]
)  # fmt: skip
def test_every_choice_can_be_trained(options):
    method, items = taught(**options)
    loss = method.loss(items.take(torch.arange(8)))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in method.encoder.parameters())


# ---------------------------------------------------------------------------------------------------------------- runs


def test_items_are_sentences_with_their_copies(tmp_path):
    items = build().training_items(SENTENCES, limit=10, seed=4)
    assert len(items) == 10 and items.copies == 3
    again = build().training_items(SENTENCES, limit=10, seed=4)
    assert torch.equal(items.variants.flat, again.variants.flat)
    assert not torch.equal(items.variants.flat, build().training_items(SENTENCES, limit=10, seed=5).variants.flat)
    pairs = build().training_items([(s, s + " too") for s in SENTENCES])
    assert len(pairs) == 2 * len(SENTENCES)
    with pytest.raises(InputError, match="train it on sentences, not on tokens"):
        build().training_items(build(cls=SimCSE).read(SENTENCES))
    assert isinstance(build().read(SENTENCES), texts.Sentences)


@pytest.mark.parametrize("refresh", [0, 1])
def test_a_stopped_training_goes_on_exactly(tmp_path, monkeypatch, refresh):
    data = tmp_path / "a.txt"
    data.write_text("\n".join(SENTENCES))
    options = {**OPTIONS, "epochs": 3, "checkpoint_seconds": 0}
    entire = fit(build(refresh=refresh), data, run=tmp_path / "entire", **options)
    original, seen = Method.training_step, []

    def step(self, *arguments):
        seen.append(1)
        if len(seen) == 8:  # within the last epoch, of three batches each
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", step)
        stopped = fit(build(refresh=refresh), data, run=tmp_path / "stopped", **options)
    assert stopped.interrupted
    resume(tmp_path / "stopped")
    one, two = (
        load_state(tmp_path / name / "checkpoints" / "last.safetensors")["state_dict"] for name in ("entire", "stopped")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert int(one["taught"]) == (2 if refresh else 1)
    assert entire.encode(SENTENCES).shape == (24, 16)


def test_a_training_that_would_end_with_its_teacher_is_refused(tmp_path):
    with pytest.raises(InputError, match="2 of 2 epochs make the teacher, so that no pair would be drawn"):
        fit(build(teacher_epochs=2), SENTENCES, run=tmp_path / "run", epochs=2, **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_it_starts_from_an_earlier_run_that_may_be_gone_later(tmp_path):
    data = tmp_path / "a.txt"
    data.write_text("\n".join(SENTENCES))
    encoder = {"encoder": "transformer-32-1", "max_length": 60}
    earlier = fit(build(cls=SimCSE, seed=9, **encoder), data, run=tmp_path / "earlier", epochs=1, **OPTIONS)
    method = DebCSE(start=str(earlier.folder), pool=5, max_length=60)  # encoder, pooling and layers are the run's
    assert same(weights(method.encoder), weights(earlier.method.encoder)) and method.teacher_epochs == 0
    assert method.arguments["encoder"] == "transformer-32-1" and method.arguments["teacher_epochs"] == 0
    run = fit(method, data, run=tmp_path / "run", epochs=1, **OPTIONS)
    assert same(weights(run.method.teacher.module), weights(earlier.method.encoder))
    assert not same(weights(run.method.encoder), weights(earlier.method.encoder))
    shutil.rmtree(earlier.folder)
    assert same(weights(Run.open(run.folder).model().encoder), weights(run.method.encoder))
    with pytest.raises(InputError, match="there is no such run or file"):
        DebCSE(start=str(earlier.folder))
    with pytest.raises(InputError, match="the encoder to start from does not fit"):
        build(start=str(run.folder))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"negative_to": 0.99}, r"positive_from \(0.99\) must lie above negative_to \(0.99\): no sentence is both"),
        ({"positive_from": 1.2}, 'shares lie between 0 and 1.*say thresholds="cosine"'),
        ({"surface": "bleu"}, "surface is one of jaccard"),
        ({"rewordings": ("translate",)}, 'no rewording named "translate"; there are repeat, delete, swap'),
        ({"pool": 0}, "nor a pool empty"),
        ({"hard_negatives": 7}, "a pool of 6 has no 7 hard negatives"),
        ({"heads": "several"}, "set false_from to None beside them"),
        ({"sharpness": 0.0}, "sharpness"),
    ],
)
def test_it_refuses(options, message):
    if "heads" in options:
        from counterpoint.encoders.several import NAMED

        options = {"heads": NAMED[options["heads"]]}
    with pytest.raises(InputError, match=message):
        build(**options)
