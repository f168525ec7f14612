"""The blind vote: both answers behind letters, and nothing else of them on the page until then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from adapters.errors import UserError
from ui.app.data import same, votes
from ui.app.html import views
from ui.app.tabs.pages import PRIVATE, told

if TYPE_CHECKING:
    from ui.app.build import App
    from ui.app.session import Frame

HIDDEN = "Hidden until you have voted."
Frames = Callable[..., Iterator["Frame"]]


class _Ballots:
    """The functions behind the vote."""

    def __init__(self, app: App, frames: Frames, status: Callable[[Any], str]) -> None:
        self.app, self._frames, self._status = app, frames, status

    def begin(
        self, asked: str, chosen: list[str], kept: dict[str, float], temperature: float,
        number: float, most: float, request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Asks with both sides hidden, then deals them out."""
        hidden = views.answer_card("Hidden", HIDDEN, None)
        empty = [views.answer_card(letter, "", None) for letter in "AB"]
        last: Any = None
        stage = ""
        for frame in self._frames(asked, chosen, kept, temperature, number, most, request):
            last = frame
            if frame.stage != stage:
                stage = frame.stage
                yield (self._status(frame), hidden, hidden, "", None, "", *empty, None, None, "")
        if last is None or last.stage not in ("done", "stopped"):  # something else was asked
            return
        made = votes.ballot(last.question, last.base.text, last.unlearned.text, last.stack)
        cards = [
            views.answer_card(letter, views.esc(text), None)
            for letter, text in zip("AB", made.texts, strict=True)
        ]
        words = views.command_html(same.vote(self.app.session, last, self.app.votes))
        yield (self._status(last), hidden, hidden, "", None, words, *cards, None, (made, last), "")

    def cast(self, held: Any, chosen: str | None) -> tuple[Any, ...]:
        """Keeps the vote, and shows which side was which."""
        if held is None:
            raise UserError("There is no ballot.", "Ask blind first.")
        made, frame = held
        line = votes.cast(self.app.votes, made, chosen or "")
        names = {adapter.slug: adapter.label for adapter in self.app.session.adapters()}
        cards = views.frame_cards(frame, names)
        return _result(line, self.app.votes), None, frame, *cards, views.scores_table(frame)


def vote(app: App, frames: Frames, status: Callable[[Any], str]) -> Callable[..., None]:
    """The fields of the vote; what it gives back wires them to the Compare tab.

    `frames` answers a question for this browser, `status` is a comparison's state in words.
    """
    with gr.Accordion("Blind vote: which answer knows more?", open=False):
        gr.Markdown(
            "Asks the question above anew and shows the answers as A and B. Which side is which "
            "is told after the vote."
        )
        start = gr.Button("Ask blind", size="sm", elem_id="un-blind")
        with gr.Row():
            with gr.Column(min_width=300):
                a = gr.HTML(views.answer_card("A", "", None), elem_id="un-a")
            with gr.Column(min_width=300):
                b = gr.HTML(views.answer_card("B", "", None), elem_id="un-b")
        choice = gr.Radio(list(votes.CHOICES), label="Your vote")
        give = gr.Button("Vote", size="sm")
        said = gr.HTML("")
    given, behind = gr.State(None), _Ballots(app, frames, status)

    def wire(inputs: list[Any], cards: list[Any], frame_state: Any, box: Any) -> None:
        """`cards` are the Compare tab's status, left, right and figures."""
        start.click(
            told(behind.begin), inputs,
            [*cards, frame_state, box, a, b, choice, given, said],
            concurrency_limit=16, trigger_mode="once", show_progress="hidden", **PRIVATE,
        )  # fmt: skip
        give.click(
            told(behind.cast), [given, choice], [said, given, frame_state, *cards[1:]], **PRIVATE
        )

    return wire


def _result(line: dict[str, Any], path: Path) -> str:
    tally = ", ".join(f"{name} {n}" for name, n in votes.count(path).items())
    return (
        f'<p class="un-note" role="status">A was the {views.esc(line["a"])}. Your vote: '
        f"{views.esc(line['winner'])}. So far: {views.esc(tally)} (in {views.esc(path)}).</p>"
    )
