"""A document of tables, plots and text, rendered as one HTML page or as Markdown.

The templates hold the markup of both. Every value is escaped: the page has no script and loads
nothing, and what a model wrote stays text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evaluation.report.answers import AnswerSet, answer_figures, word_differences
from evaluation.report.plots import Chart, colour_css, draw_svg


class Cell(NamedTuple):
    """A cell of a table: its text, and a smaller line below it."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Column:
    """A column: its head, which direction is better in words, and whether it holds numbers."""

    head: str
    better: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: its title.
        columns: a string is the head of a column of words.
        rows: their cells; the first names the row.
        kinds: CSS classes of the rows.
    """

    kind: ClassVar = "table"
    caption: str
    columns: tuple[Column | str, ...]
    rows: Sequence[Sequence[Cell | str]]
    kinds: Sequence[str] = ()

    @property
    def heads(self) -> list[Column]:
        """All columns as `Column`."""
        return [Column(c, numeric=False) if isinstance(c, str) else c for c in self.columns]


@dataclass(frozen=True)
class Text:
    """A warning that a reader must not miss, verbatim lines, or a heading inside a section."""

    kind: Literal["note", "code", "heading"]
    text: str


@dataclass(frozen=True)
class Plots:
    """Plots side by side."""

    kind: ClassVar = "plots"
    charts: tuple[Chart, ...]


Block = Table | Text | Plots | AnswerSet | str  # a string is a paragraph


@dataclass(frozen=True)
class Section:
    """A section, with the key that links to it."""

    key: str
    title: str
    blocks: Sequence[Block]


def charts(sections: Iterable[Section]) -> list[Chart]:
    """Every plot of the document, in order."""
    blocks = (block for section in sections for block in section.blocks)
    return [chart for block in blocks if isinstance(block, Plots) for chart in block.charts]


def with_distinct_plots(sections: Iterable[Section]) -> tuple[Section, ...]:
    """The sections, with a number added to a plot's key where an earlier plot has the same."""
    times: Counter[str] = Counter()

    def distinct(chart: Chart) -> Chart:
        times[chart.key] += 1
        number = times[chart.key]
        return chart if number == 1 else replace(chart, key=f"{chart.key}-{number}")

    def renamed(block: Block) -> Block:
        return Plots(tuple(map(distinct, block.charts))) if isinstance(block, Plots) else block

    return tuple(replace(s, blocks=tuple(map(renamed, s.blocks))) for s in sections)


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The document as one HTML file: own style, inline plots, no script, nothing loaded."""
    colours = {"light": Markup(colour_css()), "dark": Markup(colour_css(dark=True))}
    page = _templates(markdown=False).get_template("page.html.j2")
    return page.render(title=title, sections=sections, **colours)


def html_blocks(blocks: Iterable[Block]) -> str:
    """Blocks as HTML for a page that has its own style."""
    module = _templates(markdown=False).get_template("blocks.html.j2").module
    return "\n".join(str(module.render_block(block)) for block in blocks)  # type: ignore[attr-defined]


def markdown_page(title: str, sections: Sequence[Section]) -> str:
    """The document as Markdown; its SVG files lie in the folder `plots` beside the text."""
    page = _templates(markdown=True).get_template("page.md.j2")
    text = page.render(title=title, sections=sections)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@lru_cache(maxsize=2)
def _templates(*, markdown: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("evaluation.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
        finalize=markdown_text if markdown else None,
    )  # fmt: skip
    environment.globals |= {
        "word_differences": word_differences,
        "answer_figures": answer_figures,
        "svg": lambda chart: Markup(draw_svg(chart)),
    }
    return environment


def markdown_text(value: Any) -> Markup:
    """`value` as plain words on one line of Markdown: no markup, no HTML, no table border."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"\s+", " ", str(value)).strip()
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", text)
    # Some readers turn bare addresses into links, unless a character of them is an entity.
    text = text.replace("://", "&#58;//").replace("www.", "www&#46;")
    text = re.sub(r"^([-+=])(?=\s|$|[-+=])", r"\\\1", text)
    return Markup(re.sub(r"^(\d+)([.)])(?=\s)", r"\1\\\2", text))
