"""MoE embeddings: losses step by step, domains from the data to the vectors, training, resuming, export."""

import json
import logging
import signal

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from counterpoint import contrast
from counterpoint.contrast.routing import load_balancing, specified_expert
from counterpoint.data import texts
from counterpoint.errors import InputError
from counterpoint.evaluate.runs import evaluate
from counterpoint.export import export, load_encoder
from counterpoint.export.graphs import save_text
from counterpoint.methods.language.moe_embeddings import MoEEmbeddings
from counterpoint.methods.language.simcse import columns
from counterpoint.train import Method, fit, resume
from counterpoint.train.checkpoint import load_state
from counterpoint.train.chunks import in_chunks
from counterpoint.views.text import stack

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
ANIMALS = ("dog", "cat", "cow", "ant", "bee", "owl", "fox", "hen")
TABLE = {
    "anchor": [f"the {a} sleeps" for a in ANIMALS] * 2,
    "positive": [f"a {a} at night" for a in ANIMALS] + [f"{a} in the sun" for a in ANIMALS],
    "domain": ["night"] * 8 + ["day"] * 8,
}
DOMAINS = ("day", "night")

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed=0, **options):
    torch.manual_seed(seed)
    return MoEEmbeddings(
        **{"encoder": dict(TINY), "domains": DOMAINS, "max_length": 40, "dropout": 0.0, **options}
    ).train()


def batch_of(method, data=TABLE, rows=16):
    return method.read(data).take(torch.arange(rows))


def vectors(method, batch):
    """[B, D] of each column, as the loss should see them, a row at a time."""
    found = []
    for ids, mask in columns(batch):
        rows = [
            method.encoder.embed({"input_ids": i[None], "attention_mask": m[None], "domain": d[None]})
            for i, m, d in zip(ids, mask, batch["domain"], strict=True)
        ]
        found.append(method.head(torch.cat(rows)))
    return found


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("objective", ["clip", "mnr_plus", "mnr", "dcl"])
def test_the_loss_is_that_of_each_row_in_its_domain(objective):
    method = build(objective=objective, swap="none")
    with torch.no_grad():
        for part in method.modules():
            if type(part).__name__ == "Experts":
                part.experts[1][0].dense.weight += 0.3
    batch = batch_of(method)
    a, b = vectors(method, batch)
    expected = {
        "clip": lambda: contrast.relabelled_clip(a, b, temperature=0.7, normalize=False),
        "mnr_plus": lambda: contrast.relabelled_clip(a, b, temperature=1.0, normalize=False),
        "mnr": lambda: contrast.mnr(a, b),
        "dcl": lambda: contrast.dcl(a, b, temperature=0.05),
    }[objective]()
    assert method.loss(batch).keys() == {"contrast"}
    torch.testing.assert_close(method.loss(batch)["contrast"], expected, rtol=1e-4, atol=1e-5)


def test_the_temperature_of_clip_is_learned_as_it_is_and_stays_positive():
    method = build()
    (group,) = [g for g in method.parameter_groups() if any(p is method.temperature for p in g["params"])]
    assert group["weight_decay"] == 0 and method.temperature.item() == pytest.approx(0.7)
    method.loss(batch_of(method))["contrast"].backward()
    assert method.temperature.grad.abs() > 0
    with torch.no_grad():
        method.temperature -= 5
    method.after_step()
    assert method.temperature.item() == pytest.approx(0.01)
    assert not isinstance(build(objective="mnr").temperature, torch.Tensor)
    assert build(objective="mnr", temperature=0.2).temperature == 0.2


def test_sides_are_exchanged_together():
    method = build(swap="row")
    a, b = torch.randn(200, 3), torch.randn(200, 3)
    torch.manual_seed(0)
    one, other = method.swapped(a, b)
    turned = (one == b).all(1)
    assert 60 < turned.sum() < 140 and torch.equal(other, torch.where(turned[:, None], a, b))
    method.swap = "batch"
    sides = {bool(torch.equal(method.swapped(a, b)[0], b)) for _ in range(20)}
    assert sides == {True, False}


