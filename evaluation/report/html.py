"""A report as one HTML file: own style, own plots, no script, nothing loaded from anywhere."""

from __future__ import annotations

import html
from collections.abc import Sequence

from evaluation.report.answers import Parts, ShownAnswer, word_differences
from evaluation.report.blocks import (
    Answers,
    Block,
    Cell,
    Code,
    Column,
    Figure,
    Heading,
    Note,
    Para,
    Section,
    Table,
)
from evaluation.report.markdown import answer_figures
from evaluation.report.style import CSS
from evaluation.report.svg import svg

# Also a reader who opens the file in a browser is safe from what a model wrote into it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

LONG = 40  # letters: a cell of more is read as a sentence, and gets the width for it


def html_report(title: str, found: Sequence[Section]) -> str:
    """The whole file."""
    links = "".join(f'<li><a href="#{esc(s.key)}">{esc(s.title)}</a></li>' for s in found)
    body = "".join(_section(section) for section in found)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{esc(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f'<header class="un-head"><h1>{esc(title)}</h1>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def esc(text: str) -> str:
    """`text` as HTML text, also inside a quoted attribute."""
    return html.escape(text, quote=True)


def _section(section: Section) -> str:
    """A section; figures that follow each other stand side by side where there is room."""
    parts: list[str] = []
    plots: list[str] = []
    for block in (*section.blocks, None):
        if isinstance(block, Figure):
            plots.append(_figure(block))
            continue
        if plots:
            one = " un-one" if len(plots) == 1 else ""
            parts.append(f'<div class="un-plots{one}">{"".join(plots)}</div>\n')
            plots = []
        if block is not None:
            parts.append(_block(block) + "\n")
    key = esc(section.key)
    return (
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">'
        f"{esc(section.title)}</h2>\n{''.join(parts)}</section>\n"
    )


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Answers):
        return _answers(block)
    if isinstance(block, Code):
        return f'<pre tabindex="0"><code>{esc(block.text)}</code></pre>'
    if isinstance(block, Heading):
        return f"<h3>{esc(block.text)}</h3>"
    if isinstance(block, Note):
        return f'<p class="un-note"><b>Note.</b> {esc(block.text)}</p>'
    if isinstance(block, Para):
        return f"<p>{esc(block.text)}</p>"
    return _figure(block)


def _figure(block: Figure) -> str:
    chart = block.chart
    return (
        f'<figure class="un-figure">{svg(chart)}<figcaption><b>{esc(chart.title)}.</b> '
        f"{esc(chart.text)}</figcaption></figure>\n"
    )


def _table(table: Table) -> str:
    heads = "".join(map(_head, table.columns))
    kinds = table.kinds or ("",) * len(table.rows)
    rows = "".join(
        f"<tr{f' class=un-{kind}' if kind else ''}>{_cells(row, table.columns)}</tr>\n"
        for row, kind in zip(table.rows, kinds, strict=True)
    )
    words = "" if any(column.numeric for column in table.columns) else ' class="un-text"'
    return (
        f'<div class="un-scroll" tabindex="0" role="region" aria-label="{esc(table.caption)}">'
        f"<table{words}><caption><span>{esc(table.caption)}</span></caption>\n<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _head(column: Column) -> str:
    better = f"<small>{esc(column.better)}</small>" if column.better else ""
    kind = ' class="un-num"' if column.numeric else ""
    return f'<th scope="col"{kind}>{esc(column.head)}{better}</th>'


def _cells(row: Sequence[Cell], columns: Sequence[Column]) -> str:
    found = []
    for i, (cell, column) in enumerate(zip(row, columns, strict=True)):
        small = f"<small>{esc(cell.small)}</small>" if cell.small else ""
        kind = ' class="un-num"' if column.numeric and i else ""
        kind = ' class="un-words"' if len(cell.text) > LONG and not kind else kind
        tag = '<th scope="row">' if not i else f"<td{kind}>"
        found.append(f"{tag}{esc(cell.text)}{small}</{tag[1:3]}>")
    return "".join(found)


def _answers(block: Answers) -> str:
    found = block.found
    parts = []
    for word, rows in (("Best", found.best), ("Worst", found.worst)):
        if rows:
            items = "".join(map(_answer, rows))
            parts.append(f"<h4>{word} {len(rows)}</h4><ol>{items}</ol>")
    return (
        f'<details class="un-answers"><summary>{esc(found.system)}, {esc(found.name)}: '
        f"{len(found.best)} best and {len(found.worst)} worst of {found.n}</summary>"
        f"<p>Order, {esc(found.rule)}.</p>{''.join(parts)}</details>"
    )


def _answer(row: ShownAnswer) -> str:
    truth, given = word_differences(row.truth or "", row.answer or "")
    missing = '<span class="un-quiet">not in the log</span>'
    said = _marked(given, "ins") if row.answer is not None else missing
    return (
        f'<li><p class="un-question">{esc(row.question) if row.question else missing}</p>'
        f"<dl><dt>True answer</dt><dd>{_marked(truth, 'del') or missing}</dd>"
        f"<dt>Answer</dt><dd>{said or '(empty)'}</dd></dl>"
        f'<p class="un-quiet">row {row.row + 1}, {esc(answer_figures(row))}</p></li>'
    )


def _marked(parts: Parts, tag: str) -> str:
    return " ".join(f"<{tag}>{esc(words)}</{tag}>" if only else esc(words) for words, only in parts)
