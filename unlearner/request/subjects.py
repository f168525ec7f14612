"""Whom a question is about, and an answer about somebody else put in that name.

Heuristics for English names in capital letters; where they find nobody, nothing is changed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

# What stands in quotes is a title; an apostrophe inside a word ends nothing.
_QUOTED = re.compile(r"[\"“][^\"”]*[\"”]|(?<!\w)['‘](?:[^'’]|['’](?=\w))*['’](?!\w)")
_WORD = re.compile(r"[^\W\d_](?:\w|[-'’](?=\w))*")
_PARTICLES = {"de", "del", "der", "den", "di", "da", "van", "von", "bin", "al", "el", "la", "le"}
# Words of titles, prizes and places; nobody is called so.
_NOBODY = {
    "a", "an", "the", "of", "award", "awards", "prize", "medal", "series", "book", "novel", "city",
    "university", "literature",
}  # fmt: skip


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
