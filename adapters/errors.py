"""Errors that a user can act on. Each says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can fix: one sentence on what is wrong, one on the fix.

    The command line prints both without a traceback and leaves with `exit_code`.
    """

    exit_code = 2

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        # Exceptions pickle by their args, and a job's error crosses a process boundary whole.
        return type(self), (self.problem, self.fix)

    def __str__(self) -> str:
        return f"{self.problem} {self.fix}".strip()


class AdapterNotFound(UserError):
    """No adapter, or more than one, has this name."""


class StoreCorrupt(UserError):
    """A file of the store is not what its manifest or the audit log says it is."""

    exit_code = 1


class BaseMismatch(UserError):
    """The adapter was trained on a different base."""

    exit_code = 3


class DoesNotFit(UserError):
    """The job needs more memory or disk than there is."""

    exit_code = 3


class GateFailed(UserError):
    """A `--fail-if` condition holds."""

    exit_code = 4


class Diverged(UserError):
    """A loss, its gradient, a reading or a weight is no longer a finite number."""

    exit_code = 1


class Interrupted(UserError):
    """Stopped on request, after what was done so far was saved."""

    exit_code = 130


# A choice is left out where the nearest is nearer by so much, as difflib counts.
CLEARLY = 0.2


def did_you_mean(word: str, choices: Iterable[str], shown: int = 3) -> str:
    """A sentence with the nearest choices, or with all of them where none is near."""
    names = list(choices)
    if not word.strip():
        return f"Known are: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(word.casefold(), folded, n=shown, cutoff=0.5)
    likeness = [difflib.SequenceMatcher(None, key, word.casefold()).ratio() for key in near]
    # A typo of one of them is not a typo of the others.
    near = [key for key, each in zip(near, likeness, strict=True) if each > likeness[0] - CLEARLY]
    if not near:
        near = [key for key in folded if word.casefold() in key][:shown]
    if near:
        return "Did you mean " + " or ".join(repr(folded[key]) for key in near) + "?"
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"Known are: {listed}."


def counted(number: int, noun: str) -> str:
    """`1 pair`, `1,200 pairs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
