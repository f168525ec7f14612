"""The New request tab as HTML: rows, plan and jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapters.errors import counted
from ui.app.data.commands import command
from ui.app.html.views import esc
from ui.app.jobs import REQUEST, RETAIN
from ui.console import duration_text, size_text

if TYPE_CHECKING:
    from ui.preview import Preview

SHOWN = 3
SHOWN_STEPS = 300
# Of a training, by the name of its term.
CURVES = (
    ("forget loss", "forget_loss"),
    ("forget loss under attack", "attack_loss"),
    ("retain loss", "retain_loss"),
)


def preview_html(preview: Preview) -> str:
    """The first rows: the prompt dim, the loss tokens underlined."""
    from ui.preview import split_text

    parts = []
    for row in preview.forget[:SHOWN]:
        prompt, targets = split_text(row.encoded, preview.fmt.tokenizer)
        parts.append(
            f'<p class="un-preview"><span class="un-quiet">{esc(prompt)}</span>'
            f"<u>{esc(targets)}</u></p>"
        )
    more = len(preview.forget) - SHOWN
    tail = f" ({SHOWN} shown)" if more > 0 else ""
    cut = f" {len(preview.cut)} rows lose their end." if preview.cut else ""
    if preview.unknown:
        cut += f" {preview.unknown} of {preview.rows} rows {preview.fmt.about_unknown}."
    return (
        f'<div class="un-previews">{"".join(parts)}<p class="un-foot">{len(preview.forget)} rows '
        f"to forget{tail}. The loss is computed on the underlined text.{esc(cut)}</p></div>"
    )


def plan_html(plan: dict[str, Any], free: int) -> str:
    """Steps, size and whether the estimate fits the free memory."""
    memory = plan["memory"]
    low, high = memory["low_bytes"], memory["high_bytes"]
    if high <= free:
        fits = f"{size_text(free)} free: fits"
    elif low <= free:
        fits = f"{size_text(free)} free: may not fit"
    else:
        fits = f"{size_text(free)} free: does not fit; use 4 bit or a smaller batch"
    parents = ", ".join(plan["parents"]) or "the bare base"
    return (
        f"<dl class='un-plan'><dt>Rows</dt><dd>forget {plan['forget_rows']}, retain "
        f"{plan['retain_rows']}</dd><dt>Trained on</dt><dd>{esc(parents)}</dd><dt>Plan</dt><dd>"
        f"{counted(plan['steps'], 'step')} of {counted(plan['pairs_per_step'], 'pair')}, "
        f"{plan['adapter_parameters']:,} parameters</dd><dt>Memory</dt><dd>estimate "
        f"{size_text(low)} to {size_text(high)}; {esc(fits)}</dd></dl>"
    )


def _shown(word: str) -> str:
    """A word of a job's command; a private file of rows is the reader's own file."""
    shown = {REQUEST: "rows.jsonl", RETAIN: "keep.jsonl"}
    return shown.get(word.rpartition("/")[2], word)


def job_html(view: Any) -> str:
    """A job as it stands: status, step, losses as curves, time left."""
    from evaluation.report.plots import draw_svg, line_chart

    last = view.steps[-1] if view.steps else {}
    words = (
        {
            "waiting": f"Waiting in line, {view.position} ahead.",
            "starting": "Starting its process …",
            "stopping": "Finishing its step and saving …",
            "died": "Its process ended without a word (stopped from outside, or out of memory).",
        }.get(view.status)
        or view.outcome.get("text")
        or ("Training." if last.get("event") == "train" else view.said or "Running.")
    )
    if view.status == "saved":
        words += " There is no adapter yet: Continue goes on with the training."
    bar = ""
    if last:
        left = last.get("remaining")
        doing = " ".join(str(last.get("message") or "").split())
        at = f"Step {last['step']} of {last['steps']}{f', {doing}' if doing else ''}"
        time_left = "" if view.ended or left is None else f", about {duration_text(left)} left"
        bar = (
            f'<progress max="{last["steps"]}" value="{last["step"]}" aria-label="Progress">'
            f'</progress><p class="un-foot">{esc(at + time_left)}</p>'
        )
    log = (
        f'<details class="un-log"><summary>Log</summary><pre tabindex="0">{esc(view.log)}</pre>'
        "</details>"
        if view.log
        else ""
    )
    # A plot has a few hundred points to show, however long the run.
    thin = view.steps[:: max(1, len(view.steps) // SHOWN_STEPS)]
    curves = {
        name: [(s["step"], s[key]) for s in thin if s.get(key) is not None] for name, key in CURVES
    }
    chart = line_chart("losses", f"Losses of {view.title}", curves, "step", "loss")
    plot = "" if chart is None else draw_svg(chart)
    return (
        f'<section class="un-card" aria-label="{esc(view.title)}"><header><h2>{esc(view.title)}'
        f'</h2><span class="un-verdict">{esc(view.status)}</span></header>'
        f'<p class="un-sub" role="status">{esc(words)}</p>{bar}{plot}{log}'
        f'<p class="un-foot"><code>{esc(command(*map(_shown, view.words)))}</code></p></section>'
    )
