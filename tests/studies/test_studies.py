"""Studies: the arithmetic of claims, intervals, verdicts, cached arms, fair comparisons; one tiny study end to end."""

import json
import re
import signal
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from counterpoint import methods
from counterpoint.errors import InputError
from counterpoint.recipes import experiment, fit_options, model_options, plain
from counterpoint.studies import Comparison, Study, compare, entries, reproduce
from counterpoint.studies.arms import interval, mean_of, run_arm
from counterpoint.studies.compare import SHARED
from counterpoint.studies.reproduce import judge, margin_of, value_of
from counterpoint.train import Method, Run
from counterpoint.train.checkpoint import load_state

CELL = {"baseline@32": 60.0, "method@32": 64.5, "baseline@256": 70.0, "method@256": 69.0}
TINY = {
    "data": "d.npz",
    "encoder": "convnet-4",
    "image_size": 16,
    "projection": [16, 8],
    "epochs": 1,
    "batch_size": 8,
    "progress": False,
    "log_every": 1,
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COUNTERPOINT_RESULTS", str(tmp_path / "results"))
    image = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)
    np.savez("d.npz", image=image, label=np.arange(40) % 4)


def study(**changes) -> Study:
    arms = {"baseline": {"recipe": "simclr", **TINY}, "method": {"recipe": "dcl", **TINY}}
    fields = {
        "slug": "dcl",
        "claim": "a claim",
        "metric": "knn-200-0.1",
        "effect": "method@8 - baseline@8",
        "expect": ["method@8 > baseline@8 - 200"],
        "seeds": [0, 1, 2],
        "budgets": {"cpu": arms, "small": arms},
        "over": {"batch_size": [8, 20]},
        "diagnose": "coupling",
    }
    return Study(**{**fields, **changes})


@pytest.fixture
def counted(monkeypatch):
    """How often a training started."""
    arms, seen = import_module("counterpoint.studies.arms"), []
    fit = arms.fit
    monkeypatch.setattr(arms, "fit", lambda *args, **options: (seen.append(options["run"]), fit(*args, **options))[1])
    return seen


# ---- expressions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("method@32 - baseline@32", 4.5),
        ("(method@32 - baseline@32) - (method@256 - baseline@256)", 5.5),
        ("0.5 * (baseline@256 - baseline@32)", 5.0),
        ("-method@32 / 2 + 1e1", -22.25),
        ("method@32 - baseline@32 * 2", -55.5),
        (" 3 ", 3.0),
    ],
)
def test_arithmetic_over_arms(text, value):
    assert value_of(text, CELL) == pytest.approx(value)


def test_negative_values_keep_their_sign():
    assert value_of("method - baseline", {"method": -3.0, "baseline": -5.0}) == 2
    assert value_of("2 * method", {"method": -1e-07, "baseline": 0.0}) == pytest.approx(-2e-07)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "abs(method@32)",
        "method@32 ** 2",
        "method@32 if 1 else 2",
        "'text'",
        "[1]",
        "method@32 > 1",
        "method@32 and 1",
        "method@32.real",
        "lambda: 1",
        "2 // 1",
        "1 +",
        "",
        "1 / 0",
        "unknown",
    ],
)
def test_nothing_but_arithmetic(text):
    with pytest.raises(InputError):
        value_of(text, CELL)


def test_an_arm_that_does_not_exist_is_named():
    with pytest.raises(InputError, match=r"method@64, which is no arm; there are baseline@32, method@32"):
        value_of("method@64 - baseline@32", CELL)
    with pytest.raises(InputError, match="names method, which is no arm"):
        value_of("method", CELL)


@pytest.mark.parametrize(
    ("text", "margin"),
    [
        ("method@32 - baseline@32 >= 2", 2.5),
        ("method@32 > baseline@32", 4.5),
        ("method@256 < baseline@256", 1.0),
        ("method@256 - method@32 < 0.5 * (baseline@256 - baseline@32)", 0.5),
        ("method@256 >= baseline@256", -1.0),
        ("baseline@32 <= 50", -10.0),
    ],
)
def test_margin_is_positive_where_the_claim_holds(text, margin):
    assert margin_of(text, CELL) == pytest.approx(margin)


@pytest.mark.parametrize("text", ["method@32", "1 < method@32 < 2", "method@32 == 3", "method@32 ="])
def test_an_expectation_has_two_sides(text):
    with pytest.raises(InputError, match="compares two sides"):
        margin_of(text, CELL)


