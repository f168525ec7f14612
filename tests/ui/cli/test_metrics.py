"""`unlearner evaluate --metrics` and `--lm-eval`: figures, files, gates and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.inference import token_suite
from evaluation.logs.token_records import read_records
from evaluation.metrics.privacy import BETTER, GROUPS
from ui.cli.commands.everyday import evaluate_metrics
from ui.cli.commands.everyday.evaluate_metrics import METRICS


@pytest.fixture
def holdout(tmp_path: Path) -> Path:
    path = tmp_path / "new.jsonl"
    rows = [{"question": f"Who sang {i}?", "answer": f"Ida sang {i} first."} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def words(tiny_base: Path, data: Path) -> list[Any]:
    return [
        "evaluate", "--base", tiny_base, "--data", data, "--split", "forget05", "--limit", "2",
        "--adapters", "none",
    ]  # fmt: skip


def test_the_flag_names_the_groups_of_figures() -> None:
    assert tuple(GROUPS) == METRICS
    assert sorted(key for keys in GROUPS.values() for key in keys) == sorted(BETTER)


def test_all_metrics_stand_beside_the_figures_and_in_a_file(
    run: Any, words: list[Any], holdout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*words, "--metrics", "all", "--holdout", holdout, "--out", tmp_path / "a"]
    first = run(*asked, "--json")
    assert first.code == 0
    assert first.json["token_rows"] == {"forget": 2, "retain": 2, "holdout": 2}
    assert first.json["n"] == 2
    assert 0 <= first.json["mia_min_k_auc"] <= 1
    assert first.json["reasons"]["privleak"].startswith("needs the token metrics")
    assert first.json["better"]["mia_loss_auc"] == "one half"
    assert first.json["better"]["model_utility"] == "higher"
    path = tmp_path / "a" / "token_metrics.json"
    assert f"Wrote {path}" in first.err
    records = read_records(path)
    assert records.meta["holdout"] == str(holdout)
    assert json.loads((tmp_path / "a" / "figures.json").read_text())["mia_zlib_auc"] is not None
    # Finished sets are reused, and the model against itself leaks nothing more.
    monkeypatch.setattr(token_suite, "answer_tokens", None)
    again = run(*asked, "--retain-metrics", path, "--json").json
    assert again["privleak"] in (0.0, None)
    assert again["retrain_mia_loss_auc"] == again["mia_loss_auc"] == first.json["mia_loss_auc"]


def test_without_the_flag_nothing_more_is_measured(
    run: Any, words: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_suite, "measure_tokens", None)
    found = run(*words, "--json").json
    assert "token_rows" not in found
    assert "lm_eval" not in found


def test_one_group_is_measured_alone_and_printed(run: Any, words: list[Any]) -> None:
    ran = run(*words, "--metrics", "extraction,kl")
    assert ran.code == 0
    assert "forget_extraction_strength" in ran.out
    assert "mia_" not in ran.out
    assert "Not measured: retain_kl (no adapter was active" in ran.err


def test_a_stack_is_held_against_its_base(
    run: Any, words: list[Any], put: Any, tmp_path: Path
) -> None:
    slug = put("1")
    words = [*words[:-2], "--store", tmp_path / "store", "--adapters", slug]
    found = run(*words, "--metrics", "kl", "--fail-if", "retain_kl>0.0001", "--json")
    assert found.code == 4
    assert found.json["retain_kl"] > 1e-4
    low, high = found.json["retain_kl_interval"]
    assert low <= found.json["retain_kl"] <= high


def test_gates_take_what_is_measured_and_nothing_else(
    run: Any, words: list[Any], holdout: Path
) -> None:
    asked = [*words, "--metrics", "membership", "--holdout", holdout]
    assert run(*asked, "--fail-if", "mia_loss_auc>=0").code == 4
    assert run(*asked, "--fail-if", "mia_loss_auc>1").code == 0
    unmeasured = run(*asked, "--fail-if", "privleak<-50")
    assert unmeasured.code == 4
    assert "cannot be checked (needs the token metrics" in unmeasured.err
    refused = run(*words, "--fail-if", "mia_loss_auc>0.9")
    assert refused.code == 2
    assert "no figure 'mia_loss_auc'" in refused.err


def test_the_reference_base_is_asked(
    run: Any, words: list[Any], holdout: Path, tiny_base: Path, make_tiny_llama: Any, tmp_path: Path
) -> None:
    asked = [*words, "--metrics", "membership", "--holdout", holdout]
    other = make_tiny_llama(tmp_path / "other", seed=3)
    assert run(*asked, "--reference", tiny_base, "--json").json["mia_reference_auc"] == 0.5
    found = run(*asked, "--reference", other, "--out", tmp_path / "b", "--json").json
    assert found["mia_reference_auc"] is not None
    scores = read_records(tmp_path / "b" / "token_metrics.json").rows("holdout")[0].scores
    assert scores["reference"] != 0.0


def test_the_splits_own_holdout_is_the_default(
    run: Any, words: list[Any], data: Path, holdout: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "with-holdout"
    folder.mkdir()
    for path in data.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "holdout05.json").write_bytes(holdout.read_bytes())
    asked = [*words, "--metrics", "membership", "--out", tmp_path / "c", "--json"]
    asked[asked.index(data)] = folder
    assert run(*asked).json["token_rows"]["holdout"] == 2
    assert read_records(tmp_path / "c" / "token_metrics.json").meta["holdout"] == "holdout05"


def test_forgotten_rows_are_no_holdout(run: Any, words: list[Any], data: Path) -> None:
    ran = run(*words, "--metrics", "membership", "--holdout", data / "forget05_perturbed.json")
    assert ran.code == 2
    assert "3 holdout rows are forget rows too" in ran.err


def test_metrics_of_a_retrained_model_are_checked_before_a_model_is_loaded(
    run: Any, words: list[Any], holdout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ui.cli import models

    asked = [*words, "--metrics", "membership", "--holdout", holdout]
    assert run(*asked, "--out", tmp_path / "d").code == 0
    kept = tmp_path / "d" / "token_metrics.json"
    monkeypatch.setattr(models, "load_base", None)
    whole = [word for word in asked if word not in ("--limit", "2")]
    for words_, path, problem in (
        (asked, "/none.json", "no token metrics file /none.json"),
        ([*asked, "--protocol", "open-unlearning"], kept, "differ in the length of a cut"),
        (whole, kept, "hold different rows"),
    ):
        ran = run(*words_, "--retain-metrics", path)
        assert ran.code == 2
        assert problem in ran.err


def test_tasks_of_the_harness_are_run_on_the_loaded_model(
    run: Any, words: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"name": "quiz", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 2, "version": 1}
    seen: list[Any] = []

    def run_tasks(model: Any, tokenizer: Any, tasks: list[str], manager: Any, **more: Any) -> Any:
        seen.append((tasks, manager, more))
        assert model.config.model_type == "llama"
        return [row]

    monkeypatch.setattr(evaluate_metrics, "load_tasks", lambda tasks: f"manager of {tasks}")
    monkeypatch.setattr(evaluate_metrics, "run_tasks", run_tasks)
    assert run(*words, "--lm-eval", "quiz,other", "--json").json["lm_eval"] == [row]
    assert seen == [(["quiz", "other"], "manager of ['quiz', 'other']", {"limit": 2})]
    assert "quiz" in run(*words, "--lm-eval", "quiz").out


def test_several_systems_take_no_metrics(run: Any, words: list[Any], holdout: Path) -> None:
    words = words[:-2]
    for more in (["--metrics", "kl"], ["--lm-eval", "quiz"]):
        ran = run(*words, "--systems", "none", *more)
        assert ran.code == 2
        assert "for one system" in ran.err
