"""CoCoSoDa: what it augments, whom it compares, what its queues hold; from a table of code to a search."""

import csv
import json
import signal

import numpy as np
import pytest
import torch
import yaml

from counterpoint import cli, contrast
from counterpoint.contrast.multimodal import Queues, multimodal_contrast
from counterpoint.data import code
from counterpoint.errors import InputError
from counterpoint.evaluate.runs import evaluate
from counterpoint.evaluate.validation import scorer
from counterpoint.export import export, load_encoder
from counterpoint.methods.language.cocosoda import CoCoSoDa
from counterpoint.methods.language.simcse import SimCSE, columns
from counterpoint.train import Method, Run, fit, resume
from counterpoint.train.checkpoint import load_state
from counterpoint.train.chunks import in_chunks

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
NAMES = ("age", "name", "size", "path", "file", "line", "word", "date", "user", "cost", "list", "tree")
TABLE = {
    "query": [f"get the {name}" for name in NAMES] + [f"set the {name}" for name in NAMES],
    "code": [f"def get_{n}(x):\n    return x.{n}" for n in NAMES]
    + [f'x.{n} = "unfinished\n// 1' for n in NAMES],  # no Python
}

pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed=0, **options):
    torch.manual_seed(seed)
    given = {
        "encoder": dict(TINY),
        "max_length": 48,
        "query_length": 24,
        "dropout": 0.0,
        "queue": 6,
        "logit_scale": 1.0,
    }
    return CoCoSoDa(**{**given, **options}).train()


