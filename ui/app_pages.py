"""The tabs beside Compare: author sheet, stack, runs, new request, and the blind vote."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ui import plots, views, votes
from ui import runs as runs_data
from ui import sheet as sheet_data

if TYPE_CHECKING:
    from ui.app import App
    from ui.session import Answer

PRIVATE: dict[str, Any] = {"api_visibility": "private"}


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    from ui.app import told

    return told(function)


def command_box(value: str = "") -> gr.Textbox:
    """A field to copy the same action from as a command."""
    return gr.Textbox(
        value, label="Copy as command", lines=1, max_lines=4, interactive=False,
        buttons=["copy"], elem_classes="un-command",
    )  # fmt: skip


def vote(app: App, frame_state: Any) -> None:
    """The blind vote on the last comparison."""
    with gr.Accordion("Blind vote: which answer knows more?", open=False):
        start = gr.Button("Hide which side is which", size="sm")
        with gr.Row():
            with gr.Column(min_width=300):
                a = gr.HTML(views.answer_card("A", "", None))
            with gr.Column(min_width=300):
                b = gr.HTML(views.answer_card("B", "", None))
        choice = gr.Radio(list(votes.CHOICES), label="Your vote")
        give = gr.Button("Vote", size="sm")
        said = gr.HTML("")
        given = gr.State(None)

    def begin(frame: Any) -> tuple[Any, ...]:
        from adapters.errors import UserError

        if frame is None or frame.stage not in ("done", "stopped"):
            raise UserError("There is no comparison to vote on.", "Ask both first.")
        made = votes.ballot(frame.question, frame.base.text, frame.unlearned.text, frame.stack)
        cards = [
            views.answer_card(letter, views.esc(text), None)
            for letter, text in zip("AB", made.texts, strict=True)
        ]
        return (*cards, None, made, "")

    def cast(made: Any, chosen: str | None) -> tuple[str, Any]:
        from adapters.errors import UserError

        if made is None:
            raise UserError("There is no ballot.", "Hide which side is which first.")
        line = votes.cast(app.votes, made, chosen or "")
        total = votes.count(app.votes)
        tally = ", ".join(f"{name} {n}" for name, n in total.items())
        return (
            f'<p class="un-note">A was the {line["a"]}. Your vote: {line["winner"]}. '
            f"So far: {tally} (in {views.esc(app.votes)}).</p>",
            None,
        )

    start.click(_told(begin), frame_state, [a, b, choice, given, said], **PRIVATE)
    give.click(_told(cast), [given, choice], [said, given], **PRIVATE)


def comparator_file(rows: Sequence[tuple[str, str, Answer, Answer]], names: tuple[str, str]) -> str:
    """A file in LLM Comparator's JSON; rows are set, question and both answers."""
    path = Path(tempfile.mkdtemp(prefix="unlearner-")) / "comparator.json"
    path.write_text(json.dumps(runs_data.comparator(rows, names)), encoding="utf-8")
    return str(path)


def _sheet_file(found: list[Any]) -> Any:
    if not found:
        return gr.skip()
    made = [(row.group, row.question, row.base, row.unlearned) for row in found]
    return gr.update(value=comparator_file(made, ("base", "stack")), visible=True)


