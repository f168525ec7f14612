"""An adapter's strength chosen after training: the scale at which it meets the retrain reference.

One sweep over the strength of one adapter on one loaded model, the rest of its stack held fixed:
teacher-forced scores at every scale, answers (and with them model utility) at the few that matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from adapters.errors import UserError
from evaluation.logs.records import EvalLog
from evaluation.metrics.bootstrap import Floats
from evaluation.metrics.forget_quality import forget_quality
from evaluation.metrics.summary import matched_log_r, summarise
from evaluation.protocols import DEFAULT, protocol_named

KIND, SCHEMA = "unlearner-calibration", 1
DEFAULT_SCALES = tuple(i / 10 for i in range(16))
MAX_MU_LOSS = 0.05
# Gaps this close in nats per token are the same, and the retain set decides. The median of TOFU's
# 200 rows has a standard error of about 0.12 (bootstrap): this is well below what they can tell.
TIE = 0.05
# How often the grid is halved around the best, and how many candidates are evaluated in full.
ROUNDS, TRIES = 3, 3
By = Literal["gap", "ks"]
Look = Callable[[float], EvalLog]


@dataclass(frozen=True)
class Settings:
    """What is tried and what is chosen.

    Attributes:
        scales: the first grid; 0 and 1 always belong to it.
        by: minimise |log_r_gap| or the KS statistic D.
        max_mu_loss: the most that model utility may lose against scale 0.
        protocol: of all figures.
    """

    scales: tuple[float, ...] = DEFAULT_SCALES
    by: By = "gap"
    max_mu_loss: float = MAX_MU_LOSS
    protocol: str = DEFAULT

    @property
    def grid(self) -> list[float]:
        """The scales of the first pass, rising."""
        return sorted({0.0, 1.0, *(round(scale, 4) for scale in self.scales)})

    @property
    def rule(self) -> str:
        """In words, what the chosen scale is."""
        nearest = (
            f"smallest |log_r_gap|, within {TIE:g} nats the highest retain_answer_prob"
            if self.by == "gap"
            else "smallest ks, of equal ones the highest retain_answer_prob"
        )
        return f"{nearest}, losing at most {self.max_mu_loss:g} of model_utility against scale 0"


@dataclass(frozen=True)
class Point:
    """One scale of the curve; `log_r` and `log_r_retrain` are row by row the same questions."""

    scale: float
    log_r_gap: float
    ks: float
    forget_quality: float
    forget_nll: float
    retrain_forget_nll: float
    forget_answer_prob: float
    retain_answer_prob: float
    model_utility: float | None = None
    log_r: Floats = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    log_r_retrain: Floats = field(default_factory=lambda: np.empty(0), compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Its figures, without the rows."""
        return {k: v for k, v in asdict(self).items() if k not in ("log_r", "log_r_retrain")}


def read_point(scale: float, log: EvalLog, retain_log: EvalLog, protocol: str) -> Point:
    """The figures of the model at `scale` beside the reference.

    Raises:
        UserError: other rows than the reference's, or rows without a truth ratio.
    """
    figures = summarise(log, retain_log, protocol=protocol, resamples=0)
    pair = matched_log_r(log, retain_log, protocol_named(protocol))
    if pair is None:
        raise UserError(
            f"Nothing to calibrate by: {figures['reasons']['forget_quality']}.",
            "Give forget rows with paraphrased_answer and perturbed_answer.",
        )
    names = (
        "ks", "forget_quality", "forget_nll", "retrain_forget_nll", "forget_answer_prob",
        "retain_answer_prob",
    )  # fmt: skip
    return Point(
        scale=scale,
        log_r_gap=figures["log_r_shift"],
        **{name: figures[name] for name in names},
        log_r=pair.ours,
        log_r_retrain=pair.theirs,
    )


def best(points: Sequence[Point], by: By = "gap") -> Point:
    """The nearest point to the reference; of those that are as near the one that keeps most.

    Points within `TIE` nats of the smallest |gap| (or of equal D) tie: the highest
    retain_answer_prob wins, then the smallest scale.
    """
    distances = [abs(p.log_r_gap) if by == "gap" else p.ks for p in points]
    allowed = min(distances) + (TIE if by == "gap" else 1e-9)
    near = [p for p, d in zip(points, distances, strict=True) if d <= allowed]
    return min(near, key=lambda p: (-p.retain_answer_prob, p.scale))


def next_scales(points: Sequence[Point], by: By = "gap") -> list[float]:
    """Scales to look at next: halfway to the best one's neighbours, and by the gap halfway in
    every interval across which its sign turns.
    """
    ordered = sorted(points, key=lambda p: p.scale)
    at = ordered.index(best(ordered, by))
    pairs = list(pairwise(ordered))
    chosen = pairs[max(0, at - 1) : at + 1]
    if by == "gap":
        chosen += [(a, b) for a, b in pairs if a.log_r_gap < 0 <= b.log_r_gap]
        chosen += [(a, b) for a, b in pairs if b.log_r_gap < 0 <= a.log_r_gap]
    return sorted(
        {round((a.scale + b.scale) / 2, 4) for a, b in chosen} - {p.scale for p in points}
    )


