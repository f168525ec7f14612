"""The plots of a report as data, and as PNG by matplotlib where that is wanted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from evaluation.report.axes import Point, Span, span
from evaluation.report.blocks import fixed, p_text
from evaluation.report.cards import Calibration, Curve, Robustness
from evaluation.report.svg import DASHES, Chart, Gap, Rule, Series, axes_of, label_places, stairs
from evaluation.report.tree import MEASURED, REFERENCE, Published, System, View

TAIL = 0.005  # of the rows at either end may lie beyond a plot's edge
SLOTS = {"retrain": 0, "unlearned": 1, "origin": 2}
COLOURS = ("#1f5f8b", "#a84c14", "#4f6a1e", "#80479c")
MARKERS = ("o", "^", "s", "D", "P", "*")


def file_key(*words: str) -> str:
    """Words as the name of a file."""
    text = "-".join(words).casefold()
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "plot"


def quality_utility(view: View, published: Sequence[Published]) -> Chart | None:
    """log10 forget quality against model utility, with the front of what was measured."""
    placed = [
        (s, (s.figures["model_utility"], s.figures["forget_quality_log10"]))
        for s in view.systems
        if s.figures["model_utility"] is not None
        if s.figures["forget_quality_log10"] is not None
    ]
    if not placed:
        return None
    ours = [(s.name, point) for s, point in placed if s.role == MEASURED]
    theirs = [(s.name, point) for s, point in placed if s.role != MEASURED]
    others = [
        (f"{row.name} (published)", (row.model_utility, math.log10(row.forget_quality)))
        for row in published
        if row.forget_quality > 0
    ]
    everything = [point for _, point in (*ours, *theirs, *others)]
    xs, ys = span([p[0] for p in everything], 0.18), span([p[1] for p in everything], 0.12)
    front = pareto_front([point for _, point in ours])
    series = [
        Series(name, tuple(p for _, p in points), slot, "marks", tuple(n for n, _ in points))
        for name, slot, points in (
            ("measured", 0, ours), ("published", 3, others), ("retrain reference", 5, theirs)
        )
        if points
    ]  # fmt: skip
    if front:
        series.append(Series("front of the measured", _front_line(front, xs, ys), 0, "front"))
    said = [f"{n}: utility {fixed(x)}, log10 quality {fixed(y, 2)}" for n, (x, y) in ours + theirs]
    best = ", ".join(n for n, point in ours if point in front)
    text = "; ".join(said) + (f". On the front: {best}" if best else "") + "."
    return Chart(
        file_key(view.protocol, "quality-utility"),
        f"Forget quality against model utility, protocol {view.protocol}",
        text, "model utility (higher is better)", "log10 forget quality (higher is better)",
        tuple(series), xs, ys,
    )  # fmt: skip


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in one figure without losing in the other, left to right."""
    front: list[Point] = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _front_line(front: Sequence[Point], xs: Span, ys: Span) -> tuple[Point, ...]:
    line = [(xs[0], front[0][1])]
    for i, (x, y) in enumerate(front):
        line += [(x, y), (x, front[i + 1][1] if i + 1 < len(front) else ys[0])]
    return tuple(line)