def test_interval_is_students():
    values = [1.0, 2.5, 2.0, 4.0, 0.5]
    mean, between = interval(values)
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert mean == pytest.approx(np.mean(values)) and between == pytest.approx(expected)
    assert interval([3.0]) == (3.0, None)
    assert interval([2.0, 2.0]) == (2.0, (2.0, 2.0))


# ---- verdicts --------------------------------------------------------------------------------------------------------


def cells(**scores: list[float]) -> dict[str, list[dict]]:
    return {
        name.replace("_at_", "@"): [
            {
                "results": {"knn-200-0.1": {"trained": value, "untrained": 10.0, "raw pixels": 30.0}},
                "config": {"method": name, "seed": seed},
                "minutes": 0.1,
                "coupling": 0.5,
            }
            for seed, value in enumerate(values)
        ]
        for name, values in scores.items()
    }


def verdict(expect: list[str], method: list[float], baseline: list[float]) -> dict:
    plain = study(expect=expect, effect="method - baseline", over={})
    return judge(plain, "cpu", list(range(len(method))), cells(baseline=baseline, method=method))


def test_reproduced_needs_the_whole_interval():
    record = verdict(["method > baseline"], [62.0, 63.0, 64.0], [60.0, 60.5, 61.0])
    assert record["verdict"] == "reproduced" and record["effect"] == 2.5
    assert record["ci"] == pytest.approx(interval([2.0, 2.5, 3.0])[1]) and record["ci"][0] > 0
    assert record["expectations"] == [{"expect": "method > baseline", "margin": 2.5, "ci": record["ci"], "holds": True}]
    assert record["reference"] == {"untrained": 10.0, "raw pixels": 30.0}
    assert (
        record["arms"]["method"]["values"] == [62.0, 63.0, 64.0] and record["arms"]["method"]["coupling"] == [0.5] * 3
    )
    assert "seed" not in record["arms"]["method"]["config"]
    json.dumps(record)


def test_a_mean_above_zero_is_not_enough():
    record = verdict(["method > baseline"], [62.0, 60.0, 70.0], [60.0, 60.5, 61.0])
    assert record["effect"] > 3 and record["ci"][0] < 0 and record["verdict"] == "not_reproduced"


def test_seeds_are_paired():
    """The spread between seeds is large, that of the differences small."""
    record = verdict(["method > baseline"], [52.0, 62.1, 71.9], [50.0, 60.0, 70.0])
    assert record["verdict"] == "reproduced"


def test_a_threshold_counts():
    method, baseline = [62.9, 63.0, 63.1], [60.0, 60.0, 60.0]
    assert verdict(["method - baseline >= 2"], method, baseline)["verdict"] == "reproduced"
    record = verdict(["method - baseline >= 3"], method, baseline)
    assert record["verdict"] == "not_reproduced" and record["expectations"][0]["margin"] == pytest.approx(0)
    assert verdict(["method - baseline >= 3"], [63.0] * 3, baseline)["verdict"] == "reproduced"
    assert verdict(["method - baseline > 3"], [63.0] * 3, baseline)["verdict"] == "not_reproduced"


def test_every_expectation_must_hold():
    both = ["method > baseline", "method > baseline + 10"]
    record = verdict(both, [62.0, 63.0, 64.0], [60.0, 60.5, 61.0])
    assert [item["holds"] for item in record["expectations"]] == [True, False]
    assert record["verdict"] == "not_reproduced"


def test_one_seed_has_no_interval_and_no_verdict_in_favour():
    record = verdict(["method > baseline"], [70.0], [60.0])
    assert record["ci"] is None and record["verdict"] == "not_reproduced"


# ---- arms ------------------------------------------------------------------------------------------------------------


def test_a_finished_arm_is_read_not_trained_again(tmp_path, counted):
    arm = experiment("dcl", **TINY)
    first = run_arm(arm, 3, tmp_path / "arm", protocols=["knn-200-0.1"])
    assert run_arm(experiment("dcl", **TINY), 3, tmp_path / "arm", protocols=["knn-200-0.1"]) == first
    assert len(counted) == 1 and Run.open(tmp_path / "arm").config["fit"]["seed"] == 3
    assert set(first["results"]["knn-200-0.1"]) == {"trained", "untrained", "raw pixels"}
    assert first["minutes"] > 0 and 50 < first["memory_mb"] < 20_000
    assert first["coupling"] == pytest.approx(mean_of(Run.open(tmp_path / "arm"), "coupling"))
    assert mean_of(Run.open(tmp_path / "arm"), "absent") is None
    assert first["recorded"]["coupling"] == first["coupling"] and "loss" not in first["recorded"]
    assert -1 <= first["recorded"]["score_positive"] <= 1


