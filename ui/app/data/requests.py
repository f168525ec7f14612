"""A new forget request from the page: rows, what is trained on, whether it fits, the command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from ui.app.html.views import command, esc
from ui.app.jobs import REQUEST
from ui.console import size_text

if TYPE_CHECKING:
    from adapters.base.load import BaseSpec
    from ui.app.session import Session
    from ui.preview import Preview

SHOWN = 3
SHOWN_STEPS = 300
# Of a training, by the name of its term.
CURVES = (
    ("forget loss", "forget_loss"),
    ("forget loss under attack", "attack_loss"),
    ("retain loss", "retain_loss"),
)
LARGEST_UPLOAD = 5_000_000


@dataclass(frozen=True)
class Draft:
    """A request as filled in: an author of the data, or rows as JSON lines; and its settings."""

    author: str = ""
    rows: str = ""
    objective: str = "simnpo"
    label: str = ""
    settings: tuple[tuple[str, str], ...] = ()

    def words(self, session: Session) -> list[str]:
        """The command that files it, `REQUEST` standing for the file of the pasted rows."""
        if session.base is None:
            raise UserError("No base model was named.", "Start the app with --base B.")
        named = f"tofu:author={self.author}" if self.author else REQUEST
        words = ["forget", named, *base_words(session.base), "--store", str(session.store_path)]
        words += ["--data", str(session.data)] if session.data else []
        words += ["--template", session.template] if session.template != "auto" else []
        words += ["--objective", self.objective]
        words += ["--label", self.label] if self.label.strip() else []
        for flag, value in self.settings:
            words += [flag, value]
        return words

    def command(self, session: Session) -> str:
        """The same for a shell; pasted rows are named as a file of the reader's own."""
        shown = ["rows.jsonl" if word == REQUEST else word for word in self.words(session)]
        return command(*shown)


def base_words(spec: BaseSpec) -> list[str]:
    """The flags that name a base and how it is loaded."""
    words = ["--base", spec.name]
    words += ["--revision", spec.revision] if spec.revision else []
    words += ["--dtype", spec.dtype] if spec.dtype != "auto" else []
    words += ["--load-in-4bit"] if spec.load_in_4bit else []
    words += ["--device", spec.device] if spec.device != "auto" else []
    words += ["--attention", spec.attention] if spec.attention != "auto" else []
    return words


def draft(
    author: str | None, pasted: str | None, upload: str | None, objective: str, label: str | None,
    settings: Sequence[tuple[str, Any]] = (),
) -> Draft:  # fmt: skip
    """The request of what was filled in: exactly one of author, pasted rows and upload.

    Raises:
        UserError: none or several were given, or the upload is too large or not text.
    """
    given = [
        name
        for name, value in (
            ("an author", author),
            ("pasted rows", (pasted or "").strip()),
            ("a file", upload),
        )
        if value
    ]
    if len(given) != 1:
        raise UserError(
            f"The request names {' and '.join(given) or 'nothing'}.",
            "Pick an author, or paste rows, or upload a file: exactly one of them.",
        )
    text = _uploaded(Path(upload)) if upload else pasted or ""
    kept = tuple((flag, f"{value:g}") for flag, value in settings if value)
    rows = "" if author else as_json_lines(text)
    return Draft(author or "", rows, objective, (label or "").strip(), kept)


