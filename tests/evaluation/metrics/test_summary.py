from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from adapters.errors import UserError
from evaluation.logs.matching import match_rows
from evaluation.logs.records import AnswerScore, EvalLog, Generation, RowRecord, SetRecord
from evaluation.metrics.summary import BETTER, figure_table, summarise


def rows_of(n: int, seed: int = 0, *, shift: float = 0.0, name: str = "q") -> list[RowRecord]:
    generator = np.random.default_rng(seed)
    made = []
    for i in range(n):
        losses = generator.uniform(1, 3, 4).round(6)
        made.append(
            RowRecord(
                question=f"{name} {i}?",
                answer=f"answer {i}",
                answer_score=AnswerScore(float(losses[0]), 5 + i),
                paraphrase=AnswerScore(float(losses[1]) + shift, 6),
                perturbed=(AnswerScore(float(losses[2]), 7), AnswerScore(float(losses[3]), 8)),
                generations={
                    "greedy-200-total": Generation("answer" if i % 2 else "a", 0.5, i % 3 / 2)
                },
            )
        )
    return made


def log_of(forget: Sequence[RowRecord], **meta: object) -> EvalLog:
    return EvalLog({"forget": SetRecord("forget", tuple(forget))}, meta)


def full_log(seed: int = 0) -> EvalLog:
    sizes = {"forget": 40, "retain": 30, "real_authors": 20, "world_facts": 10}
    sets = {name: SetRecord(name, tuple(rows_of(n, seed))) for name, n in sizes.items()}
    return EvalLog(sets, {"dtype": "float32"})


def without_texts(rows: Sequence[RowRecord]) -> list[RowRecord]:
    return [replace(row, question=None, answer=None) for row in rows]


def test_rows_are_matched_by_question_in_any_order() -> None:
    ours, theirs = rows_of(50, 1), rows_of(50, 2, shift=0.2)
    expected = summarise(log_of(ours), log_of(theirs))
    shuffled = random.Random(0).sample(theirs, k=50)
    found = summarise(log_of(ours), log_of(shuffled))
    assert found == expected
    assert found["rows_matched_by"] == "question"
    match = match_rows(ours, shuffled)
    assert [row.question for row in match.theirs] == [row.question for row in ours]


def test_white_space_does_not_make_another_question() -> None:
    ours = rows_of(2)
    theirs = [replace(row, question=f" {row.question} ".replace("?", " ?")) for row in ours]
    assert match_rows(ours, theirs).by == "question"


def test_a_question_that_stands_twice_is_told_apart_by_its_answer() -> None:
    twice = [replace(row, question="the same?") for row in rows_of(3)]
    match = match_rows(twice, twice[::-1])
    assert [row.answer for row in match.theirs] == [row.answer for row in twice]


@pytest.mark.parametrize("other", [rows_of(49), rows_of(51), rows_of(50, name="p")])
def test_other_rows_are_refused_with_an_example(other: list[RowRecord]) -> None:
    with pytest.raises(UserError, match=r"different rows: \d+ questions.*for example '[qp] \d+\?'"):
        summarise(log_of(rows_of(50)), log_of(other))


def test_without_questions_position_and_token_counts_decide() -> None:
    ours, bare = rows_of(5), without_texts(rows_of(5, 1))
    found = summarise(log_of(ours), log_of(bare))
    assert found["rows_matched_by"] == "position"
    assert any("by position" in note for note in found["notes"])
    with pytest.raises(UserError, match="5 and 4 rows"):
        summarise(log_of(ours), log_of(bare[:4]))
    with pytest.raises(UserError, match="row 0 has 5 answer tokens in one and 6"):
        summarise(log_of(ours[:4]), log_of(bare[1:]))
    uncounted = [replace(row, answer_score=AnswerScore(1.0)) for row in bare]
    with pytest.raises(UserError, match="cannot be matched"):
        summarise(log_of(ours), log_of(uncounted))


def test_without_a_reference_there_is_a_reason_and_no_number() -> None:
    found = summarise(full_log())
    for key in ("forget_quality", "forget_quality_log10", "ks", "log_r_shift", "direction"):
        assert found[key] is None
    for key in ("forget_quality", "forget_quality_log10", "ks", "log_r_shift"):
        assert found["reasons"][key] == "needs a retrain reference"
    assert found["model_utility"] is not None
    bare = EvalLog({name: s for name, s in full_log().sets.items() if name != "forget"})
    assert "no forget set" in summarise(full_log(), bare)["reasons"]["forget_quality"]


def test_a_summary_is_json_and_every_figure_has_a_direction() -> None:
    found = summarise(full_log(), full_log(1))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    figures = {
        key
        for key, value in found.items()
        if isinstance(value, float) and key not in ("retrain_forget_nll",)
    }
    assert figures == set(BETTER)
    assert found["n"] == 40
    assert found["rows"] == {"forget": 40, "retain": 30, "real_authors": 20, "world_facts": 10}
    assert found["reasons"] == {}
    low, high = found["model_utility_interval"]
    assert low < found["model_utility"] < high


