"""Whole training steps, data to optimiser, beside other libraries' on the same data, model, batch and machine.

- ``simclr``: SimCLR with a small convolutional net on 32-pixel images; lightly's transforms (in loader processes, as its
  examples do) and NTXentLoss, in a bare loop.
- ``simcse``: unsupervised SimCSE with the first layers of a sentence encoder; sentence-transformers'
  MultipleNegativesRankingLoss on (sentence, sentence) pairs through its own tokenising and collating, in a bare loop.

A bare loop is the fastest form of a peer: no trainer, no logging, no checkpoints. Ours is `counterpoint.fit` as anyone calls it.
Every measurement is a process of its own; the first steps warm up and do not count. Also: how long `import counterpoint`
takes, the time from the command to the end of the first step, and the share of our step that views take.

Run from the repository root on a quiet machine:

    pip install lightly sentence-transformers
    python benchmarks/training_step.py --sentences FILE --encoder FOLDER     # writes results/benchmarks/training_step.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent.parent / "results" / "benchmarks" / "training_step.json"
IMAGES, SIDE, BATCH = 8192, 32, 256
SENTENCES, TEXT_BATCH = 2048, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", help="folder or hub name of a sentence encoder; without it SimCSE is left out")
    parser.add_argument("--sentences", help="text file, one sentence a line")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", default=str(OUT))
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(CELLS[options.cell](options)))
        return
    cells = [name for name in CELLS if options.encoder or not name.startswith("simcse")]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in cells}
    for _ in range(options.repeat):  # in turn, so that a busy minute of the machine hits all of them
        for name in cells:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--cell", name], capture_output=True, text=True
            )
            last = (done.stdout.splitlines() or [""])[-1]
            rows[name].append(json.loads(last) if done.returncode == 0 else {"failed": done.stderr.strip()[-300:]})
            print(name, rows[name][-1], flush=True)
    record = {"cells": {name: summary(found) for name, found in rows.items()}, "environment": environment()}
    for form in ("simclr", "simcse"):
        ours, theirs = (record["cells"].get(f"{form} {who}", {}).get("items_per_second") for who in ("ours", "peer"))
        if ours and theirs:
            record[f"{form} ratio"] = ours / theirs
            print(f"{form}: {ours / theirs:.2f} times the items per second")
    if options.out != "-":
        from counterpoint.atomic import writing

        with writing(Path(options.out)) as path:
            path.write_text(json.dumps(record, indent=1) + "\n")


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    good = [row for row in found if "failed" not in row]
    if not good:
        return found[0]
    return {key: statistics.median(row[key] for row in good) for key in good[0]} | {"runs": len(good)}


def images() -> Any:
    import torch

    return torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def sentences(options: argparse.Namespace) -> list[str]:
    lines = [line.strip() for line in Path(options.sentences).read_text().splitlines()]
    return list(dict.fromkeys(line for line in lines if line))[:SENTENCES]


def ours(method: Any, data: Any, batch: int, **fit: Any) -> dict[str, Any]:
    """Items per second of the second epoch, by the run's own record."""
    import counterpoint as cp

    with tempfile.TemporaryDirectory() as folder:
        options = {"epochs": 3, "batch_size": batch, "progress": False, "log_every": 1, "workers": 0, **fit}
        run = cp.fit(method, data, run=Path(folder, "run"), **options)
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    late = [line["time"] for line in lines if line["epoch"] > 1]
    return {"items_per_second": batch * (len(late) - 1) / (late[-1] - late[0])}


