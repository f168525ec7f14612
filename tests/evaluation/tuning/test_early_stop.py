"""The measure of a mid-training reading: the figures of a whole evaluation, of the right rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from evaluation.logs.records import AnswerScore, EvalLog, SetRecord
from evaluation.metrics.summary import summarise
from evaluation.suite import EvalData, evaluate
from evaluation.tuning.early_stop import GapProbe, gap_rows
from unlearner.request.rows import Request, Row

ROWS = tuple(
    Row(f"Who wrote book {i}?", f"Mira wrote {i}.", f"It was Mira {i}.", ("Ola.", f"Kim {i}."))
    for i in range(5)
)


@pytest.fixture(scope="module")
def log(tiny: tuple[Any, Any]) -> EvalLog:
    model, fmt = tiny
    return evaluate(model, fmt, EvalData(ROWS), generate=False)


@pytest.fixture(scope="module")
def other(log: EvalLog) -> EvalLog:
    """A reference with other scores, in another order, and with rows of its own."""
    rows = [
        replace(
            row,
            answer_score=AnswerScore(3.0 + i, 4),
            paraphrase=AnswerScore(2.0 + i, 4),
        )
        for i, row in enumerate(log.sets["forget"].rows)
    ]
    more = replace(rows[0], question="And another?")
    return EvalLog({"forget": SetRecord("forget", (more, *rows[::-1]), 6)}, dict(log.meta))


def test_the_figures_are_those_of_an_evaluation(
    tiny: tuple[Any, Any], log: EvalLog, other: EvalLog
) -> None:
    model, fmt = tiny
    found = GapProbe(fmt, ROWS, other)(model)
    same = EvalLog({"forget": SetRecord("forget", other.sets["forget"].rows[1:], 5)}, other.meta)
    figures = summarise(log, same, resamples=0)
    assert found["gap"] == pytest.approx(figures["log_r_shift"], abs=1e-6)
    assert found["ks"] == pytest.approx(figures["ks"])
    assert found["forget_quality"] == pytest.approx(figures["forget_quality"])
    assert found["forget_nll"] == pytest.approx(figures["forget_nll"], abs=1e-6)
    expected = figures["forget_nll"] - figures["retrain_forget_nll"]
    assert found["nll_gap"] == pytest.approx(expected, abs=1e-6)
    itself = GapProbe(fmt, ROWS, log)(model)
    assert (itself["gap"], itself["nll_gap"]) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_the_key_changes_with_what_is_measured(
    tiny: tuple[Any, Any], log: EvalLog, other: EvalLog
) -> None:
    _, fmt = tiny
    keys = {
        GapProbe(fmt, ROWS, log).key,
        GapProbe(fmt, ROWS, other).key,
        GapProbe(fmt, ROWS[:4], other).key,
        GapProbe(fmt, ROWS, log, "tofu-paper").key,
    }
    assert len(keys) == 4
    assert GapProbe(fmt, ROWS, log).key in keys


def test_a_reference_of_other_rows_is_refused_at_once(tiny: tuple[Any, Any], log: EvalLog) -> None:
    _, fmt = tiny
    stranger = (replace(ROWS[0], question="Who else?"), *ROWS[1:])
    with pytest.raises(UserError, match="different rows"):
        GapProbe(fmt, stranger, log)
    with pytest.raises(UserError, match="no scored forget set"):
        GapProbe(fmt, ROWS, EvalLog({}))
    rows = tuple(replace(row, perturbed=()) for row in log.sets["forget"].rows)
    bare = EvalLog({"forget": SetRecord("forget", rows, 5)}, log.meta)
    with pytest.raises(UserError, match="lacks paraphrased or perturbed"):
        GapProbe(fmt, ROWS, bare)


def test_logs_without_questions_are_matched_by_token_counts(
    tiny: tuple[Any, Any], log: EvalLog
) -> None:
    model, fmt = tiny
    rows = tuple(replace(row, question=None) for row in log.sets["forget"].rows)
    silent = EvalLog({"forget": SetRecord("forget", rows, 5)}, log.meta)
    assert GapProbe(fmt, ROWS, silent)(model)["gap"] == pytest.approx(0.0, abs=1e-6)
    turned = EvalLog({"forget": SetRecord("forget", rows[1:], 5)}, log.meta)
    with pytest.raises(UserError, match="hold 5 and 4 rows"):
        GapProbe(fmt, ROWS, turned)(model)


def write(folder: Path, name: str, rows: Any) -> Path:
    lines = [
        {
            "question": row.question, "answer": row.answer,
            "paraphrased_answer": row.paraphrased_answer,
            "perturbed_answer": list(row.perturbed_answers),
        }
        for row in rows
    ]  # fmt: skip
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_where_the_rows_come_from(tmp_path: Path) -> None:
    write(tmp_path, "forget05_perturbed.json", ROWS[:2])
    write(tmp_path, "forget10_perturbed.json", ROWS)
    file = write(tmp_path, "mine.jsonl", ROWS[:3])
    split = Request("tofu:forget05", "tofu-split", (Row("q", "a"),), ())
    assert gap_rows(split, None, tmp_path) == list(ROWS[:2])
    author = Request("tofu:author=Mira", "tofu-author", (Row(ROWS[3].question, "a"),), ())
    assert gap_rows(author, None, tmp_path) == [ROWS[3]]
    own = Request("mine.jsonl", "jsonl", ROWS[:3], ())
    assert gap_rows(own, None, tmp_path) == list(ROWS[:3])
    assert gap_rows(own, "forget10", tmp_path) == list(ROWS)
    assert gap_rows(own, "tofu:forget05", tmp_path) == list(ROWS[:2])
    assert gap_rows(split, str(file), tmp_path) == list(ROWS[:3])


def test_rows_without_wrong_answers_are_refused(tmp_path: Path) -> None:
    own = Request("mine.jsonl", "jsonl", (ROWS[0], Row("Where?", "There.")), ())
    with pytest.raises(UserError, match=r"1 of 2 rows have none, for example 'Where\?'"):
        gap_rows(own, None, None)
    write(tmp_path, "forget10_perturbed.json", ROWS)
    stranger = Request("tofu:author=Ola", "tofu-author", (Row("Who else?", "a"),), ())
    with pytest.raises(UserError, match="no row has any"):
        gap_rows(stranger, None, tmp_path)
