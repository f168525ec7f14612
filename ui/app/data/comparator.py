"""LLM Comparator's file: two sets of answers to the same questions, live or from two logs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from ui.app.data.answers import Answer, with_verdict
from ui.app.data.sheet import SheetRow

if TYPE_CHECKING:
    from evaluation.logs.records import Generation, RowRecord

SET_NAMES = {
    "forget": "to forget",
    "retain": "retain authors",
    "real_authors": "real authors",
    "world_facts": "world facts",
}
PER_MODEL = {
    "rouge_l_recall": "rouge_l", "answer_prob": "answer_prob", "truth_ratio": "truth_ratio",
    "fact_recall": "fact_recall",
}  # fmt: skip


def comparator(rows: Sequence[SheetRow], names: tuple[str, str]) -> dict[str, Any]:
    """LLM Comparator's JSON (PAIR) of two models' answers.

    The score is ROUGE-L of A minus that of B, null where one was not measured: positive where A
    holds more of the true answer. A per-model field holds A's value, then B's.
    """
    return {
        "metadata": {
            "source_path": "unlearner",
            "custom_fields_schema": [
                *({"name": name, "type": "per_model_number"} for name in PER_MODEL.values()),
                {"name": "verdict", "type": "per_model_category"},
            ],
        },
        "models": [{"name": name} for name in names],
        "examples": [_example(row) for row in rows],
    }


def _example(row: SheetRow) -> dict[str, Any]:
    a, b = row.base, row.unlearned
    scores = [score for score in (a.rouge_l_recall, b.rouge_l_recall) if score is not None]
    return {
        "input_text": row.question,
        "tags": [row.group],
        "output_text_a": a.text,
        "output_text_b": b.text,
        "score": scores[0] - scores[1] if len(scores) == 2 else None,
        "individual_rater_scores": [],
        "custom_fields": {
            **{name: [getattr(a, key), getattr(b, key)] for key, name in PER_MODEL.items()},
            "verdict": [a.word or None, b.word or None],
        },
    }


def recorded_pairs(first: Path, second: Path) -> list[SheetRow]:
    """The answers of two logs to the questions that both hold, set by set.

    Raises:
        UserError: a log that cannot be read, or no answered question in common.
    """
    from evaluation.logs import read_log

    logs = (read_log(first), read_log(second))
    pairs: list[SheetRow] = []
    for name, shown in SET_NAMES.items():
        if all(name in log.sets for log in logs):
            rows = [_answered(log.sets[name].rows) for log in logs]
            pairs += [
                SheetRow(
                    shown,
                    str(row.question),
                    row.answer or "",
                    _answer(row, text),
                    _answer(*rows[1][key]),
                )
                for key, (row, text) in rows[0].items()
                if key in rows[1]
            ]
    if not pairs:
        raise UserError(
            f"{first.name} and {second.name} have no answered question in common.",
            "Choose logs of the same set that hold questions and answers.",
        )
    return pairs


def _answered(rows: Sequence[RowRecord]) -> dict[str, tuple[RowRecord, Generation]]:
    """Rows with an answer by their question, blanks aside."""
    return {
        "".join(row.question.split()): (row, generation)
        for row in rows
        if row.question
        for generation in _texts(row)
    }


def _texts(row: RowRecord) -> Iterator[Generation]:
    """The row's first generation that has a text, if any."""
    yield from [made for made in row.generations.values() if made.text is not None][:1]


def _answer(row: RowRecord, generation: Generation) -> Answer:
    from evaluation.metrics.forget_quality import log_truth_ratio

    prob = None if row.answer_score is None else math.exp(-row.answer_score.mean_nll)
    ratio = None
    if row.paraphrase is not None and row.perturbed:
        wrong = [[score.mean_nll for score in row.perturbed]]
        ratio = math.exp(float(log_truth_ratio([row.paraphrase.mean_nll], wrong)[0]))
    answer = Answer(
        str(generation.text),
        rouge_l_recall=generation.rouge_l_recall,
        answer_prob=prob,
        truth_ratio=ratio,
    )
    return with_verdict(answer, row.question, row.answer)