def sheet(app: App, stack: Any, strengths: Any) -> Any:
    """The Author sheet; its author field."""
    with gr.Row():
        author = gr.Dropdown(
            choices=list(app.session.library.authors), label="Author of the sheet", value=None,
            elem_id="un-sheet-author", scale=2,
        )  # fmt: skip
        beside = gr.Slider(1, 20, value=5, step=1, label="Neighbours of each kind", scale=1)
    fill = gr.Button("Fill the sheet", variant="primary", elem_id="un-fill")
    told = gr.HTML("", elem_id="un-sheet-status")
    summary = gr.HTML("", elem_id="un-tally")
    grid = gr.Dataframe(
        headers=list(sheet_data.COLUMNS), value=[], interactive=False, wrap=True,
        label="All questions; a heading sorts, a row opens its difference", elem_id="un-sheet",
        max_height=560,
        column_widths=[110, 260, 260, 260, 110, 110, 90, 90, 80, 80, 80, 80],
    )  # fmt: skip
    with gr.Row():
        with gr.Column(min_width=300):
            left = gr.HTML("")
        with gr.Column(min_width=300):
            right = gr.HTML("", elem_id="un-sheet-diff")
    export = gr.DownloadButton("LLM Comparator JSON", size="sm", visible=False)
    rows = gr.State([])

    def run(name: str | None, chosen: list[str], kept: dict[str, float], n: float) -> Iterator[Any]:
        wanted = app.actions.stack_of(chosen or [], kept or {})
        for found, total in sheet_data.fill(app.session, name or "", wanted, neighbours=int(n)):
            text = f"{len(found)} of {total} questions"
            status = f'<p class="un-foot" role="status">{text}</p>'
            yield (status, views.tally_table(sheet_data.tally(found)),
                   [row.cells() for row in found], found)  # fmt: skip

    def open_row(found: list[Any], event: gr.SelectData) -> tuple[str, str]:
        # The table may be sorted: the row is found by its question, not by its place.
        question = event.row_value[1]
        row = next(r for r in found if r.question == question)
        texts = views.differences(row.base.text, row.unlearned.text)
        note = f"{row.question}  True answer: {row.truth}"
        return (
            views.answer_card("Base", texts[0], row.base, note),
            views.answer_card("Stack", texts[1], row.unlearned, note),
        )

    fill.click(
        _told(run), [author, stack, strengths, beside], [told, summary, grid, rows],
        show_progress="hidden", trigger_mode="once", **PRIVATE,
    ).then(_told(_sheet_file), rows, export, **PRIVATE)  # fmt: skip
    grid.select(_told(open_row), rows, [left, right], **PRIVATE)
    return author


def stack(app: App, chosen: Any, head: Any, choices: Callable[[Any], Any], on: Any) -> None:
    """The Stack tab: what is filed, what is on, and what the model says about it."""
    listing = gr.HTML(_listing(app), elem_id="un-adapters")
    read = gr.HTML("", elem_id="un-read-back")
    with gr.Row():
        ref = gr.Dropdown(choices=_all(app), label="Adapter", value=None, elem_id="un-ref")
        strength = gr.Slider(0, 1.5, value=1.0, step=0.05, label="Strength, 1 is as trained")
    with gr.Row():
        switch_on = gr.Button("Switch on", variant="primary", elem_id="un-on")
        off = gr.Button("Revert …", elem_id="un-revert")
        nothing = gr.Button("Clear = base …", elem_id="un-clear-filed")
        look = gr.Button("Read back", elem_id="un-look")
    asking, about, yes, no = _confirmation()
    pending = gr.State("")
    same = command_box()

    def shown(command: str = "") -> tuple[Any, ...]:
        return (_listing(app), _read(app), gr.update(choices=_all(app)), command,
                gr.update(choices=choices(app), value=on(app)),
                gr.update(visible=False))  # fmt: skip

    def start(name: str | None, scale: float) -> tuple[Any, ...]:
        app.actions.activate(name or "", float(scale))
        return shown(app.actions.change_command("activate", name or "", float(scale)))

    def ask(name: str | None) -> tuple[Any, ...]:
        from adapters.errors import UserError

        if not name:
            raise UserError("No adapter is chosen.", "Choose one first.")
        text = (f"Revert {name}? It is switched off, exactly; its files stay, and it can be "
                "switched on again. Adapters trained on top of it become stale.")  # fmt: skip
        return gr.update(visible=True), _note(text), name

    def ask_all() -> tuple[Any, ...]:
        text = "Switch everything off? What then answers is the bare base, bit for bit."
        return gr.update(visible=True), _note(text), "*"

    def confirmed(name: str) -> tuple[Any, ...]:
        if name == "*":
            app.actions.clear()
            return shown(app.actions.change_command("clear"))
        app.actions.revert(name)
        return shown(app.actions.change_command("revert", name))

    outputs = [listing, read, ref, same, chosen, asking]
    switch_on.click(_told(start), [ref, strength], outputs, **PRIVATE)
    off.click(_told(ask), ref, [asking, about, pending], **PRIVATE)
    nothing.click(_told(ask_all), None, [asking, about, pending], **PRIVATE)
    yes.click(_told(confirmed), pending, outputs, **PRIVATE)
    no.click(lambda: gr.update(visible=False), None, asking, **PRIVATE)
    look.click(_told(lambda: shown()), None, outputs, **PRIVATE)


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


