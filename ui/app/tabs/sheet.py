"""The Author sheet: every question of an author, and what was kept beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from ui.app.data import commands
from ui.app.data import sheet as sheet_data
from ui.app.html import views
from ui.app.tabs.pages import PRIVATE, command_box, comparator_file, told

if TYPE_CHECKING:
    from ui.app.build import App

WIDTHS = [110, 260, 260, 260, 110, 110, 80, 80, 90, 90, 80, 80, 80, 80]


class _Sheet:
    """The functions behind the tab."""

    def __init__(self, app: App) -> None:
        self.app = app

    def run(
        self, name: str | None, chosen: list[str], kept: dict[str, float], n: float,
        request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        """The sheet as it fills."""
        app = self.app
        event = app.stop_of(request, "sheet")
        wanted = app.actions.stack_of(chosen or [], kept or {})
        words = views.command_html(commands.sheet(app.session, name or "", wanted, int(n)))
        against = self._names(wanted)
        for found, total, ahead in sheet_data.fill(
            app.session, name or "", wanted, neighbours=int(n), stop=event
        ):  # fmt: skip
            text = f"{len(found)} of {total} questions, base against {against}."
            text += f" Waiting in line: {ahead} ahead." if ahead else ""
            text += " Stopped." if event.is_set() else ""
            yield (f'<p class="un-foot" role="status">{views.esc(text)}</p>',
                   views.tally_table(sheet_data.tally(found)), [row.cells() for row in found],
                   found, words)  # fmt: skip

    def _names(self, stack: Sequence[tuple[str, float]]) -> str:
        names = self.app.session.names()
        return ", ".join(f"{names[slug]} × {scale:g}" for slug, scale in stack) or "itself"

    def open_row(self, found: list[Any], event: gr.SelectData) -> tuple[str, str]:
        """Both answers of the row that was chosen, with their difference."""
        # The table may be sorted: the row is found by its question, not by its place.
        question = event.row_value[1]
        row = next(r for r in found if r.question == question)
        texts = views.differences(row.base.text, row.unlearned.text)
        about = f"{row.question}  True answer: {row.truth}"
        return (
            views.answer_card("Base", texts[0], row.base, about),
            views.answer_card("Stack", texts[1], row.unlearned, about),
        )

    def export(self, found: list[Any]) -> Any:
        """The button of the file for LLM Comparator, once there are rows."""
        if not found:
            return gr.skip()
        made = [(row.group, row.question, row.base, row.unlearned) for row in found]
        return gr.update(value=comparator_file(self.app, made, ("base", "stack")), visible=True)


def sheet(app: App, stack: Any, strengths: Any) -> Any:
    """The Author sheet; its author field."""
    with gr.Row():
        author = gr.Dropdown(
            choices=app.session.choices(), label="Author or filed request", value=None,
            elem_id="un-sheet-author", scale=2,
        )  # fmt: skip
        beside = gr.Slider(1, 20, value=5, step=1, label="Neighbours of each kind", scale=1)
    with gr.Row():
        fill = gr.Button(
            "Fill the sheet", variant="primary", elem_id="un-fill", size="md", scale=0,
            min_width=180,
        )  # fmt: skip
        stop = gr.Button(
            "Stop the sheet (Esc)", elem_id="un-sheet-stop", size="md", scale=0, min_width=190
        )
    status = gr.HTML("", elem_id="un-sheet-status")
    summary = gr.HTML("", elem_id="un-tally")
    grid = gr.Dataframe(
        headers=list(sheet_data.COLUMNS), value=[], interactive=False, wrap=True,
        label="All questions; a heading sorts, a row opens its difference", elem_id="un-sheet",
        max_height=560, column_widths=WIDTHS,
    )  # fmt: skip
    with gr.Row():
        with gr.Column(min_width=300):
            left = gr.HTML("")
        with gr.Column(min_width=300):
            right = gr.HTML("", elem_id="un-sheet-diff")
    export = gr.DownloadButton("LLM Comparator JSON", size="sm", visible=False, scale=0)
    rows, box, behind = gr.State([]), command_box(), _Sheet(app)
    fill.click(
        told(behind.run), [author, stack, strengths, beside], [status, summary, grid, rows, box],
        concurrency_limit=16, show_progress="hidden", trigger_mode="once", **PRIVATE,
    ).then(told(behind.export), rows, export, **PRIVATE)  # fmt: skip
    stop.click(app.halt, queue=False, **PRIVATE)
    grid.select(told(behind.open_row), rows, [left, right], **PRIVATE)
    return author
