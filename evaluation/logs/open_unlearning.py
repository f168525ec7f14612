"""open-unlearning's evaluation (`locuslab/open-unlearning` src/evals), read and written.

One object per metric, with `value_by_index`; it records no token counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from adapters.errors import UserError
from evaluation.logs.records import (
    RECORDED,
    AnswerScore,
    EvalLog,
    Generation,
    RowRecord,
    SetRecord,
    column_by_index,
    generation_of,
    loss_of,
    optional_recall,
    protocol_rows,
    question_of,
    recall_of,
)
from evaluation.protocols import Protocol

PREFIXES = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
# exp() of more is no finite number, and JSON has no other.
LARGEST_LOG = 700.0


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
        record_set = _open_unlearning_set(raw, prefix, name, where)
        if record_set is not None:
            sets[name] = record_set
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
        key: column_by_index(raw[metric].get("value_by_index"), f"{where}: {metric}")
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
        scores = losses(key)
        if len(scores) != 1:
            here = f"{where}: {metrics[key]} row {i}"
            raise UserError(f"{here} scores {len(scores)} answers, not one.", "Evaluate again.")
        return scores[0]

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
    for prefix, name in PREFIXES.items():
        if name in log.sets:
            rows = protocol_rows(log.sets[name], protocol)
            metrics |= _set_metrics(prefix, name, rows, protocol, figures, values[name])
    return metrics


def _set_metrics(
    prefix: str,
    name: str,
    rows: Sequence[RowRecord],
    protocol: Protocol,
    figures: Mapping[str, Any],
    values: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """One set's metrics under open-unlearning's names, without those that lack a row's data."""
    plain = name in ("forget", "retain")
    answers = [generation_of(row, protocol) for row in rows]
    columns: dict[str, list[dict[str, Any] | None]] = {
        "Q_A_Prob": [_prob(row.answer_score) for row in rows],
        "Q_A_PARA_Prob": [_prob(row.paraphrase) for row in rows] if plain else [None],
        "Q_A_PERT_Prob": [_probs(row.perturbed) for row in rows],
        "Q_A_ROUGE": [
            None
            if answer is None
            else {
                "rouge1_recall": answer.rouge1_recall,
                "rougeL_recall": answer.rouge_l_recall,
                "input": f"[INST] {row.question} [/INST]",
                "ground_truth": row.answer,
                "generation": answer.text,
            }
            for row, answer in zip(rows, answers, strict=True)
        ],
    }
    metrics = {
        f"{prefix}_{metric}": {
            "agg_value": _mean_of(metric, cells),
            "value_by_index": {str(i): cell for i, cell in enumerate(cells)},
        }
        for metric, cells in columns.items()
        if cells and all(cell is not None for cell in cells)
    }
    if "log_r" in values:
        ratios = [math.exp(min(value, LARGEST_LOG)) for value in values["log_r"]]
        title = "forget_truth_ratio" if name == "forget" else f"{prefix}_Truth_Ratio"
        metrics[title] = {
            "agg_value": figures[f"{name}_truth_ratio"],
            "value_by_index": {str(i): {"score": value} for i, value in enumerate(ratios)},
        }
    if not plain and "answer_prob" in values:
        metrics[f"{prefix}_Q_A_Prob_normalised"] = {
            "agg_value": figures[f"{name}_answer_prob"],
            "value_by_index": {
                str(i): {"prob": value} for i, value in enumerate(values["answer_prob"])
            },
        }
    return metrics


def _prob(score: AnswerScore | None) -> dict[str, Any] | None:
    if score is None:
        return None
    return {"prob": math.exp(-score.mean_nll), "avg_loss": score.mean_nll}


def _probs(scores: Sequence[AnswerScore]) -> dict[str, Any] | None:
    if not scores:
        return None
    losses = [score.mean_nll for score in scores]
    return {"prob": [math.exp(-loss) for loss in losses], "avg_loss": losses}


def _mean_of(metric: str, cells: Sequence[dict[str, Any] | None]) -> float:
    """Their aggregate: the mean over rows of the probability (of its mean) or ROUGE-L recall."""
    key = "rougeL_recall" if metric == "Q_A_ROUGE" else "prob"
    values = [cell[key] for cell in cells if cell is not None]
    flat = [sum(v) / len(v) if isinstance(v, list) else v for v in values]
    return float(sum(flat) / len(flat))
