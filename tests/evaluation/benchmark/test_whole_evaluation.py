"""The standard implementation of an evaluation: it must give the figures that ours gives."""

from __future__ import annotations

from typing import Any

import pytest

from evaluation.benchmark.whole_evaluation import (
    PROTOCOL,
    measure_evaluation,
    plain_answers,
    plain_scores,
)
from evaluation.suite import EvalData, evaluate
from tests.evaluation.test_suite import tiny_data


@pytest.fixture
def data() -> EvalData:
    return tiny_data()


def test_both_ways_give_the_same_figures(tiny: tuple[Any, Any], data: EvalData) -> None:
    model, fmt = tiny
    log = evaluate(model, fmt, data, protocol=PROTOCOL)
    scores, answers = plain_scores(model, fmt, data), plain_answers(model, fmt, data)
    for name, each in log.sets.items():
        # A row without a paraphrase has its answer's score there.
        texts: list[list[Any]] = [
            [row.answer_score, *[row.paraphrase] * bool(given.paraphrased_answer), *row.perturbed]
            for row, given in zip(each.rows, data.sets[name], strict=True)
        ]
        columns = zip(*texts, strict=True)
        ours = [[score.mean_nll for score in column] for column in columns]
        for column, means in zip(ours, scores[name], strict=True):
            assert means == pytest.approx(column, abs=1e-5)
        assert len(answers[name]) == len(each.rows)
    generated = [
        next(iter(row.generations.values())).text for s in log.sets.values() for row in s.rows
    ]
    assert [text for name in log.sets for text in answers[name]] == generated


def test_a_whole_evaluation_is_timed_both_ways(tiny: tuple[Any, Any], data: EvalData) -> None:
    model, fmt = tiny
    said: list[str] = []
    lines = measure_evaluation(model, fmt, data, said.append, goals=(0.001, 1000.0))
    assert [line.met for line in lines] == [True, False]
    assert len(said) == 4
    assert all("14 questions in 4 sets" in line.note for line in lines)
