"""The New request tab: what is asked, what it costs, and the training as it goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from adapters.errors import UserError
from ui.app.data import requests
from ui.app.html import views
from ui.app.tabs import first as app_first
from ui.app.tabs.pages import PRIVATE, button, command_box, note, told

if TYPE_CHECKING:
    from ui.app.build import App

OBJECTIVES = ("simnpo", "npo", "grad_diff", "kl", "idk", "dpo")
PRESETS = ("mini", "llama2-7b", "llama3.2-1b", "llama3.2-3b")
# The endings of the formats that `forget` reads; the content decides.
ROW_FILES = [".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz"]
# The flags of the form's numbers, in their order.
NUMBERS = (
    "--neighbours",
    "--num-train-epochs",
    "--learning-rate",
    "--per-device-train-batch-size",
    "--alternates",
    "--attack-weight",
)


_TO_THE_JOB = "() => document.querySelector('#un-jobs')?.scrollIntoView({block: 'center'})"


def _form(app: App) -> list[Any]:
    """The fields of a request, in the order of `_draft`."""
    with gr.Row():
        with gr.Column(min_width=300):
            author = gr.Dropdown(
                choices=list(app.session.library.authors), label="Forget this author", value=None,
                elem_id="un-forget-author",
            )  # fmt: skip
            pasted, upload = _rows_fields("rows to forget", "un-paste", "un-upload")
        with gr.Column(min_width=300):
            retain_pasted, retain_upload = _rows_fields(
                "rows to keep (default: the rest of the data)", "un-keep", "un-keep-upload"
            )
            neighbours = gr.Number(
                None, label="Use only the N most similar rows (0: all)", precision=0, minimum=0,
                elem_id="un-neighbours",
            )  # fmt: skip
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            preset = gr.Dropdown(
                [("the objective's published recipe", ""), *PRESETS], value="", label="Preset"
            )
            objective = gr.Dropdown(list(OBJECTIVES), value="simnpo", label="Objective")
            label = gr.Textbox(label="Label (stored unencrypted)", max_lines=1)
        with gr.Row():
            epochs = gr.Number(
                None, label="Epochs (0: the recipe's)", precision=0, minimum=0, elem_id="un-epochs"
            )
            rate = gr.Number(
                None, label="Learning rate (0: the recipe's)", minimum=0, elem_id="un-rate"
            )
            batch = gr.Number(
                None, label="Pairs per forward pass (0: the recipe's)", precision=0, minimum=0
            )
            alternates = gr.Number(
                None, label="Alternate answers per question (0: none)", precision=0, minimum=0
            )
            attack = gr.Number(None, label="Weight under a simulated attack (0: none)", minimum=0)
    numbers = [neighbours, epochs, rate, batch, alternates, attack]
    return [author, pasted, upload, retain_pasted, retain_upload, preset, objective, label,
            *numbers]  # fmt: skip


def _rows_fields(what: str, paste_id: str, upload_id: str) -> tuple[Any, Any]:
    """Where rows are pasted or uploaded."""
    pasted = gr.Textbox(
        label=f"Paste {what}", lines=3, max_lines=10, elem_id=paste_id,
        placeholder='{"question": "…", "answer": "…"}   one per line; or question, tab, answer',
    )  # fmt: skip
    plain = f"or upload {what.partition(' (')[0]}: CSV, TSV, JSON, JSON lines or Parquet"
    with gr.Row():
        upload = gr.UploadButton(
            plain, type="filepath", elem_id=upload_id, size="sm", file_types=ROW_FILES
        )
        drop = gr.Button("Remove the file", size="sm", visible=False, scale=0, min_width=140)
    upload.upload(
        lambda path: (gr.update(label=f"{Path(path).name} (choose another)"),
                      gr.update(visible=True)),
        upload, [upload, drop], **PRIVATE,
    )  # fmt: skip
    drop.click(
        lambda: (gr.update(label=plain, value=None), gr.update(visible=False)),
        None, [upload, drop], **PRIVATE,
    )  # fmt: skip
    return pasted, upload


def _draft(*fields: Any) -> requests.Draft:
    author, pasted, upload, retain_pasted, retain_upload, preset, objective, label = fields[:8]
    return requests.draft(
        author, pasted, upload, objective, label, tuple(zip(NUMBERS, fields[8:], strict=True)),
        retain_pasted=retain_pasted, retain_upload=retain_upload, preset=preset,
    )  # fmt: skip


class RequestTab(NamedTuple):
    """The author field, what the page's clock renews, and what starts it."""

    author: Any
    outputs: list[Any]
    started: list[Any]


