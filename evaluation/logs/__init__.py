"""Evaluation logs: per-row results, read from any known format and written in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.errors import UserError
from evaluation.logs.open_unlearning import is_open_unlearning, read_open_unlearning
from evaluation.logs.records import KIND, EvalLog, own_log, read_json
from evaluation.logs.tofu import is_tofu, read_tofu


def read_log(path: str | Path) -> EvalLog:
    """The evaluation in `path`: our own format, TOFU's (both layouts) or open-unlearning's.

    Raises:
        UserError: no such file, broken JSON, an unknown format, a missing or non-finite number;
            the row is named.
    """
    path = Path(path)
    raw = read_json(path, "evaluation log")
    where = path.name
    if isinstance(raw, dict) and raw.get("kind") == KIND:
        return own_log(raw, where)
    if is_tofu(raw, where):
        return read_tofu(raw, where)
    if is_open_unlearning(raw):
        return read_open_unlearning(raw, where)
    raise UserError(
        f"{where} is not an evaluation log of a known format ({_outline(raw)}).",
        "Give a log of this tool, TOFU's eval_log_aggregated.json or open-unlearning's "
        "TOFU_EVAL.json (its TOFU_SUMMARY.json has no rows).",
    )


def _outline(raw: Any) -> str:
    if not isinstance(raw, dict):
        return f"its top level is {type(raw).__name__}, not an object"
    return "its keys are " + (", ".join(map(str, list(raw)[:6])) or "none")
