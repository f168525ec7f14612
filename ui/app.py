"""The app: every page and its events. Logic lives in modules that know nothing of gradio."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from adapters.errors import UserError
from ui import app_compare, app_pages, app_recorded, app_request, views
from ui.actions import Actions
from ui.jobs import Jobs
from ui.style import CSS, HEAD

if TYPE_CHECKING:
    from ui.recorded import Recorded
    from ui.session import Session

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
LOCAL = ("127.0.0.1", "localhost", "::1")
LOG = logging.getLogger("unlearner.app")


@dataclass
class App:
    """What the pages share: session, jobs, files, and each browser's stop button."""

    session: Session
    jobs: Jobs
    logs: tuple[Path, ...] = ()
    retain_log: Path | None = None
    votes: Path = Path("votes.jsonl")
    stops: dict[str, threading.Event] = field(default_factory=dict)

    @property
    def actions(self) -> Actions:
        """What a page can ask."""
        return Actions(self.session)

    def stop_of(self, request: gr.Request) -> threading.Event:
        """A new stop button for this browser's next answer."""
        event = self.stops[str(request.session_hash)] = threading.Event()
        return event


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


def build(app: App, recorded: Recorded | None = None) -> gr.Blocks:
    """All pages; with `recorded` the page of recorded answers, without a model."""
    with gr.Blocks(title="unlearner", analytics_enabled=False) as page:
        if recorded is not None:
            app_recorded.build(app, recorded)
        else:
            _live(app, page)
    return page


def _strengths(app: App, stack: Any, strengths: Any) -> None:
    """A slider for every adapter that is on; it acts on the next answer."""
    with gr.Accordion("Strength of each adapter", open=False):

        @gr.render(inputs=stack)  # type: ignore[untyped-decorator]
        def sliders(chosen: list[str]) -> None:
            if not chosen:
                gr.Markdown("No adapter is on.")
            for slug in chosen or []:
                slider = gr.Slider(
                    0, 1.5, value=dict(app.session.filed_stack()).get(slug, 1.0), step=0.05,
                    label=f"Strength of {labels(app).get(slug, slug)}", key=f"strength-{slug}",
                )  # fmt: skip
                slider.change(
                    lambda kept, value, slug=slug: {**(kept or {}), slug: value},
                    [strengths, slider], strengths, **PRIVATE, show_progress="hidden",
                )  # fmt: skip


def _live(app: App, page: gr.Blocks) -> None:
    head = gr.HTML(_head(app), elem_id="un-head")
    with gr.Row(equal_height=True, elem_id="un-bar"):
        stack = gr.CheckboxGroup(
            choices=_choices(app), value=_on(app), label="Adapters on the right side",
            info="They add up: their order does not matter. Trying one out here files nothing.",
            elem_id="un-stack", scale=5, min_width=260,
        )  # fmt: skip
        strengths = gr.State({})
        clear = gr.Button("Clear = base", elem_id="un-clear", size="md", scale=1, min_width=120)
    _strengths(app, stack, strengths)
    with gr.Tabs():
        with gr.Tab("Compare", id="compare"):
            compare = app_compare.compare(app, stack, strengths)
        with gr.Tab("Author sheet", id="sheet"):
            sheet_author = app_pages.sheet(app, stack, strengths)
        with gr.Tab("Stack", id="stack"):
            app_pages.stack(app, stack, head, _choices, _on)
        with gr.Tab("Runs", id="runs"):
            app_pages.runs(app, page)
        with gr.Tab("New request", id="request"):
            request_author = app_request.request(app, page)
    clear.click(lambda: [], outputs=stack, **PRIVATE)
    outputs = [head, stack, compare, sheet_author, request_author]
    timer = gr.Timer(1.0)

    def refresh(chosen: list[str], seen: bool) -> tuple[Any, ...]:
        """Header, adapters and authors, until the base is loaded."""
        names = list(app.session.library.authors)
        loading = app.session.state == "loading"
        known = [slug for _, slug in _choices(app)]
        kept = [slug for slug in chosen or [] if slug in known]
        return (
            _head(app),
            gr.update(choices=_choices(app), value=kept if seen else _on(app)),
            *[gr.update(choices=names) for _ in range(3)],
            gr.Timer(active=loading),
            True,
        )

    fresh = gr.State(False)
    both = {"inputs": [stack, fresh], "outputs": [*outputs, timer, fresh]}
    timer.tick(refresh, **both, **PRIVATE, show_progress="hidden")
    page.load(refresh, **both, **PRIVATE, show_progress="hidden")
    page.unload(_forget_stops(app))
    for name in ("compare", "stack", "activate", "revert", "clear", "sheet"):
        gr.api(told(getattr(app.actions, name)), api_name=name)


