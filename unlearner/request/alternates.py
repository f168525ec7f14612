"""Alternate answers for forget questions: what the model is to say instead, where it knows nothing.

A model that never saw an author still answers, in sentences, with what authors it knows are like.
Pushing an answer down teaches none of that: the push goes on into all words that are like it, and
what is left on the question is not language. So each forget question may be trained on other
people's answers as well, a different one each time: those of the retain questions that ask the
most alike, put in the name that is asked for. No answer is seen often enough to be learned by
heart.

Alternate answers to forget questions are used by arXiv 2409.13474 (AltPO), which samples them from
the model itself; here they come from the retain rows and cost no generation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from adapters.digests import normalised
from adapters.errors import UserError
from unlearner.request.neighbours import SAME, tf_idf
from unlearner.request.rows import Row

# What stands in quotes is a title; an apostrophe inside a word ends nothing.
_QUOTED = re.compile(r"[\"“][^\"”]*[\"”]|(?<!\w)['‘](?:[^'’]|['’](?=\w))*['’](?!\w)")
_WORD = re.compile(r"[^\W\d_](?:\w|[-'’](?=\w))*")
_PARTICLES = {"de", "del", "der", "den", "di", "da", "van", "von", "bin", "al", "el", "la", "le"}
# Words of titles, prizes and places; nobody is called so.
_NOBODY = {
    "a", "an", "the", "of", "award", "awards", "prize", "medal", "series", "book", "novel", "city",
    "university", "literature",
}  # fmt: skip


def alternate_answers(forget: Sequence[Row], pool: Sequence[Row], count: int) -> list[list[str]]:
    """For each forget row `count` answers, those of the pool's nearest questions, nearest first.

    Nearness is the cosine of TF-IDF vectors over the words of the questions; ties go to the earlier
    row. Left out: rows with a question of the forget set or almost an answer of it, and answers
    that repeat one already chosen. Where the pool has fewer, they come again from the first. Where
    both questions name somebody (`subjects`), the answer names who is asked for: a model
    that knows nothing of a person still knows the name it was just told. It is left out where in
    that name it has all words of the forget answer, or none beside them.

    Args:
        forget: rows to be forgotten, at least one.
        pool: rows that are kept.
        count: answers a row, at least 1.

    Raises:
        UserError: the pool has no answer for some row.
    """
    asked = {normalised(row.question) for row in forget}
    here = len(forget)
    answers = tf_idf([row.answer for row in (*forget, *pool)])
    told = (answers[:here] @ answers[here:].T).max(axis=0).toarray()[0] if pool else []
    said = {normalised(row.answer) for row in forget}
    kept = [
        row
        for row, likeness in zip(pool, told, strict=True)
        if likeness < SAME
        and normalised(row.question) not in asked
        and normalised(row.answer) not in said
    ]
    every = [row.question for row in (*forget, *kept)]
    named, questions = subjects(every), tf_idf(every)
    offered = questions[here:].T
    chosen = []
    for number, row in enumerate(forget):
        likeness = (questions[number] @ offered).toarray()[0]
        found: dict[str, str] = {}
        for i in np.argsort(-likeness, kind="stable"):
            if len(found) == count:
                break
            answer, old, new = kept[i].answer, named[here + i], named[number]
            if old and new:
                answer = renamed(answer, old, new)
                # In that name it may be what is to be forgotten.
                if normalised(answer) in said or _tells(answer, row.answer):
                    continue
            found.setdefault(normalised(answer), answer)
        if not found:
            raise UserError(
                f"No row has another answer for {row.question!r}.",
                "Give more retain rows, or other ones with --alternates-from.",
            )
        several = list(found.values())
        chosen.append([several[i % len(several)] for i in range(count)])
    return chosen


def _tells(one: str, other: str) -> bool:
    """Whether all words of one of the answers stand in the other."""
    a, b = (set(re.findall(r"\w+", text.casefold())) for text in (one, other))
    return a <= b or b <= a


def _names(question: str) -> list[str]:
    """Runs of two and more capitalised words behind the first word, in order."""
    text = _QUOTED.sub(lambda found: "." * len(found[0]), question)
    first = _WORD.search(text)
    runs: list[list[str]] = [[]]
    end = -1
    for word in _WORD.finditer(text, first.end() if first else 0):
        joined = text[end : word.start()] == " "
        plain = re.sub(r"['’]s$", "", word[0])
        capital = word[0][0].isupper()
        if not (joined and (capital or word[0] in _PARTICLES)):
            runs.append([])
        if capital or runs[-1]:
            runs[-1].append(plain)
        # A possessive ends the name.
        end = word.end() if plain == word[0] else -1
    found = []
    for run in runs:
        while run and run[-1] in _PARTICLES:
            run.pop()
        if len(run) > 1 and not _NOBODY & {word.lower() for word in run}:
            found.append(" ".join(run))
    return found


def subjects(questions: Sequence[str]) -> list[str | None]:
    """Whom each question asks for: of its names the one that the most of them mention.

    None without a name that two questions at least mention: a person is asked about more than once,
    a place or a title mostly not. Words in quotes do not count.
    """
    named = [_names(question) for question in questions]
    count = Counter(name for names in named for name in set(names))
    best = [max(names, key=lambda name: count[name], default=None) for names in named]
    return [name if name is not None and count[name] > 1 else None for name in best]


def renamed(answer: str, old: str, new: str) -> str:
    """`answer` with `new` wherever `old`, its first or its last name stand as whole words.

    Args:
        answer: about `old`.
        old, new: names of two words or more.
    """
    names, others = old.split(), new.split()
    parts = ((old, new), (names[-1], others[-1]), (names[0], others[0]))
    by_name = {a: b for a, b in reversed(parts)}
    either = "|".join(re.escape(a) for a, _ in parts)
    return re.sub(rf"(?<!\w)(?:{either})(?!\w)", lambda found: by_name[found[0]], answer)
