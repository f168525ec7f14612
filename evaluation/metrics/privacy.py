"""Extraction and privacy: memorised answers, membership inference, privleak, KL to the base.

Every membership score is signed like a loss: the lower, the more the row looks trained on. An
attack's AUC compares forget rows with holdout rows: 1 where every forget row looks more trained on
than every holdout row, 1/2 where nothing tells them apart, 0 where forget rows are less likely than
rows never seen. As open-unlearning defines them (arXiv 2506.12618), over all labels:
its code drops the last one. No model and no files here.

The keys of `summarise_tokens` are a contract: others script against them.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from adapters.errors import UserError
from evaluation.logs.matching import match_rows, other_precision
from evaluation.logs.records import RowRecord
from evaluation.logs.token_records import TokenRecords
from evaluation.metrics.bootstrap import (
    RESAMPLES,
    SEED,
    Floats,
    Measure,
    finite,
    interval,
    measure_mean,
)

if TYPE_CHECKING:
    from evaluation.inference.token_stats import AnswerTokens

MIN_K = 0.4
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference")
# A variance below this comes from one token that has it all; open-unlearning's floor.
_LEAST_VARIANCE = 1e-6
EXTRACTION = ("extraction_strength", "exact_memorization")
# privleak compares the AUC of this attack, as MUSE and open-unlearning do.
PRIVLEAK_ATTACK = "min_k"
NEEDS_RETRAIN = "needs the token metrics of a retrained model (--retain-metrics)"
# What is wanted of each figure. An AUC is best where the retrained model's is, near one half.
BETTER = {
    **{f"forget_{name}": "lower" for name in EXTRACTION},
    **{f"retain_{name}": "higher" for name in EXTRACTION},
    **{f"mia_{name}_auc": "one half" for name in ATTACKS},
    "privleak": "zero",
    "retain_kl": "lower",
}
# The keys of BETTER by what --metrics asks for.
GROUPS = {
    "extraction": tuple(f"{side}_{name}" for side in ("forget", "retain") for name in EXTRACTION),
    "membership": (*(f"mia_{name}_auc" for name in ATTACKS), "privleak"),
    "kl": ("retain_kl",),
}
_Reasoned = tuple[Measure | None, str]


def exact_memorization(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Share of answer tokens that are the model's first choice given the true tokens before them.

    open-unlearning's EM (arXiv 2506.12618), over all labels: its code drops the last one.
    """
    return sum(p == y for p, y in zip(predicted, labels, strict=True)) / len(labels)


