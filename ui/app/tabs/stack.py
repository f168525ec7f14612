"""The Stack tab: what is filed, what is on, and what the model says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gradio as gr

from adapters.errors import UserError
from ui.app.data import commands
from ui.app.html import views
from ui.app.tabs.pages import PRIVATE, button, command_box, note, told

if TYPE_CHECKING:
    from ui.app.build import App


ALL_OFF = "Switch everything off? What then answers is the bare base, bit for bit."


class _Changes:
    """The functions behind the tab."""

    def __init__(self, app: App) -> None:
        self.app = app

    def shown(self, action: str, ref: str = "", strength: float = 1.0) -> tuple[Any, ...]:
        """Everything as it is after `action`, read back, with its command."""
        app = self.app
        return (
            _listing(app), _read(app), gr.update(choices=_all(app)),
            views.command_html(commands.change(app.session, action, ref, strength)),
            gr.update(choices=app.session.switchable(), value=app.session.on()),
            gr.update(visible=False),
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

    def confirmed(self, name: str) -> tuple[Any, ...]:
        """Switches off what was asked about."""
        if name == "*":
            self.app.actions.clear()
            return self.shown("clear")
        self.app.actions.revert(name)
        return self.shown("revert", name)

    def opened(self) -> tuple[Any, ...]:
        """What is renewed when the tab is opened: no model is asked for that."""
        command = views.command_html(commands.change(self.app.session, "list"))
        adapters = _all(self.app)
        return (
            _listing(self.app), gr.update(choices=adapters), command,
            gr.update(visible=bool(adapters)),
        )  # fmt: skip


def stack(app: App, chosen: Any) -> tuple[Callable[[], Any], list[Any]]:
    """The Stack tab; what renews it, and the fields that does."""
    listing = gr.HTML(_listing(app), elem_id="un-adapters")
    read = gr.HTML("", elem_id="un-read-back")
    # At first the last one that is on is chosen, else the newest.
    likely = [None, *(app.session.on() or [each.slug for each in app.session.adapters()])][-1]
    with gr.Column(visible=bool(_all(app))) as controls:
        with gr.Row():
            ref = gr.Dropdown(
                choices=_all(app), label="Adapter", value=likely, elem_id="un-ref",
                min_width=260,
            )  # fmt: skip
            strength = gr.Slider(
                0, 1.5, value=1.0, step=0.05, label="Strength, 1 is as trained", min_width=260
            )
        with gr.Row():
            switch_on = button("Switch on", "un-on", 150, variant="primary")
            off = button("Switch off …", "un-revert", 150)
            nothing = button("Switch all off …", "un-clear-filed", 150)
            look = button("Check the model", "un-look", 150)
    with gr.Group(visible=False, elem_id="un-confirm") as asking:
        about = gr.HTML("")
        with gr.Row():
            yes = gr.Button("Yes, switch off", variant="stop", elem_id="un-yes")
            no = gr.Button("Keep it")
    pending, box = gr.State(""), command_box()
    behind = _Changes(app)
    outputs = [listing, read, ref, box, chosen, asking]
    switch_on.click(told(behind.switch_on), [ref, strength], outputs, **PRIVATE)
    # The question is hidden until it is there: what is seen at once is seen on the list.
    asks: dict[str, Any] = {"show_progress_on": listing, **PRIVATE}
    off.click(told(behind.ask), ref, [asking, about, pending], **asks)
    nothing.click(
        lambda: (gr.update(visible=True), note(ALL_OFF), "*"),
        None,
        [asking, about, pending],
        **asks,
    )
    yes.click(told(behind.confirmed), pending, outputs, **PRIVATE)
    no.click(lambda: gr.update(visible=False), None, asking, **PRIVATE)
    look.click(told(lambda: behind.shown("list")), None, outputs, **PRIVATE)
    return behind.opened, [listing, ref, box, controls]


def _chosen(name: str | None) -> str:
    if not name:
        raise UserError("No adapter is chosen.", "Choose one first.")
    return name


def _all(app: App) -> list[tuple[str, str]]:
    names = app.session.names()
    return [(f"{names[a.slug]} ({a.status})", a.slug) for a in app.session.adapters()]


def _listing(app: App) -> str:
    store, names, rows = app.session.store(), app.session.names(), []
    for each in app.session.adapters():
        evals = {} if each.problem or store is None else store.evals(each.slug)
        rows.append(views.adapter_cells(each, names[each.slug], evals))
    if not rows:
        return '<p class="un-empty">The store is empty. File a request under “New request”.</p>'
    return views.table(rows, "Adapters of the store")


def _read(app: App) -> str:
    state = app.actions.read_back()
    if state is None:
        return note("No model is loaded, so this is what the store says; nothing was read back.")
    names = views.stack_names([(slug, scale) for slug, scale in state], app.session.names())
    return note(f"Active: {names}.")
