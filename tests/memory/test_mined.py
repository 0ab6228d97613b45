"""Mined negatives are the near ones that may be negatives, come when they are due, and survive a stop."""

import signal

import pytest
import torch
from torch.nn import functional as F

from counterpoint.contrast import info_nce
from counterpoint.errors import InputError
from counterpoint.memory import mined
from counterpoint.memory.mined import MinedNegatives, Mining, mine
from counterpoint.methods.language.esimcse import ESimCSE
from counterpoint.methods.language.moe_embeddings import MoEEmbeddings
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.recipes import experiment
from counterpoint.train import Method, Run, fit, resume
from counterpoint.train.checkpoint import load_state

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = ("dog", "cat", "cow", "ant", "bee", "owl", "fox", "hen", "pig", "rat", "ape", "elk")
PAIRS = [(f"the {w} is asleep", f"a sleeping {w}") for w in WORDS] + [(f"the {w} eats", f"{w} food") for w in WORDS]
OPTIONS = {"batch_size": 8, "optimizer": "adamw", "lr": 3e-3, "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


def vectors(n, d=5, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def by_hand(anchor, positive, *, window, duplicate, below=None, groups=None):
    q = F.normalize(anchor, dim=1)
    k = q if positive is None else F.normalize(positive, dim=1)
    rows = []
    for i in range(len(q)):
        left = []
        for j in (k @ q[i]).argsort(descending=True).tolist():
            near = k[j] @ k[i] >= duplicate or (positive is not None and q[j] @ q[i] >= duplicate)
            high = below is not None and q[i] @ k[j] > below * (q[i] @ k[i])
            if j != i and not near and not high and (groups is None or groups[j] == groups[i]):
                left.append(j)
        left = left[window[0] : window[1]]
        rows.append(left + [-1] * (window[1] - window[0] - len(left)))
    return torch.tensor(rows)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    "choice",
    [
        {"window": (0, 4), "duplicate": 2.0},
        {"window": (2, 9), "duplicate": 0.8},
        {"window": (0, 60), "duplicate": 0.9},
        {"window": (0, 10), "duplicate": 0.9, "below": 0.5},
        {"window": (1, 5), "duplicate": 0.9, "groups": torch.arange(40) % 3},
    ],
)
def test_mining_by_hand(choice, paired, monkeypatch):
    anchor, positive = vectors(40), vectors(40) + 0.5 * vectors(40, seed=1) if paired else None
    expected = by_hand(anchor, positive, **choice)
    assert torch.equal(mine(anchor, positive, **choice), expected)
    monkeypatch.setattr(mined, "BLOCK", 1000)  # a few queries at a time
    assert torch.equal(mine(anchor, positive, **choice), expected)


def test_a_repeated_text_is_no_negative_of_itself():
    anchor = vectors(20)
    anchor[7] = anchor[3] * 2 + 1e-4
    found = mine(anchor, window=(0, 19))
    assert 7 not in found[3] and 3 not in found[7] and (found[3] >= 0).sum() >= 10


def test_draws_are_listed_distinct_and_never_the_anchor():
    part = MinedNegatives(Mining(count=3, window=(0, 6), duplicate=0.9))
    assert part.draw(torch.arange(4)) is None
    part.refresh(vectors(30), None, now=1)
    index, generator = torch.arange(30), torch.Generator().manual_seed(0)
    seen = [part.draw(index, generator) for _ in range(40)]
    for rows in seen:
        assert (rows[:, :, None] == part.ranked[:, None]).any(2).all() and (rows != index[:, None]).all()
        assert all(len(row.unique()) == 3 for row in rows)
    assert len(torch.stack(seen)[:, 0].unique()) == 6  # each of the window comes up
    assert torch.equal(part.draw(index, torch.Generator().manual_seed(0)), seen[0])
    part.ranked[4] = -1  # nobody is left: others at random
    drawn = torch.stack([part.draw(index)[4] for _ in range(40)])
    assert (drawn != 4).all() and len(drawn.unique()) > 15


def test_it_is_due_once_when_its_time_has_come():
    part = MinedNegatives(Mining(every=2, after=1, window=(0, 3)))
    seen = []
    for epoch in range(6):
        seen.append(part.due("epochs", epoch))
        assert not part.due("steps", epoch)
        if seen[-1]:
            part.refresh(vectors(10), None, epoch)
        assert not part.due("epochs", epoch)
    assert seen == [False, True, False, True, False, True]


def test_lists_are_in_the_checkpoint_whatever_their_size():
    part = MinedNegatives(Mining(window=(0, 3)))
    part.refresh(vectors(12), None, 4)
    other = MinedNegatives(Mining(window=(0, 3)))
    other.load_state_dict(part.state_dict())
    assert torch.equal(other.ranked, part.ranked) and int(other.made) == 4 and not other.due("epochs", 4)


# ---- in a method -----------------------------------------------------------------------------------------------------


def build(seed=0, cls=SimCSE, mining=None, **options):
    torch.manual_seed(seed)
    choice = mining or Mining(window=(0, 5), duplicate=0.999, after=0)
    return cls(**{"encoder": dict(TINY), "max_length": 40, "dropout": 0.0, "mined": choice, **options}).train()


@pytest.mark.parametrize("data", [PAIRS, [a for a, _ in PAIRS]])
def test_a_step_by_hand(data):
    method = build(mining=Mining(count=2, window=(0, 5), duplicate=0.999, after=0))
    items = method.training_items(data)
    method.grouping(0, items)
    batch = items.take(torch.tensor([5, 2, 17, 11]))
    torch.manual_seed(3)
    loss = method.loss(batch)
    torch.manual_seed(3)
    rows = method.mined.draw(batch["index"])
    anchor = items.ids["anchor"]
    key = items.ids.get("positive", anchor)
    z = [method.head(method.encoder.pooled(*column.padded(at, items.pad)))
         for column, at in ((anchor, batch["index"]), (key, torch.cat([batch["index"], *rows.unbind(1)])))]  # fmt: skip
    torch.testing.assert_close(loss, info_nce(*z, temperature=0.05, positives=torch.arange(4)))
    method.eval()
    embedded = [torch.cat([method.embed({"input_ids": i, "attention_mask": m}) for i, m in
                           [column.padded(torch.arange(24), items.pad)]]) for column in (anchor, key)]  # fmt: skip
    with torch.no_grad():
        expected = mine(embedded[0], embedded[1] if key is not anchor else None, window=(0, 5), duplicate=0.999)
    assert torch.equal(method.mined.ranked.long(), expected)


def test_before_the_first_list_it_is_simcse_and_mining_draws_nothing():
    method, plain = build(mining=Mining(window=(0, 5), after=1)), build()
    plain.mined = None
    plain.load_state_dict(method.state_dict(), strict=False)
    items = method.training_items(PAIRS)
    method.grouping(0, items)
    batch = items.take(torch.arange(8))
    torch.testing.assert_close(method.loss(batch), plain.loss(batch))
    state = torch.get_rng_state()
    method.grouping(1, items)
    assert torch.equal(torch.get_rng_state(), state) and method.training and len(method.mined.ranked) == 24


def test_domains_are_mined_each_in_itself():
    table = {
        "anchor": [a for a, _ in PAIRS],
        "positive": [b for _, b in PAIRS],
        "domain": ["sleep"] * 12 + ["food"] * 12,
    }
    method = build(cls=MoEEmbeddings, domains=("food", "sleep"), objective="mnr")
    items = method.training_items(table)
    assert method.grouping(0, items) is None
    listed = method.mined.ranked.long()
    assert (items.domain[listed.clamp(min=0)] == items.domain[:, None])[listed >= 0].all() and (listed >= 0).any()
    loss = method.loss(items.take(torch.arange(8)))["contrast"]
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize(
    "choice", [{"unit": "epochs", "every": 1, "after": 1}, {"unit": "steps", "every": 4, "after": 3}]
)
def test_a_stopped_training_goes_on_exactly(tmp_path, monkeypatch, choice):
    data = tmp_path / "pairs.csv"
    data.write_text("anchor,positive\n" + "\n".join(",".join(pair) for pair in PAIRS))
    choice = Mining(window=(0, 6), duplicate=0.9999, **choice)
    options = {**OPTIONS, "epochs": 4, "checkpoint_seconds": 0}
    made, original = [], MinedNegatives.refresh
    monkeypatch.setattr(
        MinedNegatives, "refresh", lambda self, *a, **b: (made.append(a[2]), original(self, *a, **b))[1]
    )
    entire = fit(build(mining=choice, dropout=0.1), data, run=tmp_path / "entire", **options)
    assert made == ([1, 2, 3] if choice.unit == "epochs" else [3, 7, 11])
    step, seen = Method.training_step, []

    def stopping(self, *arguments):
        seen.append(1)
        if len(seen) == 8:  # within the third of four epochs, of three batches each
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", stopping)
        stopped = fit(build(mining=choice, dropout=0.1), data, run=tmp_path / "stopped", **options)
    assert stopped.interrupted
    resume(tmp_path / "stopped")
    one, two = (
        load_state(tmp_path / name / "checkpoints" / "last.safetensors")["state_dict"] for name in ("entire", "stopped")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert one["mined.ranked"].shape == (24, 6) and int(one["mined.steps"]) == 12
    assert Run.open(entire.folder).model().encode(["x"]).shape == (1, 16)


def test_it_has_names_in_recipes():
    method = experiment("simcse", encoder=dict(TINY), max_length=40, mined="ance-filtered").build(0)
    assert method.mined.choice == Mining(window=(0, 200), below=0.95)
    method = experiment("simcse", encoder=dict(TINY), max_length=40, mined="{every: 3, window: [2, 9]}").build(0)
    assert method.mined.choice == Mining(every=3, window=(2, 9))
    with pytest.raises(InputError, match='no way to mine named "anse"; did you mean ance'):
        experiment("simcse", mined="anse")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Mining(count=0), "a count and every of 1 or more"),
        (lambda: Mining(window=(5, 5)), "a window is two ranks"),
        (lambda: Mining(count=4, window=(2, 5)), "4 negatives cannot be drawn from the 3 ranks"),
        (lambda: Mining(unit="days"), 'every few "epochs" or "steps"'),
        (lambda: mine(vectors(1)), "two anchors or more"),
        (lambda: mine(vectors(4), vectors(5)), "positives of their shape"),
        (lambda: build(cls=ESimCSE), "ESimCSE makes its own pairs of single sentences"),
        (lambda: build(objective="nt_xent"), "mined negatives need an objective that takes them"),
    ],
)
def test_it_refuses(call, message):
    with pytest.raises(InputError, match=message):
        call()
