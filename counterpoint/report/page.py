"""The page: its sections in reading order, and the one function that writes it."""

from __future__ import annotations

import json
import math
import re
import shlex
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from counterpoint import methods
from counterpoint.atomic import writing
from counterpoint.errors import InputError
from counterpoint.report import figures, gallery
from counterpoint.report.reading import Run, read


def write(run_folder: str | Path, bundle: str | Path | None = None) -> Path:
    """Render a run folder as `report.html` inside it: one file, nothing loaded from anywhere.

    Args:
        run_folder: holds `metrics.jsonl` and, if they were written, `config.yaml`, `environment.json`,
            `evaluation.json` and `gallery.npz`. A part of the page whose file is missing is left out.
        bundle: an npz to show instead of the folder's `gallery.npz`: `image` uint8 [N, C, H, W], `vector` float [N, D],
            optionally `label` int [N], `classes` (names), `labels_used_in_training` (bool),
            `origin` (what they are, did training see them).

    Returns:
        The page's path. It is written under a temporary name and renamed, so an earlier page stays whole if this fails.

    Raises:
        InputError: no such folder, no metrics in it, or a file that is not what its name says.
    """
    run = read(run_folder)
    items = gallery.read(Path(bundle) if bundle is not None else run.folder / "gallery.npz")
    path = run.folder / "report.html"
    text = render(run, items)
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def render(run: Run, items: gallery.Items | None = None) -> str:
    """The whole page as text."""
    data: dict[str, Any] = {"charts": {}}
    title = heading(run)
    parts = [opening(run, title), evaluation(run), unlabelled(run, items), training(run, data["charts"])]
    if items is not None:
        data["gallery"], said = gallery.payload(items)
        parts += [embedding_map(items, said), neighbours(items, said)]
    parts += [configuration(run), reproduce(run)]
    return fill(
        _file("page.html"),
        title=escape(title),
        style=_file("page.css"),
        body="\n".join(part for part in parts if part),
        # "<" would let a class name end the script element.
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        script=_file("page.js"),
    )


