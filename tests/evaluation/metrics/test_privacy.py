"""Membership scores against hand-checked cases, and what must hold for any scores."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics import privacy
from evaluation.metrics.bootstrap import measure_mean
from evaluation.metrics.privacy import (
    Attack,
    exact_memorization,
    extraction_strength,
    measure_auc,
    measure_privleak,
)

CASES: dict[str, list[dict[str, Any]]] = json.loads(
    Path(__file__).with_name("membership_cases.json").read_text()
)
# Whole numbers: transforms of them are exact, and ties are common.
SCORES = st.lists(st.integers(-50, 50), min_size=1, max_size=12)
LOG_P = st.lists(st.floats(-30, 0), min_size=1, max_size=30)
TOKENS = st.integers(1, 20).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 2), min_size=n, max_size=n)] * 2)
)


def test_golden_scores() -> None:
    for case in CASES["loss"]:
        assert privacy.loss_score(case["log_p"]) == pytest.approx(case["score"], abs=1e-12)
    for case in CASES["zlib"]:
        assert len(zlib.compress(case["answer"].encode())) == case["bytes"]
        found = privacy.zlib_score(case["log_p"], case["answer"])
        assert found == pytest.approx(case["score"], abs=1e-12)
    for case in CASES["min_k"]:
        found = privacy.min_k_score(case["log_p"], case["k"])
        assert found == pytest.approx(case["score"], abs=1e-12), case["why"]
    for case in CASES["min_k_plus_plus"]:
        values = (case["log_p"], case["mean"], case["variance"])
        found = privacy.min_k_plus_plus_score(*values, case["k"])
        assert found == pytest.approx(case["score"], abs=1e-9), case["why"]


def test_golden_figures() -> None:
    for case in CASES["auc"]:
        assert privacy.auc(case["forget"], case["holdout"]) == case["auc"], case["why"]
    for case in CASES["privleak"]:
        found = privacy.privleak(case["auc"], case["retrained"])
        if case["privleak"] is None:
            assert found is None
        else:
            assert found == pytest.approx(case["privleak"], abs=1e-9), case["why"]
    for case in CASES["extraction"]:
        pair = (case["predicted"], case["labels"])
        assert exact_memorization(*pair) == case["exact_memorization"]
        assert extraction_strength(*pair) == case["extraction_strength"]


@given(SCORES, SCORES)
def test_auc_is_the_share_of_won_pairs(forget: list[int], holdout: list[int]) -> None:
    won = [1.0 if f < h else 0.5 if f == h else 0.0 for f in forget for h in holdout]
    assert privacy.auc(forget, holdout) == pytest.approx(sum(won) / len(won), abs=1e-12)


@given(SCORES, SCORES)
def test_auc_depends_on_order_alone_and_swapping_mirrors_it(
    forget: list[int], holdout: list[int]
) -> None:
    found = privacy.auc(forget, holdout)
    assert 0 <= found <= 1
    assert privacy.auc([x**3 + 7 for x in forget], [x**3 + 7 for x in holdout]) == found
    assert privacy.auc([-x for x in forget], [-x for x in holdout]) == pytest.approx(1 - found)
    assert privacy.auc(holdout, forget) == pytest.approx(1 - found)
    assert privacy.auc(forget[::-1], holdout) == found
    assert privacy.auc(forget * 2, holdout * 3) == pytest.approx(found, abs=1e-12)


@given(LOG_P, st.floats(0.05, 0.9))
def test_min_k_looks_at_the_worst_tokens(log_p: list[float], k: float) -> None:
    few, loss = privacy.min_k_score(log_p, k), privacy.loss_score(log_p)
    assert privacy.min_k_score(log_p, 1.0) == pytest.approx(loss, abs=1e-9)
    assert few >= loss - 1e-9
    assert few <= -min(log_p) + 1e-9
    standard = privacy.min_k_plus_plus_score(log_p, np.zeros(len(log_p)), np.ones(len(log_p)), k)
    assert standard == pytest.approx(few, abs=1e-9)


def test_a_share_that_is_whole_but_for_rounding_is_whole() -> None:
    log_p = -np.arange(1.0, 101.0)
    assert privacy.min_k_score(log_p, 0.29) == pytest.approx(np.arange(72, 101).mean())


@given(TOKENS)
def test_what_can_be_extracted_is_memorised(pair: tuple[list[int], list[int]]) -> None:
    predicted, labels = pair
    strength, share = extraction_strength(predicted, labels), exact_memorization(predicted, labels)
    assert 0 <= strength <= share <= 1
    assert (strength == 1) == (share == 1) == (predicted == labels)


@given(SCORES, SCORES)
@settings(max_examples=30)
def test_an_interval_is_made_of_resampled_aucs(forget: list[int], holdout: list[int]) -> None:
    attack = Attack(np.array(forget, dtype=float), np.array(holdout, dtype=float))
    once = (np.ones((1, len(forget))), np.ones((1, len(holdout))))
    assert privacy._resampled_auc(attack, *once) == pytest.approx(privacy.auc(*attack))
    found = measure_auc(attack, resamples=50)
    assert found.interval is not None
    assert 0 <= found.interval.low <= found.interval.high <= 1
    assert measure_auc(attack, resamples=50) == found, "the seed alone decides"


def test_intervals_narrow_with_rows_and_can_be_left_out() -> None:
    random = np.random.default_rng(0)

    def width(n: int) -> float:
        attack = Attack(random.normal(0, 1, n), random.normal(1, 1, n))
        spread = measure_auc(attack).interval
        assert spread is not None
        return spread.high - spread.low

    assert width(400) < 0.5 * width(40)
    assert measure_auc(Attack(np.ones(2), np.ones(2)), resamples=0).interval is None
    assert measure_mean([1.0, 3.0], resamples=0) == (2.0, None)
    spread = measure_mean(random.normal(5, 1, 400)).interval
    assert spread is not None
    assert 4.8 < spread.low < 5 < spread.high < 5.2


def test_privleak_of_a_model_against_itself_is_exactly_0() -> None:
    random = np.random.default_rng(1)
    attack = Attack(random.normal(size=30), random.normal(size=20))
    assert measure_privleak(attack, attack) == (0.0, (0.0, 0.0)), "both meet the same resamples"
    known = Attack(attack.forget - 10, attack.holdout)
    found = measure_privleak(known, attack)
    assert found is not None
    assert found.value == pytest.approx(-100)
    assert measure_privleak(attack, known) is None


@pytest.mark.parametrize("k", [0.0, -0.1, 1.01])
def test_a_share_of_no_tokens_is_refused(k: float) -> None:
    with pytest.raises(ValueError, match="share of the tokens"):
        privacy.min_k_score([-1.0], k)


def test_empty_or_broken_scores_are_refused() -> None:
    for sides in (([], [1.0]), ([1.0], []), ([float("nan")], [1.0])):
        with pytest.raises(ValueError, match="at least one score"):
            privacy.auc(*sides)
    with pytest.raises(ValueError, match="at least one token"):
        privacy.loss_score([])
