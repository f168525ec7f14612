"""What a report is made from: logs by name, robustness and calibration cards, found and checked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import UserError

LOG_FILE = "eval_log.json"
ROBUSTNESS, CALIBRATION, TUNE = "robustness.json", "calibration.json", "tune.json"
RESULT = "result.json"
RETRAIN = "retrain"
KINDS = {ROBUSTNESS: "unlearner-robustness", CALIBRATION: "unlearner-calibration"}
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """The files of a report, each as it was named or found.

    Attributes:
        logs: evaluation logs by the name of their system, in the order of the table.
        robustness, calibration: cards.
        results: what `reproduce` wrote (its settings and its split).
        tune: what a search wrote.
    """

    logs: Mapping[str, Path] = field(default_factory=dict)
    robustness: tuple[Path, ...] = ()
    calibration: tuple[Path, ...] = ()
    results: tuple[Path, ...] = ()
    tune: tuple[Path, ...] = ()


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


def find_inputs(
    texts: Sequence[str], robustness: Sequence[Path] = (), calibration: Sequence[Path] = ()
) -> Inputs:
    """The files that the words of the command name; folders are looked through.

    Args:
        texts: `NAME=LOG`, a log, or a folder that evaluate, reproduce or quickstart wrote.
        robustness, calibration: cards named by flags.

    Raises:
        UserError: no such file, a folder without a log or card, or a name given twice.
    """
    logs: dict[str, Path] = {}
    cards: dict[str, list[Path]] = {ROBUSTNESS: [*robustness], CALIBRATION: [*calibration]}
    others: dict[str, list[Path]] = {RESULT: [], TUNE: []}
    for text in texts:
        name, path = split_name(text)
        if not path.exists():
            raise UserError(f"There is no file or folder {path}.", "Check the path.")
        if not path.is_dir():
            _add(logs, name or log_name(path), path)
            continue
        found = folder_logs(path)
        there = [
            (kind, one)
            for kind in (*cards, *others)
            for one in [path / kind, *sorted(path.glob(f"*/{kind}"))]
            if one.is_file()
        ]
        if not found and not there:
            raise UserError(
                f"{path} holds no {LOG_FILE}, logs/*.json, {RESULT} or card ({', '.join(cards)}).",
                "Name the folder that evaluate, reproduce or quickstart wrote, or NAME=LOG.",
            )
        if name is not None and len(found) > 1:
            raise UserError(
                f"{path} holds {len(found)} logs, so it cannot be called {name!r}.",
                "Leave out the name, or name each log: NAME=LOG.",
            )
        for own, one in found.items():
            _add(logs, name or own, one)
        for kind, one in there:
            kept = cards[kind] if kind in cards else others[kind]
            if one.resolve() not in {other.resolve() for other in kept}:
                kept.append(one)
    return Inputs(
        logs, *(tuple(found) for found in (*cards.values(), others[RESULT], others[TUNE]))
    )


def split_name(text: str) -> tuple[str | None, Path]:
    """`NAME=LOG` as name and path; a path that exists is never split."""
    name, sign, rest = text.partition("=")
    if not sign or Path(text).exists() or "/" in name:
        return None, Path(text)
    if not name.strip() or not rest:
        raise UserError(f"{text!r} is not NAME=LOG.", "Write for example simnpo=eval_log.json.")
    return name.strip(), Path(rest)


def log_name(path: Path) -> str:
    """What a log is called without a name: its folder's where the file's says nothing."""
    plain = path.name in (LOG_FILE, "log.json", "eval_log_aggregated.json", "TOFU_EVAL.json")
    return path.resolve().parent.name if plain else path.stem


def _add(logs: dict[str, Path], name: str, path: Path) -> None:
    if name in logs and logs[name].resolve() != path.resolve():
        raise UserError(
            f"Two logs are called {name!r}: {logs[name]} and {path}.",
            "Name them: NAME=LOG.",
        )
    logs[name] = path


def folder_logs(folder: Path) -> dict[str, Path]:
    """The logs in a folder of evaluate (one, or one a system), reproduce or quickstart."""
    if (folder / RESULT).is_file():
        named = read_json(folder / RESULT).get("logs")
        if not isinstance(named, dict):
            raise UserError(f"{folder / RESULT} names no logs.", "Run `unlearner reproduce` again.")
        return {str(name): _moved(folder, Path(str(path))) for name, path in named.items()}
    if (folder / LOG_FILE).is_file():
        return {folder.resolve().name: folder / LOG_FILE}
    found = {path.stem: path for path in sorted((folder / "logs").glob("*.json"))}
    found |= {path.parent.name: path for path in sorted(folder.glob(f"*/{LOG_FILE}"))}
    first = {"origin": 0, RETRAIN: 1}
    return dict(sorted(found.items(), key=lambda pair: (first.get(pair[0], 2), pair[0])))


def _moved(folder: Path, path: Path) -> Path:
    """Where a log that `reproduce` named lies now: beside its result, also after a move."""
    for own in (folder / path.parent.name / path.name, path):
        if own.is_file():
            return own
    raise UserError(
        f"{folder / RESULT} names the log {path}, which is gone.", "Name the logs: NAME=LOG."
    )


def sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
        states=_rows(raw, "states", path, ("name",)),
        relearning=_curves(relearning, path, ("step",)),
        relearning_about={key: value for key, value in relearning.items() if key != "curves"},
        sampling=_curves(sampling, path, ("n",)),
        sampling_about={key: value for key, value in sampling.items() if key != "curves"},
        paraphrase=_rows(raw, "paraphrase", path, ("form",)),
        drop=_object(raw, "drop", path),
        verdicts=_rows(raw, "verdicts", path, ("name", "text")),
    )


def read_calibration(path: Path) -> Calibration:
    """The curve that `unlearner calibrate` wrote.

    Raises:
        UserError: another kind of file, or a part of another shape than the schema's.
    """
    raw = _card(path, KINDS[CALIBRATION])
    about = ("base", "adapter", "split", "protocol", "rule", "tried", "evaluations")
    chosen = raw.get("chosen_scale")
    return Calibration(
        name=str(raw.get("adapter") or path.resolve().parent.name),
        about={key: raw[key] for key in about if key in raw},
        chosen_scale=None if chosen is None else number(chosen, f"{path}: chosen_scale"),
        curve=_rows(raw, "curve", path, ("scale",)),
        held_out=_object(raw, "held_out", path),
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


def _rows(
    raw: Figures, key: str, path: Path, needed: Sequence[str] = ()
) -> tuple[dict[str, Any], ...]:
    """A list of objects that all have `needed`; a missing list is empty, numbers are finite."""
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
    curves = _rows(raw, "curves", path, ("name", "points"))
    return tuple(Curve(str(one["name"]), _rows(one, "points", path, needed)) for one in curves)