def test_every_figure_has_its_rows_its_interval_and_its_reason() -> None:
    table = {row["name"]: row for row in figure_table(summarise(full_log(), full_log(1)))}
    assert table.keys() == BETTER.keys()
    assert {name: table[name]["n"] for name in ("ks", "model_utility", "world_facts_nll")} == {
        "ks": 40,
        "model_utility": 60,
        "world_facts_nll": 10,
    }
    for name, row in table.items():
        assert row["reason"] is None
        if name != "forget_quality_log10":
            low, high = row["interval"]
            assert low <= high
        if name not in ("forget_quality", "forget_quality_log10", "ks"):
            assert low < row["value"] < high, name
    bare = {row["name"]: row for row in figure_table(summarise(log_of(rows_of(4)), resamples=0))}
    assert bare["ks"]["reason"] == "needs a retrain reference"
    assert bare["retain_nll"]["n"] == 0
    assert bare["forget_nll"]["interval"] is None
    assert bare["forget_nll"]["better"] == "near retrain", "higher is not better without end"


def test_all_protocols_are_told_from_one_log() -> None:
    names = ["tofu", "tofu-paper"]
    found = [summarise(full_log(), full_log(1), protocol=name, resamples=0) for name in names]
    assert [summary["protocol"] for summary in found] == names
    assert found[0] == summarise(full_log(), full_log(1), resamples=0)
    assert found[0]["forget_truth_ratio"] != found[1]["forget_truth_ratio"]


def test_forget_rows_alone_have_no_model_utility_but_a_reason() -> None:
    custom = [replace(row, perturbed=(), paraphrase=row.answer_score) for row in rows_of(4)]
    found = summarise(log_of(custom), log_of(custom))
    assert found["model_utility"] is None
    assert "Retain ROUGE" in found["reasons"]["model_utility"]
    assert found["reasons"]["retain_nll"] == "the log has no retain set"
    assert found["forget_quality"] is None
    assert found["reasons"]["forget_quality"] == "needs perturbed answers of every forget row"
    assert found["forget_answer_prob"] > 0
    assert found["forget_rouge_l_recall"] is not None


def test_the_protocol_picks_rows_answers_and_truth_ratio() -> None:
    rows = rows_of(310, 3)
    other = {"greedy-200-new": Generation("b", 1.0, 1.0)}
    rows = [replace(row, generations={**row.generations, **other}) for row in rows]
    reference = log_of(rows_of(310, 4))
    found = {
        name: summarise(log_of(rows), reference, protocol=name, resamples=0)
        for name in ("tofu", "tofu-paper", "open-unlearning", "simnpo")
    }
    assert [found[name]["n"] for name in found] == [300, 310, 310, 300]
    assert found["tofu"]["forget_truth_ratio"] == found["simnpo"]["forget_truth_ratio"]
    assert found["tofu"]["forget_truth_ratio"] != found["open-unlearning"]["forget_truth_ratio"]
    assert found["tofu-paper"]["log_r_shift"] != found["open-unlearning"]["log_r_shift"]
    assert found["open-unlearning"]["forget_rouge_l_recall"] == 1
    assert found["simnpo"]["forget_rouge_l_recall"] is None
    assert "sampled-200-total" in found["simnpo"]["reasons"]["forget_rouge_l_recall"]
    assert [found[name]["protocol"] for name in found] == list(found)
    with pytest.raises(UserError, match="no protocol 'muse'"):
        summarise(log_of(rows), protocol="muse")


def test_a_limited_run_may_be_a_part_of_a_whole_reference() -> None:
    rows = rows_of(30)
    limited = EvalLog({"forget": SetRecord("forget", tuple(rows[:10]), 30)}, {"limit": 10})
    found = summarise(limited, log_of(rows))
    assert found["n"] == 10
    assert found["limited"] is True
    assert found["notes"] == ["limited to the first 10 rows of each set"]
    # The same questions against a reference of a larger split are another comparison.
    with pytest.raises(UserError, match="different rows"):
        summarise(limited, log_of(rows_of(60)))


def test_texts_cut_at_another_length_are_refused() -> None:
    log = log_of(rows_of(3), max_length=200, longest_text=230)
    assert summarise(log)["n"] == 3
    with pytest.raises(UserError, match="cut at 200 tokens and the longest has 230"):
        summarise(log, protocol="open-unlearning")
    later = log_of(rows_of(3), max_length=512, longest_text=230)
    with pytest.raises(UserError, match="cuts at 200"):
        summarise(later)
    short = log_of(rows_of(3), max_length=200, longest_text=199)
    assert summarise(short, protocol="open-unlearning")["n"] == 3


def test_another_precision_than_the_references_is_noted() -> None:
    ours = replace(full_log(), meta={"dtype": "bfloat16"})
    notes = summarise(ours, full_log(1))["notes"]
    assert notes == ["dtype differs from the retrain reference's: bfloat16 against float32"]


def test_scoring_a_log_needs_no_torch() -> None:
    code = (
        "import sys, evaluation.logs.records, evaluation.metrics.summary, evaluation.protocols, "
        "evaluation.logs; "
        "print(sorted({'torch', 'transformers', 'rouge_score'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_a_log_needs_no_numpy() -> None:
    imports = "import sys, evaluation.logs"
    code = f"{imports}; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
