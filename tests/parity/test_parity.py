"""Golden folders made here, from the formulas in float64 numpy: right ones pass, wrong ones fail by name."""

import json

import numpy as np
import pytest

from counterpoint import parity
from counterpoint.errors import InputError
from counterpoint.parity import ops

EXACT = {"rtol": 1e-4, "atol": 1e-5}


def write(folder, name, op, params, arrays, tolerance=EXACT):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"{name}.npz", **arrays)
    description = {"op": op, "params": params, "source": {"repo": "none"}, "tolerance": tolerance, "note": "made here"}
    (folder / f"{name}.json").write_text(json.dumps(description))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def numeric_gradient(f, x, step=1e-6):
    g = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        g[i] = (f(up) - f(down)) / (2 * step)
    return g


def dcl_loss(z1, z2, temperature, sigma=None, frozen=None):
    """Direction 1 -> 2, term by term."""
    n, total = len(z1), 0.0
    s = (z1 * z2).sum(1)
    weight = np.ones(n) if sigma is None else 2 - n * np.exp(s / sigma) / np.exp(s / sigma).sum()
    weight = weight if frozen is None else frozen
    for i in range(n):
        others = [z1[i] @ z1[j] / temperature for j in range(n) if j != i]
        others += [z1[i] @ z2[j] / temperature for j in range(n) if j != i]
        total += -weight[i] * s[i] / temperature + np.log(np.exp(others).sum())
    return total / n


def dcl_arrays(n, d, temperature, seed, op, sigma=None):
    rng = np.random.default_rng(seed)
    z1, z2 = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    if op == "dcl.symmetric":
        frozen = None
        if sigma is not None:
            s = (unit(z1) * unit(z2)).sum(1)
            frozen = 2 - n * np.exp(s / sigma) / np.exp(s / sigma).sum()

        def loss(a, b):
            there = dcl_loss(unit(a), unit(b), temperature, frozen=frozen)
            return (there + dcl_loss(unit(b), unit(a), temperature, frozen=frozen)) / 2

    else:
        z1, z2 = unit(z1), unit(z2)

        def loss(a, b):
            return dcl_loss(a, b, temperature, sigma)

    arrays = {"in.z1": z1, "in.z2": z2, "out.loss": np.array(loss(z1, z2))}
    arrays["grad.z1"] = numeric_gradient(lambda x: loss(x, z2), z1)
    arrays["grad.z2"] = numeric_gradient(lambda x: loss(z1, x), z2)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


CASES = [
    ("dcl.one_way", {"temperature": 0.3}, None, (5, 4)),
    ("dcl.one_way", {"temperature": 1.7}, None, (2, 11)),
    ("dcl.weighted_one_way", {"temperature": 0.4, "sigma": 0.8}, 0.8, (6, 3)),
    ("dcl.symmetric", {"temperature": 0.25, "weighted": False, "sigma": 0.1}, None, (4, 5)),
    ("dcl.symmetric", {"temperature": 0.6, "weighted": True, "sigma": 0.7}, 0.7, (7, 3)),
]


@pytest.mark.parametrize(("op", "params", "sigma", "shape"), CASES)
def test_dcl_ops_agree_with_the_formula(tmp_path, op, params, sigma, shape):
    write(tmp_path, "a", op, params, dcl_arrays(*shape, params["temperature"], 0, op, sigma))
    report = parity.run(tmp_path)
    assert (report.passed, report.failed, report.status) == (1, 0, 0), report.outcomes


def clip(logits):
    """Cross entropy of the diagonal."""
    return float(np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits)))


def two_views(z1, z2, temperature):
    z = np.concatenate([z1, z2])
    n, logits = len(z1), z @ z.T / temperature
    np.fill_diagonal(logits, -np.inf)
    partner = np.roll(np.arange(2 * n), n)
    return float(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(2 * n), partner]))


def sup_con(z, labels, temperature, count):
    total = 0.0
    for i in range(len(z)):
        own = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        normaliser = np.log(sum(np.exp(z[i] @ z[a] / temperature) for a in range(len(z)) if a != i))
        total += sum(normaliser - z[i] @ z[p] / temperature for p in own) / max(len(own), 1)
    return total / count


