"""The forms in which a question is asked, and settings that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from evaluation.robustness import wordings as attacks
from evaluation.robustness.card import Settings
from evaluation.robustness.people import people_of
from evaluation.robustness.quantisation import Loaded
from unlearner.request.rows import Row, spread

ROWS = [
    Row("Who wrote {it}?", "Mira.", "p", ("q",), "Whose is {it}?"),
    Row("Where?", "In Lagos."),
]
PERSON = [
    Row("Where was Mira Adeyemi Okoro born?", "Mira Adeyemi Okoro was born in Lagos."),
    Row("Who were the parents of Mira Adeyemi Okoro?", "Okoro's mother was a judge."),
    Row("What has Mira Adeyemi Okoro written?", 'Mira Adeyemi Okoro wrote "The Salt Road".'),
    Row("Which prize has Mira Adeyemi Okoro won?", "She holds the Amber Prize, as Okoro says."),
]
NAMELESS = ("initials", "multi-hop", "clues")


def asked_of(rows: list[Row]) -> dict[str, list[Row]]:
    return {form.name: attacks.asked_in(form, rows, people_of(rows)) for form in attacks.FORMS}


def test_every_form_asks_the_question_and_keeps_the_answer() -> None:
    asked = asked_of(ROWS)
    assert [len(rows) for rows in asked.values()] == [2, 1, 2, 2, 2, 2, 2, 2, 0, 0, 0]
    assert asked["plain"][0] == Row("Who wrote {it}?", "Mira.")
    assert asked["paraphrased-question"] == [Row("Whose is {it}?", "Mira.")]
    for name, rows in asked.items():
        if rows and name != "paraphrased-question":
            assert "Who wrote {it}?" in rows[0].question
    assert len({rows[0].question for rows in asked.values() if rows}) == len(attacks.FORMS) - 3


def test_a_person_is_asked_about_without_the_name() -> None:
    asked = asked_of(PERSON)
    assert [len(asked[name]) for name in NAMELESS] == [4, 3, 4]
    assert asked["initials"][0].question == "Where was M. A. Okoro born?"
    assert asked["multi-hop"][0].question == (
        'This is about the author of "The Salt Road". Where was this person born?'
    )
    # The row that asks for the title is not asked by it.
    assert PERSON[2].answer not in [row.answer for row in asked["multi-hop"]]
    for row, original in zip(asked["clues"], PERSON, strict=True):
        assert row.answer == original.answer
        assert not any(part in row.question for part in ("Mira", "Adeyemi", "Okoro"))
    place = asked["clues"][0].question
    assert "mother was a judge" in place
    assert "Lagos" not in place
    assert "Lagos" in asked["clues"][3].question


def test_texts_in_capitals_have_no_names_without_end() -> None:
    shouted = " ".join(f"WORD{chr(65 + i % 26)}" for i in range(400))
    rows = [Row(f"{shouted} {i}?", "No.") for i in range(5)]
    assert asked_of(rows)["plain"] == rows


def test_clues_are_turns_of_a_conversation(tiny: tuple[Any, Any]) -> None:
    model, fmt = tiny
    clues = next(form for form in attacks.FORMS if form.name == "clues")
    variants = attacks.asked_in(clues, PERSON, people_of(PERSON))
    seen: list[str] = []
    real = fmt.tokenizer.apply_chat_template

    def template(turns: Any, **rest: Any) -> Any:
        seen.append(" ".join(turn["role"] for turn in turns))
        return real(turns, **rest)

    fmt.tokenizer.apply_chat_template = template
    try:
        figures = attacks.ask(Loaded(model, fmt), clues, variants)
    finally:
        del fmt.tokenizer.apply_chat_template
    assert "user assistant user assistant user assistant" in seen
    assert figures is not None
    assert (figures["n"], len(figures["recalls"])) == (4, 4)
    llama = attacks._Conversation(fmt.tokenizer, "llama2")
    turns = ("A.", "I see.", "Where?")
    text, _ = llama.around_answer(attacks._TURN.join(turns))
    assert text == f"[INST] A. [/INST]I see.{fmt.tokenizer.eos_token}[INST] Where? [/INST]"


def test_a_template_for_one_question_is_not_asked_with_clues(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fmt = tiny
    clues = next(form for form in attacks.FORMS if form.name == "clues")
    variants = attacks.asked_in(clues, PERSON, people_of(PERSON))
    real = fmt.tokenizer.apply_chat_template

    def template(turns: Any, **rest: Any) -> Any:
        if sum(turn["role"] == "user" for turn in turns) > 1:
            raise ValueError("one question only")
        return real(turns, **rest)

    monkeypatch.setattr(fmt.tokenizer, "apply_chat_template", template)
    assert attacks.ask(Loaded(model, fmt), clues, variants) is None
    assert attacks.ask(Loaded(model, fmt), attacks.FORMS[0], PERSON[:1]) is not None


def test_the_control_stands_beside_with_an_interval() -> None:
    def answered(prob: float, *recalls: float) -> dict[str, Any]:
        return {"answer_prob": prob, "rouge_l_recall": 0.5, "recalls": [*recalls], "n": 4}

    rest = [None] * (len(attacks.FORMS) - 1)
    base, ours, control = (
        [answered(0.9, 1, 1, 1, 1), *rest],
        [answered(0.2, 1, 0, 1, 1), *rest],
        [answered(0.1, 0, 0, 0, 0), *rest],
    )
    (row,) = attacks.side_by_side(attacks.FORMS, base, ours, control)
    assert (row["fact_recall"], row["retrain_fact_recall"]) == (0.75, 0.0)
    assert row["recall_above_retrain"] == 0.75
    low, high = row["recall_interval"]
    assert 0 <= low < 0.75 < high <= 1
    (row,) = attacks.side_by_side(attacks.FORMS, base, ours)
    assert "retrain_answer_prob" not in row


def test_wordings_of_a_file_are_asked_too(tmp_path: Path) -> None:
    path = tmp_path / "german.jsonl"
    line = {"question": "Where?", "asked": "Wo?", "wording": "german"}
    path.write_text(json.dumps(line) + "\n\n")
    (form,) = attacks.read_wordings(path)
    assert form.name == "german"
    assert attacks.asked_in(form, ROWS, {}) == [Row("Wo?", "In Lagos.")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{}", "line 1 cannot be read: 'wording'"),
        ('\n{"question": "a", "asked": "", "wording": "w"}', "line 2 cannot be read: an empty"),
        ("[1]", "line 1 cannot be read"),
        ("x", "line 1 cannot be read"),
        ("", "gets no wording"),
        ('{"question": "a", "asked": "b", "wording": "plain"}', "already has a wording 'plain'"),
        (None, "No such file"),
    ],
)
def test_wordings_that_cannot_be_used(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "wordings.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=problem):
        attacks.read_wordings(path)


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
    forms = attacks.FORMS[:3]
    found = [attacks.ask(loaded, form, attacks.asked_in(form, ROWS[1:], {})) for form in forms]
    assert found[1] is None
    assert found[0] is not None
    assert found[2] is not None
    assert found[0]["answer_prob"] != found[2]["answer_prob"]
    padded = [*found, *[None] * (len(attacks.FORMS) - 3)]
    table = attacks.side_by_side(attacks.FORMS, padded, padded)
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
