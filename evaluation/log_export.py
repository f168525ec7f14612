"""Writes our logs in the public layouts, so that others' tools read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from adapters.errors import UserError
from evaluation.public_logs import TASKS
from evaluation.records import AnswerScore, EvalLog, RowRecord, SetRecord


def to_tofu(
    log: EvalLog, decoding: str | None = None, layout: Literal["dict", "list"] = "dict"
) -> dict[str, Any]:
    """`log` as TOFU's `eval_log_aggregated.json`, so that others' tools read ours.

    Args:
        log: every row needs its answer, paraphrase and perturbed scores.
        decoding: which generated answers to write; by default those that all rows of a set have.
        layout: "dict" (TOFU) keys rows by index, "list" (NPO, Unlearn-Simple) does not.

    Raises:
        UserError: a row lacks a score that the format demands.
    """
    tasks = {}
    for task, name in TASKS.items():
        if name in log.sets:
            columns = _tofu_columns(log.sets[name], decoding)
            tasks[task] = {
                key: values if layout == "list" else {str(i): v for i, v in enumerate(values)}
                for key, values in columns.items()
            }
    return tasks


def _tofu_columns(found: SetRecord, decoding: str | None) -> dict[str, list[Any]]:
    for i, row in enumerate(found.rows):
        if row.answer_score is None or row.paraphrase is None or not row.perturbed:
            raise UserError(
                f"Row {i} of {found.name} has no perturbed answers.",
                "TOFU's format needs answer, paraphrase and perturbed scores of every row.",
            )
    answers = [row.answer_score for row in found.rows if row.answer_score is not None]
    paraphrases = [row.paraphrase for row in found.rows if row.paraphrase is not None]
    wrong = [row.perturbed for row in found.rows]
    columns: dict[str, list[Any]] = {
        "avg_gt_loss": [score.mean_nll for score in answers],
        "average_perturb_loss": [[score.mean_nll for score in row] for row in wrong],
        "avg_paraphrased_loss": [score.mean_nll for score in paraphrases],
    }
    flat = [*answers, *paraphrases, *(score for row in wrong for score in row)]
    if all(score.n is not None for score in flat):
        columns |= {
            "gt_loss": [score.total_nll for score in answers],
            "num_token_gt": [score.n for score in answers],
            "paraphrased_loss": [score.total_nll for score in paraphrases],
            "num_token_paraphrased": [score.n for score in paraphrases],
            "perturb_loss": [[score.total_nll for score in row] for row in wrong],
            "num_token_perturb": [[score.n for score in row] for row in wrong],
        }
    if found.name in ("real_authors", "world_facts"):
        columns["normalized_gt_loss"] = [
            _normalised_loss(score, row) for score, row in zip(answers, wrong, strict=True)
        ]
    return columns | _tofu_answers(found.rows, decoding)


def _normalised_loss(answer: AnswerScore, wrong: Sequence[AnswerScore]) -> float:
    """-log of P(answer) over the sum with the wrong answers' P, by log-sum-exp."""
    logs = [-answer.mean_nll, *(-score.mean_nll for score in wrong)]
    top = max(logs)
    return top + math.log(sum(math.exp(value - top) for value in logs)) - logs[0]


def _tofu_answers(rows: Sequence[RowRecord], decoding: str | None) -> dict[str, list[Any]]:
    shared = set.intersection(*(set(row.generations) for row in rows)) if rows else set()
    name = decoding if decoding is not None else min(shared, default=None)
    if name is None:
        return {}
    if name not in shared:
        raise UserError(
            f"The log has no answers decoded as '{name}' for every row.",
            f"It has: {', '.join(sorted(shared)) or 'none'}.",
        )
    made = [row.generations[name] for row in rows]
    columns: dict[str, list[Any]] = {"rougeL_recall": [g.rouge_l_recall for g in made]}
    if all(g.rouge1_recall is not None for g in made):
        columns["rouge1_recall"] = [g.rouge1_recall for g in made]
    if all(
        row.question is not None and g.text is not None for row, g in zip(rows, made, strict=True)
    ):
        columns["generated_text"] = [
            [f"[INST] {row.question} [/INST]", g.text, row.answer or ""]
            for row, g in zip(rows, made, strict=True)
        ]
    return columns
