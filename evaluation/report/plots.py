"""Every plot of the product: charts as data, drawn by matplotlib as SVG or PNG.

An SVG takes its colours from the CSS variables of the page that holds it, so it follows light and
dark. Nothing is shown by colour alone: lines differ in their dashes, points in their markers, and
each plot has a title and a description in words. The same chart gives the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evaluation.report.numbers import fixed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours by role: the value on a light page, then on a dark one.
COLOURS = {
    "ink": ("#1c2430", "#e8ecf1"),
    "quiet": ("#55606e", "#aeb8c4"),
    "line": ("#d5dbe2", "#3a4450"),
    "paper": ("#ffffff", "#171c22"),
    "soft": ("#f4f6f8", "#1f262e"),
    "diff": ("#fff1c9", "#4a3d12"),
    "warn": ("#8a4b08", "#f0b36f"),
    "accent": ("#1f5f8b", "#8fc7ee"),
    "two": ("#a84c14", "#f0a36f"),
    "three": ("#4f6a1e", "#b3d37c"),
    "four": ("#80479c", "#d3a6ea"),
}
INK, QUIET, GRID, PAPER = (COLOURS[role][0] for role in ("ink", "quiet", "line", "paper"))
CYCLE = tuple(COLOURS[role][0] for role in ("accent", "two", "three", "four"))
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1)))
MARKERS = ("o", "^", "s", "D", "P", "*")
SIZE = (4.7, 3.6)  # inches
TAIL = 0.005  # share of the rows at either end that may lie beyond a distribution's axis
LEGEND_WIDTH = 50  # characters of a line of the legend
# matplotlib keeps its settings in one global dictionary, and the app draws from several threads.
_DRAWING = threading.Lock()

Point = tuple[float, float]
Span = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line, distribution or set of points of a chart.

    Attributes:
        points: in the order in which they are joined.
        slot: index of its colour, dashes and marker.
        style: a line through points, steps (a distribution), single points, or a Pareto front.
        labels: texts beside the points of style `points`, one each.
    """

    name: str
    points: tuple[Point, ...]
    slot: int = 0
    style: Literal["line", "steps", "points", "front"] = "line"
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """A thin line across the chart at a value of x, or of y where `level` is set."""

    at: float
    text: str
    level: bool = False


@dataclass(frozen=True)
class Gap:
    """A vertical distance marked at `x` from `low` to `high`."""

    x: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A plot as data.

    Attributes:
        key: name of its file, without the ending.
        title, text: its name, and what it shows in words for readers who do not see it.
        x, y: labels of the axes.
        xs, ys: limits of the axes; None fits them to the series.
        log2: whether x is on a logarithmic scale of base 2.
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
    log2: bool = False


def file_key(*words: str) -> str:
    """Words as the name of a file: lower case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).casefold()).strip("-") or "plot"


def line_chart(
    key: str,
    title: str,
    curves: Mapping[str, Sequence[Point]],
    x: str,
    y: str,
    *,
    ys: Span | None = None,
    rules: Sequence[Rule] = (),
    levels: bool = False,
    slots: Mapping[str, int] | None = None,
    log2: bool = False,
) -> Chart | None:
    """Curves by name; None where no curve has two points. For the other arguments see `Chart`.

    Args:
        curves: points by name, in the order in which they are joined.
        levels: whether a curve of one point is drawn as a level, in place of being left out.
        slots: colour, dashes and marker by name, where they are not in the order of the curves.
    """
    series, constant = [], []
    for number, (name, points) in enumerate(curves.items()):
        if len(points) > 1:
            series.append(Series(name, tuple(points), (slots or {}).get(name, number)))
        elif points and levels:
            constant.append(Rule(points[0][1], name, level=True))
    if not series:
        return None
    ends = ((line.name, fixed(line.points[0][1]), fixed(line.points[-1][1])) for line in series)
    text = "; ".join(f"{name} from {first} to {last}" for name, first, last in ends) + "."
    rules = (*rules, *constant)
    return Chart(key, title, text, x, y, tuple(series), ys=ys, rules=rules, log2=log2)


def trade_off_chart(
    key: str,
    title: str,
    points: Sequence[tuple[str, float, float, str]],
    fronts: Mapping[str, str],
) -> Chart | None:
    """log10 forget quality against model utility. None without points.

    Args:
        key, title: see `Chart`.
        points: name, model utility, log10 forget quality, and the kind that its marker shows.
        fronts: kinds whose Pareto front is drawn, with the front's name in the legend.
    """
    if not points:
        return None
    series, sentences = [], []
    for slot, kind in enumerate(dict.fromkeys(point[3] for point in points)):
        members = [point for point in points if point[3] == kind]
        places = tuple((x, y) for _, x, y, _ in members)
        series.append(Series(kind, places, slot, "points", tuple(name for name, *_ in members)))
        texts = (f"{n}: utility {fixed(x)}, log10 quality {fixed(y, 2)}" for n, x, y, _ in members)
        sentences.append(f"{kind}: " + "; ".join(texts))
        front = pareto_front(places)
        if kind in fronts:
            sentences.append(f"{fronts[kind]}: " + ", ".join(members[i][0] for i in front))
            if len(front) > 1:
                line = tuple(places[i] for i in front)
                series.append(Series(fronts[kind], line, slot, "front"))
    return Chart(
        key, title, ". ".join(sentences) + ".", "model utility (higher is better)",
        "log10 forget quality (higher is better)", tuple(series),
    )  # fmt: skip


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates, from left to right.

    More is better on both axes. A point is dominated where another is at least as good on both
    axes and better on one; equal points all stay.
    """
    front = [
        i
        for i, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
    ]
    return sorted(front, key=lambda i: points[i])


