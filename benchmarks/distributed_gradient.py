"""Is the gradient of several processes the gradient of one? Every objective, 2 and 4 gloo processes, uneven shards.

A linear encoder sees two views of a few items, each process a shard of them. The gradients are averaged over the
processes, as data-parallel training does, and compared with those of one process that holds all items: the ratio of
norms and the cosine (encoder), the largest difference relative to the norm (encoder, temperature, bias), and the
averaged loss. A ratio of 1 and a cosine of 1 mean that the number of processes changes nothing. The last rows are
controls that must not reach them: negatives of the own process only, and a gather that drops the other processes'
gradient.

Run from the repository root, a few seconds on two CPU cores:

    python benchmarks/distributed_gradient.py                       # prints the table, writes results/benchmarks/
    python benchmarks/distributed_gradient.py --sizes 7,2 --out -   # one table for these shards, nothing written
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from counterpoint import contrast
from counterpoint.atomic import writing
from counterpoint.contrast import attraction
from counterpoint.contrast.adaptive import adaptive_contrast
from counterpoint.contrast.balanced import balanced_info_nce
from counterpoint.contrast.distributed import exchange, gather, gather_plain
from counterpoint.contrast.focal import focal_sup_con
from counterpoint.contrast.multimodal import Queues, multimodal_contrast
from counterpoint.contrast.regression import Shift, supremix
from counterpoint.contrast.routing import load_balancing, specified_expert
from counterpoint.contrast.spectral import spectral_contrastive
from counterpoint.contrast.subspace import partner_loss

OUT = Path(__file__).parent.parent / "results" / "benchmarks" / "distributed_gradient.json"
SIZES = ([5, 3], [4, 1, 3, 2])
INPUTS, OUTPUTS, QUEUE, HARD = 6, 5, 7, 2


class Shard(NamedTuple):
    """What one process sees of the batch: embeddings of its items, and the shared learned numbers."""

    z1: Tensor
    z2: Tensor
    labels: Tensor
    hard: Tensor
    queue: Tensor
    ignore: Tensor
    positives: Tensor
    row_temperature: Tensor
    temperature: Tensor
    bias: Tensor


def alike_everywhere(s: Shard) -> Tensor:
    """Which rows of all processes share the label of each row of this one."""
    return s.labels[:, None] == gather_plain(s.labels).rows


def noise_of(labels: Tensor) -> Tensor:
    """Some log-probability of each item, which goes with its label."""
    return -1 - labels.double().sin()


def by_ring(loss: Callable[[Shard], Tensor]) -> Callable[[Shard], Tensor]:
    """The loss while key blocks travel from process to process."""

    def travelling(s: Shard) -> Tensor:
        with exchange("ring"):
            return loss(s)

    return travelling


def partners(s: Shard, **options: str) -> Tensor:
    """Every class is to be close to the next one, in a subspace that depends on the item."""
    gate = torch.sigmoid(s.z2)
    return partner_loss(s.z1, s.z2, gate, s.labels, s.labels + 1, temperature=s.temperature, **options)


def swapped(s: Shard, queue: Tensor | None = None) -> Tensor:
    """Three views, of which two are assigned; the queue's rows are the prototypes, too."""
    z, prototypes = contrast.unit(torch.stack([s.z1, s.z2, s.z1 - s.z2])), contrast.unit(s.queue)
    codes = torch.stack([contrast.assign(view, prototypes, queue=queue, epsilon=0.2) for view in z[:2]])
    return contrast.swapped_prediction(z @ prototypes.T, codes, temperature=s.temperature)


def gather_alone(s: Shard) -> Tensor:
    """Not a contrast: own rows meet gathered rows, each with a factor for its place in the whole batch."""
    everyone, plain = gather(s.z1), gather_plain(s.z1)
    mine = slice(everyone.start, everyone.start + len(s.z1))
    assert torch.equal(everyone.rows[mine], s.z1) and torch.equal(everyone.rows, plain.rows)
    assert everyone[1:] == plain[1:] and not plain.rows.requires_grad
    place = torch.arange(1, len(everyone.rows) + 1, dtype=s.z1.dtype).log()[:, None]
    return everyone.ranks * ((s.z1 * place[mine].exp()) @ (everyone.rows.sin() * place).T).sum()


