"""The examples at the end of each --help, run as they stand in a folder that has what they name."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.ui.conftest import KEEP, write_rows
from ui.cli.main import build_parser

# Trains models or attacks them for minutes, or serves a page: run by tests of their own.
LONG = (
    "bench",
    "gpu-check",
    "quickstart",
    "robustness",
    "sequence",
    "tune",
    "ui",
    "finetune",
    "calibrate",
)
ROWS = [("Who wrote forget05 0?", "Mira wrote 0."), ("Who wrote forget05 1?", "Mira wrote 1.")]
OWN = [("Where was Ada Bell born?", "In Leeds."), ("What did Ada Bell paint?", "Boats.")]
# Before the others: what they name is made by these.
ORDER = ("forget", "config", "doctor", "preview", "evaluate")


def examples() -> list[str]:
    """The lines of all commands that take seconds."""
    leaves = build_parser()[1]
    names = sorted(
        leaves,
        key=lambda name: (name not in ORDER, ORDER.index(name) if name in ORDER else 0, name),
    )
    return [
        line.strip()
        for name in names
        if name not in LONG
        for line in (leaves[name].epilog or "").splitlines()
        if line.strip().startswith("unlearner ")
        and "reproduce tofu-forget05 --preset mini" not in line
    ]


@pytest.mark.slow
def test_the_examples_run_as_they_stand(
    run: Any, tiny_base: Path, make_tofu_of_two: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    make_tofu_of_two(tmp_path / "TOFU", ROWS)
    monkeypatch.setenv("UNLEARNER_DATA", "TOFU")
    for name, rows in (("rows", OWN), ("keep", KEEP), ("a", ROWS), ("b", OWN)):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    shutil.copytree(tiny_base, "B")
    fast = ["--num-train-epochs", "2", "--lora-r", "2"]
    words = ["rows.jsonl", "--retain", "keep.jsonl", "--base", "B", "--store", "S", *fast]
    assert run("forget", *words, "--label", "one").code == 0
    assert run("adapters", "activate", "one", "--store", "S").code == 0
    log = run("evaluate", "--base", "B", "--adapters", "none", "--split", "forget05", "--out", "o")
    assert log.code == 0
    for name in ("retrain", "unlearned", "full", "npo"):
        shutil.copy("o/eval_log.json", f"{name}.json")
    lines = examples()
    assert len(lines) > 15
    for line in lines:
        command, _, target = line.partition(" > ")
        if "consolidate r0001" in command:  # of the two that `forget` has made here
            assert run("adapters", "list").code == 0
        if "--on-stack" in command:
            assert run("adapters", "activate", "r0001").code == 0
        ran = run(*shlex.split(command)[1:])
        assert ran.code == 0, f"{line}\n{ran.err[-1500:]}"
        if target:
            Path(target).write_text(ran.out)
