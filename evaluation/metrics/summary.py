"""From per-row logs to the figures people compare: forget quality, model utility and their parts.

The keys of `summarise` are a contract: others script against them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapters.errors import UserError
from evaluation.logs.matching import RowMatch, match_rows, other_precision
from evaluation.logs.open_unlearning import to_open_unlearning
from evaluation.logs.records import (
    RECORDED,
    SETS,
    EvalLog,
    RowRecord,
    SetRecord,
    generation_of,
    protocol_rows,
    write_json,
)
from evaluation.metrics.bootstrap import RESAMPLES, Floats, measure_mean
from evaluation.metrics.fact_recall import row_recalls
from evaluation.metrics.forget_quality import (
    NEEDS_RETRAIN,
    ForgetQuality,
    forget_quality,
    forget_truth_ratio,
    kept_truth_ratio,
    log_truth_ratio,
)
from evaluation.metrics.utility import answer_prob, model_utility, option_prob
from evaluation.protocols import DEFAULT, Protocol, protocol_named

SET_METRICS = ("answer_prob", "nll", "rouge_l_recall", "truth_ratio")
QUALITY_FIGURES = ("forget_quality", "forget_quality_log10", "ks", "log_r_shift")
# What is wanted of each figure. A model that never saw the forget set also gives its answers some
# probability: below Retrain's the forget answers are broken, not forgotten.
BETTER = {
    "forget_quality": "higher",
    "forget_quality_log10": "higher",
    "ks": "lower",
    "log_r_shift": "zero",
    "model_utility": "higher",
    "forget_answer_prob": "near retrain",
    "forget_nll": "near retrain",
    "forget_rouge_l_recall": "near retrain",
    "forget_truth_ratio": "higher",
    "forget_fact_recall": "near retrain",
    **{f"{name}_fact_recall": "higher" for name in SETS[1:]},
    **{
        f"{name}_{metric}": "lower" if metric == "nll" else "higher"
        for name in SETS[1:]
        for metric in SET_METRICS
    },
}


def set_values(name: str, rows: Sequence[RowRecord], protocol: Protocol) -> dict[str, Floats]:
    """The set's per-row values: `answer_prob`, `nll`, `rouge_l_recall`, `truth_ratio`, `log_r`.

    A metric that some row has no data for is missing. For real authors and world facts
    `answer_prob` is the probability among the options.
    """
    values: dict[str, Floats] = {}
    if not rows:
        return values
    answers = _column(row.answer_score and row.answer_score.mean_nll for row in rows)
    right = _column(row.paraphrase and row.paraphrase.mean_nll for row in rows)
    wrong = [np.array([score.mean_nll for score in row.perturbed]) for row in rows]
    options = all(losses.size for losses in wrong)
    if answers is not None:
        values["nll"] = answers
        if name in ("forget", "retain"):
            values["answer_prob"] = answer_prob(answers)
        elif options:
            values["answer_prob"] = option_prob(answers, wrong)
    if right is not None and options:
        log_r = log_truth_ratio(right, wrong, protocol.truth_ratio)
        aggregate = forget_truth_ratio if name == "forget" else kept_truth_ratio
        values |= {"log_r": log_r, "truth_ratio": aggregate(log_r)}
    generated = [generation_of(row, protocol) for row in rows]
    recalls = _column(None if a is None else a.rouge_l_recall for a in generated)
    return values if recalls is None else values | {"rouge_l_recall": recalls}


def _column(numbers: Iterable[float | None]) -> Floats | None:
    """A value for every row; None where one has none."""
    column = list(numbers)
    return None if None in column else np.array(column, dtype=np.float64)


def summarise(
    log: EvalLog,
    retain_log: EvalLog | None = None,
    *,
    protocol: str = DEFAULT,
    second_retain_log: EvalLog | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """All figures of a log under one protocol, ready for JSON.

    A figure that cannot be had is None and `reasons` says why. `better` says of each figure
    whether it should be higher, lower, zero or near the retrained model's. `rows` counts the rows
    of each set, `n` those of the forget set. `*_interval` are 95 % bootstrap intervals over rows.
    `figure_table` lists them.

    Args:
        log: of the model in question.
        retain_log: of a model that never saw the forget set; forget quality needs it.
        protocol: one of `evaluation.protocols.PROTOCOLS`.
        second_retain_log: of a second such model: how far two of them lie apart (`retrain_band`).
        resamples: of the bootstrap.

    Raises:
        UserError: unknown protocol, logs of different rows, texts cut at another length.
    """
    chosen = protocol_named(protocol)
    for each in (log, retain_log, second_retain_log):
        _refuse_other_cut(each, chosen)
    rows = {name: protocol_rows(each, chosen) for name, each in log.sets.items()}
    values = {name: set_values(name, each, chosen) for name, each in rows.items()}
    quality, by = _forget_quality(log, retain_log, chosen, resamples)
    utility = model_utility(values, resamples=resamples)
    result: dict[str, Any] = {
        "protocol": chosen.name,
        **_quality_keys(quality),
        "model_utility": utility.value,
        "model_utility_interval": utility.interval and list(utility.interval),
        "model_utility_parts": dict(utility.parts),
        "model_utility_part_intervals": {k: list(v) for k, v in utility.part_intervals.items()},
    }
    reasons = dict.fromkeys(QUALITY_FIGURES, quality.reason) | {"model_utility": utility.reason}
    columns = {pair: values.get(pair[0], {}).get(pair[1]) for pair in product(SETS, SET_METRICS)}
    for name in SETS:
        recalls = row_recalls(rows.get(name, ()), chosen)
        columns[name, "fact_recall"] = np.array(recalls) if recalls else None
    for (name, metric), column in columns.items():
        mean = None if column is None else measure_mean(column, resamples=resamples)
        key = f"{name}_{metric}"
        result[key] = mean and mean.value
        result[f"{key}_interval"] = mean and mean.interval and list(mean.interval)
        if mean is None:
            reasons[key] = _why_missing(log, name, metric, chosen)
    result["retrain_forget_nll"] = None
    if retain_log is not None and "forget" in retain_log.sets:
        reference = protocol_rows(retain_log.sets["forget"], chosen)
        nll = set_values("forget", reference, chosen).get("nll")
        result["retrain_forget_nll"] = None if nll is None else float(nll.mean())
    if retain_log is not None and second_retain_log is not None:
        band, _ = _forget_quality(second_retain_log, retain_log, chosen, resamples)
        result["retrain_band"] = _quality_keys(band)
    return result | {
        "n": len(rows.get("forget", ())),
        "rows": {name: len(each) for name, each in rows.items()},
        "rows_matched_by": by,
        "limited": log.meta.get("limit") is not None,
        "better": BETTER,
        "reasons": {key: reason for key, reason in reasons.items() if reason},
        "notes": _notes(log, retain_log, chosen, by),
    }


FILED_INTERVALS = (
    "ks_interval", "log_r_shift_interval", "model_utility_interval", "forget_fact_recall_interval",
    "retain_fact_recall_interval",
)  # fmt: skip


def figures_to_file(
    summary: Mapping[str, Any], split: str, scales: Mapping[str, float], limit: int | None = None
) -> tuple[str, dict[str, Any]]:
    """Name and content of what a store keeps of a summary: numbers and words, never a text.

    Args:
        summary: of `summarise`.
        split: what was evaluated.
        scales: the strength of each adapter, in the order of the stack.
        limit: of the rows of each set.
    """
    figures = {
        key: value
        for key, value in summary.items()
        if not isinstance(value, dict | list) or key in FILED_INTERVALS
    }
    about = {"split": split, "stack": list(scales), "scales": dict(scales), "limit": limit}
    return f"{split}-{summary['protocol']}", {**figures, **about}


def figure_table(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every figure of a summary as a row: name, value, interval, better, n, and why it is missing.

    `n` are the rows the figure was measured on: of its set, of the forget set for forget quality
    and what belongs to it, of the three sets together for model utility.
    """
    counts = summary["rows"]
    table = []
    for name, better in summary["better"].items():
        sets = [each for each in SETS if name.startswith(f"{each}_")] or ["forget"]
        behind = SETS[1:] if name == "model_utility" else sets[:1]
        table.append(
            {
                "name": name,
                "value": summary.get(name),
                "interval": summary.get(f"{name}_interval"),
                "better": better,
                "n": sum(counts.get(each, 0) for each in behind),
                "reason": summary["reasons"].get(name),
            }
        )
    return table


