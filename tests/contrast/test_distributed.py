"""Several processes compute what one computes: value and gradient, at uneven shards.

The processes belong to `benchmarks/distributed_gradient.py`, which prints the same numbers as a table; here each of
them is a condition. Processes start once for both group sizes: starting them is most of the time this file takes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import counterpoint
from counterpoint.contrast.distributed import gather, gather_plain, rank, world_size

ROOT = Path(counterpoint.__file__).parent.parent
SIZES = ("5,3", "4,1,3,2")
EXACT = [
    "nt_xent",
    "nt_xent, sum",
    "alignment",
    "uniformity",
    "uniformity, unnormalised",
    "dcl",
    "dcl, one way",
    "dclw",
    "dclw, gradient through the weight",
    "info_nce",
    "info_nce, symmetric",
    "info_nce, symmetric decoupled",
    "info_nce, queue and hard negatives",
    "info_nce, queue only (MoCo)",
    "info_nce, several positives",
    "info_nce, positives as a matrix",
    "info_nce, pairs to ignore",
    "info_nce, pairs of all processes to ignore",
    "balanced_info_nce",
    "balanced_info_nce, pairs to ignore",
    "relabelled_clip",
    "relabelled_clip, short vectors",
    "multimodal_contrast",
    "specified_expert",
    "load_balancing",
    "info_nce, a temperature per row",
    "sup_con",
    "sup_con, one view with singletons",
    "sup_con, inside the log",
    "clip_loss",
    "clip_loss, label smoothing",
    "binary_nce",
    "binary_nce, known noise",
    "binary_nce, pairs to ignore",
    "ranking_nce, known noise",
    "triplet, hardest",
    "triplet, semi-hard",
    "triplet, all",
    "triplet, pairs to ignore",
    "pair_margin",
    "n_pair",
    "scored_binary",
    "scored_ranking",
    "scored_triplet",
    "sigmoid_loss",
    "attraction",
    "repulsion",
    "repulsion, even weights",
    "repulsion from queue and batch",
    "momentum_rbf",
    "momentum_euclidean",
    "partner_loss, gate_squared, by pair",
    "partner_loss, subspace, by row",
    "focal_sup_con",
    "clip_loss, equal captions ignored",
    "barlow_twins",
    "adaptive_contrast, five heads",
    "swapped_prediction",
    "swapped_prediction, with a queue",
    "supremix",
    "supremix, separate shifts",
    "spectral_contrastive",
    "token_margin",
    "gather alone",
    "nt_xent, by ring",
    "nt_xent, sum, by ring",
    "dcl, by ring",
    "dcl, one way, by ring",
    "dclw, by ring",
    "dclw, gradient through the weight, by ring",
    "info_nce, by ring",
    "info_nce, symmetric, by ring",
    "info_nce, symmetric decoupled, by ring",
    "info_nce, queue and hard negatives, by ring",
    "info_nce, queue only (MoCo), by ring",
    "info_nce, several positives, by ring",
    "info_nce, positives as a matrix, by ring",
    "info_nce, pairs to ignore, by ring",
    "info_nce, pairs of all processes to ignore, by ring",
    "info_nce, a temperature per row, by ring",
    "sup_con, by ring",
    "sup_con, one view with singletons, by ring",
    "sup_con, inside the log, by ring",
    "clip_loss, by ring",
    "clip_loss, label smoothing, by ring",
    "sigmoid_loss, by ring",
    "clip_loss, equal captions ignored, by ring",
]
WITHOUT_TEMPERATURE = [
    "specified_expert",
    "load_balancing",
    "gather alone",
    "token_margin",
    "spectral_contrastive",
    "barlow_twins",
    "alignment",
    "uniformity",
    "uniformity, unnormalised",
    "attraction",
    "repulsion",
    "repulsion, even weights",
    "repulsion from queue and batch",
    "momentum_rbf",
    "momentum_euclidean",
]
CONTROLS = ["control: own negatives only", "control: gradient of others dropped"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[tuple[str, int], dict]:
    """The measurement in float64, so that only a different gradient can differ."""
    script = ROOT / "benchmarks" / "distributed_gradient.py"
    if not script.exists():
        pytest.skip("needs the repository: benchmarks/ is not part of an installed package")
    out = tmp_path_factory.mktemp("ranks") / "record.json"
    sizes = [argument for shards in SIZES for argument in ("--sizes", shards)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *sizes, "--dtype", "float64", "--out", str(out)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-4000:]
    record = json.loads(out.read_text())
    return {(row["objective"], row["processes"]): row for row in record["rows"]}


def test_every_objective_was_measured(rows):
    assert set(rows) == {(name, processes) for name in EXACT + CONTROLS for processes in (2, 4)}
    assert rows["nt_xent", 2]["sizes"] == [5, 3]
    assert rows["nt_xent", 4]["sizes"] == [4, 1, 3, 2]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", EXACT)
def test_the_averaged_gradient_is_that_of_one_process(name, processes, rows):
    """In float64 the two differ by the order of summation alone: 1e-12 is some thousand roundings."""
    row = rows[name, processes]
    assert row["loss"] == pytest.approx(row["loss_alone"], rel=1e-12)
    assert row["gradient_ratio"] == pytest.approx(1, abs=1e-12)
    assert row["cosine"] == pytest.approx(1, abs=1e-12)
    compared = {
        **{loss: {"encoder"} for loss in WITHOUT_TEMPERATURE},
        "sigmoid_loss": {"encoder", "temperature", "bias"},
        "info_nce, a temperature per row": {"encoder", "row_temperature"},
    }.get(name.removesuffix(", by ring"), {"encoder", "temperature"})
    assert set(row["relative_difference"]) == compared
    assert max(row["relative_difference"].values()) < 1e-11


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", CONTROLS)
def test_the_measurement_sees_a_wrong_gradient(name, processes, rows):
    assert rows[name, processes]["cosine"] < 0.99
    assert rows[name, processes]["relative_difference"]["encoder"] > 0.1


def test_without_a_process_group_gathering_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert gather(x).rows is x and gather(x)[1:] == (0, 1)
    plain = gather_plain(x)
    assert torch.equal(plain.rows, x) and plain[1:] == (0, 1) and not plain.rows.requires_grad