def batch_of(method, rows=8):
    return method.read(TABLE).take(torch.arange(rows) * 24 // rows)


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("options", [{}, {"intra": False}, {"queue": 0}, {"head": True}, {"logit_scale": 20.0}])
def test_the_loss_is_that_of_the_vectors_one_by_one(options):
    method = build(augment="none", **options)
    with torch.no_grad():  # so that the copy is another one
        for p in method.key_encoder.parameters():
            p += 0.01 * torch.randn_like(p)
    batch = batch_of(method)

    def vectors(encoder, head):
        rows = [
            head(encoder(ids[None], mask[None]).pooled)
            for part in columns(batch)
            for ids, mask in zip(*part, strict=True)
        ]
        return torch.cat(rows).tensor_split(2)

    query, source = vectors(method.encoder, method.head)
    with torch.no_grad():
        key_query, key_source = vectors(method.key_encoder.module, method.key_head.module)
    before = Queues(*(queue.keys.clone() for queue in method.queues))
    assert len(method.queues) == (0 if options.get("queue") == 0 else 4)
    expected = multimodal_contrast(
        source, query, key_source, key_query, before,
        temperature=0.07 / options.get("logit_scale", 1.0), intra=options.get("intra", True),
    )  # fmt: skip
    torch.testing.assert_close(method.loss(batch), expected, rtol=1e-4, atol=1e-5)
    # the queues of code and query hold what the encoder made of them, those of keys what the copy made, the newest 6 of 8
    for queue, rows in zip(method.queues, (source, query, key_source, key_query), strict=False):
        torch.testing.assert_close(queue.oldest_first, contrast.unit(rows.detach())[-6:], rtol=1e-4, atol=1e-5)


def test_the_copy_follows_and_learns_nothing_itself():
    method = build(momentum=0.9)
    method.loss(batch_of(method)).backward()
    assert all(p.grad is None for p in method.key_encoder.parameters())
    assert all(p.grad is not None for name, p in method.encoder.named_parameters())
    first = [p.clone() for p in method.key_encoder.parameters()]
    with torch.no_grad():
        for p in method.encoder.parameters():
            p += 1
    method.after_step()
    for before, after in zip(first, method.key_encoder.parameters(), strict=True):
        torch.testing.assert_close(after, before + 0.1)
    groups = {id(p) for group in method.parameter_groups() for p in group["params"] if p.requires_grad}
    assert not groups & {id(p) for p in method.key_encoder.parameters()}


def test_the_copy_has_dropout_of_its_own():
    method = build(dropout=0.3, augment="none")
    rows = columns(batch_of(method))
    one, other = method.keys(*rows), method.keys(*rows)
    assert not torch.allclose(one[0], other[0])
    assert torch.equal(method.eval().keys(*rows)[0], method.keys(*rows)[0])


# ---------------------------------------------------------------------------------------------------------- augmentation


def turns(method, batch, step):
    """Which tokens changed in queries and code, and what they became."""
    (query, source), (new_query, new_source) = columns(batch), method.augmented(batch, step)
    assert torch.equal(query[1], new_query[1]) and torch.equal(source[1], new_source[1])
    return (query[0], new_query[0]), (source[0], new_source[0])


def test_steps_take_turns():
    method = build(rate=1.0)
    batch = batch_of(method)
    kinds = batch["positive_kinds"]
    assert {code.KINDS[k] for k in kinds.unique().tolist() if k >= 0} >= {
        "keyword",
        "identifier",
        "string",
        "operator",
    }
    special = torch.isin(batch["positive_input_ids"], torch.tensor(method.encoder.tokenizer.all_special_ids[:5]))

    (query, new_query), (source, new_source) = turns(method, batch, 0)
    for ids, new in ((query, new_query), (source, new_source)):
        inner = batch["attention_mask"].bool() if ids is query else batch["positive_attention_mask"].bool()
        inner = inner & ~torch.isin(ids, method.special)
        assert torch.equal(ids[~inner], new[~inner])
        assert (new[inner] == method.mask_token).float().mean() == pytest.approx(0.8, abs=0.1)
        random = (new[inner] != ids[inner]) & (new[inner] != method.mask_token)
        assert 0.02 < random.float().mean() < 0.2

    (query, new_query), (source, new_source) = turns(method, batch, 1)
    changed = source != new_source
    assert torch.equal(query, new_query) and torch.equal(new_source[changed], method.types[kinds[changed]])
    assert (changed[kinds >= 0]).float().mean() == pytest.approx(0.8, abs=0.1) and not changed[kinds < 0].any()
    assert not changed[special].any()

    for step, into in ((6, lambda t: method.types[t]), (7, lambda t: torch.tensor(method.mask_token))):
        seen = set()
        for seed in range(30):
            torch.manual_seed(seed)
            (query, new_query), (source, new_source) = turns(method, batch, step)
            changed = source != new_source
            types = kinds[changed].unique().tolist()
            assert torch.equal(query, new_query) and len(types) <= 1
            if types:
                seen.add(types[0])
                assert (new_source[changed] == into(types[0])).all()
                assert changed[kinds == types[0]].float().mean() > 0.4
        assert len(seen) >= 4


@pytest.mark.parametrize("augment, busy", [("mask", (0, 1, 2, 3)), ("released", (0,)), ("none", ())])
def test_other_ways_to_augment(augment, busy):
    method = build(rate=1.0, augment=augment)
    batch = batch_of(method)
    assert "positive_kinds" not in batch and len(method.encoder.tokenizer) == method.vocabulary
    for step in range(4):
        changed = [bool((old != new).any()) for old, new in turns(method, batch, step)]
        assert changed == [step in busy] * 2


def test_a_tenth_of_the_tokens_changes_by_default():
    method = build()
    batch = batch_of(method, 24)
    share = np.mean(
        [
            (a != b)[batch["positive_kinds"] >= 0].float().mean()
            for _, (a, b) in (turns(method, batch, 1) for _ in range(40))
        ]
    )
    assert share == pytest.approx(0.08, abs=0.01)


def test_types_are_new_tokens_that_mean_their_names():
    method = build()
    tokenizer, table = method.encoder.tokenizer, method.encoder.model.get_input_embeddings().weight
    assert tokenizer.convert_ids_to_tokens(method.types.tolist()) == [f"[code {kind}]" for kind in code.KINDS]
    name = tokenizer("code string", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(table[method.types[code.STRING]], table[name].mean(0))
    assert len(tokenizer("x[string]")["input_ids"]) == 2 + len("x[string]")  # what code may spell is no type token


# ------------------------------------------------------------------------------------------------------------------ data


def test_queries_and_code_have_their_lengths_and_tokens_their_kinds(caplog):
    method = build(max_length=20, query_length=8)
    items = method.read(TABLE)
    assert int(items.ids["anchor"].lengths.max()) == 8 and int(items.ids["positive"].lengths.max()) == 20
    assert torch.equal(items.ids["positive"].lengths, items.kinds["positive"].lengths)
    assert method.encoder.max_length == 20 and "cut to 8 tokens" in caplog.text and "cut to 20 tokens" in caplog.text
    assert torch.equal(
        items.to("cpu").subset([3]).take(torch.tensor([0]))["positive_kinds"],
        items.take(torch.tensor([3]))["positive_kinds"],
    )


def test_pairs_are_needed_and_refused_ones_and_further_columns_left_out():
    method = build()
    with pytest.raises(InputError, match="holds no pairs of query and code"):
        method.read(["only", "sentences"])
    with pytest.raises(InputError, match="holds no pairs of query and code"):
        method.read({"sentence1": ["a"], "sentence2": ["b"], "score": [1.0]})
    assert len(method.read({**TABLE, "label": [1, 0] * 12})) == 12
    triples = {"anchor": ["a", "b"], "positive": ["c", "d"], "negative": ["e", "f"]}
    assert [*method.read(triples).ids] == ["anchor", "positive"]


def test_empty_code_is_left_out_of_training_and_has_a_vector(caplog):
    method = build()
    rows = {"query": ["a b", "c d", "e f"], "code": ["x = 1", "   ", "y"]}
    assert len(method.read(rows)) == 2 and "1 rows with an empty sentence left out" in caplog.text
    assert np.isfinite(method.encode(["", "x"])).all()


def test_a_queue_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds 24 pairs and the queue 24, .* give --queue 6 or less"):
        fit(build(queue=24), TABLE, run=tmp_path / "r", batch_size=4, progress=False)
    assert not (tmp_path / "r").exists()
    with pytest.raises(InputError, match="contrast needs at least two items in a batch"):
        fit(build(), TABLE, run=tmp_path / "r", batch_size=1, progress=False)


def test_a_batch_of_one_still_has_the_queue():
    method = build()
    loss = method.loss(batch_of(method, 1))
    loss.backward()
    assert loss > 0 and all(p.grad.isfinite().all() for p in method.encoder.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"augment": "all"}, "augment must be one of types, mask, released, none"),
        ({"batches": "small"}, "batches must be one of mixed, domain"),
        ({"temperature": 0.0}, "temperature and logit_scale are positive"),
        ({"rate": 1.5}, "rate lies between 0 and 1"),
        ({"queue": -1}, "queue is 0 or more"),
        ({"query_length": 2}, "query_length must lie between 3 and"),
        ({"momentum": 2.0}, "momentum lies between 0 and 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_batches_of_one_language(tmp_path, monkeypatch):
    data = {**TABLE, "domain": ["python", "c"] * 12}
    method, seen, original = build(batches="domain"), [], Method.training_step
    monkeypatch.setattr(
        Method,
        "training_step",
        lambda self, batch, i: seen.append(batch["domain"].tolist()) or original(self, batch, i),
    )
    fit(method, data, run=tmp_path / "r", epochs=2, batch_size=4, progress=False)
    assert len(seen) == 12 and all(len(set(domains)) == 1 for domains in seen) and {d for d, *_ in seen} == {0, 1}


def test_chunks_change_neither_loss_nor_gradient():
    found = []
    for size in (None, 3):
        method = build()
        batch = batch_of(method)
        with in_chunks(method, size):
            torch.manual_seed(1)
            loss = method.loss(batch)
            found.append([loss, *torch.autograd.grad(loss, list(method.encoder.parameters()))])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- training


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("query", "code"), *rows])
    return path


