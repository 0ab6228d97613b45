"""WhitenedCSE: views are whitened apart before the head, compared with the first, and not at all when embedding."""

import pytest
import torch

from counterpoint.contrast import info_nce
from counterpoint.contrast.whitening import shuffled_group_whitening
from counterpoint.errors import InputError
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.methods.language.whitenedcse import WhitenedCSE
from counterpoint.train import fit, resume
from counterpoint.train.checkpoint import load_state

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SENTENCES = [f"{who} {what} {where}." for who in ("A dog", "The cats", "Anna") for what in ("runs", "is asleep")
             for where in ("there", "in the garden", "on top of the old house", "at sea")]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed=0, **options):
    torch.manual_seed(seed)
    return WhitenedCSE(**{"encoder": dict(TINY), "max_length": 40, "groups": 8, **options}).train()


def batch_of(method, rows=12):
    return method.read(SENTENCES).take(torch.arange(rows))


def test_a_step_by_hand():
    method = build()
    batch = batch_of(method)
    torch.manual_seed(7)
    loss = method.loss(batch)
    torch.manual_seed(7)
    pooled = method.encoder.pooled(batch["input_ids"].repeat(3, 1), batch["attention_mask"].repeat(3, 1))
    permutations = torch.rand(3, 16).argsort(1)
    white = shuffled_group_whitening(pooled, permutations, groups=8, eps=1e-5)
    one, two, three = method.head(white).split(12)
    expected = sum(info_nce(one, view, temperature=0.05) for view in (two, three))
    torch.testing.assert_close(loss, expected)


def test_without_whitening_it_is_simcse_once_for_each_further_view():
    method = build(groups=0, dropout=0.0)
    simcse = SimCSE(encoder=dict(TINY), max_length=40, dropout=0.0)
    simcse.load_state_dict(method.state_dict())
    batch = batch_of(method)
    torch.testing.assert_close(method.loss(batch), 2 * simcse.train().loss(batch))
    four = build(groups=0, dropout=0.0, copies=4)
    four.load_state_dict(method.state_dict())
    torch.testing.assert_close(four.loss(batch), 3 * simcse.loss(batch))


@pytest.mark.parametrize("shuffle, alike", [("view", False), ("shared", True), ("none", True)])
def test_views_without_dropout_differ_by_their_shuffle_alone(shuffle, alike):
    method = build(shuffle=shuffle, dropout=0.0)
    batch = batch_of(method)
    anchor = batch["input_ids"], batch["attention_mask"]
    one, two, three = method.project(anchor, anchor, anchor)
    assert torch.allclose(one, two, atol=1e-5) == torch.allclose(one, three, atol=1e-5) == alike
    again = method.project(anchor, anchor, anchor)[0]
    assert torch.allclose(one, again, atol=1e-5) == (shuffle == "none")


def test_the_released_chunks_hold_all_views_of_a_third_of_the_sentences():
    method = build(chunking="released")
    pooled = torch.randn(36, 16)
    torch.manual_seed(1)
    found = method.whitened(pooled)
    torch.manual_seed(1)
    permutations = torch.rand(3, 16).argsort(1)
    by_sentence = torch.stack([pooled[v * 12 + i] for i in range(12) for v in range(3)])
    white = shuffled_group_whitening(by_sentence, permutations, groups=8, eps=1e-5)
    expected = torch.stack([white[i * 3 + v] for v in range(3) for i in range(12)])
    torch.testing.assert_close(found, expected)
    same = pooled[:12].repeat(3, 1)  # equal views stay equal: they share shuffle and statistics
    one, two, three = method.whitened(same).split(12)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one, three)


def test_every_view_reaches_the_head_with_unit_variance():
    method = build()
    pooled = torch.randn(36, 16) @ torch.randn(16, 16) + 5
    for view in method.whitened(pooled).split(12):
        torch.testing.assert_close(view.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
        torch.testing.assert_close(view.var(0, correction=0), torch.ones(16), atol=1e-2, rtol=0)


def test_embedding_whitens_nothing_and_gradient_reaches_encoder_and_head():
    method = build()
    batch = batch_of(method)
    method.loss(batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    with torch.no_grad():
        method.eval()
        torch.testing.assert_close(method.embed(batch), method.encoder(batch["input_ids"], batch["attention_mask"])[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"groups": 5}, "groups must divide the 16 dimensions of a fresh model, and 5 does not"),
        ({"copies": 1}, "copies are 2 or more"),
        ({"shuffle": "always"}, 'shuffle must be one of view, shared, none, not "always"'),
        ({"chunking": "thirds"}, 'not "thirds"'),
    ],
)
def test_it_refuses(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_a_batch_must_be_larger_than_a_group():
    with pytest.raises(InputError, match="needs more than 8 rows, not 8: take larger batches or more groups"):
        build(groups=2).loss(batch_of(build(), rows=8))


def test_it_learns_and_a_training_can_go_on(tmp_path):
    data = tmp_path / "a.txt"
    data.write_text("\n".join(SENTENCES))
    options = {"batch_size": 12, "optimizer": "adam", "lr": 3e-3, "log_every": 1, "progress": False}
    run = fit(build(dropout=0.1), data, run=tmp_path / "run", epochs=12, **options)
    lines = [eval(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] < lines[0] / 2
    before = load_state(run.checkpoint)["state_dict"]
    after = load_state(resume(tmp_path / "run").checkpoint)["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)
