"""Everything that a report shows, gathered once from logs and cards as frozen data.

No model is loaded. Markdown, HTML, CSV and plots are made from the same `Report`, so they agree;
nothing in it depends on the clock, so the same inputs give the same bytes.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from adapters.atomic_files import sha256_file
from adapters.errors import UserError
from evaluation.experiments.presets import PUBLISHED_FORGET05, PUBLISHED_FORGET10
from evaluation.logs import read_log
from evaluation.logs.records import EvalLog
from evaluation.metrics.bootstrap import RESAMPLES
from evaluation.metrics.summary import match_forget, set_values, summarise
from evaluation.protocols import DEFAULT, Protocol, protocol_named
from evaluation.report.answers import AnswerSet, answer_sets
from evaluation.report.cards import (
    Calibration,
    Robustness,
    Search,
    read_calibration,
    read_json,
    read_robustness,
    read_rows,
    read_search,
)
from evaluation.report.inputs import RETRAIN, Inputs, find_inputs

SCHEMA, KIND = 1, "unlearner-report"
MEASURED, REFERENCE, SECOND = "measured", "retrain reference", "second retrain reference"
PUBLISHED_SOURCE = (
    "model card of OPTML-Group/SimNPO-TOFU-{split}-Llama-2-7b-chat (arXiv 2410.07163), "
    "Llama-2-7b-chat on TOFU {split}, to two digits"
)
NOT_STATED = "not stated"
PUBLISHED = {"forget05": PUBLISHED_FORGET05, "forget10": PUBLISHED_FORGET10}
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
        without_answers: leave out every question and answer.
        command: the command that makes the report, to be printed.
        date: a date to be printed; a report is undated without one.
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
    about: Mapping[str, Any] = field(default_factory=dict)


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
    robustness: tuple[Robustness, ...]
    calibration: tuple[Calibration, ...]
    searches: tuple[Search, ...]
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


def gather(request: ReportRequest) -> tuple[Report, tuple[LoadedLog, ...]]:
    """The report, and the logs that it was made from (for their rows).

    Raises:
        UserError: no input, a file of another kind, an unknown protocol, or a log whose texts were
            cut at another length than the protocol's.
    """
    inputs = find_inputs(request.inputs, request.robustness, request.calibration)
    logs = load_logs(inputs, request)
    if not (logs or inputs.robustness or inputs.calibration or inputs.tune):
        raise UserError("There is nothing to report on.", "Name a log, a card or their folder.")
    reference = next((log for log in logs if log.role == REFERENCE), None)
    protocols = [protocol_named(name) for name in request.protocols or _stated_protocol(logs)]
    views = tuple(
        View(protocol.name, tuple(_system(log, reference, protocol) for log in logs))
        for protocol in (protocols if logs else ())
    )
    robustness = tuple(map(read_robustness, inputs.robustness))
    calibration = tuple(map(read_calibration, inputs.calibration))
    searches = tuple(map(read_search, inputs.tune))
    reproductions = {path: read_json(path) for path in inputs.results}
    origin = next((log.log.sets for log in logs if log.name.casefold() == "origin"), None)
    answers = tuple(
        answer_set
        for log in logs
        for answer_set in answer_sets(
            log.name, log.log.sets, protocols[0], None if log.log.sets is origin else origin
        )
    )
    cards: list[tuple[str, Path, Robustness | Calibration | Search]] = [
        *(("robustness", *pair) for pair in zip(inputs.robustness, robustness, strict=True)),
        *(("calibration", *pair) for pair in zip(inputs.calibration, calibration, strict=True)),
        *(("search", *pair) for pair in zip(inputs.tune, searches, strict=True)),
    ]
    report = Report(
        title=request.title,
        command=request.command,
        date=request.date,
        tried=_tried(request, searches, calibration),
        retrain=None if reference is None else reference.name,
        views=views,
        published=_published(request, logs, reproductions),
        answers=() if request.without_answers else answers,
        without_answers=request.without_answers,
        robustness=robustness,
        calibration=calibration,
        searches=searches,
        checks=tuple(
            check for path, raw in reproductions.items() for check in read_rows(raw, "checks", path)
        ),
        files=(
            *(_input_file(_kind(log), log.name, log.path, dict(log.log.meta)) for log in logs),
            *(_input_file(kind, card.name, path, card.about) for kind, path, card in cards),
            *(_reproduction_file(path, raw) for path, raw in reproductions.items()),
        ),
        settings=_settings(protocols, reproductions),
        versions=_versions(),
        warnings=_warnings(views, logs),
    )
    return report, logs


def load_logs(inputs: Inputs, request: ReportRequest) -> tuple[LoadedLog, ...]:
    """Every log once, with its role; the references are rows of the table too."""
    paths = dict(inputs.logs)
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
    logs = [
        LoadedLog(name, roles.get(name, MEASURED), path, read_log(path))
        for name, path in paths.items()
    ]
    by_role, by_name = {REFERENCE: 1, SECOND: 2}, {"origin": 0, RETRAIN: 1}
    return tuple(
        sorted(logs, key=lambda log: by_role.get(log.role, by_name.get(log.name.casefold(), 3)))
    )


def _stated_protocol(logs: tuple[LoadedLog, ...]) -> list[str]:
    """The protocol of the first log that states one, or the default."""
    for log in logs:
        stated = log.log.meta.get("protocols")
        if isinstance(stated, list) and stated:
            return [str(stated[0])]
    return [DEFAULT]


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
        reasons = {**figures["reasons"], "forget_quality": "not comparable with the reference"}
        figures, against = {**figures, "reasons": reasons}, None
    curve = None if against is None else ecdf(log.log, against, protocol)
    return System(log.name, log.role, figures, curve, warnings + tuple(figures["notes"]))


def ecdf(log: EvalLog, reference: EvalLog, protocol: Protocol) -> Ecdf | None:
    """Both distributions of log R on the matched forget rows; None where a log has no log R.

    `d = max_x |F(x) - F_retrain(x)|`, where F(x) is the share of rows with log R of at most x.
    """
    if "forget" not in log.sets or "forget" not in reference.sets:
        return None
    match = match_forget(log.sets["forget"], reference.sets["forget"], protocol, log.meta)
    values = [
        set_values("forget", rows, protocol).get("log_r") for rows in (match.ours, match.theirs)
    ]
    if values[0] is None or values[1] is None:
        return None
    ours, theirs = np.sort(values[0]), np.sort(values[1])
    grid = np.union1d(ours, theirs)
    below = [np.searchsorted(side, grid, side="right") / side.size for side in (ours, theirs)]
    place = int(np.argmax(np.abs(below[0] - below[1])))
    left, right = float(below[0][place]), float(below[1][place])
    return Ecdf(
        tuple(map(float, ours)), tuple(map(float, theirs)), float(grid[place]),
        abs(left - right), left, right,
    )  # fmt: skip


def _tried(
    request: ReportRequest, searches: tuple[Search, ...], calibration: tuple[Calibration, ...]
) -> str:
    """The number of configurations tried: as stated, or as searches and calibrations counted it."""
    if request.tried is not None:
        return f"{request.tried}, as stated by --tried"
    parts = [f"{search.tried} by the search {search.name}" for search in searches]
    for card in calibration:
        tried = card.about.get("tried")
        if isinstance(tried, int):
            parts.append(f"{tried} strengths of {card.name} by calibration")
    return "; ".join(parts) or NOT_STATED


def _published(
    request: ReportRequest,
    logs: tuple[LoadedLog, ...],
    reproductions: Mapping[Path, Mapping[str, Any]],
) -> tuple[Published, ...]:
    """The published rows that were asked for, or those of the split that all inputs state."""
    wanted = request.published
    if wanted is None:
        splits = {str(log.log.meta["split"]) for log in logs if log.log.meta.get("split")}
        splits |= {str(raw.get("target")).removeprefix("tofu-") for raw in reproductions.values()}
        split = splits.pop() if len(splits) == 1 else "none"
        wanted = split if split in PUBLISHED else "none"
    if wanted not in (*PUBLISHED, "none"):
        raise UserError(
            f"There are no published rows {wanted!r}.", f"Choose {', '.join(PUBLISHED)} or none."
        )
    rows = PUBLISHED.get(wanted, {})
    return tuple(
        Published(name, quality, utility, wanted) for name, (quality, utility) in rows.items()
    )


def _kind(log: LoadedLog) -> str:
    return "evaluation log" if log.role == MEASURED else log.role


def _input_file(kind: str, name: str, path: Path, about: Mapping[str, Any]) -> InputFile:
    return InputFile(kind, name, str(path), sha256_file(path), about)


def _reproduction_file(path: Path, raw: Mapping[str, Any]) -> InputFile:
    about = {key: raw[key] for key in ("target", "preset", "origin", "seconds") if key in raw}
    return _input_file("reproduction", path.resolve().parent.name, path, about)


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


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def _warnings(views: tuple[View, ...], logs: tuple[LoadedLog, ...]) -> tuple[str, ...]:
    """What a reader must know before the figures: each warning once, with the systems it is on."""
    systems: dict[str, dict[str, None]] = {}
    for view in views:
        for system in view.systems:
            for warning in system.warnings:
                systems.setdefault(warning, {})[system.name] = None
    warnings = [f"{', '.join(names)}: {warning}" for warning, names in systems.items()]
    splits = sorted({str(log.log.meta["split"]) for log in logs if log.log.meta.get("split")})
    if len(splits) > 1:
        warnings.append(f"the logs are of different splits: {', '.join(splits)}")
    return tuple(warnings)