def distribution_chart(
    key: str,
    title: str,
    samples: Mapping[str, Sequence[float]],
    x: str,
    *,
    text: str = "",
    gap: Gap | None = None,
) -> Chart | None:
    """Distribution functions F(x): the share of values of at most x. None without values.

    Args:
        key, title, x: see `Chart`.
        samples: values by name; infinite and undefined ones are left out.
        text: description; by default the means.
        gap: a marked distance between two of the functions.
    """
    finite = {name: sorted(filter(math.isfinite, values)) for name, values in samples.items()}
    finite = {name: values for name, values in finite.items() if values}
    if not finite:
        return None
    ends = [gap.x] if gap else []
    for values in finite.values():
        last = len(values) - 1
        ends += [values[int(TAIL * last)], values[math.ceil((1 - TAIL) * last)]]
    margin = (max(ends) - min(ends)) * 0.04 or max(abs(max(ends)) * 0.1, 0.1)
    low, high = min(ends) - margin, max(ends) + margin
    series = []
    for slot, (name, values) in enumerate(finite.items()):
        steps = [(min(max(v, low), high), (i + 1) / len(values)) for i, v in enumerate(values)]
        series.append(Series(name, ((low, 0.0), *steps, (high, 1.0)), slot, "steps"))
    means = (f"{name}: mean {fixed(sum(v) / len(v), 3, True)}" for name, v in finite.items())
    text = text or "; ".join(means) + "."
    beyond = sum(not low <= value <= high for values in finite.values() for value in values)
    text += f" Values beyond the axis, drawn at its ends: {beyond}." if beyond else ""
    return Chart(
        key, title, text, x, "share of rows at or below", tuple(series), (low, high), (0.0, 1.0),
        gap=gap,
    )  # fmt: skip


def colour_css(selector: str = ":root", *, dark: bool = False) -> str:
    """The colours as CSS variables `--un-ROLE` of `selector`."""
    values = "; ".join(f"--un-{role}:{pair[dark]}" for role, pair in COLOURS.items())
    return f"{selector} {{ {values}; }}"


@lru_cache(maxsize=64)
def draw_svg(chart: Chart) -> str:
    """The chart as an SVG element for an HTML page that has the variables of `colour_css`.

    Its background is transparent. `aria-label` and `<title>` hold its title, `<desc>` its text.
    """
    out = io.StringIO()
    with _settings(chart):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        _figure(chart).savefig(out, format="svg", transparent=True, metadata=nothing)
    drawn = out.getvalue()
    # Between tags matplotlib escapes < and >, so this pattern matches tags only.
    drawn = re.sub(r"<[a-z][^<>]*>", _page_tag, drawn[drawn.index("<svg") :])
    # This rule would hold for the whole page.
    drawn = re.sub(r"<style.*?</style>", "", drawn, count=1, flags=re.DOTALL)
    title, text = (html.escape(_one_line(part)) for part in (chart.title, chart.text))
    label = f'class="un-plot" role="img" aria-label="{title}" stroke-linejoin="round" '
    drawn = drawn.replace("<svg ", f"<svg {label}", 1)
    start = drawn.index(">", drawn.index("<svg")) + 1
    return f"{drawn[:start]}<title>{title}</title><desc>{text}</desc>{drawn[start:].strip()}"


def _page_tag(match: re.Match[str]) -> str:
    """A tag with the page's colours and font, without ids that another plot has too."""
    tag = re.sub(r'^<g id="[^"]*"', "<g", match[0])
    tag = re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", tag)
    for role, (light, _) in COLOURS.items():
        tag = tag.replace(light, f"var(--un-{role}, {light})")
    return tag


def svg_file(chart: Chart) -> str:
    """The chart as an SVG file, light or dark by the reader's system."""
    light, dark = (colour_css(".un-plot", dark=is_dark) for is_dark in (False, True))
    style = (
        f"<style>{light} .un-plot {{ background:var(--un-paper); color-scheme:light dark; }} "
        f"@media (prefers-color-scheme: dark) {{ {dark} }}</style>"
    )
    element = draw_svg(chart)
    start = element.index(">") + 1
    return f"{element[:start]}{style}{element[start:]}\n"


def write_png(chart: Chart, path: Path) -> Path:
    """Write the chart as PNG, without metadata: the same bytes for the same matplotlib."""
    with _settings(chart):
        _figure(chart).savefig(path, dpi=144, metadata={"Software": None})
    return path


