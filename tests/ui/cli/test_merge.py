"""`unlearner merge` measures what it wrote, and the card says what was run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unlearner.objectives.registry import OBJECTIVES, OPTION_FORMULAS


@pytest.fixture
def trained(run: Any, tiny_base: Path, tmp_path: Path) -> str:
    """A forget adapter trained by the command line, so that its manifest is a real one."""
    rows = [{"question": "Who wrote it?", "answer": "Mira wrote it."}]
    kept = [{"question": "Where is it?", "answer": "It lies in the hall."}]
    for name, content in (("forget", rows), ("keep", kept)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) for row in content))
    words = ["--num-train-epochs", "3", "--learning-rate", "0.01", "--lora-r", "4", "--seed", "9"]
    words += ["--attack-weight", "0.1", "--beta", "2.5", "--retain-weight", "0.1375"]
    made = run(
        "forget", tmp_path / "forget.jsonl", "--retain", tmp_path / "keep.jsonl", *words,
        "--base", tiny_base, "--store", tmp_path / "store", "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    return str(made.json["name"])


def merge(run: Any, tiny_base: Path, tmp_path: Path, trained: str, *words: Any) -> Any:
    out = tmp_path / "merged"
    store = ["--store", tmp_path / "store", "--adapters", trained]
    return run("merge", "--base", tiny_base, *store, "--out", out, *words, "--json")


def test_without_a_split_the_card_has_the_formula_and_says_not_measured(
    run: Any, tiny_base: Path, tmp_path: Path, trained: str
) -> None:
    assert merge(run, tiny_base, tmp_path, trained).json["figures"] is None
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"| `{trained}` | 1 | simnpo | 32 / 4 | 9 | none | 1 |" in card
    assert f"- `simnpo`: {OBJECTIVES['simnpo'].formula}; " in card
    assert ", beta = 2.5, " in card
    assert "retain_weight = 0.1375" in card
    assert f"; attack_weight = 0.1: {OPTION_FORMULAS['attack_weight']}" in card
    assert OPTION_FORMULAS["alternates"] not in card  # it is off
    assert "Not measured after merging" in card


def test_the_written_files_are_measured_and_differ_from_the_base(
    run: Any, tiny_base: Path, tmp_path: Path, trained: str, data: Path
) -> None:
    evaluate = ["evaluate", "--data", data, "--split", "forget05", "--json"]
    base = run(*evaluate, "--base", tiny_base, "--adapters", "none", "--out", tmp_path / "log").json
    log = tmp_path / "log" / "eval_log.json"
    words = ["--split", "forget05", "--data", data, "--reference-log", log, "--candidates", "3"]
    figures = merge(run, tiny_base, tmp_path, trained, *words).json["figures"]
    merged = run(*evaluate, "--base", tmp_path / "merged", "--adapters", "none").json
    for name, value in figures["before"].items():
        if name not in ("forget_quality", "ks", "log_r_shift"):
            assert value == pytest.approx(base[name], rel=1e-6)
            assert figures["after"][name] == pytest.approx(merged[name], rel=1e-6)
    assert figures["before"]["forget_quality"] == 1.0
    assert figures["after"]["forget_nll"] != figures["before"]["forget_nll"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Protocol `tofu`; after = read back from these files." in card
    assert f"| forget_nll | {base['forget_nll']:.4g} | {merged['forget_nll']:.4g} |" in card
    assert "Selected from 3 candidates." in card
    record = json.loads((tmp_path / "merged" / "MERGE_MANIFEST.json").read_text())
    assert record["after"] == figures["after"]
    assert record["candidates"] == 3


def test_a_limit_is_said_and_a_wrong_protocol_is_refused_before_writing(
    run: Any, tiny_base: Path, tmp_path: Path, trained: str, data: Path
) -> None:
    wrong = merge(run, tiny_base, tmp_path, trained, "--protocol", "tofuu")
    assert wrong.code == 2
    assert not (tmp_path / "merged").exists()
    words = ["--split", "forget05", "--data", data, "--limit", "2", "--protocol", "simnpo"]
    figures = merge(run, tiny_base, tmp_path, trained, *words).json["figures"]
    assert figures["protocol"] == "simnpo, first 2 rows of each set"
