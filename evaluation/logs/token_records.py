"""Token metrics per row as JSON, from which figures can be computed without a model.

A row holds its question, as evaluation logs do, and numbers: no answer, no token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from evaluation.logs.records import number, read_json, read_sets, score_of, share, write_sets

KIND = "unlearner-token-metrics"
SHARES = ("extraction_strength", "exact_memorization")


@dataclass(frozen=True)
class TokenRow:
    """One answer's summary.

    Attributes:
        question: its text.
        n: tokens of the answer (|y|), EOS included.
        mean_nll: nats per token.
        extraction_strength, exact_memorization: see `evaluation.metrics.privacy`.
        scores: of each membership attack by name; empty where none was measured.
        kl: `KL(base || stack)`, nats per token; None where it was not measured.
    """

    question: str
    n: int
    mean_nll: float
    extraction_strength: float
    exact_memorization: float
    scores: Mapping[str, float] = field(default_factory=dict)
    kl: float | None = None


@dataclass(frozen=True)
class TokenSet:
    """The rows of `forget`, `retain` or `holdout`; `total` is how many the source has."""

    rows: tuple[TokenRow, ...]
    total: int


@dataclass(frozen=True)
class TokenRecords:
    """The measured sets by name, and in `meta` what they depend on.

    `meta` has metrics (which were measured), min_k, max_length, limit, template, dtype, versions.
    """

    sets: Mapping[str, TokenSet]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, name: str) -> tuple[TokenRow, ...]:
        """The rows of a set, none where it was not measured."""
        return self.sets[name].rows if name in self.sets else ()


def write_records(records: TokenRecords, path: Path) -> Path:
    """`path`, holding `records` (schema 1); `read_records` gives back equal ones."""
    return write_sets(path, KIND, records.sets, records.meta)


def read_records(path: Path) -> TokenRecords:
    """The token metrics in `path`.

    Raises:
        UserError: no such file, broken JSON, another kind of file, or a number that is none.
    """
    raw = read_json(path, "token metrics file")
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        raise UserError(
            f"{path.name} holds no token metrics.",
            "Give the token_metrics.json that `unlearner evaluate --metrics ... --out` writes.",
        )
    sets, meta = read_sets(raw, path.name, token_row_from_json)
    return TokenRecords({name: TokenSet(*each) for name, each in sets.items()}, meta)


def token_row_from_json(raw: Mapping[str, Any], where: str) -> TokenRow:
    """The row that `dataclasses.asdict` gave; `where` names it in errors.

    Raises:
        UserError: a value is not a finite number, or out of its bounds.
        KeyError, TypeError: the row has another shape.
    """
    if not isinstance(raw["question"], str):
        raise TypeError("a question is a text")
    loss, n = score_of(raw["mean_nll"], raw["n"], where, "mean_nll")
    return TokenRow(
        question=raw["question"],
        n=n or 0,
        mean_nll=loss,
        scores={name: number(value, where, name) for name, value in raw["scores"].items()},
        kl=None if raw["kl"] is None else score_of(raw["kl"], None, where, "kl").mean_nll,
        **{name: share(raw[name], where, name) for name in SHARES},
    )
