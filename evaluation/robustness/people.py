"""Whom rows are about, and questions that do not name them.

Read off capital letters, so for texts in languages that write names with them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from evaluation.metrics.fact_recall import fact_recall
from unlearner.request.rows import Row

PERSON = "this person"
CLUES = 2
# A name is what three rows at least have in common.
ROWS = 3
LONGEST_NAME = 6
_NAME_WORD = r"[^\W\d_a-z][^\W\d_]*(?:[-'’][^\W\d_]+)*"
_CAPITALISED = re.compile(rf"{_NAME_WORD}(?:[ ]{_NAME_WORD})+")
_QUOTED = re.compile('"([^"]{3,80})"|“([^”]{3,80})”|(?<!\\w)\'([A-Z][^"]{2,80}?)\'(?!\\w)')


class Person(NamedTuple):
    """A name, and the rows that hold it."""

    name: str
    rows: tuple[Row, ...]


def people_of(rows: Sequence[Row]) -> dict[str, Person]:
    """By question the person whom it names; a question that names nobody is missing."""
    texts = [f"{row.question} {row.answer}" for row in rows]
    names = Counter(name for text in texts for name in _runs(text))
    common = {name for name, count in names.items() if count >= ROWS}
    held = {name: {i for i, text in enumerate(texts) if name in text} for name in common}
    people: dict[str, Person] = {}
    for row in rows:
        named = common & _runs(row.question)
        most = max((names[name] for name in named), default=0)
        # "Mahfouz Al-Kuwaiti" is in as many rows as the whole name, or a few more.
        often = [name for name in named if names[name] >= 0.8 * most]
        name = max(often, key=lambda each: (len(each.split()), names[each], each), default="")
        if not name or any(_within(name, other, held) for other in common):
            continue
        last = name.split()[-1]
        group = [r for r, text in zip(rows, texts, strict=True) if last in text]
        people[row.question] = Person(name, tuple(group))
    return people


def _within(name: str, other: str, held: dict[str, set[int]]) -> bool:
    """Whether most rows with `name` are about `other`: it is their birthplace, not a person."""
    apart = name not in other and other not in name
    more = len(held[other]) > len(held[name])
    return apart and more and len(held[name] & held[other]) > len(held[name]) / 2


def _runs(text: str) -> set[str]:
    """Every two to six capitalised words in a row, titles in quotation marks left out."""
    runs: set[str] = set()
    for match in _CAPITALISED.finditer(_QUOTED.sub("", text)):
        words = re.sub(r"['’]s\b", "", match.group()).split()
        runs |= {
            " ".join(words[a : a + n])
            for n in range(2, LONGEST_NAME + 1)
            for a in range(len(words) - n + 1)
        }
    return runs


def unnamed(text: str, name: str, instead: str = PERSON) -> str:
    """The text with `instead` for the name, whole or in parts.

    Short words of a name ("de") are left where they stand alone.
    """
    parts = [word for word in name.split() if len(word) > 2 and word[0].isupper()]
    words = "|".join(re.escape(word) for word in sorted({name, *parts}, key=len, reverse=True))
    text = re.sub(rf"\b(?:{words})(?:[ ](?:{words}))*(?!\w)", instead, text)
    return text[:1].upper() + text[1:]


def initials(name: str) -> str:
    """`B. M. Al-Kuwaiti` for `Basil Mahfouz Al-Kuwaiti`."""
    *first, last = name.split()
    return " ".join([*(f"{word[0]}." for word in first), last])


def clues_about(row: Row, person: Person) -> list[str]:
    """Answers of the rows that follow, without the name and without what `row` asks for.

    At most `CLUES`; fewer where the person has fewer rows.
    """
    at = person.rows.index(row)
    clues = []
    for other in [*person.rows[at + 1 :], *person.rows[:at]]:
        clue = unnamed(other.answer, person.name)
        if PERSON in clue.lower() and not fact_recall(row.question, row.answer, clue).recalled:
            clues.append(clue)
    return clues[:CLUES]


def title_of(row: Row, person: Person) -> str | None:
    """A title in quotation marks from the person's other rows; None where there is none."""
    own = f"{row.question} {row.answer}".lower()
    titles = Counter(
        next(filter(None, match.groups())).strip(" ,.")
        for other in person.rows
        for match in _QUOTED.finditer(f"{other.question} {other.answer}")
    )
    other = [title for title in titles if title.lower() not in own]
    return max(other, key=lambda title: (titles[title], title)) if other else None
