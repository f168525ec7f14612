"""`unlearner tune`: what the search is given, and what is printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

pytest.importorskip("optuna", reason="the search is an extra: pip install 'unlearner[tune]'")

from evaluation.tuning import search as tuning
from ui.cli.main import parse

ROW = {
    "name": "seed 42", "forget_quality": 0.71, "ks": 0.07, "log_r_shift": 0.01,
    "direction": "indistinguishable", "model_utility": 0.8, "forget_answer_prob": 0.1,
    "forget_nll": 4.0, "retain_answer_prob": 0.9, "retain_nll": 0.1, "seed": 42,
    "reached": {"forget_quality": True, "model_utility": True, "forget_nll": True},
}  # fmt: skip
MISSED = {**ROW, "name": "seed 43", "seed": 43, "reached": {**ROW["reached"], "forget_nll": False}}  # type: ignore[dict-item]
FOUND: dict[str, Any] = {
    "tried": 12, "finished": 8, "pruned": 3, "failed": 1,
    "origin": {**ROW, "name": "origin"},
    "chosen": {"trial": 5, "selected": ROW, "held_out": [MISSED]},
    "command": ["unlearner", "forget", "my rows.jsonl", "--base", "b", "--beta", "2.0"],
    "seconds": 61.0,
}  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A request and rows to keep, as files."""
    for name in ("forget", "retain"):
        lines = [{"question": f"Who {name} {i}?", "answer": f"Mira {i}."} for i in range(3)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


@pytest.fixture
def words(rows: Path) -> list[Any]:
    return [
        "tune", rows / "forget.jsonl", "--retain", rows / "retain.jsonl", "--base", "b",
        "--split", "forget05", "--reference-log", "r.json", "--out", rows / "out",
    ]  # fmt: skip


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = create_autospec(tuning.tune, return_value=FOUND)
    monkeypatch.setattr(tuning, "tune", fake)
    return fake


def test_it_prints_what_was_tried_and_a_command_that_can_be_typed(
    run: Any, search: Any, words: list[Any]
) -> None:
    ran = run(*words)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].startswith("tried 12: 8 finished, 3 stopped early, 1 failed; chosen: trial 5")
    assert [line.split()[0] for line in lines[1:3]] == ["name", "origin"]
    assert "seed 42: reaches the goal" in ran.out
    assert "seed 43: misses forget_nll" in ran.out
    assert shlex.split(lines[-1]) == FOUND["command"]
    assert callable(parse(shlex.split(lines[-1])[1:]).run)
    assert run(*words, "--json").json == FOUND


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--data", "."], "data", Path(".")),
        (["--objective", "npo"], "objective", "npo"),
        (["--trials", "7"], "trials", 7),
        (["--minutes", "1.5"], "minutes", 1.5),
        (["--seeds", "5,6"], "seeds", (5, 6)),
        (["--limit", "9"], "limit", 9),
        (["--learning-rate", "1e-3"], "fixed", {"learning_rate": 1e-3}),
    ],
)
def test_a_flag_reaches_the_search(
    flags: list[str], name: str, value: Any, run: Any, search: Any, words: list[Any]
) -> None:
    assert run(*words).code == 0
    assert run(*words, *flags).code == 0
    default, changed = (call.args[0] for call in search.call_args_list)
    assert getattr(default, name) != value
    assert getattr(changed, name) == value
    assert len(default.request.rows) == len(default.request.retain) == 3


def test_what_is_given_is_not_searched_and_ranges_replace_the_table(
    run: Any, search: Any, words: list[Any]
) -> None:
    run(*words, "--beta", "2", "--gamma", "3", "--range", "learning-rate=1e-5:1e-4")
    space = search.call_args.args[0].space
    assert space.keys() == tuning.SPACE.keys() - {"beta", "margin"}
    assert space["learning_rate"] == tuning.Range(1e-5, 1e-4, log=True)
    run(*words, "--objective", "npo")
    assert "margin" not in search.call_args.args[0].space


def test_with_every_setting_given_each_seed_is_measured_once(
    run: Any, search: Any, words: list[Any]
) -> None:
    given = {name: 1 for name in tuning.SPACE if name != "margin"} | {"gamma": 3}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    ran = run(*words, *flags, "--trials", "9")
    assert "Every setting is given" in ran.err
    search.return_value = {**FOUND, "chosen": {**FOUND["chosen"], "trial": None}}
    assert "nothing was searched" in run(*words, *flags).out
    asked = search.call_args.args[0]
    assert (asked.space, asked.seeds) == ({}, (42, 43, 44))


def test_alternates_reach_the_search_and_its_command(
    run: Any, search: Any, words: list[Any], rows: Path
) -> None:
    others = rows / "retain.jsonl"
    run(*words, "--alternates", "2", "--alternates-from", others)
    asked = search.call_args.args[0]
    assert [row.question for row in asked.request.others] == [f"Who retain {i}?" for i in range(3)]
    assert asked.fixed["alternates"] == 2
    assert parse([*asked.words[1:], "--alternates", "2"]).alternates_from == str(others)


def test_the_command_loads_the_base_as_the_search_did(
    run: Any, search: Any, words: list[Any]
) -> None:
    run(*words, "--dtype", "float32", "--load-in-4bit")
    command = parse(list(search.call_args.args[0].words[1:]))
    assert (command.dtype, command.load_in_4bit, command.device) == ("float32", True, "auto")
    assert command.retain == str(words[3])


def test_only_rows_the_base_knows_are_kept(
    run: Any, search: Any, words: list[Any], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evaluation.experiments import small_rows

    fake = create_autospec(small_rows.known_rows, return_value=[2])
    monkeypatch.setattr(small_rows, "known_rows", fake)
    assert run(*words, "--retain-known", "0.4").code == 0
    given = search.call_args.args[0]
    assert [row.question for row in given.request.retain] == ["Who retain 2?"]
    assert fake.call_args.args[2] == 0.4
    kept = rows / "out" / "retain.jsonl"
    assert json.loads(kept.read_text()) == {"question": "Who retain 2?", "answer": "Mira 2."}
    assert given.words[given.words.index("--retain") + 1] == str(kept)
    fake.return_value = []
    assert "gives no retain row" in run(*words, "--retain-known", "0.9").err


def test_an_interrupted_search_continues_by_the_same_command(
    run: Any, search: Any, words: list[Any]
) -> None:
    search.side_effect = KeyboardInterrupt
    ran = run(*words)
    assert ran.code == 130
    assert "Run the same command again" in ran.err
