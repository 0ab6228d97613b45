"""The figures of a training run: results, loss, similarities, scores, alignment and uniformity, effective rank.

Each function returns one figure as HTML and, where the pointer can read values from it, the data for that.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from counterpoint.report.charts import MINUS, SIDE, Axis, axis, line, number, plot, smooth, thin
from counterpoint.report.reading import BINS, Run

EDGES = np.linspace(-1.0, 1.0, BINS + 1)
CENTRES = (EDGES[1:] + EDGES[:-1]) / 2
POINTS = 400  # points kept of a curve: one for each two or three pixels
COLUMNS = 160  # histograms kept over training

PROTOCOLS = {
    "one-shot": "each drawing goes to the nearest, by cosine, of 20 characters seen once",
    "knn": "each test item is named by a weighted vote of its nearest training items, by cosine",
    "linear": "logistic regression on the frozen vectors, its strength chosen on a part of the training items",
    "ridge": "ridge regression on the frozen vectors, its penalty chosen on a part of the training items; lower is better",
}


def percent(value: float) -> str:
    return f"{value:.1f} %".replace("-", MINUS)


def certain(share: float) -> str:
    """A share as %, never rounded up to all or down to none of the cases."""
    text = "over 99.9 %" if 0.9995 <= share < 1 else "under 0.1 %" if 0 < share < 0.0005 else percent(share * 100)
    return text.replace(" %", "\u00a0%")


def is_share(metric: str) -> bool:
    """Whether a metric is a share of the items, reported in %."""
    return bool(re.search(r"accura|recall|precision|correct|share|rate|top|hit|ndcg|f1|map", metric, re.IGNORECASE))


def amount(result: dict[str, Any]) -> str:
    return percent(result["value"]) if is_share(str(result.get("metric", ""))) else number(result["value"])


def interval(result: dict[str, Any]) -> tuple[float, float] | None:
    ci = result.get("ci")
    if isinstance(ci, list) and len(ci) == 2 and all(isinstance(c, int | float) and np.isfinite(c) for c in ci):
        return float(ci[0]), float(ci[1])
    return None


def results(found: list[dict[str, Any]]) -> str:
    """Protocols by subjects, each value with its interval drawn on the protocol's own scale."""
    protocols = list(dict.fromkeys(str(r["protocol"]) for r in found))
    return '<div class="scroll"><table class="results">' + (
        '<colgroup><col class="c1"><col class="c2"><col class="c3"><col></colgroup><thead><tr>'
        '<th scope="col">subject</th><th scope="col">value</th><th scope="col">95 % interval</th>'
        '<th scope="col" class="wide"><span class="hidden">drawn</span></th></tr></thead>'
        + "".join(_protocol(p, [r for r in found if str(r["protocol"]) == p]) for p in protocols)
        + "</table></div>"
    )


def _protocol(name: str, rows: list[dict[str, Any]]) -> str:
    share = all(is_share(str(r.get("metric", ""))) for r in rows)
    ends = [v for r in rows for v in (r["value"], *(interval(r) or ()))]
    scale = Axis(0.0, 100.0, (0.0, 25.0, 50.0, 75.0, 100.0)) if share and max(ends) <= 100 else axis(ends, count=4)
    chance = next((c for r in rows if (c := _chance(r.get("detail"))) is not None), None)
    if chance is not None and not scale.low <= chance <= scale.high:
        chance = None
    what = next((text for start, text in PROTOCOLS.items() if name.startswith(start)), "")
    size = rows[0].get("n")
    about = [str(rows[0].get("metric", "")), f"{size:,} items" if isinstance(size, int) and size > 0 else "", what]
    body = ""
    for row in rows:
        ci = interval(row)
        subject = str(row.get("subject") or "trained")
        words = f"{number(ci[0], 0.1)} to {number(ci[1], 0.1)}" if ci else "—"
        drawn = f'<i class="bar" style="width:{_at(scale, row["value"])}"></i>' if scale.low == 0 else ""
        if ci:
            width = f"{max(0.0, scale.share(ci[1]) - scale.share(ci[0])) * 100:.2f}%"
            drawn += f'<i class="whisker" style="left:{_at(scale, ci[0])};width:{width}"></i>'
        drawn += f'<i class="dot" style="left:{_at(scale, row["value"])}"></i>'
        if chance is not None:
            drawn += f'<i class="chance" style="left:{_at(scale, chance)}"></i>'
        body += (
            f'<tr{" class=lead" if subject == "trained" else ""}><th scope="row">{escape(subject)}</th>'
            f'<td class="value">{amount(row)}</td><td class="interval">{words}</td>'
            f'<td class="wide"><div class="scale" aria-hidden="true">{drawn}</div></td></tr>'
        )
    ticks = "".join(f'<span style="left:{s * 100:.2f}%">{t}</span>' for s, t in scale.labels())
    guess = f"chance {number(chance, 0.1 if chance % 1 else 1)}{' %' if share else ''}" if chance is not None else ""
    return (
        f'<tbody><tr class="protocol"><th scope="rowgroup" colspan="4"><b>{escape(name)}</b> '
        f"<span>{escape(' · '.join(a for a in about if a))}</span></th></tr>{body}"
        f'<tr class="ticks" aria-hidden="true"><td colspan="3">{guess and f"<i></i>{guess}"}</td>'
        f'<td class="wide"><div>{ticks}</div></td></tr></tbody>'
    )


