"""Vega: what is hidden and what is a replacement, who learns from whom, shared tables, two phases, and a stop in between."""

import csv
import json
import shutil
from contextlib import suppress

import pytest
import torch
from torch.nn import functional as F

from counterpoint import cli
from counterpoint.contrast import info_nce
from counterpoint.errors import InputError
from counterpoint.methods.language.simcse import SimCSE
from counterpoint.methods.language.vega import Vega, drawn
from counterpoint.train import Run, fit, resume
from counterpoint.train.checkpoint import load_state
from counterpoint.views.text import mask_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DEBERTA = {"model_type": "deberta-v2", "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"],
           "position_biased_input": False, "type_vocab_size": 0}  # fmt: skip
SENTENCES = [f"{who} {what} {where}." for who in ("A dog", "The cats", "Anna") for what in ("runs", "is asleep")
             for where in ("there", "in the garden", "on top of the old house", "at sea")]  # fmt: skip
OPTIONS = {"batch_size": 8, "optimizer": "adamw", "lr": 3e-3, "progress": False, "log_every": 1}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.txt").write_text("\n".join(SENTENCES))


def build(seed=0, **options):
    torch.manual_seed(seed)
    return Vega(**{"encoder": dict(SIZES), "max_length": 48, **options}).train()


def batch_of(method, rows=8):
    return method.read(SENTENCES).take(torch.arange(rows))


def at_seed(function, *inputs, seed=7):
    torch.manual_seed(seed)
    return function(*inputs)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Guesser(torch.nn.Module):
    """A generator that is sure of one token at each place."""

    def __init__(self, encoder, answer):
        super().__init__()
        self.encoder, self.answer = encoder, answer

    def forward(self, ids, mask, at):
        return F.one_hot(self.answer(ids).flatten()[at], len(self.encoder.tokenizer)) * 100.0


# ---- one step --------------------------------------------------------------------------------------------------------


def test_each_term_by_hand():
    method = build(dropout=0.0, detection=4.0, beta=0.5)
    batch = batch_of(method)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = at_seed(method.loss, batch)
    torch.manual_seed(7)
    hidden = mask_tokens(ids, mask, method.special, rate=0.15)
    masked = ids.masked_fill(hidden, method.encoder.tokenizer.mask_token_id)
    scores = method.generator.head(method.generator.encoder(masked, mask).tokens)
    torch.testing.assert_close(found["generator"], F.cross_entropy(scores[hidden], ids[hidden]), rtol=1e-4, atol=1e-5)
    places = torch.rand(int(hidden.sum()), 1)
    upto = scores[hidden].softmax(1).cumsum(1)
    sampled = (upto <= places * upto[:, -1:]).sum(1)
    corrupted = ids.masked_scatter(hidden, sampled)
    tokens = method.encoder(corrupted, mask).tokens
    target = (corrupted != ids).float()
    assert 0 < target.sum() <= hidden.sum()
    told = F.binary_cross_entropy_with_logits(method.detector(tokens)[mask.bool()], target[mask.bool()])
    torch.testing.assert_close(found["detection"], 4 * told, rtol=1e-4, atol=1e-5)
    z = method.head(method.encoder(ids, mask).pooled)  # uncorrupted; without dropout both passes are the same
    torch.testing.assert_close(found["contrast"], 0.5 * info_nce(z, z, temperature=0.05), rtol=1e-4, atol=1e-4)


def test_a_sampled_token_that_is_right_is_no_replacement():
    method = build(dropout=0.0)
    batch = batch_of(method)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    method.generator = Guesser(method.encoder, lambda _: ids)
    corrupted, loss = method.corrupted(ids, mask)
    assert torch.equal(corrupted, ids) and loss < 1e-3
    scores = method.detector(method.encoder.hidden(ids, mask))[mask.bool()]
    none = F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores))
    torch.testing.assert_close(method.found_out(corrupted, ids, mask), none)
    wrong = (ids + 1) % 200 + 5
    method.generator = Guesser(method.encoder, lambda _: wrong)
    corrupted, _ = at_seed(method.corrupted, ids, mask)
    hidden = at_seed(lambda: mask_tokens(ids, mask, method.special, rate=0.15))
    assert torch.equal(corrupted, wrong.where(hidden, ids))
    counted = hidden[mask.bool()].float()
    scores = method.detector(method.encoder.hidden(corrupted, mask))[mask.bool()]
    expected = F.binary_cross_entropy_with_logits(scores, counted)
    torch.testing.assert_close(method.found_out(corrupted, ids, mask), expected)


