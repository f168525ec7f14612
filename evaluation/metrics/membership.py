"""Membership inference: how a model's scores tell rows it was trained on from rows it never saw.

Every score is signed like a loss: the lower, the more the row looks trained on. An attack's AUC
compares forget rows with holdout rows: 1 where every forget row looks more trained on than every
holdout row, 1/2 where nothing tells them apart, 0 where forget rows stand out as less likely than
rows never seen. As open-unlearning defines them (arXiv 2506.12618), over all labels: its code drops
the last one. No model and no files here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from evaluation.metrics.statistics import RESAMPLES, Floats, Interval, interval, mean_interval

if TYPE_CHECKING:
    from evaluation.inference.token_stats import AnswerTokens

MIN_K = 0.4
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference")
# A variance below this comes from one token that has it all; open-unlearning's floor.
_LEAST_VARIANCE = 1e-6


class Measure(NamedTuple):
    """A value with its 95 % bootstrap interval over rows; None where resamples are 0."""

    value: float
    interval: Interval | None = None


def loss_score(log_p: npt.ArrayLike) -> float:
    """LOSS (arXiv 1709.01604): the mean negative log-likelihood, nats a token."""
    return float(-_log_probabilities(log_p).mean())


def zlib_score(log_p: npt.ArrayLike, answer: str) -> float:
    """Zlib (arXiv 2012.07805): nats a token by the bytes of the compressed answer.

    The mean, not the sum, of the loss stands above, as in open-unlearning.
    """
    return loss_score(log_p) / len(zlib.compress(answer.encode("utf-8")))


def min_k_score(log_p: npt.ArrayLike, k: float = MIN_K) -> float:
    """Min-K (arXiv 2310.16789): minus the mean log p of the least likely share `k` of the tokens.

    Args:
        log_p: (n,) of the labels, nats.
        k: share above 0 up to 1; `max(1, floor(k n))` tokens.
    """
    return _mean_lowest(_log_probabilities(log_p), k)


def min_k_plus_plus_score(
    log_p: npt.ArrayLike, mean: npt.ArrayLike, variance: npt.ArrayLike, k: float = MIN_K
) -> float:
    """Min-K++ (arXiv 2404.02936): Min-K of `(log p - mu) / sigma`.

    Args:
        log_p: (n,) of the labels, nats.
        mean, variance: (n,) of log p over the vocabulary under the model's own distribution.
        k: see `min_k_score`.
    """
    sigma = np.sqrt(np.maximum(np.asarray(variance, dtype=np.float64), _LEAST_VARIANCE))
    return _mean_lowest((_log_probabilities(log_p) - np.asarray(mean)) / sigma, k)


def reference_score(mean_nll: float, reference_mean_nll: float) -> float:
    """Reference (arXiv 2004.15011): the loss minus that of another model, nats a token."""
    return mean_nll - reference_mean_nll


def attack_scores(
    tokens: AnswerTokens, answer: str, *, k: float = MIN_K, reference: float | None = None
) -> dict[str, float]:
    """Every attack's score of one answer; `reference` is its loss under the other model."""
    scores = {
        "loss": loss_score(tokens.log_p),
        "zlib": zlib_score(tokens.log_p, answer),
        "min_k": min_k_score(tokens.log_p, k),
        "min_k_plus_plus": min_k_plus_plus_score(tokens.log_p, tokens.mean, tokens.variance, k),
    }
    if reference is not None:
        scores["reference"] = reference_score(tokens.mean_nll, reference)
    return scores


def auc(forget: npt.ArrayLike, holdout: npt.ArrayLike) -> float:
    """`P(forget < holdout) + P(forget = holdout) / 2` over all pairs, exact by ranks.

    Args:
        forget: (n,) loss-like scores of the forget rows, the positive side.
        holdout: (m,) of rows that were never trained on.
    """
    left, right = _finite(forget), np.sort(_finite(holdout))
    below = np.searchsorted(right, left, "left").sum()
    up_to = np.searchsorted(right, left, "right").sum()
    pairs = left.size * right.size
    return float(2 * pairs - below - up_to) / (2 * pairs)


