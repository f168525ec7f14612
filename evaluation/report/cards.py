"""The cards that a report shows, checked: strict about kinds, tolerant of missing parts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import UserError

ROBUSTNESS, CALIBRATION, TUNE = "robustness.json", "calibration.json", "tune.json"
KINDS = {
    ROBUSTNESS: "unlearner-robustness",
    CALIBRATION: "unlearner-calibration",
    TUNE: "unlearner-tune",
}
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """Named points of a card, each a mapping of figures."""

    name: str
    points: tuple[Figures, ...]


@dataclass(frozen=True)
class Robustness:
    """A robustness card; parts that were not run are empty."""

    name: str
    about: Figures
    states: tuple[Figures, ...] = ()
    relearning: tuple[Curve, ...] = ()
    relearning_about: Figures = field(default_factory=dict)
    sampling: tuple[Curve, ...] = ()
    sampling_about: Figures = field(default_factory=dict)
    paraphrase: tuple[Figures, ...] = ()
    drop: Figures = field(default_factory=dict)
    verdicts: tuple[Figures, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """A curve over an adapter's strength, and the chosen one."""

    name: str
    about: Figures
    chosen_scale: float | None
    curve: tuple[Figures, ...]
    held_out: Figures = field(default_factory=dict)
    evaluations: tuple[Figures, ...] = ()


@dataclass(frozen=True)
class Search:
    """A search over settings: how many were tried, what was chosen, its figures on every seed."""

    name: str
    about: Figures
    tried: int
    settings: Figures = field(default_factory=dict)
    selected: Figures = field(default_factory=dict)
    held_out: tuple[Figures, ...] = ()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.", "Check the path.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg}.", "Give a whole file.") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}, not an object.", "Give another file.")
    return raw


def _card(path: Path, kind: str) -> dict[str, Any]:
    raw = read_json(path)
    if raw.get("kind") != kind:
        raise UserError(f"{path} is of kind {raw.get('kind')!r}, not {kind!r}.", "Give its card.")
    if raw.get("schema") != 1:
        raise UserError(
            f"{path} has schema {raw.get('schema')!r}; this version reads schema 1.",
            "Update the tool, or measure again.",
        )
    return raw


def read_robustness(path: Path) -> Robustness:
    """The card that `unlearner robustness` wrote.

    Raises:
        UserError: another kind of file, or a part of another shape than the schema's.
    """
    raw = _card(path, KINDS[ROBUSTNESS])
    relearning, sampling = (_object(raw, key, path) for key in ("relearning", "sampling"))
    about = ("base", "adapters", "split", "protocol", "limit", "settings", "versions")
    return Robustness(
        name=_adapter_names(raw.get("adapters")) or path.resolve().parent.name,
        about={key: raw[key] for key in about if key in raw},
        states=read_rows(raw, "states", path, ("name",)),
        relearning=_curves(relearning, path, ("step",)),
        relearning_about={key: value for key, value in relearning.items() if key != "curves"},
        sampling=_curves(sampling, path, ("n",)),
        sampling_about={key: value for key, value in sampling.items() if key != "curves"},
        paraphrase=read_rows(raw, "paraphrase", path, ("form",)),
        drop=_object(raw, "drop", path),
        verdicts=read_rows(raw, "verdicts", path, ("name", "text")),
    )


def read_calibration(path: Path) -> Calibration:
    """The curve that `unlearner calibrate` wrote.

    Raises:
        UserError: another kind of file, or a part of another shape than the schema's.
    """
    raw = _card(path, KINDS[CALIBRATION])
    about = (
        "base", "adapter", "stack", "split", "limit", "protocol", "retain_log", "by", "rule",
        "reason", "max_mu_loss", "best_by_gap", "best_by_ks", "tried", "published", "versions",
    )  # fmt: skip
    chosen = raw.get("chosen_scale")
    return Calibration(
        name=str(raw.get("adapter") or path.resolve().parent.name),
        about={key: raw[key] for key in about if key in raw},
        chosen_scale=None if chosen is None else number(chosen, f"{path}: chosen_scale"),
        curve=read_rows(raw, "curve", path, ("scale",)),
        held_out=_object(raw, "held_out", path),
        evaluations=read_rows(raw, "evaluations", path, ("scale",)),
    )


def read_search(path: Path) -> Search:
    """What `unlearner tune` wrote.

    Raises:
        UserError: another kind of file, or a part of another shape than the schema's.
    """
    raw = _card(path, KINDS[TUNE])
    chosen = _object(raw, "chosen", path)
    about = (
        "objective", "request", "split", "tried", "finished", "pruned", "failed", "loss", "space",
        "fixed", "command",
    )  # fmt: skip
    return Search(
        name=path.resolve().parent.name,
        about={key: raw[key] for key in about if key in raw},
        tried=int(number(raw.get("tried"), f"{path}: tried")),
        settings=_object(chosen, "settings", path),
        selected=_object(chosen, "selected", path),
        held_out=read_rows(chosen, "held_out", path),
    )


def _adapter_names(raw: Any) -> str:
    """The adapters of a card, which are names, or pairs of name and scale."""
    if not isinstance(raw, list):
        return ""
    return ", ".join(str(one[0]) if isinstance(one, list) and one else str(one) for one in raw)


def number(value: Any, where: str) -> float:
    """`value` as a finite number.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}, not a finite number.", "Measure it again.")
    return float(value)


def _object(raw: Figures, key: str, path: Path) -> dict[str, Any]:
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(
            f"{path}: {key} is {type(value).__name__}, not an object.", "Write it anew."
        )
    return value or {}


def read_rows(
    raw: Figures, key: str, path: Path, needed: Sequence[str] = ()
) -> tuple[dict[str, Any], ...]:
    """A list of objects that all have `needed`; a missing list is empty, numbers are finite.

    Raises:
        UserError: something else stands there.
    """
    rows = raw.get(key) or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: {key} is not a list of objects.", "Write it anew.")
    for i, row in enumerate(rows):
        missing = [name for name in needed if row.get(name) is None]
        if missing:
            raise UserError(f"{path}: {key} {i} has no {', '.join(missing)}.", "Write it anew.")
        for name, value in row.items():
            if isinstance(value, float):
                number(value, f"{path}: {key} {i} {name}")
    return tuple(rows)


def _curves(raw: Figures, path: Path, needed: Sequence[str]) -> tuple[Curve, ...]:
    curves = read_rows(raw, "curves", path, ("name", "points"))
    return tuple(Curve(str(one["name"]), read_rows(one, "points", path, needed)) for one in curves)
