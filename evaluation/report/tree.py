"""What a report holds: plain frozen data, from which Markdown, HTML, CSV and plots are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.report.answers import AnswerSet
    from evaluation.report.cards import Calibration, Robustness, Search

SCHEMA, KIND = 1, "unlearner-report"
MEASURED, REFERENCE, SECOND = "measured", "retrain reference", "second retrain reference"
PUBLISHED_SOURCE = (
    "model card of OPTML-Group/SimNPO-TOFU-{split}-Llama-2-7b-chat (arXiv 2410.07163), "
    "Llama-2-7b-chat on TOFU {split}, to two digits"
)


@dataclass(frozen=True)
class ReportRequest:
    """What to report on and how.

    Attributes:
        inputs: `NAME=LOG`, logs or folders.
        retain_log, second_retain_log: of models that never saw the forget set; without the first
            the system called `retrain` is the reference, where there is one.
        protocols: names; empty takes the first that a log states, else `tofu`.
        robustness, calibration: cards beside those found in folders.
        published: `forget05`, `forget10`, `none`, or None: the split that all logs state.
        tried: how many configurations were tried, as the caller states it.
        without_answers: leave out every question and answer.
        command: what made the report, to be printed.
        date: to be printed; a report is undated without it.
    """

    inputs: tuple[str, ...]
    retain_log: Path | None = None
    second_retain_log: Path | None = None
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
    """log R of a system and of the retrain reference, sorted, and where they part furthest.

    Attributes:
        at: the value of log R at which the two distribution functions differ most.
        d: by how much: the Kolmogorov-Smirnov statistic.
        ours_at, theirs_at: both functions there.
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
    """A published row: two figures, nothing else is known of it."""

    name: str
    forget_quality: float
    model_utility: float
    split: str


@dataclass(frozen=True)
class InputFile:
    """A file that the report was made from; `about` is what it says of its making."""

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
