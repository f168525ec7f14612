"""Writes a report: Markdown, HTML, tables as CSV, plots, and everything as JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.logs.records import write_json, write_text
from evaluation.metrics.summary import generation_of, protocol_rows
from evaluation.protocols import protocol_named
from evaluation.report.answers import row_figures
from evaluation.report.blocks import charts
from evaluation.report.build import LoadedLog, gather
from evaluation.report.html import html_report
from evaluation.report.markdown import markdown
from evaluation.report.old_plots import write_png
from evaluation.report.sections import sections
from evaluation.report.svg import standalone, svg
from evaluation.report.tree import KIND, SCHEMA, Report, ReportRequest

FIGURES = (
    "forget_quality", "forget_quality_log10", "ks", "log_r_shift", "direction", "model_utility",
    "forget_nll", "retrain_forget_nll", "forget_answer_prob", "forget_rouge_l_recall",
    "forget_truth_ratio", "retain_answer_prob", "retain_rouge_l_recall", "retain_nll",
)  # fmt: skip
SPREADS = (
    "forget_quality", "ks", "log_r_shift", "model_utility", "forget_nll", "forget_answer_prob",
    "forget_rouge_l_recall", "retain_answer_prob",
)  # fmt: skip
ROW_FIGURES = ("rouge_l_recall", "answer_prob", "nll", "log_r")


@dataclass(frozen=True)
class Written:
    """A report and the files that it was written to."""

    report: Report
    files: tuple[Path, ...]

    @property
    def html(self) -> Path:
        """The one file to open."""
        return next(path for path in self.files if path.name == "report.html")


def make_report(request: ReportRequest, out: Path, *, png: bool = False) -> Written:
    """The report, written to `out`; the same inputs give the same bytes.

    Args:
        request: what to report on.
        out: folder for report.md, report.html, report.json, table.csv, rows.csv and plots/.
        png: plots as PNG too, by matplotlib.

    Raises:
        UserError: as `evaluation.report.build.gather`, or matplotlib is missing.
    """
    report, logs = gather(request)
    found = sections(report)
    texts = {
        "report.md": markdown(report.title, found),
        "report.html": html_report(report.title, found),
        "table.csv": table_csv(report),
        "rows.csv": rows_csv(report, logs),
    }
    plots = charts(found)
    texts |= {f"plots/{chart.key}.svg": standalone(svg(chart)) for chart in plots}
    (out / "plots").mkdir(parents=True, exist_ok=True)
    files = [write_text(out / name, text) for name, text in texts.items()]
    files.append(write_json(out / "report.json", report_json(report)))
    if png:
        files += [write_png(chart, out / "plots" / f"{chart.key}.png") for chart in plots]
    return Written(report, tuple(files))


def report_json(report: Report) -> dict[str, Any]:
    """The report as JSON values: every figure unrounded, NaN and infinities as null."""
    found: dict[str, Any] = _json({"kind": KIND, "schema": SCHEMA, **dataclasses.asdict(report)})
    return found


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def table_csv(report: Report) -> str:
    """One line a system and protocol, figures unrounded, and the published rows."""
    parts = list(
        dict.fromkeys(
            part
            for view in report.views
            for one in view.systems
            for part in one.figures["model_utility_parts"]
        )
    )
    spreads = [f"{name}_{end}" for name in SPREADS for end in ("low", "high")]
    columns = ["name", "source", "protocol", *FIGURES, *spreads, *parts,
               "n", "rows_matched_by", "limited", "reason"]  # fmt: skip
    lines: list[dict[str, Any]] = []
    for view in report.views:
        for one in view.systems:
            found = one.figures
            line = {"name": one.name, "source": one.role, **found}
            for name in SPREADS:
                low, high = found[f"{name}_interval"] or (None, None)
                line |= {f"{name}_low": low, f"{name}_high": high}
            line |= found["model_utility_parts"]
            line["reason"] = found["reasons"].get("forget_quality")
            lines.append(line)
    lines += [
        {
            "name": row.name, "source": "published", "forget_quality": row.forget_quality,
            "model_utility": row.model_utility,
        }
        for row in report.published
    ]  # fmt: skip
    return _csv(columns, lines)


def rows_csv(report: Report, logs: Sequence[LoadedLog]) -> str:
    """One line a row of every log under the first protocol; texts only where they are shown."""
    texts = () if report.without_answers else ("question", "truth", "answer")
    columns = ["name", "set", "row", *ROW_FIGURES, *texts]
    if not report.views:
        return _csv(columns, [])
    protocol = protocol_named(report.views[0].protocol)
    lines: list[dict[str, Any]] = []
    for one in logs:
        for name, found in one.log.sets.items():
            for i, row in enumerate(protocol_rows(found, protocol)):
                made = generation_of(row, protocol)
                lines.append(
                    {
                        "name": one.name, "set": name, "row": i + 1,
                        **dataclasses.asdict(row_figures(row, protocol)),
                        "question": row.question, "truth": row.answer,
                        "answer": None if made is None else made.text,
                    }
                )  # fmt: skip
    return _csv(columns, lines)


def _csv(columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _safe(value) for key, value in line.items()} for line in lines)
    return out.getvalue()


def _safe(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula begins with an apostrophe instead."""
    risky = isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@")
    return f"'{value}" if risky else value
