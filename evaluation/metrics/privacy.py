"""From token metrics to figures: extraction, membership inference, privleak, KL to the base.

The keys of `summarise_tokens` are a contract: others script against them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapters.errors import UserError
from evaluation.logs.matching import match_rows
from evaluation.logs.records import RowRecord
from evaluation.logs.token_records import TokenRecords
from evaluation.metrics.membership import (
    ATTACKS,
    Attack,
    Measure,
    attack_of,
    measure_auc,
    measure_mean,
    measure_privleak,
)
from evaluation.metrics.statistics import RESAMPLES

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
_Found = tuple[Measure | None, str]


def summarise_tokens(
    records: TokenRecords,
    retain_records: TokenRecords | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of token metrics, flat and ready for JSON.

    Each figure stands under its key of `BETTER`, its 95 % bootstrap interval over rows under
    `KEY_interval`, and where it is None `reasons` says why. Only what `meta["metrics"]` asked for
    is there. With `retain_records` also `retrain_mia_*_auc`, what the retrained model gives.

    Args:
        records: of the model in question.
        retain_records: of a model that never saw the forget set, measured on the same rows.
        resamples, seed: of the bootstrap.

    Raises:
        UserError: the two hold other rows, or were measured with another k or cut.
    """
    groups = [name for name in GROUPS if name in records.meta.get("metrics", GROUPS)]
    found: dict[str, _Found] = {}
    if "extraction" in groups:
        found |= _extraction(records, resamples, seed)
    if "membership" in groups:
        found |= _membership(records, retain_records, resamples, seed)
    if "kl" in groups:
        found |= _kl(records, resamples, seed)
    result: dict[str, Any] = {}
    for key, (measure, _) in found.items():
        result[key] = None if measure is None else measure.value
        spread = measure and measure.interval
        result[f"{key}_interval"] = None if spread is None else list(spread)
    return result | {
        "better": {key: BETTER[key] for key in found if key in BETTER},
        "n": {name: len(kept.rows) for name, kept in records.sets.items()},
        "reasons": {key: reason for key, (measure, reason) in found.items() if measure is None},
        "min_k": records.meta.get("min_k"),
        "limited": records.meta.get("limit") is not None,
        "notes": _notes(records, retain_records),
    }


def _extraction(records: TokenRecords, resamples: int, seed: int) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    for side in ("forget", "retain"):
        rows = records.rows(side)
        for name in EXTRACTION:
            values = [getattr(row, name) for row in rows]
            measure = measure_mean(values, resamples=resamples, seed=seed) if values else None
            found[f"{side}_{name}"] = (measure, f"no {side} rows were measured")
    return found


def _membership(
    records: TokenRecords, retain_records: TokenRecords | None, resamples: int, seed: int
) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    for name in ATTACKS:
        attack = _attack(records, name)
        measure = None
        if attack is not None:
            measure = measure_auc(attack, resamples=resamples, seed=seed)
        found[f"mia_{name}_auc"] = (measure, _why_no_attack(records, name))
    if retain_records is None:
        found["privleak"] = (None, NEEDS_RETRAIN)
        return found
    questions = {name: [row.question for row in records.rows(name)] for name in records.sets}
    theirs = match_retrained(questions, records.meta, retain_records)
    for name in ATTACKS:
        attack = _attack(theirs, name)
        if attack is not None:
            measure = measure_auc(attack, resamples=resamples, seed=seed)
            found[f"retrain_mia_{name}_auc"] = (measure, "")
    ours, yours = _attack(records, PRIVLEAK_ATTACK), _attack(theirs, PRIVLEAK_ATTACK)
    if ours is None or yours is None:
        found["privleak"] = (None, f"not both hold {PRIVLEAK_ATTACK} scores of every row")
        return found
    leak = measure_privleak(ours, yours, resamples=resamples, seed=seed)
    found["privleak"] = (leak, "the retrained model's own AUC is 1: nothing to divide by")
    return found


def _kl(records: TokenRecords, resamples: int, seed: int) -> dict[str, _Found]:
    values = [row.kl for row in records.rows("retain") if row.kl is not None]
    whole = bool(values) and len(values) == len(records.rows("retain"))
    measure = measure_mean(values, resamples=resamples, seed=seed) if whole else None
    reason = "no adapter was active: there is no stack to hold against the base"
    return {"retain_kl": (measure, reason if records.rows("retain") else "no retain rows")}


def _attack(records: TokenRecords, name: str) -> Attack | None:
    forget, holdout = ([row.scores for row in records.rows(s)] for s in ("forget", "holdout"))
    return attack_of(name, forget, holdout)


def _why_no_attack(records: TokenRecords, name: str) -> str:
    if not records.rows("holdout") or not records.rows("forget"):
        return "needs forget and holdout rows"
    if name == "reference":
        return "needs another base to compare with (--reference)"
    return "not every row has a score"


def match_retrained(
    questions: Mapping[str, Sequence[str]], settings: Mapping[str, Any], theirs: TokenRecords
) -> TokenRecords:
    """A retrained model's records in the order of the model's that is held against it.

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


def _notes(records: TokenRecords, theirs: TokenRecords | None) -> list[str]:
    notes = []
    for key in ("quantization", "dtype"):
        mine, yours = records.meta.get(key), theirs.meta.get(key) if theirs else None
        if mine and yours and mine != yours:
            notes.append(f"{key} differs from the retrained model's metrics: {mine} and {yours}")
    return notes


def with_token_figures(figures: Mapping[str, Any], tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation and those of its token metrics under one roof.

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