def test_router_losses_join_where_routing_is_learned():
    method = build(router="switch", router_weight=0.5, balance_weight=0.1, swap="none")
    batch = batch_of(method)
    ids = [(method.encoder.marked(i, batch["domain"]), m) for i, m in columns(batch)]
    _, routes = method.encoder.routed(*stack(ids, method.encoder.pad))
    terms = method.loss(batch)
    both = (routes[:, :16] + routes[:, 16:]) / 2
    torch.testing.assert_close(terms["router"], 0.5 * specified_expert(both, batch["domain"]))
    torch.testing.assert_close(terms["balance"], 0.1 * load_balancing(routes))
    assert build(router="token", router_weight=0.0).loss(batch).keys() == {"contrast"}


def test_a_learned_router_finds_the_domains(tmp_path):
    data = {**TABLE, "domain": ["day" if i % 2 else "night" for i in range(16)]}
    data["anchor"] = [f"{d} {d} {a}" for a, d in zip(data["anchor"], data["domain"], strict=True)]
    data["positive"] = [f"{d} {d} {a}" for a, d in zip(data["positive"], data["domain"], strict=True)]
    method = build(router="switch", domain_tokens=False)
    options = {"epochs": 30, "batch_size": 16, "optimizer": "adam", "lr": 3e-3, "progress": False}
    fit(method, data, run=tmp_path / "r", **options)
    items = method.read(data).take(torch.arange(16))
    with torch.no_grad():
        routes = method.eval().encoder(items["input_ids"], items["attention_mask"]).routes.mean(1)
    assert torch.equal(routes.argmax(1), items["domain"])


# --------------------------------------------------------------------------------------------------------------- domains


def test_domains_are_numbered_as_the_method_names_them():
    assert build().read(TABLE).domain.tolist() == [1] * 8 + [0] * 8
    assert build(domains=("night", "day", "more")).read(TABLE).domain.tolist() == [0] * 8 + [1] * 8
    with pytest.raises(InputError, match="has the domain night, but the model knows day"):
        build(domains=("day", "dusk")).read(TABLE)
    plain = {name: TABLE[name] for name in ("anchor", "positive")}
    with pytest.raises(InputError, match="does not say of which domain a row is: add a column domain with day, night"):
        build().training_items(plain)


def test_domains_of_the_data_are_not_passed_over():
    with pytest.raises(
        InputError, match=r"has the domains day, night: give --domains '\[day, night\]' for an expert each"
    ):
        build(domains=()).training_items(TABLE)
    assert len(build(domains=(), experts_in="none").training_items(TABLE)) == 16
    assert len(build(domains=(), experts=3, router="token").training_items(TABLE)) == 16


def test_encode_takes_a_domain(caplog):
    method = build()
    with torch.no_grad():
        method.encoder.model.get_input_embeddings().weight[method.encoder.domain_ids[1]] += torch.randn(16)
    sentences = TABLE["anchor"][:4]
    day, night = (method.encode(sentences, domain=name) for name in DOMAINS)
    assert day.shape == (4, 16) and not np.allclose(day, night, atol=1e-3)
    assert "no domain is given" not in caplog.text
    np.testing.assert_array_equal(method.encode(sentences), day)
    assert "no domain is given: the texts are taken to be of day" in caplog.text
    mixed = method.encode({"sentence": sentences, "domain": ["night", "day", "day", "night"]})
    np.testing.assert_allclose(mixed, np.stack([night[0], day[1], day[2], night[3]]), atol=1e-5)
    items = method.read(TABLE)
    assert np.array_equal(method.encode(items), method.encode(TABLE)) and items.domain.tolist() == [1] * 8 + [0] * 8
    with pytest.raises(InputError, match="there is no domain dusk; the model knows day, night"):
        method.encode(sentences, domain="dusk")


def test_a_joint_model_without_tokens_knows_no_domain(caplog):
    method = build(domains=())
    assert (
        method.encoder.layers == []
        and len(method.encoder.tokenizer) == len(build(domains=("x",)).encoder.tokenizer) - 1
    )
    caplog.set_level(logging.WARNING, "counterpoint")
    a = method.encode(TABLE)
    assert np.array_equal(a, method.encode(TABLE["anchor"])) and "no domain" not in caplog.text
    assert method.loss(batch_of(method))["contrast"].isfinite()


def test_labelled_pairs_give_their_positives_only():
    method = build()
    assert len(method.read({**TABLE, "label": [1, 0] * 8})) == 8


