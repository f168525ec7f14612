"""Plots drawn by hand as SVG: axes, curves, steps and signs, no library, the same bytes each time.

The classes (`un-line`, `un-s0`, ...) take their colours from the page or, in a file of its own,
from `STANDALONE`. Nothing is told by colour alone: curves differ in their dashes, points in their
signs, and each plot has a name and a description in words.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation.report.axes import Axes, Point, Span, span

DASHES = ("", "6 3", "2 3", "9 3 2 3")
COLOURS = 4  # classes un-s0 .. un-s3; dashes and signs tell more series apart
WIDE = 7.2  # a letter's width at 12 pixels, in a wide font
LINE = 17  # of the legend
STANDALONE = """
.un-plot { color-scheme:light dark; font-family:system-ui,sans-serif; background:#ffffff;
  --un-ink:#1c2430; --un-quiet:#55606e; --un-line:#d5dbe2; --un-paper:#ffffff;
  --un-accent:#1f5f8b; --un-two:#a84c14; --un-three:#4f6a1e; --un-four:#80479c; }
@media (prefers-color-scheme: dark) { .un-plot { background:#171c22; --un-ink:#e8ecf1;
  --un-quiet:#aeb8c4; --un-line:#3a4450; --un-paper:#171c22; --un-accent:#8fc7ee;
  --un-two:#f0a36f; --un-three:#b3d37c; --un-four:#d3a6ea; } }
"""
PLOT_CSS = """
.un-plot text { fill:var(--un-quiet); font-size:12px; } .un-plot .un-name { fill:var(--un-ink);
  paint-order:stroke; stroke:var(--un-paper); stroke-width:3px; }
.un-grid { stroke:var(--un-line); } .un-line { fill:none; stroke-width:2; }
.un-front { fill:none; stroke:var(--un-quiet); stroke-width:1.5; stroke-dasharray:5 4; }
.un-rule { stroke:var(--un-quiet); stroke-width:1; stroke-dasharray:2 3; }
.un-gap { stroke:var(--un-ink); stroke-width:2; }
.un-plot .un-gap-text { fill:var(--un-ink); font-weight:650; paint-order:stroke;
  stroke:var(--un-paper); stroke-width:4px; }
.un-s0 { stroke:var(--un-accent); } .un-s1 { stroke:var(--un-two); }
.un-s2 { stroke:var(--un-three); } .un-s3 { stroke:var(--un-four); }
.un-f0 { fill:var(--un-accent); } .un-f1 { fill:var(--un-two); }
.un-f2 { fill:var(--un-three); } .un-f3 { fill:var(--un-four); }
"""


@dataclass(frozen=True)
class Series:
    """What a plot shows of one thing.

    Attributes:
        points: in the order in which they are joined.
        slot: its colour, dashes and sign.
        style: a line through measured points, steps (a distribution), named points, or the front.
        labels: of named points, one each.
    """

    name: str
    points: tuple[Point, ...]
    slot: int = 0
    style: Literal["line", "steps", "marks", "front"] = "line"
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """A thin line at a value of x, or of y (`level`), with a word."""

    at: float
    text: str
    level: bool = False


@dataclass(frozen=True)
class Gap:
    """A marked distance: upright at `x` from `low` to `high`."""

    x: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A plot as data; `svg` draws it, and so may another library.

    Attributes:
        key: its file's name without ending.
        title, text: its name, and in words what it shows, for those who do not see it.
        x, y: what the axes stand for.
        xs, ys: their ends; by default what the series need.
        x_ticks: places and words on the x axis, where round numbers do not fit.
    """

    key: str
    title: str
    text: str
    x: str
    y: str
    series: tuple[Series, ...]
    xs: Span | None = None
    ys: Span | None = None
    rules: tuple[Rule, ...] = ()
    gap: Gap | None = None
    x_ticks: tuple[tuple[float, str], ...] = ()

    def ends(self) -> tuple[Span, Span]:
        """Both axes' ends."""
        flat = [point for series in self.series for point in series.points]
        return (
            self.xs or span([p[0] for p in flat], 0.1),
            self.ys or span([p[1] for p in flat], 0.1),
        )


def svg(chart: Chart) -> str:
    """The chart as an SVG element that follows the page's colours."""
    legend, lines = _legend(chart)
    axes = axes_of(chart, lines)
    body = [legend]
    for rule in chart.rules:
        body.append(_rule(axes, rule))
    for series in chart.series:
        body.append(_series(axes, series))
    body += [
        f'<text class="un-name" x="{x:.1f}" y="{y:.1f}">{html.escape(label)}</text>'
        for label, (x, y) in label_places(axes, chart)
    ]
    if chart.gap is not None:
        body.append(_gap(axes, chart.gap))
    head = f"<title>{html.escape(chart.title)}</title><desc>{html.escape(chart.text)}</desc>"
    return axes.frame(
        "".join(body),
        f"{chart.title}. {chart.text}",
        chart.x,
        chart.y,
        head=head,
        x_ticks=chart.x_ticks,
    )


def axes_of(chart: Chart, legend_lines: int = 1) -> Axes:
    """The plane of a chart, below so many lines of legend."""
    above = legend_lines * LINE
    return Axes(*chart.ends(), width=440, height=306 + above, top=20 + above, left=58)


def standalone(element: str) -> str:
    """The SVG element as a file of its own, with its colours for light and dark."""
    opened = element.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    start = opened.index(">") + 1
    return f"{opened[:start]}<style>{STANDALONE}{PLOT_CSS}</style>{opened[start:]}\n"


def _path(axes: Axes, points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in (axes.at(*point) for point in points))


def stairs(points: Sequence[Point]) -> list[Point]:
    """The corners of steps that rise at each point."""
    corners: list[Point] = []
    for x, y in points:
        if corners:
            corners.append((x, corners[-1][1]))
        corners.append((x, y))
    return corners


def _series(axes: Axes, series: Series) -> str:
    if series.style == "marks":
        return "".join(sign(series.slot, *axes.at(*point)) for point in series.points)
    if series.style == "front":
        return f'<polyline class="un-front" points="{_path(axes, series.points)}"/>'
    points = stairs(series.points) if series.style == "steps" else series.points
    line = (
        f'<polyline class="un-line un-s{series.slot % COLOURS}" points="{_path(axes, points)}" '
        f'stroke-dasharray="{DASHES[series.slot % len(DASHES)]}"/>'
    )
    if series.style == "steps":
        return line
    return line + "".join(sign(series.slot, *axes.at(*point), 3.2) for point in series.points)


def sign(slot: int, x: float, y: float, r: float = 6.0) -> str:
    """A filled sign around a pixel: circle, triangle, square, diamond, plus, star."""
    name = f"un-f{slot % COLOURS}"
    kind = slot % 6
    if kind == 0:
        return f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{r:g}"/>'
    thin = r * 0.36
    shapes = {
        1: [(0, -r), (r, r * 0.8), (-r, r * 0.8)],
        2: [(-r, -r), (r, -r), (r, r), (-r, r)],
        3: [(0, -1.3 * r), (1.1 * r, 0), (0, 1.3 * r), (-1.1 * r, 0)],
        4: [
            (-thin, -r), (thin, -r), (thin, -thin), (r, -thin), (r, thin), (thin, thin),
            (thin, r), (-thin, r), (-thin, thin), (-r, thin), (-r, -thin), (-thin, -thin),
        ],
        5: [
            (1.3 * r * (1 - 0.58 * (k % 2)) * math.sin(k * math.pi / 5),
             -1.3 * r * (1 - 0.58 * (k % 2)) * math.cos(k * math.pi / 5))
            for k in range(10)
        ],
    }  # fmt: skip
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[kind])
    return f'<polygon class="{name}" points="{points}"/>'


def label_places(axes: Axes, chart: Chart) -> list[tuple[str, Point]]:
    """Names with the pixels where they begin: right, left, above or below, where it is free."""
    places = [
        (axes.at(*point), label)
        for series in chart.series
        if series.style == "marks"
        for point, label in zip(series.points, series.labels, strict=True)
    ]
    taken = [(px - 7, py - 7, px + 7, py + 7) for (px, py), _ in places]
    found = []
    for (px, py), label in places:
        width = WIDE * len(label)
        spots = [
            (px + 11, py + 4), (px - 11 - width, py + 4), (px - width / 2, py - 12),
            (px - width / 2, py + 20), (px + 11, py + 18), (px + 11, py - 10),
            (px - 11 - width, py + 18), (px - 11 - width, py - 10),
            *((px - width * part, py + down) for down in (34, -26, 48) for part in (0.5, 1, 0)),
        ]  # fmt: skip
        free = [
            (x, y)
            for x, y in spots
            if axes.left <= x and x + width <= axes.width
            if axes.top - 10 < y < axes.height - axes.bottom
            if not any(
                x < right and x + width > left and y - 10 < bottom and y + 3 > top
                for left, top, right, bottom in taken
            )
        ]
        x, y = (free or spots)[0]
        x = min(max(x, axes.left), axes.width - width)
        taken.append((x, y - 10, x + width, y + 3))
        found.append((label, (x, y)))
    return found


def _legend(chart: Chart) -> tuple[str, int]:
    """The names of the series above the plot, and how many lines they take."""
    x, line, parts = 8.0, 0, []
    for series in chart.series:
        width = 34 + WIDE * len(series.name) + 12
        if x + width > 440 and x > 8:
            x, line = 8.0, line + 1
        y = 14 + line * LINE
        parts.append(_sample(series, x, y))
        parts.append(
            f'<text class="un-name" x="{x + 34:.1f}" y="{y + 4}">{html.escape(series.name)}</text>'
        )
        x += width
    return "".join(parts), line + 1 if parts else 0


def _sample(series: Series, x: float, y: float) -> str:
    if series.style == "marks":
        return sign(series.slot, x + 14, y, 5.0)
    line = f'x1="{x:.1f}" x2="{x + 28:.1f}" y1="{y}" y2="{y}"'
    if series.style == "front":
        return f'<line class="un-front" {line}/>'
    dash = f'stroke-dasharray="{DASHES[series.slot % len(DASHES)]}"'
    drawn = f'<line class="un-line un-s{series.slot % COLOURS}" {line} {dash}/>'
    return drawn + (sign(series.slot, x + 14, y, 3.2) if series.style == "line" else "")


def _rule(axes: Axes, rule: Rule) -> str:
    if rule.level:
        (x1, y1), (x2, y2) = axes.at(axes.xs[0], rule.at), axes.at(axes.xs[1], rule.at)
        place = f'x="{x2 - 4:.1f}" y="{y1 - 5:.1f}" text-anchor="end"'
    else:
        (x1, y1), (x2, y2) = axes.at(rule.at, axes.ys[0]), axes.at(rule.at, axes.ys[1])
        end = x1 > axes.width * 0.7
        place = f'x="{x1 + (-5 if end else 5):.1f}" y="{y2 - 4:.1f}" ' + (
            'text-anchor="end"' if end else 'text-anchor="start"'
        )
    line = f'<line class="un-rule" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'
    return f"{line}<text {place}>{html.escape(rule.text)}</text>"


def _gap(axes: Axes, gap: Gap) -> str:
    (x, low), (_, high) = axes.at(gap.x, gap.low), axes.at(gap.x, gap.high)
    end = x > axes.width * 0.62
    return (
        f'<path class="un-gap" d="M{x - 5:.1f} {low:.1f}h10M{x - 5:.1f} {high:.1f}h10'
        f'M{x:.1f} {low:.1f}V{high:.1f}"/><text class="un-gap-text" '
        f'x="{x + (-9 if end else 9):.1f}" y="{(low + high) / 2 + 4:.1f}" '
        f'text-anchor="{"end" if end else "start"}">{html.escape(gap.text)}</text>'
    )
