"""The tutorial's commands, block by block, on a world small enough for a test."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from evaluation.experiments.quickstart import Quickstart, quickstart
from ui.cli import main as cli
from unlearner.baselines.tiny_llama import TinyRecipe, TinyShape
from unlearner.config import make_config

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_of_the_tutorial_is_one() -> None:
    lines = [line for line in commands() if line.startswith("unlearner ")]
    assert len(lines) > 5
    for line in lines:
        cli.parse(shlex.split(line, comments=True)[1:])


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"num_train_epochs": 2, "per_device_train_batch_size": 25, "learning_rate": 1e-3}
    short["gradient_accumulation_steps"] = 1
    quickstart(
        Path("quickstart"),
        lambda event: None,
        Quickstart(
            world={"n_authors": 20, "forget_authors": 4, "evaluated_authors": 6},
            shape=TinyShape(vocab_size=700, hidden_size=64, intermediate_size=128,
                            num_hidden_layers=2),
            recipe=TinyRecipe(epochs=4, pretrain_rows=40),
            background_rows=120,
            simnpo=make_config("simnpo", gamma=1.0, **short),
            npo=make_config("npo", **short),
        ),
    )  # fmt: skip
    lines = commands()
    assert lines[0] == "unlearner quickstart --out quickstart"
    for line in lines[1:]:
        if not line.startswith("unlearner "):
            subprocess.run(line, shell=True, check=True)
            continue
        ran = run(*shlex.split(line)[1:])
        assert ran.code == 0, f"{line}\n{ran.err[-2000:]}"
    assert (tmp_path / "results" / "report" / "report.html").stat().st_size > 20_000
    assert (tmp_path / "released" / "model.safetensors").is_file()
