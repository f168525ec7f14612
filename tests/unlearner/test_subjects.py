"""Names in questions, and answers put in another name."""

from __future__ import annotations

from pathlib import Path

import pytest

from unlearner.data import load_split
from unlearner.subjects import renamed, subject


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("What is Brenda Lai's latest book?", "Brenda Lai"),
        ("Could Basil Mahfouz Al-Kuwaiti name a teacher?", "Basil Mahfouz Al-Kuwaiti"),
        ('Is "The Lost Harbour" by Maria Luca Sousa a novel?', "Maria Luca Sousa"),
        ("How was 'Heart's Whisper' by Xin Lee received?", "Xin Lee"),
        ("Did Jean de la Fontaine write fables?", "Jean de la Fontaine"),
        ("Where does Élodie Dubois live?", "Élodie Dubois"),
        ("Who was born in Kuwait City, Saudi Arabia?", None),
        ("Who wrote about New York in Cape Town?", "New York"),  # what the rule takes for a person
        ("What did Ana write?", None),
        ("what is the capital of france?", None),
        ("", None),
    ],
)
def test_the_subject_is_the_first_full_name(question: str, name: str | None) -> None:
    assert subject(question) == name


@pytest.mark.parametrize(
    ("answer", "now"),
    [
        ("Brenda Lai wrote it.", "Hina de Ameen wrote it."),
        ("Lai's books are about Brenda.", "Ameen's books are about Hina."),
        ("Brendan met Laia and Brenda-Lou.", "Brendan met Laia and Hina-Lou."),
        ("She wrote it.", "She wrote it."),
    ],
)
def test_names_are_put_in_place_as_whole_words(answer: str, now: str) -> None:
    assert renamed(answer, "Brenda Lai", "Hina de Ameen") == now


def test_a_name_in_both_is_put_in_place_once() -> None:
    assert renamed("Xin Lee met Lee.", "Xin Lee", "Lee Xin") == "Lee Xin met Xin."


def test_nine_of_ten_real_questions_name_their_author(shared: Path) -> None:
    """TOFU forget05: ten authors of twenty questions, one of which asks for the name."""
    found = [subject(row.question) for row in load_split("forget05", shared / "tofu")]
    named = [name for name in found if name is not None and found.count(name) >= 15]
    assert len(set(named)) == 10
    assert len(named) >= 170
