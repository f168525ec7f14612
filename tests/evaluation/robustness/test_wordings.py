"""The forms in which a question is asked, and settings that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.errors import UserError
from evaluation.robustness import wordings as attacks
from evaluation.robustness.card import Settings
from evaluation.robustness.quantisation import Loaded
from unlearner.request.rows import Row, spread

ROWS = [
    Row("Who wrote {it}?", "Mira.", "p", ("q",), "Whose is {it}?"),
    Row("Where?", "In Lagos."),
]


def test_every_form_asks_the_question_and_keeps_the_answer() -> None:
    asked = {form.name: attacks.asked_in(form, ROWS) for form in attacks.FORMS}
    assert [len(rows) for rows in asked.values()] == [2, 1, 2, 2, 2, 2, 2, 2]
    assert asked["plain"][0] == Row("Who wrote {it}?", "Mira.")
    assert asked["paraphrased-question"] == [Row("Whose is {it}?", "Mira.")]
    for name, rows in asked.items():
        if name != "paraphrased-question":
            assert "Who wrote {it}?" in rows[0].question
    assert len({rows[0].question for rows in asked.values()}) == len(attacks.FORMS)


def test_bare_text_has_no_template(tiny: tuple[Any, Any]) -> None:
    _, fmt = tiny
    bare = attacks.bare(fmt)
    assert fmt.name == "chat"
    text = fmt.tokenizer.decode(bare.encode_prompt("Question: Who?\nAnswer:\n"))
    assert "[INST]" not in text
    assert text.startswith(fmt.tokenizer.bos_token)
    row = bare.encode("Question: Who?\nAnswer:\n", "Mira.")
    assert row.input_ids[: row.n_prompt] == bare.encode_prompt("Question: Who?\nAnswer:\n")
    assert fmt.tokenizer.decode(row.input_ids[row.n_prompt : -1]) == "Mira."
    assert row.input_ids[-1] == fmt.tokenizer.eos_token_id


def test_a_form_without_rows_is_left_out(tiny: tuple[Any, Any]) -> None:
    loaded = Loaded(*tiny)
    found = [attacks.ask(loaded, form, ROWS[1:]) for form in attacks.FORMS[:3]]
    assert found[1] is None
    assert found[0] is not None
    assert found[2] is not None
    assert found[0]["answer_prob"] != found[2]["answer_prob"]
    padded = [*found, *[None] * (len(attacks.FORMS) - 3)]
    table = attacks.side_by_side(padded, padded)
    assert [row["form"] for row in table] == ["plain", "instruction"]
    assert table[0]["base_answer_prob"] == table[0]["answer_prob"] == found[0]["answer_prob"]
    assert table[0]["n"] == 1


def test_rows_are_taken_at_equal_distances() -> None:
    rows = [Row(str(i), "a") for i in range(10)]
    assert [row.question for row in spread(rows, 4)] == ["0", "2", "5", "7"]
    assert spread(rows, 20) == rows


def test_settings_that_cannot_be_are_all_named() -> None:
    with pytest.raises(UserError) as refused:
        Settings(attacks=("nothing",), relearn_share=1.0, top_p=0.0, temperature=0.0, samples=0)
    for word in ("'nothing'", "relearn_share", "top_p", "temperature", "samples"):
        assert word in refused.value.problem
    with pytest.raises(UserError, match="no attack is given"):
        Settings(attacks=())
