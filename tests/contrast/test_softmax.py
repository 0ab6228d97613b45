"""The softmax family against its plain definitions: values and every gradient, then the identities of the papers."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from counterpoint import contrast
from counterpoint.contrast import Listed, Mask, Same, clip_loss, coupling, dcl, dclw, info_nce, nt_xent, sup_con, unit
from counterpoint.errors import InputError

TEMPERATURES = [0.005, 0.05, 0.1, 1.0, 10.0]
HALVES = [torch.bfloat16, torch.float16]
PAIRED = {"info_nce": info_nce, "nt_xent": nt_xent, "dcl": dcl, "dclw": dclw, "clip_loss": clip_loss}


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(n: int, d: int = 16, noise: float = 1.0) -> dict[str, torch.Tensor]:
    x = data(n, d)
    return {"x": x, "y": x + noise * data(n, d, seed=1)}


def unlearned(n: int, d: int = 16) -> dict[str, torch.Tensor]:
    """Each row resembles the partner of another row: losses of size 1/T, for which a relative error has a meaning."""
    x = data(n, d)
    return {"x": x, "y": x.roll(1, 0) + data(n, d, seed=1) / 2}


def mean_error(result) -> float:
    return float((result.value.double().mean() - result.expected.mean()).abs() / result.expected.mean().abs())


# Values and gradients


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n", [2, 3, 8, 19])
def test_pair_objectives_are_exact(name, temperature, n, tiles, compare, reference):
    def ours(x, y, temperature):
        return PAIRED[name](x, y, temperature=temperature, reduction="none")

    def plain(x, y, temperature):
        return getattr(reference, name)(x, y, temperature=temperature)

    inputs = unlearned(n) | {"temperature": torch.tensor(temperature)}
    result = compare(ours, plain, inputs).close(torch.float32, temperature)
    assert mean_error(result) < 1e-5
    compare(ours, plain, inputs, torch.float64).close(torch.float64, temperature)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_inputs(name, normalize, dtype, small_tiles, compare, reference):
    """The loss of the rounded inputs is as exact as in float32, with or without normalisation."""

    def ours(x, y, temperature):
        return PAIRED[name](x, y, temperature=temperature, normalize=normalize, reduction="none")

    def plain(x, y, temperature):
        return getattr(reference, name)(x, y, temperature=temperature, normalize=normalize)

    inputs = {k: v if normalize else unit(v) for k, v in unlearned(11).items()} | {"temperature": torch.tensor(0.07)}
    result = compare(ours, plain, inputs, dtype).close(dtype, 0.07)
    assert mean_error(result) < 1e-5


def test_autocast_changes_nothing():
    """Under autocast every loss still multiplies and accumulates in float32, also the small products beside the kernel."""
    x, y = (v.float() for v in pairs(12).values())
    labels, mask = torch.arange(12) % 4, torch.eye(12, dtype=torch.bool) | (data(12, 12, seed=2) > 1)
    several = torch.stack([torch.arange(12), (torch.arange(12) + 3) % 12], dim=1)
    queue, hard = data(9, 16, seed=3).float(), data(12, 3, 16, seed=4).float()
    calls = [
        lambda: info_nce(x, y),
        lambda: info_nce(x, y, negatives=queue, hard_negatives=hard, label_smoothing=0.1),
        lambda: info_nce(x, y, positives=mask),
        lambda: info_nce(x, y, positives=several),
        lambda: info_nce(x, y, negatives=queue, in_batch=False),
        lambda: nt_xent(x, y),
        lambda: dcl(x, y),
        lambda: dclw(x, y, detach_weight=False),
        lambda: sup_con(x, labels),
        lambda: sup_con(x, labels, mean="inside"),
        lambda: clip_loss(x, y),
        lambda: contrast.sigmoid_loss(x, y),
        lambda: contrast.uniformity(x),
        lambda: contrast.alignment(x, y),
    ]
    for call in calls:
        expected = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = call()
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)


@pytest.mark.parametrize("name", PAIRED)
def test_identical_rows(name, small_tiles, compare, reference):
    """Duplicates among items and views: every similarity ties, and all of them count."""

    def ours(x, y):
        return PAIRED[name](x, y, temperature=0.05, reduction="none")

    def plain(x, y):
        return getattr(reference, name)(x, y, temperature=0.05)

    x = data(3, 16)[[0, 1, 0, 2, 0, 1, 2]]
    result = compare(ours, plain, {"x": x, "y": x.clone()}).close(torch.float32, 0.05)
    assert mean_error(result) < 1e-5
    everything_equal = data(1, 16).expand(6, 16).float()
    candidates = {"info_nce": 6, "clip_loss": 6, "nt_xent": 11}.get(name)
    if candidates:
        torch.testing.assert_close(
            PAIRED[name](everything_equal, everything_equal, temperature=0.005), torch.tensor(math.log(candidates)),
            rtol=0, atol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize("name", PAIRED)
def test_gradients_by_finite_differences(name, small_tiles):
    x, y = data(7, 3).requires_grad_(), data(7, 3, seed=1).requires_grad_()
    temperature = torch.tensor(0.4, dtype=torch.float64).requires_grad_()
    options = {"detach_weight": False} if name == "dclw" else {}
    assert torch.autograd.gradcheck(lambda x, y, t: PAIRED[name](x, y, temperature=t, **options), (x, y, temperature))


@pytest.mark.parametrize("name", PAIRED)
def test_reductions(name):
    x, y = pairs(6).values()
    rows = PAIRED[name](x, y, reduction="none")
    assert rows.shape == ((12,) if name in ("nt_xent", "dcl", "dclw") else (6,))
    torch.testing.assert_close(PAIRED[name](x, y, reduction="sum"), rows.sum())
    torch.testing.assert_close(PAIRED[name](x, y), rows.mean())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("one_way", [False, True])
def test_dcl_and_its_variants(weighted, detach, one_way, tiles, compare, reference):
    options = {"weighted": weighted, "detach_weight": detach, "one_way": one_way, "sigma": 0.3}

    def ours(x, y):
        return dcl(x, y, temperature=0.1, reduction="none", **options)

    def plain(x, y):
        return reference.dcl(x, y, temperature=0.1, **options)

    # An undetached weight multiplies the positive logit by up to N softmax weights / sigma: the bound at half the scale.
    compare(ours, plain, pairs(9)).close(torch.float32, 0.05 if weighted else 0.1)
    compare(ours, plain, pairs(9), torch.float64).close(torch.float64, 0.05 if weighted else 0.1)


@pytest.mark.parametrize("mean", ["outside", "inside"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("labels", [[0, 0], [5, -1, 5], [3, 1, 3, 3, 7, 1, 9, 3, 1, 3, 4], [2] * 9], ids=len)
def test_sup_con_is_exact(mean, temperature, labels, tiles, compare, reference):
    """With singletons, which have no positive, and with labels of any value and order."""
    labels = torch.tensor(labels)

    def ours(x, temperature):
        return sup_con(x, labels, temperature=temperature, mean=mean, reduction="none")

    def plain(x, temperature):
        return reference.sup_con(x, labels, temperature=temperature, mean=mean)

    inputs = {"x": data(len(labels), 16), "temperature": torch.tensor(temperature)}
    result = compare(ours, plain, inputs).close(torch.float32, temperature)
    if (
        float(result.expected.mean()) * 1e-5 > 2.0**-24 / temperature
    ):  # else 1e-5 is finer than float32 at logits of 1 / T
        assert mean_error(result) < 1e-5
    compare(ours, plain, inputs, torch.float64).close(torch.float64, temperature)


@pytest.mark.parametrize("mean", ["outside", "inside"])
def test_sup_con_singletons_are_left_out_of_the_mean(mean):
    x = data(7, 5).requires_grad_()
    labels = torch.tensor([0, 1, 0, 2, 1, 3, 0])
    rows = sup_con(x, labels, mean=mean, reduction="none")
    assert bool((rows[[3, 5]] == 0).all())
    torch.testing.assert_close(sup_con(x, labels, mean=mean), rows.sum() / 5)
    alone = sup_con(x, torch.arange(7), mean=mean)
    alone.backward()
    assert float(alone.detach()) == 0
    assert x.grad is not None and bool((x.grad == 0).all())
    assert float(sup_con(data(1, 5), torch.tensor([4]), mean=mean)) == 0
    assert torch.autograd.gradcheck(
        lambda x: sup_con(x, labels, mean=mean, temperature=0.4), x.detach().requires_grad_()
    )


def test_sup_con_takes_several_views():
    views, labels = data(5, 3, 8), torch.tensor([0, 1, 0, 2, 2])
    flat = views.transpose(0, 1).reshape(15, 8)
    torch.testing.assert_close(
        sup_con(views, labels, reduction="none"), sup_con(flat, labels.repeat(3), reduction="none")
    )


# Candidates and positives of info_nce


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("extra", [(), ("negatives",), ("hard_negatives",), ("negatives", "hard_negatives")])
def test_every_kind_of_candidate(temperature, decoupled, in_batch, extra, tiles, compare, reference):
    if decoupled and not in_batch and not extra:
        return
    rules = {"decoupled": decoupled, "in_batch": in_batch}

    def ours(**x):
        return info_nce(**x, **rules, reduction="none")

    def plain(**x):
        return reference.info_nce(**x, **rules)

    inputs = {"query": data(9, 16), "key": data(9, 16, seed=1), "temperature": torch.tensor(temperature)}
    inputs |= {
        name: {"negatives": data(13, 16, seed=2), "hard_negatives": data(9, 3, 16, seed=3)}[name] for name in extra
    }
    compare(ours, plain, inputs).close(torch.float32, temperature)
    compare(ours, plain, inputs, torch.float64).close(torch.float64, temperature)
    compare(ours, plain, inputs, torch.bfloat16).close(torch.bfloat16, temperature)


@pytest.mark.parametrize("rules", [{}, {"symmetric": True}, {"symmetric": True, "decoupled": True}], ids=str)
def test_one_temperature_per_query(rules, tiles, compare, reference):
    def ours(query, key, temperature):
        return info_nce(query, key, temperature=temperature, reduction="none", **rules)

    def plain(query, key, temperature):
        return reference.info_nce(query, key, temperature=temperature, **rules)

    temperature = torch.linspace(0.05, 2, 9, dtype=torch.float64)
    inputs = {"query": data(9, 16), "key": data(9, 16, seed=1), "temperature": temperature}
    compare(ours, plain, inputs).close(torch.float32, 0.05)
    compare(ours, plain, inputs, torch.float64).close(torch.float64, 0.05)


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("form", ["one", "padded", "mask"])
def test_several_positives(in_batch, decoupled, form, tiles, compare, reference):
    """Given as rows, as padded lists and as a matrix; more keys than queries."""
    lists = {"one": [[3], [0], [9], [5], [5]]}.get(form, [[3], [0, 7], [9, 1, 4], [5, 6], [5]])
    if form == "one":
        positives = torch.tensor(lists)[:, 0]
    elif form == "padded":
        positives = torch.tensor([row + [-1] * (3 - len(row)) for row in lists]).flip(1)
    else:
        positives = torch.tensor([[j in row for j in range(11)] for row in lists])
    queue = data(6, 16, seed=5)
    rules = {"in_batch": in_batch, "decoupled": decoupled, "temperature": 0.2}

    def ours(query, key, negatives):
        return info_nce(query, key, negatives=negatives, positives=positives, reduction="none", **rules)

    def plain(query, key, negatives):
        return reference.info_nce(query, key, negatives=negatives, positives=lists, **rules)

    inputs = {"query": data(5, 16), "key": data(11, 16, seed=1), "negatives": queue}
    compare(ours, plain, inputs).close(torch.float32, 0.2)
    compare(ours, plain, inputs, torch.float64).close(torch.float64, 0.2)


@pytest.mark.parametrize(
    "rules", [{}, {"symmetric": True}, {"decoupled": True}, {"symmetric": True, "decoupled": True}]
)
@pytest.mark.parametrize("form", ["matrix", "mask", "same", "listed"])
def test_pairs_to_ignore(rules, form, tiles, compare, reference):
    """Positives always count; a relation that is not symmetric is turned round for the keys' own direction."""
    n = 11
    rows, columns = torch.arange(n) % 3, torch.arange(n) % 4
    index = torch.stack([(torch.arange(n) * 2) % n, torch.arange(n)], dim=1)
    matrix = {
        "same": rows[:, None] == columns[None],
        "listed": torch.zeros(n, n, dtype=torch.bool).scatter(1, index, True),
    }.get(form, data(n, n, seed=7) > 0.3)
    given = {"matrix": matrix, "mask": Mask(matrix), "same": Same(rows, columns), "listed": Listed(index)}[form]

    def ours(query, key):
        return info_nce(query, key, temperature=0.2, ignore=given, reduction="none", **rules)

    def plain(query, key):
        return reference.info_nce(query, key, temperature=0.2, ignore=matrix, **rules)

    inputs = {"query": data(n, 16), "key": data(n, 16, seed=1)}
    compare(ours, plain, inputs).close(torch.float32, 0.2)
    compare(ours, plain, inputs, torch.float64).close(torch.float64, 0.2)


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_label_smoothing_is_torchs_with_queue_and_hard_negatives_as_classes(in_batch, smoothing, small_tiles):
    n = 9
    arrays = [data(n, 8), data(n, 8, seed=1), data(6, 8, seed=2), data(n, 2, 8, seed=3)]
    leaves = [x.requires_grad_() for x in arrays]
    query, key, queue, hard = (unit(x) for x in leaves)
    own = query @ key.T if in_batch else (query * key).sum(1, keepdim=True)
    logits = torch.cat([own, query @ queue.T, torch.einsum("nd,nsd->ns", query, hard)], dim=1) / 0.2
    target = torch.arange(n) if in_batch else torch.zeros(n, dtype=torch.int64)
    expected = functional.cross_entropy(logits, target, label_smoothing=smoothing)
    value = info_nce(
        leaves[0], leaves[1], temperature=0.2, negatives=leaves[2], hard_negatives=leaves[3], in_batch=in_batch,
        label_smoothing=smoothing,
    )  # fmt: skip
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_label_smoothing_counts_each_querys_own_candidates(compare, reference):
    """Without the batch, a query with two positives has one candidate more than a query with one."""
    lists = [[0], [1, 3], [2, 4, 5]]
    positives = torch.tensor([[0, -1, -1], [1, 3, -1], [2, 4, 5]])
    rules = {"temperature": 0.3, "in_batch": False, "label_smoothing": 0.2}

    def ours(query, key, negatives):
        return info_nce(query, key, negatives=negatives, positives=positives, reduction="none", **rules)

    def plain(query, key, negatives):
        return reference.info_nce(query, key, negatives=negatives, positives=lists, **rules)

    inputs = {"query": data(3, 8), "key": data(6, 8, seed=1), "negatives": data(4, 8, seed=2)}
    compare(ours, plain, inputs).close(torch.float32, 0.3)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_clip_loss_is_the_mean_of_two_cross_entropies(n, smoothing, tiles, compare, reference):
    def ours(x, y, temperature):
        return clip_loss(x, y, temperature=temperature, label_smoothing=smoothing, reduction="none")

    def plain(x, y, temperature):
        return reference.clip_loss(x, y, temperature=temperature, label_smoothing=smoothing)

    compare(ours, plain, pairs(n) | {"temperature": torch.tensor(0.07)}).close(torch.float32, 0.07)


