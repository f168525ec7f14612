"""The rows that small models learn of TOFU, those held out, and those that a model knows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from adapters.environment import threads_for
from evaluation.experiments.presets import SmallModels
from evaluation.inference.scoring import score_rows
from evaluation.logs.records import write_text
from unlearner.request.rows import Author, Row
from unlearner.request.tofu import load_authors, load_split
from unlearner.tokens.prompts import Template, prompt_format

# The split whose rows have the paraphrases of all narrower ones.
_WIDEST = "forget10_perturbed"
Pairs = list[tuple[str, str]]


def small_rows(data: Path | None, split: str, small: SmallModels) -> tuple[Pairs, Pairs, Pairs]:
    """Training rows of small models: those of both models, their background, those of Origin alone.

    Both learn the first retain authors by heart, with TOFU's questions and, except for
    `held_out_questions`, its paraphrased ones; a few more authors with paraphrased answers too;
    real authors and world facts. Origin learns the forget split likewise. No paraphrased or
    perturbed answer that the split evaluates is trained on.
    """
    evaluated = {row.question: row for row in load_split("retain_perturbed", data)}
    forgotten = {row.question: row for row in load_split(f"{split}_perturbed", data)}
    variants = {row.question: row for row in load_split(_WIDEST, data)}
    gone = {row.question for row in load_split(split, data)}
    retained = [a for a in load_authors(data) if not any(row.question in gone for row in a.rows)]
    # These have paraphrases which are not evaluated.
    unused = variants.keys() - evaluated.keys()
    spare = [a for a in retained if all(row.question in unused for row in a.rows)]
    twice, known = spare[: small.paraphrased_authors], retained[: small.retain_authors]
    others = [author for author in retained if author not in known and author not in twice]
    # The only pretraining of these models.
    facts = [*load_split("real_authors", data), *load_split("world_facts", data)]
    unseen = set(held_out_questions(data, split, small))
    paraphrased = _rows_of(twice)
    answers = {question: row.paraphrased_answer for question, row in variants.items()}
    learned = [
        *_asked_twice(_rows_of(known), evaluated, unseen),
        *_asked_twice(paraphrased, variants, set()),
        *((row.question, text) for row in paraphrased if (text := answers[row.question])),
        *map(_pair, facts),
    ]
    return (
        learned,
        list(map(_pair, _rows_of(others))),
        _asked_twice(load_split(split, data), forgotten, unseen),
    )


def held_out_questions(data: Path | None, split: str, small: SmallModels) -> list[str]:
    """Paraphrased questions of evaluated rows on which no small model is trained."""
    if not small.held_out:
        return []
    sets = [load_split(name, data) for name in ("retain_perturbed", f"{split}_perturbed")]
    return [
        row.paraphrased_question
        for rows in sets
        for row in rows[:: small.held_out]
        if row.paraphrased_question
    ]


def _rows_of(authors: Sequence[Author]) -> list[Row]:
    return [row for author in authors for row in author.rows]


def _asked_twice(rows: Sequence[Row], variants: dict[str, Row], unseen: set[str]) -> Pairs:
    """Each row, and again with its paraphrased question where that may be trained on."""
    asked = ((variants.get(row.question), row.answer) for row in rows)
    again = [(v.paraphrased_question, answer) for v, answer in asked if v is not None]
    return [*map(_pair, rows), *((q, answer) for q, answer in again if q and q not in unseen)]


def _pair(row: Row) -> tuple[str, str]:
    return row.question, row.answer


def known_rows(
    base: BaseSpec,
    rows: Sequence[Row],
    above: float,
    template: Template = "auto",
    system: str | None = None,
) -> list[int]:
    """Indices of the rows whose answer has a probability above `above`, normalised by length."""
    fmt = prompt_format(load_tokenizer(base.name, base.revision), template, system)
    model: Any = load_base(base)
    with threads_for(model):
        scored = score_rows(model, fmt, [Row(row.question, row.answer) for row in rows])
    losses = [row.answer_score.mean_nll for row in scored if row.answer_score is not None]
    return [i for i, loss in enumerate(losses) if math.exp(-loss) > above]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Writes questions and answers as JSON lines, for `forget --retain`; duplicates once."""
    lines = {json.dumps({"question": row.question, "answer": row.answer}): None for row in rows}
    return write_text(path, "".join(line + "\n" for line in lines))
