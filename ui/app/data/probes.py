"""Results of the probes of a stack: relearning, drawing many answers, and strength. No gradio.

`robustness.json` and `calibration.json` are read as they were written; nothing is computed here.
They are named on the command line, lie beside the logs, or are filed with an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.report.card_sections import figure_points
from evaluation.report.cards import (
    CALIBRATION,
    ROBUSTNESS,
    VERDICT_WORDS,
    Card,
    parse_calibration,
    read_calibration,
    read_robustness,
)
from ui.app.data.library import readable_name

if TYPE_CHECKING:
    from adapters.store.store import AdapterStore

KINDS = ("robustness", "calibration")
STRENGTH_CURVES = {
    "KS distance": "ks",
    "retain probability": "retain_answer_prob",
    "model utility": "model_utility",
}
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
        UserError: a file of another kind or schema, or one that cannot be read.
    """
    probes = Probes()
    for path in _files(robustness, logs, ROBUSTNESS):
        _add_robustness(probes, read_robustness(path), path.parent.name or path.stem)
    for path in _files(calibration, logs, CALIBRATION):
        probes.strengths.append(_strength(read_calibration(path)))
    for adapter, name, value in _filed(store):
        _add_filed(probes, name, value, adapter)
    return probes


def _files(named: Sequence[Path], logs: Sequence[Path], name: str) -> list[Path]:
    """The files that are named, then those beside the logs, each once."""
    beside = [path for log in logs if (path := log.parent / name).is_file()]
    return list({path.resolve(): path for path in reversed([*named, *beside])}.values())[::-1]


def _filed(store: AdapterStore | None) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for adapter in store.list() if store is not None else []:
        if adapter.problem or store is None:
            continue
        for name, value in store.evals(adapter.slug).items():
            if is_probe(name):
                yield readable_name(adapter), name, value


def _add_filed(probes: Probes, name: str, value: Mapping[str, Any], owner: str) -> None:
    """A probe as a store keeps it: columns in place of rows, verdicts without their sentences."""
    curve, verdicts = value.get("curve"), value.get("verdicts")
    if name.startswith("calibration") and isinstance(curve, Mapping):
        columns = zip(*curve.values(), strict=True)
        rows = [dict(zip(curve, row, strict=True)) for row in columns]
        card = parse_calibration({**value, "curve": rows}, Path(name), owner)
        probes.strengths.append(_strength(card))
    elif name.startswith("robustness") and isinstance(verdicts, Mapping):
        holds = {word: value for value, word in VERDICT_WORDS.items()}
        probes.verdicts.extend(
            {"of": owner, "name": probe, "said": word, "holds": holds.get(word),
             "text": f"filed as {name}"}
            for probe, word in verdicts.items()
        )  # fmt: skip
    else:
        probes.notes.append(f"The evaluation {name} of {owner} cannot be read here.")


def _add_robustness(probes: Probes, card: Card, owner: str) -> None:
    for curve in card["relearning"]:
        name = _free(probes.relearning, curve["name"], owner)
        probes.relearning[name] = figure_points(curve["points"], "step", "unseen_answer_prob")
        probes.taught[name] = figure_points(curve["points"], "step", "seen_answer_prob")
    for curve in card["sampling"]:
        name = _free(probes.sampling, curve["name"], owner)
        probes.sampling[name] = figure_points(curve["points"], "n", "share_leaked")
    probes.verdicts.extend(
        {"of": owner, "said": VERDICT_WORDS.get(verdict.get("holds")), **verdict}
        for verdict in card["verdicts"]
    )


def _strength(card: Card) -> Strength:
    curves = {
        name: points
        for name, key in STRENGTH_CURVES.items()
        if (points := figure_points(card["curve"], "scale", key))
    }
    return Strength(card["name"], card["chosen_scale"], curves)


def _free(taken: Mapping[str, Any], name: str, owner: str) -> str:
    """`name`, with its owner where another file has a curve of that name."""
    return name if name not in taken else f"{name} ({owner})"