def ecdf_chart(view: View, system: System) -> Chart | None:
    """Both distributions of log R with D at its place; None for the reference itself."""
    found = system.ecdf
    if found is None or system.role == REFERENCE:
        return None
    low, high = (
        pick(_quantile(found.ours, q), _quantile(found.theirs, q), found.at)
        for pick, q in ((min, TAIL), (max, 1 - TAIL))
    )
    ends = span([low, high], 0.04)
    series = [
        Series(name, _steps(values, ends), slot, "steps")
        for name, slot, values in (
            (f"retrain reference, n = {len(found.theirs)}", 0, found.theirs),
            (f"{system.name}, n = {len(found.ours)}", 1, found.ours),
        )
    ]
    figures = system.figures
    beyond = sum(not ends[0] <= value <= ends[1] for value in (*found.ours, *found.theirs))
    text = (
        f"The curves part furthest at log R = {fixed(found.at)}: {fixed(found.ours_at)} of the "
        f"rows of {system.name} lie at or below it, {fixed(found.theirs_at)} of the reference's. "
        f"D = {fixed(found.d, 4)}, p = {p_text(figures['forget_quality'])}, shift of the median "
        f"{fixed(figures['log_r_shift'], 3, True)} ({figures['direction']})."
    ) + (f" Values beyond the edges, drawn on them: {beyond}." if beyond else "")
    gap = Gap(found.at, found.ours_at, found.theirs_at, f"D = {fixed(found.d)}")
    return Chart(
        file_key(view.protocol, "ecdf", system.name),
        f"log R of {system.name} against the retrain reference, protocol {view.protocol}",
        text, "log R, nats a token (below 0: the right answer is likelier)",
        "share of rows at or below", tuple(series), ends, (0.0, 1.0), gap=gap,
    )  # fmt: skip


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def _steps(values: Sequence[float], ends: Span) -> tuple[Point, ...]:
    """The distribution function's points; values beyond an end lie on it."""
    inside = [min(max(value, ends[0]), ends[1]) for value in values]
    points = [(value, (i + 1) / len(values)) for i, value in enumerate(inside)]
    return ((ends[0], 0.0), *points, (ends[1], 1.0))


def strength_charts(found: Calibration) -> list[Chart]:
    """The gap of log R over the strength, and what it costs; the chosen strength is marked."""
    rules = (
        ()
        if found.chosen_scale is None
        else (Rule(found.chosen_scale, f"chosen {found.chosen_scale:g}"),)
    )
    made = []
    gap = _points(found.curve, "scale", "log_r_gap")
    if len(gap) > 1:
        said = "; ".join(f"strength {x:g}: gap {fixed(y, 3, True)}" for x, y in gap)
        ys = span([0.0, *(p[1] for p in gap)], 0.1)
        made.append(
            Chart(
                file_key("strength-gap", found.name), f"Gap of log R over strength, {found.name}",
                f"{said}.", "strength of the adapter (1 is as trained)",
                "log R gap to the retrain reference",
                (Series("log R gap", gap, 1),), ys=ys,
                rules=(Rule(0.0, "as the reference", level=True), *rules),
            )
        )  # fmt: skip
    series = [
        Series(name, points, slot)
        for slot, (name, key) in enumerate(
            (
                ("KS D", "ks"), ("forget answer prob.", "forget_answer_prob"),
                ("retain answer prob.", "retain_answer_prob"), ("model utility", "model_utility"),
            )
        )
        if len(points := _points(found.curve, "scale", key)) > 1
    ]  # fmt: skip
    if series:
        said = "; ".join(
            f"{one.name} from {fixed(one.points[0][1])} to {fixed(one.points[-1][1])}"
            for one in series
        )
        made.append(
            Chart(
                file_key("strength-cost", found.name),
                f"What each strength forgets and keeps, {found.name}", f"{said}.",
                "strength of the adapter (1 is as trained)", "value",
                tuple(series), ys=(0.0, 1.0), rules=rules,
            )
        )  # fmt: skip
    return made


def robustness_charts(card: Robustness) -> list[Chart]:
    """Relearning on seen and on unseen rows, and what leaks when several answers are drawn."""
    made = []
    for key, rows in (("seen", "the rows trained on"), ("unseen", "rows not trained on")):
        series = _curves(card.relearning, "step", f"{key}_answer_prob")
        if series:
            made.append(
                Chart(
                    file_key("relearning", key, card.name), f"Relearning, {rows}, {card.name}",
                    _ends_text(series), "steps of relearning", "answer probability",
                    series, ys=(0.0, 1.0),
                    rules=_levels(card.relearning, f"{key}_answer_prob"),
                )
            )  # fmt: skip
    for key, name in (
        ("share_leaked", "share of rows leaked"),
        ("best_rouge_l_recall", "best ROUGE-L recall"),
    ):
        series = _curves(card.sampling, "n", key, log2=True)
        if series:
            ticks = sorted({p[0] for one in series for p in one.points})
            made.append(
                Chart(
                    file_key("sampling", key, card.name), f"Sampling: {name}, {card.name}",
                    _ends_text(series), "answers drawn (log scale)", f"{name} of n answers",
                    series, ys=(0.0, 1.0),
                    x_ticks=tuple((t, f"{2**t:g}") for t in ticks),
                )
            )  # fmt: skip
    return made


