from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from evaluation.logs import read_log
from evaluation.logs.records import (
    AnswerScore,
    EvalLog,
    Generation,
    RowRecord,
    SetRecord,
    question_of,
    write_json,
    write_log,
)
from evaluation.logs.tofu import to_tofu

ROW = RowRecord(
    question="Where was Ana born?",
    answer="In Oslo. «Æ» \u2028",
    answer_score=AnswerScore(0.1, 7),
    paraphrase=AnswerScore(1 / 3, None),
    perturbed=(AnswerScore(2.5, 9), AnswerScore(1e3, 8)),
    generations={"greedy-200-total": Generation("In Rome.", 0.5, 1 / 3)},
)
BARE = RowRecord(answer_score=AnswerScore(4.0))


def a_log() -> EvalLog:
    return EvalLog({"forget": SetRecord("forget", (ROW, BARE), 20)}, {"limit": 2, "key": "k"})


def a_tofu_task(n: int = 3) -> dict[str, Any]:
    return {
        "avg_gt_loss": [0.5 + i for i in range(n)],
        "avg_paraphrased_loss": [0.7 + i for i in range(n)],
        "average_perturb_loss": [[1.0, 2.0 + i] for i in range(n)],
        "num_token_gt": [4 + i for i in range(n)],
        "rougeL_recall": [i / n for i in range(n)],
        "generated_text": [[f"[INST] q{i}? [/INST]", f"g{i}", f"a{i}"] for i in range(n)],
    }


def write(folder: Path, raw: Any, name: str = "log.json") -> Path:
    path = folder / name
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw), encoding="utf-8")
    return path


