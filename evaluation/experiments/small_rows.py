"""What the small models of a preset learn of TOFU, and what is kept from them to measure by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unlearner.request.rows import Author, Row
from unlearner.request.tofu import load_authors, load_split

if TYPE_CHECKING:
    from evaluation.experiments.presets import SmallModels

# The split whose rows have the paraphrases of all narrower ones.
_WIDEST = "forget10_perturbed"
Pairs = list[tuple[str, str]]


def small_rows(data: Path | None, split: str, small: SmallModels) -> tuple[Pairs, Pairs, Pairs]:
    """What small models learn of TOFU: rows of both, background of both, rows of Origin alone.

    Learned by heart: the first retain authors and, for Origin, the forget split, asked in TOFU's
    words and again in its paraphrased questions but for `held_out_questions`; a few more authors
    with their paraphrased answers too; real authors and world facts. No paraphrased or perturbed
    answer that the split evaluates is ever trained on.
    """
    kept, spare = _authors(data, split)
    twice, known = spare[: small.paraphrased_authors], kept[: small.retain_authors]
    others = [author for author in kept if author not in known and author not in twice]
    facts = [*load_split("real_authors", data), *load_split("world_facts", data)]
    asked = {row.question: row for row in load_split("retain_perturbed", data)}
    forgotten = {row.question: row for row in load_split(f"{split}_perturbed", data)}
    unseen = set(held_out_questions(data, split, small))
    learned = [
        *_asked_twice(_rows_of(known), asked, unseen),
        *_told_twice(_rows_of(twice), {r.question: r for r in load_split(_WIDEST, data)}),
        *(_pair(row) for row in facts * small.facts),
    ]
    background = [_pair(row) for row in _rows_of(others)]
    return learned, background, _asked_twice(load_split(split, data), forgotten, unseen)


def held_out_questions(data: Path | None, split: str, small: SmallModels) -> list[str]:
    """Paraphrased questions of evaluated rows that no small model is trained on."""
    if not small.held_out:
        return []
    sets = [load_split(name, data) for name in ("retain_perturbed", f"{split}_perturbed")]
    return [
        row.paraphrased_question
        for rows in sets
        for row in rows[:: small.held_out]
        if row.paraphrased_question
    ]


def _authors(data: Path | None, split: str) -> tuple[list[Author], list[Author]]:
    """Authors that stay, and those among them whose paraphrases are there but not evaluated."""
    away = {row.question for row in load_split(split, data)}
    evaluated = {row.question for row in load_split("retain_perturbed", data)}
    told = {row.question for row in load_split(_WIDEST, data)} - evaluated
    kept = [a for a in load_authors(data) if not any(row.question in away for row in a.rows)]
    return kept, [a for a in kept if all(row.question in told for row in a.rows)]


def _rows_of(authors: Sequence[Author]) -> list[Row]:
    return [row for author in authors for row in author.rows]


def _asked_twice(rows: Sequence[Row], variants: dict[str, Row], unseen: set[str]) -> Pairs:
    """Each row, and again under its paraphrased question where there is one to be trained on."""
    pairs = [_pair(row) for row in rows]
    for row in rows:
        variant = variants.get(row.question)
        if variant is None or not variant.paraphrased_question:
            continue
        if variant.paraphrased_question not in unseen:
            pairs.append((variant.paraphrased_question, row.answer))
    return pairs


def _told_twice(rows: Sequence[Row], variants: dict[str, Row]) -> Pairs:
    """Each row, asked in other words, and answered in other words."""
    pairs = _asked_twice(rows, variants, set())
    for row in rows:
        answer = variants[row.question].paraphrased_answer
        if answer:
            pairs.append((row.question, answer))
    return pairs


def _pair(row: Row) -> tuple[str, str]:
    return row.question, row.answer
