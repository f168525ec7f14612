"""The page of recorded answers: two logs side by side, no model, and it says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from ui.app.data import same
from ui.app.html import runs_page, views
from ui.app.tabs.pages import PRIVATE, command_box, comparator_file, note, told

if TYPE_CHECKING:
    from ui.app.build import App
    from ui.app.data.recorded import Recorded


def build(app: App, found: Recorded) -> None:
    """Compare and Runs on recorded answers."""
    names = found.names
    gr.HTML(
        '<header class="un-head"><h1>unlearner</h1><p role="status" id="un-state">recorded answers'
        f"</p></header><p class='un-note'><b>Recorded.</b> These answers were written by others or "
        f"earlier and are shown as they stand in {views.esc(names[0])} and {views.esc(names[1])}; "
        "no model is loaded. Scores are computed from the logs.</p>"
    )
    with gr.Tabs():
        with gr.Tab("Compare"):
            groups = list(found.rows)
            group = gr.Radio(groups, value=groups[0], label="Set", elem_id="un-set")
            question = gr.Dropdown(
                found.questions(groups[0]), value=found.questions(groups[0])[0],
                label="Question", elem_id="un-recorded-question",
            )  # fmt: skip
            with gr.Row():
                with gr.Column(min_width=300):
                    left = gr.HTML("", elem_id="un-left")
                with gr.Column(min_width=300):
                    right = gr.HTML("", elem_id="un-right")
            scores = gr.HTML("", elem_id="un-figures")
            with gr.Row():
                export = gr.DownloadButton("LLM Comparator JSON", size="sm", elem_id="un-export")
            command_box(same.recorded(app.logs))
            group.change(lambda name: gr.update(choices=found.questions(name),
                         value=found.questions(name)[0]), group, question, **PRIVATE)  # fmt: skip
        with gr.Tab("Runs"):
            _runs(app)

    def show(name: str, asked: str) -> tuple[str, str, str]:
        frame = found.frame(name, asked)
        texts = views.differences(frame.base.text, frame.unlearned.text)
        return (
            views.answer_card(names[0], texts[0], frame.base, "recorded"),
            views.answer_card(names[1], texts[1], frame.unlearned, "recorded"),
            views.scores_table(frame, names),
        )

    def recorded(group: str, question: str) -> dict[str, Any]:
        """The two recorded answers to a question, judged."""
        from ui.app.actions import frame_json

        return frame_json(found.frame(group, question))

    question.change(told(show), [group, question], [left, right, scores], **PRIVATE)
    page = gr.context.Context.root_block
    page.load(told(show), [group, question], [left, right, scores], **PRIVATE)
    export.value = comparator_file(app, found.comparison(), names)
    gr.api(told(recorded), api_name="recorded")


def _runs(app: App) -> None:
    """Table and plots of the logs."""
    sources = app.sources()
    shown = sources.runs()
    gr.HTML(
        "".join(map(note, shown.notes)) + runs_page.table_html(shown)
        + runs_page.log_r_html(shown, list(shown.log_r))
        + runs_page.plots_html(shown, sources.probes())
    )  # fmt: skip
    command_box(same.runs(app.session, app.logs, app.retain_log, None))
