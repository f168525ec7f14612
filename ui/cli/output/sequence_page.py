"""A sequence of requests as one HTML page: curves, what harmed whom, and what a revert leaves."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from ui.app.html.plots import lines
from ui.app.style import CSS

# What is drawn over the number of requests: key of a stage, title, and what is wanted of it.
CURVES = (
    ("requested_answer_prob", "P of the requested authors' answers", "lower is wanted"),
    ("waiting_answer_prob", "P of authors not asked for", "should stay"),
    ("retain_answer_prob", "P of the retain rows", "should stay"),
    ("forget_quality", "forget quality of all rows requested so far", "higher is wanted"),
    ("utility_teacher_forced", "utility without ROUGE (six parts)", "should stay"),
)
_BODY = (
    "body { font-family:system-ui,sans-serif; max-width:1280px; margin:auto; padding:1rem; "
    "color:var(--un-ink); }"
)
_NAMES = {"revert": "after the revert", "rebase": "after the rebase"}


def sequence_page(found: Mapping[str, Any]) -> str:
    """Render the result of `run_sequence` as one self-contained page."""
    title = f"{found['requests']} requests of {found['split']}, one after another"
    told = [f"<h1>{html.escape(title)}</h1>", _head(found), '<div class="un-plots">']
    told += [_curve(found, *curve) for curve in CURVES] + [_steps(found), "</div>"]
    for line in found["policies"]:
        told.append(f"<h2>{html.escape(line['policy'])}</h2>")
        told.append(_matrix(line["interference"], found, "Arrival", "raised the NLL of"))
        if line.get("alone"):
            told.append(_matrix(line["alone"], found, "Adapter", "alone raises the NLL of"))
        told += [_undone(line, name) for name in _NAMES if name in line]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}{_BODY}</style></head><body>"
        f"{''.join(told)}</body></html>\n"
    )


def _head(found: Mapping[str, Any]) -> str:
    start, settings = found["origin"], found["settings"]
    waiting = start["waiting_answer_prob"]
    return (
        f'<p class="un-quiet">Base {html.escape(str(found["base"]))}, objective '
        f"{html.escape(settings['objective']['name'])}, {found['rows_measured']} rows of "
        f"{len(found['authors'])} authors measured, protocol {html.escape(found['protocol'])}. "
        f"Before any request: P of the split {_number(waiting)}, of the retain rows "
        f"{_number(start['retain_answer_prob'])}, model utility "
        f"{_number(start['model_utility'])}.</p>"
    )


def _curve(found: Mapping[str, Any], key: str, title: str, wanted: str) -> str:
    series = {}
    for line in found["policies"]:
        values = [found["origin"][key], *(stage[key] for stage in line["arrivals"])]
        points = [(float(n), v) for n, v in enumerate(values) if v is not None]
        series[line["policy"]] = points
    # All of these lie between 0 and 1: on one scale a harmless difference looks harmless.
    drawn = lines(series, f"{title}, by policy", "requests", "", floor=0.0, top=1.0)
    note = "" if drawn else "<p>fewer than two values</p>"
    return f"<section><h3>{html.escape(title)} ({wanted})</h3>{drawn}{note}</section>"


def _steps(found: Mapping[str, Any]) -> str:
    series = {
        line["policy"]: [
            (float(n), float(steps))
            for n, steps in enumerate(accumulate(s["cost"]["steps"] for s in line["arrivals"]), 1)
        ]
        for line in found["policies"]
    }
    drawn = lines(series, "optimizer steps so far, by policy", "requests", "", floor=0.0)
    return f"<section><h3>optimizer steps so far</h3>{drawn}</section>"


def _matrix(rows: Sequence[Sequence[float]], found: Mapping[str, Any], what: str, does: str) -> str:
    """Nats a token, one row an arrival, one column an author; what a row asked for is in bold."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in found["authors"])
    body = []
    for number, row in enumerate(rows, start=1):
        cells = "".join(
            f"<td>{'<b>' if i == number - 1 else ''}{value:+.2f}"
            f"{'</b>' if i == number - 1 else ''}</td>"
            for i, value in enumerate(row)
        )
        body.append(f'<tr><th scope="row">{what} {number}</th>{cells}</tr>')
    return (
        f'<div class="un-scroll"><table class="un-table"><caption>{what} by row {does} the author '
        f"by column, nats a token</caption><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _undone(line: Mapping[str, Any], name: str) -> str:
    stage = line[name]
    stale = ", ".join(stage["stale"]) or "none"
    cost = stage.get("cost")
    spent = f" Trained again: {stage['trained']}, {cost['steps']} steps." if cost else ""
    return (
        f"<p><b>{_NAMES[name]}</b>: {len(stage['active'])} active, stale: {html.escape(stale)}; "
        f"P of the other requested authors {_number(stage['requested_answer_prob'])}, of those not "
        f"asked for (the withdrawn one among them) {_number(stage['waiting_answer_prob'])}, of the "
        f"retain rows {_number(stage['retain_answer_prob'])}, forget quality "
        f"{_number(stage['forget_quality'])}.{spent}</p>"
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
