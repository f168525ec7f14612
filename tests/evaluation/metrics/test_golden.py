"""The official code's figures on public logs, to 1e-9, and our logs read back by that code."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_2samp

from evaluation.logs import read_log
from evaluation.logs.records import RECORDED, EvalLog, write_json, write_log
from evaluation.logs.tofu import to_tofu
from evaluation.metrics.summary import summarise, write_open_unlearning
from evaluation.metrics.text import rouge_recall

LOGS = ("llama2-7b_full.json", "llama2-7b_retain90_npo.json", "llama2-7b_retain90_tofu.json")


@lru_cache
def log_of(folder: Path, name: str) -> EvalLog:
    return read_log(folder / name)


@pytest.fixture(scope="module")
def logs(shared: Path) -> dict[str, EvalLog]:
    return {name: log_of(shared / "reference-logs", name) for name in LOGS}


@pytest.fixture(scope="module")
def published(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "reference-logs" / "published.json").read_text())


def figures(log: EvalLog, protocol: str) -> dict[str, float]:
    found = summarise(log, protocol=protocol, resamples=0)
    return found["model_utility_parts"] | {
        "Forget ROUGE": found["forget_rouge_l_recall"],
        "Forget Probability": found["forget_answer_prob"],
        "Forget Truth Ratio": found["forget_truth_ratio"],
        "Model Utility": found["model_utility"],
    }


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize(
    ("kind", "protocol"), [("geometric", "tofu"), ("arithmetic", "tofu-paper")]
)
def test_model_utility_and_its_parts_are_the_published_ones(
    logs: dict[str, EvalLog], published: dict[str, Any], name: str, kind: str, protocol: str
) -> None:
    assert figures(logs[name], protocol) == pytest.approx(
        published["model_utility"][name][kind], abs=1e-9
    )


def test_forget_quality_of_every_pair_is_the_published_one(
    logs: dict[str, EvalLog], published: dict[str, Any]
) -> None:
    for pair in published["forget_quality"]:
        found = summarise(logs[pair["log"]], logs[pair["retain_log"]], resamples=0)
        assert found["forget_quality"] == pytest.approx(pair["p"], rel=1e-9, abs=1e-9)
        assert found["ks"] == pytest.approx(pair["ks"], abs=1e-9)
        assert found["n"] == pair["n"]


def test_a_model_trained_on_the_forget_set_is_under_forgotten(logs: dict[str, EvalLog]) -> None:
    full, retrain, other = (logs[LOGS[i]] for i in (0, 2, 1))
    origin = summarise(full, retrain)
    assert origin["direction"] == "under-forgotten"
    low, high = origin["log_r_shift_interval"]
    assert low <= origin["log_r_shift"] <= high < 0
    assert summarise(retrain, full)["direction"] == "over-forgotten"
    assert summarise(other, retrain)["direction"] == "indistinguishable"
    assert origin["forget_nll"] < 0.1 < origin["retrain_forget_nll"]


def test_two_retrained_models_give_the_band(logs: dict[str, EvalLog]) -> None:
    full, npo, tofu = (logs[name] for name in LOGS)
    band = summarise(full, tofu, second_retain_log=npo, resamples=50)["retrain_band"]
    assert band["forget_quality"] == pytest.approx(0.9879477457246794, abs=1e-9)
    assert band["direction"] == "indistinguishable"


def test_recorded_rouge_is_what_we_compute_from_the_recorded_answers(
    logs: dict[str, EvalLog],
) -> None:
    for name in ("forget", "real_authors"):
        rows = logs[LOGS[2]].sets[name].rows
        made = [row.generations[RECORDED] for row in rows]
        ours = rouge_recall([m.text or "" for m in made], [row.answer or "" for row in rows])
        np.testing.assert_allclose(
            [m.rouge_l_recall for m in ours], [m.rouge_l_recall for m in made], atol=1e-12
        )
        np.testing.assert_allclose(
            [m.rouge1_recall for m in ours], [m.rouge1_recall for m in made], atol=1e-12
        )


@pytest.mark.parametrize("layout", ["dict", "list"])
def test_a_log_survives_our_format_and_tofus(
    logs: dict[str, EvalLog], tmp_path: Path, layout: Any
) -> None:
    log = logs[LOGS[1]]
    assert read_log(write_log(log, tmp_path / "ours.json")) == log
    tasks = to_tofu(log)
    if layout == "list":  # as NPO and Unlearn-Simple write it
        tasks = {
            task: {key: list(values.values()) for key, values in columns.items()}
            for task, columns in tasks.items()
        }
    theirs = read_log(write_json(tmp_path / "tofu.json", tasks))
    assert theirs.sets == log.sets
    assert figures(theirs, "tofu") == figures(log, "tofu")


def official_model_utility(raw: dict[str, Any]) -> float:
    """TOFU's aggregation as its paper and code describe it, on the raw columns of a log."""
    parts = []
    for task, columns in raw.items():
        if "forget" in task:
            continue
        loss, wrong, right = (
            np.array(list(columns[key].values()))
            for key in ("avg_gt_loss", "average_perturb_loss", "avg_paraphrased_loss")
        )
        prob = np.exp(-loss)
        if "eval_log" not in task:
            prob = prob / (prob + np.exp(-wrong).sum(-1))
        ratio = np.exp(right - wrong.mean(-1))
        parts += [
            prob.mean(),
            np.array(list(columns["rougeL_recall"].values())).mean(),
            np.maximum(0, 1 - ratio).mean(),
        ]
    return len(parts) / sum(1 / part for part in parts)