def test_an_arm_gets_the_rows_that_learned_nothing_without_training_again(tmp_path, counted):
    arm = experiment("dcl", **TINY)
    alone = run_arm(arm, 0, tmp_path / "arm", protocols=["geometry"], trained_only=True)
    assert alone["results"]["geometry"].keys() == {"trained"}
    again = run_arm(arm, 0, tmp_path / "arm", protocols=["geometry"])
    assert again["results"]["geometry"].keys() == {"trained", "untrained", "raw pixels"}
    assert again["results"]["geometry"]["trained"] == alone["results"]["geometry"]["trained"] and len(counted) == 1


def test_what_is_known_of_an_arm_is_not_measured_again(tmp_path, counted, monkeypatch):
    arm = experiment("dcl", **TINY)
    run_arm(arm, 0, tmp_path / "arm", protocols=["geometry"])
    run_arm(arm, 0, tmp_path / "arm", protocols=["knn-200-0.1"], trained_only=True)  # has no rows that learned nothing

    def measured(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr("counterpoint.studies.arms._measured", measured)
    run_arm(arm, 0, tmp_path / "arm", protocols=["geometry"])
    run_arm(arm, 0, tmp_path / "arm", protocols=["knn-200-0.1"], trained_only=True)
    assert len(counted) == 1


def test_an_arm_gets_the_protocol_that_it_lacks_without_training_again(tmp_path, counted):
    arm = experiment("dcl", **TINY)
    first = run_arm(arm, 0, tmp_path / "arm", protocols=["knn-200-0.1"])
    again = run_arm(arm, 0, tmp_path / "arm", protocols=["linear-offline"])
    assert again["results"].keys() == {"knn-200-0.1", "linear-offline"} and len(counted) == 1
    written = json.loads((tmp_path / "arm" / "arm.json").read_text())
    assert {**again, "detail": None} == {**written, "detail": None} and "linear-offline" in again["detail"]
    assert {**first, "results": None, "detail": None} == {**again, "results": None, "detail": None}


@pytest.mark.parametrize(
    ("changes", "seed", "named"),
    [
        ({"epochs": 2}, 0, "epochs"),
        ({"temperature": 0.7}, 0, "temperature"),
        ({"views": "handwriting"}, 0, "views"),
        ({"projection": [16, 4]}, 0, "projection"),
        ({}, 1, "seed"),
    ],
)
def test_a_changed_configuration_is_refused(tmp_path, changes, seed, named):
    run_arm(experiment("dcl", **TINY), 0, tmp_path / "arm", protocols=["knn-200-0.1"])
    with pytest.raises(InputError, match=rf"holds another configuration \(other {named}\)"):
        run_arm(experiment("dcl", **{**TINY, **changes}), seed, tmp_path / "arm")


def test_a_stopped_arm_goes_on_but_not_with_other_settings(tmp_path, monkeypatch, counted):
    original = Method.training_step

    def step(self, *arguments):
        if self.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            run_arm(experiment("dcl", **TINY), 0, tmp_path / "arm", protocols=["knn-200-0.1"])
    with pytest.raises(InputError, match="temperature"):
        run_arm(experiment("dcl", **TINY, temperature=0.7), 0, tmp_path / "arm")
    found = run_arm(experiment("dcl", **TINY), 0, tmp_path / "arm", protocols=["knn-200-0.1"])
    assert len(counted) == 1
    whole = run_arm(experiment("dcl", **TINY), 0, tmp_path / "whole", protocols=["knn-200-0.1"])
    assert found["results"] == whole["results"]
    one, two = (load_state(Run.open(tmp_path / name).checkpoint)["state_dict"] for name in ("arm", "whole"))
    assert all((one[name] == two[name]).all() for name in one)


def test_several_devices_are_refused(tmp_path):
    """Every process would go through the whole study."""
    with pytest.raises(InputError, match="on one device each"):
        run_arm(experiment("dcl", **TINY, devices=2, device="cpu"), 0, tmp_path / "arm")


def test_what_is_no_run_is_not_deleted(tmp_path):
    (tmp_path / "arm").mkdir()
    (tmp_path / "arm" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match="is in the way and no run"):
        run_arm(experiment("dcl", **TINY), 0, tmp_path / "arm")
    assert (tmp_path / "arm" / "thesis.txt").exists()


# ---- comparisons -----------------------------------------------------------------------------------------------------


def test_a_fair_comparison_shows_what_learned_nothing_first(counted):
    found = compare(["simclr", "dcl"], seeds=[0, 1], changes=TINY, out="c")
    rows = found.rows()
    assert [row["name"] for row in rows] == ["raw pixels", "untrained", "simclr", "dcl"]
    assert found.protocols == ["knn-200-0.1", "linear-offline"]
    for row in rows:
        for protocol in found.protocols:
            values = row[protocol]["values"]
            assert len(values) == 2 and row[protocol]["mean"] == pytest.approx(np.mean(values))
            assert row[protocol]["deviation"] == pytest.approx(np.std(values, ddof=1))
        assert ("minutes" in row) == ("memory_mb" in row) == (row["name"] in ("simclr", "dcl"))
    assert found.shared["epochs"] == 1 and found.shared["data"] == "d.npz"
    assert {row["items"] for row in rows if "minutes" in row} == {len(np.load("d.npz")["image"]) // 8 * 8}
    assert len(counted) == 4
    path = found.plot("plots/c.svg")
    assert path.read_text().count("<svg") == 1 and "untrained" in path.read_text()
    assert json.loads(json.dumps(found.to_dict()))["seeds"] == [0, 1]
    assert compare(["dcl"], seeds=[1], changes=TINY, out="c").rows()[-1]["name"] == "dcl"
    assert len(counted) == 4


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"epochs": 2}, r"differ in epochs \(1 and 2\)"),
        ({"batch_size": 20}, r"differ in batch_size \(8 and 20\)"),
        ({"encoder": "convnet-8"}, r"differ in encoder \(convnet-4 and convnet-8\)"),
        ({"data": "other.npz"}, r"differ in data \(d\.npz and other\.npz\)"),
        ({"pretrained": True}, r"differ in pretrained \(False and True\)"),
        ({"steps": 3}, r"differ in steps \(None and 3\)"),
        ({"limit": 20}, r"differ in limit \(None and 20\)"),
    ],
)
def test_an_unfair_comparison_is_refused_with_the_difference(monkeypatch, changes, difference):
    recipes = import_module("counterpoint.recipes").entries()
    monkeypatch.setitem(recipes, "one", {"method": "simclr", **TINY})
    monkeypatch.setitem(recipes, "two", {"method": "dcl", **TINY, **changes})
    with pytest.raises(InputError, match=rf"one and two {difference}, so they cannot be compared fairly; give --"):
        compare(["one", "two"], seeds=[0])
    assert not Path("runs").exists()


