"""A further positive for each query: MoCo's average of two losses, and what the copies of the keys do elsewhere."""

import math
import signal
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import counterpoint as cp
from counterpoint import contrast
from counterpoint.contrast import Pairs, unit
from counterpoint.errors import InputError
from counterpoint.memory.mixing import Hallucination, HardMixing, Mixed, hallucinate
from counterpoint.methods.vision.hallucinator import Hallucinator
from counterpoint.methods.vision.simsiam import SimSiam
from counterpoint.train import Method, fit, resume
from counterpoint.train.checkpoint import load_state

SMALL = {"encoder": "convnet-4", "image_size": 16, "projection": (16, 8)}
TAU = 0.3


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(dim: int = 8, **choices) -> torch.nn.Module:
    torch.manual_seed(0)
    return Hallucination(**choices).build(dim)


def images(n: int = 8) -> dict[str, torch.Tensor]:
    return {
        "image": torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    }


# ------------------------------------------------------------------------------------------------------- the generator


def test_it_pushes_the_query_away_from_its_key():
    query, key = unit(rows(50, 8)), unit(rows(50, 8, seed=1) + 2 * rows(50, 8))
    ask = []
    hallucinate(lambda z: ask.append(z) or z[:, :8], query, key, 0.1)
    same, pushed = ask[0].chunk(2, dim=1)
    assert torch.equal(same, query)
    torch.testing.assert_close(pushed - query, 0.1 * (query - key))  # on the line through both, beyond the query
    assert bool((F.cosine_similarity(pushed, key) < F.cosine_similarity(query, key)).all())
    hallucinate(lambda z: ask.append(z) or z, query, key, 0.0)
    assert torch.equal(ask[1], torch.cat([query, query], dim=1))


def test_the_lengths_of_what_a_method_gives_count():
    """A query ten times as long moves ten times less, relative to itself: normalising it first would be another thing."""
    part = built(ratio=0.5)
    query, key = rows(4, 8), unit(rows(4, 8, seed=1))
    torch.manual_seed(1)
    one = part(Pairs(query, key, in_batch=False)).query
    torch.manual_seed(1)
    other = part(Pairs(unit(query), key, in_batch=False)).query
    assert torch.equal(one[:4], query) and not torch.allclose(unit(one[4:]), unit(other[4:]), atol=1e-3)


def test_one_ratio_a_step_below_the_bound():
    part = built(1, ratio=0.2)
    part.generator = torch.nn.Identity()
    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        asked = hallucinated_rows(part, torch.ones(3, 1), torch.zeros(3, 1))
        assert torch.equal(asked, asked[:1].expand(3, 1))
        found.append(asked[0, 0].item() - 1)
    assert 0 <= min(found) < 0.01 and 0.19 < max(found) < 0.2
    assert abs(sum(found) / 200 - 0.1) < 0.02


def hallucinated_rows(part, query, key):
    """e, where the generator is the identity."""
    return hallucinate(lambda z: z[:, 1:], query, key, part.choice.ratio * torch.rand(()))


def test_the_gradient_reaches_the_generator_and_the_query_twice():
    part, query, key = built(), rows(5, 8).requires_grad_(), unit(rows(5, 8, seed=1))
    pairs = part(Pairs(query, key, negatives=unit(rows(20, 8, seed=2)), in_batch=False))
    (whole,) = torch.autograd.grad(pairs.loss(contrast.info_nce, temperature=TAU), query, retain_graph=True)
    (first,) = torch.autograd.grad(replace(pairs, query=pairs.query[:5], key=key).loss(contrast.info_nce, temperature=TAU),
                                   query, retain_graph=True)  # fmt: skip
    assert (whole - first / 2).norm() > 1e-3
    pairs.loss(contrast.info_nce, temperature=TAU).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@pytest.mark.parametrize("choices", [{"ratio": -0.1}, {"times": 0}, {"hidden": 0}, {"duplicates": "twice"}])
def test_choices_that_make_no_sense_are_named(choices):
    with pytest.raises(InputError, match=next(iter(choices)) if "duplicates" in choices else "hallucination"):
        Hallucination(**choices)


# ------------------------------------------------------------------------------------------- copies of keys, by objective


