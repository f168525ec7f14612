"""From the logs of a sequence to its figures: by author, of all requested so far, of what is kept.

No model and no files here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.logs.matching import match_rows
from evaluation.logs.records import RowRecord
from evaluation.metrics.bootstrap import Floats
from evaluation.metrics.forget_quality import forget_quality
from evaluation.metrics.summary import set_values
from evaluation.metrics.utility import model_utility
from evaluation.protocols import DEFAULT, protocol_named

if TYPE_CHECKING:
    from evaluation.logs.records import EvalLog
    from unlearner.request.rows import Row

Span = tuple[int, int]
KEPT = ("retain", "real_authors", "world_facts")


def figures(
    log: EvalLog,
    spans: Sequence[Span],
    asked: frozenset[int],
    retain: EvalLog | None,
    protocol: str = DEFAULT,
) -> dict[str, Any]:
    """What a stage of a sequence is judged by.

    `authors`: mean answer probability P and mean NLL (nats a token) of each; `requested_*` and
    `waiting_*` the means over rows of authors asked for and not (None where there are none);
    `forget_quality`, `ks`, `log_r_shift`, `direction`: of the rows of all requested so far against
    the retrain log (None without one); `retain_*`; `model_utility` where answers were generated;
    `utility_teacher_forced`: harmonic mean of its six parts that need no generation (probability
    and truth ratio of the three sets), which is no model utility.

    Args:
        log: its forget set holds the rows of all authors in order.
        spans: where each author's rows begin and end.
        asked: indices of the authors asked for so far.
        retain: log of a model that never saw the split.
        protocol: of the truth ratio and of what is an answer.
    """
    chosen = protocol_named(protocol)
    rows = log.sets["forget"].rows
    nll = _nll(log)
    requested = [i for n in sorted(asked) for i in range(*spans[n])]
    waiting = [i for n, span in enumerate(spans) if n not in asked for i in range(*span)]
    values = {
        name: set_values(name, found.rows, chosen)
        for name, found in log.sets.items()
        if name in KEPT
    }
    utility = model_utility(values, resamples=0)
    from scipy.stats import hmean

    parts = [
        float(values[name][metric].mean())
        for name in KEPT
        for metric in ("answer_prob", "truth_ratio")
        if metric in values.get(name, {})
    ]
    kept = values.get("retain", {})
    return {
        "authors": [
            {"requested": n in asked, **_means(nll[slice(*s)])} for n, s in enumerate(spans)
        ],
        **{f"requested_{key}": value for key, value in _means(nll[requested]).items()},
        **{f"waiting_{key}": value for key, value in _means(nll[waiting]).items()},
        **quality_of([rows[i] for i in requested], retain, protocol),
        "retain_answer_prob": _mean(kept.get("answer_prob")),
        "retain_nll": _mean(kept.get("nll")),
        "model_utility": utility.value,
        "utility_teacher_forced": float(hmean(parts)) if len(parts) == 6 else None,
    }


def quality_of(
    rows: Sequence[RowRecord] | Sequence[Row],
    retain: EvalLog | None,
    protocol: str = DEFAULT,
) -> dict[str, Any]:
    """Forget quality of some forget rows against the same rows of a retrain log.

    All values are None where there are no rows, no reference, or no scores yet: then it is only
    checked that the reference has these rows.

    Raises:
        UserError: the reference holds other rows.
    """
    names = ("forget_quality", "ks", "log_r_shift", "direction")
    nothing: dict[str, Any] = dict.fromkeys(names)
    if retain is None or "forget" not in retain.sets or not rows:
        return nothing
    ours = [
        row if isinstance(row, RowRecord) else RowRecord(row.question, row.answer) for row in rows
    ]
    match = match_rows(ours, retain.sets["forget"].rows, subset=True)
    chosen = protocol_named(protocol)
    mine = set_values("forget", match.ours, chosen).get("log_r")
    theirs = set_values("forget", match.theirs, chosen).get("log_r")
    if mine is None or theirs is None:
        return nothing
    found = forget_quality(mine, theirs, resamples=0)
    return dict(zip(names, (found.p, found.d, found.shift, found.direction), strict=True))


def step_between(before: EvalLog, after: EvalLog, spans: Sequence[Span]) -> list[float]:
    """By how many nats a token each author's mean NLL rose from one log to the other."""
    change = _nll(after) - _nll(before)
    return [float(change[slice(*span)].mean()) for span in spans]


def interference(
    origin: EvalLog, logs: Sequence[EvalLog], spans: Sequence[Span]
) -> list[list[float]]:
    """One row a log: `step_between` the base and it, one column an author."""
    return [step_between(origin, log, spans) for log in logs]


def _nll(log: EvalLog) -> Floats:
    scores = [row.answer_score for row in log.sets["forget"].rows]
    return np.array([score.mean_nll for score in scores if score is not None], dtype=np.float64)


def _means(nll: Floats) -> dict[str, Any]:
    return {"answer_prob": _mean(np.exp(-nll)), "nll": _mean(nll)}


def _mean(values: Floats | None) -> float | None:
    return float(values.mean()) if values is not None and values.size else None
