"""The command that does the same as a button of the page: "Copy as command". No gradio."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ui.app.data.decoding import Sampling

if TYPE_CHECKING:
    from adapters.base.load import BaseSpec
    from ui.app.data.answers import Frame, Stack
    from ui.app.session import Session

PLAIN = Sampling()


def command(*words: object) -> str:
    """A command line that can be pasted into a shell."""
    return shlex.join(["unlearner", *[str(word) for word in words]])


def base_words(spec: BaseSpec) -> list[str]:
    """The flags that name a base and how it is loaded."""
    words = ["--base", spec.name]
    words += ["--revision", spec.revision] if spec.revision else []
    words += ["--dtype", spec.dtype] if spec.dtype != "auto" else []
    words += ["--load-in-4bit"] if spec.load_in_4bit else []
    words += ["--device", spec.device] if spec.device != "auto" else []
    words += ["--attention", spec.attention] if spec.attention != "auto" else []
    return words


def where(session: Session) -> list[str]:
    """The flags that name what the page works on: base, store, data, prompts."""
    words = base_words(session.base) if session.base is not None else []
    words += ["--store", str(session.store_path)]
    words += ["--data", str(session.data)] if session.data else []
    words += ["--template", session.template] if session.template != "auto" else []
    words += ["--system", session.system] if session.system is not None else []
    return words


def _stack(stack: Stack) -> list[str]:
    words = ["--adapters", ",".join(slug for slug, _ in stack) or "none"]
    if any(scale != 1.0 for _, scale in stack):
        words += ["--scales", ",".join(f"{scale:g}" for _, scale in stack)]
    return words


def _ask(session: Session, frame: Frame) -> list[str]:
    sampling = frame.sampling or PLAIN
    words = ["ask", *where(session), *_stack(frame.stack)]
    if sampling.temperature:
        words += ["--temperature", f"{sampling.temperature:g}", "--seed", str(sampling.seed)]
    if sampling.max_new != PLAIN.max_new:
        words += ["--max-new", str(sampling.max_new)]
    return words


def ask(session: Session, frame: Frame) -> str:
    """The comparison that the page shows."""
    # The question stands behind `--`: it may begin with a dash.
    return command(*_ask(session, frame), "--", frame.question)


def sheet(session: Session, author: str, stack: Stack, neighbours: int) -> str:
    """The author sheet."""
    return command(
        "ask", "--author", author, "--neighbours", neighbours, *where(session), *_stack(stack)
    )


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
    against = ["--reference-log", retain_log] if retain_log else []
    lines = [command("score", log, *against) for log in logs]
    if session.base is not None and split:
        lines.append(command("evaluate", *where(session), "--split", split, *against))
    return "\n".join(lines)


def report(
    logs: Sequence[Path], retain_log: Path | None, robustness: Sequence[Path],
    calibration: Sequence[Path],
) -> str:  # fmt: skip
    """The HTML report of these logs and probes; empty without a log to report on."""
    if not logs:
        return ""
    from evaluation.report.inputs import named_logs

    words: list[object] = ["report", *named_logs(logs)]
    words += ["--reference-log", retain_log] if retain_log else []
    words += ["--robustness", *robustness] if robustness else []
    words += ["--calibration", *calibration] if calibration else []
    return command(*words)


def demo(folder: Path) -> str:
    """The demo world."""
    return command("quickstart", "--out", folder)
