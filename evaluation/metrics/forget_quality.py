"""Truth ratios, and forget quality: the KS test of log R, unlearned against retrained.

Losses are nats per token (SPEC: nbar, EOS counted). Everything stays in the log domain, so that
losses of a thousand nats give a number and not NaN. Sources: TOFU (arXiv 2401.06121,
`locuslab/tofu` aggregate_eval_stat.py, utils.py); open-unlearning (arXiv 2506.12618).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from evaluation.metrics.bootstrap import RESAMPLES, Floats, Interval, interval, resampled_rows

Averaging = Literal["geometric", "arithmetic"]
Verdict = Literal["under-forgotten", "over-forgotten", "indistinguishable"]
NEEDS_RETRAIN = "needs a retrain reference"
ALPHA = 0.05
# As scipy's ks_2samp: more rows on a side, and the p-value is approximated.
EXACT_ROWS = 10_000


def log_truth_ratio(
    paraphrase: npt.ArrayLike,
    perturbed: Sequence[npt.ArrayLike],
    averaging: Averaging = "geometric",
) -> Floats:
    """Log R of every row; R below 1 means the right answer is the likelier one.

    geometric (all released code): `log R = nbar(paraphrase) - mean_k nbar(perturbed_k)`;
    arithmetic (the TOFU paper): `R = mean_k P(perturbed_k) / P(paraphrase)`, `P = exp(-nbar)`.

    Args:
        paraphrase: (rows,) losses of the paraphrased answers.
        perturbed: for every row the losses of its wrong answers, at least one.
        averaging: over the wrong answers.
    """
    right = np.asarray(paraphrase, dtype=np.float64)
    wrong = [np.asarray(losses, dtype=np.float64) for losses in perturbed]
    if len(wrong) != right.size or any(losses.size == 0 for losses in wrong):
        raise ValueError("every row needs a paraphrase and at least one perturbed answer")
    if averaging == "geometric":
        return right - np.array([losses.mean() for losses in wrong], dtype=np.float64)
    from scipy.special import logsumexp

    means = [float(logsumexp(-losses)) - math.log(losses.size) for losses in wrong]
    return right + np.array(means, dtype=np.float64)


def forget_truth_ratio(log_r: npt.ArrayLike) -> Floats:
    """`min(R, 1/R)` of every row: 1 where right and wrong answers are equally likely."""
    return np.exp(-np.abs(np.asarray(log_r, dtype=np.float64)))


def kept_truth_ratio(log_r: npt.ArrayLike) -> Floats:
    """`max(0, 1 - R)` of every row: 1 where wrong answers are impossible."""
    return -np.expm1(np.minimum(np.asarray(log_r, dtype=np.float64), 0.0))


@dataclass(frozen=True)
class ForgetQuality:
    """The two-sample Kolmogorov-Smirnov test of log R, unlearned against retrained.

    Attributes:
        p: two-sided p-value (forget quality), higher is better; None without a reference.
        log10_p: its logarithm, also where p underflows to 0.
        d: the KS statistic, lower is better.
        shift: median log R of the unlearned model minus the retrained one's, in nats per token.
            Negative: the right answer is still preferred over the wrong ones more than a model
            that never saw it prefers it, under-forgotten. Positive: over-forgotten. Best is 0.
        direction: the word for it; "indistinguishable" where p > 0.05.
        d_interval, shift_interval: 95 % over resampled rows. Resampling adds noise to a statistic
            that cannot be negative, so d's interval lies high: read its upper end.
        p_interval: the p-values of d_interval's ends, so it lies low: read its lower end.
        reason: why there is no value, else None.
    """

    p: float | None = None
    log10_p: float | None = None
    d: float | None = None
    shift: float | None = None
    direction: Verdict | None = None
    d_interval: Interval | None = None
    shift_interval: Interval | None = None
    p_interval: Interval | None = None
    reason: str | None = None


def forget_quality(
    log_r: npt.ArrayLike, log_r_retrain: npt.ArrayLike, *, resamples: int = RESAMPLES
) -> ForgetQuality:
    """Forget quality with its error and direction; see `ForgetQuality`.

    Takes log R, not R: the test depends on ranks only, and exp overflows for broken models.

    Args:
        log_r: (rows,) of the unlearned model.
        log_r_retrain: (rows,) of the retrained one, row by row the same questions, resampled as
            pairs.
        resamples: of the bootstrap; 0 leaves the intervals out.
    """
    ours = np.asarray(log_r, dtype=np.float64)
    theirs = np.asarray(log_r_retrain, dtype=np.float64)
    if not ours.size or ours.size != theirs.size:
        raise ValueError("forget quality needs the same rows on both sides, and at least one")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ValueError("log R holds a value that is not finite")
    from scipy.stats import ks_2samp

    # The statistic alone: scipy's exact p-value fails, with a warning, where samples nearly agree.
    test = ks_2samp(ours, theirs, method="asymp")
    n = ours.size
    d = round(float(test.statistic) * n) / n
    p, log10_p = ks_p_value(d, n)
    shift = float(np.median(ours) - np.median(theirs))
    d_interval = shift_interval = p_interval = None
    if resamples:
        d_interval, shift_interval = _bootstrap_shift(ours, theirs, resamples)
        p_interval = Interval(*(ks_p_value(end, n)[0] for end in reversed(d_interval)))
    # Equal medians with unequal shapes: the side on which the distributions part furthest decides.
    low = shift < 0 if shift != 0 else int(test.statistic_sign) > 0
    word: Verdict = "under-forgotten" if low else "over-forgotten"
    return ForgetQuality(
        p=p,
        log10_p=log10_p,
        d=d,
        shift=shift,
        direction="indistinguishable" if p > ALPHA else word,
        d_interval=d_interval,
        shift_interval=shift_interval,
        p_interval=p_interval,
    )


def ks_p_value(d: float, n: int) -> tuple[float, float]:
    """The two-sided p-value of a KS statistic `d` between two samples of `n` rows, and its log10.

    The logarithm is finite where the p-value underflows. Exact up to `EXACT_ROWS` rows: the share
    of the orders of 2n values that lie at least `d` apart, by the reflection principle (Gnedenko
    and Koroljuk, 1951) in whole numbers, so that nothing is rounded. Beyond that Kolmogorov's
    distribution for n / 2 rows.
    """
    if n > EXACT_ROWS:
        from scipy.stats import kstwo

        p = float(np.clip(kstwo.sf(d, round(n / 2)), 0.0, 1.0))
        # Where p underflows, the first term of the limit law: 2 exp(-n d^2).
        limit = (math.log(2) - n * d * d) / math.log(10)
        return p, math.log10(p) if p > 0 else limit
    total, gap = math.comb(2 * n, n), round(d * n)
    if gap == 0:
        return 1.0, 0.0
    terms = [math.comb(2 * n, n - k) for k in range(gap, n + 1, gap)]
    apart = 2 * (sum(terms[::2]) - sum(terms[1::2]))
    return apart / total, math.log10(apart) - math.log10(total)


def _bootstrap_shift(ours: Floats, theirs: Floats, resamples: int) -> tuple[Interval, Interval]:
    # The same questions were put to both models, so a resampled question takes both answers.
    chosen = resampled_rows(ours.size, resamples)
    grid = np.unique(np.concatenate([ours, theirs]))
    # Whole numbers until the end: cumulated fractions would leave rounding dust on equal samples.
    gap = _counts(ours, chosen, grid) - _counts(theirs, chosen, grid)
    distance = np.abs(np.cumsum(gap, axis=1)).max(axis=1) / ours.size
    shift = np.median(ours[chosen], axis=1) - np.median(theirs[chosen], axis=1)
    return interval(distance), interval(shift)


def _counts(values: Floats, chosen: npt.NDArray[np.int64], grid: Floats) -> npt.NDArray[np.int64]:
    """How often each grid value occurs in each resample: (resamples, grid)."""
    place = np.searchsorted(grid, values)[chosen]
    offset = np.arange(len(chosen))[:, None] * grid.size
    flat = np.bincount((place + offset).ravel(), minlength=len(chosen) * grid.size)
    return flat.reshape(len(chosen), grid.size)
