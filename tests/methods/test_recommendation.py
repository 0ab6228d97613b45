"""SASRec, CL4SRec and MCLRec compute their formulas, step what they must, and learn."""

import json
import math

import lightning
import pytest
import torch
from torch.nn import functional as F

from counterpoint import contrast
from counterpoint.contrast.margin import contrastive_regularizer
from counterpoint.errors import InputError
from counterpoint.evaluate.ranking import measure
from counterpoint.methods.recommendation import mclrec
from counterpoint.methods.recommendation.cl4srec import CL4SRec
from counterpoint.methods.recommendation.mclrec import Augmenter, MCLRec, meta_contrast
from counterpoint.methods.recommendation.sasrec import SASRec
from counterpoint.train import fit, resume
from counterpoint.train.method import construct
from counterpoint.train.optimise import Optimisation

SMALL = {"dim": 16, "hidden": 32, "max_length": 10}
ITEMS = 20


def chain(users=60, seed=0, noise=0.1):
    """Users who walk through the items 1 ... 20 in a fixed cyclic order, with a few random jumps."""
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for _ in range(users):
        step = int(torch.randint(ITEMS, (), generator=generator))
        length = int(torch.randint(5, 12, (), generator=generator))
        jumps = torch.rand(length, generator=generator) < noise
        lists.append([])
        for jump in jumps:
            step = int(torch.randint(ITEMS, (), generator=generator)) if jump else (7 * step + 3) % ITEMS
            lists[-1].append(step + 1)
    return lists


def build(cls, seed=0, **options):
    torch.manual_seed(seed)
    return cls(**{**SMALL, "item_count": ITEMS, **options})


@pytest.fixture
def batch():
    method = build(SASRec)
    return method.read(chain()).take(torch.arange(0, 120, 10))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def nt_xent(x, y):
    """Row by row, dot products at temperature 1."""
    z = torch.cat([x, y]).double()
    s, n = z @ z.T, len(x)
    terms = [-s[i, (i + n) % (2 * n)] + s[i, [j for j in range(2 * n) if j != i]].logsumexp(0) for i in range(2 * n)]
    return torch.stack(terms).mean()