def _chance(detail: Any) -> float | None:
    """What guessing would reach: as the protocol states it, or one in the number of ways."""
    found = detail if isinstance(detail, dict) else {}
    if isinstance(found.get("chance"), int | float):
        return float(found["chance"])
    return 100.0 / found["ways"] if isinstance(found.get("ways"), int) and found["ways"] > 0 else None


def _at(scale: Axis, value: float) -> str:
    return f"{min(max(scale.share(value), 0.0), 1.0) * 100:.2f}%"


def steps_axis(steps: np.ndarray) -> Axis:
    return axis([0.0 if steps[0] <= 0.05 * steps[-1] else steps[0], steps[-1]], "step", tight=True)


def loss(run: Run) -> tuple[str, dict[str, Any]] | None:
    """The loss, raw and smoothed, above the learning rate: two panels on one x axis."""
    steps, values = run.series("loss")
    if not len(steps):
        return None
    x = steps_axis(steps)
    level = smooth(values)
    # One early spike must not flatten the rest: it is drawn as leaving the plot.
    y = axis([np.quantile(values, 0.002), np.quantile(values, 0.995), *level[[0, -1]]])
    kept, raw = thin(len(steps), POINTS), thin(len(steps), 3 * POINTS)
    body = (
        f'<path class="raw" d="{line(x, y, steps[raw], values[raw])}"/>'
        f'<path class="ink" d="{line(x, y, steps[kept], level[kept])}"/>'
    )
    summary = f"Loss over {int(steps[-1]):,} steps, from {number(level[0])} to {number(level[-1])}."
    rate_steps, rates = run.series("lr")
    below = len(rate_steps) > 1
    plots = plot(body, x, y, label=summary, name="loss", kind="tall", keys=not below)
    data: dict[str, Any] = {
        "step": steps[kept].astype(int).tolist(),
        "x": [x.low, x.high],
        "plots": {"loss": {"name": "loss", "values": _list(level[kept]), "y": [y.low, y.high]}},
    }
    if below:
        at = np.interp(steps[kept], rate_steps, rates)
        yr = axis([0.0, rates.max()], "learning rate", count=2, zero=True)
        path = line(x, yr, steps[kept], at)
        close = f"L{x.share(steps[kept][-1]) * SIDE:.1f},1000L{x.share(steps[kept][0]) * SIDE:.1f},1000Z"
        plots += plot(
            f'<path class="fill" d="{path}{close}"/><path class="faint" d="{path}"/>',
            x, yr, label=f"Learning rate, highest {number(float(rates.max()))}.", name="lr", kind="low",
        )  # fmt: skip
        data["plots"]["lr"] = {"name": "learning rate", "values": _list(at), "y": [yr.low, yr.high]}
    said = (
        f"From {number(level[0])} to {number(level[-1])}. Faint: as logged; strong: moving mean over 1/40 of the run."
    )
    return f'<figure data-chart="loss">{plots}<figcaption>{said}</figcaption></figure>', data


