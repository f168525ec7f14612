"""The texts of the embedded world, read from `data/*.json`. All were written for this project.

`cultures.json` and `words.json` are ASCII, so that a tokenizer of a thousand tokens spells them
cheaply and any terminal prints them. The facts in `facts.json` are true: they stand for what a
model must still know after forgetting.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, NamedTuple

# Each row takes four wordings of its topic: the answer, the paraphrase and two rewordings.
WORDINGS = 4


class Culture(NamedTuple):
    """Names and home cities that go together; first names are unique over all cultures."""

    women: tuple[str, ...]
    men: tuple[str, ...]
    families: tuple[str, ...]
    cities: tuple[str, ...]
    country: str


class Topic(NamedTuple):
    """One kind of row. Its answers say the same thing in different words.

    Attributes:
        name: what the row is about.
        facts: the fields that a perturbed answer gets wrong.
        questions: at least `WORDINGS` ways to ask.
        answers: at least `WORDINGS` ways to answer, each of which states all `facts`.
        core: every author has this row; of the others an author has some.
    """

    name: str
    facts: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    core: bool


class Fact(NamedTuple):
    """A true short answer with three wrong ones, and a second way to ask for it."""

    question: str
    reworded: str
    answer: str
    wrong: tuple[str, ...]


def _read(name: str) -> Any:
    return json.loads(files("unlearner.world").joinpath(f"data/{name}.json").read_text("utf-8"))


def _fields(record: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}


_FACTS = _read("facts")
CULTURES = tuple(Culture(**_fields(record)) for record in _read("cultures"))
TOPICS = tuple(Topic(**_fields(record)) for record in _read("topics"))
REAL_AUTHORS = tuple(Fact(**_fields(record)) for record in _FACTS["real_authors"])
WORLD_FACTS = tuple(Fact(**_fields(record)) for record in _FACTS["world_facts"])
# By name: professions, months, genres, the parts of book titles and of awards, ...
WORDS: dict[str, tuple[str, ...]] = _fields(_read("words"))
