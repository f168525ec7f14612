"""Reads the public formats: TOFU's aggregated log (two layouts), open-unlearning's evaluation.

TOFU (`locuslab/tofu` evaluate_util.py) writes one object a task and in it one object a quantity,
keyed by row index; its descendants (NPO, Unlearn-Simple) write lists instead. open-unlearning
(`locuslab/open-unlearning` src/evals) writes one object a metric with `value_by_index`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapters.errors import UserError
from evaluation.logs.records import (
    RECORDED,
    AnswerScore,
    EvalLog,
    Generation,
    RowRecord,
    SetRecord,
    count_of,
    loss_of,
    optional_recall,
    recall_of,
)

TASKS = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
}
PREFIXES = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
_TOFU_NEEDED = ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss")
_TOFU_OPTIONAL = (
    "num_token_gt",
    "num_token_paraphrased",
    "num_token_perturb",
    "rouge1_recall",
    "rougeL_recall",
    "generated_text",
)
# What stands around the question in a recorded prompt; special tokens are already gone.
_PROMPTS = (
    re.compile(r"\s*(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>.*?<</SYS>>)?(.*)\[/INST\]\s*", re.DOTALL),
    re.compile(r"\s*Question:(.*)\n\s*Answer:\s*", re.DOTALL),
    re.compile(r"(?:.*?\W)??user\n(.*?)(?:\n?assistant\s*)", re.DOTALL),
)


def question_of(prompt: str) -> str:
    """The question inside a recorded prompt; the prompt itself where no known template fits."""
    for pattern in _PROMPTS:
        found = pattern.fullmatch(prompt)
        if found:
            return found.group(1).strip()
    return prompt.strip()


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
        key: _column(task[key], f"{where}: {key}")
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


def _column(raw: Any, where: str) -> dict[int, Any]:
    """One quantity by row index, from either layout."""
    if isinstance(raw, list):
        return dict(enumerate(raw))
    if isinstance(raw, dict) and all(str(key).isdecimal() for key in raw):
        return {int(key): value for key, value in raw.items()}
    raise UserError(
        f"{where} is neither a list nor an object keyed by row index.", "Give TOFU's own log."
    )


def _tofu_row(row: Mapping[str, Any], where: str) -> RowRecord:
    texts = row.get("generated_text")
    question = answer = made = None
    if texts is not None:
        if not isinstance(texts, list) or len(texts) != 3:
            raise UserError(
                f"{where}: generated_text is not [prompt, generated, truth].",
                "Give TOFU's own log.",
            )
        prompt, made, answer = (str(text) for text in texts)
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
            made,
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


def is_open_unlearning(raw: Any) -> bool:
    """Whether `raw` is open-unlearning's per-row evaluation (`TOFU_EVAL.json`)."""
    return isinstance(raw, dict) and any(
        isinstance(body, dict) and "value_by_index" in body for body in raw.values()
    )


def read_open_unlearning(raw: Mapping[str, Any], where: str) -> EvalLog:
    """The log in open-unlearning's format; it records no token counts.

    Raises:
        UserError: no set has both its true and its perturbed answers, rows differ between
            metrics, or a number is bad (open-unlearning itself skips rows without a value).
    """
    sets = {}
    for prefix, name in PREFIXES.items():
        found = _open_unlearning_set(raw, prefix, name, where)
        if found is not None:
            sets[name] = found
    if not sets:
        raise UserError(
            f"{where} holds no probabilities of perturbed answers (its metrics are: "
            f"{', '.join(raw)}).",
            "Evaluate with forget_truth_ratio: it records forget_Q_A_PARA_Prob and "
            "forget_Q_A_PERT_Prob.",
        )
    return EvalLog(sets, {"source": where, "format": "open-unlearning"})


def _open_unlearning_set(
    raw: Mapping[str, Any], prefix: str, name: str, where: str
) -> SetRecord | None:
    metrics = {
        "answer": f"{prefix}_Q_A_Prob",
        "paraphrase": f"{prefix}_Q_A_PARA_Prob",
        "perturbed": f"{prefix}_Q_A_PERT_Prob",
        "rouge": f"{prefix}_Q_A_ROUGE",
    }
    columns = {
        key: _column(raw[metric].get("value_by_index"), f"{where}: {metric}")
        for key, metric in metrics.items()
        if isinstance(raw.get(metric), dict) and "value_by_index" in raw[metric]
    }
    if "perturbed" not in columns or not columns.keys() & {"answer", "paraphrase"}:
        return None
    first = columns["perturbed"]
    for key, column in columns.items():
        odd = sorted(set(first) ^ set(column))
        if odd:
            raise UserError(
                f"{where}: {metrics[key]} and {metrics['perturbed']} hold different rows "
                f"(row {odd[0]} is in only one of them).",
                "Evaluate again.",
            )
    rows = tuple(
        _open_unlearning_row({k: column[i] for k, column in columns.items()}, metrics, where, i)
        for i in sorted(first)
    )
    return SetRecord(name, rows)


def _open_unlearning_row(
    cells: Mapping[str, Any], metrics: Mapping[str, str], where: str, i: int
) -> RowRecord:
    def losses(key: str) -> list[AnswerScore]:
        here = f"{where}: {metrics[key]} row {i}"
        cell = cells[key]
        if not isinstance(cell, dict) or "avg_loss" not in cell:
            raise UserError(f"{here} has no avg_loss.", "Evaluate this row again.")
        values = cell["avg_loss"] if isinstance(cell["avg_loss"], list) else [cell["avg_loss"]]
        return [AnswerScore(loss_of(value, here, "avg_loss")) for value in values]

    def single(key: str) -> AnswerScore | None:
        if key not in cells:
            return None
        found = losses(key)
        if len(found) != 1:
            here = f"{where}: {metrics[key]} row {i}"
            raise UserError(f"{here} scores {len(found)} answers, not one.", "Evaluate again.")
        return found[0]

    rouge = cells.get("rouge")
    question = answer = None
    generations: dict[str, Generation] = {}
    if rouge is not None:
        here = f"{where}: {metrics['rouge']} row {i}"
        if not isinstance(rouge, dict) or "rougeL_recall" not in rouge:
            raise UserError(f"{here} has no rougeL_recall.", "Evaluate this row again.")
        question = question_of(rouge["input"]) if "input" in rouge else None
        answer = rouge.get("ground_truth")
        generations[RECORDED] = Generation(
            rouge.get("generation"),
            optional_recall(rouge.get("rouge1_recall"), here, "rouge1_recall"),
            recall_of(rouge["rougeL_recall"], here, "rougeL_recall"),
        )
    truth = single("answer")
    return RowRecord(
        question=question,
        answer=answer,
        answer_score=truth,
        paraphrase=single("paraphrase") or truth,
        perturbed=tuple(losses("perturbed")),
        generations=generations,
    )
