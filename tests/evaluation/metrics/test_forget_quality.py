from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy.stats import hmean, ks_2samp

from evaluation.metrics.forget_quality import (
    forget_quality,
    forget_truth_ratio,
    kept_truth_ratio,
    ks_p_value,
    log_truth_ratio,
)
from evaluation.metrics.privacy import exact_memorization, extraction_strength
from evaluation.metrics.text import rouge_recall
from evaluation.metrics.utility import UTILITY_METRICS, model_utility, option_prob
from evaluation.protocols import PROTOCOLS

RIGHT = [1.0, 0.5]
WRONG = [[2.0, 3.0, 4.0], [0.5, 0.25]]


def test_truth_ratio_is_the_mean_of_wrong_over_right_probability() -> None:
    geometric = np.exp(log_truth_ratio(RIGHT, WRONG))
    p = [np.exp(-np.array(row)) for row in WRONG]
    expected = [
        np.prod(row) ** (1 / row.size) / math.exp(-r) for row, r in zip(p, RIGHT, strict=True)
    ]
    np.testing.assert_allclose(geometric, expected, rtol=1e-12)
    arithmetic = np.exp(log_truth_ratio(RIGHT, WRONG, "arithmetic"))
    expected = [row.mean() / math.exp(-r) for row, r in zip(p, RIGHT, strict=True)]
    np.testing.assert_allclose(arithmetic, expected, rtol=1e-12)
    assert geometric[0] < 1 < geometric[1], "below 1 where the right answer is the likelier one"


def test_truth_ratio_aggregates() -> None:
    log_r = np.log([0.25, 1.0, 4.0])
    np.testing.assert_allclose(forget_truth_ratio(log_r), [0.25, 1.0, 0.25])
    np.testing.assert_allclose(kept_truth_ratio(log_r), [0.75, 0.0, 0.0], atol=1e-15)


def test_extreme_losses_give_numbers_where_probabilities_underflow() -> None:
    losses, wrong = [1e3, 2e3, 0.0], [[1e3, 1e3], [1e3, 1e3], [1e3, 2e3]]
    np.testing.assert_allclose(option_prob(losses, wrong), [1 / 3, 0.0, 1.0], atol=1e-12)
    for averaging in ("geometric", "arithmetic"):
        log_r = log_truth_ratio(losses, wrong, averaging)
        assert np.isfinite(log_r).all()
        assert np.isfinite(forget_truth_ratio(log_r)).all()
        assert np.isfinite(kept_truth_ratio(log_r)).all()
        assert forget_quality(log_r, log_r - 1).p is not None


def test_option_prob_is_the_share_among_the_options() -> None:
    p = np.exp(-np.array([1.0, 2.0, 3.0]))
    found = option_prob([1.0], [[2.0, 3.0]])
    np.testing.assert_allclose(found, [p[0] / p.sum()], rtol=1e-12)


def test_a_row_without_wrong_answers_has_no_truth_ratio() -> None:
    with pytest.raises(ValueError, match="at least one perturbed"):
        log_truth_ratio([1.0, 2.0], [[1.0], []])


@pytest.mark.parametrize(
    ("shift", "p", "word"),
    [
        (-0.3, 1e-4, "under-forgotten"),
        (0.3, 1e-4, "over-forgotten"),
        (0.01, 1.0, "indistinguishable"),
    ],
)
def test_forget_quality_says_which_way(shift: float, p: float, word: str) -> None:
    generator = np.random.default_rng(1)
    retrain = generator.normal(0.5, 0.5, 200)
    found = forget_quality(retrain + shift, retrain)
    test = ks_2samp(np.exp(retrain + shift), np.exp(retrain))
    assert (found.p, found.d) == (pytest.approx(test.pvalue, rel=1e-12), test.statistic)
    assert found.p is not None
    assert (found.p > 0.05) == (p > 0.05)
    assert found.direction == word
    assert found.shift == pytest.approx(shift, abs=1e-12)
    assert found.log10_p == pytest.approx(math.log10(test.pvalue))


