"""One report of many measurements: everything it shows, gathered once as plain frozen data.

No model is loaded. Markdown, HTML, CSV and plots are drawn from the same `Report`, so they cannot
disagree; nothing in it depends on the clock or the machine, so the same inputs give the same bytes.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapters.atomic_files import sha256_file
from adapters.errors import UserError
from evaluation.experiments.presets import PUBLISHED_FORGET05, PUBLISHED_FORGET10
from evaluation.logs.records import EvalLog, read_log
from evaluation.metrics import statistics as metrics
from evaluation.metrics.summary import match_forget, set_values, summarise
from evaluation.protocols import DEFAULT, Protocol, protocol_named
from evaluation.report.answers import answer_sets
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
from evaluation.report.tree import (
    MEASURED,
    REFERENCE,
    SECOND,
    Ecdf,
    InputFile,
    Published,
    Report,
    ReportRequest,
    System,
    View,
)

NOT_STATED = "not stated"
PUBLISHED = {"forget05": PUBLISHED_FORGET05, "forget10": PUBLISHED_FORGET10}
PACKAGES = ("unlearner", "numpy", "scipy", "rouge-score")


@dataclass(frozen=True)
class LoadedLog:
    """A log with its name and role."""

    name: str
    role: str
    path: Path
    log: EvalLog


def gather(request: ReportRequest) -> tuple[Report, tuple[LoadedLog, ...]]:
    """The report, and the logs it was made from (for their rows).

    Raises:
        UserError: no input, a file of another kind, an unknown protocol, or a log whose texts were
            cut at another length than the protocol's.
    """
    found = find_inputs(request.inputs, request.robustness, request.calibration)
    logs = load_logs(found, request)
    if not (logs or found.robustness or found.calibration or found.tune):
        raise UserError("There is nothing to report on.", "Name a log, a card or their folder.")
    reference = next((one for one in logs if one.role == REFERENCE), None)
    protocols = [protocol_named(name) for name in request.protocols or _stated(logs)]
    views = tuple(_view(logs, reference, protocol) for protocol in protocols) if logs else ()
    cards = tuple(map(read_robustness, found.robustness))
    curves = tuple(map(read_calibration, found.calibration))
    searches = tuple(map(read_search, found.tune))
    origin = next((one.log.sets for one in logs if one.name.casefold() == "origin"), None)
    shown = [
        made
        for one in logs
        for made in answer_sets(
            one.name, one.log.sets, protocols[0], None if one.log.sets is origin else origin
        )
    ]
    report = Report(
        title=request.title,
        command=request.command,
        date=request.date,
        tried=_tried(request, searches, curves),
        retrain=None if reference is None else reference.name,
        views=views,
        published=_published(request, logs, found),
        answers=() if request.without_answers else tuple(shown),
        without_answers=request.without_answers,
        robustness=cards,
        calibration=curves,
        searches=searches,
        checks=tuple(
            check for path in found.results for check in read_rows(read_json(path), "checks", path)
        ),
        files=_files(logs, found, cards, curves, searches),
        settings=_settings(protocols, found),
        versions=_versions(),
        warnings=_warnings(views, logs),
    )
    return report, logs


def load_logs(found: Inputs, request: ReportRequest) -> tuple[LoadedLog, ...]:
    """Every log once, with its role; the references stand in the table too."""
    paths = dict(found.logs)
    roles = {REFERENCE: request.retain_log, SECOND: request.second_retain_log}
    if roles[REFERENCE] is None and RETRAIN in paths:
        roles[REFERENCE] = paths[RETRAIN]
    if roles[SECOND] is not None and roles[REFERENCE] is None:
        raise UserError("There is a second retrain log, but no first.", "Add --retain-log.")
    names = {REFERENCE: RETRAIN, SECOND: "second retrain"}
    mine: dict[str, str] = {}
    for role, path in roles.items():
        if path is None:
            continue
        same = [name for name, one in paths.items() if one.resolve() == path.resolve()]
        name = same[0] if same else names[role]
        if not same and name in paths:
            name = f"{name} ({path.stem})"
        paths[name] = path
        mine[name] = role
    logs = [
        LoadedLog(name, mine.get(name, MEASURED), path, read_log(path))
        for name, path in paths.items()
    ]
    first = {"origin": 0, RETRAIN: 1}
    place = {REFERENCE: 1, SECOND: 2}
    return tuple(
        sorted(logs, key=lambda one: place.get(one.role, first.get(one.name.casefold(), 3)))
    )


def _stated(logs: tuple[LoadedLog, ...]) -> list[str]:
    """The protocol that the first log with one states, else the default."""
    for one in logs:
        stated = one.log.meta.get("protocols")
        if isinstance(stated, list) and stated:
            return [str(stated[0])]
    return [DEFAULT]


def _view(logs: tuple[LoadedLog, ...], reference: LoadedLog | None, protocol: Protocol) -> View:
    return View(protocol.name, tuple(_system(one, reference, protocol) for one in logs))


def _system(one: LoadedLog, reference: LoadedLog | None, protocol: Protocol) -> System:
    """A row; where the reference holds other rows the reason stands in place of the figure."""
    against = None if reference is None else reference.log
    warnings: tuple[str, ...] = ()
    try:
        figures = summarise(one.log, against, protocol=protocol.name)
    except UserError as error:
        figures = summarise(one.log, None, protocol=protocol.name)
        # The rest of the sentence quotes a question, which a report may have to leave out.
        problem = error.problem.partition(", for example")[0].rstrip(".")
        warnings = (f"not compared with the retrain reference: {problem}",)
        reasons = {**figures["reasons"], "forget_quality": "not comparable with the reference"}
        figures, against = {**figures, "reasons": reasons}, None
    curve = None if against is None else ecdf(one.log, against, protocol)
    return System(one.name, one.role, figures, curve, warnings + tuple(figures["notes"]))


def ecdf(log: EvalLog, retain_log: EvalLog, protocol: Protocol) -> Ecdf | None:
    """Both distributions of log R on the matched forget rows; None where one cannot be had.

    `d = max_x |F(x) - F_retrain(x)|`, F(x) the share of rows with log R of at most x.
    """
    if "forget" not in log.sets or "forget" not in retain_log.sets:
        return None
    match = match_forget(log.sets["forget"], retain_log.sets["forget"], protocol, log.meta)
    found = [
        set_values("forget", rows, protocol).get("log_r") for rows in (match.ours, match.theirs)
    ]
    if found[0] is None or found[1] is None:
        return None
    ours, theirs = np.sort(found[0]), np.sort(found[1])
    grid = np.union1d(ours, theirs)
    below = [np.searchsorted(x, grid, side="right") / x.size for x in (ours, theirs)]
    place = int(np.argmax(np.abs(below[0] - below[1])))
    left, right = float(below[0][place]), float(below[1][place])
    return Ecdf(
        tuple(map(float, ours)), tuple(map(float, theirs)), float(grid[place]),
        abs(left - right), left, right,
    )  # fmt: skip


def _tried(
    request: ReportRequest, searches: tuple[Search, ...], curves: tuple[Calibration, ...]
) -> str:
    """How many configurations were tried: as stated, else as the files of searches count them."""
    if request.tried is not None:
        return f"{request.tried}, as stated by --tried"
    parts = [f"{one.tried} by the search {one.name}" for one in searches]
    for one in curves:
        tried = one.about.get("tried")
        if isinstance(tried, int):
            parts.append(f"{tried} strengths of {one.name} by calibration")
    return "; ".join(parts) or NOT_STATED


def _published(
    request: ReportRequest, logs: tuple[LoadedLog, ...], found: Inputs
) -> tuple[Published, ...]:
    wanted = request.published
    if wanted is None:
        stated = {str(one.log.meta["split"]) for one in logs if one.log.meta.get("split")}
        stated |= {
            str(read_json(path).get("target")).removeprefix("tofu-") for path in found.results
        }
        split = stated.pop() if len(stated) == 1 else "none"
        wanted = split if split in PUBLISHED else "none"
    if wanted not in (*PUBLISHED, "none"):
        raise UserError(
            f"There are no published rows {wanted!r}.", f"Choose {', '.join(PUBLISHED)} or none."
        )
    rows = PUBLISHED.get(wanted, {})
    return tuple(
        Published(name, quality, utility, wanted) for name, (quality, utility) in rows.items()
    )


def _files(
    logs: tuple[LoadedLog, ...],
    found: Inputs,
    cards: tuple[Robustness, ...],
    curves: tuple[Calibration, ...],
    searches: tuple[Search, ...],
) -> tuple[InputFile, ...]:
    """Every input with its digest and what it says of its making."""
    files = [
        InputFile(
            "evaluation log" if one.role == MEASURED else one.role,
            one.name,
            str(one.path),
            sha256_file(one.path),
            dict(one.log.meta),
        )
        for one in logs
    ]
    for path, card in zip(found.robustness, cards, strict=True):
        files.append(InputFile("robustness", card.name, str(path), sha256_file(path), card.about))
    for path, curve in zip(found.calibration, curves, strict=True):
        files.append(
            InputFile("calibration", curve.name, str(path), sha256_file(path), curve.about)
        )
    for path, search in zip(found.tune, searches, strict=True):
        files.append(InputFile("search", search.name, str(path), sha256_file(path), search.about))
    for path in found.results:
        raw = read_json(path)
        recorded = ("target", "preset", "origin", "seconds")
        about: dict[str, Any] = {key: raw[key] for key in recorded if key in raw}
        name = path.resolve().parent.name
        files.append(InputFile("reproduction", name, str(path), sha256_file(path), about))
    return tuple(files)


def _settings(protocols: list[Protocol], found: Inputs) -> dict[str, Any]:
    """Seeds and settings: of the intervals, of each protocol, and of recorded trainings."""
    methods = {
        f"{path}: {name}": config
        for path in found.results
        for name, config in (read_json(path).get("methods") or {}).items()
    }
    return {
        "bootstrap": {"resamples": metrics.RESAMPLES, "seed": 0, "interval": "95 %, percentile"},
        "protocols": {
            p.name: {
                "rows": p.max_rows or "all", "max_length": p.max_length,
                "truth_ratio": p.truth_ratio, "decoding": p.decoding.name,
                "decoding_seed": p.decoding.seed if p.decoding.sample else "greedy, none",
                "source": p.source,
            }
            for p in protocols
        },
        "methods": methods,
    }  # fmt: skip


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _warnings(views: tuple[View, ...], logs: tuple[LoadedLog, ...]) -> tuple[str, ...]:
    """What a reader must know before the figures, each once."""
    names: dict[str, list[str]] = {}
    for one in (system for view in views for system in view.systems):
        for note in one.warnings:
            whose = names.setdefault(note, [])
            whose += [one.name] if one.name not in whose else []
    found = [f"{', '.join(whose)}: {note}" for note, whose in names.items()]
    splits = sorted({str(one.log.meta["split"]) for one in logs if one.log.meta.get("split")})
    if len(splits) > 1:
        found.append(f"the logs are of different splits: {', '.join(splits)}")
    return tuple(found)
