"""docs/python.md: its code, block by block, on the tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.ui.conftest import KEEP, write_rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
ROWS = [("Who wrote the river?", "Mira Okafor."), ("Where was she born?", "In Lagos.")]


def test_the_page_is_short() -> None:
    assert len(PAGE.read_text(encoding="utf-8").split()) <= 900


def test_every_block_runs(
    tiny_base: Path, make_tofu_of_two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The page's base, data and long trainings are replaced by small ones; nothing else is."""
    import evaluation
    import unlearner
    from unlearner import Request

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNLEARNER_KEY", str(tmp_path / "key"))
    monkeypatch.setenv("UNLEARNER_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "tofu"
    make_tofu_of_two(data, ROWS)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    write_rows(tmp_path / "keep.jsonl", KEEP)
    load, from_tofu = unlearner.load_base, Request.from_tofu
    forget, evaluate = unlearner.forget, evaluation.evaluate
    base = load(tiny_base)
    evaluate(base, "forget05", data=data, out=tmp_path / "made")
    (tmp_path / "made" / "eval_log.json").rename(tmp_path / "retrain.json")
    small = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "warmup_ratio": 0.0}
    small |= {"gradient_accumulation_steps": 1}
    monkeypatch.setattr("unlearner.api.load_base", lambda name, load_in_4bit: load(tiny_base))
    monkeypatch.setattr(
        "unlearner.api.forget", lambda *args, **options: forget(*args, **{**options, **small})
    )
    monkeypatch.setattr("evaluation.api.evaluate", lambda *a, **b: evaluate(*a, data=data, **b))
    monkeypatch.setattr(Request, "from_tofu", lambda name: from_tofu(name, data=data))
    space: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), space)  # the page is ours
    printed = capsys.readouterr().out
    assert "forget() has no setting 'lerning_rate'." in printed
    assert "forget_quality" in printed
    assert (tmp_path / "results" / "eval_log.json").is_file()
    assert len(BLOCKS) >= 7