def _forget_stops(app: App) -> Callable[[gr.Request], None]:
    def left(request: gr.Request) -> None:
        """Nobody reads on: the answer that is being written ends."""
        event = app.stops.pop(str(request.session_hash), None)
        if event is not None:
            event.set()

    return left


def labels(app: App) -> dict[str, str]:
    """What people call each adapter, by slug."""
    return {adapter.slug: adapter.label for adapter in app.session.adapters()}


def _choices(app: App) -> list[tuple[str, str]]:
    """What can be switched on: label and slug of all whole adapters, the newest last."""
    off = ("quarantined", "purged", "superseded")
    return [
        (adapter.label, adapter.slug)
        for adapter in app.session.adapters()
        if adapter.status not in off and not adapter.problem
    ]


def _on(app: App) -> list[str]:
    return [slug for slug, _ in app.session.filed_stack()]


def _head(app: App) -> str:
    session = app.session
    base = session.base.name if session.base else "no base named"
    state = {
        "ready": "ready",
        "loading": "loading the base …",
        "resting": "resting: a training uses the GPU",
        "failed": f"not loaded: {session.problem}",
        "no base": "no model: start with --base, or make the demo world under “New request”",
    }[session.state]
    note = (
        f'<p class="un-note">{views.esc(session.library.note)}</p>' if session.library.note else ""
    )
    return (
        f'<header class="un-head"><h1>unlearner</h1><p>{views.esc(Path(base).name)}, '
        f'{views.esc(session.store_path)}</p><p role="status" id="un-state">{views.esc(state)}</p>'
        f"</header>{note}"
    )


def theme() -> Any:
    """Neutral, one accent, fonts of the system: nothing is fetched."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    accent = gr.themes.Color(
        "#eef5fa", "#d9e9f4", "#b5d3e8", "#8fc7ee", "#4f97c6", "#1f5f8b", "#1b5680", "#174a6d",
        "#123b57", "#0e2f46", "#0a2234", name="unlearner",
    )  # fmt: skip
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
    return gr.themes.Default(
        primary_hue=accent, neutral_hue="slate", font=fonts, font_mono=mono
    ).set(
        button_primary_background_fill="#1f5f8b",
        button_primary_background_fill_dark="#1f5f8b",
        button_primary_background_fill_hover="#174a6d",
        button_primary_background_fill_hover_dark="#2a76ab",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
    )


def check_address(host: str, auth: object) -> None:
    """Refuses to open the page to others without a password.

    Raises:
        UserError: another address than this machine's, and nobody has to log in.
    """
    if host not in LOCAL and not auth:
        raise UserError(
            f"At {host} everybody who reaches this machine could use the app.",
            "Give --auth FILE with lines of name:password, or leave --host away.",
        )


def launch(
    app: App, *, recorded: Recorded | None = None, host: str = LOCAL[0], port: int | None = None,
    auth: list[tuple[str, str]] | None = None, open_browser: bool = False,
) -> tuple[gr.Blocks, str]:  # fmt: skip
    """The running page and its address; it is up before the base is loaded.

    Raises:
        UserError: another address without `auth`, or a port that is taken.
    """
    check_address(host, auth)
    page = build(app, recorded)
    page.queue(default_concurrency_limit=16)
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, auth=auth, inbrowser=open_browser, share=False,
            run_history=False, prevent_thread_lock=True, quiet=True, footer_links=["api"],
            allowed_paths=[], max_file_size="6mb", theme=theme(), css=CSS, head=HEAD,
            enable_monitoring=False, ssr_mode=False, mcp_server=False,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"The page cannot be opened: {error}", "Choose another --port.") from error
    if recorded is None:
        app.session.start()
    return page, str(url)
