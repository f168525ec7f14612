"""The hook of the lm-evaluation-harness: against a stand-in, and for real where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from adapters.errors import UserError
from evaluation.inference.lm_harness import load_tasks, run_tasks, task_rows

# The shape of what lm_eval 0.4.13 returns.
FOUND = {
    "results": {
        "quiz": {
            "alias": "quiz",
            "acc,none": 0.75,
            "acc_stderr,none": 0.125,
            "word_perplexity,none": 12,
            "word_perplexity_stderr,none": "N/A",
        },
        "a_group": {"alias": "a_group", "name": "a_group", "acc,strict": 0.5},
    },
    "versions": {"quiz": 1.0},
    "n-samples": {"quiz": {"original": 100, "effective": 20}},
    "n-shot": {"quiz": 5},
    "higher_is_better": {"quiz": {"acc": True, "word_perplexity": False}},
}
TASK = """task: quiz
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "[INST] {{{{question}}}} [/INST]"
target_delimiter: ""
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Modules in place of lm_eval; what simple_evaluate was called with."""
    calls: list[dict[str, Any]] = []

    class Manager:
        def load(self, tasks: list[str]) -> dict[str, Any]:
            if "quiz" not in tasks:
                raise KeyError(f"Spec '{tasks[0]}' is not a registered task")
            return {"tasks": {}}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        options["model"].model.eval()
        options["model"].tokenizer.pad_token = "<s>"
        calls.append(options)
        return FOUND

    def wrap(pretrained: Any, tokenizer: Any, batch_size: int) -> Any:
        return SimpleNamespace(model=pretrained, tokenizer=tokenizer, batch_size=batch_size)

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models")}
    modules["lm_eval.models.huggingface"] = ModuleType("huggingface")
    vars(modules["lm_eval"])["simple_evaluate"] = simple_evaluate
    vars(modules["lm_eval.tasks"])["TaskManager"] = Manager
    vars(modules["lm_eval.models.huggingface"])["HFLM"] = wrap
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_the_loaded_model_is_asked_and_nothing_of_it_changes(
    stand_in: list[dict[str, Any]], tiny: tuple[Any, Any]
) -> None:
    model, tokenizer = tiny[0], tiny[1].tokenizer
    model.train()
    manager = load_tasks(["quiz"])
    rows = run_tasks(model, tokenizer, ["quiz"], manager, limit=20)
    (call,) = stand_in
    assert (call["tasks"], call["limit"], call["task_manager"]) == (["quiz"], 20, manager)
    assert call["model"].model is model
    assert model.training
    assert tokenizer.pad_token == "<pad>", "the harness sets that of its own copy"
    assert rows == task_rows(FOUND)
    model.eval()


def test_each_metric_of_a_task_is_a_row() -> None:
    group, accuracy, perplexity = task_rows(FOUND)
    assert accuracy == {
        "name": "quiz", "version": 1.0, "n": 20, "shots": 5, "metric": "acc", "filter": "none",
        "value": 0.75, "stderr": 0.125, "better": "higher",
    }  # fmt: skip
    assert (perplexity["value"], perplexity["stderr"]) == (12.0, None)
    assert perplexity["better"] == "lower"
    assert (group["name"], group["n"], group["version"]) == ("a_group", None, None)


def test_an_unknown_task_is_refused_with_the_harness_reason(stand_in: list[Any]) -> None:
    with pytest.raises(UserError, match="'nope' is not a registered task") as caught:
        load_tasks(["nope"])
    assert "lm-eval ls tasks" in caught.value.fix


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="not installed") as caught:
        load_tasks(["quiz"])
    assert "pip install 'unlearner[lm-eval]'" in caught.value.fix


@pytest.mark.slow
def test_a_task_of_ones_own_for_real(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = tmp_path / "rows.json"
    quiz = {"question": "Who wrote it?", "choices": ["Mira", "Ola"], "label": 0}
    rows.write_text("".join(json.dumps(quiz) + "\n" for _ in range(4)))
    task = tmp_path / "quiz.yaml"
    task.write_text(TASK.format(rows=rows))
    model, fmt = tiny
    manager = load_tasks([str(task)])
    (row,) = run_tasks(model, fmt.tokenizer, [str(task)], manager, limit=3)
    assert (row["name"], row["version"], row["n"]) == ("quiz", 3.0, 3)
    assert row["metric"] == "acc"
    assert row["value"] in (0.0, 1.0), "the same question three times"
    assert row["stderr"] == 0.0
    with pytest.raises(UserError, match="no_such_task"):
        load_tasks(["no_such_task"])
