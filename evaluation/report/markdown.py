"""A report as Markdown: tables, plots beside it, differences in bold and struck through."""

from __future__ import annotations

import re
from collections.abc import Sequence

from evaluation.report.answers import Parts, ShownAnswer, word_differences
from evaluation.report.blocks import (
    Answers,
    Block,
    Code,
    Figure,
    Heading,
    Note,
    Section,
    Table,
    fixed,
)

_SPECIAL = re.compile(r"([\\`*_\[\]|~#$])")
_SPACE = re.compile(r"\s+")


def markdown(title: str, found: Sequence[Section], plots: str = "plots") -> str:
    """The report's text; `plots` is the folder of its SVG files, as seen from it."""
    lines = [f"# {escape(title)}", ""]
    for section in found:
        lines += [f"## {escape(section.title)}", ""]
        for block in section.blocks:
            lines += [*_block(block, plots), ""]
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """`text` as plain words on one line: no markup, no HTML, no table border."""
    plain = _SPACE.sub(" ", text).strip()
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = _SPECIAL.sub(r"\\\1", plain)
    # Some readers make links of bare addresses: without the colon's own sign they do not.
    plain = plain.replace("://", "&#58;//").replace("www.", "www&#46;")
    return re.sub(
        r"^(\d+)([.)])(?=\s)", r"\1\\\2", re.sub(r"^([-+=])(?=\s|$|[-+=])", r"\\\1", plain)
    )


def _block(block: Block, plots: str) -> list[str]:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        chart = block.chart
        return [f"![{escape(f'{chart.title}. {chart.text}')}]({plots}/{chart.key}.svg)"]
    if isinstance(block, Answers):
        return _answers(block)
    if isinstance(block, Code):
        return [f"    {line}" for line in block.text.splitlines()]
    if isinstance(block, Heading):
        return [f"### {escape(block.text)}"]
    if isinstance(block, Note):
        return [f"> **Note.** {escape(block.text)}"]
    return [escape(block.text)]


def _table(table: Table) -> list[str]:
    heads = [
        " ".join(filter(None, (c.head, f"({c.better})" if c.better else ""))) for c in table.columns
    ]
    lines = [
        f"**{escape(table.caption)}**",
        "",
        "| " + " | ".join(map(escape, heads)) + " |",
        "|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|",
    ]
    for row in table.rows:
        cells = [escape(" ".join(filter(None, (cell.text, _small(cell.small))))) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _small(text: str) -> str:
    return text if not text or text.startswith("[") else f"({text})"


def _answers(block: Answers) -> list[str]:
    found = block.found
    lines = [f"**{escape(found.name)}**, {found.n} rows; {escape(found.rule)}."]
    for word, rows in (("Best", found.best), ("Worst", found.worst)):
        if rows:
            lines += ["", f"{word} {len(rows)}:", ""]
            lines += [line for row in rows for line in _answer(row)]
    return lines


def _answer(row: ShownAnswer) -> list[str]:
    truth, given = word_differences(row.truth or "", row.answer or "")
    said = _marked(given, "**") or "(no answer)" if row.answer is not None else "(not in the log)"
    return [
        f"- row {row.row + 1}, {answer_figures(row)}",
        f"  - question: {escape(row.question or '(not in the log)')}",
        f"  - true answer: {_marked(truth, '~~') or '(not in the log)'}",
        f"  - answer: {said}",
    ]


def answer_figures(row: ShownAnswer) -> str:
    """The answer's figures in words."""
    figures = row.figures
    parts = [
        f"ROUGE-L {fixed(figures.rouge_l_recall)}",
        f"answer prob. {fixed(figures.answer_prob)}",
        f"log R {fixed(figures.log_r, 3, True)}",
    ]
    if row.change is not None:
        parts.append(f"ROUGE-L against Origin {fixed(row.change, 3, True)}")
    return ", ".join(parts)


def _marked(parts: Parts, mark: str) -> str:
    return " ".join(
        f"{mark}{escape(words)}{mark}" if only else escape(words) for words, only in parts
    )
