"""Several systems on one base, the plain way, and the optional engine."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from evaluation import suite
from evaluation.inference.engines import VllmEngine
from evaluation.inference.generation import Prompt


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


def test_the_plain_way_takes_another_road_to_the_same_figures(
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


def test_vllm_is_asked_for_by_its_name(
    run: Any, put: Any, words: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    missing = run(*words, "--adapters", "none", "--engine", "vllm")
    assert missing.code == 2
    assert "needs the package vllm" in missing.err
    several = run(*words, "--adapters", f"{put('1')},{put('2')}", "--engine", "vllm")
    assert several.code == 2
    assert "runs one adapter" in several.err


class FakeVllm(ModuleType):
    """The part of vLLM's interface that is used, writing down what it is asked."""

    __spec__: Any = SimpleNamespace(name="vllm")

    def __init__(self) -> None:
        super().__init__("vllm")
        self.__spec__ = SimpleNamespace(name="vllm")
        self.asked: list[Any] = []
        self.SamplingParams = lambda **settings: settings

    def LLM(self, **settings: Any) -> Any:
        self.asked.append(settings)

        def generate(prompts: Any, params: Any, lora_request: Any, use_tqdm: bool) -> Any:
            self.asked.append((prompts, params, lora_request))
            out = SimpleNamespace(outputs=[SimpleNamespace(token_ids=(7, 8, 2))])
            return [out for _ in prompts]

        return SimpleNamespace(generate=generate)


def test_what_vllm_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeVllm()
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = lambda *words: words  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.lora", ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    engine = VllmEngine(tmp_path, tmp_path / "adapter", 12)
    assert engine([Prompt([1, 5], 9)], [2]) == [[7, 8, 2]]
    assert fake.asked[0]["max_lora_rank"] == 16
    prompts, (settings,), lora = fake.asked[1]
    assert prompts == [{"prompt_token_ids": [1, 5]}]
    assert (settings["temperature"], settings["max_tokens"]) == (0.0, 9)
    assert settings["stop_token_ids"] == [2]
    assert lora == ("unlearned", 1, str(tmp_path / "adapter"))
