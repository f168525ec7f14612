"""The Runs tab's data: evaluations from the store and from logs, for table, plots and exports."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from evaluation.report import cards
from evaluation.report.card_sections import figure_points
from ui.app.data import commands
from ui.app.data.library import readable_name

if TYPE_CHECKING:
    from adapters.store.store import AdapterStore
    from evaluation.report.build import ReportRequest

KINDS = ("robustness", "calibration")
STRENGTH_CURVES = {
    "KS distance": "ks",
    "retain probability": "retain_answer_prob",
    "model utility": "model_utility",
}
Points = list[tuple[float, float]]
REFERENCE = "retrain reference"
PUBLISHED_MODEL = re.compile(r"llama-?2.?7b", re.IGNORECASE)  # whose figures were published
# The columns of the table, by the keys of their figures.
LABELS = {
    "name": "Run", "source": "Source", "forget_quality": "Forget quality (p)",
    "model_utility": "Model utility", "n": "Forget rows", "protocol": "Protocol",
    "limited": "Extent", "forget_fact_recall": "Forget facts stated",
    "retain_fact_recall": "Retain facts stated", "forget_quality_log10": "log10 FQ",
    "ks": "KS distance", "log_r_shift": "log R shift", "direction": "Direction",
    "forget_rouge_l_recall": "Forget ROUGE-L", "forget_answer_prob": "Forget probability",
}  # fmt: skip
COLUMNS = tuple(LABELS)


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


@dataclass(frozen=True)
class Runs:
    """Rows of the table, log R of the runs that have their rows, and the published points."""

    table: list[dict[str, Any]]
    log_r: dict[str, list[float]]
    published: list[tuple[str, float, float]]
    notes: list[str]

    def curve(self) -> dict[str, list[tuple[float, float]]]:
        """Strength against ROUGE-L on the forget set, by adapter, where it was measured twice."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.table:
            scales, value = row.get("scales"), row.get("forget_rouge_l_recall")
            if isinstance(scales, Mapping) and len(scales) == 1 and value is not None:
                ((slug, scale),) = scales.items()
                found.setdefault(str(slug), []).append((float(scale), float(value)))
        return {slug: sorted(points) for slug, points in found.items() if len(points) > 1}


@dataclass(frozen=True)
class Sources:
    """Where the Runs tab reads: a store, logs, and probes in files."""

    store: AdapterStore | None = None
    logs: tuple[Path, ...] = ()
    retain_log: Path | None = None
    robustness: tuple[Path, ...] = ()
    calibration: tuple[Path, ...] = ()

    def named_logs(self) -> list[tuple[str, Path]]:
        """The logs that are shown by name: those given, and the reference if it is none of them."""
        from evaluation.report.inputs import log_names

        paths, reference = list(self.logs), self.retain_log
        if reference and reference.resolve() not in [path.resolve() for path in paths]:
            paths.append(reference)
        return list(zip(log_names(paths), paths, strict=True))

    def probes(self) -> Probes:
        """All probes that can be found, those named first; read as written, nothing is computed.

        They are named on the command line, lie beside the logs, or are filed with an adapter.

        Raises:
            UserError: a file of another kind or schema, or one that cannot be read.
        """
        probes, store = Probes(), self.store
        for path in _files(self.robustness, self.logs, cards.ROBUSTNESS):
            _add_robustness(probes, cards.read_robustness(path), path.parent.name or path.stem)
        for path in _files(self.calibration, self.logs, cards.CALIBRATION):
            probes.strengths.append(_strength(cards.read_calibration(path)))
        for adapter in store.list() if store is not None else ():
            evals = store.evals(adapter.slug) if store is not None and not adapter.problem else {}
            for name, value in evals.items():
                if is_probe(name):
                    _add_filed(probes, name, value, readable_name(adapter))
        return probes

    def report_request(self) -> ReportRequest | None:
        """What `unlearner report` is asked for; None without any log or file of a probe."""
        from evaluation.report.build import ReportRequest
        from evaluation.report.inputs import named_logs

        if not (self.logs or self.robustness or self.calibration):
            return None
        request = ReportRequest(
            tuple(named_logs(self.logs)),
            reference_log=self.retain_log,
            robustness=self.robustness,
            calibration=self.calibration,
        )
        # The command line reports on logs; probes alone have no command.
        return replace(request, command=commands.report(request)) if self.logs else request

    def runs(self) -> Runs:
        """All evaluations that can be found, measured before; no model is run.

        Each log is summarised under the protocol it states, the default one otherwise. Published
        rows are added if the evaluations name one split that has some, and all are of their model.

        Raises:
            UserError: a log that cannot be read.
        """
        reference = None if self.retain_log is None else _version(self.retain_log)
        runs, models = Runs([], {}, [], []), set()
        for name, path in self.named_logs():
            measured = _measured(_version(path), reference)
            is_reference = reference is not None and path.resolve() == reference[0]
            source = REFERENCE if is_reference else "log"
            runs.table.append({"name": name, "source": source, **measured.figures})
            runs.notes.extend([f"{name}: {measured.problem}"] if measured.problem else [])
            if measured.log_r is not None:
                runs.log_r[name] = list(measured.log_r)
            models.add(measured.model)
        filed = [] if self.store is None else _filed_rows(self.store)
        if self.store is not None and filed:
            models.add(self.store.base_name())
        runs.table.extend(filed)
        if models and all(PUBLISHED_MODEL.search(model) for model in models):
            from evaluation.report.build import PUBLISHED

            for name, (quality, utility) in PUBLISHED.get(split_of(runs) or "", {}).items():
                if quality > 0:
                    runs.published.append((name, math.log10(quality), utility))
        return runs


