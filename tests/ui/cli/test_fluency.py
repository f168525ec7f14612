"""`unlearner fluency` on logs of a tiny base: figures, two logs, the set, the judge, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ui.cli.commands.everyday.fluency import short_names


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


def test_a_log_of_this_tool_is_judged(run: Any, log: Path, tiny_base: Path) -> None:
    ran = run("fluency", log, "--judge", tiny_base, "--json")
    assert ran.code == 0
    found = ran.json
    assert (found["set"], found["judge"], found["same_questions"]) == (
        "forget", str(tiny_base), True,
    )  # fmt: skip
    (row,) = found["table"]
    assert (row["log"], row["path"], row["n"]) == ("eval_log.json", str(log), 3)
    assert row["scored"] + row["empty"] == 3
    low, high = row["judge_nll_interval"]
    assert 0 < low <= row["judge_nll"] <= high
    other = run("fluency", log, "--judge", tiny_base, "--set", "retain", "--json").json
    assert other["set"] == "retain"
    assert other["table"][0]["judge_nll"] != row["judge_nll"]


def test_two_logs_stand_beside_each_other(
    run: Any, log: Path, tiny_base: Path, make_tiny_llama: Any, tmp_path: Path
) -> None:
    broken = copied(log, "broken", ["is is is is", "...", "is is is"])
    ran = run("fluency", log, broken, "--judge", tiny_base)
    assert ran.code == 0
    header, first, second = ran.out.splitlines()
    assert header.split()[:4] == ["log", "n", "scored", "empty"]
    assert first.startswith("origin/eval_log.json")
    assert second.split()[:4] == ["broken/eval_log.json", "3", "2", "1"]
    row = run("fluency", log, broken, "--judge", tiny_base, "--json").json["table"][1]
    assert row["distinct_2"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert row["repeated_share"] == pytest.approx(2 / 3)
    assert row["words"] == pytest.approx(7 / 3)
    # Another judge says something else of the same words, and so does another prompt.
    judge = make_tiny_llama(tmp_path / "judge", seed=1)
    other = run("fluency", broken, "--judge", judge, "--json").json["table"][0]
    assert other["judge_nll"] != row["judge_nll"]
    assert other["distinct_2"] == row["distinct_2"]
    plain = run("fluency", broken, "--judge", tiny_base, "--template", "llama2", "--json").json
    assert plain["table"][0]["judge_nll"] != row["judge_nll"]


def test_answers_without_a_word_are_said_to_be_missing(
    run: Any, log: Path, tiny_base: Path
) -> None:
    ran = run("fluency", copied(log, "silent", ["", "!", "..."]), "--judge", tiny_base)
    assert ran.code == 0
    assert ran.out.splitlines()[1].split()[3:] == ["3", "-", "-", "0", "0"]
    assert "judge_nll is missing: no answer has a word" in ran.err


def test_logs_of_other_questions_are_told(run: Any, log: Path, tiny_base: Path) -> None:
    other = copied(log, "other", ["one", "two", "three"])
    other.write_text(other.read_text().replace("Who wrote forget05 1?", "Who sang it?"))
    ran = run("fluency", log, other, "--judge", tiny_base, "--json")
    assert ran.json["same_questions"] is False
    assert "do not ask the same questions" in ran.err


def test_what_cannot_be_judged_is_refused_before_the_judge_is_loaded(
    run: Any, log: Path, tmp_path: Path
) -> None:
    raw = json.loads(log.read_text())
    raw["sets"]["forget"]["rows"][1]["generations"] = {}
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(raw))
    ran = run("fluency", log, bare, "--judge", tmp_path / "none")
    assert ran.code == 2
    assert f"{bare}: row 2 of forget has no generated answer" in ran.err
    assert "Fix: Measure that model again: `unlearner evaluate" in ran.err
    ran = run("fluency", log, "--set", "forgot", "--judge", tmp_path / "none")
    assert ran.code == 2
    assert "no rows of a set 'forgot'" in ran.err
    assert "forget, retain" in ran.err
    ran = run("fluency", tmp_path / "no.json", "--judge", tmp_path / "none")
    assert (ran.code, "There is no evaluation log" in ran.err) == (2, True)
    ran = run("fluency", log)
    assert (ran.code, "required: --judge" in ran.err) == (2, True)


def test_the_help_says_who_may_judge(run: Any) -> None:
    shown = " ".join(run("fluency", "--help").out.split())
    assert "never saw the forget rows" in shown
    assert "does not make it true" in shown


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.json"], ["x.json"]),
        (["a/x.json", "a/y.json"], ["x.json", "y.json"]),
        (["a/x.json", "b/x.json"], ["a/x.json", "b/x.json"]),
        (["x.json", "b/x.json"], ["x.json", "b/x.json"]),
        (["/a/x.json", "/a/x.json"], ["/a/x.json", "/a/x.json"]),
    ],
)
def test_logs_are_called_by_the_shortest_end_of_their_paths(
    paths: list[str], names: list[str]
) -> None:
    assert short_names([Path(path) for path in paths]) == names
