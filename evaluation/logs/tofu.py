"""TOFU's aggregated log (`locuslab/tofu` evaluate_util.py), read and written.

One object per task and in it one object per quantity, keyed by row index; TOFU's descendants (NPO,
Unlearn-Simple) write lists instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from adapters.errors import UserError
from evaluation.logs.records import (
    RECORDED,
    EvalLog,
    RowRecord,
    SetRecord,
    columns_by_index,
    generation,
    question_of,
    score_of,
)

TASKS = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
}
NEEDED = ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss")
OPTIONAL = (
    "num_token_gt", "num_token_paraphrased", "num_token_perturb", "rouge1_recall", "rougeL_recall",
    "generated_text",
)  # fmt: skip


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
    missing = [key for key in NEEDED if key not in task]
    if missing:
        raise UserError(f"{where} has no {', '.join(missing)}.", "Give TOFU's aggregated log.")
    columns = {key: task[key] for key in (*NEEDED, *OPTIONAL) if key in task}
    rows = [_tofu_row(row, f"{where} row {i}") for i, row in columns_by_index(columns, where)]
    if not rows:
        raise UserError(f"{where} has no rows.", "Evaluate again.")
    return SetRecord(name, tuple(rows))


def _tofu_row(row: Mapping[str, Any], where: str) -> RowRecord:
    def refuse(problem: str) -> NoReturn:
        raise UserError(f"{where}: {problem}.", "Give TOFU's own log.")

    question = answer = text = None
    if (texts := row.get("generated_text")) is not None:
        if not isinstance(texts, list) or len(texts) != 3:
            refuse("generated_text is not [prompt, generated, truth]")
        prompt, text, answer = map(str, texts)
        question = question_of(prompt)
    wrong = row["average_perturb_loss"]
    if not isinstance(wrong, list) or not wrong:
        refuse("average_perturb_loss is not a list")
    counts = row.get("num_token_perturb") or [None] * len(wrong)
    if not isinstance(counts, list) or len(counts) != len(wrong):
        refuse(f"num_token_perturb does not match the {len(wrong)} perturbed answers")
    generations = {}
    if "rougeL_recall" in row:
        recalls = row.get("rouge1_recall"), row["rougeL_recall"]
        generations[RECORDED] = generation(text, *recalls, where)
    truth, paraphrase = (
        score_of(row[loss], row.get(n), where, loss)
        for loss, n in (
            ("avg_gt_loss", "num_token_gt"), ("avg_paraphrased_loss", "num_token_paraphrased")
        )
    )  # fmt: skip
    perturbed = tuple(
        score_of(loss, n, where, f"average_perturb_loss[{k}]")
        for k, (loss, n) in enumerate(zip(wrong, counts, strict=True))
    )
    return RowRecord(question, answer, truth, paraphrase, perturbed, generations)


def to_tofu(log: EvalLog, decoding: str | None = None) -> dict[str, Any]:
    """`log` as TOFU's `eval_log_aggregated.json`, so that others' tools read ours.

    Args:
        log: every row needs its answer, paraphrase and perturbed scores.
        decoding: which generated answers to write; by default those that all rows of a set have.

    Raises:
        UserError: a row lacks a score that the format demands.
    """
    return {
        task: {
            key: {str(i): value for i, value in enumerate(values)}
            for key, values in _tofu_columns(log.sets[name], decoding).items()
        }
        for task, name in TASKS.items()
        if name in log.sets
    }


def _tofu_columns(record_set: SetRecord, decoding: str | None) -> dict[str, list[Any]]:
    from scipy.special import logsumexp

    answers, paraphrases = [], []
    for i, row in enumerate(record_set.rows):
        if row.answer_score is None or row.paraphrase is None or not row.perturbed:
            raise UserError(
                f"Row {i} of {record_set.name} has no perturbed answers.",
                "TOFU's format needs answer, paraphrase and perturbed scores of every row.",
            )
        answers.append(row.answer_score)
        paraphrases.append(row.paraphrase)
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
        # -log of P(answer) over the sum with the wrong answers' P.
        logs = [[-score.mean_nll for score in (a, *w)] for a, w in zip(answers, wrong, strict=True)]
        columns["normalized_gt_loss"] = [float(logsumexp(row)) - row[0] for row in logs]
    return columns | _tofu_answers(record_set.rows, decoding)


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
    columns: dict[str, list[Any]] = {
        "rougeL_recall": [answer.rouge_l_recall for answer in answers],
        "rouge1_recall": [answer.rouge1_recall for answer in answers],
        "generated_text": [
            [f"[INST] {row.question} [/INST]", answer.text, row.answer or ""]
            for row, answer in zip(rows, answers, strict=True)
        ],
    }
    if any(recall is None for recall in columns["rouge1_recall"]):
        del columns["rouge1_recall"]
    if any(row.question is None for row in rows) or any(a.text is None for a in answers):
        del columns["generated_text"]
    return columns