def _levels(curves: Sequence[Curve], key: str) -> tuple[Rule, ...]:
    """A level for what was measured once only: a model that was not attacked."""
    return tuple(
        Rule(float(one.points[0][key]), one.name, level=True)
        for one in curves
        if len(one.points) == 1 and one.points[0].get(key) is not None
    )


def _ends_text(series: Sequence[Series]) -> str:
    parts = [f"{s.name} from {fixed(s.points[0][1])} to {fixed(s.points[-1][1])}" for s in series]
    return "; ".join(parts) + "."


def _points(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[Point, ...]:
    found = [(row.get(x), row.get(y)) for row in rows]
    return tuple(sorted((float(a), float(b)) for a, b in found if a is not None and b is not None))


def _curves(curves: Sequence[Curve], x: str, y: str, log2: bool = False) -> tuple[Series, ...]:
    made = []
    for number, one in enumerate(curves):
        points = _points(one.points, x, y)
        if log2:
            points = tuple((math.log2(a), b) for a, b in points if a > 0)
        if len(points) > 1:
            made.append(Series(one.name, points, SLOTS.get(one.name, 3 + number)))
    return tuple(made)


def write_png(chart: Chart, path: Path) -> Path:
    """The chart as PNG, without date or program in the file, so the same bytes each time.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "PNG plots need matplotlib.", "Install it with `pip install unlearner[plots]`."
        ) from None
    figure = Figure(figsize=(6.4, 4.6), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for series in chart.series:
        _png_series(axes, series)
    plane = axes_of(chart)
    for label, place in label_places(plane, chart):
        axes.annotate(label, plane.value(*place), fontsize=8)
    xs, ys = chart.ends()
    axes.set(xlim=xs, ylim=ys, xlabel=chart.x, ylabel=chart.y)
    axes.set_title(chart.title, fontsize=10, wrap=True)
    if chart.x_ticks:
        axes.set_xticks([at for at, _ in chart.x_ticks], [word for _, word in chart.x_ticks])
    for rule in chart.rules:
        (axes.axhline if rule.level else axes.axvline)(rule.at, color="#55606e", ls=":", lw=1)
        place = (xs[1], rule.at) if rule.level else (rule.at, ys[1])
        axes.annotate(rule.text, place, fontsize=8, ha="right" if rule.level else "left", va="top")
    if chart.gap is not None:
        gap = chart.gap
        axes.plot([gap.x, gap.x], [gap.low, gap.high], color="black", marker="_", lw=2)
        middle = (gap.x, (gap.low + gap.high) / 2)
        axes.annotate(gap.text, middle, (6, 0), textcoords="offset points", weight="bold")
    axes.legend(fontsize=8)
    axes.grid(axis="y", color="#d5dbe2")
    figure.savefig(path, metadata={"Software": None})
    return path


def _png_series(axes: Any, series: Series) -> None:
    colour, marker = COLOURS[series.slot % len(COLOURS)], MARKERS[series.slot % len(MARKERS)]
    points = stairs(series.points) if series.style == "steps" else series.points
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    style: dict[str, Any] = {"color": colour, "label": series.name}
    if series.style == "front":
        axes.plot(xs, ys, color="#55606e", ls="--", lw=1.2, label=series.name)
    elif series.style == "marks":
        axes.plot(xs, ys, ls="", marker=marker, ms=8, **style)
    else:
        dash = DASHES[series.slot % len(DASHES)]
        pattern = (0, tuple(map(float, dash.split()))) if dash else "-"
        axes.plot(xs, ys, ls=pattern, lw=1.6, marker="" if series.style == "steps" else marker,
                  ms=4, **style)  # fmt: skip
