"""TOFU's aggregated log (`locuslab/tofu` evaluate_util.py), read and written.

One object per task and in it one object per quantity, keyed by row index; TOFU's descendants (NPO,
Unlearn-Simple) write lists instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from adapters.errors import UserError
from evaluation.logs.records import (
    RECORDED,
    AnswerScore,
    EvalLog,
    Generation,
    RowRecord,
    SetRecord,
    column_by_index,
    count_of,
    loss_of,
    optional_recall,
    question_of,
    recall_of,
)

TASKS = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
}
_TOFU_NEEDED = ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss")
_TOFU_OPTIONAL = (
    "num_token_gt",
    "num_token_paraphrased",
    "num_token_perturb",
    "rouge1_recall",
    "rougeL_recall",
    "generated_text",
)


def is_tofu(raw: Any, where: str) -> bool:
    """Whether `raw` is TOFU's aggregated log, or one task's log in a file of the task's name."""
    if not isinstance(raw, dict):
        return False
    return any(task in raw for task in TASKS) or (where in TASKS and "avg_gt_loss" in raw)


def read_tofu(raw: Mapping[str, Any], where: str) -> EvalLog:
    """The log in TOFU's format, lists or dicts by index; tasks that are missing stay missing.

    Raises:
        UserError: a task's columns are missing, differ in their rows, or hold a bad number.
    """
    tasks = raw if any(task in raw for task in TASKS) else {where: raw}
    sets = {
        name: _tofu_set(tasks[task], name, f"{where}: {task}")
        for task, name in TASKS.items()
        if task in tasks
    }
    return EvalLog(sets, {"source": where, "format": "tofu"})


def _tofu_set(task: Any, name: str, where: str) -> SetRecord:
    if not isinstance(task, dict):
        raise UserError(f"{where} is {type(task).__name__}, not an object.", "Give TOFU's log.")
    missing = [key for key in _TOFU_NEEDED if key not in task]
    if missing:
        raise UserError(f"{where} has no {', '.join(missing)}.", "Give TOFU's aggregated log.")
    columns = {
        key: column_by_index(task[key], f"{where}: {key}")
        for key in (*_TOFU_NEEDED, *_TOFU_OPTIONAL)
        if key in task
    }
    first = columns[_TOFU_NEEDED[0]]
    if not first:
        raise UserError(f"{where} has no rows.", "Evaluate again.")
    for key, column in columns.items():
        odd = sorted(set(first) ^ set(column))
        if odd:
            raise UserError(
                f"{where}: {key} has {len(column)} rows, {_TOFU_NEEDED[0]} has {len(first)} "
                f"(row {odd[0]} is in only one of them).",
                "The log was put together from different runs: evaluate again.",
            )
    rows = tuple(
        _tofu_row({key: column[i] for key, column in columns.items()}, f"{where} row {i}")
        for i in sorted(first)
    )
    return SetRecord(name, rows)


def _tofu_row(row: Mapping[str, Any], where: str) -> RowRecord:
    texts = row.get("generated_text")
    question = answer = generated = None
    if texts is not None:
        if not isinstance(texts, list) or len(texts) != 3:
            raise UserError(
                f"{where}: generated_text is not [prompt, generated, truth].",
                "Give TOFU's own log.",
            )
        prompt, generated, answer = (str(text) for text in texts)
        question = question_of(prompt)
    perturbed = row["average_perturb_loss"]
    counts = row.get("num_token_perturb")
    if not isinstance(perturbed, list) or not perturbed:
        raise UserError(f"{where}: average_perturb_loss is not a list.", "Give TOFU's own log.")
    if counts is None:
        counts = [None] * len(perturbed)
    if not isinstance(counts, list) or len(counts) != len(perturbed):
        raise UserError(
            f"{where}: num_token_perturb does not match the {len(perturbed)} perturbed answers.",
            "Give TOFU's own log.",
        )
    generations = {}
    if "rougeL_recall" in row:
        generations[RECORDED] = Generation(
            generated,
            optional_recall(row.get("rouge1_recall"), where, "rouge1_recall"),
            recall_of(row["rougeL_recall"], where, "rougeL_recall"),
        )
    return RowRecord(
        question=question,
        answer=answer,
        answer_score=_score(row["avg_gt_loss"], row.get("num_token_gt"), where, "avg_gt_loss"),
        paraphrase=_score(
            row["avg_paraphrased_loss"],
            row.get("num_token_paraphrased"),
            where,
            "avg_paraphrased_loss",
        ),
        perturbed=tuple(
            _score(loss, n, where, f"average_perturb_loss[{k}]")
            for k, (loss, n) in enumerate(zip(perturbed, counts, strict=True))
        ),
        generations=generations,
    )


def _score(loss: Any, n: Any, where: str, what: str) -> AnswerScore:
    tokens = None if n is None else count_of(n, where, f"tokens of {what}")
    return AnswerScore(loss_of(loss, where, what), tokens)


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


def _tofu_columns(record_set: SetRecord, decoding: str | None) -> dict[str, list[Any]]:
    for i, row in enumerate(record_set.rows):
        if row.answer_score is None or row.paraphrase is None or not row.perturbed:
            raise UserError(
                f"Row {i} of {record_set.name} has no perturbed answers.",
                "TOFU's format needs answer, paraphrase and perturbed scores of every row.",
            )
    answers = [row.answer_score for row in record_set.rows if row.answer_score is not None]
    paraphrases = [row.paraphrase for row in record_set.rows if row.paraphrase is not None]
    wrong = [row.perturbed for row in record_set.rows]
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
    if record_set.name in ("real_authors", "world_facts"):
        columns["normalized_gt_loss"] = [
            _normalised_loss(score, row) for score, row in zip(answers, wrong, strict=True)
        ]
    return columns | _tofu_answers(record_set.rows, decoding)


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
    answers = [row.generations[name] for row in rows]
    columns: dict[str, list[Any]] = {"rougeL_recall": [g.rouge_l_recall for g in answers]}
    if all(g.rouge1_recall is not None for g in answers):
        columns["rouge1_recall"] = [g.rouge1_recall for g in answers]
    if all(
        row.question is not None and g.text is not None
        for row, g in zip(rows, answers, strict=True)
    ):
        columns["generated_text"] = [
            [f"[INST] {row.question} [/INST]", g.text, row.answer or ""]
            for row, g in zip(rows, answers, strict=True)
        ]
    return columns
