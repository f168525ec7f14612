"""What probes of a stack found: relearning, drawing many answers, and strength. No gradio.

`robustness.json` and `calibration.json` are read as they were written; nothing is computed here.
They are named on the command line, lie beside the logs, or are filed with an adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from ui.cli.output.robustness_card import WORDS

if TYPE_CHECKING:
    from adapters.store.store import AdapterStore

KINDS = {"robustness": "unlearner-robustness", "calibration": "unlearner-calibration"}
SCHEMA = 1
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Strength:
    """One adapter at several strengths, and the strength that was chosen."""

    name: str
    chosen: float | None
    curves: dict[str, Points]


@dataclass(frozen=True)
class Probes:
    """Curves by name: relearning and sampling, strengths, and the verdicts in words.

    `relearning` is the answer probability of rows that are not taught again, `taught` of those
    that are.
    """

    relearning: dict[str, Points] = field(default_factory=dict)
    taught: dict[str, Points] = field(default_factory=dict)
    sampling: dict[str, Points] = field(default_factory=dict)
    strengths: list[Strength] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_probe(name: str) -> bool:
    """Whether an evaluation filed under this name is a probe, not a table of figures."""
    return name.split("-", 1)[0] in KINDS


def probe_text(name: str, value: Mapping[str, Any]) -> str:
    """What a filed probe found, in a few words."""
    if name.startswith("calibration"):
        chosen = value.get("chosen_scale")
        return f"{name}: strength {chosen:g}" if chosen is not None else f"{name}: none chosen"
    return f"{name}: {value.get('leaks', 0)} of {len(value.get('verdicts', ()))} probes leak"


def gather_probes(
    store: AdapterStore | None,
    logs: Sequence[Path] = (),
    robustness: Sequence[Path] = (),
    calibration: Sequence[Path] = (),
) -> Probes:
    """All probes that can be found, those named first.

    Raises:
        UserError: a file that is no probe, or of another kind or schema.
    """
    found = Probes()
    given = {"robustness": robustness, "calibration": calibration}
    seen: set[Path] = set()
    for what, named in given.items():
        beside = [path.parent / f"{what}.json" for path in logs]
        for path in [*named, *(path for path in beside if path.is_file())]:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                _add(found, what, read_probe(path, what), path.parent.name or path.stem)
    for adapter, name, value in _filed(store):
        _add_filed(found, name, value, adapter)
    return found


def _add_filed(found: Probes, name: str, value: Mapping[str, Any], owner: str) -> None:
    """A probe as a store keeps it: columns in place of rows, verdicts without their sentences."""
    curve, verdicts = value.get("curve"), value.get("verdicts")
    if name.startswith("calibration") and isinstance(curve, Mapping):
        columns = zip(*curve.values(), strict=True)
        rows = [dict(zip(curve, row, strict=True)) for row in columns]
        found.strengths.append(_strength({**value, "curve": rows}, owner))
    elif name.startswith("robustness") and isinstance(verdicts, Mapping):
        found.verdicts.extend(
            {"of": owner, "name": probe, "said": word, "text": f"filed as {name}"}
            for probe, word in verdicts.items()
        )
    else:
        found.notes.append(f"The evaluation {name} of {owner} cannot be read here.")


def _filed(store: AdapterStore | None) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for adapter in store.list() if store is not None else []:
        if adapter.problem or store is None:
            continue
        for name, value in store.evals(adapter.slug).items():
            if is_probe(name):
                yield adapter.label, name, value


def read_probe(path: Path, what: str) -> dict[str, Any]:
    """The probe in a file; `what` is robustness or calibration.

    Raises:
        UserError: no such file, no JSON, or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    except ValueError:
        value = None
    _check(value, what, str(path))
    found: dict[str, Any] = value
    return found


def _check(value: Any, what: str, where: str) -> None:
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if kind != KINDS[what]:
        raise UserError(f"{where} is no {what} result.", f"`unlearner {what}` writes one.")
    if value.get("schema") != SCHEMA:
        raise UserError(
            f"{where} has schema {value.get('schema')!r}, this version reads {SCHEMA}.",
            f"Make it again with `unlearner {what}`.",
        )


def _add(found: Probes, what: str, value: Mapping[str, Any], owner: str) -> None:
    if what == "calibration":
        found.strengths.append(_strength(value, owner))
        return
    for curve in (value.get("relearning") or {}).get("curves", ()):
        name = _free(found.relearning, str(curve["name"]), owner)
        found.relearning[name] = _points(curve["points"], "step", "unseen_answer_prob")
        found.taught[name] = _points(curve["points"], "step", "seen_answer_prob")
    for curve in (value.get("sampling") or {}).get("curves", ()):
        name = _free(found.sampling, str(curve["name"]), owner)
        found.sampling[name] = _points(curve["points"], "n", "share_leaked")
    found.verdicts.extend(
        {"of": owner, "said": WORDS[one.get("holds")], **one} for one in value.get("verdicts", ())
    )


def _strength(value: Mapping[str, Any], owner: str) -> Strength:
    keys = {
        "KS distance": "ks",
        "retain probability": "retain_answer_prob",
        "model utility": "model_utility",
    }
    curves = {name: _points(value["curve"], "scale", key) for name, key in keys.items()}
    return Strength(
        str(value.get("adapter") or owner),
        value.get("chosen_scale"),
        {name: points for name, points in curves.items() if points},
    )


def _points(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> Points:
    """The measured points in order; one that was not measured is left out, not drawn as 0."""
    return sorted((float(row[x]), float(row[y])) for row in rows if row.get(y) is not None)


def _free(taken: Mapping[str, Any], name: str, owner: str) -> str:
    """`name`, with its owner where another file has a curve of that name."""
    return name if name not in taken else f"{name} ({owner})"