def fill(template: str, **values: str) -> str:
    """Put values at `{{name}}`, in one pass: what a value holds is never read as a template."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)


def _file(name: str) -> str:
    return (resources.files("counterpoint.report") / name).read_text(encoding="utf-8")


def _first(found: dict[str, Any], *names: str) -> Any:
    return next((found[n] for n in names if found.get(n) not in (None, "", {}, [])), None)


def _name(found: Any) -> str | None:
    """The name in a configuration entry: itself, or that of the class it describes."""
    if isinstance(found, dict):
        found = _first(found, "name", "method", "data", "path", "class_path")
    return (
        found.split(".")[-1] if isinstance(found, str) and found.startswith("counterpoint.") else found and str(found)
    )


def heading(run: Run) -> str:
    method, data = _name(run.config.get("method")), _name(run.config.get("data"))
    title = _title(method) if method else run.folder.resolve().name
    return f"{title} on {data}" if data else title


def _title(slug: str) -> str:
    """The short name of a method for people; whatever is not registered keeps its own."""
    try:
        return methods.entry(slug).title.partition(":")[0]
    except InputError:
        return slug


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _when(found: Any) -> str | None:
    if isinstance(found, int | float):
        found = datetime.fromtimestamp(found).isoformat()
    try:
        when = found if isinstance(found, datetime) else datetime.fromisoformat(str(found))
    except ValueError:
        return str(found) if found else None
    return f"{when.day} {when:%B %Y, %H:%M}"


def opening(run: Run, title: str) -> str:
    """Title, the facts of the run, and its main result in one sentence."""
    arguments = next((v for v in (run.config.get("model"), run.config.get("method")) if isinstance(v, dict)), {})
    arguments = arguments.get("init_args", arguments)
    rate = run.series("images_per_second")[1]
    last = run.metrics[-1]
    epochs = last.get("epoch")
    steps = f"{int(last['step']):,}" + (
        f" ({epochs:.0f} epochs)" if isinstance(epochs, int | float) and epochs >= 1 else ""
    )
    facts = {
        "encoder": _name(arguments.get("encoder")),
        "trained": _when(_first(run.environment, "started", "start", "date", "created", "time")),
        "took": duration(run.seconds) if run.seconds is not None else None,
        "device": _first(run.environment, "device_name", "gpu", "device", "accelerator", "cpu"),
        "steps": steps,
        "images a second": f"{np.median(rate):,.0f}" if len(rate) else None,
    }
    rows = "".join(f"<div><dt>{k}</dt><dd>{escape(_plain(v))}</dd></div>" for k, v in facts.items() if v)
    return f"<header><h1>{escape(title)}</h1><dl>{rows}</dl></header>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def evaluation(run: Run) -> str:
    """The main result as a sentence (the first protocol of evaluation.json), then every result with its interval."""
    if not run.results:
        return ""
    protocol = run.results[0]["protocol"]
    rows = [r for r in run.results if r["protocol"] == protocol]
    words = [f"<span>{escape(str(r.get('subject') or 'trained'))} <b>{figures.amount(r)}</b></span>" for r in rows]
    value = {str(r.get("subject") or "trained"): r["value"] for r in rows}
    gain = ""
    if "trained" in value and "untrained" in value and figures.is_share(str(rows[0].get("metric", ""))):
        points = value["trained"] - value["untrained"]
        side = "above" if points >= 0 else "below"
        gain = f"<p>Training put the encoder {abs(points):.1f} points {side} its own untrained start.</p>"
    return (
        f'<section aria-label="Results"><p class="headline">{" · ".join(words)} '
        f"<span>on {escape(str(protocol))}</span></p>"
        f"{gain}{figures.results(run.results)}</section>"
    )


def unlabelled(run: Run, items: gallery.Items | None) -> str:
    used = run.config.get("labels_used_in_training", run.environment.get("labels_used_in_training"))
    if used is None and items is not None:
        used = items.labels_used
    if used is None:
        return ""
    shown = items is not None and items.label is not None
    if used:
        return '<p class="note">Labels were used in training: the classes below are those the encoder was taught.</p>'
    below = (
        "classes below only colour the map and check the neighbours" if shown else "the images alone made these vectors"
    )
    return f'<p class="note">No label was used in training: {below}.</p>'


def training(run: Run, charts: dict[str, Any]) -> str:
    """Everything logged over the steps; adds what the pointer reads to `charts`."""
    parts = []
    for name, title, figure in (
        ("loss", "Loss", figures.loss(run)),
        ("similarity", "Similarity of positive and negative pairs", figures.similarity(run)),
        ("scores", "Scores that enter the loss", figures.scores(run)),
    ):
        if figure:
            parts.append(f"<section><h2>{title}</h2>{figure[0]}</section>")
            charts[name] = figure[1]
    pair = []
    if plane := figures.plane(run):
        pair.append(plane)
    if rank := figures.rank(run):
        pair.append(rank[0])
        charts["rank"] = rank[1]
    if pair:
        parts.append(f'<section><h2>Geometry of the projections</h2><div class="pair">{"".join(pair)}</div></section>')
    return "\n".join(parts)


def embedding_map(items: gallery.Items, said: dict[str, Any]) -> str:
    count = len(items.image)
    shown = f"{count:,} images" + (
        f" drawn at random from {items.total:,}" if items.total - items.dropped > count else ""
    )
    lost = f" {items.dropped:,} without a finite vector are left out." if items.dropped else ""
    colour = f" Colour: {escape(said['kind'])}." if said["groups"] > 1 else ""
    origin = f" They are {escape(items.origin)}." if items.origin else ""
    return fill(
        _file("map.html"), shown=shown, how=escape(said["how"]), more=origin + colour + lost, count=f"{count:,}"
    )


def neighbours(items: gallery.Items, said: dict[str, Any]) -> str:
    if len(items.image) < 2:
        return ""
    k = min(gallery.NEIGHBOURS, len(items.image) - 1)
    check = ""
    if said["agreement"] and items.label is not None:
        found, chance = said["agreement"]
        check = (
            f" Over all {len(items.image):,} images, <b>{figures.certain(found)}</b> of the {k} nearest neighbours "
            f"have the class of their query; chance would give {figures.certain(chance)}. "
            "Neighbours of the same class as the query are outlined and ticked."
        )
    mean, most = (f"{math.ceil(e * 1000) / 1000:.3f}" for e in said["error"])
    cut = (
        f"projected by PCA (not centred) from {said['from']} to {said['size']} dimensions, which keeps "
        f"{figures.certain(said['kept'])} of their squared length, and "
        if said["from"] > said["size"]
        else ""
    )
    return f"""<section id="neighbours"><h2>Nearest neighbours</h2>
<p>On the left a query drawn at random, not chosen; on the right the images most similar to it, with their
cosine.{check}</p>
<div class="rows" data-rows></div>
<p class="buttons"><button type="button" data-others>other queries</button></p>
<p class="help">Click any image to make it the query of its row. Cosines are computed here from the trained
vectors, {cut}rounded to 8 bits; this changes them by {mean} on average and {most} at most.</p></section>"""


def configuration(run: Run) -> str:
    parts = ""
    if run.config_text and run.config_text.strip():
        text = escape(run.config_text.strip())
        parts += f'<details><summary>Configuration</summary><pre tabindex="0">{text}</pre></details>'
    if run.environment:
        rows = "".join(
            f"<tr><th scope=row>{escape(name)}</th><td>{escape(_plain(value))}</td></tr>"
            for name, value in _flat(run.environment)
        )
        table = f'<div class="scroll"><table class="environment">{rows}</table></div>'
        parts += f"<details><summary>Environment</summary>{table}</details>"
    return f"<section><h2>Settings</h2>{parts}</section>" if parts else ""


def _flat(found: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in found.items():
        rows += _flat(value, f"{before}{name}.") if isinstance(value, dict) else [(f"{before}{name}", value)]
    return rows


def reproduce(run: Run) -> str:
    command = run.config.get("command")
    if not command:
        return ""
    command = shlex.join(str(part) for part in command) if isinstance(command, list) else str(command)
    return (
        f'<section><h2>Reproduce</h2><div class="command"><pre tabindex="0"><code data-command>{escape(command)}</code>'
        '</pre><button type="button" data-copy>copy</button></div></section>'
    )
