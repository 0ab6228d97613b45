"""Hard negative mixing: harder than what it is made of, never one's own, the same on every objective with negatives."""

import numpy as np
import pytest
import torch

import counterpoint as cp
from counterpoint import contrast
from counterpoint.contrast import Pairs, unit
from counterpoint.errors import InputError
from counterpoint.memory.mixing import HardMixing, Mixed, hardest, mix
from counterpoint.recipes import experiment

SMALL = {"encoder": "convnet-8", "image_size": 16, "projection": (32, 16)}
PART = HardMixing(hard=8, mixed=4, mixed_with_query=2, warmup_epochs=0)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return unit(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def test_the_hardest_are_found_for_each_query_in_rising_order():
    query, pool = rows(6, 4), rows(20, 4, seed=1)
    found = hardest(3 * query, pool, 5)
    expected = np.sort(np.argsort(-(query @ pool.T).numpy(), axis=1)[:, :5], axis=1)
    assert np.array_equal(found.numpy(), expected)


def test_what_is_left_out_is_never_among_the_hardest():
    query, pool = rows(6, 4), rows(6, 4)  # everyone's nearest is the row itself
    found = hardest(query, pool, 5, without=torch.arange(6)[:, None])
    assert not bool((found == torch.arange(6)[:, None]).any())
    with pytest.raises(InputError, match="7 hardest of 6"):
        hardest(query, pool, 7)


def test_a_mixture_lies_between_its_two_on_the_sphere_and_is_constant():
    first, second = rows(3, 4, 5).requires_grad_(), rows(3, 4, 5, seed=1)
    share = torch.tensor([[0.0, 1.0, 0.5, 0.25]]).expand(3, 4)
    mixed = mix(first, second, share)
    assert not mixed.requires_grad
    torch.testing.assert_close(mixed[:, 0], second[:, 0])
    torch.testing.assert_close(mixed[:, 1], first[:, 1].detach())
    torch.testing.assert_close(mixed.norm(dim=-1), torch.ones(3, 4))
    torch.testing.assert_close((mixed * first).sum(-1)[:, 2], (mixed * second).sum(-1)[:, 2])  # half-way


@pytest.mark.parametrize("clustered", [False, True])
def test_with_the_query_is_harder_than_pairs_and_pairs_harder_than_the_queue(clustered):
    query, queue = rows(64, 32), rows(2048, 32, seed=1)
    if clustered:
        queue = unit(rows(8, 32, seed=2).repeat_interleave(256, 0) + 0.5 * queue)
    pairs = Pairs(query, query, negatives=queue, in_batch=False)
    torch.manual_seed(0)
    own = HardMixing(64, 64, 16, 0)(pairs).hard_negatives
    score = torch.einsum("nd,nsd->ns", query, own)
    real = (query @ queue.T).topk(64, dim=1).values
    with_query, of_pairs = score[:, 64:].amax(1).mean(), score[:, :64].amax(1).mean()
    assert with_query > of_pairs > real.amax(1).mean() > real.mean()


def test_during_the_warm_up_nothing_changes():
    pairs = Pairs(rows(4, 8), rows(4, 8, seed=1))
    part = HardMixing(warmup_epochs=2)
    assert part(pairs, 1) is pairs and part(pairs, 2) is not pairs


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "info_nce", "clip_loss"])
def test_each_anchor_mixes_only_what_its_objective_repels(name):
    """Eight images, each with a direction of its own: a mixture that held the anchor or its partner would show."""
    z = torch.eye(8)
    pairs = Pairs.under(contrast.objective(name), z, z)
    own = HardMixing(100, 32, 0, 0)(pairs).hard_negatives
    anchors = torch.cat([z, z]) if pairs.both else z
    assert own.shape == (len(anchors), 32, 8)
    assert float(torch.einsum("nd,nsd->ns", anchors, own).abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "info_nce", "clip_loss"])
def test_further_negatives_stand_in_the_denominator(name):
    """Against the plain sum: exp(loss) grows by exactly the terms that were added."""
    z1, z2, own = rows(5, 6), rows(5, 6, seed=1), rows(10, 3, 6, seed=2)
    objective, tau = contrast.objective(name), 0.5
    pairs = Pairs.under(objective, z1, z2)
    own = own if pairs.both else own[:5]
    rows_of = {"temperature": tau, "reduction": "none"}
    anchors = torch.cat([z1, z2]) if pairs.both else z1
    added = torch.exp(torch.einsum("nd,nsd->ns", anchors, own) / tau).sum(1)
    positive = ((z1 * z2).sum(1) / tau).repeat(2 if pairs.both else 1)
    if name == "clip_loss":
        logits = z1 @ z2.T / tau
        before = torch.cat([logits.logsumexp(1), logits.logsumexp(0)])
        expected = (torch.log(before.exp() + added) - positive).view(2, -1).mean(0)
    else:
        before = pairs.loss(objective, **rows_of) + positive
        expected = torch.log(before.exp() + added) - positive
    found = Pairs.under(objective, z1, z2, hard_negatives=own).loss(objective, **rows_of)
    torch.testing.assert_close(found, expected)


def test_an_objective_or_method_without_negatives_refuses():
    images = {"image": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)}
    with pytest.raises(InputError, match="sigmoid_loss takes pairs only"):
        cp.SimCLR(**SMALL, objective="sigmoid_loss", mixing=(PART,)).loss(images)
    with pytest.raises(InputError, match="HardMixing works on negatives, and BYOL has none"):
        Mixed([PART], 16, "BYOL", repels=False)


def test_a_part_is_chosen_by_name_or_by_its_fields():
    assert experiment("moco", mixing="mochi").model["mixing"] == [HardMixing()]
    built = experiment("moco", mixing="[{hard: 3, mixed: 2}]", queue=16, **SMALL).build(0)
    assert built.mixing.parts == [HardMixing(hard=3, mixed=2)]
    with pytest.raises(InputError, match='no mixing part named "mochy"; did you mean mochi'):
        experiment("moco", mixing="mochy")
    with pytest.raises(InputError, match='HardMixing has no field "hart"'):
        experiment("moco", mixing="[{hart: 3}]", **SMALL).build(0)


def test_mochi_is_moco_with_mixing_and_takes_further_parts():
    from counterpoint.methods.vision.mochi import MoCHi

    torch.manual_seed(0)
    plain = cp.MoCo(**SMALL, queue=32, mixing=(HardMixing(8, 4, 2, 0),))
    torch.manual_seed(0)
    mochi = MoCHi(hard=8, mixed=4, mixed_with_query=2, warmup_epochs=0, queue=32, **SMALL)
    batch = {"image": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)}
    losses = []
    for method in (plain, mochi):
        torch.manual_seed(1)
        losses.append(float(method.loss(batch).detach()))
    assert losses[0] == losses[1]
    assert len(MoCHi(mixing=(PART,), queue=32, **SMALL).mixing.parts) == 2
