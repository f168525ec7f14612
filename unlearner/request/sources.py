"""Rows by name: a file, a split of TOFU, or one of its authors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapters.errors import UserError, did_you_mean
from unlearner.request.formats import read_rows
from unlearner.request.rows import Request, Row, refuse_problems
from unlearner.request.tofu import FORGET_SPLITS, load_authors, load_split


def parse_request(text: str, data: Path | None = None, retain: str | None = None) -> Request:
    """The forget request that `text` names, with its retain rows.

    Args:
        text: a JSONL file, `tofu:forget05`, or `tofu:author=NAME`.
        data: folder of TOFU's JSON-lines files, else the hub.
        retain: a JSONL file or `tofu:SPLIT` to keep; by default the rest of TOFU.

    Raises:
        UserError: naming all problems at once; a question in both sets is one.
    """
    if text.startswith("tofu:"):
        kind, rows, rest = _tofu_request(text.removeprefix("tofu:"), data)
    else:
        kind, rows, rest = "jsonl", read_rows(Path(text)), None
    if retain is not None:
        rest = rows_named(retain, data)
        _refuse_overlap(rows, rest, text, retain)
    elif rest is None:
        rest = [] if data is None else load_split("full", data)
        asked = {row.question.strip() for row in rows}
        rest = [row for row in rest if row.question.strip() not in asked]
    return Request(text, kind, tuple(rows), tuple(rest))


def _tofu_request(text: str, data: Path | None) -> tuple[str, list[Row], list[Row]]:
    if not text.startswith("author="):
        if text not in FORGET_SPLITS:
            choices = [*FORGET_SPLITS, "author=NAME"]
            raise UserError(f"'tofu:{text}' is not a request.", did_you_mean(text, choices))
        return "tofu-split", load_split(text, data), load_split(FORGET_SPLITS[text], data)
    wanted = text.removeprefix("author=").strip()
    authors = load_authors(data)
    found = [a for a in authors if a.name.casefold() == wanted.casefold()]
    if not wanted or not found:
        raise UserError(
            f"There is no author '{wanted}'.", did_you_mean(wanted, (a.name for a in authors))
        )
    kept = [row for author in authors if author is not found[0] for row in author.rows]
    return "tofu-author", list(found[0].rows), kept


def rows_named(text: str, data: Path | None = None, *, unique: bool = True) -> list[Row]:
    """The rows of `tofu:SPLIT` or a JSONL file; refuses what `load_split` or `read_rows` does."""
    split = text.removeprefix("tofu:")
    return load_split(split, data) if split != text else read_rows(Path(text), unique=unique)


def _refuse_overlap(forget: Sequence[Row], retain: Sequence[Row], name: str, kept: str) -> None:
    asked = {row.question.strip(): number for number, row in enumerate(forget, start=1)}
    problems = [
        f"row {asked[row.question.strip()]} is also row {number} of {kept}: {row.question!r}"
        for number, row in enumerate(retain, start=1)
        if row.question.strip() in asked
    ]
    why = "A question is either forgotten or kept: remove it from one of the two."
    refuse_problems(name, problems, why)
