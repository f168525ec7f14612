"""Whom a question is about, and an answer about somebody else put in that name.

Heuristics for English names in capital letters; where they find nobody, nothing is changed.
"""

from __future__ import annotations

import re

# What stands in quotes is a title.
_QUOTED = re.compile(r"[\"“][^\"”]*[\"”]|(?<!\w)['‘][^'’]*['’](?!\w)")
_NAME = r"[^\W\d_a-z][\w.]*(?:[-'’][^\W\d_]\w+)*"
_PARTICLE = r"(?:(?:de|del|der|den|di|da|van|von|bin|al|el|la|le)\s){0,2}"
_PERSON = re.compile(rf"{_NAME}(?:\s{_PARTICLE}{_NAME})+")
# A place rather than a person.
_BEFORE_PLACE = re.compile(r"(?:\b(?:in|from|at|of the)\s|,\s)$")


def subject(question: str) -> str | None:
    """The first name of two words or more in it, None without one.

    Not counted: the first word, what stands in quotes, and what follows "in", "from" or a comma.
    """
    text = _QUOTED.sub(lambda found: " " * len(found[0]), question)
    first = re.match(r"\W*\w+", text)
    start = first.end() if first else 0
    for found in _PERSON.finditer(text, start):
        if not _BEFORE_PLACE.search(text[: found.start()]):
            return re.sub(r"['’]s$", "", found[0])
    return None


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
