"""Rows by name: a file, a split of TOFU, or one of its authors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adapters.digests import normalised
from adapters.errors import UserError, did_you_mean
from unlearner.request.formats import HUB_PREFIX, Columns, read_hub, read_rows
from unlearner.request.rows import Request, Row, refuse_problems
from unlearner.request.tofu import FORGET_SPLITS, SPLITS, load_authors, load_split, split_name


def parse_request(
    text: str,
    data: Path | None = None,
    retain: str | None = None,
    columns: Columns | None = None,
) -> Request:
    """The forget request that `text` names, with its retain rows.

    Args:
        text: `forget05` or `tofu:forget05`, `tofu:author=NAME`, `hub:OWNER/NAME`, or a file of
            rows (see `read_rows`).
        data: folder of TOFU's JSON-lines files, else the hub.
        retain: the rows to keep, named like the request; by default the rest of TOFU.
        columns: which columns of the files hold question and answer.

    Raises:
        UserError: naming all problems at once; a question in both sets is one.
    """
    if text.startswith("tofu:") or (text in FORGET_SPLITS and not Path(text).exists()):
        kind, rows, rest = _tofu_request(split_name(text), data)
    else:
        kind, rows, rest = "jsonl", rows_named(text, data, columns=columns), None
    if retain is not None:
        usual = replace(columns or Columns(), optional=True)
        rest = rows_named(retain, data, columns=usual)
        refuse_overlap(rows, rest, text, retain)
    elif rest is None:
        rest = [] if data is None else load_split("full", data)
        forgotten = {normalised(row.question) for row in rows}
        rest = [row for row in rest if normalised(row.question) not in forgotten]
    return Request(text, kind, tuple(rows), tuple(rest))


def rows_named(
    text: str, data: Path | None = None, *, unique: bool = True, columns: Columns | None = None
) -> list[Row]:
    """The rows of a TOFU split (`retain90`, `tofu:retain90`), a file or `hub:OWNER/NAME`.

    Raises:
        UserError: what `load_split`, `read_rows` and `read_hub` refuse.
    """
    if text.startswith(HUB_PREFIX):
        return read_hub(text.removeprefix(HUB_PREFIX), unique=unique, columns=columns)
    if text.startswith("tofu:") or (text in SPLITS and not Path(text).exists()):
        return load_split(text, data)
    return read_rows(Path(text), unique=unique, columns=columns)


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


def refuse_overlap(forget: Sequence[Row], retain: Sequence[Row], name: str, kept: str) -> None:
    """Raises UserError where a question is both forgotten (rows of `name`) and in `kept`."""
    numbers = {normalised(row.question): number for number, row in enumerate(forget, start=1)}
    problems = [
        ("", f"row {number} is also row {i} of {kept}: {row.question!r}")
        for i, row in enumerate(retain, start=1)
        if (number := numbers.get(normalised(row.question)))
    ]
    why = "A question is either forgotten or kept: remove it from one of the two."
    refuse_problems(name, problems, why)
