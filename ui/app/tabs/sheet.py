"""The Author sheet: every question of an author, and what was kept beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ui.app.data import commands
from ui.app.data import sheet as sheet_data
from ui.app.html import views
from ui.app.tabs.pages import (
    PRIVATE,
    STREAM,
    TABLE_BUTTONS,
    button,
    command_box,
    comparator_file,
    status,
    told,
)

if TYPE_CHECKING:
    from ui.app.build import App
    from ui.app.data.sheet import SheetRow

NOTHING = "Nothing measured yet."
WIDTHS = [110, 260, 260, 260, 100, 100, 80, 80, 95, 95, 105, 105, 80, 80]


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
        label, _ = app.session.askable().get(name or "", (name or "", ()))
        about = label.removeprefix("To forget: ").removesuffix(" (to be forgotten)")
        names = app.session.names()
        on = [f"{names[slug]} × {scale:g}" for slug, scale in wanted]
        against = ", ".join(on) or "itself"
        for found, total, ahead in sheet_data.fill(
            app.session, name or "", wanted, neighbours=int(n), stop=event
        ):  # fmt: skip
            text = f"{len(found)} of {total} questions about {about}, base against {against}."
            text += f" Waiting in line: {ahead} ahead." if ahead else ""
            text += " Stopped." if event.is_set() else ""
            yield status(text), *shown_rows(found), words

    def export(self, rows: tuple[list[SheetRow], Any]) -> Any:
        """The button of the file for LLM Comparator, once there are rows."""
        if not rows[0]:
            return gr.skip()
        path = comparator_file(self.app, rows[0], sheet_data.SIDES)
        return gr.update(value=path, visible=True)


class RowsTable(NamedTuple):
    """Two answers to many questions: a tally, a table whose rows open, and the rows."""

    summary: Any
    grid: Any
    rows: Any


def rows_table(name: str, label: str) -> RowsTable:
    """The table, where `shown_rows` fills it; `name` begins the ids of its parts."""
    summary = gr.HTML("", elem_id="un-tally" if name == "un-sheet" else f"{name}-tally")
    grid = gr.Dataframe(
        headers=sheet_data.columns(), value=[], interactive=False, wrap=True, label=label,
        elem_id=name, max_height=560, column_widths=WIDTHS, visible=False, buttons=TABLE_BUTTONS,
    )  # fmt: skip
    with gr.Row(elem_classes="un-pair"):
        with gr.Column(min_width=0):
            left = gr.HTML("")
        with gr.Column(min_width=0):
            right = gr.HTML("", elem_id=f"{name}-diff")
    rows = gr.State(([], sheet_data.SIDES))
    grid.select(told(_open_row), rows, [left, right], **PRIVATE)
    return RowsTable(summary, grid, rows)


def shown_rows(
    rows: Sequence[SheetRow], sides: tuple[str, str] = sheet_data.SIDES
) -> tuple[Any, ...]:
    """Tally, table and rows, for the fields of a `RowsTable`."""
    cells = {"headers": sheet_data.columns(sides), "data": [row.cells() for row in rows]}
    return (
        views.tally_table(sheet_data.tally(rows), sides),
        gr.update(value=cells, visible=bool(rows)),
        (list(rows), sides),
    )


# gradio evaluates these annotations: all their names must be there at run time.
def _open_row(found: tuple[list[Any], tuple[str, str]], event: gr.SelectData) -> tuple[str, str]:
    """Both answers of the row that was chosen, with their difference."""
    # The table may be sorted: the row is found by its question, not by its place.
    row = next(row for row in found[0] if row.question == event.row_value[1])
    texts = views.differences(row.base.text, row.unlearned.text)
    about = f"{row.question}  True answer: {row.truth}"
    answers = (row.base, row.unlearned)
    cards = [
        views.answer_card(side.capitalize(), text, answer, about)
        for side, text, answer in zip(found[1], texts, answers, strict=True)
    ]
    return cards[0], cards[1]


def sheet(app: App, stack: Any, strengths: Any) -> Any:
    """The Author sheet; its author field."""
    with gr.Row():
        author = gr.Dropdown(
            choices=app.session.choices(), label="Author or filed request", value=None,
            elem_id="un-sheet-author", scale=2, min_width=260,
        )  # fmt: skip
        beside = gr.Slider(
            1, 20, value=5, step=1, label="Related questions of each kind", scale=1, min_width=260
        )
    with gr.Row():
        fill = button("Fill the sheet", "un-fill", 180, variant="primary")
        stop = button("Stop the sheet (Esc)", "un-sheet-stop", 190)
    state = gr.HTML(status(NOTHING), elem_id="un-sheet-status")
    table = rows_table("un-sheet", "Click a heading to sort, a row to compare its answers")
    export = gr.DownloadButton("LLM Comparator JSON", size="sm", visible=False, scale=0)
    box, behind = command_box(), _Sheet(app)
    fill.click(
        told(behind.run), [author, stack, strengths, beside], [state, *table, box],
        trigger_mode="once", **STREAM,
    ).then(told(behind.export), table.rows, export, **PRIVATE)  # fmt: skip
    stop.click(app.halt, queue=False, **PRIVATE)
    author.input(lambda: (status(NOTHING), *shown_rows([])), None, [state, *table], **PRIVATE)
    return author
