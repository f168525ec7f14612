"""A new forget request from the page: rows, what is trained on, whether it fits, the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from ui.app.data.commands import base_words, command
from ui.app.jobs import REQUEST
from ui.console import size_text

if TYPE_CHECKING:
    from ui.app.session import Session
    from ui.preview import Preview
    from unlearner.config import UnlearnConfig

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


def look(
    asked: Draft, session: Session, config_of: Callable[[Sequence[str]], UnlearnConfig]
) -> tuple[Preview, dict[str, Any]]:
    """What is trained on, and the plan with its memory; loads no weights.

    `config_of` gives the settings of a `forget` command.

    Raises:
        UserError: all that is wrong with the rows, a store of another base, no retain rows.
    """
    from ui.preview import make_preview
    from unlearner.objectives.registry import OBJECTIVES
    from unlearner.request.sources import parse_request
    from unlearner.request.tofu import load_refusals
    from unlearner.run import RunOptions, plan, prepare

    words = asked.words(session)
    config = config_of(words)
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
        given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        options = RunOptions(template=session.template, refusals=refusals, given=given)
        return preview, plan(prepare(request, base, config, session.store(), options))


def free_memory(session: Session) -> int:
    """Free bytes where the training would run."""
    import psutil
    import torch

    spec = session.base
    if torch.cuda.is_available() and (spec is None or spec.device != "cpu"):
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