def similarity(run: Run) -> tuple[str, dict[str, Any]] | None:
    """How the cosines of positive and of negative pairs are distributed, step by step."""
    positive, negative = run.histograms("positive"), run.histograms("negative")
    steps = np.asarray(sorted(positive.keys() & negative.keys()))
    if not len(steps):
        return None
    steps = steps[thin(len(steps), COLUMNS)]
    both = {
        "positive": np.stack([positive[s] for s in steps]),
        "negative": np.stack([negative[s] for s in steps]),
    }
    seen = np.nonzero(np.maximum(both["positive"], both["negative"]).max(axis=0) > 5e-4)[0]
    # Whole steps of 0.2 (five bins): the plot does not spend its height on cosines that never occur.
    first, last = int(seen[0]) // 5 * 5, -(-(int(seen[-1]) + 1) // 5) * 5
    low, high = float(EDGES[first]), float(EDGES[last])
    y = axis([low, high], "cosine of a pair", tight=True)
    x = steps_axis(steps.astype(float))
    x = Axis(float(steps[0]), float(steps[-1]), x.ticks, "step") if len(steps) > 1 else x
    x = Axis(x.low, x.high, tuple(t for t in x.ticks if x.low <= t <= x.high))

    body, side = "", ""
    top = max(float(np.quantile(h.max(axis=1), 0.9)) for h in both.values())
    for name in ("negative", "positive"):
        shares = both[name][:, first:last]
        body += (
            f'<mask id="mask-{name}" maskUnits="userSpaceOnUse" x="0" y="0" width="1000" height="1000">'
            f'<image width="1000" height="1000" preserveAspectRatio="none" href="{_density(shares, steps)}"/></mask>'
            f'<rect class="{name}" width="1000" height="1000" mask="url(#mask-{name})"/>'
        )
    for name in ("negative", "positive"):
        body += f'<path class="median {name}" d="{line(x, y, steps, _median(both[name]))}"/>'
        side += f'<path class="{name}" data-side="{name}" d="{_ridge(both[name][-1, first:last], top)}"/>'

    final = {n: float(h[-1] @ CENTRES) for n, h in both.items()}
    start = {n: float(h[0] @ CENTRES) for n, h in both.items()}
    won, won_first = (_order(both["positive"][i], both["negative"][i]) for i in (-1, 0))
    summary = (
        f"Cosine similarity over training. Positive pairs: mean {start['positive']:.2f} at first, "
        f"{final['positive']:.2f} at last. Negative pairs: {start['negative']:.2f}, {final['negative']:.2f}."
    )
    key = '<span class="key positive">positive pairs</span><span class="key negative">negative pairs</span>'
    last_step = f"{int(steps[-1]):,}"
    narrow = Axis(0.0, 1.0, (), f"step {last_step}")
    at_step = "The two distributions at the chosen step."
    beside = plot(side, narrow, Axis(low, high, y.ticks), label=at_step, kind="tall dense")
    figure = (
        f'<figure data-chart="similarity"><div class="keys">{key}<span class="key line">median</span></div>'
        + '<div class="heat">'
        + plot(body, x, y, label=summary, name="similarity", kind="tall dense")
        + f'<div class="side">{beside}</div>'
        + '<label class="slider"><span class="hidden">step whose distributions are shown</span>'
        + f'<input type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" data-slider '
        + f'aria-valuetext="step {last_step}"></label></div>'
        + "<figcaption>Positive pairs are two views of the same item, negative pairs views of two different items. "
        + f"A positive pair is more alike than a negative one in <b>{certain(won)}</b> of the cases at the last step"
        + (f", {certain(won_first)} at the first" if len(steps) > 1 else "")
        + f"; the mean cosines are {final['positive']:.2f} and {final['negative']:.2f}".replace("-", MINUS)
        + ". Point at a step, or move the slider, to read its two distributions on the right.</figcaption></figure>"
    )
    data = {
        "step": steps.tolist(),
        "x": [x.low, x.high],
        "cosine": [low, high],
        "top": top,
        **{n: [[round(float(v), 4) for v in row] for row in h[:, first:last]] for n, h in both.items()},
    }
    return figure, data


