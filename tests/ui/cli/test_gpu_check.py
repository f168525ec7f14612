"""`unlearner gpu-check --small`: the checks themselves, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmark import gpu_check
from tests.conftest import A100, T4

Run = Callable[..., Any]


@pytest.mark.slow
def test_every_check_runs_on_a_cpu_and_the_table_says_so(run: Run, tmp_path: Path) -> None:
    """The package flash-attn needs a GPU; everything else is checked."""
    pytest.importorskip("bitsandbytes")
    found = run("gpu-check", "--small", "--out", tmp_path / "table.md", "--json", "--minutes", 60)
    checks = found.json["checks"]
    wrong = [check for check in checks if check["status"] == "failed"]
    assert not wrong
    assert found.code == 0
    assert [check["name"] for check in checks if check["status"] == "left out"] == [
        "evaluation, bf16, flash_attention_2"
    ]
    assert len(checks) == 16
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n| ") == 1 + len(checks)
    assert "| one step at tiny shape, nf4, 8 pairs, checkpointing all | ok |" in table


@pytest.mark.parametrize(("card", "name"), [(A100, "bf16"), (T4, "fp16")])
def test_a_card_without_bf16_is_checked_in_fp16(
    card: Any, name: str, cards: Any, tmp_path: Path
) -> None:
    cards(card)
    names = [check for check, _ in gpu_check._Bench(tmp_path, "cuda", False).checks()]
    assert sum(name in check for check in names) == 10
    assert not [check for check in names if {"bf16": "fp16", "fp16": "bf16"}[name] in check]


def test_a_failed_check_is_told_and_the_rest_still_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks() -> str:
        raise RuntimeError("CUDA error: an illegal | access\nmore")

    def two(self: Any) -> Any:
        yield "first", breaks
        yield "second", lambda: "3 MiB"

    monkeypatch.setattr(gpu_check._Bench, "checks", two)
    found = run("gpu-check", "--small", "--json")
    assert found.code == 1
    assert [check["status"] for check in found.json["checks"]] == ["failed", "ok"]
    text = run("gpu-check", "--small").out
    assert "| first | failed |" in text
    assert "RuntimeError: CUDA error: an illegal \\| access |" in text
    late = run("gpu-check", "--small", "--json", "--minutes", "1e-9")
    assert {check["status"] for check in late.json["checks"]} == {"left out"}
    assert late.code == 0


def test_without_a_card_it_says_what_to_add(run: Run) -> None:
    found = run("gpu-check")
    assert found.code == 2
    assert "--small" in found.err