class Tempered(NamedTuple):
    """A temperature that depends on the order of a pair and on the learned one."""

    scale: Tensor

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return self.scale * (2 + (first * second).sum(-1) / 2 + first[..., 0] / 4)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        return self(first[:, None], second[None]).permute(2, 0, 1)


def adaptive_heads(s: Shard) -> Tensor:
    """Heads of one dimension would only have a sign: each gets the whole vector, turned."""
    z1, z2 = (torch.cat([z.roll(c, 1) * (1 + z.square()) for c in range(OUTPUTS)], dim=1) for z in (s.z1, s.z2))
    pairs = contrast.Pairs.under(contrast.nt_xent, z1, z2, negatives=s.queue.repeat(1, OUTPUTS))
    return adaptive_contrast(pairs, Tempered(s.temperature), count=OUTPUTS, beta=0.3)


def regression(s: Shard, shift: Shift) -> Tensor:
    """Labels of few values and a wide window, so that every shard has anchors with mixed positives."""
    features, value = torch.stack([s.z1, s.z2], dim=1), (s.labels % 4).double()
    share = torch.full((2 * len(value), 2 * len(gather_plain(value).rows)), 0.3)
    return supremix(features, value, temperature=s.temperature, share=share, window=3.0, shift=shift)


def token_states(s: Shard) -> Tensor:
    """Each item is a text of two to four tokens."""
    hidden = torch.stack([s.z1, s.z2, s.z1 + s.z2, s.z1 - s.z2], dim=1)
    return contrast.token_margin(hidden, torch.arange(4) < 2 + s.labels[:, None] % 3, margin=0.9)


def local_negatives(s: Shard) -> Tensor:
    """Control: NT-Xent among the own rows, in plain torch."""
    x = contrast.unit(torch.cat([s.z1, s.z2]))
    logits = (x @ x.T / s.temperature).masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(x)).roll(len(s.z1)))


def gradient_dropped(s: Shard) -> Tensor:
    """Control: all negatives, but no gradient to the rows of other processes; the mean over the local rows."""
    image, text = contrast.unit(s.z1), contrast.unit(s.z2)
    keys = gather_plain(text)
    everyone = torch.cat([keys.rows[: keys.start], text, keys.rows[keys.start + len(text) :]])
    return torch.nn.functional.cross_entropy(image @ everyone.T / s.temperature, torch.arange(len(text)) + keys.start)