def privleak(auc_unlearned: float, auc_retrained: float) -> float | None:
    """Per cent: `100 ((1 - AUC) - (1 - AUC_retrain)) / (1 - AUC_retrain)`; best is 0.

    Below 0 forget rows still look trained on, compared with a model that never saw them; above 0
    they stand out as unlikely, over-forgotten. Source: MUSE (arXiv 2407.06460), signed as
    open-unlearning. None where the retrained model's AUC is 1, and there is nothing to divide by.
    """
    left = 1 - auc_retrained
    return None if left == 0 else 100 * (auc_retrained - auc_unlearned) / left


class Attack(NamedTuple):
    """The scores of one attack: loss-like, of (n,) forget and (m,) holdout rows."""

    forget: Floats
    holdout: Floats


def measure_auc(attack: Attack, *, resamples: int = RESAMPLES, seed: int = 0) -> Measure:
    """The AUC of an attack; forget and holdout rows are resampled apart."""
    value = auc(attack.forget, attack.holdout)
    if not resamples:
        return Measure(value)
    counts = _draws(attack, resamples, seed)
    return Measure(value, interval(_resampled_auc(attack, *counts)))


def measure_privleak(
    attack: Attack, retrained: Attack, *, resamples: int = RESAMPLES, seed: int = 0
) -> Measure | None:
    """`privleak` of an attack on two models; both meet the same rows, which are resampled together.

    Args:
        attack: of the unlearned model.
        retrained: of the retrained one, row by row the same rows.
        resamples, seed: of the bootstrap.
    """
    value = privleak(auc(*attack), auc(*retrained))
    if value is None or not resamples:
        return None if value is None else Measure(value)
    counts = _draws(attack, resamples, seed)
    ours, theirs = _resampled_auc(attack, *counts), _resampled_auc(retrained, *counts)
    usable = theirs < 1
    return Measure(value, interval(100 * (theirs - ours)[usable] / (1 - theirs[usable])))


def measure_mean(values: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Measure:
    """The mean over rows."""
    rows = _finite(values)
    if not resamples:
        return Measure(float(rows.mean()))
    return Measure(float(rows.mean()), mean_interval(rows, resamples=resamples, seed=seed))


def _draws(attack: Attack, resamples: int, seed: int) -> tuple[Floats, Floats]:
    """How often each forget and each holdout row stands in each resample."""
    generator = np.random.default_rng(seed)
    sizes = (attack.forget.size, attack.holdout.size)
    left, right = (generator.multinomial(n, np.full(n, 1 / n), size=resamples) for n in sizes)
    return left.astype(np.float64), right.astype(np.float64)


def _resampled_auc(attack: Attack, left: Floats, right: Floats) -> Floats:
    """The AUC of each resample, (resamples,): won pairs, weighed by how often both rows stand."""
    ours, theirs = attack.forget[:, None], attack.holdout[None, :]
    won = (ours < theirs) + 0.5 * (ours == theirs)
    found: Floats = ((left @ won) * right).sum(axis=1) / won.size
    return found


def _mean_lowest(values: Floats, k: float) -> float:
    if not 0 < k <= 1:
        raise ValueError(f"k is a share of the tokens above 0 up to 1, not {k}")
    # 0.29 * 100 is 28.999...: what is whole but for rounding is whole.
    count = max(1, math.floor(k * values.size + 1e-9))
    return float(-np.sort(values)[:count].mean())


def _log_probabilities(log_p: npt.ArrayLike) -> Floats:
    values = np.asarray(log_p, dtype=np.float64)
    if not values.size:
        raise ValueError("an answer has at least one token")
    return values


def _finite(values: npt.ArrayLike) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if not found.size or not np.isfinite(found).all():
        raise ValueError("needs at least one score, all of them finite")
    return found


def attack_of(
    name: str, forget: Sequence[Mapping[str, float]], holdout: Sequence[Mapping[str, float]]
) -> Attack | None:
    """The named attack's scores of all rows; None where a row lacks it or there are no rows."""
    sides = []
    for rows in (forget, holdout):
        found = [scores[name] for scores in rows if name in scores]
        if not rows or len(found) != len(rows):
            return None
        sides.append(np.array(found, dtype=np.float64))
    return Attack(*sides)
