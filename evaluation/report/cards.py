"""The cards that other commands write: robustness, calibration and search results.

Reading is strict about kinds and required fields, and tolerant of parts that were not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from evaluation.logs.records import read_json

ROBUSTNESS, CALIBRATION, TUNE = "robustness.json", "calibration.json", "tune.json"
SCHEMA = 1
VERDICT_WORDS = {True: "holds", False: "leaks", None: "undecided"}
Figures = Mapping[str, Any]
# A card as it was read: its name, what it records about itself, and its parts.
Card = dict[str, Any]


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where there is none, or it holds NaN."""
    raw = read_json(path, "card", finite=True)
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}, not an object.", "Give another file.")
    return raw


def _read_card(path: Path, command: str) -> dict[str, Any]:
    raw, kind = read_object(path), f"unlearner-{command}"
    if raw.get("kind") != kind:
        raise UserError(
            f"{path} is of kind {raw.get('kind')!r}, not {kind!r}.",
            f"Give a file that `unlearner {command}` wrote.",
        )
    if raw.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema {raw.get('schema')!r}; this version reads schema {SCHEMA}.",
            f"Update unlearner, or run `unlearner {command}` again.",
        )
    return raw


def read_robustness(path: Path) -> Card:
    """The card that `unlearner robustness` wrote; parts that were not run are empty.

    Under `relearning`, `sampling` and `probe` are curves, named points of figures, and under
    `relearning_about` and so on what else is recorded of them.

    Raises:
        UserError: another kind or shape.
    """
    raw = _read_card(path, "robustness")
    about = ("base", "adapters", "split", "protocol", "limit", "settings", "versions")
    adapters = raw.get("adapters")
    names = map(str, adapters if isinstance(adapters, list) else [])
    card: Card = {
        "name": ", ".join(names) or path.resolve().parent.name,
        "about": {key: raw[key] for key in about if key in raw},
        "states": read_rows(raw, "states", path, "name"),
    }
    for key, x in (("relearning", "step"), ("sampling", "n"), ("probe", "layer")):
        part = _object(raw, key, path)
        card[key] = [
            {"name": str(row["name"]), "points": read_rows(row, "points", path, x)}
            for row in read_rows(part, "curves", path, "name", "points")
        ]
        card[f"{key}_about"] = {name: part[name] for name in part if name != "curves"}
    return card | {
        "paraphrase": read_rows(raw, "paraphrase", path, "form"),
        "drop": _object(raw, "drop", path),
        "verdicts": read_rows(raw, "verdicts", path, "name", "text"),
    }


def read_calibration(path: Path) -> Card:
    """The curve that `unlearner calibrate` wrote; UserError for another kind or shape."""
    raw = _read_card(path, "calibration")
    return parse_calibration(raw, path, path.resolve().parent.name)


def parse_calibration(raw: Figures, path: Path, name: str) -> Card:
    """A calibration from its JSON object; `name` is used where it names no adapter."""
    about = (
        "base", "adapter", "stack", "split", "limit", "protocol", "retain_log", "by", "rule",
        "reason", "max_mu_loss", "best_by_gap", "best_by_ks", "tried", "published", "versions",
    )  # fmt: skip
    chosen = raw.get("chosen_scale")
    return {
        "name": str(raw.get("adapter") or name),
        "about": {key: raw[key] for key in about if key in raw},
        "chosen_scale": None if chosen is None else _number(chosen, f"{path}: chosen_scale"),
        "curve": read_rows(raw, "curve", path, "scale"),
        "held_out": _object(raw, "held_out", path),
        "evaluations": read_rows(raw, "evaluations", path, "scale"),
    }


def read_search(path: Path) -> Card:
    """The result of `unlearner tune`: number tried, chosen settings, their figures on every seed.

    Raises:
        UserError: another kind or shape.
    """
    raw = _read_card(path, "tune")
    chosen = _object(raw, "chosen", path)
    about = (
        "objective", "request", "split", "tried", "finished", "pruned", "failed", "loss", "space",
        "fixed", "command",
    )  # fmt: skip
    return {
        "name": path.resolve().parent.name,
        "about": {key: raw[key] for key in about if key in raw},
        "tried": int(_number(raw.get("tried"), f"{path}: tried")),
        "settings": _object(chosen, "settings", path),
        "selected": _object(chosen, "selected", path),
        "held_out": read_rows(chosen, "held_out", path),
    }


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} is {value!r}, not a number.", "Measure it again.")
    return float(value)


def _object(raw: Figures, key: str, path: Path) -> dict[str, Any]:
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        problem = f"{path}: {key} is {type(value).__name__}, not an object."
        raise UserError(problem, "Measure it again.")
    return value or {}


def read_rows(raw: Figures, key: str, path: Path, *needed: str) -> tuple[dict[str, Any], ...]:
    """A list of objects with the keys `needed`, else a UserError; empty where there is none."""
    rows = raw.get(key) or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: {key} is not a list of objects.", "Measure it again.")
    for i, row in enumerate(rows):
        missing = [name for name in needed if row.get(name) is None]
        if missing:
            raise UserError(f"{path}: {key} {i} has no {', '.join(missing)}.", "Measure it again.")
    return tuple(rows)
