"""SimCSE and ESimCSE compute their papers' formulas, take what the data give, and learn."""

import json
import math
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from counterpoint import contrast
from counterpoint.data import texts
from counterpoint.errors import InputError
from counterpoint.methods.language.esimcse import ESimCSE
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.train import Method, fit, resume
from counterpoint.train.checkpoint import load_state
from counterpoint.views.text import repeat_tokens, stack

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SENTENCES = [f"{who} {what} {where}." for who in ("A dog", "The cats", "Anna") for what in ("runs", "is asleep")
             for where in ("there", "in the garden", "on top of the old house", "at sea")]  # fmt: skip
TRIPLES = [(s, s.lower() + " indeed", "not " + s) for s in SENTENCES]


pytestmark = pytest.mark.usefixtures("one_thread")


def build(cls=SimCSE, seed=0, **options):
    torch.manual_seed(seed)
    return cls(**{"encoder": dict(TINY), "max_length": 40, **options}).train()


def batch_of(method, data=SENTENCES, rows=8):
    return method.read(data).take(torch.arange(rows))


def cosines(x, y):
    return F.normalize(x.double(), dim=1) @ F.normalize(y.double(), dim=1).T


def softmax_loss(query, keys, temperature):
    """Row by row, in double precision: key i belongs to query i."""
    s = cosines(query, keys) / temperature
    return sum(math.log(sum(math.exp(v) for v in s[i].tolist())) - s[i, i].item() for i in range(len(s))) / len(s)


# -------------------------------------------------------------------------------------------------------------- SimCSE


def test_unsupervised_simcse_is_one_pass_of_the_doubled_batch():
    method = build()
    batch = batch_of(method)
    torch.manual_seed(7)
    loss = method.loss(batch)
    torch.manual_seed(7)
    ids, mask = batch["input_ids"].repeat(2, 1), batch["attention_mask"].repeat(2, 1)
    z = method.head(method.encoder(ids, mask).pooled)
    assert loss.item() == pytest.approx(softmax_loss(z[:8], z[8:], 0.05), rel=1e-4)
    assert not torch.equal(z[:8], z[8:])  # two dropout masks


def test_without_dropout_both_copies_are_the_same():
    method = build(dropout=0.0)
    query, key = method.project(*[(batch_of(method)["input_ids"], batch_of(method)["attention_mask"])] * 2)
    torch.testing.assert_close(query, key)


def test_the_positive_can_be_reworded():
    said = ["it is not hot", "she never sings", "a dog ran"]
    method = build(rewording="negation")
    batch = batch_of(method, said, rows=3)
    pairs = [("it is not hot", "it is hot"), ("she never sings", "she sings"), ("a dog ran", "a dog ran")]
    plain = batch_of(build(), pairs, 3)
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert torch.equal(batch["positive_input_ids"], plain["positive_input_ids"])
    few, many = (build(rewording="delete", rewording_rate=rate).read(SENTENCES) for rate in (0.1, 0.6))
    assert many.ids["positive"].lengths.sum() < few.ids["positive"].lengths.sum() < few.ids["anchor"].lengths.sum()
    words = build(rewording="delete")
    one, same, other = (words.read(SENTENCES, seed=seed).ids["positive"].flat.tolist() for seed in (1, 1, 2))
    assert one == same != other


def test_rewording_is_refused_where_it_has_no_place():
    with pytest.raises(InputError, match="has positives of its own"):
        build(rewording="delete").read([("a b", "c d"), ("e f", "g h")])
    with pytest.raises(InputError, match="ESimCSE makes its own pairs"):
        build(ESimCSE, rewording="delete")
    with pytest.raises(InputError, match=r"between 0 and 1, not 1\.5"):
        build(rewording="delete", rewording_rate=1.5)


def test_the_data_decide_pairs_and_hard_negatives():
    method = build(dropout=0.0)
    triples, pairs = batch_of(method, TRIPLES), batch_of(method, [row[:2] for row in TRIPLES])
    z = [method.head(method.encoder(*columns).pooled) for columns in (
        (triples["input_ids"], triples["attention_mask"]),
        (triples["positive_input_ids"], triples["positive_attention_mask"]),
        (triples["negative_input_ids"], triples["negative_attention_mask"]),
    )]  # fmt: skip
    assert method.loss(pairs).item() == pytest.approx(softmax_loss(z[0], z[1], 0.05), rel=1e-3)
    assert method.loss(triples).item() == pytest.approx(softmax_loss(z[0], torch.cat(z[1:]), 0.05), rel=1e-3)
    assert method.loss(triples) > method.loss(pairs)


def test_scored_pairs_are_trained_on_singly():
    table = {"sentence1": SENTENCES[:4], "sentence2": SENTENCES[3:7], "score": [1, 2, 3, 5]}
    items = build().read(table)
    assert list(items.ids) == ["anchor"] and len(items) == 7


