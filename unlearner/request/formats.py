"""Rows from a file of a person's own."""

from __future__ import annotations

import json
from pathlib import Path

from adapters.errors import UserError
from unlearner.request.rows import Row, check_row, refuse_problems


def read_rows(path: Path, *, unique: bool = True, needs_answer: bool = True) -> list[Row]:
    """The rows of a JSON-lines file (one object a line), in order.

    Args:
        path: a file of `{"question": ..., "answer": ...}` lines.
        unique: refuse a row that stands twice.
        needs_answer: refuse a row without an answer; else it is empty.

    Raises:
        UserError: naming every broken line, missing key, empty text and duplicate at once.
    """
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {kind}.", "Give a JSONL file of question/answer rows.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason}).", "Save it as UTF-8."
        ) from None
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[tuple[str, str], int] = {}
    # Not str.splitlines: it also splits at U+2028 and form feeds, which may stand inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: broken JSON at column {error.colno}: {error.msg}")
            continue
        row = check_row(
            raw, where, problems, ("question", "answer") if needs_answer else ("question",)
        )
        if row is None:
            continue
        key = (row.question.strip(), row.answer.strip())
        if unique and key in seen:
            problems.append(f"{where}: the same row as line {seen[key]}")
        seen.setdefault(key, number)
        rows.append(row)
    if not rows and not problems:
        problems.append("no rows")
    refuse_problems(
        str(path), problems, 'Write one {"question": ..., "answer": ...} object a line.'
    )
    return rows