def test_tofus_own_aggregation_reads_what_we_write(
    logs: dict[str, EvalLog], published: dict[str, Any]
) -> None:
    for name in LOGS:
        written = json.loads(json.dumps(to_tofu(logs[name])))
        expected = published["model_utility"][name]["geometric"]["Model Utility"]
        assert official_model_utility(written) == pytest.approx(expected, abs=1e-9)


def as_open_unlearning(log: EvalLog) -> dict[str, Any]:
    """The rows as open-unlearning's evaluator files them: one object a metric, rows by index."""
    raw: dict[str, Any] = {"model_utility": {"agg_value": 0.6}}
    prefixes = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
    for name, prefix in prefixes.items():
        rows = log.sets[name].rows
        columns: dict[str, list[Any]] = {
            "Q_A_Prob": [{"avg_loss": row.answer_score.mean_nll} for row in rows],
            "Q_A_PERT_Prob": [{"avg_loss": [s.mean_nll for s in row.perturbed]} for row in rows],
            "Q_A_ROUGE": [
                {
                    "rouge1_recall": row.generations[RECORDED].rouge1_recall,
                    "rougeL_recall": row.generations[RECORDED].rouge_l_recall,
                    "input": f"system\n\nYou are helpful.user\n\n{row.question}assistant\n\n",
                    "ground_truth": row.answer,
                    "generation": row.generations[RECORDED].text,
                }
                for row in rows
            ],
        }
        if prefix in ("forget", "retain"):
            columns["Q_A_PARA_Prob"] = [{"avg_loss": r.paraphrase.mean_nll} for r in rows]
        for metric, cells in columns.items():
            raw[f"{prefix}_{metric}"] = {
                "agg_value": 0.5,
                "value_by_index": {str(i): cell for i, cell in enumerate(cells)},
            }
    return raw


def scored_once(log: EvalLog) -> EvalLog:
    sets = dict(log.sets)
    for name in ("real_authors", "world_facts"):
        rows = tuple(replace(row, paraphrase=row.answer_score) for row in sets[name].rows)
        sets[name] = replace(sets[name], rows=rows)
    return replace(log, sets=sets)


def test_open_unlearnings_log_gives_the_same_figures(
    logs: dict[str, EvalLog], tmp_path: Path
) -> None:
    # open-unlearning scores the answers of real authors once, TOFU twice, apart by bf16 noise.
    log, reference = scored_once(logs[LOGS[0]]), logs[LOGS[2]]
    theirs = read_log(write_json(tmp_path / "TOFU_EVAL.json", as_open_unlearning(log)))
    assert theirs.meta["format"] == "open-unlearning"
    assert theirs.sets["forget"].rows[7].question == log.sets["forget"].rows[7].question
    expected = summarise(log, reference, resamples=0)
    found = summarise(theirs, reference, resamples=0)
    assert found["rows_matched_by"] == "question"
    for key in ("forget_quality", "model_utility", "forget_nll", "retain_truth_ratio"):
        assert found[key] == pytest.approx(expected[key], rel=1e-9), key


@pytest.mark.parametrize("protocol", ["tofu-paper"])
def test_what_we_write_for_open_unlearning_is_read_back_and_aggregates_alike(
    logs: dict[str, EvalLog], tmp_path: Path, protocol: str
) -> None:
    log, reference = scored_once(logs[LOGS[0]]), logs[LOGS[2]]
    rows, summary = write_open_unlearning(log, tmp_path, reference, protocol)
    expected = summarise(log, reference, protocol=protocol, resamples=0)
    again = summarise(read_log(rows), reference, protocol=protocol, resamples=0)
    for key in ("forget_quality", "model_utility", "forget_nll", "forget_rouge_l_recall"):
        assert again[key] == pytest.approx(expected[key], rel=1e-9), key
    found = json.loads(summary.read_text())
    assert found["forget_quality"] == expected["forget_quality"]
    assert found["model_utility"] == expected["model_utility"]
    assert found["ra_Q_A_Prob_normalised"] == expected["real_authors_answer_prob"]
    assert found["forget_Q_A_Prob"] == pytest.approx(expected["forget_answer_prob"], rel=1e-12)
    assert found["wf_Q_A_ROUGE"] == pytest.approx(expected["world_facts_rouge_l_recall"])
    assert list(found) == sorted(found)


def test_open_unlearnings_own_test_reads_our_log_as_a_reference(
    logs: dict[str, EvalLog], tmp_path: Path
) -> None:
    """Its KS test as arXiv 2506.12618 defines it, on the scores of two files we wrote."""

    def scores(log: EvalLog, name: str) -> np.ndarray:
        path, _ = write_open_unlearning(log, tmp_path / name, logs[LOGS[2]])
        rows = json.loads(path.read_text())["forget_truth_ratio"]["value_by_index"]
        return np.array([row["score"] for row in rows.values()])

    ours, theirs = scores(logs[LOGS[1]], "a"), scores(logs[LOGS[2]], "b")
    expected = summarise(logs[LOGS[1]], logs[LOGS[2]], resamples=0)["forget_quality"]
    assert ks_2samp(1 / (ours + 1e-10), 1 / (theirs + 1e-10)).pvalue == pytest.approx(expected)