def _quality_keys(quality: ForgetQuality) -> dict[str, Any]:
    return {
        "forget_quality": quality.p,
        "forget_quality_interval": quality.p_interval and list(quality.p_interval),
        "forget_quality_log10": quality.log10_p,
        "ks": quality.d,
        "ks_interval": quality.d_interval and list(quality.d_interval),
        "log_r_shift": quality.shift,
        "log_r_shift_interval": quality.shift_interval and list(quality.shift_interval),
        "direction": quality.direction,
    }


def _forget_quality(
    log: EvalLog, retain_log: EvalLog | None, protocol: Protocol, resamples: int
) -> tuple[ForgetQuality, str | None]:
    """Forget quality of matched rows, and how they were matched."""
    reason = None if retain_log is not None else NEEDS_RETRAIN
    for each, whose in ((retain_log, "the retrain reference"), (log, "the log")):
        if each is not None and "forget" not in each.sets:
            reason = reason or f"{whose} has no forget set"
    if retain_log is not None and reason is None:
        pair = matched_log_r(log, retain_log, protocol)
        if pair is not None:
            return forget_quality(pair.ours, pair.theirs, resamples=resamples), pair.by
        reason = "needs perturbed answers of every forget row"
    return ForgetQuality(reason=reason), None


class MatchedLogR(NamedTuple):
    """Log R (rows,) of two logs, row by row the same questions, and how they were matched."""

    ours: Floats
    theirs: Floats
    by: str


