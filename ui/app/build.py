"""The app: every page and its events. Logic lives in modules that know nothing of gradio."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from adapters.errors import UserError
from ui.app import guard
from ui.app.actions import Actions
from ui.app.data.requests import Planned
from ui.app.data.runs import Sources
from ui.app.html import views
from ui.app.jobs import Jobs
from ui.app.style import page_css, page_head, theme
from ui.app.tabs import compare as app_compare
from ui.app.tabs import first as app_first
from ui.app.tabs import request as app_request
from ui.app.tabs import runs as app_runs
from ui.app.tabs import sheet as app_sheet
from ui.app.tabs import stack as app_stack
from ui.app.tabs.pages import PRIVATE, QUIET, note, told

if TYPE_CHECKING:
    from ui.app.session import Session

LOCAL = "127.0.0.1"


@dataclass
class App:
    """What the pages share: session, jobs, files, and each browser's stop button.

    `planned` tells what a `forget` command would do, as `requests.look` needs it; the command line
    is passed in, because the app imports nothing of it.
    """

    session: Session
    jobs: Jobs
    planned: Callable[[Sequence[str]], Planned]
    files: Sources = field(default_factory=Sources)
    stops: dict[str, dict[str, threading.Event]] = field(default_factory=dict)
    scratch: Path | None = None

    @property
    def actions(self) -> Actions:
        """What a page can ask."""
        return Actions(self.session, self.jobs, self.sources)

    def sources(self) -> Sources:
        """Where the Runs tab reads."""
        return replace(self.files, store=self.session.store())

    def stop_of(self, request: gr.Request, what: str = "answer") -> threading.Event:
        """A new stop button for this browser's next answer; what was being answered ends."""
        mine = self.stops.setdefault(str(request.session_hash), {})
        if what in mine:
            mine[what].set()
        event = mine[what] = threading.Event()
        return event

    def superseded(self, request: gr.Request, event: threading.Event) -> bool:
        """Whether this browser has asked for something else meanwhile."""
        return self.stops.get(str(request.session_hash), {}).get("answer") is not event

    def halt(self, request: gr.Request) -> None:
        """Ends what this browser waits for."""
        for event in list(self.stops.get(str(request.session_hash), {}).values()):
            event.set()

    def leave(self, request: gr.Request) -> None:
        """Nobody reads on: the answer that is being written ends."""
        self.halt(request)
        self.stops.pop(str(request.session_hash), None)

    def new_file(self, name: str) -> Path:
        """A path for a download, in a private folder: `scratch`, where one was given."""
        return Path(tempfile.mkdtemp(prefix="unlearner-", dir=self.scratch)) / name


def _strengths(app: App, stack: Any, strengths: Any, again: list[Callable[[Any], Any]]) -> None:
    """A slider for every adapter that is on; the right side answers again when one is moved.

    `again` holds the function that wires an event to that, once the Compare tab is built.
    """
    with gr.Accordion("Strength of each adapter", open=False, elem_id="un-strengths"):

        @gr.render(inputs=stack)  # type: ignore[untyped-decorator]
        def sliders(chosen: list[str]) -> None:
            if not chosen:
                gr.Markdown("No adapter is on.")
            names = app.session.names()
            for slug in chosen or []:
                slider = gr.Slider(
                    0, 1.5, value=dict(app.session.filed_stack()).get(slug, 1.0), step=0.05,
                    label=f"Strength of {names.get(slug, slug)}", key=f"strength-{slug}",
                    interactive=True,
                )  # fmt: skip
                # A change, not the mouse's release: arrow keys move it too. While one is noted
                # only the last of the others is kept.
                noted = slider.change(
                    lambda kept, value, slug=slug: {**(kept or {}), slug: value},
                    [strengths, slider], strengths,
                    **QUIET, trigger_mode="always_last",
                )  # fmt: skip
                again[0](noted.then)


def build(app: App) -> gr.Blocks:
    """All pages."""
    with gr.Blocks(title="unlearner", analytics_enabled=False) as page:
        _fill(app, page)
    return page


def _fill(app: App, page: gr.Blocks) -> None:
    head = gr.HTML(_head(app), elem_id="un-head")
    first = app_first.first(app)
    again: list[Callable[[Any], Any]] = []
    with gr.Row(equal_height=True, elem_id="un-bar"):
        stack = gr.CheckboxGroup(
            choices=app.session.switchable(), value=app.session.on(),
            label="Adapters used for the right-hand answer", info=_about_adapters(app),
            elem_id="un-stack", scale=5, min_width=260,
        )  # fmt: skip
        strengths = gr.State({})
        clear = gr.Button("Clear = base", elem_id="un-clear", size="md", scale=1, min_width=120)
    _strengths(app, stack, strengths, again)
    logs_alone = bool(app.files.logs) and app.session.base is None
    with gr.Tabs(selected="runs" if logs_alone else "compare"):
        with gr.Tab("Compare", id="compare"):
            compare, wire, examples = app_compare.compare(app, stack, strengths)
            again.append(wire)
        with gr.Tab("Author sheet", id="sheet"):
            sheet_author = app_sheet.sheet(app, stack, strengths)
        with gr.Tab("Stack", id="stack") as stack_tab:
            show_stack, stack_outputs = app_stack.stack(app, stack)
        with gr.Tab("Runs", id="runs") as runs_tab:
            read_runs, runs_outputs = app_runs.runs(app, page)
        with gr.Tab("New request", id="request"):
            request = app_request.request(app)
    wire(stack.input)
    wire(clear.click(lambda: [], outputs=stack, **PRIVATE).then)
    stack_tab.select(told(show_stack), None, stack_outputs, **QUIET)
    runs_tab.select(told(read_runs), None, runs_outputs, **QUIET)
    authors = [compare, sheet_author, request.author]
    _keep_fresh(app, page, [head, stack, *authors, *examples], (request, first))
    page.unload(app.leave)
    for name in ("compare", "stack", "activate", "revert", "clear", "sheet", "runs", "jobs"):
        gr.api(told(getattr(app.actions, name)), api_name=name)


