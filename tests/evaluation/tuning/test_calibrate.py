"""Which strength is chosen: by what, within which bound, and checked on which rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from adapters.errors import UserError
from evaluation.logs.records import AnswerScore, EvalLog, Generation, RowRecord, SetRecord
from evaluation.protocols import GREEDY_TOTAL
from evaluation.tuning.calibrate import (
    Point,
    Settings,
    best,
    calibrate,
    held_out,
    next_scales,
    read_point,
)

N = 40
CENTRES = np.linspace(-1.5, 1.5, N)


def row(text: str, nll: float, log_r: float, rouge: float | None) -> RowRecord:
    """A row whose log R is `log_r`: its wrong answers all have 5 nats a token."""
    wrong = tuple(AnswerScore(5.0, 4) for _ in range(3))
    made = {} if rouge is None else {GREEDY_TOTAL.name: Generation("x", rouge, rouge)}
    return RowRecord(text, "a", AnswerScore(nll, 4), AnswerScore(5.0 + log_r, 4), wrong, made)


def log_at(
    shift: float, keep: float = 0.9, *, answers: bool = False, noise: float = 0.0, limit: Any = None
) -> EvalLog:
    """A model whose forget set lies `shift` nats from the reference and that keeps `keep`."""
    rouge = keep if answers else None
    random = np.random.default_rng(3).normal(0, noise, N)
    forget = tuple(
        row(f"f{i}", 4.0 + shift, CENTRES[i] + shift + random[i], rouge) for i in range(N)
    )
    sets = {"forget": SetRecord("forget", forget, N)}
    names = ("retain", "real_authors", "world_facts") if answers else ("retain",)
    for name in names:
        kept = tuple(row(f"{name}{i}", -float(np.log(keep)), -3.0, rouge) for i in range(4))
        sets[name] = SetRecord(name, kept, 4)
    return EvalLog(sets, {"limit": limit})


REFERENCE = log_at(0.0, 0.95)


def measured(
    shift: Callable[[float], float], keep: Callable[[float], float], seen: list[Any] | None = None
) -> tuple[Callable[[float], EvalLog], Callable[[float], EvalLog]]:
    """`look` and `measure` of a made-up model; `seen` gets what was asked for."""

    def note(what: str, scale: float) -> None:
        if seen is not None:
            seen.append((what, scale))

    def look(scale: float) -> EvalLog:
        note("look", scale)
        return log_at(shift(scale), keep(scale))

    def measure(scale: float) -> EvalLog:
        note("measure", scale)
        return log_at(shift(scale), keep(scale), answers=True)

    return look, measure


def point(scale: float, gap: float, ks: float = 0.2, keep: float = 0.9) -> Point:
    return Point(scale, gap, ks, 0.1, 4.0, 4.0, 0.1, keep)


def test_the_smallest_gap_of_either_sign_wins() -> None:
    points = [point(0.0, -1.0), point(0.5, -0.2), point(1.0, 0.1, ks=0.4)]
    assert best(points).scale == 1.0
    assert best(points, "ks").scale == 0.0  # all equal in D but the last: the smallest scale


def test_of_equally_near_points_the_one_that_keeps_most() -> None:
    points = [point(0.5, -0.12, keep=0.8), point(0.9, 0.1, keep=0.7), point(1.3, 0.14, keep=0.85)]
    assert best(points).scale == 1.3
    assert best(points[:2]).scale == 0.5
    assert best([point(0.5, -0.16, keep=0.99), point(0.9, 0.1, keep=0.7)]).scale == 0.9  # no tie
    same = [point(0.7, 0.1), point(0.4, -0.1)]
    assert best(same).scale == 0.4


def test_the_grid_is_halved_beside_the_best_and_where_the_sign_turns() -> None:
    gaps = {0.0: -1.0, 0.2: 0.5, 0.4: 0.3, 0.6: -0.4, 0.8: -0.05, 1.0: -0.3}
    points = [point(scale, gap) for scale, gap in gaps.items()]
    assert next_scales(points) == [0.1, 0.5, 0.7, 0.9]
    assert next_scales([point(s, g, ks=abs(s - 0.2)) for s, g in gaps.items()], "ks") == [0.1, 0.3]
    assert next_scales([point(0.0, 0.1), point(1.0, 0.5)]) == [0.5]  # at an end: one side


def test_the_zero_of_the_gap_is_found() -> None:
    look, measure = measured(lambda s: 2 * s - 1.3, lambda s: 0.95 - 0.02 * s)
    found = calibrate(look, measure, REFERENCE)
    assert found["chosen_scale"] == pytest.approx(0.635, abs=0.02)
    assert found["reason"] is None
    chosen = next(p for p in found["curve"] if p["scale"] == found["chosen_scale"])
    assert chosen["log_r_gap"] == pytest.approx(2 * chosen["scale"] - 1.3)
    assert chosen["retrain_forget_nll"] == pytest.approx(4.0)
    assert chosen["forget_nll"] == pytest.approx(4.0 + chosen["log_r_gap"])
    assert chosen["retain_answer_prob"] == pytest.approx(0.95 - 0.02 * chosen["scale"])
    assert found["tried"] == len(found["curve"]) > 16
    scales = [p["scale"] for p in found["curve"]]
    assert scales == sorted(set(scales))
    assert {0.0, 1.0} < set(scales)


def test_each_scale_is_looked_at_once_and_few_are_answered() -> None:
    seen: list[Any] = []
    look, measure = measured(lambda s: 2 * s - 1.3, lambda s: 0.95 - 0.02 * s, seen)
    found = calibrate(look, measure, REFERENCE, Settings(scales=(0.5,)))
    looked = [scale for what, scale in seen if what == "look"]
    assert looked[:3] == [0.0, 0.5, 1.0]
    assert len(looked) == len(set(looked)) == found["tried"]
    answered = [scale for what, scale in seen if what == "measure"]
    assert sorted(answered) == sorted({0.0, found["chosen_scale"], 1.0})
    assert [e["scale"] for e in found["evaluations"]] == sorted(answered)
    told = {p["scale"]: p["model_utility"] for p in found["curve"]}
    assert [s for s, value in told.items() if value is not None] == sorted(answered)
    assert all(e["model_utility_interval"] is not None for e in found["evaluations"])


def test_no_scale_is_chosen_beyond_the_bound() -> None:
    """Utility falls steeply: the nearest scale loses too much, a weaker one is taken, or none."""
    look, measure = measured(lambda s: 2 * s - 1.3, lambda s: 0.95 - 0.4 * s)
    tight = calibrate(look, measure, REFERENCE, Settings(max_mu_loss=0.01))
    assert tight["chosen_scale"] is None
    assert tight["reason"].startswith(f"scale {tight['best_by_gap']:g} loses 0.")
    assert "no weaker scale is nearer to the reference than 0" in tight["reason"]
    assert tight["best_by_gap"] == pytest.approx(0.635, abs=0.02)
    wide = calibrate(look, measure, REFERENCE, Settings(max_mu_loss=0.5))
    assert wide["chosen_scale"] == pytest.approx(0.635, abs=0.02)
    middle = calibrate(look, measure, REFERENCE, Settings(max_mu_loss=0.08))
    assert middle["chosen_scale"] is not None
    assert middle["chosen_scale"] < wide["chosen_scale"]
    assert middle["reason"].startswith(f"scale {wide['chosen_scale']:g} loses 0.")
    losses = {e["scale"]: e["model_utility"] for e in middle["evaluations"]}
    assert losses[0.0] - losses[middle["chosen_scale"]] <= 0.08
    assert middle["held_out"]["chosen_on_odd_rows"]["scale"] <= middle["chosen_scale"]


def test_after_some_tries_none_is_chosen_and_said_so() -> None:
    """Utility is lost at once and then no more: no scale is weak enough."""
    look, measure = measured(lambda s: 2 * s - 1.3, lambda s: 0.95 if s == 0 else 0.5)
    seen: list[Any] = []

    def counted(scale: float) -> EvalLog:
        seen.append(scale)
        return measure(scale)

    fine = tuple(i / 100 for i in range(0, 150))
    found = calibrate(look, counted, REFERENCE, Settings(scales=fine, max_mu_loss=0.2))
    assert found["chosen_scale"] is None
    assert found["reason"].count("of model_utility") == 3
    assert found["reason"].endswith("no more than 3 are tried")
    assert len(seen) == 5  # 0, three candidates, 1
    assert seen[1] > seen[2] > seen[3] > 0


def test_an_adapter_that_only_leads_away_is_not_chosen() -> None:
    look, measure = measured(lambda s: -0.2 - s, lambda s: 0.95)
    found = calibrate(look, measure, REFERENCE)
    assert found["chosen_scale"] is None
    assert found["reason"] == "no scale is nearer to the reference than 0, switched off"


def test_utility_that_cannot_be_measured_bounds_nothing() -> None:
    look, _ = measured(lambda s: 2 * s - 1.3, lambda s: 0.95)
    found = calibrate(look, look, REFERENCE)  # no answers, so no model utility
    assert found["chosen_scale"] is None
    assert "cannot be measured" in found["reason"]


def test_by_ks_another_scale_may_be_chosen() -> None:
    """Log R that only spreads out: the median is right at every scale, the distribution is not."""

    def look(scale: float, *, answers: bool = False) -> EvalLog:
        return log_at(0.05 * scale - 0.05, noise=2 * abs(scale - 0.4), answers=answers)

    def measure(scale: float) -> EvalLog:
        return look(scale, answers=True)

    by_gap = calibrate(look, measure, REFERENCE)
    by_ks = calibrate(look, measure, REFERENCE, Settings(by="ks"))
    assert by_ks["chosen_scale"] == by_ks["best_by_ks"]
    assert abs(by_ks["chosen_scale"] - 0.4) < 0.2
    assert by_gap["chosen_scale"] == by_gap["best_by_gap"] != by_ks["chosen_scale"]
    assert "ks" in by_ks["rule"]
    assert "log_r_gap" in by_gap["rule"]


def test_every_row_is_judged_at_a_scale_chosen_without_it() -> None:
    """Odd rows meet the reference at 0.5, even ones at 1.0; chosen across, neither does."""
    theirs = CENTRES
    grid = []
    for scale in (0.0, 0.5, 1.0):
        ours = theirs + np.where(np.arange(N) % 2 == 0, scale - 1.0, scale - 0.5)
        grid.append(
            Point(scale, 0.0, 0.0, 1.0, 4.0, 4.0, 0.1, 0.9, log_r=ours, log_r_retrain=theirs)
        )
    found = held_out(grid)
    assert found is not None
    # The first half holds rows 1, 3, 5 ... as people count: array rows 0, 2, 4.
    assert found["chosen_on_odd_rows"]["scale"] == 1.0
    assert found["chosen_on_even_rows"]["scale"] == 0.5
    assert found["chosen_on_odd_rows"]["log_r_gap"] == pytest.approx(0.5)
    assert found["chosen_on_even_rows"]["log_r_gap"] == pytest.approx(-0.5)
    mixed = theirs + np.where(np.arange(N) % 2 == 0, -0.5, 0.5)
    from scipy.stats import ks_2samp

    test = ks_2samp(mixed, theirs)
    assert found["forget_quality"] == pytest.approx(test.pvalue, rel=1e-12)
    assert found["ks"] == pytest.approx(test.statistic, abs=1e-12)
    assert found["n"] == N
    few = Point(0.0, 0.0, 0.0, 1.0, 4.0, 4.0, 0.1, 0.9, None, theirs[:3], theirs[:3])
    assert held_out([few]) is None


def test_rows_are_matched_by_question_and_limits_are_kept() -> None:
    log = log_at(0.3)
    rows = log.sets["forget"].rows[::-1]
    turned = EvalLog({**log.sets, "forget": SetRecord("forget", rows, N)}, {})
    found = read_point(0.5, turned, REFERENCE, "tofu")
    assert found.log_r - found.log_r_retrain == pytest.approx(0.3)
    few = EvalLog({**log.sets, "forget": SetRecord("forget", rows[:6], N)}, {"limit": 6})
    assert read_point(0.5, few, REFERENCE, "tofu").log_r.size == 6
    unlimited = EvalLog({**log.sets, "forget": SetRecord("forget", rows[:6], N)}, {})
    with pytest.raises(UserError, match="different rows"):
        read_point(0.5, unlimited, REFERENCE, "tofu")


def test_rows_without_a_truth_ratio_cannot_calibrate() -> None:
    log = log_at(0.3)
    bare = tuple(RowRecord(r.question, r.answer, r.answer_score) for r in log.sets["forget"].rows)
    without = EvalLog({**log.sets, "forget": SetRecord("forget", bare, N)}, {})
    with pytest.raises(UserError, match="perturbed answers"):
        read_point(0.5, without, REFERENCE, "tofu")
