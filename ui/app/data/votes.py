"""The blind vote: which answer knows more? Sides are shuffled, votes are lines of JSON."""

from __future__ import annotations

import hmac
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from adapters.digests import store_key
from adapters.errors import UserError

CHOICES = ("A knows more", "B knows more", "both know", "neither knows")


@dataclass(frozen=True)
class Ballot:
    """Two answers behind letters; `swapped` means that A is the stack's."""

    question: str
    texts: tuple[str, str]
    stack: tuple[tuple[str, float], ...]
    swapped: bool


def ballot(
    question: str,
    base: str,
    unlearned: str,
    stack: Sequence[tuple[str, float]],
    rng: random.Random | None = None,
) -> Ballot:
    """The two answers in random order, against the liking for a side."""
    swapped = bool((rng or random.SystemRandom()).getrandbits(1))
    texts = (unlearned, base) if swapped else (base, unlearned)
    return Ballot(question, texts, tuple(stack), swapped)


def winner(given: Ballot, choice: str) -> str:
    """`base`, `stack`, `both` or `neither`.

    Raises:
        UserError: not one of `CHOICES`.
    """
    if choice not in CHOICES:
        raise UserError("No answer was chosen.", f"Choose one of: {', '.join(CHOICES)}.")
    if choice in CHOICES[2:]:
        return choice.split()[0]
    return "stack" if (choice == CHOICES[0]) == given.swapped else "base"


def cast(path: Path, given: Ballot, choice: str, key: bytes | None = None) -> dict[str, Any]:
    """The vote as appended to `path`, one JSON object a line.

    It holds no question and no answer, only a keyed digest of the question: the file may lie
    beside the store, which never holds what is forgotten.
    """
    secret = key if key is not None else store_key()
    line = {
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "question": hmac.new(secret, given.question.encode(), "sha256").hexdigest(),
        "winner": winner(given, choice),
        "a": "stack" if given.swapped else "base",
        "stack": [list(one) for one in given.stack],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def count(path: Path) -> dict[str, int]:
    """How many votes there are for whom."""
    found = dict.fromkeys(("base", "stack", "both", "neither"), 0)
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            found[json.loads(text)["winner"]] += 1
    return found
