"""Rows of two logs put side by side, by question and never by position alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    """The rows of two logs put side by side, by question where both hold their questions.

    Without questions rows are matched by position, and only where all token counts agree.

    Args:
        ours, theirs: rows of the same set in two logs, in any order.
        subset: `ours` may be a part of `theirs` (a limited run); else both hold the same rows.

    Raises:
        UserError: the logs hold different rows, or nothing shows that they hold the same.
    """
    if all(row.question is not None for row in (*ours, *theirs)):
        return _match_by_question(ours, theirs, subset)
    if len(ours) != len(theirs):
        raise UserError(
            f"The two logs hold {len(ours)} and {len(theirs)} rows, and not both hold questions.",
            "Compare logs of the same rows.",
        )
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        mine, yours = _token_counts(one), _token_counts(other)
        if None in mine or None in yours:
            raise UserError(
                "The two logs cannot be matched: not both hold their questions or token counts.",
                "Evaluate again with this tool, which records the questions.",
            )
        if mine != yours:
            raise UserError(
                f"The two logs hold different rows: row {i} has {mine[0]} answer tokens in one "
                f"and {yours[0]} in the other, and not both hold questions.",
                "Compare logs of the same rows, scored with the same tokenizer.",
            )
    return RowMatch(tuple(ours), tuple(theirs), "position")


def _match_by_question(
    ours: Sequence[RowRecord], theirs: Sequence[RowRecord], subset: bool
) -> RowMatch:
    mine = dict(zip(_keys(ours), ours, strict=True))
    yours = dict(zip(_keys(theirs), theirs, strict=True))
    only_mine = [row for key, row in mine.items() if key not in yours]
    only_yours = [row for key, row in yours.items() if key not in mine]
    if only_mine or (only_yours and not subset):
        example = (only_mine or only_yours)[0].question
        raise UserError(
            f"The two logs hold different rows: {len(only_mine)} questions are only in the first, "
            f"{len(only_yours)} only in the second, for example {example!r}.",
            "Compare logs of the same set and the same number of rows.",
        )
    return RowMatch(tuple(mine.values()), tuple(yours[key] for key in mine), "question")


def _keys(rows: Sequence[RowRecord]) -> list[tuple[str, str, int]]:
    """Question without white space; the answer too where a question stands twice."""
    questions = ["".join((row.question or "").split()) for row in rows]
    times = Counter(questions)
    seen: Counter[tuple[str, str]] = Counter()
    keys = []
    for question, row in zip(questions, rows, strict=True):
        answer = "".join((row.answer or "").split()) if times[question] > 1 else ""
        keys.append((question, answer, seen[question, answer]))
        seen[question, answer] += 1
    return keys


def _token_counts(row: RowRecord) -> tuple[int | None, ...]:
    scores = (row.answer_score, row.paraphrase, *row.perturbed)
    return tuple(score.n for score in scores if score is not None) or (None,)
