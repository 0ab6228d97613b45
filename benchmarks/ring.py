"""Two processes in a ring against one: time, bytes sent, and what the machine itself allows.

The log-sum-exp of NT-Xent (N pairs are 2N rows that are their own keys) and that of CLIP (N x N, rows and columns),
forward and backward, over the same numbers four ways, every process with one thread:

- ``one``: one process holds everything (the blocked executor);
- ``ring``: two processes hold a half each, key blocks travel (`counterpoint.contrast.kernels.ring`);
- ``gather``: two processes hold a half each and gather the keys of both (for CLIP also the queries);
- ``apart``: two processes that never talk do half of the work of ``one`` each, at the same time: the floor of this
  machine, whose cores share memory and clock.

``ratio`` is the time over half the time of ``one``; the target for ``ring`` is 1.15 at large N. Times are medians, with
the interquartile range; between processes the slowest counts, from a common start. Sent bytes are per process and
repetition, forward and backward: counted for the ring, by the ring algorithms' known volume for the collectives of the
gathered form. ``difference`` is the largest gradient entry's deviation from that of ``one``, relative to the largest entry.

Run from the repository root on a quiet machine with two cores:

    python benchmarks/ring.py                          # N = 8192 and 16384: about ten minutes, 1 GB
    python benchmarks/ring.py --pairs 1024 --out -     # seconds, nothing written
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from counterpoint import results
from counterpoint.contrast import Listed, unit
from counterpoint.contrast.distributed import gather
from counterpoint.contrast.kernels import log_sum_exp, ring

OUT = Path(__file__).parent.parent / "results" / "benchmarks" / "ring.json"
PROCESSES, DIMENSIONS, TEMPERATURE = 2, 128, 0.1
LOSSES, FORMS = ("nt_xent", "clip"), ("one", "ring", "gather", "apart")


def rows(count: int, seed: int) -> Tensor:
    return unit(torch.randn(count, DIMENSIONS, generator=torch.Generator().manual_seed(seed)))


def work(loss: str, form: str, pairs: int, rank: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The forward pass of one process, and the leaves whose gradient is taken."""
    total = 2 * pairs if loss == "nt_xent" else pairs
    share = total // PROCESSES
    here = slice(0, total) if form == "one" else slice(rank * share, (rank + 1) * share)
    if loss == "nt_xent":
        if form == "apart":  # a triangle of half the area
            here = slice(0, round(total / PROCESSES**0.5))
        x = rows(total, 1)[here].clone().requires_grad_()
        own = Listed(torch.arange(here.start, here.stop))
        options: dict[str, Any] = {"temperature": TEMPERATURE, "without": own}
        if form == "gather":
            return lambda: log_sum_exp(x, gather(x).rows, **options).sum(), [x]
        reduce = ring.log_sum_exp if form == "ring" else log_sum_exp
        return lambda: reduce(x, **options).sum(), [x]
    query = rows(total, 1)[here].clone().requires_grad_()
    key = rows(total, 2)[slice(0, total) if form == "apart" else here].clone().requires_grad_()
    if form == "gather":

        def both_ways() -> Tensor:
            there = log_sum_exp(query, gather(key).rows, temperature=TEMPERATURE)
            return there.sum() + log_sum_exp(key, gather(query).rows, temperature=TEMPERATURE).sum()

        return both_ways, [query, key]
    reduce = ring.log_sum_exp if form == "ring" else log_sum_exp
    return lambda: torch.cat(reduce(query, key, temperature=TEMPERATURE, columns=True)).sum(), [
        query,
        key,
    ]


class Traffic:
    """Bytes that this process sends to others between `start` and `stop`."""

    def __init__(self) -> None:
        self.sent = 0
        self.before = (distributed.batch_isend_irecv, distributed.all_gather, distributed.all_reduce)

    def __enter__(self) -> "Traffic":
        exchange, all_gather, all_reduce = self.before

        def counted_exchange(operations):
            self.sent += sum(op.tensor.nbytes for op in operations if op.op is distributed.isend)
            return exchange(operations)

        def counted_gather(parts, tensor, *rest, **options):
            self.sent += tensor.nbytes * (len(parts) - 1)
            return all_gather(parts, tensor, *rest, **options)

        def counted_reduce(tensor, *rest, **options):
            world = distributed.get_world_size()
            self.sent += 2 * (world - 1) * tensor.nbytes // world
            return all_reduce(tensor, *rest, **options)

        distributed.batch_isend_irecv = counted_exchange
        distributed.all_gather, distributed.all_reduce = counted_gather, counted_reduce
        return self

    def __exit__(self, *error: object) -> None:
        distributed.batch_isend_irecv, distributed.all_gather, distributed.all_reduce = self.before


