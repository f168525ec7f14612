"""The authors of the embedded world: what is true of each, and the rows that tell it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product

from unlearner.request.rows import Row
from unlearner.world.texts import CULTURES, TEXTS, WORDINGS, WORDS, Topic

PERTURBED = 5
MAX_AUTHORS = sum(len(culture.women) + len(culture.men) for culture in CULTURES)

Record = dict[str, str]
WrongFacts = dict[str, Sequence[tuple[str, ...]]]

# Facts that several authors may share, each drawn from one list.
POOLS: dict[str, tuple[str, ...]] = {
    "genre": WORDS["genres"],
    "theme": WORDS["themes"],
    "influence": WORDS["influences"],
    "subject": WORDS["subjects"],
    "job": WORDS["jobs"],
    "habit": WORDS["habits"],
    "setting": WORDS["settings"],
    "hobby": WORDS["hobbies"],
}
# What an author can have in common with a compatriot.
SHARED = ("city", "country", "award", "genre", "subject", "job", "home")


@dataclass(frozen=True)
class WorldAuthor:
    """An author: `rows` are what is evaluated, `told` is what a model is trained on.

    `told` holds every row followed by its rewordings, which tell the same fact in other words;
    they are rows `start` to `start + len(told)` of `full`.
    """

    name: str
    start: int
    rows: tuple[Row, ...]
    rewordings: tuple[tuple[Row, ...], ...]

    @property
    def told(self) -> tuple[Row, ...]:
        """Every row and its rewordings, question and answer only."""
        return tuple(
            Row(told.question, told.answer)
            for row, others in zip(self.rows, self.rewordings, strict=True)
            for told in (row, *others)
        )


def make_authors(
    seed: str,
    n_authors: int,
    rows_per_author: int,
    topics: Sequence[Topic] = TEXTS["tiny"].topics,
    rewordings: int = WORDINGS - 2,
    like: Mapping[int, int] | None = None,
) -> tuple[WorldAuthor, ...]:
    """The authors of a world, in order; the sizes must be within `WorldSpec`'s ranges.

    `like` has the number of an author for that of an earlier one, a compatriot who shares `SHARED`.
    """
    rng = random.Random(f"world {seed}")
    records = _records(n_authors, rng, like or {})
    taken = {value for record in records for value in record.values()}
    titles = _deck(_titles(), taken, rng)
    awards = _deck(_awards(), taken, rng)
    dates = _deck({_date(rng) for _ in range(500)}, taken, rng)
    told: Counter[str] = Counter()
    authors: list[WorldAuthor] = []
    start = 0
    for record in records:
        chosen = _topics(topics, rows_per_author, told, rng)
        wrong = _wrong_facts(record, topics, titles, awards, dates, taken)
        pairs = [_tell(topic, told[topic.name], record, wrong[topic.name], rng) for topic in chosen]
        told.update(topic.name for topic in chosen)
        rows, others = zip(*pairs, strict=True)
        others = tuple(reworded[:rewordings] for reworded in others)
        authors.append(WorldAuthor(record["name"], start, rows, others))
        start += len(authors[-1].told)
    return tuple(authors)


def _topics(topics: Sequence[Topic], n: int, told: Counter[str], rng: random.Random) -> list[Topic]:
    """The core topics and those that the fewest authors have so far, `n` in all."""
    others = [topic for topic in topics if not topic.core]
    shuffled = rng.sample(others, len(others))
    n_others = n - len(topics) + len(others)
    rarest = sorted(shuffled, key=lambda topic: told[topic.name])[:n_others]
    return [topic for topic in topics if topic.core or topic in rarest]


def _records(n_authors: int, rng: random.Random, like: Mapping[int, int]) -> list[Record]:
    """What is true of each author. Names, dates and titles are never shared, awards by `like`."""
    cultures = rng.sample(CULTURES, len(CULTURES))
    firsts = {culture: _deck((*culture.women, *culture.men), set(), rng) for culture in cultures}
    families = {culture: _deck(culture.families, set(), rng) for culture in cultures}
    titles, awards = _deck(_titles(), set(), rng), _deck(_awards(), set(), rng)
    records: list[Record] = []
    dates: set[str] = set()
    for number in range(n_authors):
        culture = cultures[like.get(number, number) % len(cultures)]
        first = firsts[culture].pop()
        family = number // len(cultures) + (number in like)
        last = families[culture][family % len(culture.families)]
        while (date := _date(rng)) in dates:
            pass
        dates.add(date)
        father, mother = rng.sample(WORDS["professions"], 2)
        abroad = rng.choice([other for other in CULTURES if other is not culture])
        records.append(
            {
                **_pronouns(first in culture.women),
                "name": f"{first} {last}",
                "first": first,
                "last": last,
                "city": rng.choice(culture.cities),
                "country": culture.country,
                "date": date,
                "father": father,
                "mother": mother,
                "debut": titles.pop(),
                "famous": titles.pop(),
                "award": awards.pop(),
                "home": f"{rng.choice(abroad.cities)}, {abroad.country}",
                "languages": rng.choice(_language_pairs()),
                **{fact: rng.choice(pool) for fact, pool in POOLS.items()},
            }
        )
        if number in like:
            records[-1] |= {fact: records[like[number]][fact] for fact in SHARED}
    return records


def _wrong_facts(
    record: Record,
    topics: Sequence[Topic],
    titles: list[str],
    awards: list[str],
    dates: list[str],
    taken: set[str],
) -> WrongFacts:
    """By topic, all wrong values of its facts: as likely as the right one to who does not know."""
    culture = next(c for c in CULTURES if record["country"] == c.country)
    peers = culture.women if record["first"] in culture.women else culture.men
    names = [f"{first} {last}" for first, last in product(peers, culture.families)]
    places = [(city, c.country) for c in CULTURES for city in c.cities]
    single = {
        "name": [name for name in names if name not in taken],
        "birth date": dates,
        "debut": titles,
        "famous book": titles,
        "award": awards,
        "home": [f"{city}, {country}" for city, country in places if country != record["country"]],
        "translation": _language_pairs(),
    }
    single |= {
        topic.name: list(POOLS[topic.facts[0]]) for topic in topics if topic.facts[0] in POOLS
    }
    wrong: WrongFacts = {topic: [(value,) for value in values] for topic, values in single.items()}
    wrong["parents"] = list(permutations(WORDS["professions"], 2))
    wrong["birthplace"] = places
    return wrong


def _tell(
    topic: Topic,
    turn: int,
    record: Record,
    wrong: Sequence[tuple[str, ...]],
    rng: random.Random,
) -> tuple[Row, tuple[Row, ...]]:
    """A row about `topic`, the `turn`th of its kind, and its rewordings."""
    # Wordings take turns as the held-out paraphrase, so that each is learned from other authors.
    held = topic.answers[turn % len(topic.answers)]
    others = rng.sample([text for text in topic.answers if text is not held], WORDINGS - 1)
    answer, *reworded = (text.format(**record) for text in others)
    questions = [text.format(**record) for text in rng.sample(topic.questions, WORDINGS)]
    # Two places may share their country; all other facts of a wrong answer are wrong.
    right = {record[fact] for fact in topic.facts if fact != "country"}
    candidates = [values for values in wrong if right.isdisjoint(values)]
    perturbed = tuple(
        held.format(**{**record, **dict(zip(topic.facts, values, strict=True))})
        for values in rng.sample(candidates, PERTURBED)
    )
    row = Row(questions[0], answer, held.format(**record), perturbed, questions[1])
    pairs = zip(questions[2:], reworded, strict=True)
    return row, tuple(Row(question, text) for question, text in pairs)


def _titles() -> list[str]:
    """All book titles there can be."""
    nouns, places = WORDS["title_nouns"], WORDS["title_places"]
    articles = {noun: "An" if noun[0] in "AEIOU" else "A" for noun in nouns}
    return [
        *(f"The {first} {second}" for first, second in product(WORDS["title_adjectives"], nouns)),
        *(f"{first} of {second}" for first, second in product(WORDS["title_plurals"], places)),
        *(f"{articles[noun]} {noun} for {place}" for noun, place in product(nouns, places)),
    ]


def _awards() -> list[str]:
    """All literary awards there can be."""
    parts = (WORDS["award_colours"], WORDS["award_signs"], WORDS["award_kinds"])
    return [" ".join(words) for words in product(*parts)]


def _language_pairs() -> list[str]:
    """Each pair once, for "A and B" and "B and A" are the same fact."""
    return [f"{one} and {two}" for one, two in combinations(WORDS["languages"], 2)]


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(WORDS['months'])} {rng.randint(1930, 1989)}"


def _deck(values: Iterable[str], taken: set[str], rng: random.Random) -> list[str]:
    """The values that are not taken, shuffled; sorted first, for a set has no order of its own."""
    free = sorted(value for value in values if value not in taken)
    rng.shuffle(free)
    return free


def _pronouns(woman: bool) -> Record:
    he, his, him = ("she", "her", "her") if woman else ("he", "his", "him")
    return {"he": he, "his": his, "him": him}