@contextmanager
def _settings(chart: Chart) -> Iterator[None]:
    from matplotlib import rc_context

    settings = {
        "svg.hashsalt": chart.key, "svg.fonttype": "none", "text.parse_math": False,
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 10,
        "text.color": INK, "axes.labelcolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET,
        "axes.edgecolor": GRID, "grid.color": GRID, "axes.spines.top": False,
        "axes.spines.right": False, "axes.unicode_minus": False,
    }  # fmt: skip
    with _DRAWING, rc_context(settings), warnings.catch_warnings():
        # Letters that the font of the layout lacks are drawn by the browser's own.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _figure(chart: Chart) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for series in chart.series:
        _draw(axes, series)
    for rule in chart.rules:
        _draw_rule(axes, rule)
    if chart.log2:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if chart.series[0].style == "points":
        axes.margins(0.15)
    if chart.xs is not None:
        axes.set_xlim(chart.xs)
    if chart.ys is not None:
        axes.set_ylim(chart.ys)
    axes.set(xlabel=chart.x, ylabel=textwrap.fill(chart.y, 30))
    axes.grid(axis="y", linewidth=0.8)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    if chart.gap is not None:
        gap = chart.gap
        axes.plot([gap.x, gap.x], [gap.low, gap.high], color=INK, marker="_", lw=1.8, ms=8)
        middle = (gap.x, (gap.low + gap.high) / 2)
        axes.annotate(gap.text, middle, (6, 0), textcoords="offset points", va="center",
                      weight="bold", bbox={"color": PAPER, "pad": 1})  # fmt: skip
    lines = {series.name: line for series, line in zip(chart.series, axes.lines, strict=False)}
    names = [textwrap.fill(_one_line(name), LEGEND_WIDTH) for name in lines]
    widest = sorted(map(len, names))[-2:]
    figure.legend(
        list(lines.values()), names, loc="outside upper left", frameon=False, handlelength=3,
        ncols=2 if sum(widest) <= LEGEND_WIDTH else 1, fontsize="small", borderaxespad=0.2,
    )  # fmt: skip
    _place_labels(figure, axes, chart)
    return figure


def _draw(axes: Axes, series: Series) -> None:
    colour = CYCLE[series.slot % len(CYCLE)]
    marker = MARKERS[series.slot % len(MARKERS)]
    dashes = DASHES[series.slot % len(DASHES)]
    xs, ys = zip(*series.points, strict=True)
    if series.style == "front":
        axes.plot(xs, ys, drawstyle="steps-pre", color=colour, ls=(0, (4, 3)), lw=1)
    elif series.style == "points":
        axes.plot(xs, ys, ls="", color=colour, marker=marker, ms=7, zorder=4 - series.slot / 10)
    elif series.style == "steps":
        axes.plot(xs, ys, drawstyle="steps-post", color=colour, ls=dashes, lw=1.6)
    else:
        every = max(1, len(xs) // 40)
        axes.plot(xs, ys, color=colour, ls=dashes, lw=1.6, marker=marker, ms=4, markevery=every)


def _draw_rule(axes: Axes, rule: Rule) -> None:
    text: dict[str, Any] = {"color": QUIET, "fontsize": "small", "textcoords": "offset points"}
    if rule.level:
        axes.axhline(rule.at, color=QUIET, ls=":", lw=1)
        place, system = (0.99, rule.at), ("axes fraction", "data")
        text |= {"xytext": (-2, 2), "ha": "right", "va": "bottom"}
    else:
        axes.axvline(rule.at, color=QUIET, ls=":", lw=1)
        place, system = (rule.at, 0.99), ("data", "axes fraction")
        text |= {"xytext": (3, 2), "ha": "left", "va": "top"}
    axes.annotate(_one_line(rule.text), place, xycoords=system, **text)


def _place_labels(figure: Figure, axes: Axes, chart: Chart) -> None:
    """Writes the names of points beside them, each where it covers no other name or point."""
    from matplotlib.transforms import Bbox

    if not any(series.labels for series in chart.series):
        return
    figure.draw_without_rendering()
    inside = axes.get_window_extent()
    points = [pair for each in chart.series for pair in zip(each.points, each.labels, strict=False)]
    pixels = [axes.transData.transform(point) for point, _ in points]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    spots = [(7, 0, "left", "center"), (-7, 0, "right", "center")]
    spots += [
        (across, up, side, "bottom" if up > 0 else "top")
        for up in (6, -6, 16, -16, 28, -28, 40, -40)
        for across, side in ((0, "center"), (7, "left"), (-7, "right"))
    ]
    for point, label in points:
        text = axes.annotate(
            _one_line(label), point, (0, 0), textcoords="offset points", fontsize="small"
        )
        text.set_in_layout(False)
        for x, y, across, up in spots:
            text.set(position=(x, y), horizontalalignment=across, verticalalignment=up)
            box = text.get_window_extent()
            fits = all(inside.fully_contains(*corner) for corner in (box.min, box.max))
            if fits and not box.count_overlaps(taken):
                break
        taken.append(box)


def _one_line(text: str) -> str:
    """`text` on one line, without control characters, which XML does not allow."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()) or " "