def test_equal_medians_with_other_shapes_still_get_a_word() -> None:
    retrain = np.linspace(-1, 1, 201)
    skewed = np.where(retrain < 0, retrain * 9, retrain)
    found = forget_quality(skewed, retrain, resamples=0)
    assert found.shift == 0
    assert found.direction == "under-forgotten"
    assert forget_quality(-skewed, retrain, resamples=0).direction == "over-forgotten"


@pytest.mark.parametrize("n", [600, 2000])
def test_log10_p_is_exact_where_p_underflows(n: int) -> None:
    """Samples wholly apart: 2 of all (2n choose n) orders are that far apart."""
    apart = forget_quality(np.linspace(0, 1, n), np.linspace(5, 6, n), resamples=0)
    exact = math.log10(2) - math.log10(math.comb(2 * n, n))
    assert apart.log10_p == pytest.approx(exact, rel=1e-12)
    assert apart.p == pytest.approx(10**exact, rel=1e-9)


@pytest.mark.parametrize("n", [30, 200, 300, 400, 1000])
def test_samples_that_nearly_agree_have_a_value_and_no_warning(n: int) -> None:
    ours = np.arange(n, dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for moved in (0.0, 0.5, 1.5):
            found = forget_quality(ours, ours + moved, resamples=0)
            assert found.p == pytest.approx(1.0, abs=1e-6)


def test_the_p_value_counts_every_order_of_two_small_samples() -> None:
    for n in (1, 2, 4, 5):
        orders = list(itertools.combinations(range(2 * n), n))
        distances = []
        for chosen in orders:
            rest = [i for i in range(2 * n) if i not in chosen]
            distances.append(slow_distance(np.array(chosen), np.array(rest)))
        for d in set(distances):
            share = sum(other >= d - 1e-12 for other in distances) / len(orders)
            assert ks_p_value(d, n)[0] == pytest.approx(share, rel=1e-12)


def slow_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(ks_2samp(a, b).statistic)


def test_bootstrap_is_that_of_resampled_pairs() -> None:
    generator = np.random.default_rng(3)
    ours, theirs = generator.normal(0.2, 1, 40), generator.normal(0, 1, 40)
    found = forget_quality(ours, theirs, resamples=300)
    chosen = np.random.default_rng(0).integers(40, size=(300, 40))
    distances = [slow_distance(ours[rows], theirs[rows]) for rows in chosen]
    shifts = [np.median(ours[rows]) - np.median(theirs[rows]) for rows in chosen]
    np.testing.assert_allclose(found.d_interval, np.percentile(distances, [2.5, 97.5]), atol=1e-12)
    np.testing.assert_allclose(found.shift_interval, np.percentile(shifts, [2.5, 97.5]))
    again = forget_quality(ours, theirs, resamples=300)
    assert found == again


def test_a_model_against_itself_has_no_spread() -> None:
    log_r = np.random.default_rng(0).normal(size=50)
    found = forget_quality(log_r, log_r)
    assert (found.p, found.d, found.d_interval, found.shift_interval) == (1, 0, (0, 0), (0, 0))


def test_unequal_numbers_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="same rows on both sides"):
        forget_quality([0.1, 0.2], [0.1])


@pytest.mark.parametrize("n", [3, 40, 200])
def test_the_p_value_of_a_distance_is_the_tests_own(n: int) -> None:
    generator = np.random.default_rng(n)
    ours, theirs = generator.normal(size=n), generator.normal(0.3, size=n)
    test = ks_2samp(ours, theirs)
    assert ks_p_value(float(test.statistic), n)[0] == pytest.approx(test.pvalue, rel=1e-9)


def test_huge_samples_have_an_approximate_p_value() -> None:
    generator = np.random.default_rng(1)
    ours, theirs = generator.normal(size=20_000), generator.normal(0.02, size=20_000)
    found = forget_quality(ours, theirs, resamples=0)
    assert found.p == pytest.approx(ks_2samp(ours, theirs, method="asymp").pvalue, rel=1e-9)


