"""Feature transformation: harder by a known amount, off the sphere, and shown as the loss sees it."""

import math

import pytest
import torch

import counterpoint as cp
from counterpoint import contrast
from counterpoint.contrast import Pairs, unit
from counterpoint.errors import InputError
from counterpoint.memory.mixing import NAMED, Hallucination, HardMixing, Mixed, Transformation, transform
from counterpoint.methods.vision.feature_transformation import FeatureTransformation
from counterpoint.methods.vision.mochi import MoCHi
from counterpoint.recipes import experiment

SMALL = {"encoder": "convnet-8", "image_size": 16, "projection": (32, 16)}


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return unit(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def queue_pairs(n: int = 6, d: int = 8, k: int = 20) -> Pairs:
    return Pairs(rows(n, d), rows(n, d, seed=1), negatives=rows(k, d, seed=2), in_batch=False)


def dots(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * y).sum(-1)


@pytest.mark.parametrize("share", [0.3, 1.0, 1.2, 1.5, 2.0])
def test_a_positive_loses_what_the_identity_says(share):
    q, k = rows(200, 16), unit(rows(200, 16) + torch.linspace(0, 3, 200)[:, None] * rows(200, 16, seed=1))
    found = transform(Pairs(q, k), torch.tensor(share))
    s = dots(q, k)
    torch.testing.assert_close(dots(found.query, found.key), s + 2 * share * (1 - share) * (1 - s), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.query + found.key, q + k)  # apart about their middle
    length = 1 + 2 * share * (share - 1) * (1 - s)
    for feature in (found.query, found.key):
        torch.testing.assert_close(dots(feature, feature), length, rtol=1e-5, atol=1e-5)
    harder = dots(found.query, found.key) - s
    assert bool((harder <= 1e-6).all()) if share > 1 else bool((harder >= -1e-6).all())  # inside the segment: easier


def test_renormalising_is_another_transformation():
    pairs, share = queue_pairs(), torch.tensor(1.6)
    plain, back = transform(pairs, share), transform(pairs, share, renormalize=True)
    s = dots(pairs.query, pairs.key)
    c = 2 * 1.6 * 0.6 * (1 - s)
    torch.testing.assert_close(dots(plain.query, plain.key), s - c)
    torch.testing.assert_close(dots(back.query, back.key), (s - c) / (1 + c))
    torch.testing.assert_close(back.query @ back.negatives.T, plain.query @ plain.negatives.T / (1 + c).sqrt()[:, None])
    assert float(dots(plain.query, plain.key).min()) < -1 <= float(dots(back.query, back.key).min())


@pytest.mark.parametrize("elementwise", [False, True])
def test_against_plain_loops(elementwise):
    pairs = queue_pairs()
    torch.manual_seed(0)
    up = 1 + torch.rand(6, 8) if elementwise else torch.tensor(1.4)
    low = torch.rand(20, 8) if elementwise else torch.tensor(0.3)
    order = torch.randperm(20)
    found = transform(pairs, up, low, order)
    wide = lambda share, i: share[i] if share.ndim else share  # noqa: E731
    logits = torch.empty(6, 21)
    for i in range(6):
        q, k = pairs.query[i], pairs.key[i]
        there, back = wide(up, i) * q + (1 - wide(up, i)) * k, wide(up, i) * k + (1 - wide(up, i)) * q
        logits[i, 0] = there @ back
        for j in range(20):
            n = wide(low, j) * pairs.negatives[j] + (1 - wide(low, j)) * pairs.negatives[order[j]]
            logits[i, 1 + j] = there @ n
    expected = torch.nn.functional.cross_entropy(logits / 0.2, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(found.loss(contrast.info_nce, temperature=0.2), expected)


def test_the_gradient_reaches_the_query_through_both_sides():
    """With k constant: d(q' k') / dq = (l^2 + (1 - l)^2) k + 2 l (1 - l) q, where a detached k' would leave the first alone."""
    q, k, share = rows(5, 8).requires_grad_(), rows(5, 8, seed=1), torch.tensor(1.3)
    raw = Pairs(q, k, in_batch=False, normalize=False)
    found = transform(raw, share)
    (gradient,) = torch.autograd.grad(dots(found.query, found.key).sum(), q)
    expected = (1.3**2 + 0.3**2) * k - 2 * 1.3 * 0.3 * q.detach()
    torch.testing.assert_close(gradient, expected)


def test_a_single_positive_and_negative_by_hand():
    """q and k at right angles, one negative opposite to q, lambda 1.5: scores 1 - 2.5 = -1.5 and -1.5."""
    q, k = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    pairs = Pairs(q, k, negatives=torch.tensor([[-1.0, 0.0]]), in_batch=False)
    found = transform(pairs, torch.tensor(1.5))
    assert found.query.tolist() == [[1.5, -0.5]] and found.key.tolist() == [[-0.5, 1.5]]
    assert float(found.loss(contrast.info_nce, temperature=1.0)) == pytest.approx(math.log(2))


def test_draws_are_of_the_paper():
    part, pairs = Transformation(), Pairs(rows(2, 4), -rows(2, 4), negatives=rows(2, 4, seed=3), in_batch=False)
    torch.manual_seed(0)
    # of opposite features (s = -1) the first is (2 lambda - 1) q
    shares = torch.stack([(dots(part(pairs).query, pairs.query)[0] + 1) / 2 for _ in range(4000)])
    assert float(shares.min()) > 1 and float(shares.max()) < 2
    assert float(shares.mean()) == pytest.approx(1.5, abs=0.01) and float(shares.var()) == pytest.approx(
        1 / 20, abs=0.004
    )
    wide = Transformation(target="pos", elementwise="pos")(Pairs(rows(9, 7), -rows(9, 7), in_batch=False))
    assert len((wide.query / rows(9, 7)).unique()) > 50
    # the queue: same rows, one share, and a shuffle; nothing of it before the warm-up is over
    plain = Transformation(target="neg")(pairs)
    torch.testing.assert_close(plain.negatives.sum(0), pairs.negatives.sum(0))
    torch.testing.assert_close(plain.query, pairs.query)
    late = Transformation(warmup_epochs=2)
    assert late(pairs, 1) is pairs and late(pairs, 2) is not pairs


def test_interpolated_negatives_lie_inside_the_sphere_and_the_queue_stays():
    torch.manual_seed(0)
    method = FeatureTransformation(queue=32, **SMALL)
    before = method.queue.keys.clone()
    method.watching = True
    loss = method.loss({"image": torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)})
    loss.backward()
    shown = method.watched["pairs"]
    assert float(shown.negatives.norm(dim=1).max()) <= 1 + 1e-5 and not shown.query.requires_grad
    torch.testing.assert_close(method.queue.keys[8:], before[8:])
    original = unit(method.watched["key"])
    torch.testing.assert_close(method.queue.keys[:8], original)  # not the extrapolated ones
    torch.testing.assert_close(shown.query + shown.key, unit(method.watched["query"]) + original)


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "info_nce", "clip_loss"])
def test_in_batch_objectives_contrast_the_extrapolated_pairs(name):
    z1, z2 = rows(6, 8) * 3, rows(6, 8, seed=1)
    objective, share = contrast.objective(name), torch.tensor(1.25)
    found = transform(Pairs.under(objective, z1, z2), share)
    q, k = unit(z1), unit(z2)
    there, back = 1.25 * q - 0.25 * k, 1.25 * k - 0.25 * q
    expected = objective(there, back, temperature=0.5, normalize=False)
    torch.testing.assert_close(found.loss(objective, temperature=0.5), expected)
    torch.manual_seed(0)
    assert Transformation()(Pairs.under(objective, z1, z2)).negatives is None