@pytest.mark.parametrize("duplicates", ["negatives", "apart"])
@pytest.mark.parametrize("times", [1, 3])
def test_with_a_queue_the_loss_is_the_mean_of_ordinary_losses(duplicates, times):
    part = built(times=times, duplicates=duplicates)
    pairs = Pairs(rows(6, 8), unit(rows(6, 8, seed=1)), negatives=unit(rows(20, 8, seed=2)), in_batch=False)
    more = part(pairs)
    assert more.query.shape == ((1 + times) * 6, 8)
    each = [replace(pairs, query=query).loss(contrast.info_nce, temperature=TAU) for query in more.query.split(6)]
    torch.testing.assert_close(more.loss(contrast.info_nce, temperature=TAU), torch.stack(each).mean())


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "dclw", "info_nce", "clip_loss", "sigmoid_loss"])
def test_apart_is_the_mean_of_ordinary_losses_under_every_objective(name):
    objective, part = contrast.objective(name), built(duplicates="apart")
    pairs = Pairs.under(objective, rows(6, 8), rows(6, 8, seed=1))
    more = part(pairs)
    one, other = (objective(query, pairs.key, temperature=TAU) for query in more.query.split(6))
    torch.testing.assert_close(more.loss(objective, temperature=TAU), (one + other) / 2)


def test_apart_keeps_given_negatives_with_every_batch():
    pairs = Pairs(rows(4, 8), rows(10, 8, seed=1), negatives=rows(5, 8, seed=2))
    more = built(duplicates="apart")(pairs)
    each = [replace(pairs, query=query).loss(contrast.info_nce, temperature=TAU) for query in more.query.split(4)]
    torch.testing.assert_close(more.loss(contrast.info_nce, temperature=TAU), sum(each) / 2)


def test_as_negatives_the_copies_only_add_log_two_to_info_nce():
    pairs = Pairs(rows(6, 8).requires_grad_(), rows(6, 8, seed=1))
    losses = {}
    for duplicates in ("negatives", "apart"):
        part = built(duplicates=duplicates)
        torch.manual_seed(1)
        loss = part(pairs).loss(contrast.info_nce, temperature=TAU)
        losses[duplicates] = loss.item(), torch.autograd.grad(loss, pairs.query)[0]
    assert losses["negatives"][0] == pytest.approx(losses["apart"][0] + math.log(2), rel=1e-5)
    torch.testing.assert_close(losses["negatives"][1], losses["apart"][1])


def test_as_negatives_nt_xent_is_the_released_loss_with_its_false_negatives():
    """Row by row: 4 N rows, the mask leaves out the row itself and nothing else."""
    pairs = Pairs.under(contrast.nt_xent, rows(5, 8), rows(5, 8, seed=1))
    more = built()(pairs)
    z = unit(torch.cat([more.query, pairs.key, pairs.key])).double()
    s = z @ z.T / TAU
    terms = []
    for i in range(20):
        others = [j for j in range(20) if j != i]
        terms.append(s[i, others].logsumexp(0) - s[i, (i + 10) % 20])
    torch.testing.assert_close(more.loss(contrast.nt_xent, temperature=TAU), torch.stack(terms).mean().float())
    # a key meets its copy, whose cosine is 1: no positive, however near, brings the loss of its row below log 2
    assert min(term.item() for term in terms[10:]) > math.log(2)


def test_clip_as_negatives_shares_a_caption_between_both_images():
    image, text = rows(5, 8), rows(5, 8, seed=1)
    more = built()(Pairs.under(contrast.clip_loss, image, text))
    s = unit(more.query) @ unit(text).T / TAU
    own = torch.arange(5).repeat(2)
    there = F.cross_entropy(s, own) + math.log(2)
    back = s.logsumexp(0).mean() - s[torch.arange(10), own].mean()
    torch.testing.assert_close(more.loss(contrast.clip_loss, temperature=TAU), (there + back) / 2)