def scores(run: Run) -> tuple[str, dict[str, Any]] | None:
    """The scores that entered the loss: positives and negatives with their spread, and where a softmax sees the negatives.

    Source: Zhu et al. 2021 (arXiv 2108.02982), section 3.
    """
    names = ("score_positive", "score_negative", "score_negative_variance")
    found = {name: run.series(name) for name in (*names, "score_positive_variance", "score_negative_soft")}
    steps = found["score_positive"][0]
    if len(steps) < 2 or any(not np.array_equal(found[name][0], steps) for name in names):
        return None
    positive, negative = (found[name][1] for name in names[:2])
    spread = {"negative": np.sqrt(found["score_negative_variance"][1])}
    if np.array_equal(found["score_positive_variance"][0], steps):
        spread["positive"] = np.sqrt(found["score_positive_variance"][1])
    level = {"positive": smooth(positive), "negative": smooth(negative)}
    spread = {name: smooth(values) for name, values in spread.items()}
    kept = thin(len(steps), POINTS)
    ends = [end for name, s in spread.items() for end in (level[name] + s, level[name] - s)]
    x, y = steps_axis(steps), axis([v for values in (*level.values(), *ends) for v in values], "score")
    body, keys = "", ""
    for name in ("negative", "positive"):
        if name in spread:
            over, under = (level[name] + sign * spread[name] for sign in (1, -1))
            there, back = line(x, y, steps[kept], over[kept]), line(x, y, steps[kept][::-1], under[kept][::-1])
            body += f'<path class="band {name}" d="{there}L{back[1:]}Z"/>'
    values = {"positive": level["positive"], "negative": level["negative"]}
    if np.array_equal(found["score_negative_soft"][0], steps):
        values["negative, soft maximum"] = soft = smooth(found["score_negative_soft"][1])
        body += f'<path class="soft" d="{line(x, y, steps[kept], soft[kept])}"/>'
        keys = '<span class="key dashed">soft maximum of the negatives</span>'
    for name in ("negative", "positive"):
        body += f'<path class="score {name}" d="{line(x, y, steps[kept], level[name][kept])}"/>'
    summary = " ".join(
        f"{name.capitalize()} score from {number(v[0])} to {number(v[-1])}." for name, v in values.items()
    )
    key = '<span class="key positive">positive</span><span class="key negative">negatives</span>'
    what = (
        "The products of query and key as the loss takes them, before the temperature: with the method's queue or batch as "
        "negatives, and with whatever changes its features on the way; means over the anchors of a step. Bands: one standard "
        "deviation of the positives of a step, and of the negatives of an anchor."
    )
    more = " The soft maximum, τ log mean exp(s/τ), is where the softmax sees the negatives." if keys else ""
    figure = (
        f'<figure data-chart="scores"><div class="keys">{key}{keys}</div>'
        + plot(body, x, y, label=summary, name="scores", kind="tall")
        + f"<figcaption>{what}{more} At the last step the positive lies <b>"
        + number(float(level["positive"][-1] - level["negative"][-1]), 0.01)
        + '</b> above the mean negative (<a href="https://arxiv.org/abs/2108.02982">Zhu et al. 2021</a>).</figcaption></figure>'
    )
    (name, first), *others = values.items()
    data = {
        "step": steps[kept].astype(int).tolist(),
        "x": [x.low, x.high],
        "plots": {
            "scores": {
                "name": name,
                "values": _list(first[kept]),
                "y": [y.low, y.high],
                "also": [{"name": other, "values": _list(v[kept])} for other, v in others],
            }
        },
    }
    return figure, data


def _density(shares: np.ndarray, steps: np.ndarray) -> str:
    """Shares [T, bins] at uneven steps as a grey PNG with an even time axis, the highest cosine on top."""
    from PIL import Image

    columns = np.linspace(steps[0], steps[-1], min(2 * len(steps), 2 * COLUMNS)) if len(steps) > 1 else steps
    nearest = np.abs(columns[:, None] - steps[None]).argmin(axis=1)
    # The root keeps thin tails visible beside a sharp peak; the cap keeps one collapsed step from hiding all others.
    level = np.sqrt(np.clip(shares / np.quantile(shares.max(axis=1), 0.8), 0, 1))
    grey = np.round(level[nearest].T[::-1] * 235).astype(np.uint8)
    return _png(Image.fromarray(grey))


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _median(shares: np.ndarray) -> np.ndarray:
    """Median cosine of each histogram in shares [T, 50], linear inside its bin."""
    total = np.concatenate([np.zeros((len(shares), 1)), np.cumsum(shares, axis=1)], axis=1)
    return np.asarray([np.interp(0.5, row + np.arange(BINS + 1) * 1e-12, EDGES) for row in total])


