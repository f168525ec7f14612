"""The Runs tab as HTML: table, plots and verdicts, in the page and in an exported file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from evaluation.report import document, plots
from evaluation.report.card_sections import verdict_table
from evaluation.report.numbers import DASH
from ui.app.data import runs

MEASURED, PUBLISHED = "measured here", "published, Llama-2-7B"
PUBLISHED_REFERENCE = "published retrain, Llama-2-7B"
SHOWN_CURVES = 4  # distributions that are drawn before any are chosen
NO_PROBES = runs.Probes()
ABOUT_QUALITY = (
    "A line joins the best trade-offs: runs that no other of their kind beats on both axes; "
    "references are left out. Forget quality needs a reference log: without one a run has no point."
)
ABOUT_PUBLISHED = "Published: Llama-2-7B on {} (OPTML-Group), not measured here."


def plots_html(found: runs.Runs, probes: runs.Probes = NO_PROBES) -> str:
    """Every plot for which there are figures, and the verdicts of the probes."""
    return document.html_blocks(_plot_blocks(found, probes))


def _plot_blocks(found: runs.Runs, probes: runs.Probes) -> list[document.Block]:
    charts = [
        _quality_chart(found),
        plots.line_chart(
            "strength", "Strength, as evaluated: forget ROUGE-L", found.curve(), "strength",
            "forget ROUGE-L",
        ),
    ]  # fmt: skip
    for strength in probes.strengths:
        chosen = strength.chosen
        name = "none chosen" if chosen is None else f"chosen: {chosen:g}"
        charts.append(
            plots.line_chart(
                plots.file_key("strength", strength.name), f"Strength of {strength.name}, {name}",
                strength.curves, "strength", "share or distance",
                rules=() if chosen is None else (plots.Rule(chosen, name),),
            )
        )  # fmt: skip
    for key, title, curves in (
        ("relearning", "Relearning: rows that are not taught again", probes.relearning),
        ("taught", "Relearning: rows that are taught again", probes.taught),
    ):
        # A state that was measured once is a level.
        charts.append(
            plots.line_chart(
                key, title, curves, "training steps", "answer probability", ys=(0.0, 1.0),
                levels=True,
            )
        )  # fmt: skip
    charts.append(
        plots.line_chart(
            "sampling", "Many answers drawn: share of questions that leak", probes.sampling,
            "answers drawn", "share leaked", ys=(0.0, 1.0),
        )
    )  # fmt: skip
    blocks: list[document.Block] = [
        document.Plots(tuple(chart for chart in charts if chart is not None))
    ]
    if found.published:
        blocks.append(ABOUT_PUBLISHED.format(runs.split_of(found)))
    if charts[0] is not None:
        blocks.append(ABOUT_QUALITY)
    verdicts = [{**each, "name": f"{each['of']}: {each['name']}"} for each in probes.verdicts]
    return [*blocks, verdict_table(verdicts)] if verdicts else blocks


def _quality_chart(found: runs.Runs) -> plots.Chart | None:
    """Forget quality against model utility, measured and published, each with its front."""
    points = [
        (str(row["name"]), float(row["model_utility"]), float(row["forget_quality_log10"]),
         runs.REFERENCE if row["source"] == runs.REFERENCE else MEASURED)
        for row in found.table
        if row.get("model_utility") is not None and row.get("forget_quality_log10") is not None
    ]  # fmt: skip
    points += [
        (name, utility, quality, PUBLISHED_REFERENCE if name == "retrain" else PUBLISHED)
        for name, quality, utility in found.published
    ]
    fronts = {MEASURED: "front of those measured here", PUBLISHED: "front of the published"}
    return plots.trade_off_chart("quality", "Forget quality against model utility", points, fronts)


def log_r_html(found: runs.Runs, chosen: Sequence[str]) -> str:
    """The distribution of log R of the chosen runs."""
    return document.html_blocks(_log_r_blocks(found, chosen))


def _log_r_blocks(found: runs.Runs, chosen: Sequence[str]) -> list[document.Block]:
    chart = plots.distribution_chart(
        "log-r", "Log R of the forget rows",
        {name: found.log_r[name] for name in chosen if name in found.log_r},
        "log R (below 0: the right answer is likelier)",
    )  # fmt: skip
    if chart is not None:
        filed = any(row["name"] not in found.log_r for row in found.table)
        more = ["Runs filed in a store hold no rows: give their logs with --logs to draw them."]
        return [document.Plots((chart,)), *(more if filed else [])]
    return ["No run is chosen that holds its rows."] if found.log_r else []


def file_html(found: runs.Runs, probes: runs.Probes = NO_PROBES) -> str:
    """The table and the plots as one file that needs no network."""
    sections = [document.Section("plots", "Plots", tuple(_plot_blocks(found, probes)))]
    if found.table:
        rows = [[DASH if v is None else str(v) for v in runs.cells(row)] for row in found.table]
        texts = ("name", "source", "direction", "protocol", "limited")
        labels = runs.LABELS
        columns = tuple(
            labels[n] if n in texts else document.Column(labels[n]) for n in runs.COLUMNS
        )
        sections.insert(
            0, document.Section("runs", "Runs", (document.Table("Runs", columns, rows),))
        )
    if found.log_r:
        blocks = _log_r_blocks(found, list(found.log_r))
        sections.append(document.Section("log-r", "Log R", tuple(blocks)))
    return document.html_page("unlearner: runs", sections)


def write_report(sources: runs.Sources, out: Path) -> Path:
    """The HTML report of what the Runs tab shows, at `out`: `unlearner report` on logs and probes.

    Figures filed in a store have no rows and no log to hash: where they are all there is, the
    page's own tables and plots are written instead. Made in the one place for button and tests.
    """
    request = sources.report_request()
    if request is None:
        out.write_text(file_html(sources.runs(), sources.probes()), encoding="utf-8")
        return out
    from evaluation.report.files import make_report

    with tempfile.TemporaryDirectory(prefix="unlearner-report-") as folder:
        shutil.copyfile(make_report(request, Path(folder)).html, out)
    return out
