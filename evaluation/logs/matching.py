"""Pairs the rows of two logs by question, never by position alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapters.errors import UserError
from evaluation.logs.records import RowRecord


@dataclass(frozen=True)
class RowMatch:
    """Rows of two logs, pair by pair the same question; `by` says how that is known."""

    ours: tuple[RowRecord, ...]
    theirs: tuple[RowRecord, ...]
    by: Literal["question", "position"]


def match_rows(
    ours: Sequence[RowRecord], theirs: Sequence[RowRecord], *, subset: bool = False
) -> RowMatch:
    """The rows of two logs paired by question where both hold their questions.

    Without questions rows are matched by position, and only where all token counts agree.

    Args:
        ours, theirs: rows of the same set in two logs, in any order.
        subset: `ours` may be a part of `theirs` (a limited run); else both hold the same rows.

    Raises:
        UserError: the logs hold different rows, or nothing shows that they hold the same.
    """
    if all(row.question is not None for row in (*ours, *theirs)):
        our_rows, their_rows = _by_key(ours), _by_key(theirs)
        only_ours = [row for key, row in our_rows.items() if key not in their_rows]
        only_theirs = [row for key, row in their_rows.items() if key not in our_rows]
        if only_ours or (only_theirs and not subset):
            example = (only_ours or only_theirs)[0].question
            raise UserError(
                f"The two logs hold different rows: {len(only_ours)} questions are only in the "
                f"first, {len(only_theirs)} only in the second, for example {example!r}.",
                "Compare logs of the same set and the same number of rows.",
            )
        return RowMatch(tuple(ours), tuple(their_rows[key] for key in our_rows), "question")
    if len(ours) != len(theirs):
        raise UserError(
            f"The two logs hold {len(ours)} and {len(theirs)} rows, and not both hold questions.",
            "Compare logs of the same rows.",
        )
    for i, (our_row, their_row) in enumerate(zip(ours, theirs, strict=True)):
        our_counts, their_counts = _token_counts(our_row), _token_counts(their_row)
        if None in our_counts or None in their_counts:
            raise UserError(
                "The two logs cannot be matched: not both hold their questions or token counts.",
                "Evaluate again with this tool, which records the questions.",
            )
        if our_counts != their_counts:
            raise UserError(
                f"The two logs hold different rows: row {i} has {our_counts[0]} answer tokens in "
                f"one and {their_counts[0]} in the other, and not both hold questions.",
                "Compare logs of the same rows, scored with the same tokenizer.",
            )
    return RowMatch(tuple(ours), tuple(theirs), "position")


def _by_key(rows: Sequence[RowRecord]) -> dict[tuple[str, str, int], RowRecord]:
    """By question without white space; by the answer too where a question occurs twice."""
    questions = ["".join((row.question or "").split()) for row in rows]
    times = Counter(questions)
    seen: Counter[tuple[str, str]] = Counter()
    keyed = {}
    for question, row in zip(questions, rows, strict=True):
        answer = "".join((row.answer or "").split()) if times[question] > 1 else ""
        keyed[question, answer, seen[question, answer]] = row
        seen[question, answer] += 1
    return keyed


def _token_counts(row: RowRecord) -> tuple[int | None, ...]:
    scores = (row.answer_score, row.paraphrase, *row.perturbed)
    return tuple(score.n for score in scores if score is not None) or (None,)


def other_precision(meta: Mapping[str, Any], reference: Any) -> list[tuple[str, str, str]]:
    """Where weights were loaded in another precision: the key, ours and the reference's."""
    theirs = {} if reference is None else reference.meta
    pairs = ((key, meta.get(key), theirs.get(key)) for key in ("quantization", "dtype"))
    return [(key, a, b) for key, a, b in pairs if a and b and a != b]