def _uploaded(path: Path) -> str:
    if path.stat().st_size > LARGEST_UPLOAD:
        raise UserError(
            f"The file has {size_text(path.stat().st_size)}.",
            f"Use one of at most {size_text(LARGEST_UPLOAD)}.",
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("The file is not UTF-8 text.", "Upload JSON lines in UTF-8.") from None


def as_json_lines(text: str) -> str:
    """Rows as JSON lines; a line `question<TAB>answer`, as a spreadsheet copies it, becomes one."""
    lines = []
    for line in text.split("\n"):
        cells = line.rstrip("\r").split("\t")
        if len(cells) == 2 and not line.lstrip().startswith("{"):
            line = json.dumps({"question": cells[0], "answer": cells[1]}, ensure_ascii=False)
        lines.append(line)
    return "\n".join(lines)


@contextmanager
def _named(asked: Draft) -> Iterator[str]:
    """What the request is called while it is only looked at."""
    if asked.author:
        yield f"tofu:author={asked.author}"
        return
    with TemporaryDirectory(prefix="unlearner-") as folder:  # mode 0700
        path = Path(folder) / REQUEST
        path.write_text(asked.rows, encoding="utf-8")
        try:
            yield str(path)
        except UserError as error:
            # Nobody typed this path.
            raise UserError(error.problem.replace(str(path), "The request"), error.fix) from None


def look(asked: Draft, session: Session) -> tuple[str, dict[str, Any]]:
    """What is trained on, as HTML, and the plan with its memory; loads no weights.

    Raises:
        UserError: all that is wrong with the rows, a store of another base, no retain rows.
    """
    from ui.cli.commands.everyday.forget import forget_config
    from ui.cli.main import parse
    from ui.preview import make_preview
    from unlearner.objectives.registry import OBJECTIVES
    from unlearner.request.sources import parse_request
    from unlearner.request.tofu import load_refusals
    from unlearner.run import RunOptions, plan, prepare

    args = parse(asked.words(session))
    config = forget_config(args)
    base = session.base
    assert base is not None  # `words` refuses a session without one
    with _named(asked) as name:
        request = parse_request(name, session.data, None)
        preview = make_preview(
            name, base.name, revision=base.revision, data=session.data, retain=None,
            template=session.template, max_length=config.train.max_length,
        )  # fmt: skip
        needs = "refusal" in OBJECTIVES[config.objective.name].streams
        refusals = load_refusals(session.data) if needs else []
        options = RunOptions(template=session.template, refusals=refusals)
        run = prepare(request, base, config, session.store(), options)
        return preview_html(preview), plan(run)


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
    tail = f", {more} more like these" if more > 0 else ""
    cut = f" {len(preview.cut)} rows lose their end." if preview.cut else ""
    return (
        f'<div class="un-previews">{"".join(parts)}<p class="un-foot">{len(preview.forget)} rows '
        f"to forget{tail}. Underlined is what the loss is taken on.{esc(cut)}</p></div>"
    )


def free_memory(session: Session) -> int | None:
    """Free bytes where the training would run; None where the system does not say."""
    import torch

    spec = session.base
    if torch.cuda.is_available() and (spec is None or spec.device != "cpu"):
        return int(torch.cuda.mem_get_info()[0])
    from ui.doctor import memory_bytes

    free = memory_bytes()[1]
    return None if free is None else int(free)


def plan_html(plan: dict[str, Any], free: int | None) -> str:
    """Steps, size and whether the estimate fits the free memory."""
    memory = plan["memory"]
    low, high = memory["low_bytes"], memory["high_bytes"]
    if free is None:
        fits = "how much is free here is not known"
    elif high <= free:
        fits = f"{size_text(free)} free: fits"
    elif low <= free:
        fits = f"{size_text(free)} free: may not fit"
    else:
        fits = f"{size_text(free)} free: does not fit; use 4 bit or a smaller batch"
    parents = ", ".join(plan["parents"]) or "the bare base"
    return (
        f"<dl class='un-plan'><dt>Rows</dt><dd>forget {plan['forget_rows']}, retain "
        f"{plan['retain_rows']}</dd><dt>Trained on</dt><dd>{esc(parents)}</dd><dt>Plan</dt><dd>"
        f"{plan['steps']} steps of {plan['pairs_per_step']} pairs, "
        f"{plan['adapter_parameters']:,} parameters</dd><dt>Memory</dt><dd>estimate "
        f"{size_text(low)} to {size_text(high)}; {esc(fits)}</dd></dl>"
    )


def _shown(word: str) -> str:
    """A word of a job's command; the private file of pasted rows is the reader's own file."""
    return "rows.jsonl" if word.endswith(f"/{REQUEST}") else word


def job_html(view: Any) -> str:
    """A job as it stands: status, step, losses as curves, time left."""
    from evaluation.report.plots import draw_svg, line_chart
    from ui.console import duration_text

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
    bar = ""
    if last:
        left = last.get("remaining")
        doing = " ".join(str(last.get("message") or "").split())
        at = f"{doing or 'step'} {last['step']} of {last['steps']}"
        time_left = "" if view.ended or left is None else f", about {duration_text(left)} left"
        bar = (
            f'<progress max="{last["steps"]}" value="{last["step"]}" aria-label="Progress">'
            f'</progress><p class="un-foot">{esc(at + time_left)}</p>'
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
        f'<p class="un-sub" role="status">{esc(words)}</p>{bar}{plot}'
        f'<p class="un-foot"><code>{esc(command(*map(_shown, view.words)))}</code></p></section>'
    )
