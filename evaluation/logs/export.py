"""Writes our logs in the public layouts, so that others' tools read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from adapters.errors import UserError
from evaluation.logs.public_formats import PREFIXES, TASKS
from evaluation.logs.records import AnswerScore, EvalLog, RowRecord, SetRecord, write_json
from evaluation.protocols import DEFAULT, Protocol, protocol_named

# exp() of more is no finite number, and JSON has no other.
LARGEST_LOG = 700.0


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


def write_open_unlearning(
    log: EvalLog, folder: Path, retain_log: EvalLog | None = None, protocol: str = DEFAULT
) -> list[Path]:
    """`TOFU_EVAL.json` and `TOFU_SUMMARY.json` of open-unlearning in `folder`, made from `log`.

    The first may serve there as `retain_logs_path`. Raises UserError as `to_open_unlearning` and
    `evaluation.metrics.summary.summarise` do.
    """
    evaluation = to_open_unlearning(log, retain_log, protocol)
    summary = {
        name: body["agg_value"]
        for name, body in sorted(evaluation.items())
        if body["agg_value"] is not None
    }
    return [
        write_json(folder / "TOFU_EVAL.json", evaluation),
        write_json(folder / "TOFU_SUMMARY.json", summary),
    ]


def to_open_unlearning(
    log: EvalLog, retain_log: EvalLog | None = None, protocol: str = DEFAULT
) -> dict[str, Any]:
    """`log` as open-unlearning's per-row evaluation, one object a metric (arXiv 2506.12618).

    Aggregates are this tool's, under `protocol`; what could not be measured has `agg_value` None
    (forget quality without a reference). `rougeL_f1`, which no figure of TOFU uses, is left out.

    Raises:
        UserError: as `evaluation.metrics.summary.summarise`.
    """
    from evaluation.metrics.summary import protocol_rows, summarise

    chosen = protocol_named(protocol)
    figures = summarise(log, retain_log, protocol=protocol, resamples=0)
    found: dict[str, Any] = {
        "forget_quality": {"agg_value": figures["forget_quality"]},
        "model_utility": {"agg_value": figures["model_utility"]},
    }
    for prefix, name in PREFIXES.items():
        if name in log.sets:
            rows = protocol_rows(log.sets[name], chosen)
            found |= _open_unlearning_metrics(prefix, name, rows, chosen, figures)
    return found


def _open_unlearning_metrics(
    prefix: str, name: str, rows: Sequence[RowRecord], protocol: Protocol, figures: dict[str, Any]
) -> dict[str, Any]:
    """One set's metrics under open-unlearning's names; those that lack a row's data are missing."""
    from evaluation.metrics.summary import generation_of, set_values

    values = set_values(name, rows, protocol)
    plain = name in ("forget", "retain")
    made = [generation_of(row, protocol) for row in rows]
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
            for row, answer in zip(rows, made, strict=True)
        ],
    }
    found = {
        f"{prefix}_{metric}": {
            "agg_value": _mean_of(metric, cells),
            "value_by_index": {str(i): cell for i, cell in enumerate(cells)},
        }
        for metric, cells in columns.items()
        if cells and all(cell is not None for cell in cells)
    }
    if "log_r" in values:
        ratios = [math.exp(min(value, LARGEST_LOG)) for value in values["log_r"].tolist()]
        title = "forget_truth_ratio" if name == "forget" else f"{prefix}_Truth_Ratio"
        found[title] = {
            "agg_value": figures[f"{name}_truth_ratio"],
            "value_by_index": {str(i): {"score": value} for i, value in enumerate(ratios)},
        }
    if not plain and "answer_prob" in values:
        found[f"{prefix}_Q_A_Prob_normalised"] = {
            "agg_value": figures[f"{name}_answer_prob"],
            "value_by_index": {
                str(i): {"prob": value} for i, value in enumerate(values["answer_prob"].tolist())
            },
        }
    return found


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