def test_batches_of_one_domain(tmp_path, monkeypatch):
    method, seen = build(batches="domain"), []
    original = Method.training_step
    monkeypatch.setattr(
        Method,
        "training_step",
        lambda self, batch, i: seen.append(batch["domain"].unique().tolist()) or original(self, batch, i),
    )
    fit(method, TABLE, run=tmp_path / "r", epochs=3, batch_size=4, progress=False)
    assert len(seen) == 12 and all(len(domains) == 1 for domains in seen) and {d for (d,) in seen} == {0, 1}
    assert build().grouping(0, method.read(TABLE)) is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"swap": "all"}, "swap must be one of batch, row, none"),
        ({"batches": "small"}, "batches must be one of mixed, domain"),
        ({"temperature": -1.0}, "temperature must be 0.01 or more, not -1"),
        ({"balance_weight": -0.1}, "weights of router losses are 0 or more"),
        ({"objective": "clop"}, 'no objective named "clop"'),
        ({"experts": 3}, "enforced routing needs one expert for each of the 2 domains, not 3"),
        ({"domains": ("a", "b", "c"), "router": "token", "experts": 2}, "cannot tell 3 domains apart with 2 experts"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_pairs_that_training_saw_are_not_measured(tmp_path):
    table = tmp_path / "own.csv"
    rows = zip(*TABLE.values(), ["1"] * 16, strict=True)
    table.write_text("\n".join([",".join([*TABLE, "label"]), *map(",".join, rows)]) + "\n")
    trained = fit(build(), table, run=tmp_path / "r", epochs=1, batch_size=8, progress=False)
    for data in (None, table):
        with pytest.raises(InputError, match="no labelled pairs that training did not see"):
            evaluate(trained, data, protocols=["pair-f1"])


@pytest.mark.parametrize("router", ["enforced", "switch", "token"])
def test_chunks_change_neither_loss_nor_gradient(router):
    method = build(router=router, swap="none")
    batch, found = batch_of(method), []
    for size in (None, 5):
        with in_chunks(method, size):
            loss = sum(method.loss(batch).values())
            found.append([loss, *torch.autograd.grad(loss, list(method.parameters()), allow_unused=True)])
    for one, other in zip(*found, strict=True):
        assert one is other is None or torch.allclose(one, other, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- training

FIT = {"epochs": 2, "batch_size": 4, "lr": 0.01, "optimizer": "adamw", "checkpoint_seconds": 0, "progress": False}


def test_a_stopped_training_goes_on_exactly(tmp_path, monkeypatch):
    data = tmp_path / "pairs.csv"
    rows = zip(*TABLE.values(), strict=True)
    data.write_text("\n".join([",".join(TABLE), *map(",".join, rows)]) + "\n")
    options = {"router": "switch", "dropout": 0.1, "batches": "domain"}
    entire = fit(build(**options), data, run=tmp_path / "entire", **FIT)
    original, seen = Method.training_step, []

    def step(self, *arguments):
        seen.append(1)
        if len(seen) == 6:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", step)
        assert fit(build(**options), data, run=tmp_path / "stopped", **FIT).interrupted
    again = resume(tmp_path / "stopped")
    one, two = (
        load_state(tmp_path / name / "checkpoints" / "last.safetensors")["state_dict"] for name in ("entire", "stopped")
    )
    assert "temperature" in one and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert np.array_equal(entire.encode(TABLE), again.encode(TABLE))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "run"
    method = build(objective="mnr", head=False, max_length=48)
    options = {"epochs": 1, "batch_size": 32, "limit": 512, "optimizer": "adamw", "lr": 0.003, "progress": False}
    options |= {"validate": 1}
    method = build(objective="mnr", head=False, max_length=48, domains=("same-statement", "same-topic"))
    return fit(method, "same-statement-pairs+same-topic-pairs", run=folder, **options)


def test_evaluation_finds_the_held_out_pairs_of_each_domain(run, tmp_path):
    found = {result.subject: result for result in evaluate(run, protocols=["pair-f1"])}
    assert found.keys() == {"trained", "best on validation", "untrained", "bag of words"}
    assert {"same_statement", "same_topic"} <= found["trained"].detail.keys()
    assert found["trained"].value == found["best on validation"].value
    named = evaluate(run, protocols=["pair-f1:same-topic-pairs"], trained_only=True)
    assert [r.subject for r in named] == ["trained", "best on validation"]
    assert named[0].value == pytest.approx(found["trained"].detail["same_topic"])
    table = tmp_path / "own.csv"
    table.write_text("sentence1,sentence2,label\nIt rains,rain falls,1\nIt rains,the bread is fresh,0\n")
    (own,) = [r for r in evaluate(run, str(table)) if r.subject == "trained"]
    assert own.protocol == "pair-f1" and own.n == 2 and own.detail["data"] == str(table)
    with pytest.raises(InputError, match="holds no labelled pairs that training did not see"):
        evaluate(run, protocols=["pair-f1:brown"])


def test_validation_looks_at_the_dev_pairs(run):
    (look,) = [json.loads(line) for line in (run.folder / "validation.jsonl").open()]
    assert look["protocol"] == "pair-f1-dev" and look["F1max"] > 0 and run.best.is_file()


def test_an_exported_encoder_has_its_experts_and_domains(run):
    method = run.model()
    path, difference = export(run, "safetensors")
    encoder = load_encoder(path)
    assert difference == 0 and encoder.domains == method.domains
    batch = texts.tokenise(texts.load(TABLE["anchor"], whole=True), encoder.tokenizer, 48).take(torch.arange(16))
    for number, name in enumerate(method.domains):
        ids = encoder.marked(batch["input_ids"], torch.full((16,), number))
        with torch.no_grad():
            found = encoder(ids, batch["attention_mask"]).pooled
        np.testing.assert_allclose(found, method.encode(TABLE["anchor"], domain=name), atol=1e-5)
    with pytest.raises(InputError, match="no module for experts and domain tokens; export --to safetensors or onnx"):
        export(run, "sentence-transformers")


def test_an_onnx_graph_routes_by_the_first_token(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, difference = export(run, "onnx")
    assert difference < 1e-4
    assert save_text(build(router="token", experts=3).encoder.eval(), tmp_path / "token") < 1e-4
    method = run.model()
    session = onnxruntime.InferenceSession(path / "encoder.onnx", providers=["CPUExecutionProvider"])
    batch = texts.tokenise(texts.load(TABLE["anchor"], whole=True), method.encoder.tokenizer, 48).take(torch.arange(16))
    domain = torch.arange(16) % 2
    ids = method.encoder.marked(batch["input_ids"], domain)
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": batch["attention_mask"].numpy()})
    each = [method.encode(TABLE["anchor"], domain=name) for name in method.domains]
    np.testing.assert_allclose(found, np.where((domain == 0)[:, None], *each), atol=1e-4)


def test_a_single_model_leaves_for_sentence_transformers(tmp_path):
    pytest.importorskip("sentence_transformers")
    single = fit(
        build(domains=(), max_length=48), {k: TABLE[k] for k in ("anchor", "positive")}, run=tmp_path / "s", **FIT
    )
    single.write("config.yaml", single.config | {"data": "own"})
    assert export(single, "sentence-transformers")[1] < 1e-3


def test_what_the_experts_are_for(tmp_path):
    """Two domains that contradict each other: without their names nobody can satisfy both, with experts it is easy."""

    def score(**options):
        method = build(objective="mnr", head=False, domains=("a", "b"), **options)
        with torch.no_grad():
            rows = [(f"{x}{y}", f"{x}{z}", "a") for x in "0123" for y in "pqrs" for z in "pqrs" if y != z]
            rows += [(f"{y}{x}", f"{z}{x}", "b") for x in "pqrs" for y in "0123" for z in "0123" if y != z]
        data = dict(zip(("anchor", "positive", "domain"), map(list, zip(*rows, strict=True)), strict=True))
        fit(
            method,
            data,
            run=tmp_path / str(len(options)),
            epochs=25,
            batch_size=32,
            optimizer="adam",
            lr=5e-3,
            progress=False,
        )
        right = []
        for name, other in (("a", "0q"), ("b", "1p")):
            said = method.encode(["0p", "0q", "1p"], domain=name)
            cosine = F.normalize(torch.from_numpy(said), dim=1) @ F.normalize(torch.from_numpy(said[0]), dim=0)
            right.append(float(cosine[1] - cosine[2]) * (1 if other == "0q" else -1))
        return min(right)

    assert score() > 0.3 > 0.1 > score(experts_in="none", domain_tokens=False)