def _filed_rows(store: AdapterStore) -> list[dict[str, Any]]:
    """Rows of the evaluations that a store keeps."""
    rows: list[dict[str, Any]] = []
    adapters = store.list()
    names = {adapter.slug: readable_name(adapter) for adapter in adapters}
    for adapter in adapters:
        evals = {} if adapter.problem else store.evals(adapter.slug)
        for key, figures in evals.items():
            if not is_probe(key):
                # Figures are filed with the last adapter of the stack that was measured.
                stack = figures.get("stack") or [adapter.slug]
                who = " + ".join(names.get(slug, slug) for slug in stack)
                limited = figures.get("limited", figures.get("limit") is not None)
                row = {"name": f"{who} {key}", "source": adapter.slug, **figures}
                rows.append({**row, "limited": limited})
    return rows


def _files(named: Sequence[Path], logs: Sequence[Path], name: str) -> list[Path]:
    """The files that are named, then those beside the logs, each once."""
    beside = [path for log in logs if (path := log.parent / name).is_file()]
    return list({path.resolve(): path for path in reversed([*named, *beside])}.values())[::-1]


def _add_filed(probes: Probes, name: str, value: Mapping[str, Any], owner: str) -> None:
    """A probe as a store keeps it: columns in place of rows, verdicts without their sentences."""
    curve, verdicts = value.get("curve"), value.get("verdicts")
    if name.startswith("calibration") and isinstance(curve, Mapping):
        columns = zip(*curve.values(), strict=True)
        rows = [dict(zip(curve, row, strict=True)) for row in columns]
        card = cards.parse_calibration({**value, "curve": rows}, Path(name), owner)
        probes.strengths.append(_strength(card))
    elif name.startswith("robustness") and isinstance(verdicts, Mapping):
        holds = {word: value for value, word in cards.VERDICT_WORDS.items()}
        probes.verdicts.extend(
            {"of": owner, "name": probe, "said": word, "holds": holds.get(word),
             "text": f"filed as {name}"}
            for probe, word in verdicts.items()
        )  # fmt: skip
    else:
        probes.notes.append(f"The evaluation {name} of {owner} cannot be read here.")


def _add_robustness(probes: Probes, card: cards.Card, owner: str) -> None:
    for curve in card["relearning"]:
        name = _free(probes.relearning, curve["name"], owner)
        probes.relearning[name] = figure_points(curve["points"], "step", "unseen_answer_prob")
        probes.taught[name] = figure_points(curve["points"], "step", "seen_answer_prob")
    for curve in card["sampling"]:
        name = _free(probes.sampling, curve["name"], owner)
        probes.sampling[name] = figure_points(curve["points"], "n", "share_leaked")
    probes.verdicts.extend(
        {"of": owner, "said": cards.VERDICT_WORDS.get(verdict.get("holds")), **verdict}
        for verdict in card["verdicts"]
    )


