"""Names in questions, and answers put in another name."""

from __future__ import annotations

from pathlib import Path

import pytest

from unlearner.request.alternates import renamed, subjects
from unlearner.request.tofu import load_split


def asked_of(question: str) -> str | None:
    """Of a question that is asked twice, so that a name in it counts."""
    return subjects([question, question])[0]


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("What is Brenda Lai's latest book?", "Brenda Lai"),
        ("Could Basil Mahfouz Al-Kuwaiti name a teacher?", "Basil Mahfouz Al-Kuwaiti"),
        ('Is "The Lost Harbour" by Maria Luca Sousa a novel?', "Maria Luca Sousa"),
        ("How was 'The Widow's Long Night' by Xin Lee received?", "Xin Lee"),
        ("Did Jean de la Fontaine write fables?", "Jean de la Fontaine"),
        ("Where does Élodie Dubois live?", "Élodie Dubois"),
        ("When did über Ola Berg écrire?", "Ola Berg"),
        ("I read a book by Ola Berg. What else is there?", "Ola Berg"),
        ("Tell me about Mira Okafor.", "Mira Okafor"),
        ("Did Ola Berg win the Nobel Prize?", "Ola Berg"),
        ("Who won the Golden Pen Award?", None),
        ("What did Ana write?", None),
        ("what is the capital of france?", None),
        ("", None),
    ],
)
def test_the_subject_is_a_full_name(question: str, name: str | None) -> None:
    assert asked_of(question) == name


def test_a_name_counts_that_is_asked_for_again() -> None:
    questions = [
        "How did Cape Town shape Raven Marais?",
        "What did Raven Marais write?",
        "Is Ola Berg?",
    ]
    assert subjects(questions) == ["Raven Marais", "Raven Marais", None]


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


def test_real_questions_name_their_author(shared: Path) -> None:
    """TOFU forget05: ten authors of twenty questions, one of which asks for the name."""
    found = subjects([row.question for row in load_split("forget05", shared / "tofu")])
    for start in range(0, 200, 20):
        own = found[start : start + 20]
        author = max(set(own), key=own.count)
        assert author is not None
        assert own.count(author) >= 16
        assert sum(name not in (author, None) for name in own) <= 1