def test_a_projector_s_layers_and_what_a_method_lacks_do_not_stand_in_the_way(counted):
    """SimSiam's `layers` are its projector's, and MCL cannot start from pretrained weights."""
    recipes = {"simclr": {}, "simsiam": {"layers": 2, "bottleneck": 4}, "mcl": {"stages": 2, "clusters": 2}}
    shared = {key: value for key, value in TINY.items() if key != "projection"} | {"epochs": 2}
    names = []
    for slug, more in recipes.items():
        own = {"options": {"projection": [16, 8]}} if slug == "mcl" else {"projection": [16, 8]}
        entries = import_module("counterpoint.recipes").entries()
        entries[f"tiny-{slug}"] = {"method": slug, **shared, **own, **more}
        names.append(f"tiny-{slug}")
    try:
        rows = compare(names, seeds=[0], out="c").rows()
    finally:
        for name in names:
            del import_module("counterpoint.recipes").entries()[name]
    assert [row["name"] for row in rows][2:] == names and len({row["items"] for row in rows[2:]}) == 1


def test_longer_epochs_are_refused_where_epochs_are_counted(monkeypatch):
    recipes = import_module("counterpoint.recipes").entries()
    monkeypatch.setitem(recipes, "plain", {"method": "simclr", **TINY})
    inflated = {"method": "adainf", "generated": "d.npz", "replication": 3, **TINY}
    monkeypatch.setitem(recipes, "inflated", inflated)
    count = len(np.load("d.npz")["image"])
    message = f"an epoch of inflated has {4 * count} items, that of the data {count}: give --steps"
    with pytest.raises(InputError, match=message):
        compare(["plain", "inflated"], seeds=[0])
    assert not Path("runs").exists()


