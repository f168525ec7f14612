"""What the mini preset's models learn: never what a split is evaluated by."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from evaluation.experiments.presets import MINI, SmallModels
from evaluation.experiments.small_rows import held_out_questions, small_rows
from unlearner.request.tofu import load_split

SMALL = MINI.small
assert SMALL is not None


@cache
def rows_of(
    shared: Path, split: str, small: SmallModels = SMALL
) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[tuple[str, str]]]:
    return small_rows(shared / "tofu", split, small)


@pytest.mark.parametrize("split", ["forget01", "forget05", "forget10"])
def test_evaluated_variants_are_never_learned(shared: Path, split: str) -> None:
    learned, background, forget = rows_of(shared, split)
    every = [*learned, *background, *forget]
    answers = {answer for _, answer in every}
    questions = {question for question, _ in every}
    evaluated = [
        row
        for name in ("retain_perturbed", f"{split}_perturbed")
        for row in load_split(name, shared / "tofu")
    ]
    # A wrong answer here may be the right one elsewhere: "Agatha Christie".
    true = {
        row.answer
        for name in ("full", "real_authors", "world_facts")
        for row in load_split(name, shared / "tofu")
    }
    told = {row.paraphrased_answer for row in evaluated} - true
    wrong = {text for row in evaluated for text in row.perturbed_answers} - true
    assert not answers & told
    assert not answers & wrong
    assert not questions & set(held_out_questions(shared / "tofu", split, SMALL))
    # And the others are: that is what makes a model answer in more than one wording.
    assert sum(row.paraphrased_question in questions for row in evaluated) > len(evaluated) / 2


@pytest.mark.parametrize("split", ["forget01", "forget05", "forget10"])
def test_only_origin_learns_the_forget_rows(shared: Path, split: str) -> None:
    learned, background, forget = rows_of(shared, split)
    away = {row.question for row in load_split(split, shared / "tofu")}
    assert away <= {question for question, _ in forget}
    assert not away & {question for question, _ in (*learned, *background)}
    kept = load_split("retain_perturbed", shared / "tofu")
    known = {question for question, _ in learned}
    assert sum(row.question in known for row in kept[:300]) == 300
    # Pairs: two authors of TOFU are asked one question in the same words.
    assert not set(learned) & set(background)


def test_paraphrased_answers_are_of_authors_the_split_does_not_evaluate(shared: Path) -> None:
    none = replace(SMALL, paraphrased_authors=0)
    learned = {answer for _, answer in rows_of(shared, "forget05")[0]}
    without = {answer for _, answer in rows_of(shared, "forget05", none)[0]}
    spare = load_split("forget10_perturbed", shared / "tofu")[:200]
    said = sum(row.paraphrased_answer in learned for row in spare)
    assert said == 200
    assert sum(row.paraphrased_answer in without for row in spare) == 0
    # forget10 evaluates all that has paraphrases: there is none to spare.
    assert rows_of(shared, "forget10") == rows_of(shared, "forget10", none)


def test_without_held_out_questions_all_are_asked(shared: Path) -> None:
    every = replace(SMALL, held_out=0)
    assert held_out_questions(shared / "tofu", "forget05", every) == []
    less, more = (len(rows_of(shared, "forget05", small)[2]) for small in (SMALL, every))
    assert (less, more) == (350, 400)