def repeat(forward: Callable[[], Tensor], leaves: list[Tensor], repetitions: int, together: bool):
    """Seconds of every repetition after one of warm-up, the gradients, and the bytes sent in one repetition."""
    seconds = []
    with Traffic() as traffic:
        gradients = torch.autograd.grad(forward(), leaves)
    for _ in range(repetitions):
        if together:
            distributed.barrier()
        start = time.perf_counter()
        gradients = torch.autograd.grad(forward(), leaves)
        seconds.append(time.perf_counter() - start)
    return seconds, gradients, traffic.sent


def process(rank: int, plan: list[int], repetitions: int, folder: str) -> None:
    """One of the processes; the first is also the one that works alone while the others wait."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    table: list[dict[str, Any]] = []
    for pairs in plan:
        for loss in LOSSES:
            alone: list[Tensor] = []
            for form in FORMS:
                measured = None
                if form != "one" or rank == 0:
                    seconds, gradients, sent = repeat(*work(loss, form, pairs, rank), repetitions, form != "one")
                    if form == "one":
                        alone = list(gradients)
                    measured = seconds, sent, list(gradients) if form in ("ring", "gather") else []
                distributed.barrier()
                everyone: list[Any] = [None] * PROCESSES
                distributed.all_gather_object(everyone, measured)
                if rank == 0:
                    table.append(row(loss, form, pairs, [each for each in everyone if each is not None], alone))
    if rank == 0:
        half = {(line["loss"], line["pairs"]): line["seconds"] / 2 for line in table if line["form"] == "one"}
        for line in table:
            line["ratio"] = None if line["form"] == "one" else line["seconds"] / half[line["loss"], line["pairs"]]
        results.save(Path(folder) / "table.json", table)
    distributed.barrier()
    distributed.destroy_process_group()


def row(loss: str, form: str, pairs: int, measured: list[Any], alone: list[Tensor]) -> dict[str, Any]:
    slowest = [max(each) for each in zip(*(seconds for seconds, _, _ in measured), strict=True)]
    quartiles = statistics.quantiles(slowest, n=4) if len(slowest) > 1 else [slowest[0]] * 3
    shards = list(zip(*(gradients for _, _, gradients in measured), strict=True))
    difference = [
        float((torch.cat(parts) - whole).abs().max() / whole.abs().max())
        for parts, whole in zip(shards, alone, strict=False)
    ]
    return {
        "loss": loss,
        "form": form,
        "pairs": pairs,
        "processes": 1 if form == "one" else PROCESSES,
        "seconds": statistics.median(slowest),
        "interquartile_range": quartiles[2] - quartiles[0],
        "sent_bytes": max(sent for _, sent, _ in measured),
        "difference": max(difference) if difference else None,
    }


def measure(plan: list[int], repetitions: int) -> list[dict[str, Any]]:
    """Rows of the table for each number of pairs."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (plan, repetitions, folder), nprocs=PROCESSES)
        return results.read(Path(folder) / "table.json")


def show(table: list[dict[str, Any]]) -> str:
    lines = [
        f"{'loss':8} {'pairs':>7} {'form':7} {'seconds':>8} {'IQR':>7} {'ratio':>6} {'MB sent':>8} {'difference':>11}"
    ]
    for line in table:
        ratio = "" if line["ratio"] is None else f"{line['ratio']:.3f}"
        difference = "" if line["difference"] is None else f"{line['difference']:.1e}"
        lines.append(
            f"{line['loss']:8} {line['pairs']:7} {line['form']:7} {line['seconds']:8.3f} "
            f"{line['interquartile_range']:7.3f} {ratio:>6} {line['sent_bytes'] / 1e6:8.2f} {difference:>11}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[8192, 16384], help="even numbers of pairs")
    parser.add_argument("--repetitions", type=int, default=7, help="measured, after one of warm-up")
    parser.add_argument("--out", default=str(OUT), help='where to write the JSON record ("-": nowhere)')
    arguments = parser.parse_args()
    if any(pairs < 2 or pairs % 2 for pairs in arguments.pairs):
        parser.error("--pairs must be even, at least 2")
    table = measure(arguments.pairs, arguments.repetitions)
    print(show(table))
    if arguments.out != "-":
        environment = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "backend": "gloo",
            "processor": platform.processor() or platform.machine(),
            "threads_per_process": 1,
        }
        record = {
            "benchmark": "ring",
            "dimensions": DIMENSIONS,
            "temperature": TEMPERATURE,
            "dtype": "float32",
            "repetitions": arguments.repetitions,
            "target_ratio": 1.15,
            "environment": environment,
            "rows": table,
        }
        results.save(arguments.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
