"""The facts of a text: its dates, numbers, names and other content words, comparable by meaning.

`18 December 1961` is `12/18/1961`, `three` is `3`, `Gdańsk` is `Gdansk`; words are compared by
their Porter stem, as ROUGE's are. Months and numbers are read in English only.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["date", "number", "name", "word", "yes or no"]


@dataclass(frozen=True)
class Fact:
    """One fact of a text; `value` is what is compared, `text` how it is written."""

    kind: Kind
    value: Any
    text: str


_ENGLISH = """
a about above absolutely after again all also although am an and any are as at be because been
before being between both but by can could did do does doing during each either else etc even ever
every few for from further had has have having he her here hers herself him himself his how i if in
indeed into is it its itself just like made make many may me might more most much must my near no
nor not of off on once one only onto or other our out over own per rather s same shall she should
since so some such t than that the their theirs them themselves then there these they this those
through thus to too under until up upon us very was we well were what when where whether which while
who whom whose why will with within without would yes yet you your mr mrs ms dr
"""
_ELSEWHERE = """
der die das und ist von mit zu den ein eine le la les et est de des du un une el los las y es en que
il lo gli e di per che una o os da do em het een van och att
"""
STOP_WORDS = frozenset(_ENGLISH.split())  # carry no fact
FUNCTION_WORDS = STOP_WORDS | frozenset(_ELSEWHERE.split())  # tell a sentence from a pile of words
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?\b", r"(?P<year>\d{4}|'\d\d)\b"
_JOIN = r"[\s,.\-/]*(?:of |in |the |year |day )*"
_DATES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?<!\d){_YEAR}[\s,\-/]*{_MONTH}(?:{_JOIN}{_DAY})?",
        rf"(?<![\d.]){_DAY}{_JOIN}{_MONTH}(?:{_JOIN}{_YEAR})?",
        rf"\b{_MONTH}{_JOIN}{_DAY}(?:{_JOIN}{_YEAR})?",
        rf"\b{_MONTH}{_JOIN}{_YEAR}",
        r"(?<!\d)(?P<year>\d{4})[-/.](?P<first>\d{1,2})[-/.](?P<second>\d{1,2})\b",
        r"(?<![\d.])(?P<first>\d{1,2})[-/.](?P<second>\d{1,2})[-/.](?P<year>\d{4}|\d\d)\b",
        r"(?<![\w,.])(?P<decade>\d{3}0|'\d0|(?<=the )\d0)'?s\b",
        r"(?<![\w,.$€£])(?P<year>1\d{3}|20\d\d)\b(?![,.]\d)",
        rf"(?<=\bin )(?:early |late |mid-)?{_MONTH}",
    )
]
_CARDINALS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen
"""
_ORDINALS = """
zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth
fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth
"""
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_COUNTING = {word: n for n, word in enumerate(_CARDINALS.split())} | {
    word: 20 + 10 * n for n, word in enumerate(_TENS)
}
_WORTH = (
    _COUNTING
    | {word: n for n, word in enumerate(_ORDINALS.split())}
    | {word.replace("y", "ieth"): 20 + 10 * n for n, word in enumerate(_TENS)}
)
_NUMERAL = "|".join(sorted([*_WORTH, *_SCALES], key=len, reverse=True))
_NUMERALS = re.compile(
    rf"(?<!\d[\s-])\b(?:{_NUMERAL})(?:[\s-]+(?:and[\s-]+)?(?:{_NUMERAL}))*\b", re.IGNORECASE
)
_NUMBER = re.compile(
    r"(?<![\w.])(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(?P<order>st|nd|rd|th)?"
    r"(?:[\s-]+(?P<scale>hundred|thousand|million|billion))?(?!\w)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_TRANSLATED = str.maketrans({"ł": "l", "Ł": "L", "ø": "o", "Ø": "O", "đ": "d", "Đ": "D", "’": "'"})


@functools.lru_cache(maxsize=4096)
def facts_of(text: str) -> tuple[Fact, ...]:
    """The facts of a text, each once: dates, numbers, then names and other content words."""
    plain = unicodedata.normalize("NFKD", text.translate(_TRANSLATED))
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign))
    facts = [Fact("yes or no", *[_yes_or_no(plain)] * 2)] if _yes_or_no(plain) else []
    plain = _NUMERALS.sub(lambda match: _digits(match.group()), plain)
    for pattern in _DATES:
        for match in pattern.finditer(plain):
            readings = frozenset(_readings(match.groupdict()))
            facts += [Fact("date", readings, match.group().strip())] if readings else []
            if readings:
                blank = " " * len(match.group())
                plain = plain[: match.start()] + blank + plain[match.end() :]
    for match in _NUMBER.finditer(plain):
        value = float(match["number"].replace(",", ""))
        value *= _SCALES.get((match["scale"] or "").lower(), 1)
        kind: Kind = "word" if match["order"] else "number"
        facts.append(Fact(kind, (value, match["order"] is not None), match.group()))
    facts += _words(_NUMBER.sub(lambda match: " " * len(match.group()), plain))
    return tuple({(fact.kind, fact.value): fact for fact in reversed(facts)}.values())[::-1]


def _yes_or_no(text: str) -> str:
    match = re.match(
        r"\W*(?:(yes|yeah|indeed|correct|certainly|absolutely)\b"
        r"|(no|nope|incorrect)(?:\W*$|[,.;:!]|\s+(?:he|she|it|they|there|the|this|his|her)\b))",
        text, re.IGNORECASE,
    )  # fmt: skip
    return "" if match is None else "yes" if match[1] else "no"


