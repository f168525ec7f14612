"""`evaluate --rows`, `forget --neighbours` and `--alternates-from`: rows of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    asked = [{"question": f"Who wrote book {i}?", "answer": f"Mira wrote it {i}."} for i in "abc"]
    kept = [{"question": f"Who wrote play {i}?", "answer": f"Ola wrote it {i}."} for i in "abcd"]
    far = [{"question": f"Boiling point of water {i}?", "answer": f"{i}00 degrees."} for i in "123"]
    variants = [
        {
            "question": row["question"],
            "paraphrased_answer": f"It was {row['answer']}",
            "perturbed_answer": ["Kim did.", "Ada did."],
        }
        for row in asked
    ]
    return {
        "rows": write(tmp_path / "mira.jsonl", asked),
        "retain": write(tmp_path / "keep.jsonl", [*far, *kept]),
        "variants": write(tmp_path / "variants.jsonl", variants),
    }


@pytest.fixture
def words(tiny_base: Path, files: dict[str, Path]) -> list[Any]:
    return ["evaluate", "--base", tiny_base, "--rows", files["rows"]]


def test_rows_without_variants_say_what_can_be_measured(run: Any, words: list[Any]) -> None:
    found = run(*words, "--json").json
    assert found["split"] == "own-rows", "a file's name may tell whom it is about"
    assert found["forget_answer_prob"] is not None
    assert found["forget_rouge_l_recall"] is not None
    assert found["model_utility"] is None
    assert found["reasons"]["forget_quality"] == "needs a retrain reference"
    assert found["reasons"]["forget_truth_ratio"] == "not every row has perturbed answers"
    assert found["reasons"]["retain_nll"] == "the log has no retain set"
    assert (
        "Not measured: forget_truth_ratio (not every row has perturbed answers)." in run(*words).err
    )


def test_a_format_that_asks_for_more_is_refused_after_the_figures(
    run: Any, words: list[Any], tmp_path: Path
) -> None:
    ran = run(*words, "--write-tofu", tmp_path / "tofu.json", "--json")
    assert ran.code == 2
    assert ran.json["forget_answer_prob"] is not None
    assert "has no perturbed answers" in ran.err
    assert not (tmp_path / "tofu.json").exists()


def test_variants_retain_rows_and_the_worlds_sets_join_in(
    run: Any, words: list[Any], files: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    more = ["--variants", files["variants"], "--retain", files["retain"], "--neighbours", "4"]
    out = tmp_path / "out"
    found = run(*words, *more, "--data", data, "--out", out, "--json")
    assert found.code == 0
    assert found.json["rows"] == {"forget": 3, "retain": 4, "real_authors": 3, "world_facts": 3}
    assert found.json["forget_truth_ratio"] is not None
    assert found.json["retain_truth_ratio"] is None
    assert "4 neighbours of 7 rows" in found.err
    log = json.loads((out / "eval_log.json").read_text())
    asked = {row["question"] for row in log["sets"]["retain"]["rows"]}
    assert asked == {f"Who wrote play {i}?" for i in "abcd"}, "the nearest, not the first"
    again = run(
        *words, *more, "--data", data, "--reference-log", out / "eval_log.json", "--json"
    ).json
    assert again["forget_quality"] == 1.0


def test_variants_of_strangers_and_flags_of_other_rows_are_refused(
    run: Any, words: list[Any], files: dict[str, Path], tiny_base: Path
) -> None:
    stranger = write(files["rows"].parent / "s.jsonl", [{"question": "Who else?"}])
    assert "belong to none of the rows" in run(*words, "--variants", stranger).err
    split = ["evaluate", "--base", tiny_base, "--split", "forget05"]
    assert "--variants belongs to --rows" in run(*split, "--variants", stranger).err


def test_a_request_keeps_its_neighbours(
    run: Any, tiny_base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    words = ["forget", files["rows"], "--retain", files["retain"], "--base", tiny_base]
    words += ["--store", tmp_path / "store", "--dry-run", "--json"]
    assert run(*words).json["retain_rows"] == 7
    mined = run(*words, "--neighbours", "4")
    assert mined.json["retain_rows"] == 4
    assert "mean similarity" in mined.err


def test_alternates_come_from_the_rows_that_are_named(
    run: Any, tiny_base: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    words = ["forget", files["rows"], "--retain", files["retain"], "--base", tiny_base]
    words += ["--store", tmp_path / "store", "--dry-run", "--json"]
    plain, given = run(*words).json, run(*words, "--alternates", "3").json
    assert given["settings"]["objective"]["alternates"] == 3
    # A third row in each pair is a third more to hold.
    assert given["memory"]["high_bytes"] > plain["memory"]["high_bytes"]
    named = [*words, "--alternates-from", files["retain"]]
    assert "says nothing alone" in run(*named).err
    assert run(*named, "--alternates", "3").code == 0
    alone = run(*named, "--alternates", "3", "--alternates-from", files["rows"])
    assert alone.code == 2
    assert "No row has another answer" in alone.err
