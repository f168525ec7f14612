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

from evaluation.logs.records import generation_of, protocol_rows, write_json, write_text
from evaluation.protocols import protocol_named
from evaluation.report.answers import row_figures
from evaluation.report.build import KIND, LoadedLog, Report, ReportRequest, gather
from evaluation.report.cards import SCHEMA
from evaluation.report.document import charts, html_page, markdown_page
from evaluation.report.plots import svg_file, write_png
from evaluation.report.sections import sections

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
    """A report, and the files that it was written to; `html` is the one to open."""

    report: Report
    files: tuple[Path, ...]
    html: Path


def make_report(request: ReportRequest, out: Path, *, png: bool = False) -> Written:
    """Write a report to `out`; the same inputs give the same bytes.

    Args:
        request: what to report on.
        out: folder for report.md, report.html, report.json, table.csv, rows.csv and plots/.
        png: whether to write the plots as PNG too.

    Raises:
        UserError: as `evaluation.report.build.gather`.
    """
    report, logs = gather(request)
    parts = sections(report)
    texts = {
        "report.md": markdown_page(report.title, parts),
        "report.html": html_page(report.title, parts),
        "table.csv": table_csv(report),
        "rows.csv": rows_csv(report, logs),
    }
    texts |= {f"plots/{chart.key}.svg": svg_file(chart) for chart in charts(parts)}
    (out / "plots").mkdir(parents=True, exist_ok=True)
    files = [write_text(out / name, text) for name, text in texts.items()]
    values = {"kind": KIND, "schema": SCHEMA, **dataclasses.asdict(report)}
    files.append(write_json(out / "report.json", _json(values)))
    if png:
        files += [write_png(chart, out / "plots" / f"{chart.key}.png") for chart in charts(parts)]
    return Written(report, tuple(files), out / "report.html")


def _json(value: Any) -> Any:
    """`value` as JSON: NaN and infinities as null, anything unknown as text."""
    if isinstance(value, Mapping):
        return {str(key): _json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def table_csv(report: Report) -> str:
    """A line for each system and protocol, figures unrounded, and the published rows."""
    lines: list[dict[str, Any]] = []
    parts: dict[str, None] = {}
    for system in (system for view in report.views for system in view.systems):
        figures = system.figures
        line = {"name": system.name, "source": system.role, **figures}
        for name in SPREADS:
            line[f"{name}_low"], line[f"{name}_high"] = figures[f"{name}_interval"] or (None, None)
        parts |= dict.fromkeys(figures["model_utility_parts"])
        reason = figures["reasons"].get("forget_quality")
        lines.append(line | figures["model_utility_parts"] | {"reason": reason})
    lines += [{**dataclasses.asdict(row), "source": "published"} for row in report.published]
    spreads = [f"{name}_{end}" for name in SPREADS for end in ("low", "high")]
    columns = ["name", "source", "protocol", *FIGURES, *spreads, *parts,
               "n", "rows_matched_by", "limited", "reason"]  # fmt: skip
    return csv_text(columns, lines)


def rows_csv(report: Report, logs: Sequence[LoadedLog]) -> str:
    """A line for each row of every log under the first protocol, with texts unless left out."""
    texts = () if report.without_answers else ("question", "truth", "answer")
    lines: list[dict[str, Any]] = []
    for log in logs:
        protocol = protocol_named(report.views[0].protocol)
        for name, record in log.log.sets.items():
            for i, row in enumerate(protocol_rows(record, protocol)):
                generation = generation_of(row, protocol)
                line = {"name": log.name, "set": name, "row": i + 1}
                line |= {"question": row.question, "truth": row.answer}
                line["answer"] = None if generation is None else generation.text
                lines.append(line | dataclasses.asdict(row_figures(row, protocol)))
    return csv_text(["name", "set", "row", *ROW_FIGURES, *texts], lines)


def csv_text(columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> str:
    """CSV in which no cell is a formula: a text that could be one begins with an apostrophe."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writerow({column: _guard(column) for column in columns})
    writer.writerows({key: _guard(value) for key, value in line.items()} for line in lines)
    return out.getvalue()


def _guard(value: Any) -> Any:
    formula = isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@")
    return f"'{value}" if formula else value