def held_out(grid: Sequence[Point], by: By = "gap") -> dict[str, Any] | None:
    """Forget quality on rows that the scale was not chosen on; None below two rows a half.

    The scale is chosen on the odd rows and read on the even ones, and the other way round.
    `forget_quality` and `ks` put both halves together again: every row at the scale chosen without
    it. Only the first grid is chosen from: the refinement has looked at all rows.
    """
    n = grid[0].log_r.size
    odd, even = np.arange(0, n, 2), np.arange(1, n, 2)
    if even.size < 2:
        return None
    result: dict[str, Any] = {}
    mixed = np.empty(n)
    for name, ours, others in (("odd", odd, even), ("even", even, odd)):
        seen = [_on_rows(point, ours) for point in grid]
        chosen = grid[seen.index(best(seen, by))]
        mixed[others] = chosen.log_r[others]
        read = _on_rows(chosen, others)
        result[f"chosen_on_{name}_rows"] = {
            "scale": chosen.scale,
            "forget_quality": read.forget_quality,
            "log_r_gap": read.log_r_gap,
            "ks": read.ks,
        }
    together = forget_quality(mixed, grid[0].log_r_retrain, resamples=0)
    figures = {"forget_quality": together.p, "ks": together.d, "log_r_gap": together.shift}
    return {**result, **figures, "n": n}


def _on_rows(point: Point, rows: Any) -> Point:
    """The point's comparison with the reference on some of its rows alone."""
    quality = forget_quality(point.log_r[rows], point.log_r_retrain[rows], resamples=0)
    gap, ks, p = quality.shift or 0.0, quality.d or 0.0, quality.p or 0.0
    return replace(point, log_r_gap=gap, ks=ks, forget_quality=p)


def calibrate(
    look: Look, measure: Look, retain_log: EvalLog, settings: Settings | None = None
) -> dict[str, Any]:
    """The curve, the chosen scale or the reason why there is none, and what checks it.

    Args:
        look: the log of the model at a scale, scores only; called once per scale.
        measure: the log at a scale with answers, of all four sets: for 0, 1, the chosen scale
            and the candidates that were refused.
        retain_log: of a model that never saw the forget set.
        settings: grid, rule and bound.

    Raises:
        UserError: rows that cannot be compared with the reference's.
    """
    settings = settings or Settings()
    started = time.monotonic()

    def points_at(scales: Sequence[float]) -> list[Point]:
        return [read_point(x, look(x), retain_log, settings.protocol) for x in scales]

    first = points_at(settings.grid)
    points = list(first)
    for _ in range(ROUNDS):
        points += points_at(next_scales(points, settings.by))
    points.sort(key=lambda p: p.scale)
    evaluations: dict[float, dict[str, Any]] = {}

    def utility(scale: float) -> float | None:
        if scale not in evaluations:
            figures = summarise(measure(scale), retain_log, protocol=settings.protocol)
            evaluations[scale] = {"scale": scale, **figures}
        value: float | None = evaluations[scale]["model_utility"]
        return value

    chosen, reason, allowed = _choose(points, utility, settings)
    utility(1.0)
    curve = [
        {**p.to_json(), "model_utility": evaluations.get(p.scale, {}).get("model_utility")}
        for p in points
    ]
    eligible = [p for p in first if p in allowed]
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "protocol": settings.protocol,
        "by": settings.by,
        "rule": settings.rule,
        "max_mu_loss": settings.max_mu_loss,
        "chosen_scale": chosen,
        "reason": reason,
        "best_by_gap": best(points, "gap").scale,
        "best_by_ks": best(points, "ks").scale,
        "tried": len(points),
        "curve": curve,
        "held_out": None if chosen is None else held_out(eligible, settings.by),
        "evaluations": [evaluations[scale] for scale in sorted(evaluations)],
        "seconds": time.monotonic() - started,
    }


def _choose(
    points: Sequence[Point], utility: Callable[[float], float | None], settings: Settings
) -> tuple[float | None, str | None, list[Point]]:
    """The chosen scale or None, which were refused and why, and the points in question at last.

    Where a candidate loses too much, the next one is the best up to the scale at which the loss
    would be within the bound if it grew in proportion. It mostly grows faster than that, so a
    second try mostly passes.
    """
    whole = utility(0.0)
    if whole is None:
        return None, "model utility cannot be measured on this data, so its loss has no bound", []
    allowed = list(points)
    refused: list[str] = []
    for _ in range(TRIES):
        point = best(allowed, settings.by)
        if point.scale == 0:
            weaker = "weaker scale" if refused else "scale"
            reason = f"no {weaker} is nearer to the reference than 0, switched off"
            return None, "; ".join([*refused, reason]), allowed
        loss = whole - (utility(point.scale) or 0.0)
        if loss <= settings.max_mu_loss:
            return point.scale, "; ".join(refused) or None, allowed
        refused.append(f"scale {point.scale:g} loses {loss:.4f} of model_utility")
        most = point.scale * settings.max_mu_loss / loss
        allowed = [point for point in allowed if point.scale <= most]
    return None, "; ".join([*refused, f"no more than {TRIES} are tried"]), allowed
