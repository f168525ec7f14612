"""95 % bootstrap intervals over rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES, SEED = 1000, 0


class Interval(NamedTuple):
    """A 95 % percentile interval of the bootstrap over rows."""

    low: float
    high: float


class Measure(NamedTuple):
    """A value with its 95 % bootstrap interval over rows; None where resamples are 0."""

    value: float
    interval: Interval | None = None


def interval(samples: Floats, level: float = 0.95) -> Interval:
    """The percentiles of bootstrap samples between which `level` of them lie."""
    outside = 50 * (1 - level)
    low, high = np.percentile(samples, [outside, 100 - outside])
    return Interval(float(low), float(high))


def resampled_rows(n: int, resamples: int) -> npt.NDArray[np.int64]:
    """Rows drawn with replacement, (resamples, n); the same at every call."""
    return np.random.default_rng(SEED).integers(n, size=(resamples, n))


def measure_mean(
    values: npt.ArrayLike, *, resamples: int = RESAMPLES, level: float = 0.95
) -> Measure:
    """The mean over rows (rows,) and its interval."""
    rows = np.asarray(values, dtype=np.float64)
    if not resamples:
        return Measure(float(rows.mean()))
    samples = rows[resampled_rows(rows.size, resamples)].mean(axis=1)
    return Measure(float(rows.mean()), interval(samples, level))


def finite(values: npt.ArrayLike) -> Floats:
    """`values` as an array; ValueError where there are none, or one is not finite."""
    rows = np.asarray(values, dtype=np.float64)
    if not rows.size or not np.isfinite(rows).all():
        raise ValueError("needs at least one score, all of them finite")
    return rows
