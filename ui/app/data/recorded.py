"""Recorded answers side by side: two evaluation logs, no model. Public TOFU logs and our own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import UserError
from ui.app.data.verdicts import verdict
from ui.app.session import Answer, Frame

if TYPE_CHECKING:
    from evaluation.logs.records import EvalLog, RowRecord

SET_NAMES = {
    "forget": "to forget",
    "retain": "retain authors",
    "real_authors": "real authors",
    "world_facts": "world facts",
}


@dataclass(frozen=True)
class Recorded:
    """Two logs and the questions that both hold, set by set."""

    names: tuple[str, str]
    logs: tuple[EvalLog, EvalLog]
    rows: dict[str, list[tuple[RowRecord, RowRecord]]]

    def questions(self, group: str) -> list[str]:
        """The questions of a set in their order."""
        return [str(one.question) for one, _ in self.rows.get(group, [])]

    def comparison(self) -> list[tuple[str, str, Answer, Answer]]:
        """Every row of all sets: set, question, both answers."""
        frames = [
            (group, self.frame(group, str(one.question)))
            for group, pairs in self.rows.items()
            for one, _ in pairs
        ]
        return [(group, f.question, f.base, f.unlearned) for group, f in frames]

    def frame(self, group: str, question: str) -> Frame:
        """The recorded answers to a question, judged by the same rule as live ones.

        Raises:
            UserError: neither log answers it.
        """
        for one, other in self.rows.get(group, []):
            if one.question == question:
                return Frame(
                    question, _answer(one), _answer(other), (), one.answer or other.answer,
                    stage="done",
                )  # fmt: skip
        raise UserError("This question is not in both logs.", "Choose one from the list.")


def open_recorded(paths: Sequence[Path]) -> Recorded:
    """The first two logs, matched by question.

    Raises:
        UserError: not two logs, a log that cannot be read, or no question in common.
    """
    from evaluation.logs import read_log
    from evaluation.report.inputs import log_names

    if len(paths) != 2:
        raise UserError(f"{len(paths)} logs were given.", "Name two: --logs A.json B.json.")
    logs = (read_log(paths[0]), read_log(paths[1]))
    rows = {}
    for name, shown in SET_NAMES.items():
        if all(name in log.sets for log in logs):
            pairs = _pairs(logs[0].sets[name].rows, logs[1].sets[name].rows)
            if pairs:
                rows[shown] = pairs
    if not rows:
        raise UserError(
            f"{paths[0].name} and {paths[1].name} have no answered question in common.",
            "Give logs of the same set which hold their questions and answers.",
        )
    first, second = log_names(paths)
    return Recorded((first, second), logs, rows)


def _pairs(
    ours: Sequence[RowRecord], theirs: Sequence[RowRecord]
) -> list[tuple[RowRecord, RowRecord]]:
    by_question = {_key(row): row for row in theirs if row.question and _text(row) is not None}
    return [
        (row, by_question[_key(row)])
        for row in ours
        if row.question and _text(row) is not None and _key(row) in by_question
    ]


def _key(row: RowRecord) -> str:
    return "".join((row.question or "").split())


def _text(row: RowRecord) -> str | None:
    return next((made.text for made in row.generations.values() if made.text is not None), None)


def _answer(row: RowRecord) -> Answer:
    from evaluation.metrics.forget_quality import log_truth_ratio

    made = next(m for m in row.generations.values() if m.text is not None)
    prob = None if row.answer_score is None else math.exp(-row.answer_score.mean_nll)
    ratio = None
    if row.paraphrase is not None and row.perturbed:
        wrong = [[score.mean_nll for score in row.perturbed]]
        ratio = math.exp(float(log_truth_ratio([row.paraphrase.mean_nll], wrong)[0]))
    text = str(made.text)
    return Answer(
        text,
        rouge_l_recall=made.rouge_l_recall,
        answer_prob=prob,
        truth_ratio=ratio,
        word=verdict(text, made.rouge_l_recall, prob),
    )
