"""Everything that a report shows, gathered once from logs and cards as frozen data.

No model is loaded. Markdown, HTML, CSV and plots are made from the same `Report`, so they agree;
nothing in it depends on the clock, so the same inputs give the same bytes.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from adapters.atomic_files import sha256_file
from adapters.errors import UserError
from evaluation.experiments.presets import LLAMA2_7B
from evaluation.logs import read_log
from evaluation.logs.records import EvalLog
from evaluation.metrics.bootstrap import RESAMPLES
from evaluation.metrics.summary import matched_log_r, summarise
from evaluation.protocols import DEFAULT, Protocol, protocol_named
from evaluation.report.answers import AnswerSet, answer_sets
from evaluation.report.cards import (
    CALIBRATION,
    ROBUSTNESS,
    TUNE,
    Card,
    read_calibration,
    read_object,
    read_robustness,
    read_rows,
    read_search,
)
from evaluation.report.inputs import RESULT, RETRAIN, find_inputs

SCHEMA, KIND = 1, "unlearner-report"
MEASURED, REFERENCE, SECOND = "measured", "retrain reference", "second retrain reference"
PUBLISHED_SOURCE = (
    "model card of OPTML-Group/SimNPO-TOFU-{split}-Llama-2-7b-chat (arXiv 2410.07163), "
    "Llama-2-7b-chat on TOFU {split}, to two digits"
)
PUBLISHED = LLAMA2_7B.published
# What is shown of a reproduction's result.
RECORDED = ("target", "preset", "origin", "seconds")
PACKAGES = ("unlearner", "numpy", "scipy", "rouge-score", "matplotlib")


@dataclass(frozen=True)
class ReportRequest:
    """The inputs of a report and its options.

    Attributes:
        inputs: `NAME=LOG`, logs or folders.
        reference_log, second_reference_log: of models that never saw the forget set; without the
            first, the system called `retrain` is the reference, where there is one.
        protocols: names; empty takes the first that a log states, else `tofu`.
        robustness, calibration: cards in addition to those in folders.
        published: `forget05`, `forget10`, `none`, or None: the split that all logs state.
        tried: number of configurations tried, as the caller states it.
        command, date: printed where they are given.
    """

    inputs: tuple[str, ...]
    reference_log: Path | None = None
    second_reference_log: Path | None = None
    protocols: tuple[str, ...] = ()
    robustness: tuple[Path, ...] = ()
    calibration: tuple[Path, ...] = ()
    title: str = "Unlearning report"
    tried: int | None = None
    published: str | None = None
    without_answers: bool = False
    command: str = ""
    date: str = ""


@dataclass(frozen=True)
class Ecdf:
    """log R of a system and of the retrain reference, sorted, and where they differ most.

    Attributes:
        at: the value of log R at which the two distribution functions differ most.
        d: the difference there, which is the Kolmogorov-Smirnov statistic.
        ours_at, theirs_at: values of both functions there.
    """

    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    at: float
    d: float
    ours_at: float
    theirs_at: float


@dataclass(frozen=True)
class System:
    """A row of the table, with the unrounded figures of `metrics.summary.summarise`."""

    name: str
    role: str
    figures: Mapping[str, Any]
    ecdf: Ecdf | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class View:
    """All systems under one protocol."""

    protocol: str
    systems: tuple[System, ...]


@dataclass(frozen=True)
class Published:
    """A published row; only these two figures are known of it."""

    name: str
    forget_quality: float
    model_utility: float
    split: str


@dataclass(frozen=True)
class InputFile:
    """A file that the report was made from; `about` is what it records of how it was made."""

    kind: str
    name: str
    path: str
    sha256: str
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """Everything a report shows."""

    title: str
    command: str
    date: str
    tried: str
    retrain: str | None
    views: tuple[View, ...]
    published: tuple[Published, ...]
    answers: tuple[AnswerSet, ...]
    without_answers: bool
    robustness: tuple[Card, ...]
    calibration: tuple[Card, ...]
    searches: tuple[Card, ...]
    checks: tuple[Mapping[str, Any], ...]
    files: tuple[InputFile, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedLog:
    """A log with its name and role."""

    name: str
    role: str
    path: Path
    log: EvalLog


def gather(request: ReportRequest) -> tuple[Report, list[LoadedLog]]:
    """The report, and the logs that it was made from (for their rows).

    Raises:
        UserError: no input, a file of another kind, an unknown protocol, or a log whose texts were
            cut at another length than the protocol's.
    """
    inputs = find_inputs(request.inputs, request.robustness, request.calibration)
    logs = _load_logs(inputs.logs, request)
    robustness = {path: read_robustness(path) for path in inputs.cards[ROBUSTNESS]}
    calibration = {path: read_calibration(path) for path in inputs.cards[CALIBRATION]}
    searches = {path: read_search(path) for path in inputs.cards[TUNE]}
    reproductions = {path: read_object(path) for path in inputs.cards[RESULT]}
    if not (logs or robustness or calibration or searches):
        raise UserError("There is nothing to report on.", "Name a log, a card or their folder.")
    reference = next((log for log in logs if log.role == REFERENCE), None)
    stated = (log.log.meta.get("protocols") for log in logs)
    default = next((names[0] for names in stated if isinstance(names, list) and names), DEFAULT)
    protocols = [protocol_named(name) for name in request.protocols or (str(default),)]
    views = tuple(
        View(protocol.name, tuple(_system(log, reference, protocol) for log in logs))
        for protocol in (protocols if logs else ())
    )
    origin = next((log.log.sets for log in logs if log.name.casefold() == "origin"), None)
    answers = tuple(
        answer_set
        for log in ([] if request.without_answers else logs)
        for answer_set in answer_sets(
            log.name, log.log.sets, protocols[0], None if log.log.sets is origin else origin
        )
    )
    files = [
        _file("evaluation log" if each.role == MEASURED else each.role, each.name, each.path,
              each.log.meta)
        for each in logs
    ]  # fmt: skip
    cards = {"robustness": robustness, "calibration": calibration, "search": searches}
    for kind, found in cards.items():
        files += [_file(kind, card["name"], path, card["about"]) for path, card in found.items()]
    for path, raw in reproductions.items():
        recorded = {key: raw[key] for key in RECORDED if key in raw}
        files.append(_file("reproduction", path.resolve().parent.name, path, recorded))
    splits = {str(log.log.meta["split"]) for log in logs if log.log.meta.get("split")}
    targets = {str(raw.get("target")).removeprefix("tofu-") for raw in reproductions.values()}
    report = Report(
        title=request.title,
        command=request.command,
        date=request.date,
        tried=_tried(request, searches.values(), calibration.values()),
        retrain=None if reference is None else reference.name,
        views=views,
        published=_published(request.published, splits | targets),
        answers=answers,
        without_answers=request.without_answers,
        robustness=tuple(robustness.values()),
        calibration=tuple(calibration.values()),
        searches=tuple(searches.values()),
        checks=tuple(
            check for path, raw in reproductions.items() for check in read_rows(raw, "checks", path)
        ),
        files=tuple(files),
        settings=_settings(protocols, reproductions),
        versions={"python": platform.python_version()} | {each: version(each) for each in PACKAGES},
        warnings=_warnings(views, splits),
    )
    return report, logs


def _file(kind: str, name: str, path: Path, about: Mapping[str, Any]) -> InputFile:
    return InputFile(kind, name, str(path), sha256_file(path), dict(about))


def _load_logs(logs: Mapping[str, Path], request: ReportRequest) -> list[LoadedLog]:
    """Every log once, with its role; the references are rows of the table too."""
    paths = dict(logs)
    references = {
        REFERENCE: request.reference_log or paths.get(RETRAIN),
        SECOND: request.second_reference_log,
    }
    if references[SECOND] is not None and references[REFERENCE] is None:
        raise UserError(
            "There is a second reference log, but no first one.",
            "Name a log of a model that never saw the forget set as the reference log too.",
        )
    roles: dict[str, str] = {}
    for (role, path), name in zip(references.items(), (RETRAIN, "second retrain"), strict=True):
        if path is None:
            continue
        same = [other for other, file in paths.items() if file.resolve() == path.resolve()]
        name = same[0] if same else f"{name} ({path.stem})" if name in paths else name
        paths[name] = path
        roles[name] = role
    by_role, by_name = {REFERENCE: 1, SECOND: 2}, {"origin": 0, RETRAIN: 1}
    return sorted(
        (LoadedLog(name, roles.get(name, MEASURED), p, read_log(p)) for name, p in paths.items()),
        key=lambda log: by_role.get(log.role, by_name.get(log.name.casefold(), 3)),
    )


def _system(log: LoadedLog, reference: LoadedLog | None, protocol: Protocol) -> System:
    """A row of the table; where the reference has other rows, the reason replaces the figure."""
    against = None if reference is None else reference.log
    warnings: tuple[str, ...] = ()
    try:
        figures = summarise(log.log, against, protocol=protocol.name)
    except UserError as error:
        figures = summarise(log.log, None, protocol=protocol.name)
        # The rest of the sentence quotes a question, which a report may have to leave out.
        problem = error.problem.partition(", for example")[0].rstrip(".")
        warnings = (f"not compared with the retrain reference: {problem}",)
        figures["reasons"]["forget_quality"] = "not comparable with the reference"
        against = None
    curve = None if against is None else ecdf(log.log, against, protocol)
    return System(log.name, log.role, figures, curve, warnings + tuple(figures["notes"]))


def ecdf(log: EvalLog, reference: EvalLog, protocol: Protocol) -> Ecdf | None:
    """Both distributions of log R on the matched forget rows; None where a log has no log R.

    `d = max_x |F(x) - F_retrain(x)|`, where F(x) is the share of rows with log R of at most x.
    """
    pair = matched_log_r(log, reference, protocol)
    if pair is None:
        return None
    ours, theirs = np.sort(pair.ours), np.sort(pair.theirs)
    grid = np.union1d(ours, theirs)
    below = [np.searchsorted(side, grid, side="right") / side.size for side in (ours, theirs)]
    place = int(np.argmax(np.abs(below[0] - below[1])))
    left, right = float(below[0][place]), float(below[1][place])
    at, d = float(grid[place]), abs(left - right)
    return Ecdf(tuple(ours.tolist()), tuple(theirs.tolist()), at, d, left, right)


def _tried(request: ReportRequest, searches: Iterable[Card], calibration: Iterable[Card]) -> str:
    """The number of configurations tried: as stated, or as searches and calibrations counted it."""
    if request.tried is not None:
        return f"{request.tried}, as stated by --tried"
    parts = [f"{search['tried']} by the search {search['name']}" for search in searches]
    parts += [
        f"{card['about']['tried']} strengths of {card['name']} by calibration"
        for card in calibration
        if isinstance(card["about"].get("tried"), int)
    ]
    return "; ".join(parts) or "not stated"


def _published(wanted: str | None, splits: set[str]) -> tuple[Published, ...]:
    """The published rows of the split asked for, by default of the one that all inputs state."""
    if wanted is None:
        wanted = next(iter(splits)) if len(splits) == 1 and splits <= PUBLISHED.keys() else "none"
    if wanted not in (*PUBLISHED, "none"):
        raise UserError(
            f"There are no published rows {wanted!r}.", f"Choose {', '.join(PUBLISHED)} or none."
        )
    rows = PUBLISHED.get(wanted, {})
    return tuple(Published(name, *figures, wanted) for name, figures in rows.items())


def _settings(
    protocols: list[Protocol], reproductions: Mapping[Path, Mapping[str, Any]]
) -> dict[str, Any]:
    """Seeds and settings of the intervals, of each protocol, and of recorded trainings."""
    return {
        "bootstrap": {"resamples": RESAMPLES, "seed": 0, "interval": "95 %, percentile"},
        "protocols": {
            p.name: {
                "rows": p.max_rows or "all", "max_length": p.max_length,
                "truth_ratio": p.truth_ratio, "decoding": p.decoding.name,
                "decoding_seed": p.decoding.seed if p.decoding.sample else "greedy, none",
                "source": p.source,
            }
            for p in protocols
        },
        "methods": {
            f"{path}: {name}": config
            for path, raw in reproductions.items()
            for name, config in (raw.get("methods") or {}).items()
        },
    }  # fmt: skip


def _warnings(views: tuple[View, ...], splits: set[str]) -> tuple[str, ...]:
    """What a reader must know before the figures: each warning once, with the systems it is on."""
    systems: dict[str, dict[str, None]] = {}
    for system in (system for view in views for system in view.systems):
        for warning in system.warnings:
            systems.setdefault(warning, {})[system.name] = None
    warnings = [f"{', '.join(names)}: {warning}" for warning, names in systems.items()]
    if len(splits) > 1:
        warnings.append(f"the logs are of different splits: {', '.join(sorted(splits))}")
    return tuple(warnings)