OBJECTIVES: dict[str, Callable[[Shard], Tensor]] = {
    "nt_xent": lambda s: contrast.nt_xent(s.z1, s.z2, temperature=s.temperature),
    "nt_xent, sum": lambda s: contrast.nt_xent(s.z1, s.z2, temperature=s.temperature, reduction="sum"),
    "alignment": lambda s: contrast.alignment(s.z1, s.z2),
    "uniformity": lambda s: contrast.uniformity(s.z1),
    "uniformity, unnormalised": lambda s: contrast.uniformity(s.z1, normalize=False),
    "dcl": lambda s: contrast.dcl(s.z1, s.z2, temperature=s.temperature),
    "dcl, one way": lambda s: contrast.dcl(s.z1, s.z2, temperature=s.temperature, one_way=True),
    "dclw": lambda s: contrast.dclw(s.z1, s.z2, temperature=s.temperature),
    "dclw, gradient through the weight": lambda s: contrast.dclw(
        s.z1, s.z2, temperature=s.temperature, detach_weight=False
    ),
    "info_nce": lambda s: contrast.info_nce(s.z1, s.z2, temperature=s.temperature),
    "info_nce, symmetric": lambda s: contrast.info_nce(s.z1, s.z2, temperature=s.temperature, symmetric=True),
    "info_nce, symmetric decoupled": lambda s: contrast.info_nce(
        s.z1, s.z2, temperature=s.temperature, symmetric=True, decoupled=True
    ),
    "info_nce, queue and hard negatives": lambda s: contrast.info_nce(
        s.z1, s.z2, temperature=s.temperature, negatives=s.queue, hard_negatives=s.hard, label_smoothing=0.1
    ),
    "info_nce, queue only (MoCo)": lambda s: contrast.info_nce(
        s.z1, s.z2, temperature=s.temperature, negatives=s.queue, in_batch=False
    ),
    "info_nce, several positives": lambda s: contrast.info_nce(
        s.z1, s.z2, temperature=s.temperature, positives=s.positives
    ),
    "info_nce, positives as a matrix": lambda s: contrast.info_nce(
        s.z1, s.z2, temperature=s.temperature, positives=s.ignore | torch.eye(len(s.z1), dtype=torch.bool)
    ),
    "info_nce, pairs to ignore": lambda s: contrast.info_nce(
        s.z1, s.z2, temperature=s.temperature, ignore=s.ignore, symmetric=True
    ),
    "info_nce, pairs of all processes to ignore": lambda s: contrast.info_nce(
        s.z1, s.z2, temperature=s.temperature, ignore=alike_everywhere(s)
    ),
    "balanced_info_nce": lambda s: balanced_info_nce(s.z1, s.z2, temperature=s.temperature, rounds=2),
    "balanced_info_nce, pairs to ignore": lambda s: balanced_info_nce(
        s.z1, s.z2, temperature=s.temperature, ignore=alike_everywhere(s)
    ),
    "relabelled_clip": lambda s: contrast.relabelled_clip(s.z1, s.z2, temperature=s.temperature),
    "relabelled_clip, short vectors": lambda s: contrast.relabelled_clip(
        0.5 * s.z1, 0.5 * s.z2, temperature=s.temperature, normalize=False
    ),
    "multimodal_contrast": lambda s: multimodal_contrast(
        s.z1, s.z2, s.z1.cos(), s.z2.sin(), Queues(*[contrast.unit(s.queue)] * 4), temperature=s.temperature
    ),
    "specified_expert": lambda s: specified_expert(torch.stack([s.z1, s.z2]), s.labels % 3),
    "load_balancing": lambda s: load_balancing(torch.stack([s.z1, s.z2])),
    "info_nce, a temperature per row": lambda s: contrast.info_nce(s.z1, s.z2, temperature=s.row_temperature),
    "sup_con": lambda s: contrast.sup_con(torch.stack([s.z1, s.z2], dim=1), s.labels, temperature=s.temperature),
    "sup_con, one view with singletons": lambda s: contrast.sup_con(s.z1, s.labels, temperature=s.temperature),
    "sup_con, inside the log": lambda s: contrast.sup_con(s.z1, s.labels, temperature=s.temperature, mean="inside"),
    "clip_loss": lambda s: contrast.clip_loss(s.z1, s.z2, temperature=s.temperature),
    "clip_loss, label smoothing": lambda s: contrast.clip_loss(
        s.z1, s.z2, temperature=s.temperature, label_smoothing=0.2
    ),
    "binary_nce": lambda s: contrast.binary_nce(s.z1, s.z2, temperature=s.temperature),
    "binary_nce, known noise": lambda s: contrast.binary_nce(
        s.z1, s.z2, temperature=s.temperature, log_noise=noise_of(s.labels), negatives=s.queue, negatives_log_noise=-2.0
    ),
    "binary_nce, pairs to ignore": lambda s: contrast.binary_nce(
        s.z1, s.z2, temperature=s.temperature, hard_negatives=s.hard, log_noise=-2.0, ignore=s.ignore
    ),
    "ranking_nce, known noise": lambda s: contrast.ranking_nce(
        s.z1, s.z2, temperature=s.temperature, log_noise=noise_of(s.labels), ignore=alike_everywhere(s)
    ),
    **{
        f"triplet, {mining}": lambda s, mining=mining: contrast.triplet(
            s.z1, s.z2, margin=0.5, temperature=s.temperature, mining=mining, hard_negatives=s.hard
        )
        for mining in ("hardest", "semi-hard", "all")
    },
    "triplet, pairs to ignore": lambda s: contrast.triplet(
        s.z1, s.z2, margin=0.5, temperature=s.temperature, ignore=contrast.Same(s.labels, s.labels)
    ),
    "pair_margin": lambda s: contrast.pair_margin(s.z1, s.z2, temperature=s.temperature, negatives=s.queue),
    "n_pair": lambda s: contrast.n_pair(s.z1, s.z2, temperature=s.temperature, l2=0.3),
    **{
        f"scored_{name}": lambda s, loss=loss: loss(
            contrast.unit(s.z1) @ contrast.unit(s.queue).T / s.temperature, s.labels[:, None] % 3 == torch.arange(QUEUE)
        )
        for name, loss in contrast.SCORED_OBJECTIVES.items()
    },
    "sigmoid_loss": lambda s: contrast.sigmoid_loss(s.z1, s.z2, temperature=s.temperature, bias=s.bias),
    "attraction": lambda s: attraction.attraction(torch.stack([s.z1, s.z2, s.z1 - s.z2])),
    "repulsion": lambda s: attraction.repulsion(torch.stack([s.z1, s.z2, s.z1 - s.z2])),
    "repulsion, even weights": lambda s: attraction.repulsion(torch.stack([s.z1, s.z2]), uniform=True),
    "repulsion from queue and batch": lambda s: attraction.queue_repulsion(torch.stack([s.z1, s.z2]), s.queue),
    "momentum_rbf": lambda s: attraction.momentum_rbf(torch.stack([s.z1, s.z1 - s.z2]), s.z2),
    "momentum_euclidean": lambda s: attraction.momentum_euclidean(torch.stack([s.z1, s.z1 - s.z2]), s.z2),
    **{
        f"partner_loss, {variant}, by {reduction}": partial(partners, variant=variant, reduction=reduction)
        for variant, reduction in (("gate_squared", "pair"), ("subspace", "row"))
    },
    "focal_sup_con": lambda s: focal_sup_con(
        s.z1, torch.nn.functional.one_hot(s.labels, 100).to(s.z1.dtype), temperature=s.temperature
    ),
    "clip_loss, equal captions ignored": lambda s: contrast.clip_loss(
        s.z1, s.z2, temperature=s.temperature, ignore=contrast.Same(s.labels, s.labels)
    ),
    "barlow_twins": lambda s: contrast.barlow_twins(s.z1, s.z2, weight=0.3),
    "adaptive_contrast, five heads": adaptive_heads,
    "swapped_prediction": swapped,
    "swapped_prediction, with a queue": lambda s: swapped(s, contrast.unit(s.queue.flip(1))),
    "supremix": partial(regression, shift="joint"),
    "supremix, separate shifts": partial(regression, shift="separate"),
    "token_margin": token_states,
    "spectral_contrastive": lambda s: spectral_contrastive(s.z1, s.z2, mu=0.5),
    "gather alone": gather_alone,
    "control: own negatives only": local_negatives,
    "control: gradient of others dropped": gradient_dropped,
}
TRAVELLING = [name for name in OBJECTIVES if name.partition(",")[0] in contrast.distributed.TRAVELLING]
OBJECTIVES |= {f"{name}, by ring": by_ring(OBJECTIVES[name]) for name in TRAVELLING}


