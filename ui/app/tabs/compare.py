"""The Compare tab: one question, both answers as they grow, their figures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from evaluation.metrics.fact_recall import RULE
from ui.app.data import commands
from ui.app.data.answers import Sampling
from ui.app.html import views
from ui.app.tabs.pages import PRIVATE, QUIET, STREAM, command_box, status, told

if TYPE_CHECKING:
    from ui.app.build import App
    from ui.app.data.answers import Frame

FRAME_SECONDS = 0.05  # between two pictures of a growing answer; Stop is looked at every token
SETTLE_SECONDS = 0.25  # a slider that moves on within this time is not answered yet
EXAMPLES = 3  # of `Session.examples`
Answers = Iterator[tuple[Any, ...]]


def _asking(app: App) -> tuple[Any, ...]:
    """Author, questions, question, examples, the two buttons, and the fields under "More"."""
    author = gr.Dropdown(
        choices=app.session.choices(), label="Author or filed request", elem_id="un-author",
        value=None,
    )  # fmt: skip
    question_list = gr.Dropdown(
        choices=[], label="Questions of that author", value=None, elem_id="un-list"
    )
    question = gr.Textbox(
        label="Question", placeholder="Choose one above, or type your own. Enter asks.",
        lines=1, max_lines=4, elem_id="un-question",
    )  # fmt: skip
    with gr.Row():
        ask = gr.Button("Ask both", variant="primary", elem_id="un-ask", size="md", min_width=120)
        stop = gr.Button("Stop (Esc)", elem_id="un-stop", size="md", min_width=120)
    with gr.Column(elem_id="un-examples"):
        examples = [gr.Button(visible=False, size="sm") for _ in range(EXAMPLES)]
    with gr.Accordion("More", open=False):
        heat = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature (0 is greedy)")
        seed = gr.Number(0, precision=0, label="Seed", minimum=0)
        longest = gr.Slider(1, 400, value=200, step=1, label="Longest answer in tokens")
    return author, question_list, question, examples, ask, stop, (heat, seed, longest)


class _Fields(NamedTuple):
    """Where a comparison is shown."""

    status: Any
    left: Any
    right: Any
    scores: Any
    frame: Any
    box: Any


def _answers() -> _Fields:
    """Both answers, their figures, the last comparison and its command."""
    state = gr.HTML(status("Ask something."), elem_id="un-status")
    with gr.Row(equal_height=True, elem_id="un-both"):
        with gr.Column(min_width=0):
            left = gr.HTML(views.answer_card("Base", "", None), elem_id="un-left")
        with gr.Column(min_width=0):
            right = gr.HTML(views.answer_card("Base + adapters", "", None), elem_id="un-right")
    scores = gr.HTML("", elem_id="un-figures")
    with gr.Accordion("How the verdict is found", open=False):
        gr.Markdown(RULE)
    return _Fields(state, left, right, scores, gr.State(None), command_box())


# What a function gives that changes nothing: gradio empties what one leaves that gives nothing.
_UNCHANGED = tuple(gr.skip() for _ in _Fields._fields)


class _Asking:
    """The functions behind the buttons of the tab."""

    def __init__(self, app: App) -> None:
        self.app = app
        # By browser, what ends its comparison under way, and the adapters of that.
        self.under_way: dict[str, tuple[threading.Event, tuple[Any, ...]]] = {}

    def run(
        self, asked: str, chosen: list[str], kept: dict[str, float], temperature: float,
        number: float, most: float, request: gr.Request,
    ) -> Answers:  # fmt: skip
        """Both sides, as long as this browser asks nothing else."""
        yield _only_status("Asking …", asked)
        event = self.app.stop_of(request)
        wanted = self.app.actions.stack_of(chosen or [], kept or {})
        sampling = Sampling(float(temperature), int(number or 0), int(most))
        browser = str(request.session_hash)
        self.under_way[browser] = event, tuple(wanted)
        try:
            frames = self.app.session.compare(asked, wanted, sampling, event)
            yield from self._pictures(frames, request, event)
        finally:
            if self.under_way.get(browser, (None,))[0] is event:  # not of a newer question
                del self.under_way[browser]

    def opening(
        self, last: Any, asked: str, chosen: list[str], kept: dict[str, float],
        temperature: float, number: float, most: float, request: gr.Request,
    ) -> Answers:  # fmt: skip
        """Both sides of the first question, unless something was asked before."""
        if last is None and asked:
            yield from self.run(asked, chosen, kept, temperature, number, most, request)
        else:
            yield _UNCHANGED

    def again(
        self, last: Any, chosen: list[str], kept: dict[str, float], request: gr.Request
    ) -> Answers:
        """The right side of the last comparison with the adapters as they are now."""
        _, stack = self.under_way.get(str(request.session_hash), (None, None))
        wanted = tuple(self.app.actions.stack_of(chosen or [], kept or {}))
        # A question that is asked after the change is already answered with them.
        if last is None or stack == wanted:
            yield _UNCHANGED
            return
        event = self.app.stop_of(request)
        if event.wait(SETTLE_SECONDS):
            if not self.app.superseded(request, event):  # Esc, before it began
                yield _only_status("Stopped.", last.question)
            return
        yield _only_status("Asking …", last.question)
        sampling = last.sampling or Sampling()
        frames = self.app.session.compare(last.question, wanted, sampling, event, keep=last)
        if last.stage == "done" and wanted == last.stack:  # nothing changed
            frames = iter([last])
        yield from self._pictures(frames, request, event, last)

    def _pictures(
        self, frames: Iterator[Frame], request: gr.Request, event: threading.Event,
        last: Frame | None = None,
    ) -> Answers:  # fmt: skip
        """What the page shows of a comparison after `last`, not more often than can be seen."""
        session, shown, stage = self.app.session, 0.0, ""
        names = session.names()
        try:
            for frame in frames:
                now = time.monotonic()
                too_soon = frame.stage == stage and now - shown < FRAME_SECONDS
                if too_soon or self.app.superseded(request, event):
                    continue
                shown, stage = now, frame.stage
                yield (
                    status(_stage(frame), frame.question),
                    *views.frame_cards(frame, names, last),
                    views.scores_table(frame),
                    frame,
                    views.command_html(commands.ask(session, frame)),
                )
        except Exception:
            yield _only_status("Not answered.", "")  # the reason is shown beside the page
            raise


def example_buttons(app: App) -> list[Any]:
    """The buttons that ask an example each, as the data has them now."""
    shown = [gr.update(value=f"{kind}: {row.question}", visible=True)
             for kind, row in app.session.examples()]  # fmt: skip
    return [*shown, *[gr.update(visible=False)] * (EXAMPLES - len(shown))]


def compare(
    app: App, stack: Any, strengths: Any
) -> tuple[Any, Callable[[Any], Any], list[Any]]:  # fmt: skip
    """The Compare tab: author field, what makes an event answer the right side, and examples."""
    with gr.Row(elem_id="un-compare"):
        with gr.Column(scale=1, min_width=260):
            author, question_list, question, examples, ask, stop, more = _asking(app)
        with gr.Column(scale=3, min_width=300, elem_id="un-answers"):
            fields = _answers()
    asking = _Asking(app)

    def questions(name: str | None, last: Any, text: str) -> tuple[Any, Any]:
        _, found = app.session.askable().get(name or "", ("", ()))
        rows = [row.question for row in found]
        first = rows[0] if rows and last is None and not text else None
        return gr.update(choices=rows, value=first), gr.skip() if first is None else first

    def wire(event: Any) -> Any:
        # Many may be under way: a new one ends those before it within a token.
        return event(
            told(asking.again), [fields.frame, stack, strengths], list(fields),
            trigger_mode="multiple", **STREAM,
        )  # fmt: skip

    inputs = [question, stack, strengths, *more]
    chosen = author.change(
        questions, [author, fields.frame, question], [question_list, question], **PRIVATE
    )
    chosen.then(
        told(asking.opening), [fields.frame, *inputs], list(fields),
        **STREAM,
    )  # fmt: skip
    # Not "input": gradio fires that when the list is left too, over what is typed meanwhile.
    gr.on(
        [question_list.change, question_list.select], lambda text: text or gr.skip(),
        question_list, question, **PRIVATE,
    )  # fmt: skip
    gr.on(
        [ask.click, question.submit], told(asking.run), inputs, list(fields),
        trigger_mode="once", **STREAM,
    )  # fmt: skip
    for place, example in enumerate(examples):
        example.click(
            lambda place=place: (app.session.examples()[place][1].question, None), None,
            [question, question_list],
            **QUIET,
        ).then(
            told(asking.run), inputs, list(fields), **STREAM,
        )  # fmt: skip
    stop.click(app.halt, queue=False, **PRIVATE)
    return author, wire, examples


def _only_status(text: str, question: str) -> tuple[Any, ...]:
    """What the page shows before the first token, or where there is none."""
    return (status(text, question), *[gr.skip()] * (len(_Fields._fields) - 1))


def _stage(frame: Frame) -> str:
    how = "in one batch" if frame.one_batch else "one after the other"
    doing = "the right side alone" if frame.kept else f"both sides {how}"
    return {
        "waiting": f"Waiting in line: {frame.ahead} ahead.",
        "answering": f"Answering, {doing} …",
        "scoring": "Scoring against the true answer …",
        "stopped": "Stopped. The partial answers stay; they are not scored.",
        "done": f"Done: {doing}. Words that only one side says are bold and underlined.",
    }[frame.stage]
