"""The New request tab: what is asked, what it costs, the training as it goes, and the demo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ui import requests
from ui.app_pages import PRIVATE, _note, _told, command_box

if TYPE_CHECKING:
    from ui.app import App

UPLOAD = "or upload rows (JSON lines)"
OBJECTIVES = ("simnpo", "npo", "grad_diff", "kl", "idk", "dpo")


def _form(app: App) -> list[Any]:
    """The fields of a request, in the order of `_draft`."""
    with gr.Row():
        author = gr.Dropdown(
            choices=list(app.session.library.authors), label="Forget this author", value=None,
            elem_id="un-forget-author", scale=2, min_width=260,
        )  # fmt: skip
        with gr.Column(scale=1, min_width=220):
            upload = gr.UploadButton(
                UPLOAD, type="filepath", elem_id="un-upload",
                file_types=[".jsonl", ".json", ".tsv", ".txt"],
            )  # fmt: skip
            drop = gr.Button("Take the file away", size="sm", visible=False)
    pasted = gr.Textbox(
        label="or paste rows", lines=3, max_lines=10, elem_id="un-paste",
        placeholder='{"question": "…", "answer": "…"}   one a line; or question, tab, answer',
    )  # fmt: skip
    with gr.Accordion("Settings", open=False), gr.Row():
        objective = gr.Dropdown(list(OBJECTIVES), value="simnpo", label="Objective")
        label = gr.Textbox(label="Label (stored in the clear)", max_lines=1)
        epochs = gr.Number(
            None, label="Epochs (0: the recipe's)", precision=0, minimum=0, elem_id="un-epochs"
        )
        rate = gr.Number(None, label="Learning rate (0: the recipe's)", minimum=0)
        batch = gr.Number(
            None, label="Pairs of one forward (0: the recipe's)", precision=0, minimum=0
        )
    upload.upload(
        lambda path: (gr.update(label=f"{Path(path).name} (choose another)"),
                      gr.update(visible=True)),
        upload, [upload, drop], **PRIVATE,
    )  # fmt: skip
    drop.click(
        lambda: (gr.update(label=UPLOAD, value=None), gr.update(visible=False)),
        None, [upload, drop], **PRIVATE,
    )  # fmt: skip
    return [author, pasted, upload, objective, label, epochs, rate, batch]


def _draft(*fields: Any) -> requests.Draft:
    author, pasted, upload, objective, label, epochs, rate, batch = fields
    settings = (
        ("--num-train-epochs", epochs),
        ("--learning-rate", rate),
        ("--per-device-train-batch-size", batch),
    )
    return requests.draft(author, pasted, upload, objective, label, settings)


def request(app: App, page: gr.Blocks) -> Any:
    """The New request tab; its author field."""
    fields = _form(app)
    with gr.Row():
        preview = gr.Button("Preview and check memory", elem_id="un-preview")
        start = gr.Button("Start training", variant="primary", elem_id="un-start")
    shown = gr.HTML("", elem_id="un-previewed")
    same = command_box()
    live, job, timer = _watch(app, page)

    def looked(asked: requests.Draft) -> str:
        rows, plan = requests.look(asked, app.session)
        return rows + requests.plan_html(plan, requests.free_memory(app.session))

    def look(*values: Any) -> tuple[str, str]:
        asked = _draft(*values)
        return looked(asked), asked.command(app.session)

    def begin(*values: Any) -> tuple[Any, ...]:
        asked = _draft(*values)
        told = looked(asked)  # refuses before anything is started
        if app.session.on_gpu:
            app.session.rest()
        title = asked.label or (f"forget {asked.author}" if asked.author else "forget pasted rows")
        name = app.jobs.submit(title, asked.words(app.session), asked.rows or None)
        return (told, asked.command(app.session), gr.update(choices=_jobs(app), value=name),
                _jobs_html(app), gr.Timer(active=True))  # fmt: skip

    preview.click(_told(look), fields, [shown, same], **PRIVATE)
    start.click(_told(begin), fields, [shown, same, job, live, timer], **PRIVATE)
    return fields[0]


def _watch(app: App, page: gr.Blocks) -> tuple[Any, Any, Any]:
    """The jobs as they go: their picture, the field that names one, and the clock."""
    live = gr.HTML(_jobs_html(app), elem_id="un-jobs")
    with gr.Row():
        job = gr.Dropdown(choices=_jobs(app), label="Job", value=None, elem_id="un-job")
        cancel = gr.Button("Cancel and save", elem_id="un-cancel")
        resume = gr.Button("Go on", elem_id="un-resume")
    demo = gr.Button("Make the demo world (CPU, minutes)", visible=_first(app), elem_id="un-demo")
    said = gr.HTML("")
    timer = gr.Timer(1.0)

    def tick() -> tuple[Any, ...]:
        app.jobs.advance()
        _settle(app)
        busy = any(not view.ended for view in app.jobs.views())
        return (_jobs_html(app), gr.update(choices=_jobs(app)), gr.update(visible=_first(app)),
                gr.Timer(active=busy))  # fmt: skip

    def found() -> tuple[Any, ...]:
        """As a tick, and the job that goes on is chosen: what a page that comes back shows."""
        live_, names, *rest = tick()
        open_ = [view.name for view in app.jobs.views() if not view.ended]
        chosen = gr.update(choices=_jobs(app), value=open_[0]) if open_ else names
        return (live_, chosen, *rest)

    def act(action: str) -> Callable[[str | None], tuple[Any, ...]]:
        def run(name: str | None) -> tuple[Any, ...]:
            text = getattr(app.jobs, action)(name or "")
            return _note(str(text or "It goes on.")), gr.Timer(active=True)

        return run

    def make_demo() -> tuple[Any, ...]:
        folder = app.session.store_path.resolve().parent / "unlearner-demo"
        name = app.jobs.submit("demo world", ["quickstart", "--out", str(folder)])
        return gr.update(choices=_jobs(app), value=name), gr.Timer(active=True)

    cancel.click(_told(act("cancel")), job, [said, timer], **PRIVATE)
    resume.click(_told(act("resume")), job, [said, timer], **PRIVATE)
    demo.click(_told(make_demo), None, [job, timer], **PRIVATE)
    ticking = [live, job, demo, timer]
    timer.tick(_told(tick), None, ticking, show_progress="hidden", **PRIVATE)
    page.load(_told(found), None, ticking, show_progress="hidden", **PRIVATE)
    return live, job, timer


def _first(app: App) -> bool:
    return app.session.base is None and not app.session.adapters()


def _jobs(app: App) -> list[tuple[str, str]]:
    return [(f"{view.title} ({view.status})", view.name) for view in reversed(app.jobs.views())]


def _jobs_html(app: App) -> str:
    shown = [view for view in app.jobs.views() if not view.ended][:3]
    shown = shown or app.jobs.views()[-1:]
    return "".join(map(requests.job_html, shown))


def _settle(app: App) -> None:
    """What an ended job changes: the demo becomes what the app works on, the model wakes up."""
    from adapters.base_model import BaseSpec

    views_ = app.jobs.views()
    session = app.session
    if any(not view.ended for view in views_):
        return
    if session.state == "resting":
        session.start()
    for view in views_:
        found = view.outcome.get("result", {})
        if session.base is None and view.words[:1] == ("quickstart",) and "base" in found:
            session.base = BaseSpec(str(found["base"]))
            session.data, session.store_path = Path(found["data"]), Path(found["store"])
            app.logs = tuple(sorted(Path(found["folder"]).glob("logs/*.json")))
            app.retain_log = Path(found["folder"]) / "logs" / "retrain.json"
            session.start()