def _strength(card: cards.Card) -> Strength:
    curves = {
        name: points
        for name, key in STRENGTH_CURVES.items()
        if (points := figure_points(card["curve"], "scale", key))
    }
    return Strength(card["name"], card["chosen_scale"], curves)


def _free(taken: Mapping[str, Any], name: str, owner: str) -> str:
    """`name`, with its owner where another file has a curve of that name."""
    return name if name not in taken else f"{name} ({owner})"


Version = tuple[Path, int, int]  # a file's path, time of change and size


def _version(path: Path) -> Version:
    try:
        status = path.stat()
    except OSError:
        return path.resolve(), 0, 0  # reading it says what is wrong
    return path.resolve(), status.st_mtime_ns, status.st_size


@dataclass(frozen=True)
class _Measured:
    """What one log says, and of which model; `problem` is why the reference could not be used."""

    figures: dict[str, Any]
    log_r: tuple[float, ...] | None
    model: str
    problem: str = ""


@functools.lru_cache(maxsize=64)
def _measured(log_version: Version, reference_version: Version | None) -> _Measured:
    """The figures of a log: computed once for each version of its file and its reference's."""
    from evaluation.logs import read_log
    from evaluation.logs.records import protocol_rows
    from evaluation.metrics.summary import set_values, summarise
    from evaluation.protocols import DEFAULT, PROTOCOLS, protocol_named

    log = read_log(log_version[0])
    reference = None if reference_version is None else read_log(reference_version[0])
    stated = [name for name in log.meta.get("protocols", ()) if name in PROTOCOLS]
    protocol = protocol_named(stated[0] if stated else DEFAULT)
    problem = ""
    try:
        figures = summarise(log, reference, protocol=protocol.name, resamples=200)
    except UserError as error:
        if reference is None:
            raise
        problem = error.problem
        figures = summarise(log, None, protocol=protocol.name, resamples=200)
    if log.meta.get("split"):
        figures = {**figures, "split": log.meta["split"]}
    log_r = None
    if "forget" in log.sets:
        values = set_values("forget", protocol_rows(log.sets["forget"], protocol), protocol)
        log_r = tuple(float(value) for value in values["log_r"]) if "log_r" in values else None
    # A public log states no model: then its file's name must.
    model = str(log.meta.get("base") or log.meta.get("command") or log_version[0].stem)
    return _Measured(figures, log_r, model, problem)


def cells(row: Mapping[str, Any]) -> list[Any]:
    """A run as the table shows it, to four digits; None where it could not be measured."""
    shown = {**row, "limited": "partial" if row.get("limited") else "whole set"}
    return [float(f"{v:.4g}") if isinstance(v := shown.get(name), float) else v for name in COLUMNS]


def column_help() -> str:
    """What each column is called in JSON and CSV, and what is wanted of it, as Markdown."""
    from evaluation.metrics.summary import BETTER

    quoted = (
        "To quote a run: forget quality and model utility, with the number of forget rows and the "
        "protocol, of a run whose extent is the whole set. A p below 0.05 means that it differs "
        "from a retrained model.\n"
    )
    lines = [f"| {LABELS[name]} | `{name}` | {BETTER.get(name, '')} |" for name in COLUMNS]
    return "\n".join([quoted, "| Column | Key | Better |", "|---|---|---|", *lines])


def split_of(runs: Runs) -> str | None:
    """The forget split that these evaluations name, None where they name none or several."""
    named = {str(row["split"]) for row in runs.table if row.get("split")}
    return named.pop() if len(named) == 1 else None


def as_csv(runs: Runs) -> str:
    """The table as CSV, figures unrounded; no cell is a formula for a spreadsheet."""
    from evaluation.report.files import csv_text

    return csv_text(COLUMNS, runs.table)
