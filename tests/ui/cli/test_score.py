"""`unlearner score` on the public logs: the published figures, gates, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import GateFailed, UserError
from evaluation.logs.records import (
    SETS,
    AnswerScore,
    EvalLog,
    Generation,
    RowRecord,
    SetRecord,
    write_log,
)
from evaluation.metrics.forget_quality import NEEDS_RETRAIN
from evaluation.protocols import PROTOCOLS
from ui.cli.output.scoring import check_gates, parse_gate

FULL, NPO, RETRAIN = (
    "llama2-7b_full.json",
    "llama2-7b_retain90_npo.json",
    "llama2-7b_retain90_tofu.json",
)


@pytest.fixture(scope="module")
def logs(shared: Path) -> Path:
    return shared / "reference-logs"


@pytest.mark.parametrize("log", [FULL, NPO])
def test_figures_equal_the_published_ones(log: str, run: Any, logs: Path) -> None:
    published = json.loads((logs / "published.json").read_text())
    ran = run("score", logs / log, "--reference-log", logs / RETRAIN, "--json")
    assert ran.code == 0
    found = ran.json
    utility = published["model_utility"][log]["geometric"]
    quality = next(
        pair
        for pair in published["forget_quality"]
        if (pair["log"], pair["retain_log"]) == (log, RETRAIN)
    )
    assert found["model_utility"] == pytest.approx(utility["Model Utility"], abs=1e-9)
    assert found["forget_quality"] == pytest.approx(quality["p"], rel=1e-9)
    assert found["ks"] == pytest.approx(quality["ks"], abs=1e-9)
    for part, value in found["model_utility_parts"].items():
        assert value == pytest.approx(utility[part], abs=1e-9)
    rows = {row["name"]: row for row in found["table"]}
    assert set(rows) == {"forget", "retain", "real_authors", "world_facts"}
    assert rows["forget"]["answer_prob"] == pytest.approx(utility["Forget Probability"], abs=1e-9)
    assert rows["retain"]["n"] == 300


def test_figures_in_the_layout_of_the_harness(run: Any, logs: Path, tmp_path: Path) -> None:
    words = ["score", logs / FULL, "--reference-log", logs / RETRAIN, "--protocol", "all"]
    ran = run(*words, "--write-lm-eval", tmp_path / "results.json", "--json")
    assert ran.code == 0
    found = json.loads((tmp_path / "results.json").read_text())
    tasks = set(found["results"])
    assert tasks == set(found["versions"]) == set(found["n-samples"]) == set(found["configs"])
    assert "tofu_forget_open_unlearning" in tasks
    task = found["results"]["tofu_forget_tofu"]
    assert task["model_utility,none"] == pytest.approx(ran.json["protocols"][0]["model_utility"])
    low, high = ran.json["protocols"][0]["model_utility_interval"]
    assert task["model_utility_stderr,none"] == pytest.approx((high - low) / 3.92)
    assert found["higher_is_better"]["tofu_forget_tofu"]["retain_nll"] is False


def test_another_protocol_gives_other_figures(run: Any, logs: Path) -> None:
    published = json.loads((logs / "published.json").read_text())
    ran = run("score", logs / NPO, "--protocol", "tofu-paper", "--json")
    expected = published["model_utility"][NPO]["arithmetic"]["Model Utility"]
    assert ran.json["model_utility"] == pytest.approx(expected, abs=1e-9)
    assert ran.json["protocol"] == "tofu-paper"


def test_without_a_retrain_reference_there_is_no_forget_quality(run: Any, logs: Path) -> None:
    found = run("score", logs / NPO, "--json").json
    assert found["forget_quality"] is None
    assert found["reasons"]["forget_quality"] == "needs a retrain reference"
    assert "needs a retrain reference" in run("score", logs / NPO).out


def test_text_says_direction_shift_and_protocol(run: Any, logs: Path) -> None:
    out = run("score", logs / FULL, "--reference-log", logs / RETRAIN).out
    assert "1.834e-21" in out
    assert "KS D 0.3967" in out
    assert "under-forgotten" in out
    assert "model_utility   0.6227" in out
    assert "protocol        tofu" in out


def test_gates_decide_the_exit_code_after_the_figures(run: Any, logs: Path) -> None:
    words = ["score", logs / NPO, "--reference-log", logs / RETRAIN, "--json"]
    assert run(*words, "--fail-if", "model_utility<0.55").code == 0
    ran = run(*words, "--fail-if", "model_utility<0.55", "--fail-if", "forget_quality > 0.5")
    assert ran.code == 4
    assert "'forget_quality > 0.5' holds: forget_quality is 0.987948" in ran.err
    assert "model_utility<0.55" not in ran.err
    assert ran.json["forget_quality"] > 0.5
    ran = run("score", logs / NPO, "--fail-if", "forget_quality<0.05")
    assert ran.code == 4
    assert "cannot be checked (needs a retrain reference)" in ran.err


@pytest.mark.parametrize(
    ("text", "figure", "sign", "limit"),
    [
        ("model_utility<0.55", "model_utility", "<", 0.55),
        (" ks >= 1e-2 ", "ks", ">=", 0.01),
        ("log_r_shift<=-.5", "log_r_shift", "<=", -0.5),
        ("model_utility!=+1", "model_utility", "!=", 1.0),
    ],
)
def test_gate_syntax(text: str, figure: str, sign: str, limit: float) -> None:
    gate = parse_gate(text, ["model_utility", "ks", "log_r_shift"])
    assert (gate.figure, gate.sign, gate.limit, gate.text) == (figure, sign, limit, text)


@pytest.mark.parametrize(
    "text", ["", "model_utility", "model_utility<", "<0.5", "model_utility=0.5", "1>model_utility",
             "model_utility<0.5.5", "model_utility<nan", "model_utility<0.5 and ks>1", "mu <0.5; x"]
)  # fmt: skip
def test_what_is_not_a_gate_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a condition"):
        parse_gate(text, ["model_utility"])


def test_an_unknown_figure_gets_the_nearest_one() -> None:
    with pytest.raises(UserError) as caught:
        parse_gate("model_utilty<0.5", ["model_utility", "forget_quality"])
    assert "'model_utility'" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "value", "fails"),
    [("x<1", 1.0, False), ("x<1", 0.9, True), ("x<=1", 1.0, True), ("x>1", 1.0, False),
     ("x>=1", 1.0, True), ("x==1", 1.0, True), ("x!=1", 1.0, False)],
)  # fmt: skip
def test_a_gate_fails_when_it_holds(text: str, value: float, fails: bool) -> None:
    gates = [parse_gate(text, ["x"])]
    if fails:
        with pytest.raises(GateFailed):
            check_gates(gates, {"x": value})
    else:
        check_gates(gates, {"x": value})


@pytest.mark.parametrize(
    ("reason", "fix"),
    [
        (NEEDS_RETRAIN, "Give --reference-log"),
        ("needs forget and holdout rows", "--holdout"),
        ("not every row has perturbed answers", "--variants"),
        ("the log has no retain set", "TOFU split"),
        ("not measured: world_facts_rouge_l_recall", "TOFU split"),
        (None, "--metrics all"),
    ],
)
def test_a_gate_on_what_was_not_measured_says_how_to_measure_it(
    reason: str | None, fix: str
) -> None:
    figures = {"x": None, "y": 1.0, "reasons": {"x": reason} if reason else {}}
    with pytest.raises(GateFailed) as caught:
        check_gates([parse_gate("x<1", ["x"])], figures)
    assert fix in caught.value.fix
    assert "Train longer" not in caught.value.fix
    with pytest.raises(GateFailed, match="holds") as caught:
        check_gates([parse_gate("x<1", ["x"]), parse_gate("y>0", ["y"])], figures)
    assert fix in caught.value.fix
    assert "Train longer" in caught.value.fix


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "There is no evaluation log"),
        ("{", "is not JSON"),
        ("[1, 2]", "not an evaluation log of a known format"),
        ('{"a": 1}', "its keys are a"),
    ],
)
def test_what_is_not_a_log_is_refused(
    content: str | None, problem: str, run: Any, tmp_path: Path
) -> None:
    path = tmp_path / "log.json"
    if content is not None:
        path.write_text(content)
    ran = run("score", path, "--json")
    assert ran.code == 2
    assert ran.out == ""
    assert problem in ran.err


def test_all_protocols_in_one_call(run: Any, logs: Path) -> None:
    words = ("score", logs / FULL, "--reference-log", logs / RETRAIN)
    found = run(*words, "--protocol", "all", "--json").json
    assert [one["protocol"] for one in found["protocols"]] == list(PROTOCOLS)
    first = run(*words, "--json").json
    assert (
        found["model_utility"] == first["model_utility"] == found["protocols"][0]["model_utility"]
    )
    assert "protocols" not in first
    text = run(*words, "--protocol", "tofu,tofu-paper")
    assert text.out.count("model_utility") == 2
    assert run(*words, "--protocol", "tofu,muse").code == 2


def test_every_figure_is_told_with_direction_and_rows(run: Any, logs: Path) -> None:
    found = run("score", logs / FULL, "--json").json
    figures = {row["name"]: row for row in found["figures"]}
    assert figures["forget_quality"]["value"] is None
    assert figures["forget_quality"]["reason"] == "needs a retrain reference"
    assert figures["model_utility"]["n"] == 300 + 100 + 117
    assert figures["ks"]["better"] == "lower"
    low, high = figures["retain_answer_prob"]["interval"]
    assert low < figures["retain_answer_prob"]["value"] < high
    ran = run("score", logs / FULL)
    assert "forget_quality  - (needs a retrain reference)" in ran.out
    assert "Not measured" not in ran.err  # the reason is given once


def test_two_retrain_logs_give_the_band(run: Any, logs: Path) -> None:
    words = ("score", logs / FULL, "--reference-log", logs / RETRAIN)
    other = logs / "llama2-7b_retain90_npo.json"
    found = run(*words, "--second-reference-log", other, "--json").json
    assert found["retrain_band"]["forget_quality"] > 0.5
    assert found["retrain_band"]["direction"] == "indistinguishable"
    assert "retrain band" in run(*words, "--second-reference-log", other).out
    alone = run("score", logs / FULL, "--second-reference-log", other)
    assert (alone.code, "is missing" in alone.err) == (2, True)


def test_logs_for_other_tools_are_written_and_read_back(
    run: Any, logs: Path, tmp_path: Path
) -> None:
    theirs, folder = tmp_path / "aggregated.json", tmp_path / "open-unlearning"
    words = ("--reference-log", logs / RETRAIN, "--json")
    wrote = run(
        "score", logs / FULL, *words, "--write-tofu", theirs, "--write-open-unlearning", folder
    )
    assert wrote.code == 0
    again = run("score", theirs, *words).json
    for key in ("model_utility", "forget_quality", "forget_rouge_l_recall"):
        assert again[key] == wrote.json[key]
    assert json.loads((folder / "TOFU_SUMMARY.json").read_text())["forget_quality"] is not None
    assert run("score", folder / "TOFU_EVAL.json", *words).code == 0


def two_decodings(folder: Path) -> Path:
    """A log with answers under both greedy decodings: ROUGE-L .25 and .75."""
    score = AnswerScore(1.0, 4)
    answers = {
        "greedy-200-total": Generation("short", 0.5, 0.25),
        "greedy-200-new": Generation("long", 0.5, 0.75),
    }
    sets = {}
    for name in SETS:
        rows = tuple(
            RowRecord(f"{name} {i}?", "Mira.", score, score, (AnswerScore(2.0, 4),), answers)
            for i in range(3)
        )
        sets[name] = SetRecord(name, rows, 3)
    return write_log(EvalLog(sets, {"max_length": 512, "longest_text": 20}), folder / "log.json")


@pytest.mark.parametrize("protocols", ["tofu", "tofu,open-unlearning", "open-unlearning,tofu"])
def test_each_public_format_gets_the_answers_of_its_own_protocol(
    run: Any, tmp_path: Path, protocols: str
) -> None:
    folder, aggregated = tmp_path / "ou", tmp_path / "tofu.json"
    words: list[Any] = ["--write-open-unlearning", folder, "--write-tofu", aggregated]
    ran = run("score", two_decodings(tmp_path), "--protocol", protocols, *words)
    assert ran.code == 0, ran.err
    assert json.loads((folder / "TOFU_SUMMARY.json").read_text())["forget_Q_A_ROUGE"] == 0.75
    assert "(protocol open-unlearning)" in ran.err
    task = json.loads(aggregated.read_text())["eval_log_forget.json"]
    assert task["rougeL_recall"]["0"] == 0.25


def test_a_log_without_open_unlearning_s_answers_gives_the_first_protocol_s(
    run: Any, tmp_path: Path
) -> None:
    path = two_decodings(tmp_path)
    path.write_text(path.read_text().replace("greedy-200-new", "other"))
    folder = tmp_path / "ou"
    ran = run("score", path, "--write-open-unlearning", folder)
    assert json.loads((folder / "TOFU_SUMMARY.json").read_text())["forget_Q_A_ROUGE"] == 0.25
    assert "(protocol tofu)" in ran.err


@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
def test_a_log_with_a_byte_order_mark_is_read(run: Any, tmp_path: Path, mark: str) -> None:
    path = two_decodings(tmp_path)
    path.write_text(path.read_text(), encoding=mark)
    ran = run("score", path, "--reference-log", path, "--json")
    assert ran.json["forget_quality"] == 1.0