def test_equal_items_still_do_not_repel():
    """CLIP's masked captions, doubled: the copies of a key show the same item, so they are masked as well."""
    items = torch.tensor([0, 1, 0, 2])
    pairs = Pairs.under(contrast.clip_loss, rows(4, 8), rows(4, 8, seed=1), items=items)
    for duplicates in ("negatives", "apart"):
        more = built(duplicates=duplicates)(pairs)
        each = []
        for batch in more.split():
            count = len(batch.query)
            logits = unit(batch.query) @ unit(batch.key).T / TAU
            twice = items.repeat(count // 4)
            masked = (twice[:, None] == twice) & ~torch.eye(count, dtype=torch.bool)
            logits, own = logits.masked_fill(masked, -torch.inf), torch.arange(count)
            each.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
        torch.testing.assert_close(more.loss(contrast.clip_loss, temperature=TAU), torch.stack(each).mean())
        assert len(each) == (1 if duplicates == "negatives" else 2)


# ------------------------------------------------------------------------------------------------- with other parts, groups


@pytest.mark.parametrize("duplicates", ["negatives", "apart"])
@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip_loss"])
def test_hard_negatives_stay_with_their_anchors(name, duplicates):
    objective = contrast.objective(name)
    pairs = Pairs.under(objective, rows(6, 8), rows(6, 8, seed=1))
    mixed = HardMixing(4, 3, 2, 0)(pairs)
    more = built(duplicates=duplicates)(mixed)
    hard = more.hard_negatives.split(mixed.hard_negatives.shape[0]) if duplicates == "apart" else None
    if hard is None:
        of_query, of_key = mixed.hard_negatives.tensor_split(2) if pairs.both else (mixed.hard_negatives, None)
        expected = [of_query, of_query] + ([] if of_key is None else [of_key, of_key])
        assert torch.equal(more.hard_negatives, torch.cat(expected))
    else:
        assert all(torch.equal(part, mixed.hard_negatives) for part in hard)
    assert more.loss(objective, temperature=TAU).isfinite()


def test_mined_apart_a_hallucination_never_meets_its_own_key():
    """Each image has a direction of its own: a mixture that held the anchor's key would show."""
    eye = torch.eye(6)
    pairs = Pairs.under(contrast.nt_xent, eye, eye).with_queries(eye, apart=True)
    own = HardMixing(100, 16, 0, 0)(pairs).hard_negatives
    anchors = torch.eye(6).repeat(4, 1)
    assert own.shape == (24, 16, 6) and float(torch.einsum("nd,nsd->ns", anchors, own).max()) < 1e-6


def test_groups_come_apart_as_they_were_put_together():
    pairs = Pairs(rows(4, 8), rows(6, 8, seed=1), hard_negatives=rows(4, 2, 8, seed=2), partner=rows(4, 8, seed=3))
    whole = pairs.with_queries(rows(8, 8, seed=4), apart=True)
    parts = whole.split()
    assert [len(part.query) for part in parts] == [4, 4, 4] and whole.groups == 3
    for part in parts:
        assert torch.equal(part.key, pairs.key) and torch.equal(part.hard_negatives, pairs.hard_negatives)
        assert torch.equal(part.matched, pairs.partner)
    again = whole.with_queries(rows(12, 8, seed=5))  # what stands apart stays apart
    assert again.groups == 6 and torch.equal(replace(again, partner=None).matched, pairs.key[:4].repeat(6, 1))


def test_each_row_is_told_by_its_loss():
    pairs = Pairs(rows(4, 8), rows(4, 8, seed=1)).with_queries(rows(4, 8, seed=2), apart=True)
    found = pairs.loss(contrast.info_nce, temperature=TAU, reduction="none")
    assert found.shape == (8,)
    torch.testing.assert_close(found.mean(), pairs.loss(contrast.info_nce, temperature=TAU))


# ------------------------------------------------------------------------------------------------------------- methods


def losses_of(*methods, batch=None):
    found = []
    for method in methods:
        torch.manual_seed(7)
        found.append(method.loss(batch or images()).detach())
    return found


def test_hallucinator_is_moco_with_the_part_and_two_views():
    options = {**SMALL, "queue": 20, "temperature": 0.2}
    torch.manual_seed(0)
    ours = Hallucinator(**options)
    torch.manual_seed(0)
    same = cp.MoCo(
        **options, mixing=(Hallucination(),), views=cp.views.HALLUCINATOR_1, other_views=cp.views.HALLUCINATOR_2
    )
    one, other = losses_of(ours, same)
    assert one == other
    assert ours.views.crop_centre == (0.25, 0.75) and ours.other_views.crop_centre is None
    assert torch.equal(ours.queue.keys, same.queue.keys) and ours.queue.pointer == 8
    names = {id(p) for group in ours.parameter_groups() for p in group["params"]}
    assert all(id(p) in names for p in ours.mixing.parameters()) and [*ours.mixing.parameters()]
    assert not any(name.startswith("key") and "generator" in name for name, _ in ours.named_parameters())


def test_keys_are_enqueued_twice_on_request_only():
    torch.manual_seed(0)
    method = Hallucinator(**SMALL, queue=20, duplicate_keys=True)
    losses_of(method)
    assert method.queue.pointer == 16 and torch.equal(method.queue.keys[:8], method.queue.keys[8:16])


@pytest.mark.parametrize("cls", [SimSiam, cp.BYOL])
def test_predictions_are_hallucinated_and_targets_stay_what_they_are(cls, monkeypatch):
    torch.manual_seed(0)
    options = {"bottleneck": 4} if cls is SimSiam else {}
    method = cls(**SMALL, **options, mixing=(Hallucination(ratio=0.5),))
    seen = []
    part = method.mixing.parts[0]
    monkeypatch.setattr(
        part, "forward", lambda pairs, epoch: seen.append((pairs, type(part).forward(part, pairs))) or seen[-1][1]
    )
    (loss,) = losses_of(method)
    (first, made), (second, made_too) = seen
    assert torch.equal(first.partner, second.query) and torch.equal(second.partner, first.query)
    assert torch.equal(made.key, first.key.repeat(2, 1))
    cosines = [-F.cosine_similarity(m.query, m.key.detach()).mean() for m in (made, made_too)]
    expected = sum(cosines) / 2 if cls is SimSiam else 4 + 2 * sum(cosines)
    torch.testing.assert_close(loss, expected.detach())


def test_simsiam_trains_the_generator(tmp_path):
    torch.manual_seed(0)
    method = SimSiam(**SMALL, bottleneck=4, mixing=(Hallucination(),))
    before = [p.clone() for p in method.mixing.parameters()]
    fit(method, images()["image"], batch_size=4, epochs=1, lr=0.1, run=tmp_path / "run", progress=False)
    assert all(not torch.equal(p, q) for p, q in zip(method.mixing.parameters(), before, strict=True) if p.ndim > 1)


def test_both_directions_have_a_ratio_of_their_own():
    part, pairs = built(), Pairs(rows(3, 8), rows(3, 8, seed=1))
    torch.manual_seed(0)
    assert not torch.equal(part(pairs).query, part(pairs).query)


def test_only_parts_that_need_negatives_are_refused():
    with pytest.raises(InputError, match="HardMixing works on negatives, and SimSiam has none"):
        SimSiam(**SMALL, mixing=(HardMixing(),))
    assert len(Mixed([Hallucination()], 8, "SimSiam", repels=False).learned) == 1


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, one_thread, monkeypatch):
    """Weights of the generator, queue and draws are all in the checkpoint."""

    def train(name: str):
        torch.manual_seed(0)
        options = {"batch_size": 4, "epochs": 3, "lr": 0.1, "checkpoint_seconds": 0, "progress": False}
        return fit(Hallucinator(**SMALL, queue=16), images(12)["image"], run=tmp_path / name, **options)

    train("whole")
    original, seen = Method.training_step, []

    def step(self, *arguments):
        seen.append(1)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", step)
        assert train("part").interrupted
    resume(tmp_path / "part", images(12)["image"])
    one, other = (
        load_state(tmp_path / name / "checkpoints" / "last.safetensors")["state_dict"] for name in ("whole", "part")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert sum("generator" in name for name in one) == 6


def test_the_generator_learns_to_find_the_key():
    """A task with an answer: keys are turned queries, so that only the generator can bring both together."""
    torch.manual_seed(0)
    query, turn = rows(256, 8), torch.linalg.qr(rows(8, 8, seed=1))[0]
    key, part = unit(query @ turn), built(duplicates="apart")
    pairs = Pairs(query, key, negatives=unit(rows(256, 8, seed=3)), in_batch=False)
    optimiser = torch.optim.Adam(part.parameters(), lr=0.01)

    @torch.no_grad()
    def found() -> float:
        return float(F.cosine_similarity(part(pairs).query[256:], key).mean())

    assert abs(found()) < 0.3
    for _ in range(150):
        optimiser.zero_grad()
        part(pairs).loss(contrast.info_nce, temperature=TAU).backward()
        optimiser.step()
    assert found() > 0.8
