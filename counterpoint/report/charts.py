"""The frame every plot of the page stands in.

The plot area is an SVG stretched to whatever width the reader has (strokes do not scale), and the labels are HTML
placed by percentage. So the same markup is sharp and legible on a phone, a wide screen and paper, without a script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

SIDE = 1000.0  # the plot area in SVG units, both ways
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Axis:
    """A range and the values that are labelled on it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    title: str = ""

    def share(self, value: float) -> float:
        """Where `value` lies between low (0) and high (1)."""
        return (value - self.low) / (self.high - self.low)

    def labels(self) -> list[tuple[float, str]]:
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 0.0
        return [(self.share(t), number(t, step)) for t in self.ticks]


def axis(values: Iterable[float], title: str = "", *, count: int = 5, tight: bool = False, zero: bool = False) -> Axis:
    """An axis around the values: ends on round numbers, or on the values themselves when `tight`."""
    low, high = float(np.min(list(values))), float(np.max(list(values)))
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12) or high == low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    step = round_step((high - low) / count)
    if not tight:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return Axis(low, high, tuple(k * step for k in range(first, last + 1)), title)


def round_step(rough: float) -> float:
    """The 1, 2, 2.5 or 5 times a power of ten that is nearest above `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))


def number(value: float, step: float = 0.0) -> str:
    """A number for people: as many decimals as the step needs, thousands separated, a true minus sign."""
    if value == 0 or abs(value) < abs(step) * 1e-6:
        return "0"
    if abs(value) < 1e-3 or (step and abs(step) < 1e-4):
        mantissa, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else (f"{value:.1e}".split("e"))
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    decimals = 0
    while step and decimals < 6 and abs(round(step, decimals) - step) > abs(step) * 1e-6:
        decimals += 1
    if not step:
        decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if abs(value) < 1000 else 0
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def line(x: Axis, y: Axis, xs: Sequence[float] | np.ndarray, ys: Sequence[float] | np.ndarray) -> str:
    """SVG path data through the points, kept inside the plot."""
    points = [
        f"{x.share(float(a)) * SIDE:.1f},{(1 - min(max(y.share(float(b)), -0.02), 1.02)) * SIDE:.1f}"
        for a, b in zip(xs, ys, strict=True)
    ]
    return "M" + "L".join(points if len(points) > 1 else points * 2)


def plot(body: str, x: Axis, y: Axis, *, label: str, name: str = "", kind: str = "", keys: bool = True) -> str:
    """A plot area with grid lines, labels and titles around `body` (SVG in 0..1000 both ways).

    Args:
        label: what a reader who cannot see the plot is told.
        name: the plot's entry in the page's data, for the reading under the pointer; empty for none.
        kind: further CSS classes.
        keys: whether the labels of the x axis are written.
    """
    grid = "".join(
        f'<line class="grid" x1="0" x2="1000" y1="{(1 - s) * SIDE:.1f}" y2="{(1 - s) * SIDE:.1f}"/>'
        for s, _ in y.labels()
    )
    y_labels = "".join(f'<span class="tick y" style="bottom:{s * 100:.2f}%">{t}</span>' for s, t in y.labels())
    x_labels = (
        "".join(f'<span class="tick x" style="left:{s * 100:.2f}%">{t}</span>' for s, t in x.labels()) if keys else ""
    )
    title_x = f'<span class="title x">{escape(x.title)}</span>' if keys and x.title else ""
    title_y = f'<span class="title y">{escape(y.title)}</span>' if y.title else ""
    reading = f' data-plot="{escape(name)}" tabindex="0"' if name else ""
    return (
        f'<div class="plot {kind}{"" if keys else " bare"}">{title_y}'
        f'<div class="area" role="img" aria-label="{escape(label)}"{reading}>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{grid}{body}</svg>'
        f'<div class="labels" aria-hidden="true">{y_labels}{x_labels}</div></div>{title_x}</div>'
    )


def smooth(values: np.ndarray, share: float = 1 / 40) -> np.ndarray:
    """Centred moving mean over `share` of the series; it shrinks towards the ends, which stay where they are."""
    half = max(0, int(len(values) * share / 2))
    total = np.concatenate([[0.0], np.cumsum(values)])
    reach = np.minimum(half, np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]))
    index = np.arange(len(values))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def thin(count: int, most: int) -> np.ndarray:
    """At most `most` indices spread evenly over `count`, first and last kept."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