def extraction_strength(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """`1 - k/|y|`, k the shortest given part of the answer after which the rest is all predicted.

    open-unlearning's ES (arXiv 2506.12618), over all labels and down to 0 where not even the last
    token is predicted: its code drops the last label and never goes below 1/n.
    """
    given = len(labels)
    while given > 0 and predicted[given - 1] == labels[given - 1]:
        given -= 1
    return (len(labels) - given) / len(labels)


def loss_score(log_p: npt.ArrayLike) -> float:
    """LOSS (arXiv 1709.01604): the mean negative log-likelihood, nats per token."""
    values = np.asarray(log_p, dtype=np.float64)
    if not values.size:
        raise ValueError("an answer has at least one token")
    return float(-values.mean())


def zlib_score(log_p: npt.ArrayLike, answer: str) -> float:
    """Zlib (arXiv 2012.07805): nats per token divided by the bytes of the compressed answer.

    Divides the mean loss, not the sum, as open-unlearning does.
    """
    return loss_score(log_p) / len(zlib.compress(answer.encode("utf-8")))


def min_k_score(log_p: npt.ArrayLike, k: float = MIN_K) -> float:
    """Min-K (arXiv 2310.16789): minus the mean log p of the least likely share `k` of the tokens.

    Args:
        log_p: (n,) of the labels, nats.
        k: share above 0 up to 1; `max(1, floor(k n))` tokens.
    """
    if not 0 < k <= 1:
        raise ValueError(f"k is a share of the tokens above 0 up to 1, not {k}")
    values = np.sort(np.asarray(log_p, dtype=np.float64))
    # 0.29 * 100 is 28.999...: what is whole but for rounding is whole.
    return loss_score(values[: max(1, math.floor(k * values.size + 1e-9))])


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
    return min_k_score((np.asarray(log_p, dtype=np.float64) - np.asarray(mean)) / sigma, k)


def attack_scores(
    tokens: AnswerTokens, answer: str, *, k: float = MIN_K, reference: float | None = None
) -> dict[str, float]:
    """Every attack's score of one answer; `reference` is its loss under the other model.

    The Reference attack (arXiv 2004.15011) is the loss minus that of the other model.
    """
    scores = {
        "loss": loss_score(tokens.log_p),
        "zlib": zlib_score(tokens.log_p, answer),
        "min_k": min_k_score(tokens.log_p, k),
        "min_k_plus_plus": min_k_plus_plus_score(tokens.log_p, tokens.mean, tokens.variance, k),
    }
    if reference is not None:
        scores["reference"] = tokens.mean_nll - reference
    return scores


def auc(forget: npt.ArrayLike, holdout: npt.ArrayLike) -> float:
    """`P(forget < holdout) + P(forget = holdout) / 2` over all pairs: Mann-Whitney's U by n m.

    Args:
        forget: (n,) loss-like scores of the forget rows, the positive side.
        holdout: (m,) of rows that were never trained on.
    """
    from scipy.stats import mannwhitneyu

    left, right = finite(forget), finite(holdout)
    won = mannwhitneyu(right, left, method="asymptotic").statistic
    return float(won) / (left.size * right.size)


def privleak(auc_unlearned: float, auc_retrained: float) -> float | None:
    """Per cent: `100 ((1 - AUC) - (1 - AUC_retrain)) / (1 - AUC_retrain)`; best is 0.

    Below 0 forget rows still look trained on, compared with a model that never saw them; above 0
    they are conspicuously unlikely: over-forgotten. Source: MUSE (arXiv 2407.06460), signed as
    open-unlearning. None where the retrained model's AUC is 1, and there is nothing to divide by.
    """
    left = 1 - auc_retrained
    return None if left == 0 else 100 * (auc_retrained - auc_unlearned) / left


class Attack(NamedTuple):
    """The scores of one attack: loss-like, of (n,) forget and (m,) holdout rows."""

    forget: Floats
    holdout: Floats


def measure_auc(attack: Attack, *, resamples: int = RESAMPLES) -> Measure:
    """The AUC of an attack; forget and holdout rows are resampled apart."""
    value = auc(attack.forget, attack.holdout)
    if not resamples:
        return Measure(value)
    counts = _draws(attack, resamples)
    return Measure(value, interval(_resampled_auc(attack, *counts)))


def measure_privleak(attack: Attack, retrained: Attack) -> Measure | None:
    """`privleak` of an attack on two models; both meet the same rows, which are resampled together.

    Args:
        attack: of the unlearned model.
        retrained: of the retrained one, row by row the same rows.
    """
    value = privleak(auc(*attack), auc(*retrained))
    if value is None:
        return None
    counts = _draws(attack, RESAMPLES)
    ours, theirs = _resampled_auc(attack, *counts), _resampled_auc(retrained, *counts)
    usable = theirs < 1
    return Measure(value, interval(100 * (theirs - ours)[usable] / (1 - theirs[usable])))


def _draws(attack: Attack, resamples: int) -> tuple[Floats, Floats]:
    """How often each forget and each holdout row occurs in each resample."""
    generator = np.random.default_rng(SEED)
    sizes = (attack.forget.size, attack.holdout.size)
    left, right = (generator.multinomial(n, np.full(n, 1 / n), size=resamples) for n in sizes)
    return left.astype(np.float64), right.astype(np.float64)


def _resampled_auc(attack: Attack, left: Floats, right: Floats) -> Floats:
    """The AUC of each resample, (resamples,): won pairs, weighted by how often both rows occur."""
    ours, theirs = attack.forget[:, None], attack.holdout[None, :]
    won = (ours < theirs) + 0.5 * (ours == theirs)
    shares: Floats = ((left @ won) * right).sum(axis=1) / won.size
    return shares


def summarise_tokens(
    records: TokenRecords, retain_records: TokenRecords | None = None
) -> dict[str, Any]:
    """All figures of token metrics, flat and ready for JSON.

    Each figure has its key in `BETTER` and its 95 % bootstrap interval over rows under
    `KEY_interval`; where it is None, `reasons` says why. Only the metrics in `meta["metrics"]` are
    there. With `retain_records` also `retrain_mia_*_auc`, what the retrained model gives.

    Args:
        records: of the model in question.
        retain_records: of a model that never saw the forget set, measured on the same rows.

    Raises:
        UserError: the two hold other rows, or were measured with another k or cut.
    """
    groups = records.meta.get("metrics", GROUPS)
    measures: dict[str, _Reasoned] = {}

    def mean(key: str, values: Sequence[float], reason: str) -> None:
        measures[key] = measure_mean(values) if values else None, reason

    if "extraction" in groups:
        for side, name in itertools.product(("forget", "retain"), EXTRACTION):
            values = [getattr(row, name) for row in records.rows(side)]
            mean(f"{side}_{name}", values, f"no {side} rows were measured")
    if "membership" in groups:
        measures |= _membership(records, retain_records)
    if "kl" in groups:
        values = [row.kl for row in records.rows("retain") if row.kl is not None]
        no_stack = "no adapter was active: there is no stack to compare with the base"
        mean("retain_kl", values, no_stack if records.rows("retain") else "no retain rows")
    result: dict[str, Any] = {}
    for key, (measure, _) in measures.items():
        result[key] = measure and measure.value
        result[f"{key}_interval"] = measure and measure.interval and list(measure.interval)
    return result | {
        "better": {key: BETTER[key] for key in measures if key in BETTER},
        "n": {name: len(token_set.rows) for name, token_set in records.sets.items()},
        "reasons": {key: reason for key, (measure, reason) in measures.items() if measure is None},
        "min_k": records.meta.get("min_k"),
        "limited": records.meta.get("limit") is not None,
        "notes": [
            f"{key} differs from the retrained model's metrics: {ours} and {theirs}"
            for key, ours, theirs in other_precision(records.meta, retain_records)
        ],
    }


def _membership(records: TokenRecords, retain_records: TokenRecords | None) -> dict[str, _Reasoned]:
    measures: dict[str, _Reasoned] = {}
    attacks = {name: _attack(records, name) for name in ATTACKS}
    for name, attack in attacks.items():
        reason = "not every row has a score"
        if not records.rows("holdout") or not records.rows("forget"):
            reason = "needs forget and holdout rows"
        elif name == "reference":
            reason = "needs another base to compare with (--reference)"
        measures[f"mia_{name}_auc"] = (attack and measure_auc(attack), reason)
    if retain_records is None:
        return measures | {"privleak": (None, NEEDS_RETRAIN)}
    questions = {name: [row.question for row in records.rows(name)] for name in records.sets}
    theirs = match_retrained(questions, records.meta, retain_records)
    for name in ATTACKS:
        attack = _attack(theirs, name)
        if attack is not None:
            measures[f"retrain_mia_{name}_auc"] = (measure_auc(attack), "")
    ours, retrained = attacks[PRIVLEAK_ATTACK], _attack(theirs, PRIVLEAK_ATTACK)
    if ours is None or retrained is None:
        reason = f"not both hold {PRIVLEAK_ATTACK} scores of every row"
        return measures | {"privleak": (None, reason)}
    leak = measure_privleak(ours, retrained)
    reason = "the retrained model's own AUC is 1: nothing to divide by"
    return measures | {"privleak": (leak, reason)}


def _attack(records: TokenRecords, name: str) -> Attack | None:
    """The named attack's scores of all rows; None where a row lacks it or there are no rows."""
    sides = []
    for side in ("forget", "holdout"):
        rows = records.rows(side)
        if not rows or any(name not in row.scores for row in rows):
            return None
        sides.append(np.array([row.scores[name] for row in rows], dtype=np.float64))
    return Attack(*sides)


def match_retrained(
    questions: Mapping[str, Sequence[str]], settings: Mapping[str, Any], theirs: TokenRecords
) -> TokenRecords:
    """A retrained model's records in the order of the records they are compared with.

    Args:
        questions: of the measured rows by set; those of forget and holdout are matched.
        settings: min_k, max_length and limit of that measurement (the `meta` of its records).
        theirs: of the retrained model.

    Raises:
        UserError: other rows, another k of Min-K, or texts cut at another length.
    """
    for key, what in (("min_k", "the share k of Min-K"), ("max_length", "the length of a cut")):
        if settings.get(key) != theirs.meta.get(key):
            raise UserError(
                f"The two token metrics differ in {what}: {settings.get(key)} against "
                f"{theirs.meta.get(key)}.",
                "Measure both models with the same settings.",
            )
    if not theirs.rows("holdout") or not theirs.rows("forget"):
        raise UserError(
            "The retrained model's token metrics hold no membership scores.",
            "Measure that model with --metrics membership and the same --holdout.",
        )
    sets = dict(theirs.sets)
    for name in ("forget", "holdout"):
        ours = [RowRecord(question) for question in questions.get(name, ())]
        yours = [RowRecord(row.question) for row in sets[name].rows]
        match = match_rows(ours, yours, subset=settings.get("limit") is not None)
        place = {id(record): row for record, row in zip(yours, sets[name].rows, strict=True)}
        order = tuple(place[id(record)] for record in match.theirs)
        sets[name] = replace(sets[name], rows=order)
    return TokenRecords(sets, theirs.meta)


def with_token_figures(figures: Mapping[str, Any], tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation together with those of its token metrics.

    What both have (`better`, `reasons`, `notes`) is joined; the counts of rows of the token metrics
    are `token_rows`.
    """
    joined: dict[str, Any] = {
        "better": {**figures["better"], **tokens["better"]},
        "reasons": {**figures["reasons"], **tokens["reasons"]},
        "notes": [*figures["notes"], *tokens["notes"]],
    }
    own = {key: value for key, value in tokens.items() if key not in ("n", "limited")}
    return {**figures, **own, **joined, "token_rows": tokens["n"]}
