"""Contrast for regression: the closed form is the explicit mixtures, which are what the formula says; anchors alone move."""

import pytest
import torch

from counterpoint.contrast import regression, sup_con, unit
from counterpoint.contrast.regression import TRIPLES, distance_weight, mixtures, supremix, weighted_sup_con
from counterpoint.errors import InputError

WEIGHTS = ["L1_inv", "L2_inv", "L1", "L2", "none"]


def batch(items: int = 6, seed: int = 0, levels: int = 7):
    """Two views of each item in double precision, on the sphere, and a label for every row."""
    generator = torch.Generator().manual_seed(seed)
    z = unit(torch.randn(2 * items, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    return z, torch.randint(0, levels, (items,), generator=generator).double().repeat(2)


def by_hand(z, t, temperature, weight, share, window, shift):
    """The card's formula, anchor by anchor and mixture by mixture."""
    constant, losses = z.detach(), []
    for i in range(len(z)):
        real = [j for j in range(len(z)) if j != i]
        rows = [(z[i] @ z[j], distance_weight(t[i] - t[j], weight), bool(t[i] == t[j])) for j in real]
        mixed = []
        for k in range(len(z)) if share is not None else ():
            if t[k] != t[i]:
                m = share[i, k] * constant[i] + (1 - share[i, k]) * constant[k]
                d = t[i] - (share[i, k] * t[i] + (1 - share[i, k]) * t[k])
                mixed.append((z[i] @ m, distance_weight(d, weight, shifted=shift == "separate"), False))
        for j in real if window else ():
            for k in real:
                if 0 < t[i] - t[j] < window and 0 < t[k] - t[i] < window:
                    a = (t[k] - t[i]) / (t[k] - t[j])
                    w = distance_weight(torch.zeros_like(t[i]), weight, shifted=shift == "separate")
                    mixed.append((z[i] @ (a * constant[j] + (1 - a) * constant[k]), w, True))
        blocks = []
        for block, extra in ((rows, [z[i] @ constant[i]]), (mixed, [])):
            logits = [x[0] / temperature for x in block]
            top = (
                max([*map(float, torch.stack([*logits, *(x / temperature for x in extra)]).detach())]) if block else 0.0
            )
            blocks += [
                (x - (top if shift == "separate" else 0), w, p) for x, (_, w, p) in zip(logits, block, strict=True)
            ]
        positives = [x for x, _, positive in blocks if positive]
        if positives:
            total = torch.stack([w * x.exp() for x, w, _ in blocks]).sum()
            losses.append(total.log() - torch.stack(positives).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("shift", ["joint", "separate"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("mixed", "window"), [(True, 3.0), (True, None), (False, 3.0), (False, None)])
def test_the_closed_form_is_the_formula(weight, shift, mixed, window):
    z, t = batch()
    share = torch.rand(12, 12, dtype=torch.float64) if mixed else None
    options = {"temperature": 0.4, "weight": weight, "share": share, "window": window, "shift": shift}
    found, expected = supremix(z, t, normalize=False, **options), by_hand(z, t, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (found, expected)))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_closed_form_is_the_loss_of_the_explicit_mixtures(weight):
    """Only the shift "joint": the other looks at unused places too, which the closed form does not have."""
    z, t = batch(seed=3)
    share = torch.rand(12, 12, dtype=torch.float64)
    made = mixtures(z.detach(), t, share[t[:, None] != t], window=3.0)
    mask = torch.full((12, 400), -1)
    own, labels = torch.full((12, 400, 5), 7.0).double(), torch.full((12, 400), 99.0).double()
    filled = [0] * 12
    for index, rows, values, kind in (
        (made.negative_index, made.negatives, made.negative_labels, 0),
        (made.positive_index, made.positives, made.positive_labels, 1),
    ):
        for at, row, value in zip(index[:, 0].tolist(), rows, values, strict=True):
            mask[at, filled[at]], own[at, filled[at]], labels[at, filled[at]] = kind, row, value
            filled[at] += 1
    options = {"temperature": 0.4, "weight": weight, "normalize": False}
    explicit = weighted_sup_con(z, t, mixtures=own, mask=mask, mixture_labels=labels, **options)
    closed = supremix(z, t, share=share, window=3.0, **options)
    torch.testing.assert_close(closed, explicit)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (closed, explicit)))


def test_mixtures_have_the_labels_they_promise():
    z, t = batch()
    share = torch.rand(int((t[:, None] != t).sum()), dtype=torch.float64)
    made = mixtures(z, t, share, window=3.0)
    i, j, k = made.positive_index.T
    assert bool(((t[j] < t[i]) & (t[i] < t[k]) & (t[k] - t[i] < 3) & (t[i] - t[j] < 3)).all()) and len(i) > 10
    # on embeddings that are a linear function of the label, a mixed positive is the anchor itself
    line = torch.stack([1 + 2 * t, 3 - t], 1)
    torch.testing.assert_close(mixtures(line, t, share, window=3.0).positives, line[i])
    torch.testing.assert_close(made.positive_labels, t[i])
    listed = [row for index in (made.negative_index, made.positive_index) for row in [index.tolist()]]
    assert all(rows == sorted(rows) for rows in listed)
    assert bool((t[made.negative_index[:, 0]] != t[made.negative_index[:, 1]]).all())
    with pytest.raises(InputError, match="pairs have different labels"):
        mixtures(z, t, share[1:], window=3.0)


def test_without_mixtures_and_weights_it_is_sup_con():
    z, t = batch()
    found = supremix(3 * z, t, temperature=0.2, weight="none", share=None, window=None)
    torch.testing.assert_close(found, sup_con(z, t.long(), temperature=0.2))
    assert found == weighted_sup_con(3 * z, t, temperature=0.2, weight="none")


def test_distance_weights_push_far_labels_harder():
    z = unit(torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    t = torch.tensor([0.0, 0.0, 1.0, 10.0])
    z[2:] = z[2]  # equally similar, unequally far
    z.requires_grad_()
    for weight, order in (("L1_inv", 1), ("L2_inv", 1), ("L1", -1), ("L2", -1), ("none", 0)):
        loss = weighted_sup_con(z, t, weight=weight, normalize=False, reduction="none")[0]
        pull = (torch.autograd.grad(loss, z)[0] @ z[0].detach())[2:]
        assert torch.sign(pull[1] - pull[0]).item() == order and bool((pull > 0).all())


def test_only_the_anchor_moves_by_its_mixtures():
    """Row 2 lies outside every pair of rows but may be mixed: without the constants it would get a gradient."""
    z = unit(torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).requires_grad_()
    t = torch.tensor([0.0, 1.0, 2.0])
    share = torch.full((3, 3), 0.2).double()
    rows = supremix(z, t, share=share, window=3.0, normalize=False, reduction="none")
    real = weighted_sup_con(z, t, normalize=False, reduction="none")
    assert (
        rows[0] == rows[2] == 0 == real[1]
    )  # a single row has no positive, but between two others there is a mixed one
    gradient = torch.autograd.grad(rows[1], z)[0]
    expected = by_hand(z, t, 0.5, "L1_inv", share, 3.0, "joint")
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])


