"""The parts a report is built of, before they are Markdown or HTML, and how numbers are written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluation.report.answers import AnswerSet
from evaluation.report.svg import Chart

DASH = "–"
HIGHER, LOWER = "↑ higher is better", "↓ lower is better"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what it says, and a smaller line below it."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Column:
    """A column: its head, which way is better, in words, and whether it holds numbers."""

    head: str
    better: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it, `kinds` tells rows apart for their look."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Para:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Note:
    """What a reader must not miss."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines as they were typed or recorded."""

    text: str


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclass(frozen=True)
class Figure:
    """A plot."""

    chart: Chart


@dataclass(frozen=True)
class Answers:
    """The best and worst answers of a system on one set."""

    found: AnswerSet


Block = Table | Para | Note | Code | Heading | Figure | Answers


@dataclass(frozen=True)
class Section:
    """A section with a key for links."""

    key: str
    title: str
    blocks: tuple[Block, ...]


def charts(sections: tuple[Section, ...]) -> list[Chart]:
    """Every plot of the report, in order."""
    return [
        block.chart for found in sections for block in found.blocks if isinstance(block, Figure)
    ]


def distinct(found: Sequence[Section]) -> tuple[Section, ...]:
    """The sections with no two plots of one file name: a later one gets a number."""
    times: Counter[str] = Counter()

    def named(block: Block) -> Block:
        if not isinstance(block, Figure):
            return block
        key = block.chart.key
        times[key] += 1
        if times[key] == 1:
            return block
        return Figure(replace(block.chart, key=f"{key}-{times[key]}"))

    return tuple(replace(one, blocks=tuple(map(named, one.blocks))) for one in found)


def fixed(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A number with so many digits after the point, never "-0.000"; a dash for None."""
    if value is None:
        return DASH
    rounded = round(float(value), digits) + 0.0
    return f"{rounded:+.{digits}f}" if sign and rounded else f"{rounded:.{digits}f}"


def p_text(value: Any) -> str:
    """A p-value in three significant digits: 0.988, 1.83e-21."""
    return DASH if value is None else f"{float(value):.3g}"


def interval_text(pair: Any, digits: int = 3) -> str:
    """A 95 % interval: [0.31, 0.40]; nothing without one."""
    return f"[{fixed(pair[0], digits)}, {fixed(pair[1], digits)}]" if pair else ""


def plain(value: Any) -> str:
    """A setting or a recorded fact on one line, without floating-point noise."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "none"
    return str(value)
