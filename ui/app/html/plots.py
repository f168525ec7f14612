"""Small plots as SVG that follow the page's colours, each with a name and words for its content."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from evaluation.report.axes import Axes, Point, round_values, span
from evaluation.report.svg import DASHES

__all__ = ["histogram", "lines", "pareto", "round_values"]

LETTER = 6.3  # about a letter's width at 12 pixels
MARKS = ("●", "▲", "■", "◆", "✚", "★")
Points = Sequence[Point]


def lines(
    series: Mapping[str, Points],
    label: str,
    x: str,
    y: str,
    floor: float | None = None,
    top: float | None = None,
) -> str:
    """Curves, told apart by dashes and their legend; empty without two points.

    The y-axis ends at `floor` and `top` where these are given, else a margin beyond the values.
    """
    shown = {name: points for name, points in series.items() if len(points) > 1}
    if not shown:
        return ""
    flat = [point for points in shown.values() for point in points]
    xs, ys = (min(p[0] for p in flat), max(p[0] for p in flat)), span([p[1] for p in flat])
    xs = xs if xs[1] > xs[0] else (xs[0] - 1, xs[1] + 1)
    ys = (ys[0] if floor is None else floor, ys[1] if top is None else top)
    axes = Axes(xs, ys)
    body, legend = [], []
    for number, (name, points) in enumerate(shown.items()):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (axes.at(*point) for point in points))
        style = f'stroke-dasharray="{DASHES[number % len(DASHES)]}"'
        body.append(f'<polyline class="un-line un-s{number % 4}" points="{path}" {style}/>')
        legend.append(
            f'<span class="un-key"><svg width="28" height="8" aria-hidden="true">'
            f'<line class="un-line un-s{number % 4}" x1="0" x2="28" y1="4" y2="4" {style}/></svg> '
            f"{html.escape(name)} {points[-1][1]:.3f}</span>"
        )
    return _figure(axes.frame("".join(body), label, x, y), legend)


def _figure(svg: str, legend: Sequence[str]) -> str:
    key = f"<figcaption>{' '.join(legend)}</figcaption>"
    return f'<figure class="un-figure" tabindex="0">{svg}{key}</figure>'


def pareto(points: Sequence[tuple[str, float, float, str]], label: str, x: str, y: str) -> str:
    """Named points (name, x, y, kind); kinds have signs of their own, names stand beside them."""
    if not points:
        return ""
    axes = Axes(span([p[1] for p in points], 0.12), span([p[2] for p in points], 0.12))
    kinds = list(dict.fromkeys(p[3] for p in points))
    body: list[str] = []
    places = [axes.at(a, b) for _, a, b, _ in points]
    taken = [(py + 4, px - 8, px + 8) for px, py in places]
    for name, a, b, kind in points:
        px, py = axes.at(a, b)
        mark = MARKS[kinds.index(kind) % len(MARKS)]
        # Published names stand above their signs, ours beside them, moved down where one is in
        # the way: runs often lie close together.
        above = kind.startswith("published")
        end = px > axes.width * 0.6
        width = LETTER * len(name)
        left = px - width / 2 if above else px - 12 - width if end else px + 12
        row = py + (-12 if above else 4)
        while any(abs(row - y) < 13 and left < r and left + width > k for y, k, r in taken):
            row += 13
        taken.append((row, left, left + width))
        body.append(
            f'<text class="un-mark un-t{kinds.index(kind) % 4}" x="{px:.1f}" y="{py + 5:.1f}" '
            f'text-anchor="middle">{mark}</text>'
            f'<text x="{left:.1f}" y="{row:.1f}">{html.escape(name)}</text>'
        )
    legend = [
        f'<span class="un-key"><span class="un-t{i % 4}" aria-hidden="true">'
        f"{MARKS[i % len(MARKS)]}</span> {html.escape(kind)}</span>"
        for i, kind in enumerate(kinds)
    ]
    return _figure(axes.frame("".join(body), label, x, y), legend)


def histogram(series: Mapping[str, Sequence[float]], label: str, x: str) -> str:
    """Distributions as outlines of the same bins, as shares of the rows."""
    flat = [value for values in series.values() for value in values if math.isfinite(value)]
    if not flat:
        return ""
    low, high = span(flat, 0.02)
    bins = 24
    width = (high - low) / bins
    outlines = {}
    for name, values in series.items():
        counts = [0] * bins
        for value in values:
            if math.isfinite(value):
                counts[min(bins - 1, int((value - low) / width))] += 1
        outlines[f"{name}, mean"] = [
            (low + (i + half) * width, count / max(1, len(values)))
            for i, count in enumerate(counts)
            for half in (0, 1)
        ]
    found = lines(outlines, label, x, "share of the rows", floor=0.0)
    for name, values in series.items():
        last = outlines[f"{name}, mean"][-1][1]
        mean = sum(values) / max(1, len(values))
        found = found.replace(
            f"{html.escape(name)}, mean {last:.3f}", f"{html.escape(name)}, mean {mean:+.3f}"
        )
    return found