def test_a_mixed_positive_holds_the_anchor_half_way():
    """An anchor nearer to the row below than to the one above moves to the one above."""
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, -0.8]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 2.0, 1.0])
    loss = supremix(z, t, share=None, window=3.0, weight="none", normalize=False, reduction="none")[2]
    step = -torch.autograd.grad(loss, z)[0][2]
    assert step[1] > 0 > step[0]


def test_the_window_and_equal_labels_leave_nothing_to_mix():
    z, t = batch()
    same = torch.ones(12)
    for options in ({"window": 1.0, "share": None}, {"window": None, "share": None}):
        assert supremix(z, t, **options) == weighted_sup_con(z, t)  # whole labels: nobody within less than 1
    for shift in ("joint", "separate"):
        loss = supremix(z, same, share=(2.0, 8.0), window=5.0, shift=shift)
        torch.testing.assert_close(loss, weighted_sup_con(z, same, shift=shift))
        assert bool(torch.autograd.grad(loss, z)[0].isfinite().all())


def test_pieces_and_places_make_no_difference(monkeypatch):
    z, t = batch(items=20, levels=12)
    share = torch.rand(40, 40, dtype=torch.float64)
    whole = supremix(z, t, share=share)
    monkeypatch.setitem(TRIPLES, "cpu", 1)
    monkeypatch.setattr(regression, "_reach", lambda counts, columns: columns)  # as on GPUs
    again = supremix(z, t, share=share)
    torch.testing.assert_close(again, whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (again, whole)))


def test_views_are_rows_and_draws_are_seeded():
    z, t = batch()
    stacked = torch.stack([z[:6], z[6:]], 1)
    torch.manual_seed(0)
    one = supremix(stacked, t[:6])
    torch.manual_seed(0)
    assert one == supremix(z, t) != supremix(z, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = supremix(z.detach().bfloat16(), t, share=None)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, supremix(z.detach().bfloat16().float(), t, share=None))


def test_gradient_of_a_learned_temperature():
    z, t = batch()
    share = torch.rand(12, 12, dtype=torch.float64)
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: supremix(z.detach(), t, temperature=x, share=share), (tau,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": "L3"}, "no distance weight"),
        ({"shift": "both"}, "shift must be"),
        ({"window": 0.0}, "must be positive"),
        ({"share": torch.rand(3, 3)}, "share must be"),
        ({"share": (2.0, 0.0)}, "Beta"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_options_are_named(options, words):
    z, t = batch()
    with pytest.raises(InputError, match=words):
        supremix(z, t, **options)


def test_bad_inputs_are_named():
    z, t = batch()
    with pytest.raises(InputError, match="one value for each of 12"):
        supremix(z, t[:5])
    with pytest.raises(InputError, match="need a mask and labels"):
        weighted_sup_con(z, t, mixtures=torch.zeros(12, 3, 5))
    with pytest.raises(InputError, match="mixtures must be"):
        weighted_sup_con(
            z, t, mixtures=torch.zeros(12, 3, 4), mask=torch.zeros(12, 3), mixture_labels=torch.zeros(12, 3)
        )
