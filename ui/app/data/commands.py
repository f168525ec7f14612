"""Command lines that can be pasted into a shell: "Copy as command" and hints. No gradio."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ui.app.data.answers import Sampling

if TYPE_CHECKING:
    from evaluation.report.build import ReportRequest
    from ui.app.data.answers import Frame, Stack
    from ui.app.session import Session

PLAIN = Sampling()


def command(*words: object) -> str:
    """A command line that can be pasted into a shell."""
    return shlex.join(["unlearner", *[str(word) for word in words]])


def flag_words(**values: Any) -> list[str]:
    """Flags with their values; None, False, an empty list and a default "auto" are left out."""
    words = []
    for name, value in values.items():
        if value is None or value is False or value in ([], ()):
            continue
        if value == "auto" and name in ("dtype", "template", "device", "attention"):
            continue
        items = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += ["--" + name.replace("_", "-"), *map(str, items)]
    return words


def where(session: Session) -> list[str]:
    """The flags that name what the page works on: base, store, data, prompts."""
    base = {} if session.base is None else asdict(session.base)
    return flag_words(
        base=base.pop("name", None),
        **base,
        store=session.store_path,
        data=session.data,
        template=session.template,
        system=session.system,
    )


def _stack(stack: Stack) -> list[str]:
    scales = ",".join(f"{scale:g}" for _, scale in stack)
    return flag_words(
        adapters=",".join(slug for slug, _ in stack) or "none",
        scales=scales if any(scale != 1.0 for _, scale in stack) else None,
    )


def ask(session: Session, frame: Frame) -> str:
    """The comparison that the page shows."""
    drawn = frame.sampling or PLAIN
    sampling = flag_words(
        temperature=f"{drawn.temperature:g}" if drawn.temperature else None,
        seed=drawn.seed if drawn.temperature else None,
        max_new=drawn.max_new if drawn.max_new != PLAIN.max_new else None,
    )
    # The question stands behind `--`: it may begin with a dash.
    return command("ask", *where(session), *_stack(frame.stack), *sampling, "--", frame.question)


def sheet(session: Session, author: str, stack: Stack, neighbours: int) -> str:
    """The author sheet."""
    asked = flag_words(author=author, neighbours=neighbours)
    return command("ask", *asked, *where(session), *_stack(stack))


def change(session: Session, action: str, ref: str = "", strength: float = 1.0) -> str:
    """What a button of the Stack tab does: list, activate, revert or clear."""
    tail = ["--store", session.store_path]
    if action == "list":
        return command("adapters", "list", *tail)
    if action == "activate":
        scales = [] if strength == 1.0 else ["--scales", f"{strength:g}"]
        return command("adapters", "activate", ref, "--with-parents", *scales, *tail)
    if action == "clear":
        return command("adapters", "revert", "--all", *tail)
    return command("adapters", "revert", ref, *tail)


def runs(
    session: Session, logs: Sequence[Path], retain_log: Path | None, split: str | None
) -> str:  # fmt: skip
    """One command a line: the figures of each log, and of the stack that is filed."""
    against = flag_words(reference_log=retain_log)
    lines = [command("score", log, *against) for log in logs]
    if session.base is not None and split:
        lines.append(command("evaluate", *where(session), "--split", split, *against))
    return "\n".join(lines)


def report(request: ReportRequest, *, png: bool = False) -> str:
    """The command that makes the same report; --out is left out, as it changes no byte."""
    flags = flag_words(
        reference_log=request.reference_log,
        second_reference_log=request.second_reference_log,
        protocol=",".join(request.protocols) or None,
        tried=request.tried,
        published=request.published,
        title=request.title if request.title != type(request).title else None,
        date=request.date or None,
        robustness=request.robustness,
        calibration=request.calibration,
        without_answers=request.without_answers,
        png=png,
    )
    return command("report", *request.inputs, *flags)


def demo(folder: Path) -> str:
    """The demo world."""
    return command("quickstart", "--out", folder)
