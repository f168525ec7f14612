"""The Runs tab: every evaluation and probe that was made before, as table, plots and files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gradio as gr

from adapters.errors import UserError
from ui.app.data import commands
from ui.app.data import runs as runs_data
from ui.app.data.sheet import recorded_pairs
from ui.app.html import runs_page, views
from ui.app.tabs.pages import (
    PRIVATE,
    QUIET,
    TABLE_BUTTONS,
    button,
    command_box,
    comparator_file,
    note,
    told,
)
from ui.app.tabs.sheet import rows_table, shown_rows

if TYPE_CHECKING:
    from ui.app.build import App

EMPTY = (
    '<p class="un-note">No evaluation yet. <code>unlearner evaluate --store S ...</code> stores '
    "its figures with the adapter; <code>unlearner ui --logs LOG ...</code> shows logs.</p>"
)


class Reading:
    """The functions behind the tab."""

    def __init__(self, app: App) -> None:
        self.app = app

    def read(self) -> tuple[Any, ...]:
        """Everything again, from the files."""
        app, sources = self.app, self.app.sources()
        found, probes = sources.runs(), sources.probes()
        path = app.new_file("runs.csv")
        path.write_text(runs_data.as_csv(found), encoding="utf-8")
        notes = "".join(map(note, [*found.notes, *probes.notes]))
        names = list(found.log_r)
        logs = [name for name, _ in sources.named_logs()]
        first = names[: runs_page.SHOWN_CURVES]
        split = runs_data.split_of(found)
        words = commands.runs(app.session, sources.logs, sources.retain_log, split)
        return (
            notes or ("" if found.table else EMPTY),
            gr.update(
                value=[runs_data.cells(row) for row in found.table], visible=bool(found.table)
            ),
            gr.update(choices=names, value=first, visible=bool(names)),
            runs_page.log_r_html(found, first),
            runs_page.plots_html(found, probes),
            gr.update(value=str(path), visible=bool(found.table)),
            gr.update(visible=bool(found.table)),
            views.command_html(words),
            *[gr.update(choices=logs, value=logs[place] if len(logs) > 1 else None)
              for place in (0, 1)],
            gr.update(visible=len(logs) > 1),
        )  # fmt: skip

    def draw(self, names: list[str]) -> str:
        """Log R of the chosen runs."""
        return runs_page.log_r_html(self.app.sources().runs(), names or [])

    def report(self) -> tuple[Any, str]:
        """The report's file and command."""
        sources = self.app.sources()
        path = runs_page.write_report(sources, self.app.new_file("report.html"))
        request = sources.report_request()
        words = "" if request is None else request.command
        return gr.update(value=str(path), visible=True), views.command_html(words)

    def answers(self, first: str | None, second: str | None) -> tuple[Any, ...]:
        """The recorded answers of two logs, and the button of their file."""
        logs = dict(self.app.sources().named_logs())
        if first not in logs or second not in logs or first == second:
            raise UserError("Two different logs are needed.", "Choose them from the lists.")
        rows, names = recorded_pairs(logs[first], logs[second]), (first, second)
        path = comparator_file(self.app, rows, names)
        return *shown_rows(rows, names), gr.update(value=path, visible=True)


def runs(app: App, page: gr.Blocks) -> tuple[Callable[[], Any], list[Any]]:
    """The Runs tab, what refreshes it, and the fields that this fills."""
    said = gr.HTML("")
    grid = gr.Dataframe(
        headers=[runs_data.LABELS[name] for name in runs_data.COLUMNS], value=[],
        interactive=False, elem_id="un-runs", max_height=420, visible=False, buttons=TABLE_BUTTONS,
        pinned_columns=1,
        label="Earlier measurements: click a heading to sort, drag its edge to resize",
    )  # fmt: skip
    with gr.Row():
        with gr.Column(min_width=400):
            figures = gr.HTML("", elem_id="un-plots")
        with gr.Column(min_width=400):
            spread = gr.HTML("", elem_id="un-log-r")
            chosen = gr.CheckboxGroup(
                [], label="Runs whose log R is drawn", elem_id="un-chosen", visible=False,
            )  # fmt: skip
    with gr.Row():
        again = gr.Button("Refresh", size="sm")
        table = gr.DownloadButton("CSV", size="sm", elem_id="un-csv")
        report = gr.Button("Create HTML report", size="sm", elem_id="un-report")
        report_file = gr.DownloadButton("Download HTML report", size="sm", visible=False)
    box, behind = command_box(), Reading(app)
    with gr.Accordion("What the columns mean, and which figure to quote", open=False):
        gr.Markdown(runs_data.column_help())
    with gr.Column(visible=False) as two_logs:
        gr.Markdown("### Answers of two logs, side by side")
        with gr.Row():
            first = gr.Dropdown([], label="Log", elem_id="un-first-log")
            second = gr.Dropdown([], label="beside", elem_id="un-second-log")
            answers = button("Show their answers", "un-pair", 190)
        pair = rows_table("un-logs", "Recorded answers: click a heading to sort, a row to compare")
        pair_file = gr.DownloadButton("LLM Comparator JSON", size="sm", visible=False, scale=0)
    outputs = [said, grid, chosen, spread, figures, table, report, box, first, second, two_logs]
    again.click(told(behind.read), None, outputs, **PRIVATE)
    page.load(told(behind.read), None, outputs, **QUIET)
    chosen.input(told(behind.draw), chosen, spread, **QUIET)
    report.click(told(behind.report), None, [report_file, box], **PRIVATE)
    answers.click(told(behind.answers), [first, second], [*pair, pair_file], **PRIVATE)
    return behind.read, outputs
