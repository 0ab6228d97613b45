"""Our losses beside those of other libraries on an NVIDIA GPU: time of forward and backward pass, memory beyond the inputs.

Unit rows [N, d] in bfloat16 and a learned scale; all libraries see the same numbers. One step to warm up (it compiles,
and times candidates), then as many as fit into `--seconds`, at least three (one where a step takes longer than that):
median and quartiles between device events. Extra memory is the peak of the allocator during the steps minus what it
held before them, gradients included. "Share" is useful operations per second over the rate of a large bfloat16 matrix
product measured on the same card in the same run. Useful are 2 N^2 d operations forward, both directions in one pass,
and 8 N^2 d backward with recomputation, whoever needs more or fewer.

"kernel" is the fused executor with the least around it, "counterpoint" the public function. The error is that of the
gradients against float64 on the same bfloat16 inputs at N = `--check`. A cell that runs out of memory, or that would
take longer than `--longest`, is left out and says so. The record is written after every size.

Run from the repository root; the peers are optional (`pip install inf_cl open_clip_torch`):

    python benchmarks/contrast_gpu.py                 # about half an hour; writes results/benchmarks/contrast_gpu.json
    python benchmarks/contrast_gpu.py --quick         # a few minutes, smaller sizes, nothing written
    TRITON_INTERPRET=1 python benchmarks/contrast_gpu.py --device cpu --sizes 64 --dims 32 --check 32 --seconds 0 --out -
"""

import argparse
import gc
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from counterpoint import contrast, results
from counterpoint.contrast import Listed

OUT = Path(__file__).parent.parent / "results" / "benchmarks" / "contrast_gpu.json"
SIZES, DIMS = (4096, 16384, 65536, 262144, 1048576), (512, 768)
TEMPERATURE = 0.05
NAMES = {
    "clip": ("kernel", "counterpoint", "plain", "plain compiled", "inf_cl", "open_clip"),
    "nt_xent": ("kernel", "counterpoint", "plain", "plain compiled"),
}
Loss = Callable[..., Tensor]


class Fused(torch.autograd.Function):
    """The executor and the attraction of the pairs, with nothing in between: what the kernels can do.

    ``clip(x, y)``, or ``nt_xent(z, None)`` of rows whose halves are the views.
    """

    @staticmethod
    def forward(ctx, x, y, scale):
        from counterpoint.contrast.kernels import triton

        ctx.without = None if y is not None else Listed(torch.arange(len(x), device=x.device))
        row, column = triton.forward(x, y, scale, None, ctx.without, y is not None)
        first, second = halves(x) if y is None else (x, y)
        # batched products accumulate in float32 and need no [N, d] in between
        ctx.attraction = (first[:, None, :] @ second[:, :, None]).float().mean()
        ctx.save_for_backward(x, y, scale, row, column)
        rest = row.mean() if column is None else (row.mean() + column.mean()) / 2
        return rest - scale * ctx.attraction

    @staticmethod
    def backward(ctx, gradient):
        from counterpoint.contrast.kernels import triton

        x, y, scale, row, column = ctx.saved_tensors
        each = (gradient / (len(row) if y is None else 2 * len(row))).expand(len(row))
        down = None if column is None else each
        dx, dy, ds, _ = triton.backward(x, y, scale, None, ctx.without, row, column, each, down)
        first, second = halves(x) if y is None else (x, y)
        to_first, to_second = halves(dx) if y is None else (dx, dy)
        pull = (gradient * scale / len(first)).to(x.dtype)
        to_first.addcmul_(second, pull, value=-1)
        to_second.addcmul_(first, pull, value=-1)
        return dx, dy, ds - gradient * ctx.attraction


