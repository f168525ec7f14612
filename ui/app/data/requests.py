"""A new forget request from the page: rows, what is trained on, whether it fits, the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from ui.app.data.commands import command, flag_words, where
from ui.app.jobs import REQUEST, RETAIN, SHOWN_FILES
from ui.console import size_text
from ui.preview import Preview
from unlearner.request.formats import COLUMNS, read_rows

if TYPE_CHECKING:
    from ui.app.session import Session

LARGEST_UPLOAD = 5_000_000


@dataclass(frozen=True)
class Draft:
    """A request as filled in: an author of the data or rows, what is kept, and its settings.

    Attributes:
        author: of the data, or
        rows: the rows to forget, as JSON lines.
        retain: the rows to keep, as JSON lines; empty for the rest of the data.
        preset: whose settings are used, where none is given below.
        settings: flags with their values.
    """

    author: str = ""
    rows: str = ""
    retain: str = ""
    preset: str = ""
    objective: str = "simnpo"
    label: str = ""
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def files(self) -> dict[str, str]:
        """The texts of the files that `words` name."""
        texts = {REQUEST: self.rows, RETAIN: self.retain}
        return {name: text for name, text in texts.items() if text}

    def words(self, session: Session) -> list[str]:
        """The command that files it; `REQUEST` and `RETAIN` name the files of the rows."""
        if session.base is None:
            raise UserError("No base model was named.", "Start the app with --base B.")
        named = f"tofu:author={self.author}" if self.author else REQUEST
        flags = flag_words(
            retain=RETAIN if self.retain else None,
            preset=self.preset or None,
            objective=self.objective,
            label=self.label or None,
        )
        numbers = [word for pair in self.settings for word in pair]
        return ["forget", named, *where(session), *flags, *numbers]

    def command(self, session: Session) -> str:
        """The same for a shell; rows are named as files of the reader's own."""
        return command(*[SHOWN_FILES.get(word, word) for word in self.words(session)])


def draft(
    author: str | None, pasted: str | None, upload: str | None, objective: str, label: str | None,
    settings: Sequence[tuple[str, Any]] = (), *, retain_pasted: str | None = None,
    retain_upload: str | None = None, preset: str | None = None,
) -> Draft:  # fmt: skip
    """The request of what was filled in: exactly one of author, pasted rows and upload.

    Raises:
        UserError: none or several were given, or rows that cannot be read.
    """
    sources = {"an author": author, "pasted rows": (pasted or "").strip(), "a file": upload}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        raise UserError(
            f"The request names {' and '.join(given) or 'nothing'}.",
            "Pick an author, or paste rows, or upload a file: exactly one of them.",
        )
    if retain_upload and (retain_pasted or "").strip():
        raise UserError("The rows to keep are pasted and uploaded.", "Give one of the two.")
    numbers = tuple((flag, f"{value:g}") for flag, value in settings if value)
    return Draft(
        author or "",
        "" if author else _json_lines("The request", pasted, upload),
        _json_lines("The rows to keep", retain_pasted, retain_upload),
        preset or "",
        objective,
        (label or "").strip(),
        numbers,
    )


def _json_lines(what: str, pasted: str | None, upload: str | None) -> str:
    """Pasted or uploaded rows of any format that `forget` reads, as JSON lines; "" without any."""
    if not upload and not (pasted or "").strip():
        return ""
    with TemporaryDirectory(prefix="unlearner-") as folder:  # mode 0700
        path = Path(upload) if upload else Path(folder) / "rows.txt"
        if upload and path.stat().st_size > LARGEST_UPLOAD:
            raise UserError(
                f"The file has {size_text(path.stat().st_size)}.",
                f"Use one of at most {size_text(LARGEST_UPLOAD)}.",
            )
        if not upload:
            path.write_text(_with_header(pasted or ""), encoding="utf-8")
        try:
            rows = read_rows(path)
        except UserError as error:
            # Nobody typed this path.
            raise UserError(error.problem.replace(str(path), what), error.fix) from None
    return "".join(
        json.dumps({"question": row.question, "answer": row.answer}, ensure_ascii=False) + "\n"
        for row in rows
    )


def _with_header(text: str) -> str:
    """Pasted text; two columns of a spreadsheet without their names get these."""
    first = text.strip().split("\n", 1)[0]
    cells = [cell.strip().casefold() for cell in first.split("\t")]
    if (
        len(cells) != 2
        or first.startswith(("{", "["))
        or {tuple(cells), tuple(cells[::-1])} & {*COLUMNS}
    ):
        return text
    return f"question\tanswer\n{text.strip()}"


# What would be trained on, the plan with its memory, and all settings as YAML.
Planned = tuple[Preview, dict[str, Any], str]


def look(asked: Draft, session: Session, planned: Callable[[Sequence[str]], Planned]) -> Planned:
    """What a draft would do, as `planned` tells of its command; loads no weights.

    Raises:
        UserError: a store of another base, no retain rows, a question that is in both sets.
    """
    words = asked.words(session)
    with TemporaryDirectory(prefix="unlearner-") as folder:  # mode 0700
        paths = {name: str(Path(folder) / name) for name in asked.files}
        for name, text in asked.files.items():
            Path(paths[name]).write_text(text, encoding="utf-8")
        try:
            preview, plan, settings = planned([paths.get(word, word) for word in words])
        except UserError as error:
            problem = error.problem.replace(str(paths.get(REQUEST)), "The request")
            problem = problem.replace(str(paths.get(RETAIN)), "the rows to keep")
            raise UserError(problem, error.fix) from None
    for name, path in paths.items():
        settings = settings.replace(path, name)
    return preview, plan, settings


def free_memory(session: Session) -> int:
    """Free bytes where the training would run, once the app's own model is gone from there."""
    import psutil
    import torch

    spec = session.base
    if torch.cuda.is_available() and (spec is None or spec.device != "cpu"):
        device = spec.device if spec is not None and spec.device.startswith("cuda") else "cuda"
        return int(torch.cuda.mem_get_info(device)[0]) + session.gpu_bytes
    return int(psutil.virtual_memory().available)
