"""How much like language answers are: counts by hand, the judge's loss by a direct forward."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.errors import UserError
from evaluation.inference.scoring import judge_losses
from evaluation.logs.records import RECORDED, EvalLog, Generation, RowRecord, SetRecord
from evaluation.metrics.text import (
    distinct_2,
    fluency,
    is_repeated,
    recorded_answers,
    words_of,
)
from unlearner.request.rows import Row


def log_of(*rows: RowRecord, name: str = "forget") -> EvalLog:
    return EvalLog({name: SetRecord(name, rows, len(rows))})


def answered(text: str | None, decoding: str = "greedy-200-total") -> RowRecord:
    return RowRecord("Who?", "Mira.", generations={decoding: Generation(text, None, 0.5)})


def test_words_are_letters_digits_and_inner_apostrophes_in_any_case() -> None:
    assert words_of("He didn't; HE DIDN’T -- in 1998, _é_") == [
        "he", "didn't", "he", "didn’t", "in", "1998", "é",
    ]  # fmt: skip
    assert words_of(" ...!? __ ' ") == []


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("the cat saw the cat", 3 / 4),
        ("a a a a a", 1 / 4),
        ("A. a! B", 1.0),
        ("one two three", 1.0),
        ("alone", None),
        ("", None),
    ],
)
def test_distinct_bigrams(text: str, share: float | None) -> None:
    assert distinct_2(words_of(text)) == share


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("He is is is here", True),
        ("the, The THE", True),
        ("so a b a b a b", True),
        ("He is is here is", False),
        ("a b a b a c", False),
        ("b a b a b", False),
        ("a b c a b c a b c", False),
        ("", False),
    ],
)
def test_three_times_in_a_row(text: str, repeated: bool) -> None:
    assert is_repeated(words_of(text)) is repeated


def test_the_judge_s_loss_is_a_direct_forward_s_without_eos(tiny: tuple[Any, Any]) -> None:
    import torch

    model, fmt = tiny
    rows = [
        Row("Who wrote it?", "Mira wrote the novel in Lagos."),
        Row("Who?", " ... "),
        Row("Where was she born?", "in in in in in"),
        # Longer than the cut of every protocol but one: all of it counts.
        Row("Where?", "qx " * 110),
    ]
    seen: list[tuple[int, int]] = []
    found = judge_losses(model, fmt, rows, on_progress=lambda *at: seen.append(at))
    assert seen[-1] == (3, 3)
    assert found[1] is None
    for row, loss in zip(rows, found, strict=True):
        if loss is None:
            continue
        prompt = f"<s>[INST] {row.question} [/INST]"
        start, ids = (
            fmt.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prompt, f"{prompt} {row.answer}")
        )
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses = [-log_p[i - 1, ids[i]].item() for i in range(len(start), len(ids))]
        assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_empty_answers_are_counted_and_have_no_loss() -> None:
    rows = [Row("a?", ""), Row("b?", "the cat saw the cat"), Row("c?", "no no no"), Row("d?", "!")]
    found = fluency(rows, [None, 2.0, 4.0, None])
    assert (found["n"], found["scored"], found["empty"]) == (4, 2, 2)
    assert found["judge_nll"] == 3.0
    assert found["distinct_2"] == (3 / 4 + 1 / 2) / 2
    assert found["repeated_share"] == 1 / 4
    assert found["words"] == 2.0
    low, high = found["judge_nll_interval"]
    assert 2.0 <= low < 3.0 < high <= 4.0
    assert found["reasons"] == {}


def test_a_figure_that_no_answer_has_is_none_with_its_reason(tiny: tuple[Any, Any]) -> None:
    rows = [Row("a?", ""), Row("b?", "?")]
    found = fluency(rows, judge_losses(*tiny, rows))
    assert found["judge_nll"] is found["judge_nll_interval"] is found["distinct_2"] is None
    assert set(found["reasons"]) == {"judge_nll", "distinct_2"}
    assert (found["empty"], found["words"]) == (2, 0.0)


def test_logs_are_read_under_one_greedy_decoding() -> None:
    both = RowRecord(
        "Who?", "Mira.",
        generations={
            "greedy-200-total": Generation("short", None, 0.5),
            "greedy-200-new": Generation("long", None, 0.5),
        },
    )  # fmt: skip
    new = answered("new", "greedy-200-new")
    public = answered("public", RECORDED)

    def texts(*rows: RowRecord) -> list[str]:
        logs = [(str(i), log_of(row)) for i, row in enumerate(rows)]
        return [found[0].answer for found in recorded_answers(logs, "forget")]

    assert texts(both, public) == ["short", "public"]
    assert texts(both, new, public) == ["long", "new", "public"]


@pytest.mark.parametrize(
    ("log", "problem", "fix"),
    [
        (log_of(answered("Mira."), name="retain"), "no rows of a set 'forget'", "retain"),
        (log_of(), "no rows of a set 'forget'", "another log"),
        (log_of(RowRecord("Who?", "Mira.")), "bad.json: row 1 of forget has no gen", "evaluate"),
        (log_of(answered(None)), "row 1 of forget has no generated", "evaluate"),
        (log_of(answered("x", "sampled-200-total")), "greedy-200-total", "--protocol tofu"),
        (
            log_of(RowRecord(generations={RECORDED: Generation("Mira.", None, 0.5)})),
            "has no question",
            "with questions",
        ),
    ],
)
def test_a_log_that_cannot_be_judged_is_named(log: EvalLog, problem: str, fix: str) -> None:
    with pytest.raises(UserError) as caught:
        recorded_answers([("good.json", log_of(answered("Mira."))), ("bad.json", log)], "forget")
    assert "bad.json" in caught.value.problem
    assert problem in caught.value.problem
    assert fix in caught.value.fix
