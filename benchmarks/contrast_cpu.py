"""Our losses beside those of other libraries on a CPU: time of forward and backward pass, memory beyond the inputs.

Every cell runs in a process of its own, so that peaks do not mix: inputs are made, the loss runs once to warm up (also
to pay for imports and page tables), then as often as fits into `--seconds` (at least three times, once where one run
already takes longer). Median and quartiles are reported. Extra memory is the peak of resident memory during the runs
minus what was resident before them. All libraries see the same numbers; forms with the same name compute the same
objective (`loss_of_8`, the value on a small batch, shows it; sums and means of anchors differ between libraries).

The growth exponent is the slope of log time over log N between the two largest sizes that ran. A cell whose matrices
would not fit into 60 % of the machine's memory is not run, and the record says how much it would need.

Run from the repository root on a quiet machine; the peers are optional:

    pip install lightly pytorch-metric-learning open_clip_torch sentence-transformers
    python benchmarks/contrast_cpu.py                       # about an hour; writes results/benchmarks/contrast_cpu.json
    python benchmarks/contrast_cpu.py --dims 512 --keep     # this part alone
    python benchmarks/contrast_cpu.py --sizes 256,1024 --dims 128 --out -
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent.parent / "results" / "benchmarks" / "contrast_cpu.json"
SIZES, DIMS = (256, 1024, 4096, 16384, 65536), (128, 512)
TEMPERATURE = 0.1
CHUNK = 1024

# bytes of the float32 matrices that a cell holds at once, over N^2; None: linear
HELD: dict[str, dict[str, float | None]] = {
    "nt_xent": {
        "counterpoint": None,
        "plain": 4 * 4 * 3,
        "row chunks + checkpoint": None,
        "lightly": 4 * 4 * 6,
        "pytorch-metric-learning": -1.0,  # cubic, see `needed`
    },
    "clip": {"counterpoint": None, "plain": 4 * 4, "open_clip": 4 * 5},
    "sigmoid": {"counterpoint": None, "open_clip": 4 * 5},
    "one way": {
        "counterpoint": None,
        "plain": 4 * 4,
        "row chunks + checkpoint": None,
        "sentence-transformers": 4 * 5,
        "sentence-transformers, cached": None,
    },
    "sup_con": {"counterpoint": None, "pytorch-metric-learning": 4 * 4 * 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="pairs in a batch")
    parser.add_argument("--dims", default=",".join(map(str, DIMS)))
    parser.add_argument("--forms", default=",".join(HELD))
    parser.add_argument("--seconds", type=float, default=5.0, help="time for the repetitions of one cell")
    parser.add_argument("--longest", type=float, default=300.0, help="leave out cells that would take longer than this")
    parser.add_argument("--out", default=str(OUT), help="file to write, - for none")
    parser.add_argument("--keep", action="store_true", help="keep what the file holds of other forms and dims")
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        form, name, n, d = options.cell
        print(json.dumps(cell(form, name, int(n), int(d), options.seconds)))
        return
    if options.keep and not Path(options.out).is_file():
        parser.error(f"--keep goes on with the file of an earlier run, and there is no {options.out}")
    sizes, dims = ([int(x) for x in text.split(",")] for text in (options.sizes, options.dims))
    rows: list[dict[str, Any]] = []
    for form in options.forms.split(","):
        for d in dims:
            last: dict[str, tuple[int, float]] = {}
            for n in sizes:
                for name in HELD[form]:
                    row = {"form": form, "name": name, "n": n, "d": d}
                    memory = needed(form, name, n)
                    before = last.get(name)
                    guess = before[1] * (n / before[0]) ** 2 if before else 0.0
                    if memory > 0.6 * available():
                        row["left_out"] = f"needs about {memory / 2**30:,.0f} GB for its matrices"
                    elif guess > options.longest:
                        row["left_out"] = f"would take about {guess:,.0f} s"
                    else:
                        row |= child(form, name, n, d, options.seconds)
                        if "seconds" in row:
                            last[name] = n, row["seconds"]
                    rows.append(row)
                    print(show(row), flush=True)
    if options.keep:
        measured = {(row["form"], row["d"]) for row in rows}
        rows += [
            row for row in json.loads(Path(options.out).read_text())["rows"] if (row["form"], row["d"]) not in measured
        ]
        rows.sort(key=lambda row: (list(HELD).index(row["form"]), row["d"]))
    record = {"rows": rows, "ratios": ratios(rows), "growth": growth(rows), "environment": environment()}
    for line in record["ratios"]:
        print(
            f"{line['form']:<9} d {line['d']:<4} N {line['n']:<6} {line['against']:<30} {line['times']:6.2f} times as fast"
        )
    if options.out != "-":
        from counterpoint.atomic import writing

        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        with writing(Path(options.out)) as path:
            path.write_text(json.dumps(record, indent=1) + "\n")


def losses(form: str, name: str, n: int) -> Callable[[Any, Any], Any]:
    """The loss of two [N, d] embeddings; one without gradient has done its backward pass already."""
    import torch
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    from counterpoint import contrast

    def unit(x: Any) -> Any:
        return functional.normalize(x)

    own = torch.arange(n)
    partner = torch.cat([own + n, own])
    labels = own // 4

    def plain_nt_xent(x: Any, y: Any) -> Any:
        z = torch.cat([unit(x), unit(y)])
        return functional.cross_entropy((z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf), partner)

    def plain_clip(x: Any, y: Any) -> Any:
        logits = unit(x) @ unit(y).T / TEMPERATURE
        return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2

    def plain_one_way(x: Any, y: Any) -> Any:
        return functional.cross_entropy(unit(x) @ unit(y).T / TEMPERATURE, own)

    def rows_of(z: Any, keys: Any, start: int, without_self: bool) -> Any:
        logits = z @ keys.T / TEMPERATURE
        at = torch.arange(start, start + len(z))
        if without_self:
            logits = logits.scatter(1, at[:, None], -torch.inf)
        return functional.cross_entropy(logits, partner[at] if without_self else at, reduction="sum")

    def chunked(x: Any, y: Any) -> Any:
        without_self = form == "nt_xent"
        query = torch.cat([unit(x), unit(y)]) if without_self else unit(x)
        keys = query if without_self else unit(y)
        starts = range(0, len(query), CHUNK)
        parts = [
            checkpoint(rows_of, query[start : start + CHUNK], keys, start, without_self, use_reentrant=False)
            for start in starts
        ]
        return torch.stack(parts).sum() / len(query)

    ours: dict[str, Callable[[Any, Any], Any]] = {
        "nt_xent": lambda x, y: contrast.nt_xent(x, y, temperature=TEMPERATURE),
        "clip": lambda x, y: contrast.clip_loss(x, y, temperature=TEMPERATURE),
        "sigmoid": lambda x, y: contrast.sigmoid_loss(x, y, temperature=TEMPERATURE),
        "one way": lambda x, y: contrast.info_nce(x, y, temperature=TEMPERATURE),
        "sup_con": lambda x, y: contrast.sup_con(torch.cat([x, y]), labels.repeat(2), temperature=TEMPERATURE),
    }
    match form, name:
        case _, "counterpoint":
            return ours[form]
        case "nt_xent", "plain":
            return plain_nt_xent
        case "clip", "plain":
            return plain_clip
        case "one way", "plain":
            return plain_one_way
        case _, "row chunks + checkpoint":
            return chunked
        case "nt_xent", "lightly":
            from lightly.loss import NTXentLoss

            return NTXentLoss(temperature=TEMPERATURE)
        case "nt_xent", "pytorch-metric-learning":
            from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

            return SelfSupervisedLoss(NTXentLoss(temperature=TEMPERATURE))
        case "sup_con", "pytorch-metric-learning":
            from pytorch_metric_learning.losses import SupConLoss

            function = SupConLoss(temperature=TEMPERATURE)
            return lambda x, y: function(torch.cat([x, y]), labels.repeat(2))
        case "clip", "open_clip":
            from open_clip.loss import ClipLoss

            clip = ClipLoss()
            return lambda x, y: clip(unit(x), unit(y), logit_scale=torch.tensor(1 / TEMPERATURE))
        case "sigmoid", _:
            from open_clip.loss import SigLipLoss

            sigmoid = SigLipLoss()
            scale, bias = torch.tensor(1 / TEMPERATURE), torch.tensor(-10.0)
            return lambda x, y: sigmoid(unit(x), unit(y), logit_scale=scale, logit_bias=bias)
        case "one way", "sentence-transformers":
            from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

            ranking = MultipleNegativesRankingLoss(None, scale=1 / TEMPERATURE)
            return lambda x, y: ranking.compute_loss_from_embeddings([x, y], None)
        case "one way", "sentence-transformers, cached":
            from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

            encoder = torch.nn.Sequential(torch.nn.Identity())  # never called: embeddings are handed in
            cached = CachedMultipleNegativesRankingLoss(encoder, scale=1 / TEMPERATURE, mini_batch_size=CHUNK)
            return lambda x, y: cached.calculate_loss([[x], [y]], with_backward=True)
    raise SystemExit(f"no {name} for {form}")


def cell(form: str, name: str, n: int, d: int, budget: float) -> dict[str, Any]:
    """One measurement; run in a process of its own."""
    import torch

    torch.manual_seed(0)
    x, y = (torch.randn(n, d, requires_grad=True) for _ in range(2))
    try:
        loss = losses(form, name, n)
    except ImportError as error:
        return {"left_out": f"not installed ({error.name})"}

    def step() -> tuple[float, float]:
        x.grad = y.grad = None
        start = time.perf_counter()
        value = loss(x, y)
        if value.requires_grad:
            value.backward()
        assert x.grad is not None and y.grad is not None
        return time.perf_counter() - start, float(value.detach())

    small = loss_of_small(form, name)
    if (
        name == "counterpoint"
    ):  # above the size that takes plain operations: what a first call loads is no cost of a batch
        warm = [torch.randn(600, 16, requires_grad=True) for _ in range(2)]
        losses(form, name, 600)(*warm).backward()
    before = resident()
    forget_peak()
    first, value = step()
    times = [first] if first > budget else []
    started = time.perf_counter()
    while not times or (first <= budget and (len(times) < 3 or time.perf_counter() - started < budget)):
        times.append(step()[0])
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    peak = (peak_memory() - before) / 2**20
    return {
        "seconds": middle,
        "quartiles": [low, high],
        "runs": len(times),
        "extra_mb": round(peak, 1),
        "loss": value,
        "gradient": float(x.grad.norm()),
        "loss_of_8": small,
    }


def loss_of_small(form: str, name: str) -> float:
    """A value that everybody's must agree on; also pays for imports and first calls."""
    import torch

    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, 16, generator=generator, requires_grad=True) for _ in range(2))
    value = losses(form, name, 8)(x, y)
    if value.requires_grad:
        value.backward()
    return float(value.detach())


