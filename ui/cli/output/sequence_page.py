"""A sequence of requests as one HTML page: curves, interference, and the effect of a revert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from evaluation.report.document import (
    Block,
    Cell,
    Column,
    Para,
    Plots,
    Section,
    Table,
    html_page,
    words,
)
from evaluation.report.plots import file_key, line_chart

# What is drawn over the number of requests: key of a stage, title, and the direction wanted.
CURVES = (
    ("requested_answer_prob", "P of the requested authors' answers", "lower is better"),
    ("waiting_answer_prob", "P of authors not asked for", "should not change"),
    ("retain_answer_prob", "P of the retain rows", "should not change"),
    ("forget_quality", "forget quality of all rows requested so far", "higher is better"),
    ("utility_teacher_forced", "utility without ROUGE (six parts)", "should not change"),
)
UNDONE = {"revert": "After the revert", "rebase": "After the rebase"}


def sequence_page(result: Mapping[str, Any]) -> str:
    """The result of `run_sequence` as one self-contained page."""
    title = f"{result['requests']} requests of {result['split']}, one after another"
    origin, settings = result["origin"], result["settings"]
    about = (
        f"Base {result['base']}, objective {settings['objective']['name']}, "
        f"{result['rows_measured']} rows of {len(result['authors'])} authors measured, protocol "
        f"{result['protocol']}. Before any request: P of the split "
        f"{_figure(origin['waiting_answer_prob'])}, of the retain rows "
        f"{_figure(origin['retain_answer_prob'])}, model utility "
        f"{_figure(origin['model_utility'])}."
    )
    sections = [Section("curves", "By number of requests", (Para(about), *_curves(result)))]
    for policy in result["policies"]:
        authors = result["authors"]
        blocks: list[Block] = [
            _matrix(policy["interference"], authors, "Arrival", "raised the NLL of")
        ]
        if policy.get("alone"):
            blocks.append(_matrix(policy["alone"], authors, "Adapter", "alone raises the NLL of"))
        blocks += [_undone(policy[key], title) for key, title in UNDONE.items() if key in policy]
        name = policy["policy"]
        sections.append(Section(file_key("policy", name), name, tuple(blocks)))
    return html_page(title, sections)


def _curves(result: Mapping[str, Any]) -> list[Block]:
    """The plots, and the names of those with fewer than two values."""
    charts = {}
    for key, title, wanted in CURVES:
        curves = {}
        for policy in result["policies"]:
            values = [result["origin"][key], *(stage[key] for stage in policy["arrivals"])]
            points = [(float(n), value) for n, value in enumerate(values) if value is not None]
            curves[policy["policy"]] = points
        # All of these lie between 0 and 1: on one scale a harmless difference looks harmless.
        charts[title] = line_chart(
            file_key(key), f"{title} ({wanted})", curves, "requests", title, ys=(0.0, 1.0)
        )
    steps = {
        policy["policy"]: [
            (float(n), float(total))
            for n, total in enumerate(accumulate(s["cost"]["steps"] for s in policy["arrivals"]), 1)
        ]
        for policy in result["policies"]
    }
    title = "optimizer steps so far"
    charts[title] = line_chart("steps", title, steps, "requests", "optimizer steps")
    missing = [title for title, chart in charts.items() if chart is None]
    blocks: list[Block] = [Plots(tuple(chart for chart in charts.values() if chart is not None))]
    if missing:
        blocks.append(Para(f"Fewer than two values, not drawn: {', '.join(missing)}."))
    return blocks


def _matrix(rows: Sequence[Sequence[float]], authors: Sequence[str], what: str, does: str) -> Table:
    """Nats per token: a row for each arrival, a column for each author."""
    cells = tuple(
        (
            Cell(f"{what} {number + 1}"),
            *(
                Cell(f"{value:+.2f}", "requested" if i == number else "")
                for i, value in enumerate(row)
            ),
        )
        for number, row in enumerate(rows)
    )
    caption = f"{what} by row {does} the author by column, nats per token"
    return Table(caption, (*words(what), *map(Column, authors)), cells)


def _undone(stage: Mapping[str, Any], title: str) -> Para:
    stale = ", ".join(stage["stale"]) or "none"
    cost = stage.get("cost")
    trained = f" Trained again: {stage['trained']}, {cost['steps']} steps." if cost else ""
    return Para(
        f"{title}: {len(stage['active'])} active, stale: {stale}; "
        f"P of the other requested authors {_figure(stage['requested_answer_prob'])}, of those not "
        f"asked for (the withdrawn one among them) {_figure(stage['waiting_answer_prob'])}, of the "
        f"retain rows {_figure(stage['retain_answer_prob'])}, forget quality "
        f"{_figure(stage['forget_quality'])}.{trained}"
    )


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