def test_a_stopped_training_goes_on_exactly(tmp_path, monkeypatch):
    data = write(tmp_path / "pairs.csv", zip(*TABLE.values(), strict=True))
    options = {
        "epochs": 2,
        "batch_size": 4,
        "lr": 0.01,
        "optimizer": "adamw",
        "checkpoint_seconds": 0,
        "progress": False,
    }
    entire = fit(build(dropout=0.1, rate=0.5), data, run=tmp_path / "entire", **options)
    original, seen = Method.training_step, []

    def step(self, *arguments):
        seen.append(1)
        if len(seen) == 7:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", step)
        assert fit(build(dropout=0.1, rate=0.5), data, run=tmp_path / "stopped", **options).interrupted
    again = resume(tmp_path / "stopped")
    one, two = (
        load_state(tmp_path / name / "checkpoints" / "last.safetensors")["state_dict"] for name in ("entire", "stopped")
    )
    assert {"queues.3.bank", "queues.0.pointer"} <= one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert np.array_equal(entire.encode(TABLE["code"]), again.encode(TABLE["code"]))


def test_from_a_table_to_a_search(tmp_path, capsys):
    """The command line, end to end; what is found was held out."""
    verbs = ("get", "set", "del", "add", "sort", "read", "find", "copy")
    rows = [(f"{verb} the {name}", f"def f(x):\n    {verb}({name}) ;") for verb in verbs for name in NAMES]
    held = rows[::7]
    train = write(tmp_path / "train.csv", [row for row in rows if row not in held])
    test = write(tmp_path / "test.csv", held)
    run = tmp_path / "run"
    options = ["--encoder", yaml.dump(TINY, default_flow_style=True).strip(), "--max_length", "48", "--queue", "16"]
    options += ["--epochs", "12", "--batch_size", "16", "--lr", "0.01", "--progress", "false"]
    assert cli.main(["train", "cocosoda-fresh", "--data", str(train), "--run", str(run), *options]) == 0
    assert cli.main(["evaluate", str(run), "--data", str(test)]) == 0
    found = {r["subject"]: r for r in json.loads((run / "evaluation.json").read_text())}
    assert found.keys() == {"trained", "untrained", "bag of words"} and found["trained"]["protocol"] == "code-search"
    assert found["trained"]["value"] > found["untrained"]["value"] + 5 and found["trained"]["n"] == len(held)
    assert found["trained"]["detail"]["candidates"] == len(held)
    codes = tmp_path / "codes.jsonl"
    codes.write_text("\n".join(json.dumps({"path": f"{i}.py", "code": row[1]}) for i, row in enumerate(held)))
    capsys.readouterr()
    for source in (codes, test):  # code alone, or the code of a table of pairs
        assert cli.main(["index", str(run), "--data", str(source), "--out", str(tmp_path / source.stem)]) == 0
        assert f"{len(held)} vectors" in capsys.readouterr().out
        assert cli.main(["search", str(tmp_path / source.stem), held[3][0], "-k", "3", "--json"]) == 0
        results = json.loads(capsys.readouterr().out)[0]["results"]
        assert {result["id"] for result in results} <= {answer for _, answer in held}
    with pytest.raises(InputError, match="give --data with columns query and code"):
        evaluate(Run.open(run))  # what training saw
    assert cli.main(["embed", str(run), "--data", str(codes), "--out", str(tmp_path / "v.npz")]) == 0
    with np.load(tmp_path / "v.npz") as file:
        assert file["vector"].shape == (len(held), 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cocosoda") / "run"
    options = {"epochs": 1, "batch_size": 8, "limit": 64, "lr": 0.01, "progress": False, "validate": 1}
    return fit(build(), "same-topic-pairs", run=folder, **options)


def test_named_pairs_are_searched_in_their_held_out_part(run):
    (look,) = [json.loads(line) for line in (run.folder / "validation.jsonl").open()]
    assert look["protocol"] == "code-search-dev" and look["MRR"] > 0
    found = {result.subject: result for result in evaluate(run)}
    assert {"trained", "best on validation", "untrained", "bag of words"} == found.keys()
    assert {result.protocol for result in found.values()} == {"code-search"}
    (named,) = [
        r
        for r in evaluate(run, protocols=["code-search:same-topic-pairs"], trained_only=True)
        if r.subject == "trained"
    ]
    assert named.value == pytest.approx(found["trained"].value) and named.protocol == "code-search:same-topic-pairs"
    with pytest.raises(InputError, match="brown holds no pairs that training did not see"):
        evaluate(run, protocols=["code-search:brown"])
    with pytest.raises(
        InputError, match=r"validate looks for answers in the dev part of named pairs, which .* has not"
    ):
        scorer(run.method, TABLE)


def test_any_method_of_sentences_can_be_asked_for_code_search(tmp_path):
    torch.manual_seed(0)
    method = SimCSE(dict(TINY), max_length=48)
    trained = fit(method, TABLE, run=tmp_path / "r", epochs=1, batch_size=8, progress=False)
    trained.write("config.yaml", trained.config | {"data": "own"})
    table = write(tmp_path / "test.csv", [("get the age", "x.age"), ("get the name", "x.name")])
    (found,) = evaluate(trained, table, protocols=["code-search"], trained_only=True)
    assert found.n == 2 and found.detail["candidates"] == 2


def test_an_exported_encoder_knows_the_types(run):
    path, difference = export(run, "safetensors")
    encoder = load_encoder(path)
    assert difference == 0 and encoder.tokenizer.convert_tokens_to_ids("[code string]") == int(
        run.method.types[code.STRING]
    )


def test_an_encoder_that_knows_the_types_keeps_them(run, tmp_path):
    pytest.importorskip("sentence_transformers")
    path, _ = export(run, "sentence-transformers", tmp_path / "folder")
    again = CoCoSoDa(str(path), max_length=48, query_length=24, queue=6)
    assert torch.equal(again.types, run.method.types.cpu())
    before, after = (m.encoder.model.get_input_embeddings().weight for m in (run.model(), again))
    assert torch.equal(before.cpu(), after)