def make(op, rng):
    """Inputs, parameters, labels and the loss as a function of the inputs, for one op other than DCL's."""
    a, b, queue = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), unit(rng.normal(size=(7, 4)))
    labels = np.array([0, 1, 0, 1, 1])
    if op == "clhe.contrastive_loss":
        return {"a": a, "b": b}, {"tau": 0.3}, {}, lambda a, b: clip(unit(a) @ unit(b).T / 0.3)
    if op == "mclrec.info_nce":
        return {"z1": a, "z2": b}, {"tau": 0.9, "sim": "dot"}, {}, lambda z1, z2: two_views(z1, z2, 0.9)
    if op == "mmhcl.contrastive_loss":

        def loss(z1, z2):
            z1, z2 = unit(z1), unit(z2)
            inter, intra = np.exp(z1 @ z2.T / 0.5), np.exp(z1 @ z1.T / 0.5)
            return float(-np.mean(np.log(np.diag(inter) / (inter.sum(1) + intra.sum(1) - np.diag(intra)))))

        return {"z1": a, "z2": b}, {"tau": 0.5, "chunk": 2}, {}, loss
    if op == "esimcse.queue_infonce":

        def loss(z1, z2):
            return clip(np.concatenate([unit(z1) @ unit(z2).T, unit(z1) @ queue.T], 1) / 0.4)

        return {"z1": a, "z2": b}, {"temperature": 0.4}, {"queue": queue}, loss
    if op == "fac.proposal_contrast":
        z = rng.normal(size=(6, 3))
        return {"z": z}, {"tau": 0.2}, {}, lambda z: two_views(unit(z)[0::2], unit(z)[1::2], 0.2)
    if op == "projection_head.supcon":
        both = np.tile(labels, 2)
        return (
            {"z": np.concatenate([a, b])},
            {"temperature": 0.5, "n_views": 2},
            {"labels": labels},
            lambda z: sup_con(unit(z), both, 0.5, 10),
        )
    if op == "peft-augmentation.supcon":
        lonely = np.array([0, 1, 0, 1, 2])  # the last anchor has no positive, yet counts in the mean
        return (
            {"z": unit(a)[:, None]},
            {"temperature": 0.2, "base_temperature": 0.1},
            {"labels": lonely},
            lambda z: 2 * sup_con(z[:, 0], lonely, 0.2, 5),
        )
    if op == "sepclr.uniform":

        def loss(x):
            pairs = [((x[i] - x[j]) ** 2).sum() for i in range(len(x)) for j in range(i)]
            return float(np.log(np.mean(np.exp(-np.array(pairs) / (2 * 0.8)))))

        return {"x": a}, {"tau": 0.8}, {}, loss
    raise AssertionError(op)


OTHERS = [
    "clhe.contrastive_loss",
    "esimcse.queue_infonce",
    "fac.proposal_contrast",
    "mclrec.info_nce",
    "mmhcl.contrastive_loss",
    "peft-augmentation.supcon",
    "projection_head.supcon",
    "sepclr.uniform",
]


@pytest.mark.parametrize("op", OTHERS)
def test_mapped_ops_agree_with_their_formula(tmp_path, op):
    inputs, params, constants, loss = make(op, np.random.default_rng(3))
    arrays = {f"in.{name}": array.astype(np.float32) for name, array in inputs.items()}
    arrays |= {
        f"in.{name}": array.astype(np.float32) if array.dtype == float else array for name, array in constants.items()
    }
    arrays["out.loss"] = np.float32(loss(*inputs.values()))
    for name, array in inputs.items():
        gradient = numeric_gradient(lambda x, name=name: loss(*(inputs | {name: x}).values()), array)
        arrays[f"grad.{name}"] = gradient.astype(np.float32)
    write(tmp_path, "a", op, params, arrays)
    report = parity.run(tmp_path)
    assert report.status == 0, report.outcomes


def test_queue_nce_writes_the_keys_after_the_loss(tmp_path):
    rng = np.random.default_rng(0)
    q, k, queue = rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), unit(rng.normal(size=(6, 3))).T
    after = queue.copy()
    after[:, 4:6] = unit(k).T
    logits = np.concatenate([(unit(q) * unit(k)).sum(1, keepdims=True), unit(q) @ queue], 1) / 0.3
    loss = np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 0])
    arrays = {"in.q": q, "in.k": k, "in.queue": queue, "in.ptr": np.array([4])}
    arrays |= {"out.loss": np.array(loss), "out.new_queue": after, "out.new_ptr": np.array([0])}
    write(tmp_path, "a", "fac.queue_nce", {"tau": 0.3}, arrays)
    assert parity.run(tmp_path).status == 0