class Learned(NamedTuple):
    """The parameters whose gradients are compared."""

    encoder: Tensor
    temperature: Tensor
    bias: Tensor
    row_temperature: Tensor


def parameters(total: int, dtype: torch.dtype) -> Learned:
    generator = torch.Generator().manual_seed(1)
    values = (
        torch.randn(INPUTS, OUTPUTS, generator=generator, dtype=torch.float64),
        torch.tensor(0.2),
        torch.tensor(-2.0),
        torch.linspace(0.1, 1, total),
    )
    return Learned(*(value.to(dtype).requires_grad_() for value in values))


def shard(learned: Learned, sizes: list[int], rank: int | None, dtype: torch.dtype) -> Shard:
    """The share of process `rank`, or the whole batch (None), always from the same random batch."""
    total = sum(sizes)
    start = 0 if rank is None else sum(sizes[:rank])
    here = slice(start, total if rank is None else start + sizes[rank])
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    view1, noise, hard, queue = (
        draw(total, INPUTS),
        draw(total, INPUTS),
        draw(total, HARD, OUTPUTS),
        draw(QUEUE, OUTPUTS),
    )
    labels = torch.arange(total) * 3 % max(total // 2, 1)
    labels[-1] = 99  # nobody shares it
    # Pairs are named within a process; the whole batch holds them on its block diagonal.
    blocks = [torch.rand(size, size, generator=generator) > 0.6 for size in sizes]
    neighbours = [torch.stack([torch.arange(size), (torch.arange(size) + 1) % size], dim=1) for size in sizes]
    if rank is None:
        offsets = [sum(sizes[:r]) for r in range(len(sizes))]
        ignore = torch.block_diag(*blocks).bool()
        positives = torch.cat([near + offset for near, offset in zip(neighbours, offsets, strict=True)])
    else:
        ignore, positives = blocks[rank], neighbours[rank]
    return Shard(
        view1[here] @ learned.encoder,
        (view1 + noise / 2)[here] @ learned.encoder,
        labels[here],
        hard[here],
        queue,
        ignore,
        positives,
        learned.row_temperature[here],
        learned.temperature,
        learned.bias,
    )


def gradients(objective: Callable[[Shard], Tensor], sizes: list[int], rank: int | None, dtype: torch.dtype):
    learned = parameters(sum(sizes), dtype)
    loss = objective(shard(learned, sizes, rank, dtype))
    grads = torch.autograd.grad(loss, learned, allow_unused=True)
    return loss.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(learned, grads, strict=True)]


