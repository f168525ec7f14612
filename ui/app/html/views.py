"""What the page shows, as HTML: pure functions from data to text, everything escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapters.errors import counted
from evaluation.metrics.fact_recall import BROKEN, MADE_UP, REFUSES, STATES, WRONG
from evaluation.report.answers import word_differences
from evaluation.report.numbers import fixed
from ui.app.data.answers import NOT_JUDGED
from ui.app.data.probes import is_probe, probe_text

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


TALLIED = {
    "states it:": "knows",
    "facts:": "fact_recall",
    "ROUGE-L:": "rouge_l_recall",
    "probability:": "answer_prob",
}


def esc(text: object) -> str:
    """`text` as HTML text."""
    return html.escape(str(text), quote=True)


def differences(left: str, right: str) -> tuple[str, str]:
    """Both texts as HTML; the words that only one of them has are bold and underlined."""
    left_runs, right_runs = word_differences(left, right)
    return _marked(left_runs), _marked(right_runs)


def _marked(runs: Sequence[tuple[str, bool]]) -> str:
    return " ".join(
        f'<mark class="un-diff">{esc(text)}</mark>' if own else esc(text) for text, own in runs
    )


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
    note = stack_text(frame.stack, labels)
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


def stack_text(stack: Sequence[tuple[str, float]], labels: Mapping[str, str] | None = None) -> str:
    """What the model's layers said is active, in words."""
    return f"active: {stack_names(stack, labels)}"


def stack_names(stack: Sequence[tuple[str, float]], labels: Mapping[str, str] | None = None) -> str:
    """The active adapters with their strengths."""
    named = labels or {}
    names = ", ".join(f"{named.get(slug, slug)} × {scale:g}" for slug, scale in stack)
    return names or "no adapter is active"


def scores_table(frame: Frame, names: tuple[str, str] = ("Base", "Stack")) -> str:
    """The figures of this answer, both sides, with the direction in words and arrows.

    It stands from the start with dots where a figure is still to come, so that nothing moves.
    """
    if frame.stage == "waiting":
        return ""
    done, rows = frame.stage == "done", []
    dots = "–" if frame.stage == "stopped" else "…"
    for name, key, means in (
        (
            "Facts stated",
            "fact_recall",
            "of the true answer, those that the question does not give",
        ),
        ("ROUGE-L recall", "rouge_l_recall", "words shared with the true answer"),
        ("Answer probability", "answer_prob", "of the true answer, per token"),
        (
            "Truth ratio R",
            "truth_ratio",
            "wrong against right answers; below 1 right ones are likelier",
        ),
    ):
        before, after = getattr(frame.base, key), getattr(frame.unlearned, key)
        rows.append(
            f'<tr><th scope="row">{name}<small>{means}</small></th>'
            f"<td>{fixed(before) if done or frame.base_whole else dots}</td>"
            f"<td>{f'{fixed(after)} {arrow(before, after)}' if done else dots}</td></tr>"
        )
    truth = (
        f'<p class="un-truth"><b>True answer</b> {esc(frame.truth)}</p>'
        if frame.truth
        else (
            '<p class="un-truth">This question is not in the data, so there is no true answer to '
            "score against.</p>"
        )
    )
    if frame.truth is None:
        return f'<div class="un-scores">{truth}</div>'
    return (
        f'<div class="un-scores">{truth}<table><caption class="un-hidden">Figures of this answer'
        '</caption><thead><tr><th scope="col">This answer</th><th scope="col">'
        f'{esc(names[0])}</th><th scope="col">{esc(names[1])}</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def arrow(before: float | None, after: float | None) -> str:
    """Up, down or equal, as a sign and as a word for those who do not see it."""
    if before is None or after is None:
        return ""
    if abs(before - after) < 5e-4:
        return '<span class="un-quiet">= same</span>'
    return "<span>↑ up</span>" if after > before else "<span>↓ down</span>"


def tally_table(
    lines: Sequence[Mapping[str, Any]], names: tuple[str, str] = ("base", "stack")
) -> str:
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


def adapter_table(rows: Sequence[Mapping[str, str]]) -> str:
    """The store's adapters; an empty store says how to fill it."""
    if not rows:
        return '<p class="un-empty">The store is empty. File a request under “New request”.</p>'
    return table(rows, "Adapters of the store")


def table(rows: Sequence[Mapping[str, Any]], label: str) -> str:
    """Rows of a few columns as a plain table that scrolls sideways where it must."""
    if not rows:
        return ""
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