def halves(z: Tensor) -> tuple[Tensor, Tensor]:
    return z[: len(z) // 2], z[len(z) // 2 :]


def losses(form: str, name: str, n: int, device: torch.device) -> Loss:
    """The loss of ``x [n, d]`` and ``y [n, d]`` (CLIP) or of ``z [n, d]``, two views of n / 2 items, and None; of a scale.

    Raises:
        ImportError: the library is not installed.
    """
    own = torch.arange(n, device=device)
    partner = own.roll(n // 2)

    def flash(x: Tensor, y: Tensor | None, scale: Tensor) -> Tensor:
        head = next(h for h in (256, 128, 64, 32, 16) if x.shape[1] % h == 0)
        both = [cal_flash_loss(a, b, scale=scale, head_dim=head).mean() for a, b in ((x, y), (y, x))]
        return (both[0] + both[1]) / 2

    def plain_clip(x: Tensor, y: Tensor | None, scale: Tensor) -> Tensor:
        assert y is not None
        logits = (x @ y.T).to(scale.dtype) * scale
        return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2

    def plain_nt_xent(z: Tensor, _: Tensor | None, scale: Tensor) -> Tensor:
        logits = (z @ z.T).to(scale.dtype) * scale
        return functional.cross_entropy(logits.masked_fill(own[:, None] == own, -torch.inf), partner)

    plain = plain_clip if form == "clip" else plain_nt_xent
    match form, name:
        case _, "kernel":
            return Fused.apply
        case "clip", "counterpoint":
            return lambda x, y, scale: contrast.clip_loss(x, y, temperature=1 / scale, normalize=False)
        case "nt_xent", "counterpoint":
            return lambda z, _, scale: contrast.nt_xent(*halves(z), temperature=1 / scale, normalize=False)
        case _, "plain":
            return plain
        case _, "plain compiled":
            torch.compiler.reset()  # a size of its own each time, not a graph for any size
            return torch.compile(plain, dynamic=False)
        case "clip", "inf_cl":
            from inf_cl import cal_flash_loss

            return flash
        case "clip", "open_clip":
            from open_clip.loss import ClipLoss

            return ClipLoss()
    raise SystemExit(f"no {name} for {form}")


def inputs(form: str, n: int, d: int, device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
    """Leaves: x, y (None for NT-Xent) and the scale; pairs resemble each other a little, cosine about 0.3."""
    generator = torch.Generator(device).manual_seed(0)
    z = torch.empty(2, n if form == "clip" else n // 2, d, device=device, dtype=dtype)
    for start in range(0, z.shape[1], 2**16):  # float32 never holds more than a part
        part = z[:, start : start + 2**16]
        x = torch.randn(part.shape[1:], device=device, generator=generator)
        y = x + 3 * torch.randn(x.shape, device=device, generator=generator)
        part.copy_(functional.normalize(torch.stack([x, y]), dim=-1))
    scale = torch.tensor(1 / TEMPERATURE, device=device, requires_grad=True)
    if form == "nt_xent":
        return [z.flatten(0, 1).requires_grad_(), None, scale]
    return [z[0].requires_grad_(), z[1].requires_grad_(), scale]


class Clock:
    """Seconds between two points of the device's own time line (of the host's on a CPU)."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def __call__(self, work: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        work()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3


def repeated(work: Callable[[], object], clock: Clock, budget: float) -> tuple[float, list[float]]:
    """Time of the first run and of those after it."""
    first = clock(work)
    times = [clock(work)]
    while sum(times) < budget or (len(times) < 3 and times[0] <= budget):
        times.append(clock(work))
    return first, times


def quartiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4)
    return low, middle, high


def cell(
    form: str, name: str, n: int, d: int, device: torch.device, dtype: torch.dtype, budget: float
) -> dict[str, Any]:
    """One measurement, or the reason why there is none."""
    leaves = inputs(form, n, d, device, dtype)
    clock = Clock(device)
    value = torch.zeros(())

    def forget() -> None:
        for leaf in leaves:
            if leaf is not None:
                leaf.grad = None

    def step() -> None:
        nonlocal value
        forget()
        total = loss(*leaves)
        total.backward()
        value = total.detach()

    try:
        loss = losses(form, name, n, device)
        if device.type == "cuda":
            step()  # warms up outside of the peak: timing candidates takes memory of its own
            forget()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        first, times = repeated(step, clock, budget)
    except ImportError as error:
        return {"left_out": f"not installed ({error.name})"}
    except torch.OutOfMemoryError:
        return {"left_out": "out of memory"}
    low, middle, high = quartiles(times)
    row: dict[str, Any] = {"seconds": middle, "quartiles": [low, high], "first": first, "runs": len(times)}
    row["loss"] = float(value) if math.isfinite(float(value)) else None
    row["useful_tflops"] = 10 * n * n * d / middle / 1e12
    if device.type == "cuda":
        row["extra_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return row


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations per second of a square matrix product."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    _, times = repeated(lambda: torch.mm(a, b, out=out), Clock(device), 0.5 if device.type == "cuda" else 0.0)
    return 2 * side**3 / statistics.median(times)


def errors(form: str, name: str, n: int, d: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Relative errors of the gradients against the plain definition in float64."""
    leaves = inputs(form, n, d, device, dtype)
    exact = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    losses(form, "plain", n, device)(*exact).backward()
    losses(form, name, n, device)(*leaves).backward()
    found: dict[str, Any] = {}
    for key, leaf, other in zip(("first", "second", "scale"), leaves, exact, strict=True):
        if leaf is not None and other is not None:
            assert leaf.grad is not None and other.grad is not None
            error = float((leaf.grad.double() - other.grad).norm() / other.grad.norm())
            found[key] = error if math.isfinite(error) else None
    return found


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as fast our kernel is, for each peer and cell that ran."""
    ours = {(r["form"], r["n"], r["d"]): r["seconds"] for r in rows if r["name"] == "kernel" and "seconds" in r}
    return [
        {key: r[key] for key in ("form", "d", "n")}
        | {"against": r["name"], "times": r["seconds"] / ours[r["form"], r["n"], r["d"]]}
        for r in rows
        if r["name"] != "kernel" and "seconds" in r and (r["form"], r["n"], r["d"]) in ours
    ]


def environment(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("torch", "triton", "inf_cl", "open_clip_torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}
        found |= {"processors": card.multi_processor_count, "memory_gb": round(card.total_memory / 2**30, 1)}
    return found


def show(row: dict[str, Any]) -> str:
    head = f"{row['form']:<8}{row['name']:<16}N {row['n']:>8}  d {row['d']:>4}  "
    if "left_out" in row:
        return head + row["left_out"]
    share = f"{100 * row['share']:5.1f} %" if row["share"] is not None else ""
    memory = f"{row['extra_mb']:10,.1f} MB" if "extra_mb" in row else ""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.6f}"
    return head + f"{1e3 * row['seconds']:12.3f} ms {share}{memory}  ({row['runs']} runs)  loss {loss}"


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="pairs (clip), rows of both views (nt_xent)")
    parser.add_argument("--dims", default=",".join(map(str, DIMS)))
    parser.add_argument("--forms", default=",".join(NAMES))
    parser.add_argument("--names", default="", help="only these, for example kernel,inf_cl")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the repetitions of one cell")
    parser.add_argument("--longest", type=float, default=60.0, help="leave out cells whose step would take longer")
    parser.add_argument("--check", type=int, default=2048, help="N at which gradients are compared with float64")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="4096 and 32768 rows of 512, half a second each, no record"
    )
    parser.add_argument("--out", default=str(OUT), help='where to write the JSON record ("-": nowhere)')
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.dims, options.seconds, options.out = "4096,32768", "512", 0.5, "-"
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("this benchmark needs an NVIDIA GPU (or --device cpu, to see that it runs)", file=sys.stderr)
        return 1
    sizes, dims = ([int(x) for x in text.split(",")] for text in (options.sizes, options.dims))
    wanted = set(options.names.split(",")) if options.names else None
    rate = matmul_rate(device, dtype, 8192 if device.type == "cuda" else 256)
    print(f"{options.dtype} matrix product: {rate / 1e12:.1f} Tflop/s")
    record: dict[str, Any] = {
        "benchmark": "contrast_gpu",
        "dtype": options.dtype,
        "temperature": TEMPERATURE,
        "matmul_tflops": rate / 1e12,
        "environment": environment(device),
        "rows": [],
        "errors": [],
    }
    last: dict[tuple[str, str, int], tuple[int, float]] = {}
    broken = False
    for form in options.forms.split(","):
        names = [name for name in NAMES[form] if wanted is None or name in wanted]
        for d in dims:
            for n in sizes:
                for name in names:
                    row: dict[str, Any] = {"form": form, "name": name, "n": n, "d": d}
                    before = last.get((form, name, d))
                    guess = before[1] * (n / before[0]) ** 2 if before else 0.0
                    if broken:
                        row["left_out"] = "an earlier cell broke the device"
                    elif guess > options.longest:
                        row["left_out"] = f"would take about {guess:,.0f} s a step"
                    else:
                        try:
                            row |= cell(form, name, n, d, device, dtype, options.seconds)
                        except Exception as error:  # a peer's kernel may refuse a shape or a card in its own way
                            row["left_out"] = reason(error)
                            broken = "CUDA error" in str(error)
                    if "seconds" in row:
                        row["share"] = row["useful_tflops"] * 1e12 / rate
                        last[form, name, d] = n, row["seconds"]
                    record["rows"].append(row)
                    print(show(row), flush=True)
                    if not broken:
                        release(device)
                if options.out != "-":
                    results.save(options.out, record | {"ratios": ratios(record["rows"])})
            for name in names:
                line = {"form": form, "name": name, "n": options.check, "d": d}
                try:
                    line |= {"error": errors(form, name, options.check, d, device, dtype)}
                except Exception as error:
                    line["left_out"] = reason(error)
                record["errors"].append(line)
                print(f"{form:<8}{name:<16}error {line.get('error', line.get('left_out'))}", flush=True)
                if not broken:
                    release(device)
    record["ratios"] = ratios(record["rows"])
    for line in record["ratios"]:
        cell_name = f"{line['form']:<8} d {line['d']:<4} N {line['n']:<8}"
        print(f"{cell_name}{line['against']:<16}{line['times']:7.2f} times the kernel's time")
    if options.out != "-":
        results.save(options.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