def regularizer(x, y, batch_wide=False, temperature=1.0):
    """Row by row, pair by pair, as written."""
    z = torch.cat([x, y]).double()
    s, n = z @ z.T / temperature, len(x)
    p = [s[i, (i + n) % (2 * n)] for i in range(2 * n)]
    negative = [[s[i, j] for j in range(2 * n) if j not in (i, (i + n) % (2 * n))] for i in range(2 * n)]
    hardest = [torch.stack(row).max() for row in negative]
    low, high = p, hardest
    if batch_wide:
        low, high = [torch.stack(p).min()] * 2 * n, [torch.stack(hardest).max()] * 2 * n
    first = [(p[i] - torch.minimum(low[i], high[i])).clamp(min=0) for i in range(2 * n)]
    second = [(torch.maximum(low[i], high[i]) - s_ij).clamp(min=0) for i in range(2 * n) for s_ij in negative[i]]
    return torch.stack(first).mean() + torch.stack(second).mean()


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_sasrec_is_cross_entropy_over_all_items_and_the_padding(batch):
    method = build(SASRec).eval()
    logits = method.state(batch) @ method.encoder.item.weight[: ITEMS + 1].T
    expected = F.cross_entropy(logits, batch["target"])
    torch.testing.assert_close(method.loss(batch), expected)
    torch.testing.assert_close(
        build(SASRec, temperature=0.5).eval().loss(batch), F.cross_entropy(logits / 0.5, batch["target"])
    )
    ours = torch.autograd.grad(method.loss(batch), list(method.parameters()))
    for a, b in zip(ours, torch.autograd.grad(expected, list(method.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    table = ours[[name for name, _ in method.named_parameters()].index("encoder.item.weight")]
    assert table[0].abs().max() > 0 and (table[-1] == 0).all()  # the padding is a class, the spare row is not


def test_bce_takes_the_target_and_an_item_that_the_history_lacks(batch, monkeypatch):
    method = build(SASRec, objective="bce").eval()
    for _ in range(20):
        wrong = method.absent_items(batch)
        assert ((wrong >= 1) & (wrong <= ITEMS) & (wrong != batch["target"])).all()
    drawn = torch.stack([method.absent_items(batch) for _ in range(300)])
    assert len(drawn.unique()) == ITEMS
    assert ((drawn[:, :, None] == batch["item_seq"]).any(2)).float().mean() < 0.06  # by chance 0.2 and more
    monkeypatch.setattr(method, "absent_items", lambda batch: wrong)
    h, e = method.state(batch), method.encoder.item.weight
    scores = [(h * e[item]).sum(1) for item in (batch["target"], wrong)]
    expected = sum(
        F.binary_cross_entropy_with_logits(s, torch.full_like(s, label))
        for s, label in zip(scores, (1, 0), strict=True)
    )
    torch.testing.assert_close(method.loss(batch), expected)


@pytest.mark.parametrize("name", contrast.PAIR_OBJECTIVES)
def test_any_objective_of_pairs_serves_by_name(name, batch):
    method = build(SASRec, objective=name).eval()
    h, e = method.state(batch), method.encoder.item.weight[batch["target"]]
    assert method.loss(batch) == contrast.objective(name)(h, e, temperature=1.0, normalize=False)
    both = build(CL4SRec, view_objective=name).eval().loss(batch)
    assert both["contrast"].isfinite()
    with pytest.raises(InputError, match='no objective named "softmx"'):
        build(SASRec, objective="softmx")


def test_cl4srec_adds_the_contrast_of_two_views(batch):
    method = build(CL4SRec, weight=0.3).eval()
    torch.manual_seed(7)
    views = method.views(batch["item_seq"], batch["item_seq_len"])
    h1, h2 = (method.encoder(*view).pooled for view in views)
    torch.manual_seed(7)
    terms = method.loss(batch)
    torch.testing.assert_close(terms["contrast"].double(), 0.3 * nt_xent(h1, h2), rtol=1e-5, atol=1e-6)
    assert terms["next item"] == build(SASRec).eval().loss(batch)
    assert not torch.allclose(h1, h2)


@pytest.mark.parametrize("batch_wide", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_the_regularizer_is_its_formula_with_its_gradients(batch_wide, temperature, monkeypatch):
    from counterpoint.contrast import margin

    monkeypatch.setattr(margin, "BLOCK", 30)  # rows of scores in several blocks
    x, y = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    ours = contrastive_regularizer(x, y, normalize=False, batch_wide=batch_wide, temperature=temperature)
    expected = regularizer(x, y, batch_wide, temperature)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    unit = contrastive_regularizer(x, y, batch_wide=batch_wide)
    torch.testing.assert_close(unit.double(), regularizer(F.normalize(x), F.normalize(y), batch_wide))
    rows = contrastive_regularizer(x, y, batch_wide=batch_wide, reduction="none")
    torch.testing.assert_close(rows.mean(), unit)
    with pytest.raises(InputError, match="a batch of one item has no negatives"):
        contrastive_regularizer(x[:1], y[:1])


def test_meta_contrast_has_three_pairs_and_two_variants():
    h1, h2, z1, z2 = (torch.randn(6, 4) for _ in range(4))
    pairs = ((h1, z2), (h2, z1), (z1, z2))
    terms = meta_contrast(h1, h2, z1, z2)
    torch.testing.assert_close(terms["meta contrast"].double(), sum(nt_xent(*pair) for pair in pairs))
    torch.testing.assert_close(terms["regularizer"].double(), 0.1 * sum(regularizer(*pair) for pair in pairs))
    paper = meta_contrast(h1, h2, z1, z2, variant="paper", regularizer=0.3)
    torch.testing.assert_close(paper["regularizer"].double(), 0.3 * regularizer(z1, z2, batch_wide=True))
    assert list(meta_contrast(h1, h2, z1, z2, regularizer=0.0)) == ["meta contrast"]


def test_augmenters_are_small_separate_and_end_on_the_sphere():
    method = MCLRec(item_count=3)
    first, second = method.augmenters
    assert [tuple(p.shape) for p in first.parameters()] == [(32, 64), (32,), (16, 32), (16,), (64, 16), (64,)]
    assert not torch.equal(first.layers[0].weight, second.layers[0].weight)
    x = torch.randn(5, 64)
    w1, b1, w2, b2, w3, b3 = first.parameters()
    expected = F.gelu(F.gelu(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    torch.testing.assert_close(first(x), expected / expected.norm(dim=1, keepdim=True))
    assert len(Augmenter([4, 3]).layers) == 1


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_mclrec_is_its_formula(batch, variant):
    options = {"weight": 0.2, "meta_weight": 0.5, "regularizer": 0.3, "variant": variant}
    method = build(MCLRec, **options).eval()
    views = method.views(batch["item_seq"], batch["item_seq_len"])
    h1, h2 = (method.encoder(*view).pooled for view in views)
    z1, z2 = method.augmenters[0](h1), method.augmenters[1](h2)
    terms = method.encoder_loss(batch, views)
    meta = meta_contrast(h1, h2, z1, z2, variant=variant, regularizer=0.3)
    expected = {
        "next item": build(SASRec).eval().loss(batch),
        "contrast": 0.2 * nt_xent(h1, h2).float(),
        "meta contrast": 0.5 * meta["meta contrast"],
        "regularizer": 0.5 * meta["regularizer"],
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6)
    assert method.augmenter_loss(views) == meta
    assert "contrast" not in build(MCLRec).loss(batch)
    with pytest.raises(InputError, match='variant is "released" or "paper"'):
        build(MCLRec, variant="released ")


# ---- alternation -----------------------------------------------------------------------------------------------------


class Few:
    """Batches for a trainer, without the library's loop."""

    def __init__(self, histories, size, count):
        self.histories, self.size, self.count = histories, size, count

    def __len__(self):
        return self.count

    def __iter__(self):
        order = torch.randperm(len(self.histories), generator=torch.Generator().manual_seed(0))
        for index in order.split(self.size)[: self.count]:
            yield self.histories.take(index)


def train(method, count=3, epochs=1, **options):
    histories = method.read(chain())
    method.optimisation = Optimisation(optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="constant")
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    method.train()
    trainer.fit(method, Few(histories, 16, count))
    return trainer


def weights(part):
    return [p.detach().clone() for p in part.parameters()]


def same(before, after):
    return all(map(torch.equal, before, after))


def test_each_batch_is_three_steps_that_move_one_part_only(monkeypatch):
    method, seen = build(MCLRec, weight=0.1), []
    original, losses = MCLRec.descend, []

    def descend(self, part, optimiser, loss):
        before = weights(self.encoder), weights(self.augmenters)
        original_loss = loss

        def watched():
            terms = original_loss()
            flow = torch.autograd.grad(
                sum(terms.values()), list(part.parameters()), retain_graph=True, allow_unused=True
            )
            losses.append((part is self.encoder, [g is not None for g in flow], set(terms)))
            return terms

        found = original(self, part, optimiser, watched)
        frozen = self.augmenters if part is self.encoder else self.encoder
        assert not any(p.requires_grad for p in frozen.parameters())
        seen.append(
            (part is self.encoder, same(before[0], weights(self.encoder)), same(before[1], weights(self.augmenters)))
        )
        return found

    monkeypatch.setattr(MCLRec, "descend", descend)
    trainer = train(method, count=4)
    moved_encoder, moved_augmenters = (True, False, True), (False, True, False)
    assert seen == [moved_encoder, moved_augmenters, moved_encoder] * 4
    assert all(all(flow) for _, flow, _ in losses)  # frozen augmenters still let gradient through to the encoder
    names = {"meta contrast", "regularizer"}
    assert [terms for _, _, terms in losses] == [
        names | {"next item", "contrast"},
        names,
        names | {"next item", "contrast"},
    ] * 4
    assert trainer.global_step == 4  # a batch is one step for schedules and records
    assert all(p.requires_grad for p in method.parameters())
    assert method.terms.keys() == names | {"next item", "contrast"}


def test_the_three_passes_share_views_but_not_dropout(monkeypatch):
    method, calls = build(MCLRec), []
    forward = type(method.encoder).forward

    def watched(self, item_seq, length, **options):
        found = forward(self, item_seq, length, **options)
        calls.append((item_seq.clone(), found.pooled.detach().clone()))
        return found

    monkeypatch.setattr(type(method.encoder), "forward", watched)
    train(method, count=1)
    # original, view 1, view 2; view 1, view 2; original, view 1, view 2
    assert len(calls) == 8
    for first, second, third in ((1, 3, 6), (2, 4, 7)):
        assert torch.equal(calls[first][0], calls[second][0]) and torch.equal(calls[first][0], calls[third][0])
        assert not torch.equal(calls[first][1], calls[second][1])
    assert not torch.equal(calls[1][0], calls[2][0])


def test_the_gradient_of_h_passes_through_the_frozen_augmenters(batch):
    method = build(MCLRec, dropout=0.0, attention_dropout=0.0, meta_weight=1.0)
    views = method.views(batch["item_seq"], batch["item_seq_len"])

    def gradient():
        method.zero_grad()
        sum(method.encoder_loss(batch, views).values()).backward()
        return torch.cat([p.grad.flatten().clone() for p in method.encoder.parameters() if p.grad is not None])

    free = gradient()
    method.augmenters.requires_grad_(False)
    torch.testing.assert_close(gradient(), free)


def test_joint_is_one_step_of_everything():
    method = build(MCLRec, joint=True)
    before = weights(method.encoder), weights(method.augmenters)
    trainer = train(method, count=2)
    assert trainer.global_step == 2 and len(trainer.optimizers) == 1
    assert not same(before[0], weights(method.encoder)) and not same(before[1], weights(method.augmenters))
    assert build(MCLRec, joint=False).automatic_optimization is False


def test_the_schedule_moves_once_per_batch():
    method = build(MCLRec)
    histories = method.read(chain())
    method.optimisation = Optimisation(optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="cosine")
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    rates = []
    method.after_step = lambda: rates.append([o.param_groups[0]["lr"] for o in trainer.optimizers])
    trainer.fit(method, Few(histories, 16, 4))
    expected = [1e-3 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in (1, 2, 3, 4)]
    for pair, rate in zip(rates, expected, strict=True):
        assert pair == pytest.approx([rate, rate])


# ---- through the library's loop --------------------------------------------------------------------------------------

FIT = {
    "batch_size": 16,
    "optimizer": "adam",
    "lr": 0.001,
    "weight_decay": 0.0,
    "schedule": "constant",
    "progress": False,
}


@pytest.mark.parametrize("cls", [SASRec, CL4SRec, MCLRec])
def test_a_run_remembers_items_and_gives_the_same_vectors(cls, tmp_path):
    torch.manual_seed(0)
    method = cls(**SMALL)
    lists = [[f"item {i}" for i in line] for line in chain(20)]
    run = fit(method, lists, epochs=1, run=tmp_path / "run", log_every=1, **FIT)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert run.config["model"]["item_count"] == ITEMS
    again = type(run).open(tmp_path / "run").model()
    assert again.encoder.catalogue == method.encoder.catalogue and len(again.encoder.catalogue) == ITEMS
    vectors = again.encode([lists[3], ["item 1", "never seen", "item 2"]])
    assert vectors.shape == (2, 16)
    assert vectors[:1] == pytest.approx(again.encode([lists[3]]), abs=1e-5)
    assert vectors[1:] == pytest.approx(again.encode([["item 1", "item 2"]]), abs=1e-5)
    assert (method.encode(lists) == again.encode(lists)).all()
    start = run.untrained()
    torch.manual_seed(run.config["fit"]["seed"])
    assert same(weights(start), weights(construct(cls, run.config["model"])))


@pytest.mark.parametrize("cls", [CL4SRec, MCLRec])
def test_a_resumed_run_is_the_uninterrupted_one(cls, tmp_path, monkeypatch):
    def trained(folder, stop):
        torch.manual_seed(0)
        method = cls(**SMALL)
        if stop:
            original = cls.training_step
            monkeypatch.setattr(
                cls,
                "training_step",
                lambda self, b, i: _stop() if self.trainer.current_epoch == 1 else original(self, b, i),
            )
            with pytest.raises(RuntimeError, match="killed"):
                fit(method, chain(20), epochs=3, run=folder, checkpoint_seconds=0, **FIT)
            monkeypatch.undo()
            return resume(folder, chain(20)).method
        return fit(method, chain(20), epochs=3, run=folder, checkpoint_seconds=0, **FIT).method

    def _stop():
        raise RuntimeError("killed")

    whole, resumed = trained(tmp_path / "a", False), trained(tmp_path / "b", True)
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("cls", "options", "epochs"),
    [
        (SASRec, {}, 8),
        (SASRec, {"objective": "bce"}, 12),
        (SASRec, {"objective": "dcl"}, 10),
        (CL4SRec, {}, 8),
        (MCLRec, {}, 4),
        (MCLRec, {"joint": True}, 8),
    ],
)
def test_methods_learn_a_chain(cls, options, epochs, tmp_path):
    torch.manual_seed(0)
    lists = chain(60, noise=0.05)
    method = cls(**SMALL, dropout=0.1, attention_dropout=0.1, **options)
    before = measure({"trained": method}, lists)[0]
    run = fit(method, lists, epochs=epochs, run=tmp_path / "run", **{**FIT, "lr": 0.01})
    trained, untrained, popular = measure({"trained": run.method, "untrained": run.untrained()}, lists)
    print(trained.detail["HR@5"], untrained.detail["HR@5"], popular.detail["HR@5"])
    assert before.detail["HR@5"] < 50 and untrained.detail["HR@5"] < 50 and popular.detail["HR@5"] < 50
    assert trained.detail["HR@5"] > 75
    assert math.isfinite(trained.value) and trained.value > 1.5 * untrained.value


def test_what_mclrec_cannot_do_is_said():
    with pytest.raises(InputError, match="mclrec steps its optimisers itself"):
        method = build(MCLRec)
        method.trainer = type("Trainer", (), {"precision": "16-mixed", "world_size": 1})()
        method.on_fit_start()
    assert mclrec.Variant.__args__ == ("released", "paper")
