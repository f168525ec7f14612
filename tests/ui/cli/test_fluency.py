"""`unlearner score --fluency-judge` on logs of a tiny base: figures, set, judge, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def log(run: Any, tiny_base: Path, data: Path, tmp_path: Path) -> Path:
    out = tmp_path / "origin"
    ran = run("evaluate", "--base", tiny_base, "--data", data, "--split", "forget05", "--out", out)
    assert ran.code == 0
    return out / "eval_log.json"


def copied(log: Path, name: str, texts: list[str]) -> Path:
    """The log with other answers to its forget rows, in another folder under the same name."""
    raw = json.loads(log.read_text())
    rows = raw["sets"]["forget"]["rows"]
    for row, text in zip(rows, texts, strict=True):
        row["generations"]["greedy-200-total"]["text"] = text
    path = log.parent.parent / name / log.name
    path.parent.mkdir()
    path.write_text(json.dumps(raw))
    return path


def test_the_answers_of_a_log_are_judged(run: Any, log: Path, tiny_base: Path) -> None:
    ran = run("score", log, "--fluency-judge", tiny_base, "--json")
    assert ran.code == 0
    assert ran.json["model_utility"] is not None, "all other figures are there too"
    found = ran.json["fluency"]
    judged = (found["set"], found["judge"], found["same_questions"])
    assert judged == ("forget", str(tiny_base), True)
    (row,) = found["table"]
    assert (row["log"], row["path"], row["n"]) == ("log", str(log), 3)
    assert row["scored"] + row["empty"] == 3
    low, high = row["judge_nll_interval"]
    assert 0 < low <= row["judge_nll"] <= high
    words = ["--fluency-judge", tiny_base, "--fluency-set", "retain", "--json"]
    other = run("score", log, *words).json["fluency"]
    assert other["set"] == "retain"
    assert other["table"][0]["judge_nll"] != row["judge_nll"]


def test_the_reference_is_judged_beside_the_log(
    run: Any, log: Path, tiny_base: Path, make_tiny_llama: Any, tmp_path: Path
) -> None:
    broken = copied(log, "broken", ["is is is is", "...", "is is is"])
    words: list[Any] = ["score", broken, "--reference-log", log, "--fluency-judge"]
    ran = run(*words, tiny_base)
    assert ran.code == 0
    header, first, second = ran.out.splitlines()[-3:]
    assert header.split()[:4] == ["log", "n", "scored", "empty"]
    assert first.split()[:4] == ["log", "3", "2", "1"]
    assert second.split()[0] == "retain_log"
    row = run(*words, tiny_base, "--json").json["fluency"]["table"][0]
    assert row["distinct_2"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert row["repeated_share"] == pytest.approx(2 / 3)
    assert row["words"] == pytest.approx(7 / 3)
    # Another judge says something else of the same words, and so does another prompt.
    judge = make_tiny_llama(tmp_path / "judge", seed=1)
    other = run(*words, judge, "--json").json["fluency"]["table"][0]
    assert other["judge_nll"] != row["judge_nll"]
    assert other["distinct_2"] == row["distinct_2"]
    plain = run(*words, tiny_base, "--template", "llama2", "--json").json["fluency"]
    assert plain["table"][0]["judge_nll"] != row["judge_nll"]


def test_answers_without_a_word_have_no_loss(run: Any, log: Path, tiny_base: Path) -> None:
    ran = run("score", copied(log, "silent", ["", "!", "..."]), "--fluency-judge", tiny_base)
    assert ran.code == 0
    assert ran.out.splitlines()[-1].split()[3:] == ["3", "-", "-", "0", "0"]
    assert "judge_nll is missing: no answer has a word" in ran.err


def test_what_cannot_be_judged_is_refused_before_the_judge_is_loaded(
    run: Any, log: Path, tmp_path: Path
) -> None:
    raw = json.loads(log.read_text())
    raw["sets"]["forget"]["rows"][1]["generations"] = {}
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(raw))
    judge = ["--fluency-judge", tmp_path / "none"]
    ran = run("score", bare, *judge)
    assert ran.code == 2
    assert f"{bare}: row 2 of forget has no generated answer" in ran.err
    assert "Fix: Measure that model again: `unlearner evaluate" in ran.err
    ran = run("score", log, "--fluency-set", "forgot", *judge)
    assert ran.code == 2
    assert "no rows of a set 'forgot'" in ran.err
    assert "forget, retain" in ran.err
    ran = run("score", log, "--fluency-set", "retain")
    assert (ran.code, "Add --fluency-judge MODEL" in ran.err) == (2, True)


def test_the_help_says_who_may_judge(run: Any) -> None:
    shown = " ".join(run("score", "--help").out.split())
    assert "never saw the forget rows" in shown
    assert "does not make an answer true" in shown