def _order(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive pair is more alike than a negative one, ties counting half (the ROC's area)."""
    below = np.concatenate([[0.0], np.cumsum(negative)[:-1]])
    return float(positive @ (below + negative / 2))


def _ridge(shares: Sequence[float] | np.ndarray, top: float) -> str:
    """A histogram lying on its side: cosine upwards, share to the right."""
    size = SIDE / len(shares)
    points = ["M0,1000"]
    for k, share in enumerate(shares):
        reach = min(float(share) / top, 1.0) * SIDE * 0.96
        points += [f"H{reach:.1f}", f"V{SIDE - (k + 1) * size:.1f}"]
    return "".join(points) + "H0Z"


def plane(run: Run) -> str | None:
    """The path of training in the plane of alignment and uniformity, both better when lower.

    Source: Wang and Isola 2020 (arXiv 2005.10242), section 5.
    """
    steps, across = run.series("uniformity")
    other, up = run.series("alignment")
    shared, first, second = np.intersect1d(steps, other, return_indices=True)
    if len(shared) < 2:
        return None
    across, up = across[first], up[second]
    sx, sy = smooth(across, 1 / 12), smooth(up, 1 / 12)
    kept = thin(len(shared), 80)
    x, y = axis([*across], "uniformity", count=4), axis([*up], "alignment", count=4)
    dots = "".join(
        f'<path class="point" d="M{x.share(p) * SIDE:.1f},{(1 - y.share(q)) * SIDE:.1f}h0"/>'
        for p, q in zip(across[thin(len(shared), 150)], up[thin(len(shared), 150)], strict=True)
    )
    path = "".join(
        f'<path class="ink" style="opacity:{0.25 + 0.75 * k / len(kept):.2f}" '
        f'd="{line(x, y, sx[[a, b]], sy[[a, b]])}"/>'
        for k, (a, b) in enumerate(pairwise(kept))
    )
    ends = "".join(
        f'<path class="end {n}" d="M{x.share(sx[i]) * SIDE:.1f},{(1 - y.share(sy[i])) * SIDE:.1f}h0"/>'
        for n, i in (("start", 0), ("stop", -1))
    )
    marks = "".join(
        f'<span class="mark{" left" if x.share(sx[i]) > 0.8 else ""}" '
        f'style="left:{x.share(sx[i]) * 100:.1f}%;bottom:{y.share(sy[i]) * 100:.1f}%">{word}</span>'
        for word, i in (("start", 0), ("end", -1))
    )
    summary = (
        f"Alignment from {number(up[0])} to {number(up[-1])}, uniformity from {number(across[0])} to "
        f"{number(across[-1])}; lower is better for both."
    )
    drawn = plot(dots + path + ends, x, y, label=summary, kind="tall square").replace(
        '<div class="labels"', f'{marks}<span class="better" aria-hidden="true">better ↙</span><div class="labels"', 1
    )
    return (
        f"<figure><h3>Alignment and uniformity</h3>{drawn}<figcaption>Alignment: mean squared distance of positive "
        "pairs. Uniformity: log of the mean Gaussian potential of all pairs. Lower is better for both; the path "
        'grows stronger with time (<a href="https://arxiv.org/abs/2005.10242">Wang and Isola 2020</a>).'
        "</figcaption></figure>"
    )


def rank(run: Run) -> tuple[str, dict[str, Any]] | None:
    """How many directions the projections of a batch use."""
    steps, values = run.series("effective_rank")
    if len(steps) < 2:
        return None
    x, y = steps_axis(steps), axis([*values], "directions", zero=True)
    level = smooth(values)
    kept = thin(len(steps), POINTS)
    summary = f"Effective rank from {number(values[0])} to {number(values[-1])}."
    drawn = plot(
        f'<path class="raw" d="{line(x, y, steps[kept], values[kept])}"/>'
        f'<path class="ink" d="{line(x, y, steps[kept], level[kept])}"/>',
        x, y, label=summary, name="rank", kind="tall square",
    )  # fmt: skip
    data = {
        "step": steps[kept].astype(int).tolist(),
        "x": [x.low, x.high],
        "plots": {"rank": {"name": "effective rank", "values": _list(level[kept]), "y": [y.low, y.high]}},
    }
    return (
        f'<figure data-chart="rank"><h3>Effective rank</h3>{drawn}<figcaption>How many directions the projections '
        "of one batch really use: e to the entropy of their normalised singular values. A fall towards 1 is collapse "
        '(<a href="https://arxiv.org/abs/2210.02885">Garrido et al. 2023</a>).</figcaption></figure>',
        data,
    )


def _list(values: np.ndarray) -> list[float]:
    return [float(f"{v:.5g}") for v in values]