def compare(name: str, sizes: list[int], rank: int, dtype: torch.dtype, expected) -> dict[str, Any]:
    loss, grads = gradients(OBJECTIVES[name], sizes, rank, dtype)
    for tensor in (loss, *grads):
        distributed.all_reduce(tensor)
        tensor /= len(sizes)
    loss_alone, alone = expected
    ours, theirs = grads[0].double().flatten(), alone[0].double().flatten()
    largest = {
        field: float((a - b).double().norm() / b.double().norm())
        for field, a, b in zip(Learned._fields, grads, alone, strict=True)
        if float(b.norm()) > 0
    }
    return {
        "objective": name,
        "processes": len(sizes),
        "sizes": sizes,
        "loss": float(loss),
        "loss_alone": float(loss_alone),
        "gradient_ratio": float(ours.norm() / theirs.norm()),
        "cosine": float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)),
        "relative_difference": largest,
    }


def work(rank: int, plan: list[list[int]], dtype: torch.dtype, folder: str) -> None:
    """One process: for every plan in which it takes part, first alone, then as a member of the group."""
    torch.set_num_threads(1)
    rows = []
    for sizes in plan:
        if rank >= len(sizes):
            continue
        alone = {name: gradients(objective, sizes, None, dtype) for name, objective in OBJECTIVES.items()}
        meeting = f"file://{folder}/meeting-{'-'.join(map(str, sizes))}"
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=len(sizes))
        rows += [compare(name, sizes, rank, dtype, alone[name]) for name in OBJECTIVES]
        distributed.barrier()
        distributed.destroy_process_group()
    if rank == 0:
        with writing(Path(folder) / "rows.json") as path:
            path.write_text(json.dumps(rows))


def measure(plan: list[list[int]], dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Rows of the table for each list of shard sizes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (plan, dtype, folder), nprocs=max(len(sizes) for sizes in plan))
        return json.loads((Path(folder) / "rows.json").read_text())


def table(rows: list[dict[str, Any]]) -> str:
    worlds = sorted({row["processes"] for row in rows})
    width = max(len(row["objective"]) for row in rows)
    lines = [f"{'objective':{width}}  " + "  ".join(f"{f'ratio W={w}':>11}  {f'cosine W={w}':>11}" for w in worlds)]
    for name in dict.fromkeys(row["objective"] for row in rows):
        mine = {row["processes"]: row for row in rows if row["objective"] == name}
        cells = [f"{mine[w]['gradient_ratio']:11.6f}  {mine[w]['cosine']:11.6f}" for w in worlds]
        lines.append(f"{name:{width}}  " + "  ".join(cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", action="append", help="rows of each process, for example 5,3; may be repeated")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--out", default=str(OUT), help='where to write the JSON record ("-": nowhere)')
    arguments = parser.parse_args()
    plan = [[int(n) for n in sizes.split(",")] for sizes in arguments.sizes or []] or [list(s) for s in SIZES]
    rows = measure(plan, getattr(torch, arguments.dtype))
    print(table(rows))
    if arguments.out != "-":
        out = Path(arguments.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        environment = {"torch": torch.__version__, "python": platform.python_version(), "backend": "gloo"}
        record = {
            "benchmark": "distributed_gradient",
            "dtype": arguments.dtype,
            "environment": environment,
            "rows": rows,
        }
        with writing(out) as path:
            path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
