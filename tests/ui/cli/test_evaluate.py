"""`unlearner evaluate` on a tiny base and a tiny data folder: figures, files, gates, the stack."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluation import suite
from ui.cli.commands.everyday import evaluate
from ui.cli.output import events as progress_events


@pytest.fixture
def words(tiny_base: Path, data: Path) -> list[Any]:
    return ["evaluate", "--base", tiny_base, "--data", data, "--split", "forget05"]


def test_figures_files_and_forget_quality_against_a_log(
    run: Any, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(*words, "--out", tmp_path / "one", "--json")
    assert first.code == 0
    assert first.json["forget_quality"] is None
    assert {row["name"]: row["n"] for row in first.json["table"]} == {
        "forget": 3, "retain": 3, "real_authors": 3, "world_facts": 3,
    }  # fmt: skip
    log = tmp_path / "one" / "eval_log.json"
    assert first.json["log"] == str(log)
    assert json.loads((tmp_path / "one" / "figures.json").read_text())["split"] == "forget05"
    scored = run("score", log, "--json").json
    assert scored["model_utility"] == first.json["model_utility"]
    assert scored["table"] == first.json["table"]
    # The finished parts are reused: the second run asks the model nothing.
    monkeypatch.setattr(suite, "score_rows", None)
    again = run(*words, "--out", tmp_path / "one", "--reference-log", log, "--json")
    assert again.json["forget_quality"] == 1.0
    assert again.json["ks"] == 0.0


def test_limit_is_said_wherever_a_figure_is(run: Any, words: list[Any], tmp_path: Path) -> None:
    ran = run(*words, "--limit", "2", "--out", tmp_path, "--json")
    assert ran.json["limited"] is True
    assert ran.json["n"] == 2
    assert "limited to the first 2 rows" in ran.err
    assert json.loads((tmp_path / "figures.json").read_text())["limited"] is True


def test_a_gate_that_holds_gives_4_after_the_figures(run: Any, words: list[Any]) -> None:
    ran = run(*words, "--limit", "1", "--fail-if", "model_utility<0.99", "--json")
    assert ran.code == 4
    assert "'model_utility<0.99' holds" in ran.err
    assert ran.json["n"] == 1


def test_without_a_store_the_bare_base_is_evaluated(
    run: Any, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_stack", None)
    ran = run(*words, "--limit", "1", "--json")
    assert ran.json["adapters"] == []
    assert "no adapters" in ran.err


def test_ctrl_c_keeps_the_finished_parts_and_says_how_to_go_on(
    run: Any, words: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = suite.generate_answers
    calls: list[Any] = []

    def stop_at_the_second_batch(*args: Any, **options: Any) -> Any:
        def keep(batch: Any) -> None:
            calls.append(batch)
            if len(calls) == 2:
                raise KeyboardInterrupt
            options["on_batch"](batch)

        return real(*args, **{**options, "on_batch": keep, "batch_size": 1})

    monkeypatch.setattr(suite, "generate_answers", stop_at_the_second_batch)
    ran = run(*words, "--out", tmp_path, "--json")
    assert ran.code == 130
    assert ran.out == ""
    assert "Run the same command again" in ran.err
    assert list((tmp_path / "parts").glob("answers-greedy*"))
    monkeypatch.undo()
    assert run(*words, "--limit", "1", "--json").code == 0


def test_the_batch_size_reaches_the_suite(
    run: Any, words: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = suite.generate_answers

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(options["batch_size"])
        return real(*args, **options)

    monkeypatch.setattr(suite, "generate_answers", spy)
    assert run(*words, "--limit", "1", "--questions-per-batch", "3").code == 0
    assert set(seen) == {3}


def test_progress_counts_from_before_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_events.time, "monotonic", lambda: now[0])
    events: list[dict[str, Any]] = []
    show = progress_events.progress_of(SimpleNamespace(progress=events.append))  # type: ignore[arg-type]
    now[0] = 104.0
    show("forget: scores", 40, 120)
    now[0] = 112.0
    show("forget: scores", 120, 120)
    now[0] = 115.0
    show("forget: answers", 10, 20)
    assert [(e["elapsed"], e["remaining"]) for e in events] == [(4.0, 8.0), (12.0, 0.0), (3.0, 3.0)]


def test_the_stack_is_evaluated_and_its_figures_filed(
    run: Any, words: list[Any], tiny_base: Path, tmp_path: Path
) -> None:
    forget = tmp_path / "forget.jsonl"
    forget.write_text('{"question": "Who wrote forget05 0?", "answer": "Mira wrote 0."}\n')
    retain = tmp_path / "retain.jsonl"
    retain.write_text('{"question": "Who wrote retain 0?", "answer": "Ola wrote 1."}\n')
    store = tmp_path / "store"
    made = run(
        "forget", forget, "--retain", retain, "--base", tiny_base, "--store", store, "--json",
        "--num-train-epochs", "8", "--learning-rate", "1e-2", "--lora-r", "2", "--label", "one",
    )  # fmt: skip
    slug = made.json["name"]
    idle = run(*words, "--store", store, "--limit", "1")
    assert "no adapter of the store is active, so the bare base is measured" in idle.err
    run("adapters", "activate", "one", "--store", store)
    on = run(*words, "--store", store, "--json").json
    off = run(*words, "--store", store, "--adapters", "none", "--json").json
    named = run(*words, "--store", store, "--adapters", "one", "--json").json
    assert (on["adapters"], off["adapters"], named["adapters"]) == ([slug], [], [slug])
    assert on["forget_nll"] == named["forget_nll"] != off["forget_nll"]
    none = run(*words, "--store", store, "--adapters", "one", "--scales", "0", "--json").json
    half = run(*words, "--store", store, "--adapters", "one", "--scales", "0.5", "--json").json
    assert none["forget_nll"] == off["forget_nll"]
    assert half["forget_nll"] not in (on["forget_nll"], off["forget_nll"])
    evals = run("adapters", "show", "one", "--store", store, "--json").json["evals"]
    assert set(evals) == {f"forget05-tofu{end}" for end in ("", "-2", "-3", "-4")}
    assert evals["forget05-tofu"]["forget_nll"] == on["forget_nll"]
    assert "Mira" not in json.dumps(evals)
