"""Model utility: the harmonic mean of nine parts, each a mean over the rows of a set.

Source: TOFU (arXiv 2401.06121, `locuslab/tofu` aggregate_eval_stat.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import numpy.typing as npt

from evaluation.metrics.bootstrap import RESAMPLES, SEED, Floats, Interval, interval

# The nine parts of model utility by the names of the official code.
UTILITY_SETS = {"Real Authors": "real_authors", "Real World": "world_facts", "Retain": "retain"}
UTILITY_METRICS = {
    "ROUGE": "rouge_l_recall",
    "Probability": "answer_prob",
    "Truth Ratio": "truth_ratio",
}


@dataclass(frozen=True)
class ModelUtility:
    """Harmonic mean of nine parts between 0 and 1; higher is better, also of each part.

    Attributes:
        value: None where a part could not be measured; `reason` names it.
        parts: by the official names ("Real Authors ROUGE", ..., "Retain Truth Ratio").
        interval, part_intervals: 95 % over resampled rows; None and empty without a value.
        reason: why there is no value, else None.
    """

    value: float | None
    parts: Mapping[str, float]
    interval: Interval | None = None
    part_intervals: Mapping[str, Interval] = field(default_factory=dict)
    reason: str | None = None


def answer_prob(mean_nll: npt.ArrayLike) -> Floats:
    """`P = exp(-nbar)` of every row, the length-normalised probability of the answer."""
    return np.exp(-np.asarray(mean_nll, dtype=np.float64))


def option_prob(answer: npt.ArrayLike, perturbed: Sequence[npt.ArrayLike]) -> Floats:
    """`P(answer) / (P(answer) + sum_k P(perturbed_k))` of every row, by log-sum-exp.

    The released code divides the probabilities themselves and gives NaN once all underflow.
    """
    from scipy.special import logsumexp

    right = np.asarray(answer, dtype=np.float64)
    wrong = [np.asarray(losses, dtype=np.float64) for losses in perturbed]
    logs = [
        -loss - logsumexp(np.append(-losses, -loss))
        for loss, losses in zip(right, wrong, strict=True)
    ]
    return np.exp(np.array(logs, dtype=np.float64))


def model_utility(
    rows: Mapping[str, Mapping[str, Floats]], *, resamples: int = RESAMPLES
) -> ModelUtility:
    """Model utility of per-row values, with a bootstrap interval over the rows of each set.

    Args:
        rows: by set (`retain`, `real_authors`, `world_facts`) and metric (`rouge_l_recall`,
            `answer_prob`, `truth_ratio`) the values of its rows, (rows,).
        resamples: of the bootstrap; 0 leaves the interval out.
    """
    parts: dict[str, float] = {}
    missing: list[str] = []
    for (title, name), (label, metric) in product(UTILITY_SETS.items(), UTILITY_METRICS.items()):
        values = rows.get(name, {}).get(metric)
        if values is None or not values.size:
            missing.append(f"{title} {label}")
        else:
            parts[f"{title} {label}"] = float(values.mean())
    if missing:
        return ModelUtility(None, parts, reason=f"not measured: {', '.join(missing)}")
    from scipy.stats import hmean

    value = float(hmean(list(parts.values())))
    if not resamples:
        return ModelUtility(value, parts)
    generator = np.random.default_rng(SEED)
    means: list[Floats] = []
    for name in UTILITY_SETS.values():
        columns = [rows[name][metric] for metric in UTILITY_METRICS.values()]
        chosen = generator.integers(columns[0].size, size=(resamples, columns[0].size))
        means.extend(column[chosen].mean(axis=1) for column in columns)
    samples = np.stack(means)  # (9, resamples), in the order of the official names
    utility = hmean(samples, axis=0)
    spread = {title: interval(row) for title, row in zip(parts, samples, strict=True)}
    return ModelUtility(value, parts, interval(utility), spread)
