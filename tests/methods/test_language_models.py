"""Language models as methods: the loss by hand, what SimCTG and LOL add, starting from each other, and going on after a stop."""

import json
import signal

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from counterpoint.cli import main
from counterpoint.contrast import isotropy, token_margin
from counterpoint.data import corpus
from counterpoint.errors import InputError
from counterpoint.methods.decoding.causal_lm import CausalLanguageModel
from counterpoint.methods.decoding.contrastive_search import SimCTG
from counterpoint.methods.decoding.lol import LOL
from counterpoint.train import Run, fit, resume
from counterpoint.train.checkpoint import load_state

ANIMALS = ("dog", "cat", "cow", "owl", "fox")
TEXT = [f"The {one} saw the {other} and the {one} went home." for one in ANIMALS for other in ANIMALS]
FALSE = [line.replace("went home", "flew away") for line in TEXT]
TINY = {"encoder": "decoder-32-2", "tokenizer": "bpe-320", "positions": 48, "max_length": 24}
FIT = {"batch_size": 8, "optimizer": "adam", "lr": 1e-2, "log_every": 1, "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


def build(cls=CausalLanguageModel, seed=0, **options):
    torch.manual_seed(seed)
    return cls(**{**TINY, **options}).train()


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    """A run that has learned the text."""
    place = tmp_path_factory.mktemp("expert")
    (place / "true.txt").write_text("\n".join(TEXT))
    (place / "false.txt").write_text("\n".join(FALSE))
    return fit(build(packed=False), place / "true.txt", run=place / "run", epochs=60, **FIT)


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_by_hand(packed):
    method = build(packed=packed)
    batch = method.read(["A cat.", *TEXT]).take(torch.arange(3))
    assert bool(batch["attention_mask"].all()) == packed
    logits = method.encoder(batch["input_ids"], batch["attention_mask"]).logits
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(method.loss(batch), expected)


def test_rows_of_text():
    method = build()
    rows = method.read(TEXT)
    documents = corpus.load(TEXT, "train")
    flat = [t for row in corpus.tokens(documents, method.encoder.tokenizer) for t in (*row, method.encoder.end)]
    assert len(rows) == len(flat) // 24 and rows.ids["anchor"].flat.tolist() == flat[: len(rows) * 24]
    single = build(packed=False).read(TEXT).take(torch.tensor([0]))["input_ids"][0]
    assert single[-1] == method.encoder.end and method.encoder.tokenizer.decode(single[:-1]) == TEXT[0]
    assert TEXT[19] in corpus.load(TEXT, "test") and TEXT[19] not in documents and len(documents) == 24
    assert corpus.load(TEXT, "all") == TEXT


def test_simctg_adds_the_margin_between_states():
    method = build(SimCTG, margin=0.7)
    batch = method.read(TEXT).take(torch.arange(4))
    terms = method.loss(batch)
    hidden = method.encoder(batch["input_ids"]).hidden
    torch.testing.assert_close(terms["token contrast"], token_margin(hidden, batch["attention_mask"], margin=0.7))
    plain = build()
    plain.load_state_dict(method.state_dict())
    torch.testing.assert_close(terms["next token"], plain.loss(batch))
    assert build(SimCTG, contrast_weight=0.0).loss(batch)["token contrast"] == 0
    terms["token contrast"].backward()
    assert method.encoder.model.transformer.h[0].attn.c_attn.weight.grad.abs().sum() > 0


def test_simctg_makes_states_differ_and_a_training_goes_on_exactly(tmp_path):
    found = {}
    for name, cls in (("lm", CausalLanguageModel), ("simctg", SimCTG)):
        run = fit(build(cls), TEXT * 4, run=tmp_path / name, epochs=8, **FIT)
        batch = run.method.read(TEXT).take(torch.arange(8))
        states = run.method.encoder(batch["input_ids"]).hidden.detach()
        found[name] = float(isotropy(states.flatten(0, 1), torch.full((8,), 24)))
        lines = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1] < lines[0] / 1.5
    assert found["simctg"] > found["lm"] + 0.05