def test_the_interval_of_p_is_that_of_d() -> None:
    generator = np.random.default_rng(3)
    found = forget_quality(generator.normal(size=200), generator.normal(0.2, size=200))
    assert found.p_interval is not None
    assert found.d_interval is not None
    assert found.p_interval.low == ks_p_value(found.d_interval.high, 200)[0]
    assert found.p_interval.low < found.p_interval.high
    same = forget_quality([0.1, 0.4, 0.9], [0.1, 0.4, 0.9])
    assert same.p_interval == (1.0, 1.0)


def test_forget_quality_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        forget_quality([0.0, math.nan], [0.0, 1.0])


def utility_rows(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    sizes = {"retain": 30, "real_authors": 20, "world_facts": 10}
    names = UTILITY_METRICS.values()
    return {s: {m: generator.uniform(0.2, 1, n) for m in names} for s, n in sizes.items()}


def test_model_utility_is_the_harmonic_mean_of_nine() -> None:
    rows = utility_rows()
    found = model_utility(rows)
    means = [values.mean() for columns in rows.values() for values in columns.values()]
    assert found.value == pytest.approx(hmean(means), rel=1e-12)
    assert len(found.parts) == 9
    assert found.interval is not None
    assert found.interval.low < hmean(means) < found.interval.high
    assert found == model_utility(rows)
    assert list(found.part_intervals) == list(found.parts)
    for title, (low, high) in found.part_intervals.items():
        assert low < found.parts[title] < high


def test_model_utility_names_the_parts_it_lacks() -> None:
    rows = utility_rows()
    del rows["retain"]["rouge_l_recall"]
    found = model_utility(rows)
    assert found.value is None
    assert found.reason == "not measured: Retain ROUGE"
    assert len(found.parts) == 8


def test_one_part_of_zero_makes_model_utility_zero() -> None:
    rows = utility_rows()
    rows["world_facts"]["truth_ratio"] = np.zeros(10)
    found = model_utility(rows)
    assert found.value == 0
    assert found.interval == (0, 0)


def test_rouge_recall_stems_and_ignores_case() -> None:
    found = rouge_recall(["The AUTHORS wrote", ""], ["the author writes well", "a b"])
    assert found[0].rouge_l_recall == pytest.approx(0.5)
    assert found[1].rouge1_recall == 0


@pytest.mark.parametrize(
    ("predicted", "labels", "em", "es"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0, 1.0),
        ([9, 9, 3, 4], [1, 2, 3, 4], 0.5, 0.5),
        ([1, 2, 3, 9], [1, 2, 3, 4], 0.75, 0.0),
        ([1, 9, 3, 4], [1, 2, 3, 4], 0.75, 0.5),
        ([9, 9], [1, 2], 0.0, 0.0),
    ],
)
def test_memorisation(predicted: list[int], labels: list[int], em: float, es: float) -> None:
    assert exact_memorization(predicted, labels) == em
    assert extraction_strength(predicted, labels) == es


def test_protocols_are_those_of_the_specification() -> None:
    table = {
        name: (
            p.decoding.sample,
            p.max_rows,
            p.decoding.max_total,
            p.decoding.max_new,
            p.max_length,
            p.truth_ratio,
        )
        for name, p in PROTOCOLS.items()
    }
    assert table == {
        "tofu": (False, 300, 200, None, 200, "geometric"),
        "simnpo": (True, 300, 200, None, 200, "geometric"),
        "tofu-paper": (False, None, 200, None, 200, "arithmetic"),
        "open-unlearning": (False, None, None, 200, 512, "geometric"),
    }
    drawn = PROTOCOLS["simnpo"].decoding
    assert (drawn.temperature, drawn.top_p, drawn.seed) == (0.6, 0.9, 0)
