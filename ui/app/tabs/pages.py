"""What the tabs share: errors as sentences, commands to copy, notes, files."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from adapters.errors import UserError
from ui.app.data.sheet import comparator
from ui.app.html import views

if TYPE_CHECKING:
    from ui.app.build import App
    from ui.app.data.sheet import SheetRow

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}  # what is shown says it itself
STREAM: dict[str, Any] = {**QUIET, "concurrency_limit": 16}  # an answer as it grows, each browser's
# Not "copy": a copied cell may be a formula for a spreadsheet, which the CSV guards against.
TABLE_BUTTONS: list[Any] = ["fullscreen"]
LOG = logging.getLogger("unlearner.app")


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors reach the page as a sentence; nothing of a question is logged."""

    @contextlib.contextmanager
    def sentences() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            said = gr.Error(str(error), title="That did not work", print_exception=False)
            raise said from None
        except Exception as error:
            debug = LOG.isEnabledFor(logging.DEBUG)
            # A message may quote a question: without --debug only its type is logged.
            name, shown = type(error).__name__, error if debug else None
            LOG.error("%s in %s", name, function.__name__, exc_info=shown)
            place = "The terminal shows the traceback."
            if not debug:
                place = (
                    "Start `unlearner ui --debug` to see the traceback; `unlearner doctor` checks "
                    "this machine."
                )
            text = f"{name}. {place}"
            raise gr.Error(text, title="Unexpected error", print_exception=False) from None

    if not inspect.isgeneratorfunction(function):
        return sentences()(function)

    @functools.wraps(function)
    def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with sentences():
            yield from function(*args, **kwargs)

    return stream


def command_box(value: str = "") -> gr.HTML:
    """Where `views.command_html` stands, once there is a command."""
    return gr.HTML(views.command_html(value), elem_classes="un-command-box")


def button(text: str, name: str, width: int, **more: Any) -> gr.Button:
    """A button that is as wide as its words need."""
    return gr.Button(text, elem_id=name, size="md", scale=0, min_width=width, **more)


def note(text: str) -> str:
    """A sentence that stands out."""
    return f'<p class="un-note">{views.esc(text)}</p>'


def status(text: str, question: str = "") -> str:
    """What is being done, told to a screen reader too; `question` is what it is about."""
    asked = f'<h2 class="un-asked">{views.esc(question)}</h2>' if question else ""
    return (
        f'{asked}<p class="un-foot" role="status" aria-live="polite" '
        f'data-question="{views.esc(question)}">{views.esc(text)}</p>'
    )


def comparator_file(app: App, rows: Sequence[SheetRow], names: tuple[str, str]) -> str:
    """A file in LLM Comparator's JSON; for <https://pair-code.github.io/llm-comparator/>."""
    path = app.new_file("comparator.json")
    path.write_text(json.dumps(comparator(rows, names)), encoding="utf-8")
    return str(path)
