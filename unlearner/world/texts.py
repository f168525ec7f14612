"""The texts of the embedded world, read from `data/*.json`. All were written for this project.

`cultures.json` and `words.json` are ASCII, so that a tokenizer of a thousand tokens spells them
cheaply and any terminal prints them. The facts are true: they stand for what a model must still
know after forgetting. `topics.json` and `facts.json` are for models trained from random weights;
`chat.json` holds both for a pretrained one, with facts that SmolLM2-135M-Instruct answers.
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
    core: bool = False


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


class Texts(NamedTuple):
    """The topics of one kind of world, and its true facts."""

    topics: tuple[Topic, ...]
    real_authors: tuple[Fact, ...]
    world_facts: tuple[Fact, ...]


def _texts(topics: Any, facts: Any) -> Texts:
    real, world = (
        tuple(Fact(**_fields(record)) for record in facts[name])
        for name in ("real_authors", "world_facts")
    )
    return Texts(tuple(Topic(**_fields(record)) for record in topics), real, world)


_CHAT = _read("chat")
CULTURES = tuple(Culture(**_fields(record)) for record in _read("cultures"))
# For a model trained from random weights, and for a pretrained chat model.
TEXTS = {"tiny": _texts(_read("topics"), _read("facts")), "chat": _texts(_CHAT["topics"], _CHAT)}
TOPICS, REAL_AUTHORS, WORLD_FACTS = TEXTS["tiny"]
# By name: professions, months, genres, the parts of book titles and of awards, ...
WORDS: dict[str, tuple[str, ...]] = _fields(_read("words"))