@pytest.mark.parametrize("name", sorted(contrast.PAIR_OBJECTIVES))
def test_any_objective_of_pairs_is_taken_by_name(name):
    method = build(objective=name, dropout=0.0)
    batch = batch_of(method, [row[:2] for row in TRIPLES])
    query, key = (
        method.head(method.encoder(batch[f"{p}input_ids"], batch[f"{p}attention_mask"]).pooled)
        for p in ("", "positive_")
    )
    expected = contrast.PAIR_OBJECTIVES[name](query, key, temperature=0.05)
    torch.testing.assert_close(method.loss(batch), expected, rtol=1e-3, atol=1e-4)


def test_hard_negatives_need_an_objective_that_takes_them():
    method = build(objective="dcl")
    with pytest.raises(InputError, match="further negatives need the objective info_nce; dcl takes pairs only"):
        method.loss(batch_of(method, TRIPLES))


def test_the_head_is_for_training_only():
    method = build(pooling="cls").eval()
    batch = batch_of(method)
    with torch.no_grad():
        torch.testing.assert_close(method.embed(batch), method.encoder.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, 0])  # fmt: skip
    assert isinstance(build(head=False).head, torch.nn.Identity)


def test_encode_gives_a_vector_for_every_row_in_order():
    method = build()
    data = ["a much longer sentence than the others", "", "b", "b", "x" * 10_000]
    found = method.encode(data, batch_size=2)
    assert found.shape == (5, 16) and found.dtype == np.float32 and np.isfinite(found).all()
    alone = np.concatenate([method.encode([sentence]) for sentence in data])
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert np.array_equal(found[2], found[3]) and method.training
    np.testing.assert_allclose(method.encode(TRIPLES), method.encode([row[0] for row in TRIPLES]), atol=1e-6)


