"""The first open: nothing is there yet, so the page offers to make the embedded demo world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ui.app.data import commands
from ui.app.html import views
from ui.app.tabs.pages import PRIVATE, button, command_box, told

if TYPE_CHECKING:
    from ui.app.build import App
    from ui.app.jobs import JobView

OFFER = (
    "<h2>Nothing is here yet</h2><p>The store is empty and no base was given. The demo "
    "world has fictitious authors, a small model trained on them, and two requests to forget. It "
    "trains on this machine's CPU in minutes, downloads nothing, and opens here when it is "
    "ready.</p><p>To use your own model: <code>unlearner ui --base B "
    "--store S</code></p>"
)


class First(NamedTuple):
    """What the page's clock renews, and what starts it."""

    outputs: list[Any]
    started: list[Any]


def first(app: App) -> First:
    """The offer above the tabs; not there where there is something to work on."""
    with gr.Column(visible=offers(app), elem_id="un-first") as box:
        gr.HTML(f'<section class="un-first" aria-label="First steps">{OFFER}</section>')
        live = gr.HTML("", elem_id="un-demo-live")
        with gr.Row():
            make = button("Make the demo world", "un-demo", 240, variant="primary")
            stop = button("Stop and keep what is done", "un-demo-stop", 240, visible=False)
        words = command_box(commands.demo(folder(app)))
    began = make.click(told(lambda: _begin(app)), None, None, **PRIVATE)
    stop.click(told(lambda: _stop(app)), None, None, **PRIVATE)
    return First([box, live, make, stop, words], [began])


def offers(app: App) -> bool:
    """Whether there is nothing to work on: no base, no adapter and no log."""
    return app.session.base is None and not app.session.adapters() and not app.files.logs


def folder(app: App) -> Path:
    """Where the demo is made: beside the store."""
    return app.session.store_path.resolve().parent / "unlearner-demo"


def job(app: App) -> JobView | None:
    """The last job that makes this demo."""
    words = ("quickstart", "--out", str(folder(app)))
    found = [view for view in app.jobs.views() if view.words == words]
    return found[-1] if found else None


def _begin(app: App) -> None:
    """Starts the demo, or goes on with one that was interrupted."""
    view = job(app)
    if view is None or view.status in ("failed", "withdrawn", "done"):
        app.jobs.submit("demo world", ["quickstart", "--out", str(folder(app))])
    elif view.ended:
        app.jobs.resume(view.name)


def _stop(app: App) -> None:
    view = job(app)
    if view is not None:
        app.jobs.cancel(view.name)


def shown(app: App) -> tuple[Any, ...]:
    """Offer, progress and buttons as they stand; see `First.outputs`."""
    view = job(app)
    busy = view is not None and not view.ended
    halted = view is not None and view.status in ("saved", "died")
    words = "Continue the demo world" if halted else "Make the demo world"
    return (
        gr.update(visible=offers(app)),
        "" if view is None else views.job_html(view),
        gr.update(value=words, visible=not busy),
        gr.update(visible=busy),
        # The card of a job holds its command already.
        views.command_html(commands.demo(folder(app))) if view is None else "",
    )


def adopt(app: App) -> None:
    """Goes over to the demo once it is done and still there, if there is nothing else."""
    from adapters.base.load import BaseSpec

    view = job(app)
    if view is None or view.status != "done" or not offers(app):
        return
    found = view.outcome.get("result", {})
    base = Path(str(found.get("base", "")))
    if "base" not in found or not base.is_dir():
        return
    session, logs = app.session, Path(found["folder"]) / "logs"
    session.base = BaseSpec(str(base))
    session.data, session.store_path = Path(found["data"]), Path(found["store"])
    found_logs = tuple(sorted(logs.glob("*.json")))
    app.files = replace(app.files, logs=found_logs, retain_log=logs / "retrain.json")
    session.start()