def test_comparisons_that_make_no_sense():
    without = {key: value for key, value in TINY.items() if key != "data"}
    for names, seeds, changes, message in (
        ([], [0], TINY, "at least one method"),
        (["dcl"], [], TINY, "one seed"),
        (["dcl", "dcl"], [0], TINY, "each method and seed once"),
        (["dcl"], [0, 0], TINY, "each method and seed once"),
        (["dcl"], [0], without, "compare needs data"),
        (["dcll"], [0], TINY, "did you mean dcl"),
    ):
        with pytest.raises(InputError, match=message):
            compare(names, seeds=seeds, changes=changes)


def test_bars_stand_at_the_means(tmp_path):
    arms = {
        "one": [
            {
                "results": {"knn-200-0.1": {"trained": v, "untrained": 1.0, "raw pixels": 2.0}, "geometry": {}},
                "minutes": 1.0,
                "memory_mb": 10 * v,
            }
            for v in (5.0, 7.0)
        ]
    }
    rows = Comparison(["one"], [0, 1], arms, {}).rows()
    assert rows[-1]["knn-200-0.1"] == {"mean": 6.0, "deviation": pytest.approx(2**0.5), "values": [5.0, 7.0]}
    assert rows[-1]["memory_mb"] == 70 and rows[0]["knn-200-0.1"]["mean"] == 2.0


# ---- reproduce -------------------------------------------------------------------------------------------------------


def test_a_study_end_to_end(monkeypatch, counted):
    monkeypatch.setattr(import_module("counterpoint.studies.reproduce"), "entries", lambda: {"dcl": study()})
    record = reproduce("dcl", out="s")
    assert set(record["arms"]) == {"baseline@8", "baseline@20", "method@8", "method@20"}
    assert record["verdict"] == "reproduced" and record["seeds"] == [0, 1, 2] and len(counted) == 12
    for name, arm in record["arms"].items():
        kind, _, batch = name.partition("@")
        assert arm["config"]["method"] == {"baseline": "simclr", "method": "dcl"}[kind]
        assert arm["config"]["batch_size"] == int(batch) and arm["config"]["encoder"] == "convnet-4"
        assert len(arm["values"]) == 3 and all(0 <= value <= 1 for value in arm["coupling"])
        assert Run.open(f"s/dcl/cpu/{name}-seed2").config["fit"]["seed"] == 2
    assert json.loads(Path("results/studies/dcl.json").read_text()) == json.loads(json.dumps(record))
    effects = [a - b for a, b in zip(*(record["arms"][n]["values"] for n in ("method@8", "baseline@8")), strict=True)]
    assert record["effect"] == pytest.approx(np.mean(effects))
    reproduce("dcl", out="s")
    assert len(counted) == 12


def test_arms_start_from_one_run_for_each_seed(monkeypatch, counted):
    """It is trained first, once; an arm that says where it starts keeps that."""
    tuned = {**TINY, "classes": 4}
    tuned.pop("projection")
    arms = {
        "start": {"recipe": "simclr", **TINY},
        "baseline": {"recipe": "fine-tuning", **tuned},
        "method": {"recipe": "core-tuning", **tuned},
        "scratch": {"recipe": "fine-tuning", **tuned, "start": None},
    }
    fields = {"effect": "method - baseline", "expect": ["method:train < 40"], "over": {}}
    found = study(**fields, budgets={"cpu": arms})
    assert list(found.arms("cpu")) == ["baseline", "method", "scratch"]
    monkeypatch.setattr(import_module("counterpoint.studies.reproduce"), "entries", lambda: {"dcl": found})
    record = reproduce("dcl", out="s")
    assert len(counted) == 12 and set(record["arms"]) == {"baseline", "method", "scratch"}
    for name in ("baseline", "method"):
        assert [Run.open(f"s/dcl/cpu/{name}-seed{i}").config["model"]["start"] for i in range(3)] == [
            f"s/dcl/cpu/start-seed{i}" for i in range(3)
        ]
    assert Run.open("s/dcl/cpu/scratch-seed0").config["model"]["start"] is None
    assert record["start"]["method"] == "simclr" and record["start"]["epochs"] == 1
    assert "start" not in record["arms"]["method"]["config"]
    assert (
        record["expectations"][0]["margin"] == 8 and record["expectations"][0]["holds"]
    )  # 32 of 40 images fit the bank
    reproduce("dcl", out="s")
    assert len(counted) == 12