def matched_log_r(log: EvalLog, reference: EvalLog, protocol: Protocol) -> MatchedLogR | None:
    """Log R of the forget rows of both logs; None where a log lacks it for some row.

    Raises:
        UserError: as `match_forget`.
    """
    if "forget" not in log.sets or "forget" not in reference.sets:
        return None
    match = match_forget(log.sets["forget"], reference.sets["forget"], protocol, log.meta)
    ours, theirs = (
        set_values("forget", rows, protocol).get("log_r") for rows in (match.ours, match.theirs)
    )
    return None if ours is None or theirs is None else MatchedLogR(ours, theirs, match.by)


def match_forget(
    ours: SetRecord, theirs: SetRecord, protocol: Protocol, meta: Mapping[str, Any]
) -> RowMatch:
    """The forget rows of a log beside those of its retrain reference, as the protocol cuts them.

    A run that was limited on purpose (`meta["limit"]`) may hold a part of the reference's rows,
    provided that the reference covers the whole set.

    Raises:
        UserError: they are different rows.
    """
    our_rows, their_rows = protocol_rows(ours, protocol), protocol_rows(theirs, protocol)
    whole = None if ours.total is None else min(ours.total, protocol.max_rows or ours.total)
    limited = meta.get("limit") is not None and whole == len(their_rows)
    return match_rows(our_rows, their_rows, subset=limited)


def _refuse_other_cut(log: EvalLog | None, protocol: Protocol) -> None:
    """Scores of texts that were cut at another length belong to another protocol."""
    if log is None:
        return
    cut, longest = log.meta.get("max_length"), log.meta.get("longest_text")
    if cut is None or longest is None or cut == protocol.max_length:
        return
    if longest > min(cut, protocol.max_length):
        raise UserError(
            f"The log's texts were cut at {cut} tokens and the longest has {longest}; protocol "
            f"'{protocol.name}' cuts at {protocol.max_length}.",
            f"Evaluate again with --protocol {protocol.name}.",
        )


def _why_missing(log: EvalLog, name: str, metric: str, protocol: Protocol) -> str:
    if name not in log.sets:
        return f"the log has no {name} set"
    if metric == "fact_recall":
        return f"not every row has a question and an answer decoded as {protocol.decoding.name}"
    if metric == "rouge_l_recall":
        return f"the log has no answers decoded as {protocol.decoding.name} for every row"
    if metric == "nll" or (metric == "answer_prob" and name in ("forget", "retain")):
        return "not every row has a score of its answer"
    return "not every row has perturbed answers"


def _notes(
    log: EvalLog, retain_log: EvalLog | None, protocol: Protocol, by: str | None
) -> list[str]:
    notes = []
    if log.meta.get("limit") is not None:
        notes.append(f"limited to the first {log.meta['limit']} rows of each set")
    for name, count in log.meta.get("cut_rows", {}).items():
        length = log.meta.get("max_length")
        notes.append(f"{count} {name} rows have a text that is cut at {length} tokens")
    for name, count in log.meta.get("unknown_rows", {}).items():
        notes.append(f"{count} {name} rows hold text that the vocabulary lacks")
    if log.meta.get("padded_because"):
        reason = log.meta["padded_because"]
        notes.append(f"scored as padded rows, because sharing prefixes does not fit: {reason}")
    firsts = [each.rows[0].generations for each in log.sets.values() if each.rows]
    if any(protocol.decoding.name not in answers and RECORDED in answers for answers in firsts):
        notes.append("answers as recorded in the log, which does not state its decoding")
    if by == "position":
        notes.append("rows matched by position and token counts: not both logs hold questions")
    return notes + [
        f"{key} differs from the retrain reference's: {ours} against {theirs}"
        for key, ours, theirs in other_precision(log.meta, retain_log)
    ]


def write_open_unlearning(
    log: EvalLog, folder: Path, retain_log: EvalLog | None = None, protocol: str = DEFAULT
) -> list[Path]:
    """`TOFU_EVAL.json` and `TOFU_SUMMARY.json` of open-unlearning in `folder`, made from `log`.

    The first may serve there as `retain_logs_path`.

    Raises:
        UserError: as `summarise`.
    """
    chosen = protocol_named(protocol)
    figures = summarise(log, retain_log, protocol=protocol, resamples=0)
    values = {}
    for name, rows in log.sets.items():
        columns = set_values(name, protocol_rows(rows, chosen), chosen)
        values[name] = {metric: column.tolist() for metric, column in columns.items()}
    evaluation = to_open_unlearning(log, chosen, figures, values)
    aggregates = {name: body["agg_value"] for name, body in sorted(evaluation.items())}
    summary = {name: value for name, value in aggregates.items() if value is not None}
    return [
        write_json(folder / "TOFU_EVAL.json", evaluation),
        write_json(folder / "TOFU_SUMMARY.json", summary),
    ]
