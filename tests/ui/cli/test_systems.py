"""Several systems on one base, and padded batches in place of shared prefixes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from evaluation import suite


@pytest.fixture
def words(tiny_base: Path, data: Path, tmp_path: Path) -> list[Any]:
    store = ["--store", tmp_path / "store"]
    return ["evaluate", "--base", tiny_base, "--data", data, "--split", "forget05", *store]


def test_every_system_is_measured_as_alone(
    run: Any, put: Any, words: list[Any], tmp_path: Path
) -> None:
    """Bit-equal figures: the same batches on the same weights."""
    one, two = put("1"), put("2")
    out = ["--out", tmp_path / "all"]
    made = run(*words, "--systems", f"none;{one};{one},{two}", *out, "--json")
    assert made.code == 0, made.err
    assert [row["name"] for row in made.json["table"]] == ["base", "r0001", "r0001,r0002"]
    for row, refs in zip(made.json["table"], ("none", one, f"{one},{two}"), strict=True):
        alone = run(*words, "--adapters", refs, "--json").json
        for name in ("model_utility", "forget_nll", "retain_nll", "forget_rouge_l_recall"):
            assert row[name] == alone[name]
    nlls = [row["forget_nll"] for row in made.json["table"]]
    assert len(set(nlls)) == 3
    logs = {path.parent.name: path for path in (tmp_path / "all").glob("*/eval_log.json")}
    assert set(logs) == {"base", "r0001", "r0001+r0002"}
    for path in logs.values():
        assert "--systems" in shlex.split(json.loads(path.read_text())["meta"]["command"])


def test_flags_that_do_not_go_together(run: Any, put: Any, words: list[Any]) -> None:
    one = put("1")
    both = run(*words, "--systems", "none", "--adapters", one)
    assert both.code == 2
    gate = run(*words, "--systems", "none", "--fail-if", "model_utility<0.1")
    assert gate.code == 2
    assert run(*words, "--systems", " ; ").code == 2


def test_padded_batches_give_the_same_figures(
    run: Any, words: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[suite.Effort] = []
    real = suite.evaluate
    monkeypatch.setattr(
        suite, "evaluate", lambda *a, **k: seen.append(k["effort"]) or real(*a, **k)
    )
    fast = run(*words, "--adapters", "none", "--json").json
    plain = run(*words, "--adapters", "none", "--plain", "--json").json
    assert [(e.shared, e.drafts) for e in seen] == [(True, True), (False, False)]
    assert plain["model_utility"] == pytest.approx(fast["model_utility"], rel=1e-5)