def request(app: App) -> RequestTab:
    """The New request tab."""
    fields = _form(app)
    with gr.Row():
        preview = button("Preview and check memory", "un-preview", 260)
        start = button("Start training", "un-start", 180, variant="primary")
    previewed = gr.HTML("", elem_id="un-previewed")
    with gr.Accordion("This run as YAML", open=False, elem_id="un-settings"):
        yaml = gr.Code(
            "# Preview shows them.", language="yaml", interactive=False, show_label=False,
            max_lines=20,
        )  # fmt: skip
    same = command_box()
    jobs, events = _watch(app)

    def looked(asked: requests.Draft) -> tuple[str, str, str]:
        preview, plan, settings = requests.look(asked, app.session, app.planned)
        free = requests.free_memory(app.session)
        shown = views.preview_html(preview) + views.plan_html(plan, free)
        return shown, settings, views.command_html(asked.command(app.session))

    def look(*values: Any) -> tuple[str, str, str]:
        return looked(_draft(*values))

    def begin(*values: Any) -> tuple[Any, ...]:
        asked = _draft(*values)
        seen = looked(asked)  # refuses before anything is started
        if app.session.gpu_bytes:
            app.session.rest()
        upload = values[2]  # its name may tell whom it is about
        whom = asked.author or (Path(upload).name if upload else "")
        name = app.jobs.submit(
            asked.label or f"forget {whom or 'pasted rows'}", asked.words(app.session), asked.files,
            private=(whom,) if whom else (),
        )  # fmt: skip
        return (*seen, *shown(app, value=name))

    preview.click(told(look), fields, [previewed, yaml, same], **PRIVATE)
    began = start.click(told(begin), fields, [previewed, yaml, same, *jobs], **PRIVATE)
    began.then(None, None, None, js=_TO_THE_JOB, **PRIVATE)
    return RequestTab(fields[0], jobs, [began, *events])


def _watch(app: App) -> tuple[list[Any], list[Any]]:
    """The jobs as they go: the fields that `shown` fills, and what sets one going."""
    live = gr.HTML(_jobs_html(app), elem_id="un-jobs")
    with gr.Row(visible=bool(_jobs(app))) as controls:
        job = gr.Dropdown(
            choices=_jobs(app), label="Job", value=None, elem_id="un-job", scale=2, min_width=260
        )
        cancel = gr.Button(
            "Cancel and save", elem_id="un-cancel", size="md", scale=1, min_width=170
        )
        resume = gr.Button("Continue", elem_id="un-resume", size="md", scale=1, min_width=100)
        clear = gr.Button(
            "Clear history", elem_id="un-clear-history", size="md", scale=1, min_width=120
        )
    said = gr.HTML("")

    def act(action: str) -> Callable[[str | None], str]:
        def run(name: str | None) -> str:
            return note(getattr(app.jobs, action)(name or _only(app)))

        return run

    events = [
        cancel.click(told(act("cancel")), job, said, **PRIVATE),
        resume.click(told(act("resume")), job, said, **PRIVATE),
    ]

    def clear_history() -> tuple[Any, ...]:
        count = app.jobs.clear_history()
        text = note(f"{count} ended jobs deleted." if count else "No job has ended.")
        return text, *shown(app, value=None)

    outputs = [live, job, controls]
    clear.click(told(clear_history), None, [said, *outputs], **PRIVATE)
    return outputs, events


def _only(app: App) -> str:
    """The job that is meant where none is chosen: the one under way, else the last one."""
    name = under_way(app) or next((view.name for view in reversed(app.jobs.views())), None)
    if name is None:
        raise UserError("There is no job.", "Start a training first.")
    return name


def advance(app: App) -> bool:
    """Starts the next job, takes over what an ended one made; whether any goes on."""
    app.jobs.advance()
    busy = any(not view.ended for view in app.jobs.views())
    if not busy:
        app_first.adopt(app)
        if app.session.state == "resting":
            app.session.start()  # does nothing where another page was first
    return busy


def shown(app: App, **chosen: str | None) -> tuple[Any, ...]:
    """Picture, choices and controls of the jobs as they stand; `value` chooses one, or none."""
    jobs = _jobs(app)
    return _jobs_html(app), gr.update(choices=jobs, **chosen), gr.update(visible=bool(jobs))


def under_way(app: App) -> str | None:
    """The first job that has not ended: what a page that comes back is shown."""
    return next((view.name for view in app.jobs.views() if not view.ended), None)


def _jobs(app: App) -> list[tuple[str, str]]:
    return [(f"{view.title} ({view.status})", view.name) for view in reversed(app.jobs.views())]


def _jobs_html(app: App) -> str:
    found = app.jobs.views()
    busy = [view for view in found if not view.ended][:3]
    return "".join(map(views.job_html, busy or found[-1:]))
