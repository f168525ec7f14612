"""`unlearner finetune`: the rows of each kind, every flag, a folder that evaluates."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ui.cli.commands.experiments.finetune import TRAIN_FIELDS
from ui.cli.main import parse
from ui.cli.options import LORA_FIELDS, given_settings
from unlearner.baselines import finetune as recipe
from unlearner.baselines.finetune import FinetuneConfig

VALUES = {
    "learning_rate": ("1e-3", 1e-3),
    "num_train_epochs": ("1", 1),
    "per_device_train_batch_size": ("2", 2),
    "gradient_accumulation_steps": ("1", 1),
    "warmup_ratio": ("0.5", 0.5),
    "weight_decay": ("0.2", 0.2),
    "max_length": ("80", 80),
    "gradient_checkpointing": (None, True),
    "protected_directions": ("16", 16),
    "seed": ("3", 3),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """full.json of four rows and retain95.json of the first three."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"question": f"Who wrote {i}?", "answer": f"Mira wrote {i}."} for i in range(4)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "full.json").write_text("".join(lines))
    (folder / "retain95.json").write_text("".join(lines[:3]))
    return folder


def test_every_setting_has_a_case() -> None:
    assert set(VALUES) == {field.name for field in fields(FinetuneConfig)}


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_reaches_the_configuration(name: str) -> None:
    text, value = VALUES[name]
    words = ["finetune", "--kind", "origin", "--base", "b", "--out", "o"]
    flag = "--" + name.replace("_", "-")
    given = given_settings(parse([*words, flag, *([text] if text else [])]), TRAIN_FIELDS)
    assert given == {name: value}
    assert getattr(FinetuneConfig(), name) != value
    assert given_settings(parse(words), TRAIN_FIELDS) == {}


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the recipe would have been given; nothing is trained."""
    seen: list[dict[str, Any]] = []

    def spy(base: Any, rows: Any, out: Path, config: Any, **options: Any) -> Path:
        seen.append({"base": base, "rows": rows, "out": out, "config": config, **options})
        return out

    monkeypatch.setattr(recipe, "finetune", spy)
    return seen


def test_origin_sees_all_rows_and_retrain_all_but_the_split(
    run: Any, data: Path, spied: list[dict[str, Any]], tmp_path: Path
) -> None:
    words = ["finetune", "--base", "b", "--out", tmp_path / "o", "--data", data, "--json"]
    assert run(*words, "--kind", "origin").json["rows"] == 4
    assert run(*words, "--kind", "retrain").json["rows"] == 3
    assert [len(call["rows"]) for call in spied] == [4, 3]
    missing = run(*words, "--kind", "retrain", "--split", "forget01")
    assert missing.code == 2
    assert "no retain99.json" in missing.err


def test_lora_flags_need_lora(
    run: Any, data: Path, spied: list[dict[str, Any]], tmp_path: Path
) -> None:
    words = ["finetune", "--kind", "origin", "--base", "b", "--out", tmp_path / "o", "--data", data]
    ran = run(*words, "--lora-r", "4")
    assert ran.code == 2
    assert "--lora-r says nothing without --lora" in ran.err
    assert run(*words).code == 0
    assert run(*words, "--lora", "--lora-r", "4").code == 0
    assert spied[0]["lora"] is None
    assert spied[1]["lora"].lora_r == 4
    assert set(LORA_FIELDS) == set(vars(spied[1]["lora"]))


def test_a_model_is_trained_and_not_overwritten(
    run: Any, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "origin"
    words = [
        "finetune", "--kind", "origin", "--base", tiny_base, "--out", out, "--data", data,
        "--num-train-epochs", "3", "--json",
    ]  # fmt: skip
    ran = run(*words)
    assert ran.code == 0
    assert ran.json["out"] == str(out)
    assert "loss" in ran.err
    assert (out / "model.safetensors").is_file()
    again = run(*words)
    assert again.code == 2
    assert "exists already" in again.err
