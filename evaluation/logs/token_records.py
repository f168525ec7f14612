"""Token metrics per row as JSON, from which figures can be computed without a model.

A row holds its question, as evaluation logs do, and numbers: no answer, no token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from evaluation.logs.records import count_of, loss_of, read_json, write_json

KIND = "unlearner-token-metrics"
SCHEMA = 1


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
    sets = {
        name: {"total": each.total, "rows": [token_row_json(row) for row in each.rows]}
        for name, each in records.sets.items()
    }
    body = {"kind": KIND, "schema": SCHEMA, "meta": dict(records.meta), "sets": sets}
    return write_json(path, body)


def token_row_json(row: TokenRow) -> dict[str, Any]:
    """The row as JSON values."""
    return {
        "question": row.question,
        "n": row.n,
        "mean_nll": row.mean_nll,
        "extraction_strength": row.extraction_strength,
        "exact_memorization": row.exact_memorization,
        "scores": dict(row.scores),
        "kl": row.kl,
    }


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
    if raw.get("schema") != SCHEMA:
        raise UserError(
            f"{path.name} has schema {raw.get('schema')!r}; this version reads schema {SCHEMA}.",
            "Update the tool, or evaluate again.",
        )
    try:
        sets = {
            name: TokenSet(
                tuple(
                    token_row_from_json(row, f"{path.name}: {name} row {i}")
                    for i, row in enumerate(body["rows"])
                ),
                int(body["total"]),
            )
            for name, body in raw["sets"].items()
        }
        return TokenRecords(sets, dict(raw["meta"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path.name} is damaged ({type(error).__name__}: {error}).", "Evaluate again."
        ) from error


def token_row_from_json(raw: Mapping[str, Any], where: str) -> TokenRow:
    """The inverse of `token_row_json`; `where` names the row in errors.

    Raises:
        UserError: a value is not a finite number, or out of its bounds.
        KeyError, TypeError: the row has another shape.
    """
    shares = {}
    for name in ("extraction_strength", "exact_memorization"):
        shares[name] = _number(raw[name], where, name)
        if not 0 <= shares[name] <= 1:
            raise UserError(f"{where}: {name} is not between 0 and 1.", "Evaluate again.")
    if not isinstance(raw["question"], str):
        raise TypeError("a question is a text")
    return TokenRow(
        question=raw["question"],
        n=count_of(raw["n"], where, "n"),
        mean_nll=loss_of(raw["mean_nll"], where, "mean_nll"),
        scores={name: _number(value, where, name) for name, value in raw["scores"].items()},
        kl=None if raw["kl"] is None else loss_of(raw["kl"], where, "kl"),
        **shares,
    )


def _number(value: Any, where: str, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {what} is {value!r}, not a number.", "Evaluate again.")
    return float(value)