def test_given_negatives_and_groups_keep_their_places():
    query, key, more, own = rows(4, 8), rows(6, 8, seed=1), 2 * rows(4, 8, seed=2), rows(4, 3, 8, seed=3)
    pairs = Pairs(query, key, hard_negatives=2 * own)
    found = transform(pairs, torch.tensor(1.5))
    torch.testing.assert_close(found.key[4:], key[4:])
    torch.testing.assert_close(found.hard_negatives, own)
    groups = transform(pairs.with_queries(more, apart=True), torch.tensor(1.5)).split()
    for group, other in zip(groups, (query, more), strict=True):
        alone = transform(Pairs(other, key), torch.tensor(1.5))
        torch.testing.assert_close(group.query, alone.query)
        torch.testing.assert_close(group.key, alone.key)


def test_what_it_cannot_do_is_refused_with_a_reason():
    images = {"image": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)}
    with pytest.raises(InputError, match="only the negatives of a queue are interpolated"):
        cp.SimCLR(**SMALL, mixing=(Transformation(target="neg"),)).loss(images)
    with pytest.raises(InputError, match="Transformation works on negatives, and SimSiam has none"):
        Mixed([Transformation()], 16, "SimSiam", repels=False)
    for later in (HardMixing(), Hallucination(), Transformation()):
        with pytest.raises(InputError, match=f"where {type(later).__name__} needs them: put it last"):
            cp.MoCo(queue=16, **SMALL, mixing=(Transformation(), later))
    with pytest.raises(InputError, match="put it last"):
        MoCHi(queue=16, mixing=(Transformation(),), **SMALL)
    with pytest.raises(InputError, match="target is one of posneg, pos, neg"):
        Transformation(target="positive")
    with pytest.raises(InputError, match="positive alphas"):
        Transformation(positive_alpha=0.0)


def test_after_hard_mixing_the_mixtures_are_those_of_the_sphere():
    pairs, part = queue_pairs(), HardMixing(8, 4, 2, 0)
    torch.manual_seed(0)
    alone = part(pairs)
    torch.manual_seed(0)
    both = Mixed([part, Transformation()], 8, "MoCo")(pairs)
    torch.testing.assert_close(both.hard_negatives, alone.hard_negatives)
    assert not both.normalize and math.isfinite(float(both.loss(contrast.info_nce, temperature=0.2)))


def test_the_method_is_moco_with_the_part():
    assert NAMED["feature-transformation"] == Transformation()
    assert experiment("simclr", mixing="feature-transformation").model["mixing"] == [Transformation()]
    batch = {"image": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)}
    losses = []
    for build in (
        lambda: FeatureTransformation(queue=32, **SMALL),
        lambda: cp.MoCo(queue=32, mixing=(Transformation(),), **SMALL),
        lambda: cp.MoCo(queue=32, **SMALL),
    ):
        torch.manual_seed(0)
        method = build()
        torch.manual_seed(1)
        losses.append(float(method.loss(batch).detach()))
    assert losses[0] == losses[1] > losses[2]  # harder positives
    part = FeatureTransformation(target="pos", warmup_epochs=3, queue=8, mixing=(HardMixing(),), **SMALL).mixing.parts
    assert part == [HardMixing(), Transformation("pos", warmup_epochs=3)]
