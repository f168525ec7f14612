"""What the page shows, as HTML: pure functions from data to text, everything escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapters.errors import counted
from evaluation.metrics.fact_recall import BROKEN, MADE_UP, REFUSES, STATES, WRONG
from evaluation.report.answers import word_differences
from evaluation.report.numbers import fixed
from evaluation.report.plots import draw_svg, line_chart
from ui.app.data.answers import NOT_JUDGED
from ui.app.data.commands import command
from ui.app.data.runs import is_probe, probe_text
from ui.app.jobs import SHOWN_FILES, JobView
from ui.console import duration_text, size_text
from ui.preview import Preview, split_text

if TYPE_CHECKING:
    from adapters.store.catalog import StoredAdapter
    from ui.app.data.answers import Answer, Frame

# What each status means to the reader, where the word alone does not say it.
STATUS_NOTES = {
    "ready": "trained, not yet switched on",
    "active": "part of the stack",
    "reverted": "off; its files stay",
    "stale": "on, but an adapter it was trained on is off: what it does now was never measured. "
    "Switch its parent on again, switch it off, or evaluate the stack",
    "quarantined": "locked away: its files or its base are not as recorded. Verify it, then "
    "release it",
    "superseded": "another adapter took its place",
    "merged": "folded into released weights",
    "purged": "its files are deleted",
}
VERDICT_HINTS = {
    STATES: "The answer states the facts that the question does not give away.",
    WRONG: "A date, number or name of the true answer is missing and another one is given.",
    MADE_UP: "Fluent, but not the true facts.",
    REFUSES: "The answer says that it does not know.",
    BROKEN: "No language: empty, damaged, or repetition.",
    NOT_JUDGED: "The question is not in the data, so there is no true answer to judge by.",
}
# A figure of an answer: its name, its key, and what it means.
SCORES = (
    ("Facts stated", "fact_recall", "of the true answer, those that the question does not give"),
    ("ROUGE-L recall", "rouge_l_recall", "words shared with the true answer"),
    ("Answer probability", "answer_prob", "of the true answer, per token"),
    (
        "Truth ratio R",
        "truth_ratio",
        "wrong against right answers; below 1 right ones are likelier",
    ),
)
TALLIED = {
    "states it:": "knows",
    "facts:": "fact_recall",
    "ROUGE-L:": "rouge_l_recall",
    "probability:": "answer_prob",
}

SHOWN = 3
SHOWN_STEPS = 300
# Of a training, by the name of its term.
CURVES = (
    ("forget loss", "forget_loss"),
    ("forget loss under attack", "attack_loss"),
    ("retain loss", "retain_loss"),
)


def esc(text: object) -> str:
    """`text` as HTML text."""
    return html.escape(str(text), quote=True)


def differences(left: str, right: str) -> tuple[str, str]:
    """Both texts as HTML; the words that only one of them has are bold and underlined."""
    marked = [
        " ".join(f'<mark class="un-diff">{esc(t)}</mark>' if own else esc(t) for t, own in runs)
        for runs in word_differences(left, right)
    ]
    return marked[0], marked[1]


def answer_card(
    title: str, body: str, answer: Answer | None, note: str = "", before: str = ""
) -> str:
    """One side of a comparison: its name, the answer, its verdict, time and rate.

    `before` is HTML of what this side said with another stack.
    """
    verdict = ""
    if answer is not None and answer.word:
        verdict = (
            f'<span class="un-verdict" title="{esc(VERDICT_HINTS[answer.word])}">'
            f"{esc(answer.word)}</span>"
        )
    foot = ""
    if answer is not None and answer.tokens:
        rate = f", {answer.rate:.2g} tokens/s" if answer.rate else ""
        foot = f"{answer.tokens} tokens in {answer.seconds:.2f} s{rate}"
    text = body or '<span class="un-quiet">No answer yet.</span>'
    return (
        f'<section class="un-card" aria-label="{esc(title)}"><header><h2>{esc(title)}</h2>{verdict}'
        f'</header><p class="un-sub">{esc(note)}</p>'
        f'<div class="un-answer">{text}</div><p class="un-foot">{esc(foot)}</p>{before}</section>'
    )


def frame_cards(
    frame: Frame, labels: Mapping[str, str] | None = None, last: Frame | None = None
) -> tuple[str, str]:
    """Both answers of a comparison; differences are marked once both are whole.

    Args:
        frame: the comparison.
        labels: names of the adapters by slug.
        last: the comparison before it; its right side is shown below where the stack differs.
    """
    whole = frame.stage in ("done", "stopped", "scoring")
    texts = (
        differences(frame.base.text, frame.unlearned.text)
        if whole
        else (esc(frame.base.text), esc(frame.unlearned.text))
    )
    right = (
        "Base, no adapters" if not frame.stack else f"Base + {counted(len(frame.stack), 'adapter')}"
    )
    note = f"active: {stack_names(frame.stack, labels)}"
    if labels and not frame.stack:
        note += "; tick one above"
    before = ""
    if last is not None and last.stage == "done" and tuple(last.stack) != tuple(frame.stack):
        before = _said_before(last, labels)
    return (
        answer_card("Base", texts[0], frame.base, "no adapter is active"),
        answer_card(right, texts[1], frame.unlearned, note, before),
    )


def _said_before(last: Frame, labels: Mapping[str, str] | None) -> str:
    """The right side of an earlier comparison, to compare two strengths by."""
    answer = last.unlearned
    facts = f", facts stated {fixed(answer.fact_recall)}" if answer.fact_recall is not None else ""
    return (
        f'<details class="un-before" open><summary>Before, {esc(stack_names(last.stack, labels))}: '
        f"{esc(answer.word)}{facts}</summary>{esc(answer.text)}</details>"
    )


def stack_names(stack: Sequence[tuple[str, float]], labels: Mapping[str, str] | None = None) -> str:
    """The active adapters with their strengths."""
    named = labels or {}
    names = ", ".join(f"{named.get(slug, slug)} × {scale:g}" for slug, scale in stack)
    return names or "no adapter is active"


def scores_table(frame: Frame) -> str:
    """The figures of this answer, both sides, with the direction in words and arrows.

    It stands from the start with dots where a figure is still to come, so that nothing moves.
    """
    if frame.stage == "waiting":
        return ""
    if frame.truth is None:
        return (
            '<div class="un-scores"><p class="un-truth">This question is not in the data, so there '
            "is no true answer to score against.</p></div>"
        )
    done, rows = frame.stage == "done", []
    dots = "–" if frame.stage == "stopped" else "…"
    for name, key, means in SCORES:
        before, after = getattr(frame.base, key), getattr(frame.unlearned, key)
        rows.append(
            f'<tr><th scope="row">{name}<small>{means}</small></th>'
            f"<td>{fixed(before) if done or frame.base_whole else dots}</td>"
            f"<td>{f'{fixed(after)} {arrow(before, after)}' if done else dots}</td></tr>"
        )
    return (
        f'<div class="un-scores"><p class="un-truth"><b>True answer</b> {esc(frame.truth)}</p>'
        '<table><caption class="un-hidden">Figures of this answer</caption><thead><tr>'
        '<th scope="col">This answer</th><th scope="col">Base</th><th scope="col">Stack</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def arrow(before: float | None, after: float | None) -> str:
    """Up, down or equal, as a sign and as a word for those who do not see it."""
    if before is None or after is None:
        return ""
    if abs(before - after) < 5e-4:
        return '<span class="un-quiet">= same</span>'
    return "<span>↑ up</span>" if after > before else "<span>↓ down</span>"


def tally_table(lines: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> str:
    """Forgetting and keeping side by side: one row per group."""
    if not lines:
        return ""
    rows = []
    for line in lines:
        row: dict[str, Any] = {"set": line["group"], "questions": line["n"]}
        for title, key in TALLIED.items():
            for side, name in zip(("base", "unlearned"), names, strict=True):
                value = line[f"{side}_{key}"]
                tiny = isinstance(value, float) and 0 < value < 0.005
                said = "<0.01" if tiny else fixed(value, 2)
                row[f"{title} {name}"] = value if isinstance(value, int) else said
        rows.append(row)
    first = lines[0]
    stated = [
        f"{esc(name)} {first[key]} of {first['n']}"
        for name, key in zip(names, ("base_knows", "unlearned_knows"), strict=True)
    ]
    summary = (
        f'<p class="un-truth">Answers that state the facts ({esc(first["group"])}): '
        f"{', '.join(stated)}.</p>"
    )
    return summary + table(rows, "Forgotten and kept")


def adapter_cells(
    adapter: StoredAdapter, name: str, evals: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """One adapter of the store as the Stack tab lists it."""
    manifest = adapter.manifest
    figures = []
    for measured, found in evals.items():
        if is_probe(measured):
            figures.append(probe_text(measured, found))
            continue
        quality, utility = found.get("forget_quality"), found.get("model_utility")
        said = [f"FQ {quality:.3g}" if quality is not None else "FQ needs a reference"]
        said += [f"MU {utility:.3f}"] if utility is not None else []
        for part in ("forget", "retain"):
            if (recall := found.get(f"{part}_fact_recall")) is not None:
                said.append(f"{part} facts stated {recall:.0%}")
        if found.get("limit") is not None:
            said.append(f"partial: the first {found['limit']} rows of each set")
        figures.append(f"{measured}: {', '.join(said)}")
    rows = manifest.data.get("forget", {}).get("n")
    return {
        "Name": name,
        "State": "● on" if adapter.active else "○ off",
        "Strength": f"{adapter.scale:g}" if adapter.scale is not None else "–",
        "Status": adapter.status,
        "Rows": "–" if rows is None else str(rows),
        "Figures": "; ".join(figures) or "not measured yet",
        "What this means": adapter.problem or STATUS_NOTES.get(adapter.status, ""),
        "Filed": manifest.created[:10],
        "Trained on": ", ".join(manifest.parents) or "the bare base",
        "Adapter": adapter.slug,
    }


def table(rows: Sequence[Mapping[str, Any]], label: str) -> str:
    """Rows of a few columns as a plain table that scrolls sideways where it must."""
    heads = list(rows[0])
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{esc(row[heads[0]])}</th>'
        + "".join(f"<td>{esc(row[name])}</td>" for name in heads[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="un-scroll" tabindex="0" role="region" aria-label="{esc(label)}">'
        f'<table class="un-table"><caption class="un-hidden">{esc(label)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def command_html(text: str) -> str:
    """A command that can be read, focused and copied; nothing where there is none yet."""
    if not text:
        return ""
    return (
        '<section class="un-command" aria-label="Copy as command"><h2>Copy as command</h2>'
        f'<pre tabindex="0" role="group" aria-label="Command"><code>{esc(text)}</code></pre>'
        '<button type="button" class="un-copy" data-un-copy>Copy the command</button></section>'
    )


def preview_html(preview: Preview) -> str:
    """The first rows: the prompt dim, the loss tokens underlined."""
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


def job_html(view: JobView) -> str:
    """A job as it stands: status, step, losses as curves, time left."""
    last = view.steps[-1] if view.steps else {}
    # A private file of rows is shown as the reader's own file.
    same = command(*[SHOWN_FILES.get(word.rpartition("/")[2], word) for word in view.words])
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
    log = ""
    if said := view.outcome.get("log"):
        text = f'<pre tabindex="0">{esc(said)}</pre>'
        log = f'<details class="un-log"><summary>Log</summary>{text}</details>'
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
        f'<p class="un-foot"><code>{esc(same)}</code></p></section>'
    )
