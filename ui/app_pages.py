"""What the tabs share, and the author sheet."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from adapters.errors import UserError
from ui import runs, same, views
from ui import sheet as sheet_data

if TYPE_CHECKING:
    from ui.app import App
    from ui.session import Answer

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
LOG = logging.getLogger("unlearner.app")


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors reach the page as a sentence; nothing of a question is logged."""

    def fail(error: Exception) -> gr.Error:
        if isinstance(error, UserError):
            return gr.Error(str(error), title="That did not work", print_exception=False)
        LOG.error("%s in %s", type(error).__name__, function.__name__)
        return gr.Error(
            f"{type(error).__name__}. See the terminal; `unlearner doctor` checks this machine.",
            title="Something unforeseen",
            print_exception=False,
        )

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from function(*args, **kwargs)
            except Exception as error:
                raise fail(error) from None

        return stream

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise fail(error) from None

    return plain


def command_box(value: str = "") -> gr.HTML:
    """Where `views.command_html` stands, once there is a command."""
    return gr.HTML(views.command_html(value), elem_classes="un-command-box")


def note(text: str) -> str:
    """A sentence that stands out."""
    return f'<p class="un-note">{views.esc(text)}</p>'


def comparator_file(
    app: App, rows: Sequence[tuple[str, str, Answer, Answer]], names: tuple[str, str]
) -> str:  # fmt: skip
    """A file in LLM Comparator's JSON; rows are set, question and both answers."""
    path = app.new_file("comparator.json")
    path.write_text(json.dumps(runs.comparator(rows, names)), encoding="utf-8")
    return str(path)


def sheet(app: App, stack: Any, strengths: Any) -> Any:
    """The Author sheet; its author field."""
    with gr.Row():
        author = gr.Dropdown(
            choices=list(app.session.askable()), label="Author or filed request", value=None,
            elem_id="un-sheet-author", scale=2,
        )  # fmt: skip
        beside = gr.Slider(1, 20, value=5, step=1, label="Neighbours of each kind", scale=1)
    with gr.Row():
        fill = gr.Button(
            "Fill the sheet", variant="primary", elem_id="un-fill", size="md", scale=0,
            min_width=180,
        )  # fmt: skip
        stop = gr.Button(
            "Stop the sheet (Esc)", elem_id="un-sheet-stop", size="md", scale=0, min_width=180
        )
    status = gr.HTML("", elem_id="un-sheet-status")
    summary = gr.HTML("", elem_id="un-tally")
    grid = gr.Dataframe(
        headers=list(sheet_data.COLUMNS), value=[], interactive=False, wrap=True,
        label="All questions; a heading sorts, a row opens its difference", elem_id="un-sheet",
        max_height=560,
        column_widths=[110, 260, 260, 260, 110, 110, 90, 90, 80, 80, 80, 80],
    )  # fmt: skip
    with gr.Row():
        with gr.Column(min_width=300):
            left = gr.HTML("")
        with gr.Column(min_width=300):
            right = gr.HTML("", elem_id="un-sheet-diff")
    export = gr.DownloadButton("LLM Comparator JSON", size="sm", visible=False)
    rows = gr.State([])
    box = command_box()

    def run(
        name: str | None, chosen: list[str], kept: dict[str, float], n: float,
        request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        event = app.stop_of(request, "sheet")
        wanted = app.actions.stack_of(chosen or [], kept or {})
        labels = {adapter.slug: adapter.label for adapter in app.session.adapters()}
        words = same.sheet(app.session, name or "", wanted, int(n))
        for found, total, ahead in sheet_data.fill(
            app.session, name or "", wanted, neighbours=int(n), stop=event
        ):  # fmt: skip
            text = f"{len(found)} of {total} questions, base against "
            text += ", ".join(f"{labels[slug]} × {scale:g}" for slug, scale in wanted) or "itself"
            text += f". Waiting in line: {ahead} ahead." if ahead else "."
            text += " Stopped." if event.is_set() else ""
            yield (f'<p class="un-foot" role="status">{views.esc(text)}</p>',
                   views.tally_table(sheet_data.tally(found)), [row.cells() for row in found],
                   found, views.command_html(words))  # fmt: skip

    def open_row(found: list[Any], event: gr.SelectData) -> tuple[str, str]:
        # The table may be sorted: the row is found by its question, not by its place.
        question = event.row_value[1]
        row = next(r for r in found if r.question == question)
        texts = views.differences(row.base.text, row.unlearned.text)
        about = f"{row.question}  True answer: {row.truth}"
        return (
            views.answer_card("Base", texts[0], row.base, about),
            views.answer_card("Stack", texts[1], row.unlearned, about),
        )

    def export_file(found: list[Any]) -> Any:
        if not found:
            return gr.skip()
        made = [(row.group, row.question, row.base, row.unlearned) for row in found]
        return gr.update(value=comparator_file(app, made, ("base", "stack")), visible=True)

    fill.click(
        told(run), [author, stack, strengths, beside], [status, summary, grid, rows, box],
        concurrency_limit=16, show_progress="hidden", trigger_mode="once", **PRIVATE,
    ).then(told(export_file), rows, export, **PRIVATE)  # fmt: skip
    stop.click(app.halt, queue=False, **PRIVATE)
    grid.select(told(open_row), rows, [left, right], **PRIVATE)
    return author