def _digits(phrase: str) -> str:
    """A number in words as digits: `nineteen sixty-one` is 1961, `two hundred` 200."""
    total, current, ordinal, words = 0, 0, False, re.findall(r"[a-z]+", phrase.lower())
    if words in (["one"], ["second"]):  # seldom a number
        return phrase
    for word in words:
        if word in _SCALES:
            if word == "hundred":
                current = max(current, 1) * 100
            else:
                total, current = total + max(current, 1) * _SCALES[word], 0
        elif word != "and":
            worth = _WORTH[word]
            if 10 <= current <= 20 and worth >= 10:
                current = 100 * current + worth
            elif current % 10 or (0 < current < 100 and worth >= 10):
                return phrase  # a list of numbers
            else:
                current += worth
            ordinal = ordinal or word not in _COUNTING
    return f"{total + current}{'th' if ordinal else ''}"


Reading = tuple[int | str | None, int | None, int | None]  # year or decade, month, day


def _readings(parts: dict[str, str | None]) -> Iterator[Reading]:
    """What a date may mean: `3/4/1961` is a day of March or of April."""
    if decade := parts.get("decade"):
        yield decade.strip("'")[:-1], None, None  # 1960s: 196
        return
    year = int(str(parts["year"]).strip("'")) if parts.get("year") else None
    pairs: list[tuple[int | None, int | None]] = [(None, None)]
    if parts.get("month"):
        month = 1 + _MONTHS.index(str(parts["month"])[:3].lower())
        pairs = [(month, int(str(parts["day"])) if parts.get("day") else None)]
    elif parts.get("first"):
        first, second = int(str(parts["first"])), int(str(parts["second"]))
        pairs = [(first, second), (second, first)]
    for each in pairs:
        if (each[0] is None or 1 <= each[0] <= 12) and (each[1] is None or 1 <= each[1] <= 31):
            yield (year, *each)


def _words(plain: str) -> Iterator[Fact]:
    """Names and content words. A capital at the start of a sentence makes no name by itself."""
    tokens = list(_WORD.finditer(plain))
    inside = {
        token.group()
        for token in tokens
        if not re.search(r"(?:^|[.!?:\"“(]\s*|\n)\W*$", plain[: token.start()][-6:])
    }
    bare = all(t.group()[0].isupper() for t in tokens if t.group().lower() not in STOP_WORDS)
    for place, token in enumerate(tokens):
        word = token.group().removesuffix("'s")
        if (len(word) < 2 and word.isascii()) or word.lower() in STOP_WORDS:
            continue
        follows = tokens[place + 1] if place + 1 < len(tokens) else None
        beside = follows is not None and follows.group()[0].isupper()
        beside = beside and follows is not None and follows.start() - token.end() <= 2
        beside = beside and "." not in plain[token.end() : follows.start() if follows else None]
        named = word[0].isupper() and (bare or beside or token.group() in inside)
        yield Fact("name" if named else "word", _stem(word.lower()), word)


@functools.lru_cache(maxsize=16384)
def _stem(word: str) -> str:
    from nltk.stem.porter import PorterStemmer

    return str(PorterStemmer().stem(word)) if len(word) > 3 else word


def is_stated(fact: Fact, given: Sequence[Fact]) -> bool:
    """Whether one of the given facts says what `fact` says."""
    if fact.kind == "date":
        return any(
            _agrees(wanted, other)
            for wanted in fact.value
            for each in given
            for other in _as_dates(each)
        )
    if fact.kind == "number" and any(
        (fact.value[0], None, None) in each.value for each in given if each.kind == "date"
    ):
        return True
    kinds = ("name", "word") if fact.kind in ("name", "word") else (fact.kind,)
    return any(fact.value == each.value and each.kind in kinds for each in given)


def _as_dates(fact: Fact) -> list[Reading]:
    if fact.kind == "date":
        return list(fact.value)
    return [(int(fact.value[0]), None, None)] if fact.kind == "number" else []


def _agrees(wanted: Reading, other: Reading) -> bool:
    """Whether `other` holds every part of `wanted`."""
    year = wanted[0] is None or (other[0] is not None and _same_year(wanted[0], other[0]))
    return year and all(
        part is None or part == given for part, given in zip(wanted[1:], other[1:], strict=True)
    )


def _same_year(wanted: int | str, other: int | str) -> bool:
    """Whether a year is the wanted one, or within the wanted decade; a decade tells no year."""
    if isinstance(wanted, str):
        decade = other if isinstance(other, str) else str(other // 10)
        return decade.endswith(wanted) or wanted.endswith(decade)
    if isinstance(other, str):
        return False
    return wanted == other or (min(wanted, other) < 100 and wanted % 100 == other % 100)


def is_contradicted(fact: Fact, others: Sequence[Fact]) -> bool:
    """Whether the answer gives another date, number, or yes for no, where `fact` belongs."""
    same = [each for each in others if each.kind == fact.kind]
    if fact.kind == "date":
        return any(
            all(_differs(wanted, other) for wanted in fact.value for other in each.value)
            for each in same
        )
    return bool(same) and fact.kind in ("number", "yes or no")


def _differs(wanted: Reading, other: Reading) -> bool:
    """Whether some part that both dates have is another one."""
    year, given = wanted[0], other[0]
    if year is not None and given is not None:
        held = isinstance(given, str) and _same_year(given, year)  # the decade holds the year
        if not (held or _same_year(year, given)):
            return True
    pairs = zip(wanted[1:], other[1:], strict=True)
    return any(a is not None and b is not None and a != b for a, b in pairs)
