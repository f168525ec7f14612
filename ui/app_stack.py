"""The Stack tab: what is filed, what is on, and what the model says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gradio as gr

from adapters.errors import UserError
from ui import same, views
from ui.app_pages import PRIVATE, command_box, note, told

if TYPE_CHECKING:
    from ui.app import App


def stack(
    app: App, chosen: Any, choices: Callable[[Any], Any], on: Callable[[Any], Any]
) -> tuple[Callable[[], Any], list[Any]]:  # fmt: skip
    """The Stack tab; what renews it, and the fields that does."""
    listing = gr.HTML(_listing(app), elem_id="un-adapters")
    read = gr.HTML("", elem_id="un-read-back")
    with gr.Row():
        ref = gr.Dropdown(choices=_all(app), label="Adapter", value=None, elem_id="un-ref")
        strength = gr.Slider(0, 1.5, value=1.0, step=0.05, label="Strength, 1 is as trained")
    with gr.Row():
        switch_on = gr.Button(
            "Switch on", variant="primary", elem_id="un-on", size="md", scale=0, min_width=140
        )
        off = gr.Button("Revert …", elem_id="un-revert", size="md", scale=0, min_width=140)
        nothing = gr.Button(
            "Clear = base …", elem_id="un-clear-filed", size="md", scale=0, min_width=140
        )
        look = gr.Button("Read back", elem_id="un-look", size="md", scale=0, min_width=140)
    asking, about, yes, no = _confirmation()
    pending = gr.State("")
    box = command_box()

    def shown(command: str = "") -> tuple[Any, ...]:
        return (_listing(app), _read(app), gr.update(choices=_all(app)), command,
                gr.update(choices=choices(app), value=on(app)),
                gr.update(visible=False))  # fmt: skip

    def start(name: str | None, scale: float) -> tuple[Any, ...]:
        app.actions.activate(name or "", float(scale))
        return shown(
            views.command_html(same.change(app.session, "activate", name or "", float(scale)))
        )

    def ask(name: str | None) -> tuple[Any, ...]:
        if not name:
            raise UserError("No adapter is chosen.", "Choose one first.")
        text = (f"Revert {name}? It is switched off, exactly; its files stay, and it can be "
                "switched on again. Adapters trained on top of it become stale.")  # fmt: skip
        return gr.update(visible=True), note(text), name

    def ask_all() -> tuple[Any, ...]:
        text = "Switch everything off? What then answers is the bare base, bit for bit."
        return gr.update(visible=True), note(text), "*"

    def confirmed(name: str) -> tuple[Any, ...]:
        if name == "*":
            app.actions.clear()
            return shown(views.command_html(same.change(app.session, "clear")))
        app.actions.revert(name)
        return shown(views.command_html(same.change(app.session, "revert", name)))

    outputs = [listing, read, ref, box, chosen, asking]
    switch_on.click(told(start), [ref, strength], outputs, **PRIVATE)
    off.click(told(ask), ref, [asking, about, pending], **PRIVATE)
    nothing.click(told(ask_all), None, [asking, about, pending], **PRIVATE)
    yes.click(told(confirmed), pending, outputs, **PRIVATE)
    no.click(lambda: gr.update(visible=False), None, asking, **PRIVATE)
    look.click(
        told(lambda: shown(views.command_html(same.change(app.session, "list")))),
        None,
        outputs,
        **PRIVATE,
    )

    def opened() -> tuple[Any, ...]:
        return (
            _listing(app),
            gr.update(choices=_all(app)),
            views.command_html(same.change(app.session, "list")),
        )

    return opened, [listing, ref, box]


def _confirmation() -> tuple[Any, ...]:
    """The question before something is switched off, hidden until it is asked."""
    with gr.Group(visible=False, elem_id="un-confirm") as asking:
        about = gr.HTML("")
        with gr.Row():
            yes = gr.Button("Yes, revert", variant="stop", elem_id="un-yes")
            no = gr.Button("Keep it")
    return asking, about, yes, no


def _all(app: App) -> list[tuple[str, str]]:
    return [(f"{a.label} ({a.status})", a.slug) for a in app.session.adapters()]


def _listing(app: App) -> str:
    store = app.session.store()
    found = app.session.adapters()
    return views.adapter_table(
        [
            views.adapter_cells(a, {} if a.problem or store is None else store.evals(a.slug))
            for a in found
        ]
    )


def _read(app: App) -> str:
    state = app.actions.read_back()
    if state is None:
        return note("No model is loaded, so this is what the store says; nothing was read back.")
    labels = {a.slug: a.label for a in app.session.adapters()}
    text = views.stack_text([(slug, scale) for slug, scale in state], labels)
    return note(f"{text[:1].upper()}{text[1:]}.")
