"""Whole training steps, data to optimiser, beside other libraries' on the same data, model, batch and machine.

- ``simclr``: SimCLR with a small convolutional net on 32-pixel images; lightly's transforms (in loader processes, as its
  examples do) and NTXentLoss, in a bare loop. ``simclr resnet18``: the same with a ResNet-18 whose stem suits small images.
- ``simcse``: unsupervised SimCSE with the first layers of a sentence encoder; sentence-transformers'
  MultipleNegativesRankingLoss on (sentence, sentence) pairs through its own tokenising and collating, in a bare loop.
- ``embed``: embeddings per second of the sentence encoder beside SentenceTransformer.encode, and of a ResNet-18 on images of 96
  pixels beside a plain loop over the same timm model.

A bare loop is the fastest form of a peer: no trainer, no logging, no checkpoints. Ours is `counterpoint.fit` as anyone calls it.
Every measurement is a process of its own; the first epoch warms up and does not count. Also: how long `import counterpoint`
takes, the time from the command to the end of the first step, and the shares of our step that views, encoder, loss and
optimiser take.

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
from functools import partial
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent.parent / "results" / "benchmarks" / "training_step.json"
IMAGES, SIDE, BATCH = 4096, 32, 256
RESNET_IMAGES, RESNET_BATCH = 384, 64
SENTENCES, TEXT_BATCH = 1024, 64
EMBEDDED, EMBEDDED_SIDE = 512, 96


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
    for form in ("simclr", "simclr resnet18", "simcse", "simcse embed", "image embed"):
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


def images(count: int = IMAGES, side: int = SIDE) -> Any:
    import torch

    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def sentences(options: argparse.Namespace) -> list[str]:
    lines = [line.strip() for line in Path(options.sentences).read_text().splitlines()]
    return list(dict.fromkeys(line for line in lines if line))[:SENTENCES]


def ours(method: Any, data: Any, batch: int, **fit: Any) -> dict[str, Any]:
    """Items per second within the second epoch, by the run's own record; the checkpoint after it does not count."""
    import counterpoint as cp

    with tempfile.TemporaryDirectory() as folder:
        options = {"epochs": 2, "batch_size": batch, "progress": False, "log_every": 1, "workers": 0, **fit}
        run = cp.fit(method, data, run=Path(folder, "run"), **options)
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    late = [line["time"] for line in lines if line["epoch"] > 1]
    return {"items_per_second": batch * (len(late) - 1) / (late[-1] - late[0])}


def simclr_ours(
    options: argparse.Namespace, encoder: str = "convnet-16", count: int = IMAGES, batch: int = BATCH
) -> Any:
    import counterpoint as cp
    from counterpoint.views import SIMCLR_SMALL

    data = images(count)
    method = cp.SimCLR(encoder=encoder, image_size=SIDE, views=SIMCLR_SMALL)
    return ours(method, data, batch) | shares(method, data[:batch])


def shares(method: Any, batch: Any) -> dict[str, float]:
    """Of a step of SimCLR: what views, loss and optimiser take alone, and the rest, which is encoder and projector."""
    import torch

    from counterpoint import contrast

    torch.set_grad_enabled(True)
    method.train()
    optimiser = torch.optim.SGD(method.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4, fused=True)
    z = [torch.randn(len(batch), 128, requires_grad=True) for _ in range(2)]

    def step() -> None:
        optimiser.zero_grad()
        method.loss({"image": batch}).backward()
        optimiser.step()

    parts = {
        "step": step,
        "views": lambda: [method.views(batch) for _ in range(2)],
        "loss": lambda: contrast.nt_xent(*z, temperature=0.2).backward(),
        "optimiser": optimiser.step,
    }
    took = {}
    for name, part in parts.items():
        part()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            part()
            times.append(time.perf_counter() - start)
        took[name] = statistics.median(times)
    found = {f"share_of_{name}": took[name] / took["step"] for name in ("views", "loss", "optimiser")}
    return found | {"share_of_encoder": 1 - sum(found.values())}


def simclr_peer(options: argparse.Namespace, name: str = "convnet-16", count: int = IMAGES, batch: int = BATCH) -> Any:
    import torch
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
    from torchvision.transforms.functional import to_pil_image

    from counterpoint import encoders
    from counterpoint.encoders import heads

    data = images(count)
    transform = SimCLRTransform(input_size=SIDE, gaussian_blur=0.0)

    class Views(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int) -> Any:
            return transform(to_pil_image(data[index]))

    encoder = encoders.image(name, image_size=SIDE)
    net = torch.nn.ModuleList([encoder, heads.simclr_projector(encoder.dim)])
    loss = NTXentLoss(temperature=0.2)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(
        Views(), batch, shuffle=True, drop_last=True, num_workers=os.cpu_count() or 1, persistent_workers=True
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
    return {"items_per_second": batch * (len(late) - 1) / (late[-1] - late[0])}


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


def images_ours(options: argparse.Namespace) -> dict[str, Any]:
    import counterpoint as cp
    from counterpoint.data import Images

    method = cp.SimCLR(encoder="resnet18", image_size=EMBEDDED_SIDE).eval()
    return timed(lambda part: method.encode(Images(part, name="images")), images(EMBEDDED, EMBEDDED_SIDE))


def images_peer(options: argparse.Namespace) -> dict[str, Any]:
    import timm
    import torch

    model = timm.create_model("resnet18", num_classes=0).eval()
    mean, deviation = (torch.tensor(model.default_cfg[key])[:, None, None] for key in ("mean", "std"))

    @torch.inference_mode()
    def encode(part: Any) -> Any:
        return torch.cat([model((rows / 255 - mean) / deviation) for rows in part.split(128)])

    return timed(encode, images(EMBEDDED, EMBEDDED_SIDE))


def timed(encode: Any, items: Any) -> dict[str, Any]:
    encode(items[:64])
    start = time.perf_counter()
    encode(items)
    return {"items_per_second": len(items) / (time.perf_counter() - start)}


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
    "simclr resnet18 ours": partial(simclr_ours, encoder="resnet18", count=RESNET_IMAGES, batch=RESNET_BATCH),
    "simclr resnet18 peer": partial(simclr_peer, name="resnet18", count=RESNET_IMAGES, batch=RESNET_BATCH),
    "simcse ours": simcse_ours,
    "simcse peer": simcse_peer,
    "simcse embed ours": embed_ours,
    "simcse embed peer": embed_peer,
    "image embed ours": images_ours,
    "image embed peer": images_peer,
}

if __name__ == "__main__":
    main()
