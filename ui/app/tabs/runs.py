"""The Runs tab: every evaluation and probe that was made before, as table, plots and files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gradio as gr

from adapters.errors import UserError
from ui.app.data import commands
from ui.app.data import runs as runs_data
from ui.app.html import runs_page, views
from ui.app.tabs.pages import PRIVATE, command_box, comparator_file, note, told

if TYPE_CHECKING:
    from ui.app.build import App

EMPTY = (
    '<p class="un-note">No evaluation yet. <code>unlearner evaluate --store S ...</code> stores '
    "its figures with the adapter; <code>unlearner ui --logs LOG ...</code> shows logs.</p>"
)


class _Reading:
    """The functions behind the tab."""

    def __init__(self, app: App) -> None:
        self.app = app

    def read(self) -> tuple[Any, ...]:
        """Everything anew, from the files."""
        app, sources = self.app, self.app.sources()
        found, probes = sources.runs(), sources.probes()
        path = app.new_file("runs.csv")
        path.write_text(runs_data.as_csv(found), encoding="utf-8")
        notes = "".join(map(note, [*found.notes, *probes.notes]))
        names = list(found.log_r)
        first = names[: runs_page.SHOWN_CURVES]
        words = commands.runs(app.session, app.logs, app.retain_log, runs_data.split_of(found))
        return (
            notes or ("" if found.table else EMPTY),
            [runs_data.cells(row) for row in found.table],
            gr.update(choices=names, value=first, visible=bool(names)),
            runs_page.log_r_html(found, first),
            runs_page.plots_html(found, probes),
            str(path),
            views.command_html(words),
        )

    def draw(self, names: list[str]) -> str:
        """Log R of the chosen runs."""
        return runs_page.log_r_html(self.app.sources().runs(), names or [])

    def report(self) -> tuple[Any, str]:
        """The report's file and command."""
        app = self.app
        path = runs_page.write_report(app.sources(), app.new_file("report.html"))
        words = commands.report(app.logs, app.retain_log, app.robustness, app.calibration)
        return gr.update(value=str(path), visible=True), views.command_html(words)

    def pair(self, names: list[str]) -> Any:
        """The file of the first two chosen."""
        return gr.update(value=pair_file(self.app, names or []), visible=True)


def runs(app: App, page: gr.Blocks) -> tuple[Callable[[], Any], list[Any]]:
    """The Runs tab; what reads it anew, and the fields that fills."""
    said = gr.HTML("")
    grid = gr.Dataframe(
        headers=[runs_data.LABELS[name] for name in runs_data.COLUMNS], value=[],
        interactive=False, elem_id="un-runs", max_height=420,
        label="Evaluations, measured before; nothing is computed here",
    )  # fmt: skip
    chosen = gr.CheckboxGroup(
        [], label="Runs whose log R is drawn", elem_id="un-chosen", visible=False,
        info="The first two chosen are what the LLM Comparator JSON holds.",
    )  # fmt: skip
    spread = gr.HTML("", elem_id="un-log-r")
    figures = gr.HTML("", elem_id="un-plots")
    with gr.Row():
        again = gr.Button("Read again", size="sm")
        table = gr.DownloadButton("CSV", size="sm", elem_id="un-csv")
        report = gr.Button("Make the HTML report", size="sm", elem_id="un-report")
        report_file = gr.DownloadButton("HTML report", size="sm", visible=False)
        pair = gr.Button("LLM Comparator JSON of two runs", size="sm", elem_id="un-pair")
        pair_file = gr.DownloadButton("comparator.json", size="sm", visible=False)
    box, behind = command_box(), _Reading(app)
    outputs = [said, grid, chosen, spread, figures, table, box]
    again.click(told(behind.read), None, outputs, **PRIVATE)
    page.load(told(behind.read), None, outputs, show_progress="hidden", **PRIVATE)
    chosen.input(told(behind.draw), chosen, spread, show_progress="hidden", **PRIVATE)
    report.click(told(behind.report), None, [report_file, box], **PRIVATE)
    pair.click(told(behind.pair), chosen, pair_file, **PRIVATE)
    return behind.read, outputs


def pair_file(app: App, names: list[str]) -> str:
    """LLM Comparator's file of the first two chosen logs."""
    from evaluation.report.inputs import log_names
    from ui.app.data.comparator import recorded_pairs
    from ui.app.data.runs import all_logs

    shown = all_logs(app.logs, app.retain_log)
    known = dict(zip(log_names(shown), shown, strict=True))
    chosen = [name for name in names if name in known][:2]
    if len(chosen) < 2:
        raise UserError("Fewer than two logs are chosen.", "Choose two under the table.")
    first, second = chosen
    return comparator_file(app, recorded_pairs(known[first], known[second]), (first, second))