def test_moco_is_cross_entropy_over_positive_and_queue():
    query, key, queue = unit(data(6, 8)), unit(data(6, 8, seed=1)), unit(data(20, 8, seed=2))
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / 0.07
    expected = functional.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(info_nce(query, key, negatives=queue, in_batch=False, temperature=0.07), expected)


def test_one_pair_has_nothing_to_choose_from():
    x = data(1, 5).requires_grad_()
    value = info_nce(x, data(1, 5, seed=1))
    value.backward()
    torch.testing.assert_close(value.detach(), torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(x.grad, torch.zeros(1, 5, dtype=torch.float64))


# Memory


def saved(call) -> list[int]:
    """Elements of every tensor that autograd keeps for the backward pass of `call`, and of the largest it makes there."""
    sizes: list[int] = []

    def note(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = call()
    loss.backward()
    return sizes


N, D = 2048, 8
FAR_NEGATIVES = torch.randn(N, D, generator=torch.Generator().manual_seed(9))
EVEN = torch.arange(N) % 7
LOSSES = {
    "info_nce": lambda x, y: info_nce(x, y),
    "info_nce symmetric": lambda x, y: info_nce(x, y, symmetric=True),
    "info_nce queue smoothing": lambda x, y: info_nce(x, y, negatives=FAR_NEGATIVES, label_smoothing=0.1),
    "info_nce ignore": lambda x, y: info_nce(x, y, ignore=Same(EVEN, EVEN)),
    "info_nce per-row temperature": lambda x, y: info_nce(x, y, temperature=torch.full((N,), 0.1)),
    "nt_xent": lambda x, y: nt_xent(x, y),
    "nt_xent cold": lambda x, y: nt_xent(x, y, temperature=0.01),
    "dcl": lambda x, y: dcl(x, y),
    "dclw": lambda x, y: dclw(x, y, detach_weight=False),
    "sup_con": lambda x, y: sup_con(torch.cat([x, y]), EVEN.repeat(2)),
    "sup_con inside": lambda x, y: sup_con(torch.cat([x, y]), EVEN.repeat(2), mean="inside"),
    "clip_loss": lambda x, y: clip_loss(x, y),
    "sigmoid_loss": lambda x, y: contrast.sigmoid_loss(x, y),
    "uniformity": lambda x, y: contrast.uniformity(torch.cat([x, y])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_no_matrix_is_kept_for_the_backward_pass(name, monkeypatch):
    from counterpoint.contrast.kernels import blocked

    monkeypatch.setattr(blocked, "KEPT", 0)  # what a batch of any size costs; small ones may keep 16 MB
    x, y = data(N, D).float().requires_grad_(), data(N, D, seed=1).float().requires_grad_()
    sizes = saved(lambda: LOSSES[name](x, y))
    rows = 2 * N + (N if "queue" in name else 0)
    most = rows * D + N  # gradients that are made ahead lie in one tensor, with a number for each row
    assert max(sizes) <= most, f"a tensor of {max(sizes)} elements is kept; both inputs have {2 * N * D}"
    assert sum(sizes) <= 30 * rows * D  # N x N would be 4.2 million, this is 1


def test_the_memory_test_sees_a_matrix():
    x, y = data(N, D).float().requires_grad_(), data(N, D, seed=1).float().requires_grad_()
    assert max(saved(lambda: functional.cross_entropy(unit(x) @ unit(y).T / 0.1, torch.arange(N)))) >= N * N


@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "clip_loss", "sigmoid_loss"])
def test_no_matrix_is_made_on_the_way(name, monkeypatch):
    """Every result of every operation, forward and backward, stays below a tile or both inputs in size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from counterpoint.contrast.kernels import blocked

    monkeypatch.setitem(blocked.TILE, "cpu", (64, 96))
    monkeypatch.setattr(blocked, "KEPT", 0)
    monkeypatch.setattr(blocked, "BAND", 64 * 96)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    n, d = 512, 8
    x, y = data(n, d).float().requires_grad_(), data(n, d, seed=1).float().requires_grad_()
    with Watch():
        LOSSES[name](x, y).backward()
    assert 0 < largest <= max((2 * d + 1) * n, 64 * 96)  # as above


# Identities


def test_nt_xents_term_is_the_coupling_times_dcls_term():
    """Card 28: for every single anchor, the whole gradient (anchor, partner, all negatives) shrinks by q_i."""
    n = 6
    x, y = (v.requires_grad_() for v in pairs(n, 8, noise=0.5).values())
    q = coupling(x, y, temperature=0.3)
    assert q.shape == (2 * n,) and not q.requires_grad
    assert bool(((q > 0) & (q < 1)).all())
    ours = nt_xent(x, y, temperature=0.3, reduction="none")
    decoupled = dcl(x, y, temperature=0.3, reduction="none")
    for i in range(2 * n):
        throttled = torch.cat(torch.autograd.grad(ours[i], (x, y), retain_graph=True))
        free = torch.cat(torch.autograd.grad(decoupled[i], (x, y), retain_graph=True))
        torch.testing.assert_close(throttled, q[i] * free, rtol=1e-9, atol=1e-12)


def test_coupling_vanishes_for_easy_positives_and_small_batches():
    easy, hard = coupling(*pairs(8, noise=0.1).values()), coupling(*pairs(8, noise=3.0).values())
    assert float(easy.mean()) < 0.02 < 0.5 < float(hard.mean())
    batches = [float(coupling(*pairs(n, noise=1.0).values(), temperature=0.5).mean()) for n in (4, 16, 64, 256)]
    assert all(small < large for small, large in pairwise(batches))


def test_sup_con_with_one_label_per_pair_is_nt_xent():
    x, y = (v.requires_grad_() for v in pairs(7).values())
    labels = torch.tensor([4, 9, 1, 0, -3, 22, 5])
    expected = nt_xent(x, y, temperature=0.2)
    for mean in ("outside", "inside"):
        value = sup_con(torch.stack([x, y], dim=1), labels, temperature=0.2, mean=mean)
        torch.testing.assert_close(value, expected)
        for a, b in zip(
            torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (x, y), retain_graph=True), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_sup_con_inside_is_never_above_outside():
    """Jensen's inequality (Khosla et al., section 3.2.2)."""
    for seed in range(10):
        x, labels = data(12, 6, seed=seed), torch.arange(12) % 3
        outside = sup_con(x, labels, reduction="none")
        inside = sup_con(x, labels, mean="inside", reduction="none")
        assert bool((inside <= outside + 1e-12).all())


def test_clip_loss_averages_the_two_directions():
    x, y = pairs(9).values()
    both = (info_nce(x, y, temperature=0.07) + info_nce(y, x, temperature=0.07)) / 2
    torch.testing.assert_close(clip_loss(x, y), both)
    torch.testing.assert_close(info_nce(x, y, temperature=0.07, symmetric=True), both)


def test_dcl_is_nt_xent_without_the_positive():
    """exp(nt_xent) = 1 + exp(dcl): the positive adds exactly one to the ratio of sums."""
    x, y = pairs(9).values()
    rows = torch.log1p(dcl(x, y, temperature=0.2, reduction="none").exp())
    torch.testing.assert_close(nt_xent(x, y, temperature=0.2, reduction="none"), rows)


def test_dcl_weights_average_to_one():
    """DCLW - DCL = (1 - w_i) s_i / T per anchor; so w_i is recovered from outside."""
    x, y = pairs(9).values()
    similarity = (unit(x) * unit(y)).sum(1)
    difference = dcl(x, y, temperature=0.2, reduction="none") - dclw(x, y, temperature=0.2, sigma=0.3, reduction="none")
    weight = 1 + difference * 0.2 / similarity.repeat(2)
    torch.testing.assert_close(weight[:9], weight[9:])
    torch.testing.assert_close(weight[:9].mean(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(weight[:9], 2 - 9 * torch.softmax(similarity / 0.3, dim=0))
    assert int(weight[:9].argmax()) == int(similarity.argmin()), "the hardest positive weighs most"


@pytest.mark.parametrize("name", PAIRED)
def test_symmetries(name, small_tiles):
    """Swapping the views, permuting the pairs, scaling any row, rotating everything: the loss stays."""
    generator = torch.Generator().manual_seed(5)
    for seed in range(5):
        n = 3 + 3 * seed
        x, y = data(n, 6, seed=seed), data(n, 6, seed=seed + 50)
        loss = PAIRED[name]
        rows = loss(x, y, reduction="none")
        order = torch.randperm(n, generator=generator)
        permuted = loss(x[order], y[order], reduction="none")
        halves = (order, order + n) if len(rows) == 2 * n else (order,)
        torch.testing.assert_close(permuted, rows[torch.cat(halves)])
        stretch = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 10 + 0.1
        torch.testing.assert_close(loss(x * stretch, y / stretch, reduction="none"), rows)
        turn = torch.linalg.qr(data(6, 6, seed=seed + 99)).Q
        torch.testing.assert_close(loss(x @ turn, y @ turn, reduction="none"), rows)
        if name != "info_nce":
            torch.testing.assert_close(loss(y, x), loss(x, y))


@pytest.mark.parametrize("name", PAIRED)
def test_normalising_twice_or_outside_is_the_same(name):
    x, y = unlearned(6).values()
    torch.testing.assert_close(PAIRED[name](unit(x), unit(y), normalize=False), PAIRED[name](x, y))
    assert not torch.isclose(PAIRED[name](3 * x, y, normalize=False), PAIRED[name](x, y, normalize=False))


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_aligned_orthogonal_pairs_have_a_closed_form(temperature):
    """n pairs on n axes: one similarity of 1, all others 0."""
    n = 8
    x = torch.eye(n, dtype=torch.float64)
    near = math.exp(1 / temperature)
    expected = {
        "info_nce": math.log(near + n - 1) - 1 / temperature,
        "clip_loss": math.log(near + n - 1) - 1 / temperature,
        "nt_xent": math.log(near + 2 * n - 2) - 1 / temperature,
        "dcl": math.log(2 * n - 2) - 1 / temperature,
        "dclw": math.log(2 * n - 2) - 1 / temperature,
    }
    for name, value in expected.items():
        ours = PAIRED[name](x, x, temperature=temperature)
        torch.testing.assert_close(ours, torch.tensor(value, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_cold_limit_is_the_margin_to_the_nearest_other():
    """T * loss tends to (best similarity - own similarity) as T goes to 0, and to the DCL margin without the positive."""
    x, y = pairs(9).values()
    similarity = unit(x) @ unit(y).T
    own = similarity.diagonal()
    best = similarity.amax(1)
    others = similarity.masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf).amax(1)
    for cold in (1e-3, 1e-4):
        torch.testing.assert_close(
            cold * info_nce(x, y, temperature=cold, reduction="none"), best - own, rtol=0, atol=cold * math.log(9)
        )
        torch.testing.assert_close(
            cold * info_nce(x, y, temperature=cold, decoupled=True, reduction="none"), others - own, rtol=0,
            atol=cold * math.log(9),
        )  # fmt: skip


@pytest.mark.parametrize("name", PAIRED)
def test_easy_positives_keep_their_small_gradient(name, compare, reference):
    """A loss near 0 is a difference of two logits of size 1/T: its absolute error stays that of the logits."""

    def ours(x, y):
        return PAIRED[name](x, y, temperature=0.05, reduction="none")

    def plain(x, y):
        return getattr(reference, name)(x, y, temperature=0.05)

    result = compare(ours, plain, pairs(9, noise=0.02)).close(torch.float32, 0.05)
    assert name in ("dcl", "dclw") or float(result.expected.mean()) < 1e-2
    if name in ("dcl", "dclw"):
        assert float(result.expected.mean()) < -5, "DCL has no lower bound of 0"


@pytest.mark.parametrize("name", PAIRED)
def test_a_row_of_zeros_is_harmless(name):
    """A dead encoder sends zeros: finite loss, no gradient through them, none blown up elsewhere."""
    x, y = (v.float() for v in pairs(6).values())
    x[2] = 0
    x.requires_grad_()
    loss = PAIRED[name](x, y)
    loss.backward()
    assert bool(loss.isfinite())
    assert x.grad is not None and bool((x.grad[2] == 0).all())
    assert float(x.grad.abs().max()) < 100


@pytest.mark.parametrize("name", PAIRED)
def test_nan_is_not_hidden_where_nobody_looks_for_it(name, monkeypatch):
    """A GPU would have to wait for the look, so there it comes out as it went in."""
    x, y = pairs(6).values()
    x[3, 1] = torch.nan
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert bool(PAIRED[name](x, y).isnan())


def test_unit_rows():
    x = data(5, 3).half()
    assert unit(x).dtype == torch.float32
    torch.testing.assert_close(unit(x).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(unit(data(5, 3)), functional.normalize(data(5, 3), dim=1))
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_objectives_by_name():
    assert contrast.objective("dcl") is dcl
    assert contrast.objective(dcl) is dcl
    with pytest.raises(InputError, match="nt_xent"):
        contrast.objective("nt_xnet")
    x, y = pairs(4).values()
    for name in contrast.PAIR_OBJECTIVES:
        assert contrast.objective(name)(x, y, temperature=0.2).shape == ()


# Bad input


X, Y = torch.randn(4, 3), torch.randn(4, 3)


@pytest.mark.parametrize("loss", [nt_xent, dcl, dclw])
def test_a_batch_of_one(loss):
    with pytest.raises(InputError, match="at least 2"):
        loss(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(InputError, match="at least 2"):
        info_nce(torch.ones(1, 3), torch.ones(1, 3), decoupled=True)
    with pytest.raises(InputError, match="at least 2"):
        info_nce(torch.ones(1, 3), torch.ones(1, 3), decoupled=True, symmetric=True)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: info_nce(X[0], Y), "query"),
        (lambda: info_nce(X, Y.long()), "key"),
        (lambda: info_nce(X.tolist(), Y), "query"),
        (lambda: info_nce(X[:0], Y[:0]), "query is empty"),
        (lambda: info_nce(X, Y[:, :2]), "key has 2 dimensions"),
        (lambda: info_nce(X, Y[:3]), "positives="),
        (lambda: info_nce(X, Y, temperature=0), "temperature"),
        (lambda: info_nce(X, Y, temperature=-1.0), "temperature"),
        (lambda: info_nce(X, Y, temperature=float("nan")), "temperature"),
        (lambda: info_nce(X, Y, temperature=torch.ones(3)), "temperature"),
        (lambda: info_nce(X, Y, reduction="avg"), "reduction"),
        (lambda: info_nce(X, Y, negatives=torch.randn(5, 2)), "negatives"),
        (lambda: info_nce(X, Y, negatives=torch.randn(3)), "negatives"),
        (lambda: info_nce(X, Y, hard_negatives=torch.randn(1, 2, 3)), "hard_negatives"),
        (lambda: info_nce(X, Y, hard_negatives=torch.randn(4, 3)), "hard_negatives"),
        (lambda: info_nce(X, Y, hard_negatives=torch.randn(4, 2, 5)), "hard_negatives"),
        (lambda: info_nce(X, Y, positives=torch.tensor([0, 1, 2])), "positives"),
        (lambda: info_nce(X, Y, positives=torch.tensor([0, 1, 2, 4])), "positives"),
        (lambda: info_nce(X, Y, positives=torch.tensor([0, 1, 2, -1])), "positives"),
        (lambda: info_nce(X, Y, positives=torch.tensor([0.0, 1, 2, 3])), "positives"),
        (lambda: info_nce(X, Y, positives=torch.zeros(4, 1, 1, dtype=torch.int64)), "positives"),
        (lambda: info_nce(X, Y, positives=torch.zeros(4, 4, dtype=torch.bool)), "positives"),
        (lambda: info_nce(X, Y, positives=torch.ones(4, 5, dtype=torch.bool)), "positives"),
        (lambda: info_nce(X, Y, ignore=torch.zeros(4, 1, dtype=torch.bool)), "ignore"),
        (lambda: info_nce(X, Y, ignore=torch.zeros(5, 4, dtype=torch.bool)), "ignore"),
        (lambda: info_nce(X, Y, ignore=torch.zeros(4, 4, dtype=torch.bool), label_smoothing=0.1), "label_smoothing"),
        (lambda: info_nce(X, Y, symmetric=True, negatives=Y), "symmetric"),
        (lambda: info_nce(X, Y, symmetric=True, in_batch=False), "symmetric"),
        (lambda: info_nce(X, Y[:3], symmetric=True), "4 and 3"),
        (lambda: info_nce(X, Y, in_batch=False, decoupled=True), "no negatives"),
        (lambda: info_nce(X, Y, decoupled=True, ignore=torch.ones(4, 4, dtype=torch.bool)), "ignore"),
        (lambda: info_nce(X, Y, decoupled=True, positives=torch.ones(4, 4, dtype=torch.bool)), "positives"),
        (lambda: clip_loss(X, Y[:3]), "4 and 3"),
        (lambda: nt_xent(X, Y[:3]), "z1 and z2"),
        (lambda: nt_xent(X, Y[:, :2]), "z1 and z2"),
        (lambda: nt_xent(X.int(), Y), "z1"),
        (lambda: nt_xent(X, Y[0]), "z2"),
        (lambda: nt_xent(X, Y, temperature=torch.ones(4)), "temperature"),
        (lambda: dcl(X, Y, temperature=0.0), "temperature"),
        (lambda: dcl(X, Y, reduction="nothing"), "reduction"),
        (lambda: sup_con(X, torch.arange(3)), "labels"),
        (lambda: sup_con(X, torch.rand(4)), "labels"),
        (lambda: sup_con(X, [0, 1, 2, 3]), "labels"),
        (lambda: sup_con(X, torch.arange(4), mean="middle"), "mean"),
        (lambda: sup_con(X, torch.arange(4), temperature=0.0), "temperature"),
        (lambda: sup_con(X.int(), torch.arange(4)), "features"),
        (lambda: sup_con(X[None, None], torch.arange(1)), "features"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(InputError, match=named):
        call()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "dcl", "clip_loss", "sigmoid_loss"])
def test_values_that_are_no_numbers_are_named(name, value):
    x, y = data(5, 4), data(5, 4, seed=1)
    y[3, 1] = value
    argument = {"info_nce": "key", "clip_loss": "text", "sigmoid_loss": "text"}.get(name, "z2")
    with pytest.raises(InputError, match=f"{argument} holds NaN or infinite values in 1 of its 5 rows"):
        LOSSES[name](x, y)