def test_arms_that_differ_in_their_protocol_alone_share_a_run(monkeypatch, counted):
    arms = {"baseline": {"recipe": "simclr", **TINY}, "method": {"recipe": "dcl", **TINY}}
    arms["spread"] = {**arms["method"], "protocol": "geometry"}
    measured = study(
        over={}, effect="method - baseline", expect=["spread > 0", "spread:uniformity < 0"], budgets={"cpu": arms}
    )
    monkeypatch.setattr(import_module("counterpoint.studies.reproduce"), "entries", lambda: {"dcl": measured})
    record = reproduce("dcl", out="s")
    assert len(counted) == 6 and not Path("s/dcl/cpu/spread-seed0").exists()
    assert record["arms"]["spread"]["protocol"] == "geometry" and "protocol" not in record["arms"]["method"]
    assert record["arms"]["spread"]["config"] == record["arms"]["method"]["config"]
    assert all(value > 1 for value in record["arms"]["spread"]["values"])  # an effective rank
    found = Run.open("s/dcl/cpu/method-seed1").folder / "arm.json"
    assert {"knn-200-0.1", "geometry"} <= json.loads(found.read_text())["results"].keys()
    reproduce("dcl", out="s")
    assert len(counted) == 6


def test_few_seeds_and_other_budgets_do_not_replace_the_record(monkeypatch):
    plain = study(over={}, effect="method - baseline", expect=["method > baseline - 200"])
    monkeypatch.setattr(import_module("counterpoint.studies.reproduce"), "entries", lambda: {"dcl": plain})
    reproduce("dcl", out="s", seeds=[0])
    assert not Path("results").exists()
    reproduce("dcl", out="s", budget="small")
    assert [file.name for file in Path("results/studies").iterdir()] == ["dcl-small.json"]
    reproduce("dcl", out="s", save=False)
    assert not Path("results/studies/dcl.json").exists()


def test_unknown_studies_and_budgets():
    with pytest.raises(InputError, match=r'no study for "dlc"; did you mean dcl\?'):
        reproduce("dlc")
    with pytest.raises(InputError, match='no budget "tpu"; it has cpu'):
        reproduce("dcl", budget="tpu")


@pytest.mark.parametrize("slug", sorted(entries()))
def test_every_study_of_the_package_is_whole_and_fair(slug):
    """Its arms exist, its expressions can be computed, and baseline and method share everything that is not the claim."""
    found = entries()[slug]
    assert found.claim and len(found.seeds) >= 3
    for budget in found.budgets:
        arms = found.arms(budget)
        assert {*found.before(budget)} == {"start", "scorer"} & {*found.budgets[budget]}
        details = {name for text in (found.effect, *found.expect) for name in re.findall(r"[\w@.]+:\w+", text)}
        assert {name.partition(":")[0] for name in details} <= arms.keys()
        cell = dict.fromkeys([*arms, *details], 1.0)
        value_of(found.effect, cell)
        for text in found.expect:
            margin_of(text, cell)
        for name in arms:
            if name.startswith("method"):
                one, two = (settings(arms[other]) for other in (name, name.replace("method", "baseline")))
                for key in (*SHARED, "optimizer", "lr", "weight_decay", "sgd_momentum", "warmup", "schedule", "clip"):
                    assert one.get(key) == two.get(key), f"{budget}, {name}: {key}"


def settings(arm) -> dict:
    options = {**fit_options(), **model_options(methods.get(arm.method)), **arm.model, **arm.fit, "data": arm.data}
    return plain(options)


def test_the_record_keeps_the_other_numbers_of_a_result():
    """Means over seeds of what a result holds besides its value, for the subject that is judged."""
    arms = cells(baseline=[1.0, 2.0], method=[3.0, 5.0])
    for column, value in enumerate((10.0, 30.0)):
        for arm in arms.values():
            arm[column]["detail"] = {"knn-200-0.1": {"trained": {"top-5": value}, "untrained": {"top-5": 0.0}}}
    record = judge(study(expect=["method > baseline"], effect="method - baseline", over={}), "cpu", [0, 1], arms)
    assert record["arms"]["method"]["detail"] == {"top-5": 20.0}