def test_a_stopped_training_goes_on_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(TEXT * 4))

    original, seen = SimCTG.training_step, []

    def step(self, *arguments):
        seen.append(1)
        if len(seen) == 7:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    options = {**FIT, "epochs": 4, "checkpoint_seconds": 0.0}
    whole = fit(build(SimCTG), tmp_path / "a.txt", run=tmp_path / "whole", **options)
    monkeypatch.setattr(SimCTG, "training_step", step)
    stopped = fit(build(SimCTG), tmp_path / "a.txt", run=tmp_path / "stopped", **options)
    monkeypatch.undo()
    assert stopped.interrupted
    resume(tmp_path / "stopped")
    one, two = (
        load_state(tmp_path / name / "checkpoints" / "last.safetensors")["state_dict"] for name in ("whole", "stopped")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert (
        whole.model().encoder.tokenizer.get_vocab()
        == Run.open(tmp_path / "stopped").model().encoder.tokenizer.get_vocab()
    )


def test_a_later_run_keeps_the_earlier_ones_model_and_tokens(expert, tmp_path):
    later = SimCTG(start=str(expert.folder), packed=False)
    ours = expert.model().encoder
    assert later.arguments["encoder"] == TINY["encoder"] and later.encoder.positions == 48
    assert later.encoder.tokenizer.get_vocab() == ours.tokenizer.get_vocab()
    assert all(torch.equal(a, b) for a, b in zip(later.encoder.parameters(), ours.parameters(), strict=True))
    other = ["quite other words stand here"] * 30
    run = fit(later, other, run=tmp_path / "later", epochs=1, **FIT)
    opened = run.model()  # without the earlier run's help
    assert opened.encoder.tokenizer.get_vocab() == ours.tokenizer.get_vocab()
    with pytest.raises(InputError, match=r"tokenizer is bytes, but .* was trained with bpe-320"):
        SimCTG(start=str(expert.folder), tokenizer="bytes")


def test_lol_keeps_its_expert_and_prefers_what_the_amateur_does_not_say(expert, tmp_path):
    method = LOL(start=str(expert.folder), packed=False)
    before = {key: value.clone() for key, value in method.expert.state_dict().items()}
    run = fit(method, str(expert.folder.parent / "false.txt"), run=tmp_path / "lol", epochs=20, **FIT)
    opened = run.model()
    assert all(torch.equal(before[key], value) for key, value in opened.expert.state_dict().items())
    assert not torch.equal(before["model.transformer.wte.weight"], opened.encoder.model.transformer.wte.weight)
    assert not any(p.requires_grad for p in opened.expert.parameters()) and not method.train().expert.training
    import counterpoint as cp

    prompt = "The owl saw the fox and the owl"
    assert cp.generate(run, prompt, "contrastive") == cp.generate(run.folder, prompt, "lol", lower_weight=0.0)
    from counterpoint.decoding import Contrastive, Greedy, answer_scores, encoded

    lm, amateur = opened.models
    ids = encoded(lm, [prompt, prompt]), [lm.tokenizer(x)["input_ids"] for x in (" went home.", " flew away.")]
    options = {"relative_top": 0.0, "post_softmax": False}
    plain = answer_scores(Greedy(), lm, *ids)
    contrasted = answer_scores(Contrastive(**options), lm, *ids, amateur=amateur)
    assert contrasted[0] - contrasted[1] > plain[0] - plain[1]
    assert answer_scores(Greedy(), amateur, *ids).argmax() == 1


def test_from_the_command_line(expert, tmp_path, capsys):
    run = str(expert.folder)
    assert (
        main(
            ["evaluate", run, "--data", str(expert.folder.parent / "true.txt"), "--protocol", "perplexity", "isotropy"]
        )
        == 0
    )
    found = {
        (r["protocol"], r["subject"]): r["value"] for r in json.loads((expert.folder / "evaluation.json").read_text())
    }
    assert found["perplexity", "trained"] < found["perplexity", "untrained"] / 2
    assert 0 < found["isotropy", "trained"] < 2
    capsys.readouterr()
    prompt = "The dog saw the cow and"
    assert main(["generate", "--model", run, "--prompt", prompt, "--strategy", "greedy", "--max_new_tokens", "30"]) == 0
    shown = capsys.readouterr().out
    import counterpoint as cp

    assert shown == prompt + cp.generate(run, prompt, "greedy", max_new_tokens=30) + "\n"
    assert shown.endswith(" went home.\n")  # and there it ends: it has learned as much
    (tmp_path / "prompts.txt").write_text("The dog saw\nThe cat\n\nThe owl saw the\n")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--k", "3", "--alpha", "0.2", "--max_new_tokens", "6"]
    assert main(["generate", "--model", run, *arguments, "--out", str(tmp_path / "out" / "a.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["The dog saw", "The cat", "The owl saw the"]
    assert lines[1]["continuation"] == cp.generate(run, "The cat", k=3, alpha=0.2, max_new_tokens=6)


def test_a_run_leaves_as_a_folder_of_transformers(expert, tmp_path):
    assert main(["export", str(expert.folder), "--to", "transformers", "--out", str(tmp_path / "folder")]) == 0
    import counterpoint as cp

    options = {"strategy": "dola", "max_new_tokens": 8, "stop": False}
    ours, stock = (cp.generate(place, "The dog saw", **options) for place in (expert.folder, tmp_path / "folder"))
    assert ours == stock != ""
    again = CausalLanguageModel(encoder=str(tmp_path / "folder"), max_length=24)
    assert again.encoder.learned and again.read(TEXT).take(torch.arange(2))["input_ids"].shape == (2, 24)


def test_documents_can_be_searched(expert, tmp_path, capsys):
    text, out = str(expert.folder.parent / "true.txt"), str(tmp_path / "index")
    assert main(["index", str(expert.folder), "--data", text, "--out", out]) == 0
    query = "The owl saw the cat and the owl went home"  # not quite one of them
    assert main(["search", out, query, "-k", "1", "--json"]) == 0
    shown = capsys.readouterr().out
    vectors = expert.model().encode([*TEXT, query])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = TEXT[int((vectors[:-1] @ vectors[-1]).argmax())]
    assert json.loads(shown[shown.index("[") :])[0]["results"][0]["id"] == nearest
    with pytest.raises(InputError, match="is its test: leave validate out"):
        fit(build(), TEXT, run=tmp_path / "x", validate=1, **FIT)


def test_documents_are_embedded_one_by_one(expert):
    vectors = expert.model().encode(TEXT[:3])
    assert vectors.shape == (3, 32)
    method = expert.model()
    ids = torch.tensor([method.encoder.tokenizer(TEXT[1])["input_ids"]])
    torch.testing.assert_close(torch.from_numpy(vectors[1]), method.encoder(ids).hidden.mean(1)[0].detach())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "x", "--prompts", "y"], "give --prompt TEXT, or --prompts FILE"),
        ([], "give --prompt TEXT, or --prompts FILE"),
        (["--prompt", "x", "--strategy", "gredy"], "did you mean greedy"),
        (["--prompt", "x", "--kk", "3"], 'contrastive-search has no setting "kk"'),
        (["--prompt", "x", "--max_tokens", "3"], "did you mean --max_new_tokens"),
        (["--prompt", "x", "--strategy", "contrastive"], "name the other one with --amateur"),
        (["--prompt", "x", "--amateur", "RUN"], "no use for an amateur"),
        (["--prompt", "x", "--instruction", "Tell the truth."], "contrasts with no instruction"),
        (["--prompt", "x " * 80], "prompt 1 has .* tokens, but .* takes 48"),
        (["--prompt", "x", "--k", "1000"], "k is 1,000, but the vocabulary has"),
        (["--prompts", "missing.txt"], "there is no file missing.txt"),
        (["--prompts", "EMPTY"], "holds no prompt"),
        (["--prompts", "LATIN"], "line 2 of .* is not UTF-8"),
    ],
)
def test_generate_refuses(expert, tmp_path, capsys, arguments, message):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    places = {"EMPTY": tmp_path / "empty.txt", "LATIN": tmp_path / "latin.txt", "RUN": expert.folder}
    found = [str(places.get(argument, argument)) for argument in arguments]
    assert main(["generate", "--model", str(expert.folder), *found]) == 2
    import re

    shown = capsys.readouterr()
    said = shown.err.strip().splitlines()
    assert re.search(message, said[-1]), said
    assert shown.out == ""  # not even the prompt


def test_an_amateur_with_other_tokens_is_refused(expert, tmp_path, capsys):
    other = fit(build(tokenizer="bytes"), TEXT, run=tmp_path / "other", epochs=1, **FIT)
    arguments = ["generate", "--model", str(expert.folder), "--prompt", "x", "--strategy", "lol"]
    assert main([*arguments, "--amateur", str(other.folder)]) == 2
    said = capsys.readouterr().err
    assert "have different tokenisers" in said and "the amateur must share the expert's" in said


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build(max_length=200), "max_length must lie between 2 and 48"),
        (lambda: build(SimCTG, margin=3.0), "margin lies between 0 and 2"),
        (lambda: build().read("no-such-text"), "neither a file nor one of brown-text"),
        (lambda: build().read([" "]), "the list holds no text"),
        (lambda: build().read(["a b"]), "less than one row of 24"),
        (lambda: corpus.load(["a b"], "test"), "of which none is held out"),
        (lambda: corpus.load(["a b"], "dev"), "splits train, test and all"),
        (lambda: corpus.load(3), "not from int"),
    ],
)
def test_it_refuses(call, message):
    with pytest.raises(InputError, match=message):
        call()
