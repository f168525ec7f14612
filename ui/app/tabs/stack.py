"""The Stack tab: what is filed, what is on, and what the model says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gradio as gr

from adapters.errors import UserError
from ui.app.data import commands
from ui.app.html import views
from ui.app.tabs.pages import PRIVATE, command_box, note, told

if TYPE_CHECKING:
    from ui.app.build import App


class _Changes:
    """The functions behind the tab; `choices` and `on` are the ticks above the tabs."""

    def __init__(
        self, app: App, choices: Callable[[Any], Any], on: Callable[[Any], Any]
    ) -> None:  # fmt: skip
        self.app, self._choices, self._on = app, choices, on

    def shown(self, action: str, ref: str = "", strength: float = 1.0) -> tuple[Any, ...]:
        """Everything as it is after `action`, read back, with its command."""
        app = self.app
        return (
            _listing(app), _read(app), gr.update(choices=_all(app)),
            views.command_html(commands.change(app.session, action, ref, strength)),
            gr.update(choices=self._choices(app), value=self._on(app)), gr.update(visible=False),
        )  # fmt: skip

    def switch_on(self, name: str | None, strength: float) -> tuple[Any, ...]:
        """Switches one on."""
        self.app.actions.activate(_chosen(name), float(strength))
        return self.shown("activate", _chosen(name), float(strength))

    def ask(self, name: str | None) -> tuple[Any, ...]:
        """The question before one is switched off."""
        text = (
            f"Switch {self.app.session.names()[_chosen(name)]} off? The model is then exactly as "
            "without it; its files stay, and it can be switched on again. Adapters trained on top "
            "of it become stale."
        )
        return gr.update(visible=True), note(text), name

    def ask_all(self) -> tuple[Any, ...]:
        """The question before everything is switched off."""
        text = "Switch everything off? What then answers is the bare base, bit for bit."
        return gr.update(visible=True), note(text), "*"

    def confirmed(self, name: str) -> tuple[Any, ...]:
        """Switches off what was asked about."""
        if name == "*":
            self.app.actions.clear()
            return self.shown("clear")
        self.app.actions.revert(name)
        return self.shown("revert", name)

    def look(self) -> tuple[Any, ...]:
        """Reads the model back."""
        return self.shown("list")

    def opened(self) -> tuple[Any, ...]:
        """What is renewed when the tab is opened: no model is asked for that."""
        command = views.command_html(commands.change(self.app.session, "list"))
        adapters = _all(self.app)
        return (
            _listing(self.app), gr.update(choices=adapters), command,
            gr.update(visible=bool(adapters)),
        )  # fmt: skip


def stack(
    app: App, chosen: Any, choices: Callable[[Any], Any], on: Callable[[Any], Any]
) -> tuple[Callable[[], Any], list[Any]]:  # fmt: skip
    """The Stack tab; what renews it, and the fields that does."""
    listing = gr.HTML(_listing(app), elem_id="un-adapters")
    read = gr.HTML("", elem_id="un-read-back")
    size: dict[str, Any] = {"size": "md", "scale": 0, "min_width": 150}
    with gr.Column(visible=bool(_all(app))) as controls:
        with gr.Row():
            ref = gr.Dropdown(
                choices=_all(app),
                label="Adapter",
                value=_likely(app),
                elem_id="un-ref",
                min_width=260,
            )
            strength = gr.Slider(
                0, 1.5, value=1.0, step=0.05, label="Strength, 1 is as trained", min_width=260
            )
        with gr.Row():
            switch_on = gr.Button("Switch on", variant="primary", elem_id="un-on", **size)
            off = gr.Button("Switch off …", elem_id="un-revert", **size)
            nothing = gr.Button("Switch all off …", elem_id="un-clear-filed", **size)
            look = gr.Button("Check the model", elem_id="un-look", **size)
    asking, about, yes, no = _confirmation()
    pending, box = gr.State(""), command_box()
    behind = _Changes(app, choices, on)
    outputs = [listing, read, ref, box, chosen, asking]
    switch_on.click(told(behind.switch_on), [ref, strength], outputs, **PRIVATE)
    # The question is hidden until it is there: what is seen at once is seen on the list.
    asks: dict[str, Any] = {"show_progress_on": listing, **PRIVATE}
    off.click(told(behind.ask), ref, [asking, about, pending], **asks)
    nothing.click(told(behind.ask_all), None, [asking, about, pending], **asks)
    yes.click(told(behind.confirmed), pending, outputs, **PRIVATE)
    no.click(lambda: gr.update(visible=False), None, asking, **PRIVATE)
    look.click(told(behind.look), None, outputs, **PRIVATE)
    return behind.opened, [listing, ref, box, controls]


def _chosen(name: str | None) -> str:
    if not name:
        raise UserError("No adapter is chosen.", "Choose one first.")
    return name


def _confirmation() -> tuple[Any, ...]:
    """The question before something is switched off, hidden until it is asked."""
    with gr.Group(visible=False, elem_id="un-confirm") as asking:
        about = gr.HTML("")
        with gr.Row():
            yes = gr.Button("Yes, switch off", variant="stop", elem_id="un-yes")
            no = gr.Button("Keep it")
    return asking, about, yes, no


def _likely(app: App) -> str | None:
    """The adapter that is chosen at first: the last one that is on, else the newest."""
    slugs = [slug for slug, _ in app.session.filed_stack()] or [
        a.slug for a in app.session.adapters()
    ]
    return slugs[-1] if slugs else None


def _all(app: App) -> list[tuple[str, str]]:
    names = app.session.names()
    return [(f"{names[a.slug]} ({a.status})", a.slug) for a in app.session.adapters()]


def _listing(app: App) -> str:
    store = app.session.store()
    names = app.session.names()
    return views.adapter_table(
        [
            views.adapter_cells(
                a, names[a.slug], {} if a.problem or store is None else store.evals(a.slug)
            )
            for a in app.session.adapters()
        ]
    )


def _read(app: App) -> str:
    state = app.actions.read_back()
    if state is None:
        return note("No model is loaded, so this is what the store says; nothing was read back.")
    text = views.stack_text([(slug, scale) for slug, scale in state], app.session.names())
    return note(f"{text[:1].upper()}{text[1:]}.")
