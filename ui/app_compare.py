"""The Compare tab: one question, both answers as they grow, their figures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from ui import app_pages, verdicts, views
from ui.app_pages import PRIVATE, _told
from ui.decoding import Sampling

if TYPE_CHECKING:
    from ui.app import App
    from ui.session import Frame

FRAME_SECONDS = 0.05  # between two pictures of a growing answer; Stop is looked at every token


def _asking(app: App) -> tuple[Any, ...]:
    """Author, questions, question, the two buttons, and what stands under "More"."""
    with gr.Row():
        author = gr.Dropdown(
            choices=list(app.session.library.authors), label="Author", elem_id="un-author",
            value=None, scale=1,
        )  # fmt: skip
        question_list = gr.Dropdown(
            choices=[], label="Question of this author", value=None, elem_id="un-list", scale=2
        )
    question = gr.Textbox(
        label="Question", placeholder="Choose one above, or type your own. Enter asks.",
        lines=1, max_lines=1, elem_id="un-question",
    )  # fmt: skip
    with gr.Row():
        ask = gr.Button("Ask both", variant="primary", elem_id="un-ask")
        stop = gr.Button("Stop (Esc)", elem_id="un-stop")
    with gr.Accordion("More", open=False), gr.Row():
        heat = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature (0 is greedy)")
        seed = gr.Number(0, precision=0, label="Seed", minimum=0)
        longest = gr.Slider(1, 400, value=200, step=1, label="Longest answer in tokens")
    return author, question_list, question, ask, stop, (heat, seed, longest)


def _answers(app: App) -> tuple[Any, ...]:
    """Both answers, their figures, the last comparison and its command."""
    status = gr.HTML(_status("Ask something."), elem_id="un-status")
    with gr.Row():
        with gr.Column(min_width=300):
            left = gr.HTML(views.answer_card("Base", "", None), elem_id="un-left")
        with gr.Column(min_width=300):
            right = gr.HTML(views.answer_card("Base + adapters", "", None), elem_id="un-right")
    scores = gr.HTML("", elem_id="un-figures")
    with gr.Accordion("How the verdict is found", open=False):
        gr.Markdown(verdicts.RULE)
    frame_state = gr.State(None)
    same = app_pages.command_box()
    app_pages.vote(app, frame_state)
    return status, left, right, scores, frame_state, same


def compare(app: App, stack: Any, strengths: Any) -> Any:
    """The Compare tab; its author field."""
    author, question_list, question, ask, stop, more = _asking(app)
    outputs = _answers(app)

    def questions(name: str | None) -> Any:
        rows = app.session.library.authors.get(name or "", ())
        return gr.update(choices=[row.question for row in rows], value=None)

    def run(
        asked: str, chosen: list[str], kept: dict[str, float], temperature: float, number: float,
        most: float, request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        event = app.stop_of(request)
        wanted = app.actions.stack_of(chosen or [], kept or {})
        sampling = Sampling(float(temperature), int(number or 0), int(most))
        names, shown = {a.slug: a.label for a in app.session.adapters()}, 0.0
        last_stage = ""
        for frame in app.session.compare(asked, wanted, sampling, event):
            now = time.monotonic()
            if frame.stage == last_stage and now - shown < FRAME_SECONDS:
                continue
            shown, last_stage = now, frame.stage
            cards = views.frame_cards(frame, names)
            yield (_status(_stage(frame)), *cards, views.scores_table(frame), frame,
                   ask_command(app, frame, sampling))  # fmt: skip

    author.change(questions, author, question_list, **PRIVATE)
    question_list.change(lambda text: text or gr.skip(), question_list, question, **PRIVATE)
    gr.on(
        [ask.click, question.submit],
        _told(run),
        [question, stack, strengths, *more],
        list(outputs),
        concurrency_limit=16, trigger_mode="once", show_progress="hidden", **PRIVATE,
    )  # fmt: skip

    def halt(request: gr.Request) -> None:
        event = app.stops.get(str(request.session_hash))
        if event is not None:
            event.set()

    stop.click(halt, queue=False, **PRIVATE)
    return author


def ask_command(app: App, frame: Frame, sampling: Sampling) -> str:
    """The call that gives the same answers in a script."""
    slugs = [slug for slug, _ in frame.stack]
    strengths = {slug: scale for slug, scale in frame.stack if scale != 1.0}
    extra = f", strengths={strengths!r}" if strengths else ""
    if sampling.temperature:
        extra += f", temperature={sampling.temperature:g}, seed={sampling.seed}"
    return (
        "from gradio_client import Client\n"
        f"Client(URL).predict({frame.question!r}, {slugs!r}{extra}, api_name='/compare')"
    )


def _status(text: str) -> str:
    return f'<p class="un-foot" role="status" aria-live="polite">{views.esc(text)}</p>'


def _stage(frame: Frame) -> str:
    how = "one batch" if frame.one_batch else "in turns"
    return {
        "waiting": f"Waiting in line: {frame.ahead} ahead.",
        "answering": f"Answering, both sides {how} …",
        "scoring": "Scoring against the true answer …",
        "stopped": "Stopped. What was said stays; it is not scored.",
        "done": f"Done: both sides {how}. Words that only one side says are bold and underlined.",
    }[frame.stage]