def _keep_fresh(app: App, page: gr.Blocks, outputs: list[Any], watched: tuple[Any, Any]) -> None:
    """Header, adapters, authors and jobs: once a second while something is under way."""
    timer, seen = gr.Timer(1.0), gr.State(("", "", False))
    request, first = watched

    def look(chosen: list[str], last: tuple[str, str, bool]) -> tuple[Any, ...]:
        busy = app_request.advance(app)
        opened = last[2] or (app.session.state == "ready" and bool(app.session.askable()))
        # A page that comes back shows the job that goes on.
        busy_job = None if last[0] else app_request.under_way(app)
        now = (str(app.session.store_path), repr((_head(app), app.session.switchable())), opened)
        # An open list would close under the reader's hand: it is filled only where it must be.
        parts = (
            [gr.skip()] * len(outputs)
            if now == last
            else _renewed(app, chosen, now[0] == last[0], last[2])
        )
        return (
            *parts,
            *app_request.shown(app, **({"value": busy_job} if busy_job else {})),
            *app_first.shown(app),
            gr.Timer(active=busy or app.session.state == "loading"),
            now,
        )

    every = [*outputs, *request.outputs, *first.outputs, timer, seen]
    both = {"inputs": [outputs[1], seen], "outputs": every}
    timer.tick(told(look), **both, **QUIET)
    page.load(told(look), **both, **QUIET)
    wake = {"fn": lambda: gr.Timer(active=True), "inputs": None, "outputs": timer}
    for begun in (*request.started, *first.started):
        begun.then(**wake, **QUIET)


def _renewed(app: App, chosen: list[str], same_store: bool, opened: bool) -> list[Any]:
    """Header, adapters and the three lists of authors; ticks stay while the store is the same."""
    choices = app.session.switchable()
    known = [slug for _, slug in choices]
    kept = [slug for slug in chosen or [] if slug in known]
    asked, authors = app.session.choices(), list(app.session.library.authors)
    # A new page opens with an answer: the first request is chosen, and that asks once.
    ready = app.session.state == "ready"
    opening = {"value": asked[0][1]} if asked and not opened and ready else {}
    return [
        _head(app),
        gr.update(
            choices=choices,
            value=kept if same_store else app.session.on(),
            info=_about_adapters(app),
        ),
        gr.update(choices=asked, **opening),
        gr.update(choices=asked, **opening),
        gr.update(choices=authors),
        *app_compare.example_buttons(app),
    ]


def _about_adapters(app: App) -> str:
    """What the ticks above the tabs are, or how to get something to tick."""
    if not app.session.switchable():
        return "The store has none yet: New request makes one."
    text = "They add up, in any order. For this page only: the Stack tab changes the store."
    if app.session.library.authors and not app.session.filed():
        text += (
            " Whose rows they forget cannot be shown: they were filed with another key, or the "
            "data does not hold those rows."
        )
    return text


def _head(app: App) -> str:
    session = app.session
    base = session.base.name if session.base else "no base named"
    state = {
        "ready": "ready",
        "loading": "loading the base …",
        "resting": "resting: a training uses the GPU",
        "failed": f"not loaded: {session.problem}",
        "no base": "loading the base …" if session.base else "no model: start with --base B",
    }[session.state]
    problem = note(session.library.note) if session.library.note else ""
    return (
        f'<header class="un-head"><h1>unlearner</h1><p>{views.esc(Path(base).name)}, store '
        f'{views.esc(session.store_path)}</p><p role="status" id="un-state">{views.esc(state)}</p>'
        f"</header>{problem}"
    )


def check_address(host: str, auth: object) -> None:
    """Refuses to listen beyond this machine without passwords.

    Raises:
        UserError: `host` is no loopback address and `auth` is empty.
    """
    if not guard.is_loopback(host) and not auth:
        raise UserError(
            f"Without a password, anyone who can reach {host or 'this machine'} could use the app.",
            "Pass --auth FILE with lines of name:password, or omit --host.",
        )


def launch(
    app: App, *, host: str = LOCAL, port: int | None = None,
    auth: list[tuple[str, str]] | None = None, open_browser: bool = False,
) -> tuple[gr.Blocks, str]:  # fmt: skip
    """The running page and its address; it is up before the base is loaded.

    Raises:
        UserError: another address without `auth`, or a port that is taken.
    """
    check_address(host, auth)
    page = build(app)
    page.queue(default_concurrency_limit=16)
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, auth=auth, inbrowser=open_browser, share=False,
            run_history=False, prevent_thread_lock=True, quiet=True, footer_links=["api"],
            allowed_paths=[], max_file_size="6mb", theme=theme(), css=page_css(), head=page_head(),
            enable_monitoring=False, ssr_mode=False, mcp_server=False,
            app_kwargs={"middleware": guard.middleware(host, app.scratch)},
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"The page cannot be opened: {error}", "Choose another --port.") from error
    app.session.start()
    return page, str(url)
