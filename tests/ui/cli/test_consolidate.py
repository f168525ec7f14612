"""`unlearner consolidate`, and the flags of `forget` that concern earlier requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--num-train-epochs", "2", "--lora-r", "2", "--lora-alpha", "4", "--learning-rate", "0.01")
TEXTS = {
    "a": [("Who wrote the novel about the river?", "Mira Okafor wrote it.")],
    "b": [("Where was he born?", "He was born in Lagos in 1961."), ("Has he a pet?", "A parrot.")],
    "keep": [("What genre does she write?", "Crime."), ("Who is her editor?", "Her sister.")],
}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = {}
    for name, pairs in TEXTS.items():
        made[name] = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"question": q, "answer": a}) for q, a in pairs]
        made[name].write_text("\n".join(lines))
    return made


@pytest.fixture
def words(tmp_path: Path, tiny_base: Path, files: dict[str, Path]) -> list[Any]:
    store = ["--store", tmp_path / "store"]
    return [*QUICK, "--base", tiny_base, "--retain", files["keep"], *store, "--json"]


def test_two_requests_become_one_that_takes_their_place(
    run: Any, files: dict[str, Path], words: list[Any], tmp_path: Path
) -> None:
    store = ["--store", tmp_path / "store"]
    one = run("forget", files["a"], *words).json["name"]
    run("adapters", "activate", one, *store)
    two = run("forget", files["b"], *words, "--guard", files["a"]).json["name"]
    run("adapters", "activate", two, *store)
    rows = ["--rows", files["a"], "--rows", files["b"]]
    planned = run("consolidate", one, two, *rows, *words, "--dry-run").json
    assert planned["replaces"] == [one, two]
    assert (planned["forget_rows"], planned["retain_rows"], planned["parents"]) == (3, 2, [])
    made = run("consolidate", one, two, *rows, *words)
    assert made.code == 0, made.err
    assert (made.json["policy"], made.json["rows"]) == ("consolidate", 3)
    run("adapters", "activate", made.json["name"], *store)
    listed = run("adapters", "list", *store, "--json").json
    assert listed["active"] == [made.json["name"]]
    assert [row["status"] for row in listed["table"]] == ["superseded", "superseded", "active"]


def test_missing_rows_of_a_replaced_request_are_refused(
    run: Any, files: dict[str, Path], words: list[Any]
) -> None:
    one = run("forget", files["b"], *words).json["name"]
    refused = run("consolidate", one, "--rows", files["a"], *words)
    assert refused.code == 2
    assert f"2 of 2 rows of {one} are not among the rows given" in refused.err


def test_consolidating_needs_a_store(run: Any, files: dict[str, Path], words: list[Any]) -> None:
    refused = run("consolidate", "r0001", "--rows", files["a"], *words)
    assert refused.code == 2
    assert "There is no store" in refused.err


def test_guard_and_teacher_are_said_and_counted(
    run: Any, files: dict[str, Path], words: list[Any], tmp_path: Path
) -> None:
    one = run("forget", files["a"], *words, "--keep-teacher").json["name"]
    assert len(list((tmp_path / "home" / "teachers").iterdir())) == 1
    run("adapters", "activate", one, "--store", tmp_path / "store")
    plan = run("forget", files["b"], *words, "--guard", files["a"], "--dry-run")
    assert plan.json["guard_rows"] == 1
    trained = run("forget", files["b"], *words)
    assert "guarded rows of earlier requests: 1" in trained.err
    assert len(list((tmp_path / "home" / "teachers").iterdir())) == 1  # not asked for again


def test_a_dry_run_says_whose_retain_rows_are_left_out(
    run: Any, files: dict[str, Path], words: list[Any], tmp_path: Path
) -> None:
    one = run("forget", files["a"], *words).json["name"]
    run("adapters", "activate", one, "--store", tmp_path / "store")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(files["keep"].read_text() + "\n" + files["a"].read_text())
    plan = run("forget", files["b"], *words[:-1], "--retain", mixed, "--dry-run")
    assert f"retain rows that belong to {one} and are left out: 1" in plan.err
    assert "retain 2 rows" in plan.out