def test_marks_and_padding_are_never_hidden():
    method = build(mask_rate=0.5)
    batch = batch_of(method)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    method.generator = Guesser(method.encoder, lambda x: torch.full_like(x, 250))
    for seed in range(5):
        corrupted, _ = at_seed(method.corrupted, ids, mask, seed=seed)
        changed = corrupted != ids
        assert not changed[torch.isin(ids, method.special)].any() and not changed[mask == 0].any()
        assert (changed.sum(1) == (0.5 * mask.sum(1)).round()).all()


def test_tokens_are_drawn_as_often_as_they_are_likely():
    torch.manual_seed(0)
    p = torch.tensor([[0.6, 0.0, 0.3, 0.1], [0.0, 0.0, 0.0, 1.0]])
    found = torch.stack([drawn(p.log()) for _ in range(4000)])
    share = F.one_hot(found, 4).float().mean(0)
    torch.testing.assert_close(share, p, atol=0.03, rtol=0)
    assert share[0, 1] == 0 and (found[:, 1] == 3).all()


# ---- who learns from whom ----------------------------------------------------------------------------------------------


def gradients(method, term):
    method.zero_grad()
    at_seed(method.loss, batch_of(method))[term].backward()
    return {name for name, p in method.named_parameters(remove_duplicate=False) if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("sharing", ["gdes", "none"])
def test_no_gradient_goes_from_the_encoder_to_the_generator_or_back(sharing):
    method = build(sharing=sharing)
    for term in ("detection", "contrast"):
        assert not any(name.startswith("generator.") for name in gradients(method, term))
    assert all(name.startswith("generator.") for name in gradients(method, "generator"))
    assert any(name.startswith("detector.") for name in gradients(method, "detection"))
    assert not any(name.startswith("detector.") for name in gradients(method, "contrast"))


def tables(method):
    leader, follower = (part.model.get_input_embeddings() for part in (method.generator.encoder, method.encoder))
    return leader.weight, follower.weight


def test_differences_start_at_zero_and_are_all_that_the_encoder_adds():
    method = build(sharing="gdes", dropout=0.0)
    leader, follower = tables(method)
    assert leader is not follower and torch.equal(leader, follower)
    before = leader.detach().clone()
    sum(at_seed(method.loss, batch_of(method)).values()).backward()
    pulled = follower.grad.clone()
    assert not torch.allclose(leader.grad, pulled)
    torch.optim.SGD(method.parameters(), lr=0.1).step()
    method.after_step()
    assert not torch.equal(leader, before)
    torch.testing.assert_close(follower - leader, -0.1 * pulled, atol=1e-6, rtol=1e-4)


def test_one_table_for_both_is_pulled_by_both():
    method = build(sharing="es")
    leader, follower = tables(method)
    assert leader is follower and method.shared is None
    name = "encoder.model.embeddings.word_embeddings.weight"
    assert all(name in gradients(method, term) for term in ("generator", "detection", "contrast"))
    leader, follower = tables(build(sharing="none"))
    assert not torch.equal(leader, follower)


def test_shared_tables_do_not_decay():
    method = build()
    method.optimisation = type(method.optimisation)(weight_decay=0.1)
    decayed, spared = ({id(p) for p in group["params"]} for group in method.parameter_groups())
    follower = tables(method)[1]
    assert id(follower) in spared and id(follower) not in decayed
    assert len(decayed) + len(spared) == len([*method.parameters()])


# ---- phases ----------------------------------------------------------------------------------------------------------


def phase1(folder="one", **options):
    method = build(**{"seed": 3, "beta": 0.0, "encoder": {**SIZES, **DEBERTA}, **options})
    return fit(method, "d.txt", run=folder, epochs=2, **OPTIONS)


def test_the_first_phase_contrasts_nothing():
    method = build(beta=0.0)
    assert method.loss(batch_of(method)).keys() == {"generator", "detection"}
    assert isinstance(method.head, torch.nn.Identity)
    assert build().loss(batch_of(build())).keys() == {"generator", "detection", "contrast"}
    assert build(head=False).loss(batch_of(build())).keys() == {"generator", "detection", "contrast"}


def test_the_second_phase_goes_on_from_the_first():
    run = phase1()
    method = build(encoder=None, start="one")
    old, new = run.model().state_dict(), method.state_dict()
    assert {name for name in new if name not in old} == {"head.0.weight", "head.0.bias"}
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert method.arguments["encoder"] == {**SIZES, **DEBERTA} and method.beta == 1.0
    leader, follower = tables(method)
    moved = (follower - leader).detach().clone()
    assert moved.any()  # the differences of the first phase stay
    method.after_step()
    torch.testing.assert_close(tables(method)[1] - tables(method)[0], moved)
    second = fit(method, "d.txt", run="two", epochs=1, **OPTIONS)
    lines = [json.loads(line) for line in (second.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["terms"].keys() == {"generator", "detection", "contrast"} for line in lines)
    shutil.rmtree("one")
    assert same(Run.open("two").model().state_dict(), second.method.state_dict())
    assert Run.open("two").encode(["a dog"]).shape == (1, 16)


def test_both_phases_from_the_command_line(capsys):
    small = ["--encoder", "transformer-32-2", "--max_length", "48", "--batch_size", "8", "--epochs", "1"]
    options = ["--data", "d.txt", "--progress", "false"]
    assert cli.main(["train", "vega", *small, *options, "--beta", "0", "--run", "one"]) == 0
    assert cli.main(["train", "vega", *small[2:], *options, "--start", "one", "--run", "two"]) == 0
    assert Run.open("two").config["model"]["encoder"] == "transformer-32-2"
    assert cli.main(["train", "vega", *options, "--start", "one", "--sharing", "es", "--run", "three"]) == 2
    assert "sharing is es, but one was trained with gdes: leave sharing out" in capsys.readouterr().err


@pytest.mark.parametrize("sharing", ["gdes", "es", "none"])
def test_stopped_and_resumed_it_ends_where_it_would_have(monkeypatch, sharing):
    options = {**OPTIONS, "epochs": 4, "checkpoint_seconds": 0}
    fit(build(sharing=sharing), "d.txt", run="whole", **options)
    original = Vega.loss

    def stop(self, batch):
        if self.global_step == 8:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Vega, "loss", stop)
        fit(build(sharing=sharing), "d.txt", run="stopped", **options)
    resumed = resume("stopped")
    one, two = (load_state(Run.open(name).checkpoint)["state_dict"] for name in ("whole", "stopped"))
    assert same(one, two)
    leader, follower = tables(resumed.method)
    assert (leader is follower) == (sharing == "es")


def test_it_learns_to_find_replaced_tokens():
    run = fit(build(beta=0.0, dropout=0.0), "d.txt", run="run", epochs=40, **{**OPTIONS, "lr": 1e-2})
    lines = [json.loads(line)["terms"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    first, last = (
        {term: sum(line[term] for line in part) for term in ("generator", "detection")}
        for part in (lines[:6], lines[-6:])
    )
    assert last["generator"] < 0.7 * first["generator"] and last["detection"] < 0.8 * first["detection"]


# ---- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharing": "both"}, 'sharing must be one of gdes, es, none, not "both"'),
        ({"mask_rate": 0.0}, "mask_rate lies between 0 and 1"),
        ({"beta": -1.0}, "detection and beta are not negative"),
        ({"generator": {**SIZES, "hidden_size": 8}}, "cannot share embeddings: their tables of tokens are"),
        ({"generator": {**SIZES, "max_position_embeddings": 32}}, "the generator takes 32 tokens, max_length is 48"),
        ({"start": "nowhere", "encoder": None}, "nowhere is no run folder"),
        ({"start": "simcse", "encoder": None}, "start is simcse, a run of SimCSE and none of Vega"),
        (
            {"start": "one", "layers": 1, "encoder": None},
            "layers is 1, but one was trained with None: leave layers out",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    if options.get("start") == "simcse":
        fit(SimCSE(encoder=dict(SIZES), max_length=48), "d.txt", run="simcse", epochs=1, **OPTIONS)
    if options.get("start") == "one":
        phase1()
    with pytest.raises(InputError, match=message):
        build(**options)


def test_models_that_read_different_tokens_are_refused(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(256))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "m")
    BertModel(BertConfig(vocab_size=len(words), **SIZES)).save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="generator and encoder read different tokens"):
        build(generator=str(tmp_path / "m"))


def test_pairs_are_read_as_single_sentences():
    with open("p.csv", "w", newline="") as file:
        csv.writer(file).writerows([("sentence1", "sentence2"), ("a", "b"), ("b", "c")])
    assert len(build().read("p.csv")) == 3