def child(form: str, name: str, n: int, d: int, seconds: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--seconds", str(seconds), "--cell", form, name, str(n), str(d)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode in (-9, 137):
        return {"left_out": "was killed for its memory"}
    return {"left_out": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}


def needed(form: str, name: str, n: int) -> float:
    """Bytes of the matrices that a cell holds at once."""
    factor = HELD[form][name]
    if factor is None:
        return 0.0
    return 4.0 * 9 * 2 * n * (2 * n) * (2 * n) / 2 if factor < 0 else factor * n * n


def available() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as fast ours is, for each peer and cell that ran."""
    ours = {(r["form"], r["n"], r["d"]): r["seconds"] for r in rows if r["name"] == "counterpoint" and "seconds" in r}
    return [
        {key: r[key] for key in ("form", "d", "n")}
        | {"against": r["name"], "times": r["seconds"] / ours[r["form"], r["n"], r["d"]]}
        for r in rows
        if r["name"] != "counterpoint" and "seconds" in r and (r["form"], r["n"], r["d"]) in ours
    ]


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponents of time and extra memory between the two largest sizes of each form, library and dimension."""
    from math import log

    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if "seconds" in row:
            groups.setdefault((row["form"], row["name"], row["d"]), []).append(row)
    found = []
    for (form, name, d), members in groups.items():
        if len(members) < 2:
            continue
        small, large = sorted(members, key=lambda r: r["n"])[-2:]
        step = log(large["n"] / small["n"])
        line = {"form": form, "name": name, "d": d, "between": [small["n"], large["n"]]}
        line["time"] = log(large["seconds"] / small["seconds"]) / step
        if min(small["extra_mb"], large["extra_mb"]) > 1:
            line["memory"] = log(large["extra_mb"] / small["extra_mb"]) / step
        found.append(line)
    return found


def environment() -> dict[str, Any]:
    import torch

    names = ("torch", "lightly", "pytorch-metric-learning", "open_clip_torch", "sentence-transformers")
    found: dict[str, Any] = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    found["memory_gb"] = round(available() / 2**30, 1)
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def show(row: dict[str, Any]) -> str:
    head = f"{row['form']:<9}{row['name']:<30}N {row['n']:>6}  d {row['d']:>4}  "
    if "left_out" in row:
        return head + row["left_out"]
    return (
        head + f"{row['seconds']:9.4f} s  {row['extra_mb']:9.1f} MB extra  ({row['runs']} runs)  loss {row['loss']:.6f}"
    )


if __name__ == "__main__":
    main()
