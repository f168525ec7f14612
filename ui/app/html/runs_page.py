"""The Runs tab as HTML: table, plots, verdicts. The page and the exported file show the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ui.app.data import runs
from ui.app.data.probes import Probes
from ui.app.html import curves, plots, views

MEASURED, PUBLISHED = "measured here", "published, Llama-2-7B"
PUBLISHED_REFERENCE = "published retrain, Llama-2-7B"
SHOWN_CURVES = 4  # a plot has four colours
NO_PROBES = Probes()


def plots_html(found: runs.Runs, probes: Probes = NO_PROBES) -> str:
    """Every plot there is something for, but the distribution that depends on the choice."""
    parts = [_quality(found)]
    if curve := found.curve():
        parts.append(
            ("Strength, as evaluated",
             plots.lines(_first(curve), "Forget ROUGE-L by strength", "strength", "forget ROUGE-L"))
        )  # fmt: skip
    for one in probes.strengths:
        label = f"Strength of {one.name}"
        parts.append((label, curves.strength_plot(one.curves, one.chosen, label)))
    titles = (
        ("Relearning: rows that are not taught again", probes.relearning),
        ("Relearning: rows that are taught again", probes.taught),
    )
    parts += [_relearning(title, found_) for title, found_ in titles if found_]
    if probes.sampling:
        parts.append(
            ("Many answers drawn",
             plots.lines(_first(probes.sampling), "Share of questions that leak, by draws",
                         "answers drawn", "share leaked", floor=0.0))
        )  # fmt: skip
    body = "".join(f"<div><h2>{views.esc(title)}</h2>{part}</div>" for title, part in parts if part)
    return f'<div class="un-plots">{body}</div>{verdicts_html(probes)}'


def _relearning(title: str, curves_: dict[str, list[tuple[float, float]]]) -> tuple[str, str]:
    """Answer probability over training steps; a state that was only measured once is a level."""
    last = max((x for points in curves_.values() for x, _ in points), default=0.0)
    levels = {
        name: [*points, (last, points[0][1])] if len(points) == 1 else points
        for name, points in _first(curves_).items()
    }
    drawn = plots.lines(levels, title, "training steps", "answer probability", floor=0.0)
    return title, drawn + _more(curves_)


def _more(curves_: dict[str, list[tuple[float, float]]]) -> str:
    left = list(curves_)[SHOWN_CURVES:]
    return _foot(f"Not drawn, a plot holds four: {', '.join(left)}.") if left else ""


def _first(curves_: dict[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    return dict(list(curves_.items())[:SHOWN_CURVES])


def _foot(text: str) -> str:
    return f'<p class="un-foot">{views.esc(text)}</p>'


def _quality(found: runs.Runs) -> tuple[str, str]:
    """Forget quality against model utility, ours and the published ones, each with its front."""
    points = [
        (str(row["name"]), float(row["model_utility"]), float(row["forget_quality_log10"]),
         runs.REFERENCE if row["source"] == runs.REFERENCE else MEASURED)
        for row in found.table
        if row.get("model_utility") is not None and row.get("forget_quality_log10") is not None
    ]  # fmt: skip
    published = [
        (name, mu, fq, PUBLISHED_REFERENCE if name == "retrain" else PUBLISHED)
        for name, fq, mu in found.published
    ]
    drawn = curves.pareto_with_front(
        [*points, *published], "Forget quality against model utility",
        "model utility, higher is better", "log10 forget quality, 0 is best",
        {MEASURED: "front of those measured here", PUBLISHED: "front of the published"},
    )  # fmt: skip
    note = (
        "Published: Llama-2-7B on forget05 (OPTML-Group), not measured here. A front joins the "
        "runs that no other of their kind beats in both; references are left out of it. Forget "
        "quality needs a retrain reference: without one a run has no point."
    )
    return "Forget quality against model utility", drawn + _foot(note)


def log_r_html(found: runs.Runs, chosen: Sequence[str]) -> str:
    """The distribution of log R of the chosen runs."""
    shown = {name: found.log_r[name] for name in chosen if name in found.log_r}
    if not shown:
        return _foot("No run is chosen that holds its rows.") if found.log_r else ""
    note = _foot("Beyond four, runs are not drawn.") if len(shown) > SHOWN_CURVES else ""
    drawn = plots.histogram(
        dict(list(shown.items())[:SHOWN_CURVES]),
        "Distribution of log R", "log R; below 0 knows",
    )  # fmt: skip
    return f'<div class="un-plots"><div><h2>Log R of the forget rows</h2>{drawn}{note}</div></div>'


def verdicts_html(probes: Probes) -> str:
    """What the probes concluded, each beside its threshold."""
    rows = [
        {
            "of": verdict.get("of"),
            "probe": verdict.get("name"),
            "value": _figure(verdict.get("value")),
            "threshold": _figure(verdict.get("threshold")),
            "verdict": verdict.get("said"),
            "in words": verdict.get("text", ""),
        }
        for verdict in probes.verdicts
    ]
    if not rows:
        return ""
    return f'<h2 class="un-part">Verdicts of the probes</h2>{views.table(rows, "Verdicts")}'


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–" if value is None else value


def table_html(found: runs.Runs) -> str:
    """The table of all runs."""
    rows = [
        dict(zip(runs.COLUMNS, map(_cell, runs.cells(row)), strict=True)) for row in found.table
    ]
    return views.table(rows, "Runs")


def _cell(value: Any) -> str:
    return "–" if value is None else str(value)


def file_html(found: runs.Runs, probes: Probes = NO_PROBES) -> str:
    """One file with table and plots that needs no network."""
    from ui.app.style import CSS

    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>unlearner: runs</title>'
        f"<style>{CSS} body{{font-family:system-ui;max-width:1100px;margin:2rem auto;"
        f"padding:0 1rem}}</style><h1>Runs</h1>{table_html(found)}{plots_html(found, probes)}"
        f"{log_r_html(found, list(found.log_r))}</html>"
    )