def test_reading_takes_names_files_and_items(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(SENTENCES))
    method = build()
    items = method.read(path, limit=5, seed=3)
    assert len(items) == 5 and len(method.read(items, limit=3)) == 3 and method.read(items) is items
    assert items.take(torch.arange(5))["index"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_length": 600}, "max_length must lie between 3 and 512, not 600"),
        ({"objective": "dlc"}, "did you mean dcl"),
        ({"pooling": "avg"}, 'no pooling named "avg"'),
    ],
)
def test_simcse_refuses(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_training_pulls_a_sentence_to_its_copy_and_learns(tmp_path):
    method = build(dropout=0.1)
    options = {"epochs": 12, "batch_size": 12, "optimizer": "adam", "lr": 3e-3, "log_every": 1, "progress": False}
    run = fit(method, SENTENCES, run=tmp_path / "r", **options)
    losses = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").open()]
    assert losses[0] > 2 and np.mean(losses[-4:]) < 0.2
    x = method.encode(SENTENCES)
    with torch.no_grad():
        batch = method.read(SENTENCES).take(torch.arange(len(SENTENCES)))
        noisy = method.train().encoder.embed(batch)
    assert (cosines(torch.from_numpy(x), noisy).argmax(1) == torch.arange(len(x))).double().mean() > 0.8


# ------------------------------------------------------------------------------------------------------------- ESimCSE


def test_esimcse_step_by_step():
    """Two steps by hand: repetition in the second copy, queue after the loss, momentum before the optimiser's update."""
    method, twin = (build(ESimCSE, queue=12, momentum=0.5) for _ in range(2))
    optimiser = torch.optim.SGD(method.encoder.parameters(), lr=0.5)
    items, queue = method.read(SENTENCES), None
    slow = {name: p.clone() for name, p in method.encoder.named_parameters()}
    for step in range(3):
        batch = items.take(torch.arange(8 * step, 8 * step + 8))
        original = batch["input_ids"], batch["attention_mask"]
        twin.load_state_dict(
            {name: value for name, value in method.state_dict().items() if "queue" not in name}, strict=False
        )
        torch.manual_seed(step)
        loss = method.loss(batch)

        torch.manual_seed(step)
        rows = stack([original, repeat_tokens(*original, rate=0.32)], method.encoder.pad)
        z = twin.head(twin.encoder(*rows).pooled)
        keys = z[8:] if queue is None else torch.cat([z[8:], queue])
        assert loss.item() == pytest.approx(softmax_loss(z[:8], keys, 0.05), rel=1e-4)
        slow = {name: 0.5 * slow[name] + 0.5 * p.detach() for name, p in method.encoder.named_parameters()}
        for name, p in method.key_encoder.module.named_parameters():
            torch.testing.assert_close(p, slow[name])
        with torch.no_grad():
            slow_encoder = twin.encoder.eval()
            slow_encoder.load_state_dict(slow, strict=False)
            new = twin.head(slow_encoder(*original).pooled)
            slow_encoder.train()
        queue = new if queue is None else torch.cat([queue, new])[-12:]
        torch.testing.assert_close(method.queue.oldest_first, queue)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert len(queue) == 12


def test_the_repeated_copy_is_longer_and_the_original_is_not():
    method = build(ESimCSE)
    batch = batch_of(method)
    torch.manual_seed(0)
    _, mask = method.repeated(batch)
    extra = mask.sum(1) - batch["attention_mask"].sum(1)
    assert extra.max() > 0 and extra.min() >= 0 and extra.max() <= 9
    assert torch.equal(build(ESimCSE, repetition="none").repeated(batch)[0], batch["input_ids"])


def test_words_are_repeated_whole():
    method = build(ESimCSE, repetition="words", repeat_rate=1.0)
    batch = batch_of(method, rows=4)
    torch.manual_seed(1)
    ids, mask = method.repeated(batch)
    decode = method.encoder.tokenizer.decode
    for i in range(4):
        said = decode(ids[i][mask[i].bool()], skip_special_tokens=True)
        before = SENTENCES[i]
        assert len(said) >= len(before) and set(said.replace(" ", "")) == set(before.replace(" ", ""))
    assert method.loss(batch).isfinite()


def test_each_epoch_starts_with_an_empty_queue():
    method = build(ESimCSE, queue=4)
    method.loss(batch_of(method))
    assert len(method.queue) == 8  # the first keys are all kept, beyond the limit
    method.loss(batch_of(method))
    assert len(method.queue) == 4
    method.on_train_epoch_start()
    assert len(method.queue) == 0


def test_the_first_step_is_plain_infonce_and_the_queue_makes_it_harder():
    method = build(ESimCSE, repetition="none", dropout=0.1)
    plain = build(dropout=0.1)
    plain.load_state_dict(method.state_dict(), strict=False)
    batch = batch_of(method)
    losses = []
    for each in (method, plain, method):
        torch.manual_seed(3)
        losses.append(each.loss(batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[2] > losses[0] + 0.1


def test_the_momentum_copy_is_neither_trained_nor_part_of_the_encoder():
    method = build(ESimCSE)
    trained = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert trained == {id(p) for p in [*method.encoder.parameters(), *method.head.parameters()]}
    loss = method.loss(batch_of(method))
    loss.backward()
    assert all(p.grad is None for p in method.key_encoder.parameters()) and not method.queue.keys.requires_grad
    assert method.encoder.training and not any(part.training for part in method.key_encoder.module.modules())


def test_parts_can_be_left_out():
    method = build(ESimCSE, queue=0)
    assert method.queue is None and method.key_encoder is None
    assert method.loss(batch_of(method)).isfinite()
    method.on_train_epoch_start()
    assert build(ESimCSE, queue=0, objective="dcl").loss(batch_of(method)).isfinite()
    items = build(ESimCSE).read(TRIPLES)
    assert list(items.ids) == ["anchor"] and len(items) == 3 * len(TRIPLES)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_length": 510}, "repetition makes 519 tokens of up to 510, but a fresh model takes 512"),
        ({"max_length": 300, "repetition": "words"}, "makes 600 tokens of up to 300"),
        ({"objective": "dcl"}, "a queue needs the objective info_nce; with dcl set queue to 0"),
        ({"repetition": "letters"}, 'not "letters"'),
        ({"repeat_rate": 1.2}, "repeat_rate lies between 0 and 1"),
        ({"queue": -1}, "queue is 0 or more"),
    ],
)
def test_esimcse_refuses(options, message):
    with pytest.raises(InputError, match=message):
        build(ESimCSE, **options)


def test_a_stopped_training_goes_on_exactly(tmp_path, monkeypatch):
    data = tmp_path / "a.txt"
    data.write_text("\n".join(SENTENCES))
    options = {
        "epochs": 2,
        "batch_size": 4,
        "lr": 0.01,
        "optimizer": "adamw",
        "checkpoint_seconds": 0,
        "progress": False,
    }
    entire = fit(build(ESimCSE, queue=10), data, run=tmp_path / "entire", **options)
    original, seen = Method.training_step, []

    def step(self, *arguments):
        seen.append(1)
        if len(seen) == 9:  # in the third batch of the second epoch
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", step)
        stopped = fit(build(ESimCSE, queue=10), data, run=tmp_path / "stopped", **options)
    assert stopped.interrupted and load_state(stopped.checkpoint)["state_dict"]["queue.filled"] > 0
    resume(tmp_path / "stopped")
    one, two = (
        load_state(tmp_path / name / "checkpoints" / "last.safetensors")["state_dict"] for name in ("entire", "stopped")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert np.array_equal(entire.encode(SENTENCES), resume(tmp_path / "stopped").encode(SENTENCES))


def test_a_cross_check_of_the_queue_loss_against_plain_cross_entropy():
    """Empty and full queue on hard pairs: the stored golden case of an empty queue is nearly perfect pairs."""
    torch.manual_seed(0)
    z1, z2, queue = (torch.randn(n, 6, requires_grad=True) for n in (5, 5, 7))
    method = build(ESimCSE, encoder="transformer-32-1")
    for earlier in (queue[:0].detach(), queue.detach()):
        logits = torch.cat([cosines(z1, z2), cosines(z1, earlier)], 1) / 0.05
        expected = F.cross_entropy(logits, torch.arange(5))
        found = method.contrast(z1, z2, earlier=earlier)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5) and found > 1
        for a, b in zip(torch.autograd.grad(found, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_repeated_sentences_are_not_their_own_negatives(caplog):
    items = build().read(["same", "same", "other", "same"])
    assert len(items) == 2 and "2 repeated sentences left out" in caplog.text
    assert isinstance(items, texts.Sentences)