def _note(text: str) -> str:
    return f'<p class="un-note">{views.esc(text)}</p>'


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
        return _note("No model is loaded, so this is what the store says; nothing was read back.")
    labels = {a.slug: a.label for a in app.session.adapters()}
    text = views.stack_text([(slug, scale) for slug, scale in state], labels)
    return _note(f"{text[:1].upper()}{text[1:]}.")


def runs(app: App, page: gr.Blocks) -> None:
    """The Runs tab: table, plots, CSV, report."""
    told = gr.HTML("")
    grid = gr.Dataframe(
        headers=list(runs_data.COLUMNS), value=[], interactive=False, elem_id="un-runs",
        label="Evaluations, measured before; nothing is computed here", max_height=420,
    )  # fmt: skip
    figures = gr.HTML("", elem_id="un-plots")
    with gr.Row():
        again = gr.Button("Read again", size="sm")
        table = gr.DownloadButton("CSV", size="sm")
        report = gr.Button("Make the HTML report", size="sm")
        report_file = gr.DownloadButton("HTML report", size="sm", visible=False)

    def read() -> tuple[Any, ...]:
        found = runs_data.gather(app.session.store(), app.logs, app.retain_log)
        path = Path(tempfile.mkdtemp(prefix="unlearner-")) / "runs.csv"
        path.write_text(runs_data.as_csv(found), encoding="utf-8")
        notes = "".join(map(_note, found.notes)) or (
            ""
            if found.table
            else _note(
                "No evaluation yet. `unlearner evaluate --store S ...` files its figures with the "
                "adapter; `unlearner ui --logs LOG ...` shows logs."
            )
        )
        return notes, [runs_data.cells(row) for row in found.table], run_plots(found), str(path)

    def write() -> Any:
        path = Path(tempfile.mkdtemp(prefix="unlearner-")) / "report.html"
        path.write_text(runs_html(runs_data.gather(app.session.store(), app.logs, app.retain_log)),
                        encoding="utf-8")  # fmt: skip
        return gr.update(value=str(path), visible=True)

    outputs = [told, grid, figures, table]
    again.click(_told(read), None, outputs, **PRIVATE)
    page.load(_told(read), None, outputs, show_progress="hidden", **PRIVATE)
    report.click(_told(write), None, report_file, **PRIVATE)


def run_plots(found: runs_data.Runs) -> str:
    """FQ against MU with published rows, log R, and curves, where there is something to plot."""
    points = [
        (str(row["name"]), float(row["model_utility"]), float(row["forget_quality_log10"]),
         runs_data.REFERENCE if row["source"] == runs_data.REFERENCE else "measured here")
        for row in found.table
        if row.get("model_utility") is not None and row.get("forget_quality_log10") is not None
    ]  # fmt: skip
    published = [(name, mu, fq, "published, Llama-2-7B") for name, fq, mu in found.published]
    parts = [
        "<h3>Forget quality against model utility</h3>" + plots.pareto(
            [*points, *published], "Forget quality against model utility",
            "model utility, higher is better", "log10 forget quality, 0 is best")
        + '<p class="un-foot">Published: Llama-2-7B on forget05 (OPTML-Group), not measured here. '
        "Forget quality needs a retrain reference: without one a run has no point.</p>"
    ]  # fmt: skip
    if found.log_r:
        parts.append(
            "<h3>Log R of the forget rows</h3>"
            + plots.histogram(found.log_r, "Distribution of log R", "log R; below 0 knows")
        )
    if curve := found.curve():
        parts.append(
            "<h3>Strength</h3>"
            + plots.lines(curve, "Forget ROUGE-L by strength", "strength", "forget ROUGE-L")
        )
    body = "".join(f"<div>{part}</div>" for part in parts)
    return f'<div class="un-plots">{body}</div>'


def runs_html(found: runs_data.Runs) -> str:
    """One file with table and plots that needs no network."""
    from ui.style import CSS

    rows = [dict(zip(runs_data.COLUMNS, map(_cell, runs_data.cells(r)), strict=True))
            for r in found.table]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>unlearner: runs</title>'
        f"<style>{CSS} body{{font-family:system-ui;max-width:1100px;margin:2rem auto;"
        f"padding:0 1rem}}</style><h1>Runs</h1>{views.table(rows, 'Runs')}{run_plots(found)}</html>"
    )


def _cell(value: Any) -> str:
    return "–" if value is None else str(value)