@pytest.mark.parametrize("name", ["out.loss", "grad.z1", "grad.z2"])
def test_a_wrong_number_fails_and_is_named(tmp_path, capsys, name):
    arrays = dcl_arrays(5, 4, 0.3, 0, "dcl.one_way")
    write(tmp_path / "right", "a", "dcl.one_way", {"temperature": 0.3}, arrays)
    wrong = {key: array.copy() for key, array in arrays.items()}
    wrong[name] = wrong[name] + (0.01 if name == "out.loss" else np.eye(5, 4, dtype=np.float32) * 0.01)
    write(tmp_path / "wrong" / "deeper", "a", "dcl.one_way", {"temperature": 0.3}, wrong)
    report = parity.run(tmp_path)
    assert (report.passed, report.failed, report.status) == (1, 1, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "1 passed, 1 failed"
    assert lines[0].startswith("ok") and lines[1].startswith("FAIL") and name in lines[1]


def test_other_parameters_change_the_verdict(tmp_path):
    arrays = dcl_arrays(5, 4, 0.3, 0, "dcl.one_way")
    write(tmp_path, "a", "dcl.one_way", {"temperature": 0.31}, arrays)
    assert parity.run(tmp_path).status == 1


def test_nan_is_never_close(tmp_path, monkeypatch):
    arrays = dcl_arrays(3, 4, 0.3, 0, "dcl.one_way")
    monkeypatch.setitem(ops.OPS, "dcl.one_way", ops.Op(lambda x, p: {"loss": (x["z1"] + x["z2"]).sum() * float("nan")}))
    write(tmp_path, "a", "dcl.one_way", {"temperature": 0.3}, arrays, {"rtol": 1.0, "atol": 100.0})
    assert parity.run(tmp_path).status == 1


def test_broken_cases_fail_with_one_line_each(tmp_path, capsys):
    good = dcl_arrays(4, 3, 0.5, 0, "dcl.one_way")
    write(tmp_path, "unknown", "nobody.knows", {}, good)
    write(tmp_path, "lone_json", "dcl.one_way", {"temperature": 0.5}, good)
    (tmp_path / "lone_json.npz").unlink()
    write(tmp_path, "lone_npz", "dcl.one_way", {"temperature": 0.5}, good)
    (tmp_path / "lone_npz.json").unlink()
    write(tmp_path, "bad_npz", "dcl.one_way", {"temperature": 0.5}, good)
    whole = (tmp_path / "bad_npz.npz").read_bytes()
    (tmp_path / "bad_npz.npz").write_bytes(whole[: len(whole) // 2])
    write(tmp_path, "bad_json", "dcl.one_way", {"temperature": 0.5}, good)
    (tmp_path / "bad_json.json").write_text('{"op": "dcl.one_way", ')
    write(tmp_path, "no_op", "dcl.one_way", {"temperature": 0.5}, good)
    (tmp_path / "no_op.json").write_text("[]")
    write(tmp_path, "no_tolerance", "dcl.one_way", {"temperature": 0.5}, good, None)
    write(tmp_path, "no_parameter", "dcl.one_way", {}, good)
    write(tmp_path, "no_outputs", "dcl.one_way", {"temperature": 0.5}, {"in.z1": good["in.z1"]})
    write(tmp_path, "more_outputs", "dcl.one_way", {"temperature": 0.5}, good | {"out.accuracy": np.array(1.0)})
    write(tmp_path, "other_shape", "dcl.one_way", {"temperature": 0.5}, good | {"out.loss": good["out.loss"][None]})
    write(tmp_path, "bad_input", "dcl.one_way", {"temperature": 0.5}, good | {"in.z2": good["in.z2"][:2]})
    pickled = np.array([{"a": 1}], dtype=object)
    write(tmp_path, "pickle", "dcl.one_way", {"temperature": 0.5}, good | {"in.z1": pickled})
    report = parity.run(tmp_path)
    assert (report.passed, report.failed) == (0, 13)
    reasons = {outcome.case: outcome.reason for outcome in report.outcomes}
    assert reasons["unknown"] == parity.NOT_IMPLEMENTED
    assert "lone_json.npz is missing" in reasons["lone_json"] and "lone_npz.json is missing" in reasons["lone_npz"]
    assert "temperature" in reasons["no_parameter"] and "tolerance" in reasons["no_tolerance"]
    assert "accuracy" in reasons["more_outputs"] and "shape" in reasons["other_shape"]
    assert "out.*" in reasons["no_outputs"] and "op" in reasons["no_op"] and reasons["bad_input"]
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    assert len(out.out.splitlines()) == 13 + 1 + 1  # cases, the list of unknown ops, the verdict
    assert out.out.endswith("0 passed, 13 failed\n")


def test_what_gradients_belong_to(tmp_path, monkeypatch):
    x = np.array([1.0, -2.0, 3.0], dtype=np.float32)
    weight = np.array([3.0, 5.0, 7.0], dtype=np.float32)
    monkeypatch.setitem(ops.OPS, "t.cotangent", ops.Op(lambda x, p: {"y": x["x"] * p["b"], "n": x["x"].detach()}))
    arrays = {"in.x": x, "in.cotangent": weight, "out.y": 2 * x, "out.n": x, "grad.x": 2 * weight}
    write(tmp_path, "cotangent", "t.cotangent", {"b": 2.0}, arrays | {"grad.b": np.float32((x * weight).sum())})
    monkeypatch.setitem(
        ops.OPS, "t.sum", ops.Op(lambda x, p: {"a": x["x"].sum(), "b": (x["x"] ** 2).sum()}, ("a", "b"))
    )
    write(tmp_path, "sum", "t.sum", {}, {"in.x": x, "out.a": x.sum(), "out.b": (x**2).sum(), "grad.x": 1 + 2 * x})
    weighted = ops.Op(lambda x, p: {"y": x["x"] ** 2}, lambda y, x: (y["y"] * x["w"]).sum())
    monkeypatch.setitem(ops.OPS, "t.weighted", weighted)
    write(tmp_path, "weighted", "t.weighted", {}, {"in.x": x, "in.w": weight, "out.y": x**2, "grad.x": 2 * x * weight})
    unused = ops.Op(lambda x, p: {"loss": x["x"].sum()})
    monkeypatch.setitem(ops.OPS, "t.unused", unused)
    arrays = {"in.x": x, "in.u": weight, "out.loss": x.sum(), "grad.x": np.ones_like(x), "grad.u": 0 * weight}
    write(tmp_path, "unused", "t.unused", {}, arrays)
    assert parity.run(tmp_path).status == 0


def test_integers_booleans_and_strings_are_compared_exactly(tmp_path, monkeypatch):
    zero = {"rtol": 0, "atol": 0}
    monkeypatch.setitem(ops.OPS, "t.echo", ops.Op(lambda x, p: dict(x)))
    ids, mask, words = np.array([[1, 2], [3, 2**40]]), np.array([True, False]), np.array(["ab", "c d"])
    arrays = {"in.ids": ids, "in.mask": mask, "in.words": words}
    right = {"out.ids": ids, "out.mask": mask, "out.words": words.astype("<U35")}
    write(tmp_path, "right", "t.echo", {}, arrays | right, zero)
    write(tmp_path, "wrong_ids", "t.echo", {}, arrays | right | {"out.ids": ids + np.eye(2, dtype=int)}, zero)
    write(tmp_path, "wrong_mask", "t.echo", {}, arrays | right | {"out.mask": ~mask}, zero)
    write(tmp_path, "wrong_words", "t.echo", {}, arrays | right | {"out.words": np.array(["ab", "c  d"])}, zero)
    verdicts = {outcome.case: outcome.ok for outcome in parity.run(tmp_path).outcomes}
    assert verdicts == {"right": True, "wrong_ids": False, "wrong_mask": False, "wrong_words": False}


def test_directories_without_cases(tmp_path):
    with pytest.raises(InputError, match="no golden cases"):
        parity.run(tmp_path)
    with pytest.raises(InputError, match="no directory"):
        parity.run(tmp_path / "absent")


def test_saved_counts_leave_other_methods_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_RESULTS", str(tmp_path / "results"))
    cases = tmp_path / "cases"
    write(cases, "a", "dcl.one_way", {"temperature": 0.5}, dcl_arrays(4, 3, 0.5, 0, "dcl.one_way"))
    write(cases, "b", "feature_transformation.logits", {}, dcl_arrays(4, 3, 0.5, 0, "dcl.one_way"))
    parity.run(cases, save=True)
    record = json.loads((tmp_path / "results" / "parity.json").read_text())
    assert record["dcl"]["passed"] == 1 and record["dcl"]["failed"] == 0
    assert 0 <= record["dcl"]["largest_difference"] < 1e-4
    assert record["feature-transformation"] == {"passed": 0, "failed": 1, "largest_difference": None}
    (cases / "b.npz").unlink()
    (cases / "b.json").unlink()
    parity.run(cases, save=True)
    assert set(json.loads((tmp_path / "results" / "parity.json").read_text())) == {"dcl", "feature-transformation"}
