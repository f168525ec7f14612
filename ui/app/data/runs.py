"""The Runs tab's data: evaluations from the store and from logs, for table, plots and exports."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from ui.app.data import commands
from ui.app.data.probes import Probes, gather_probes, is_probe

if TYPE_CHECKING:
    from adapters.store.store import AdapterStore
    from evaluation.logs.records import EvalLog
    from evaluation.report.build import ReportRequest

REFERENCE = "retrain reference"
COLUMNS = (
    "name", "source", "forget_quality", "forget_quality_log10", "ks", "log_r_shift", "direction",
    "model_utility", "forget_rouge_l_recall", "forget_answer_prob", "n", "protocol", "limited",
)  # fmt: skip


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

    def runs(self) -> Runs:
        """The evaluations."""
        return gather(self.store, self.logs, self.retain_log)

    def probes(self) -> Probes:
        """The probes."""
        return gather_probes(self.store, self.logs, self.robustness, self.calibration)


def report_request(sources: Sources) -> ReportRequest | None:
    """What `unlearner report` is asked for; None without any log or file of a probe."""
    from evaluation.report.build import ReportRequest
    from evaluation.report.inputs import named_logs

    if not (sources.logs or sources.robustness or sources.calibration):
        return None
    request = ReportRequest(
        tuple(named_logs(sources.logs)),
        reference_log=sources.retain_log,
        robustness=sources.robustness,
        calibration=sources.calibration,
    )
    words = commands.report(
        sources.logs, sources.retain_log, sources.robustness, sources.calibration
    )
    return replace(request, command=words)


def gather(
    store: AdapterStore | None,
    logs: Sequence[Path] = (),
    retain_log: Path | None = None,
    protocol: str = "tofu",
) -> Runs:
    """All evaluations that can be found, measured before; nothing is computed with a model.

    Raises:
        UserError: a log that cannot be read.
    """
    from evaluation.experiments.presets import PUBLISHED_FORGET05
    from evaluation.logs import read_log
    from evaluation.metrics.summary import set_values, summarise
    from evaluation.protocols import protocol_named
    from evaluation.report.inputs import log_names

    table: list[dict[str, Any]] = []
    log_r: dict[str, list[float]] = {}
    notes: list[str] = []
    reference = read_log(retain_log) if retain_log is not None else None
    paths = all_logs(logs, retain_log)
    for name, path in zip(log_names(paths), paths, strict=True):
        log = read_log(path)
        figures = _figures(log, reference, protocol, name, notes, summarise)
        source = "log"
        if retain_log is not None and path.resolve() == retain_log.resolve():
            source = REFERENCE
        table.append({"name": name, "source": source, **figures})
        if "forget" in log.sets:
            found = set_values("forget", log.sets["forget"].rows, protocol_named(protocol))
            if "log_r" in found:
                log_r[name] = [float(value) for value in found["log_r"]]
    for adapter in store.list() if store is not None else []:
        if adapter.problem:
            continue
        for key, figures in store.evals(adapter.slug).items() if store is not None else []:
            if is_probe(key):
                continue
            table.append({"name": f"{adapter.label} {key}", "source": adapter.slug, **figures})
    published = [
        (name, math.log10(quality), utility)
        for name, (quality, utility) in PUBLISHED_FORGET05.items()
        if quality > 0
    ]
    return Runs(table, log_r, published, notes)


def all_logs(logs: Sequence[Path], retain_log: Path | None) -> list[Path]:
    """The logs that are shown: those given, and the reference where it is none of them."""
    if retain_log is None or retain_log.resolve() in [path.resolve() for path in logs]:
        return list(logs)
    return [*logs, retain_log]


def _figures(
    log: EvalLog, reference: EvalLog | None, protocol: str, name: str, notes: list[str],
    summarise: Any,
) -> dict[str, Any]:  # fmt: skip
    """The summary; without the reference, and noted, where the two hold different rows."""
    try:
        found: dict[str, Any] = summarise(log, reference, protocol=protocol, resamples=200)
    except UserError as error:
        if reference is None:
            raise
        notes.append(f"{name}: {error.problem}")
        found = summarise(log, None, protocol=protocol, resamples=200)
    return found


def cells(row: Mapping[str, Any]) -> list[Any]:
    """A run as the table shows it, to four digits; None where it could not be measured."""
    return [float(f"{v:.4g}") if isinstance(v := row.get(name), float) else v for name in COLUMNS]


def split_of(runs: Runs) -> str | None:
    """The forget split that these evaluations name, None where they name none or several."""
    named = {str(row["split"]) for row in runs.table if row.get("split")}
    return named.pop() if len(named) == 1 else None


def as_csv(runs: Runs) -> str:
    """The table as CSV, figures unrounded."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs.table)
    return out.getvalue()