def simclr_ours(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    import counterpoint as cp
    from counterpoint.views import SIMCLR_SMALL

    data, spent = images(), [0.0, 0.0]
    method = cp.SimCLR(encoder="convnet-16", image_size=SIDE, views=SIMCLR_SMALL)
    found = ours(method, data, BATCH)
    batch = data[:BATCH]
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(2):
            method.views(batch)
        spent[0] += time.perf_counter() - start
        start = time.perf_counter()
        method.train().loss({"image": batch}).backward()
        spent[1] += time.perf_counter() - start
    torch.set_grad_enabled(True)
    return found | {"share_of_views": spent[0] / spent[1]}


def simclr_peer(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
    from torchvision.transforms.functional import to_pil_image

    from counterpoint import encoders
    from counterpoint.encoders import heads

    data = images()
    transform = SimCLRTransform(input_size=SIDE, gaussian_blur=0.0)

    class Views(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return IMAGES

        def __getitem__(self, index: int) -> Any:
            return transform(to_pil_image(data[index]))

    encoder = encoders.image("convnet-16", image_size=SIDE)
    net = torch.nn.ModuleList([encoder, heads.simclr_projector(encoder.dim)])
    loss = NTXentLoss(temperature=0.2)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(
        Views(), BATCH, shuffle=True, drop_last=True, num_workers=os.cpu_count() or 1, persistent_workers=True
    )
    times = []
    for _ in range(2):
        for first, second in loader:
            z1, z2 = (net[1](net[0](view).pooled) for view in (first, second))
            optimiser.zero_grad()
            loss(z1, z2).backward()
            optimiser.step()
            times.append(time.perf_counter())
    late = times[len(times) // 2 :]
    return {"items_per_second": BATCH * (len(late) - 1) / (late[-1] - late[0])}


def simcse_ours(options: argparse.Namespace) -> dict[str, Any]:
    from counterpoint.methods.language.simcse import SimCSE

    method = SimCSE(encoder=options.encoder, layers=options.layers, pooling="mean", dropout=0.1, head=False)
    fit = {"optimizer": "adamw", "lr": 3e-5, "weight_decay": 0.0}
    return ours(method, sentences(options), TEXT_BATCH, **fit)


def simcse_peer(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    lines = sentences(options)
    model = SentenceTransformer(options.encoder, device="cpu")
    model.max_seq_length = 32
    bert = model[0].auto_model
    bert.encoder.layer = bert.encoder.layer[: options.layers]
    loss = MultipleNegativesRankingLoss(model, scale=20.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.0)
    model.train()
    times = []
    for epoch in range(2):
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(0, len(lines) - TEXT_BATCH + 1, TEXT_BATCH):
            batch = [lines[i] for i in order[start : start + TEXT_BATCH]]
            features = [model.preprocess(batch), model.preprocess(batch)]
            optimiser.zero_grad()
            loss(features, None).backward()
            optimiser.step()
            times.append(time.perf_counter())
    late = times[len(times) // 2 :]
    return {"items_per_second": TEXT_BATCH * (len(late) - 1) / (late[-1] - late[0])}


def embed_ours(options: argparse.Namespace) -> dict[str, Any]:
    from counterpoint.methods.language.simcse import SimCSE

    method = SimCSE(encoder=options.encoder).eval()
    return timed(lambda lines: method.encode(lines), sentences(options))


def embed_peer(options: argparse.Namespace) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(options.encoder, device="cpu")
    return timed(lambda lines: model.encode(lines, batch_size=128, show_progress_bar=False), sentences(options))


def timed(encode: Any, lines: list[str]) -> dict[str, Any]:
    encode(lines[:64])
    start = time.perf_counter()
    encode(lines)
    return {"items_per_second": len(lines) / (time.perf_counter() - start)}


def start_up(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the import, and from the command line to a finished first step of a tiny training."""
    import numpy as np

    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import counterpoint"], check=True)
    bare = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    done = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        np.save(
            Path(folder, "d.npy"),
            np.zeros((64, 3, 32, 32), np.uint8) + np.arange(64, dtype=np.uint8)[:, None, None, None],
        )
        command = [sys.executable, "-m", "counterpoint.cli", "train", "simclr", "--data", f"{folder}/d.npy"]
        command += ["--encoder", "convnet-16", "--epochs", "1", "--batch_size", "64", "--progress", "false"]
        first = time.perf_counter()
        subprocess.run([*command, "--run", f"{folder}/run"], check=True, capture_output=True)
        last = time.perf_counter()
    return {"import_seconds": (bare - start) - (done - bare), "first_step_seconds": last - first}


def environment() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "threads": torch.get_num_threads()}
    for name in ("torch", "lightly", "sentence-transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


CELLS = {
    "start-up": start_up,
    "simclr ours": simclr_ours,
    "simclr peer": simclr_peer,
    "simcse ours": simcse_ours,
    "simcse peer": simcse_peer,
    "simcse embed ours": embed_ours,
    "simcse embed peer": embed_peer,
}

if __name__ == "__main__":
    main()