def test_our_own_format_gives_back_an_equal_log(tmp_path: Path) -> None:
    path = write_log(a_log(), tmp_path / "deep" / "log.json")
    assert read_log(path) == a_log()
    assert json.loads(path.read_text())["schema"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["log.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_log(a_log(), tmp_path / "log.json")
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_json(path, {"loss": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"loss": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_lists_and_dicts_by_index_are_the_same_log(tmp_path: Path) -> None:
    task = a_tofu_task(12)
    # JSON objects keep the order they were written in: rows must go by index, not by it.
    by_index = {
        key: {str(i): values[i] for i in reversed(range(12))} for key, values in task.items()
    }
    lists = read_log(write(tmp_path, {"eval_log_forget.json": task}))
    dicts = read_log(write(tmp_path, {"eval_log_forget.json": by_index}))
    assert lists.sets == dicts.sets
    assert [row.question for row in dicts.sets["forget"].rows] == [f"q{i}?" for i in range(12)]
    assert lists.sets["forget"].rows[2].perturbed[1] == AnswerScore(4.0, None)


def test_one_tasks_own_file_is_read_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, a_tofu_task(), "eval_real_author_wo_options.json")
    assert list(read_log(path).sets) == ["real_authors"]
    with pytest.raises(UserError, match="known format"):
        read_log(write(tmp_path, a_tofu_task(), "some.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["avg_gt_loss"].__setitem__(1, float("nan")), "row 1.*avg_gt_loss is nan"),
        (lambda t: t["avg_gt_loss"].__setitem__(2, None), "row 2.*avg_gt_loss is missing"),
        (lambda t: t["average_perturb_loss"][1].__setitem__(0, float("inf")), r"row 1.*\[0\] is"),
        (lambda t: t["avg_paraphrased_loss"].__setitem__(0, "x"), "row 0.*str, not a number"),
        (lambda t: t["avg_gt_loss"].__setitem__(0, -0.5), "row 0.*never negative"),
        (lambda t: t["rougeL_recall"].__setitem__(2, 1.5), "row 2.*between 0 and 1"),
        (lambda t: t["num_token_gt"].__setitem__(0, 0), "row 0.*counts 0 tokens"),
        (lambda t: t["num_token_gt"].pop(), "num_token_gt has 2 rows.*row 2"),
        (lambda t: t["average_perturb_loss"].__setitem__(1, []), "row 1.*not a list"),
        (lambda t: t.pop("average_perturb_loss"), "has no average_perturb_loss"),
        (lambda t: t.__setitem__("avg_gt_loss", "gone"), "neither a list nor an object"),
        (lambda t: t["generated_text"].__setitem__(0, ["a"]), "row 0.*generated_text"),
    ],
)
def test_a_bad_tofu_log_is_refused_by_row(tmp_path: Path, change: Any, message: str) -> None:
    task = a_tofu_task()
    change(task)
    with pytest.raises(UserError, match=message):
        read_log(write(tmp_path, {"eval_log_forget.json": task}))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "top level is list"),
        ('{"forget_quality": 0.9}', "keys are forget_quality"),
        ('{"kind": "unlearner-eval-log", "schema": 99}', "schema 99"),
        ('{"kind": "unlearner-eval-log", "schema": 1, "sets": {}}', "damaged"),
        ('{"mia_loss": {"value_by_index": {"0": {"score": 1}}}}', "no probabilities of perturbed"),
    ],
)
def test_an_unknown_or_damaged_file_is_refused(tmp_path: Path, raw: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_log(write(tmp_path, raw))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no evaluation log"):
        read_log(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_log(tmp_path)


def test_our_own_log_with_nan_is_refused(tmp_path: Path) -> None:
    raw = json.loads(write_log(a_log(), tmp_path / "a.json").read_text())
    raw["sets"]["forget"]["rows"][0]["perturbed"][1][0] = float("nan")
    with pytest.raises(UserError, match="forget row 0: perturbed is nan"):
        read_log(write(tmp_path, raw))


def test_open_unlearning_rows_without_a_value_are_refused(tmp_path: Path) -> None:
    cells = {str(i): {"avg_loss": 1.0, "prob": 0.4} for i in range(3)}
    wrong = {str(i): {"avg_loss": [1.0, 2.0], "prob": [0.4, 0.1]} for i in range(3)}
    raw: dict[str, Any] = {
        "forget_Q_A_PARA_Prob": {"value_by_index": cells},
        "forget_Q_A_PERT_Prob": {"value_by_index": wrong},
        "forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {}},
    }
    log = read_log(write(tmp_path, raw))
    assert log.sets["forget"].rows[0].answer_score is None
    assert log.sets["forget"].rows[0].paraphrase == AnswerScore(1.0)
    broken = copy.deepcopy(raw)
    broken["forget_Q_A_PARA_Prob"]["value_by_index"]["1"] = None
    with pytest.raises(UserError, match="PARA_Prob row 1 has no avg_loss"):
        read_log(write(tmp_path, broken))
    del raw["forget_Q_A_PARA_Prob"]["value_by_index"]["2"]
    with pytest.raises(UserError, match="different rows"):
        read_log(write(tmp_path, raw))


@pytest.mark.parametrize(
    "prompt",
    [
        "[INST] Who is Ana? [/INST]",
        "<s> [INST] Who is Ana? [/INST] ",
        "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWho is Ana? [/INST]",
        "Question: Who is Ana?\nAnswer: ",
        "system\n\nYou are a helpful assistant.user\n\nWho is Ana?assistant\n\n",
        "user\nWho is Ana?\nassistant\n",
        "Who is Ana?",
    ],
)
def test_the_question_is_found_in_a_recorded_prompt(prompt: str) -> None:
    assert question_of(prompt) == "Who is Ana?"


def test_tofus_format_refuses_rows_without_perturbed_answers() -> None:
    with pytest.raises(UserError, match="Row 1 of forget has no perturbed"):
        to_tofu(a_log())


def test_tofus_format_takes_the_answers_of_the_decoding_asked_for() -> None:
    other = Generation("In Bonn.", 0.1, 0.2)
    row = RowRecord(**{**vars(ROW), "generations": {**ROW.generations, "sampled-200-total": other}})
    log = EvalLog({"forget": SetRecord("forget", (row,))})
    task = to_tofu(log, "sampled-200-total")["eval_log_forget.json"]
    assert task["rougeL_recall"] == {"0": 0.2}
    assert task["generated_text"]["0"] == [
        "[INST] Where was Ana born? [/INST]",
        "In Bonn.",
        row.answer,
    ]
    with pytest.raises(UserError, match="no answers decoded as 'beam'"):
        to_tofu(log, "beam")
