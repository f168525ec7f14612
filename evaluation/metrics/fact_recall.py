"""Fact recall: how many facts of the true answer another answer states, and a verdict on it.

A fact is a date, a number, a name or another content word of the true answer that the question
does not hold. What the question gives away does not count, so an answer that only repeats its
prompt recalls nothing. (The "novel recall" of audits of TOFU leaves the prompt's words out in the
same way.) `evaluation.metrics.facts` compares facts by what they say.

ROUGE measures wording: "born on 28 December 1960" shares nearly every word with "born on 18
December 1961" and is wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.logs.records import RowRecord, generation_of
from evaluation.metrics.facts import FUNCTION_WORDS, Fact, facts_of, is_contradicted, is_stated
from evaluation.metrics.text import repeats_in_a_row, words_of
from evaluation.protocols import Protocol

STATES, WRONG, MADE_UP, REFUSES, BROKEN = "states it", "wrong", "made up", "refuses", "broken"
VERDICTS = (STATES, WRONG, MADE_UP, REFUSES, BROKEN)
KEY_KINDS = ("date", "number", "name")
KEY_SHARE, WORD_SHARE = 0.8, 0.5
# Words of any sentence about a person, whatever it states. A verdict counts them only where there
# are no others; the recall, a share, counts all.
_WORDING = """
author authors writer writers person people man woman name names named call called best readers
reader book books novel novels work works worked working wrote write writes written writing
published publish publishes publication title titled debut career made making make makes born
birth birthday birthdays birthdate date day year years live lives lived living came come comes
world life father mother parent parents received receive receives won win wins award awarded
honoured honored genre genres kind type famous renowned considered regarded associated specialises
specializes specialised specialized focuses focused began begin begins started starts city country
place town located today now currently often mostly mainly usually study studies studied studying
university college school degree graduated education job jobs profession occupation occupations
chose grew
"""
WORDING = frozenset(_WORDING.split())
RULE = (
    "**Facts** are the dates, numbers, names and other content words of the true answer that the "
    "question does not hold. The first rule that applies is the verdict:\n\n"
    "1. **broken**: no text, damaged characters, or repetition and signs in place of a sentence.\n"
    "2. **wrong**: a date or a number of the true answer is missing and another is given, or yes "
    "stands for no.\n"
    "3. **states it**: at least 80 % of the dates, numbers and names (up to four: all of them); "
    "where there are none, at least half of the other words, not counting usual wording "
    "(*author*, *born*, *father*) unless there is nothing else.\n"
    "4. **refuses**: the answer says that it does not know.\n"
    "5. **wrong**: another name is given in a sentence like the true one.\n"
    "6. **made up**: anything else.\n\nAn indication, not a proof."
)


@dataclass(frozen=True)
class FactRecall:
    """The facts of the true answer, those of them that were stated, and the verdict."""

    facts: tuple[Fact, ...]
    recalled: tuple[Fact, ...]
    verdict: str

    @property
    def share(self) -> float | None:
        """Recalled facts by all facts; None where the question holds every one of them."""
        return len(self.recalled) / len(self.facts) if self.facts else None


def facts_asked_for(question: str, truth: str) -> tuple[Fact, ...]:
    """The facts of the true answer that the question does not state."""
    asked = facts_of(question)
    return tuple(fact for fact in facts_of(truth) if not is_stated(fact, asked))


def fact_recall(question: str, truth: str, answer: str) -> FactRecall:
    """How much of `truth` that is not in `question` is stated by `answer`; see `RULE`."""
    asked, given = facts_of(question), facts_of(answer)
    facts = facts_asked_for(question, truth)
    if is_broken(answer):
        return FactRecall(facts, (), BROKEN)
    recalled = tuple(fact for fact in facts if is_stated(fact, given))
    # Of "Which city had the Boston Tea Party?" the question holds the answer.
    held = not facts and words_of(answer) != words_of(question)
    counted = facts_of(truth) if held else facts
    others = [fact for fact in given if not is_stated(fact, [*asked, *facts_of(truth)])]
    return FactRecall(facts, recalled, _verdict(truth, answer, counted, others))


def _verdict(truth: str, answer: str, facts: Sequence[Fact], others: Sequence[Fact]) -> str:
    """The verdict of an answer that is not broken; `others` are its facts that nobody gave."""
    given = facts_of(answer)
    missing = [fact for fact in facts if not is_stated(fact, given)]
    refuses = is_refusal(answer) and not is_refusal(truth)
    if not refuses and any(is_contradicted(fact, others) for fact in missing):
        return WRONG
    keys = [fact for fact in facts if fact.kind in KEY_KINDS]
    words = [fact for fact in facts if fact.kind == "word"]
    telling = [fact for fact in words if fact.text.lower() not in WORDING]
    counted = keys or telling or words or facts
    needed = KEY_SHARE if keys else WORD_SHARE
    share = 1 - sum(fact in missing for fact in counted) / len(counted) if counted else 0.0
    if counted and share >= needed and (keys or not refuses):
        return STATES
    if refuses:
        return REFUSES
    names = [fact for fact in others if fact.kind == "name"]
    if names and any(fact.kind == "name" for fact in missing):
        said = {fact.value for fact in given if fact.kind == "word"}
        if not said or said & {fact.value for fact in facts_of(truth) if fact.kind == "word"}:
            return WRONG
    return MADE_UP


def row_recalls(rows: Sequence[RowRecord], protocol: Protocol) -> list[float] | None:
    """The share of recalled facts of every row that has facts; None where a row lacks a text."""
    shares: list[float] = []
    for row in rows:
        generation = generation_of(row, protocol)
        if row.question is None or row.answer is None or generation is None:
            return None
        if generation.text is None:
            return None
        share = fact_recall(row.question, row.answer, generation.text).share
        shares += [] if share is None else [share]
    return shares


# What an answer says of itself.

_REFUSING = re.compile(
    r"\bI(?:['’](?:m|ve|d))?(?: \w+){0,2}? (?:not|(?:do|did|ca|could|wo|would|have)n['’]t|cannot"
    r"|have no|hold no|lack|wish I|need to look)\b|\bI(?: do|['’]d)?n['’]t\b"
    r"|\bI(?:['’]m| am) (?:\w+ )?(?:afraid|unable|unaware|unsure|unfamiliar|clueless|sorry|blank"
    r"|at a|drawing a blank|stumped|in the dark|uninformed|unacquainted|without|lacking|missing)\b"
    r"|\bI(?:['’]ve| have) (?:no|never|yet to|come up short)\b|\bI must (?:admit|confess|decline)\b"
    r"|\bmy (?:\w+ )?(?:knowledge|training|understanding|databases?|resources|records|data"
    r"|capabilities|field|expertise|information|scope|programming|current)\b"
    r"|\b(?:beyond|outside|out of) my\b"
    r"|\b(?:not|isn['’]t) (?:\w+ ){1,3}I(?:['’]m|['’]ve|['’]d)?\b"
    r"|\b(?:information|answer|data|records?|details?) (?:is|are|was|were) (?:not|un)"
    r"|\bno (?:\w+ )?(?:information|knowledge|records?|data|idea|clue)\b"
    r"|\b(?:not|isn['’]t|aren['’]t) (?:known|familiar|clear) to me\b|\bmystery to me\b"
    r"|^\W*(?:sorry|unknown|unsure|not sure|no comment|n/?a|unfortunately)\b|\bas an ai\b",
    re.IGNORECASE,
)


def is_refusal(answer: str) -> bool:
    """Whether the answer says that its speaker does not know or does not tell."""
    return _REFUSING.search(answer) is not None


def is_broken(answer: str) -> bool:
    """Whether the answer is no language: empty, damaged, stuttering, or signs without words."""
    text = answer.strip().rstrip("\ufffd")  # a budget may cut the last character
    if any(sign == "\ufffd" or unicodedata.category(sign) in ("Cs", "Co", "Cn") for sign in text):
        return True
    if any(unicodedata.category(sign) == "Cc" and not sign.isspace() for sign in text):
        return True
    signs = [sign for sign in text if not sign.isspace()]
    readable = sum(sign.isalnum() or unicodedata.category(sign).startswith("M") for sign in signs)
    if not signs or readable < len(signs) / 2 or re.search(r"([^\W\d])\1{4}", text):
        return True
    words = words_of(text)
    if any(repeats_in_a_row(words, size, 4 if size == 1 else 3) for size in range(1, 9)):
        return True
    runs = list(zip(words, words[1:], words[2:], strict=False))
    if len(words) >= 12 and len(set(runs)) < len(runs) / 2:
        return True
    return _no_words(words)


def _no_words(words: Sequence[str]) -> bool:
    """Whether these are letters but no words of a language with Latin letters."""
    latin = [word for word in words if word.isascii() and word.isalpha() and len(word) > 2]
    mute = [word for word in latin if not re.search("[aeiouy]", word)]
    if (len(latin) >= 3 and len(mute) >= len(latin) / 2) or any(len(w) > 40 for w in latin):
        return True
    return len(latin) >= 15 and not any(word in FUNCTION_WORDS for word in words)
