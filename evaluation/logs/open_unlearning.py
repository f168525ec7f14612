"""open-unlearning's evaluation (`locuslab/open-unlearning` src/evals), read and written.

One object per metric, with `value_by_index`; it records no token counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from adapters.errors import UserError
from evaluation.logs.records import (
    RECORDED,
    AnswerScore,
    EvalLog,
    RowRecord,
    SetRecord,
    columns_by_index,
    generation,
    generation_of,
    protocol_rows,
    question_of,
    score_of,
)
from evaluation.protocols import Protocol

PREFIXES = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
METRICS = ("Q_A_PERT_Prob", "Q_A_PARA_Prob", "Q_A_Prob", "Q_A_ROUGE")
# exp() of more is no finite number, and JSON has no other.
LARGEST_LOG = 700.0


def is_open_unlearning(raw: Any) -> bool:
    """Whether `raw` is open-unlearning's per-row evaluation (`TOFU_EVAL.json`)."""
    return isinstance(raw, dict) and any(
        isinstance(body, dict) and "value_by_index" in body for body in raw.values()
    )


def read_open_unlearning(raw: Mapping[str, Any], where: str) -> EvalLog:
    """The log in open-unlearning's format.

    Raises:
        UserError: no set has both its true and its perturbed answers, rows differ between
            metrics, or a number is bad (open-unlearning itself skips rows without a value).
    """
    sets = {}
    for prefix, name in PREFIXES.items():
        columns = {}
        for metric in METRICS:
            body = raw.get(f"{prefix}_{metric}")
            if isinstance(body, dict) and "value_by_index" in body:
                columns[f"{prefix}_{metric}"] = body["value_by_index"]
        scored = {f"{prefix}_Q_A_Prob", f"{prefix}_Q_A_PARA_Prob"}
        if f"{prefix}_Q_A_PERT_Prob" in columns and columns.keys() & scored:
            rows = columns_by_index(columns, where)
            sets[name] = SetRecord(name, tuple(_row(c, prefix, where, i) for i, c in rows))
    if not sets:
        raise UserError(
            f"{where} holds no probabilities of perturbed answers (its metrics are: "
            f"{', '.join(raw)}).",
            "Evaluate with forget_truth_ratio: it records forget_Q_A_PARA_Prob and "
            "forget_Q_A_PERT_Prob.",
        )
    return EvalLog(sets, {"source": where, "format": "open-unlearning"})


def _row(cells: Mapping[str, Any], prefix: str, where: str, i: int) -> RowRecord:
    def cell(metric: str, key: str) -> tuple[dict[str, Any], str]:
        name = f"{prefix}_{metric}"
        here = f"{where}: {name} row {i}"
        if not isinstance(cells[name], dict) or key not in cells[name]:
            raise UserError(f"{here} has no {key}.", "Evaluate this row again.")
        return cells[name], here

    def scores(metric: str) -> list[AnswerScore]:
        body, here = cell(metric, "avg_loss")
        losses = body["avg_loss"] if isinstance(body["avg_loss"], list) else [body["avg_loss"]]
        return [score_of(loss, None, here, "avg_loss") for loss in losses]

    def score(metric: str) -> AnswerScore | None:
        if f"{prefix}_{metric}" not in cells:
            return None
        values = scores(metric)
        if len(values) != 1:
            here = f"{where}: {prefix}_{metric} row {i}"
            raise UserError(f"{here} scores {len(values)} answers, not one.", "Evaluate again.")
        return values[0]

    question = answer = None
    generations = {}
    if cells.get(f"{prefix}_Q_A_ROUGE") is not None:
        rouge, here = cell("Q_A_ROUGE", "rougeL_recall")
        question = question_of(rouge["input"]) if "input" in rouge else None
        answer = rouge.get("ground_truth")
        recalls = rouge.get("rouge1_recall"), rouge["rougeL_recall"]
        generations[RECORDED] = generation(rouge.get("generation"), *recalls, here)
    truth = score("Q_A_Prob")
    paraphrase, perturbed = score("Q_A_PARA_Prob") or truth, tuple(scores("Q_A_PERT_Prob"))
    return RowRecord(question, answer, truth, paraphrase, perturbed, generations)


def to_open_unlearning(
    log: EvalLog,
    protocol: Protocol,
    figures: Mapping[str, Any],
    values: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Any]:
    """`log` as open-unlearning's per-row evaluation, one object per metric (arXiv 2506.12618).

    Aggregates are this tool's; what could not be measured has `agg_value` None (forget quality
    without a reference). `rougeL_f1`, which no figure of TOFU uses, is left out.

    Args:
        log: the rows.
        protocol: which rows and answers are written.
        figures: the summary of the log under that protocol.
        values: by set, what `evaluation.metrics.summary.set_values` gives for its rows.
    """
    metrics: dict[str, Any] = {
        "forget_quality": {"agg_value": figures["forget_quality"]},
        "model_utility": {"agg_value": figures["model_utility"]},
    }

    def add(title: str, aggregate: float, cells: Sequence[dict[str, Any]]) -> None:
        by_index = {str(i): cell for i, cell in enumerate(cells)}
        metrics[title] = {"agg_value": aggregate, "value_by_index": by_index}

    for prefix, name in PREFIXES.items():
        if name not in log.sets:
            continue
        rows, columns = protocol_rows(log.sets[name], protocol), values[name]
        is_author_set = name in ("forget", "retain")
        for metric in reversed(METRICS):
            if metric == "Q_A_PARA_Prob" and not is_author_set:
                continue
            cells = [_cell(metric, row, protocol) for row in rows]
            full = [cell for cell in cells if cell is not None]
            if full and len(full) == len(cells):
                key = "rougeL_recall" if metric == "Q_A_ROUGE" else "prob"
                means = [c[key] if isinstance(c[key], float) else fmean(c[key]) for c in full]
                add(f"{prefix}_{metric}", fmean(means), full)
        if "log_r" in columns:
            ratios = [math.exp(min(value, LARGEST_LOG)) for value in columns["log_r"]]
            title = "forget_truth_ratio" if name == "forget" else f"{prefix}_Truth_Ratio"
            add(title, figures[f"{name}_truth_ratio"], [{"score": value} for value in ratios])
        if not is_author_set and "answer_prob" in columns:
            probs = [{"prob": value} for value in columns["answer_prob"]]
            add(f"{prefix}_Q_A_Prob_normalised", figures[f"{name}_answer_prob"], probs)
    return metrics


def _cell(metric: str, row: RowRecord, protocol: Protocol) -> dict[str, Any] | None:
    """The row's cell of one metric, None where the log does not hold it."""
    if metric == "Q_A_ROUGE":
        answer = generation_of(row, protocol)
        if answer is None:
            return None
        return {
            "rouge1_recall": answer.rouge1_recall,
            "rougeL_recall": answer.rouge_l_recall,
            "input": f"[INST] {row.question} [/INST]",
            "ground_truth": row.answer,
            "generation": answer.text,
        }
    if metric == "Q_A_PERT_Prob":
        losses = [score.mean_nll for score in row.perturbed]
        return {"prob": [math.exp(-x) for x in losses], "avg_loss": losses} if losses else None
    score = row.answer_score if metric == "Q_A_Prob" else row.paraphrase
    return score and {"prob": math.exp(-score.mean_nll), "avg_loss": score.mean_nll}
