"""What a forget request is made of, and the checks that every row passes wherever it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from adapters.errors import UserError, counted

# Of one problem in many rows the first places are told, and the first of many problems.
SAME_SHOWN, PROBLEMS_SHOWN = 3, 20
# JSON may escape one half of a pair; no tokenizer takes it.
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """One question with its true answer, and where the split has them its variants."""

    question: str
    answer: str
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    paraphrased_question: str | None = None


@dataclass(frozen=True)
class Author:
    """An author of the data set: `rows` are rows `start` to `start + n` of `full`."""

    name: str
    start: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Request:
    """What is to be forgotten (`rows`), what must stay (`retain`), and whose answers are alternates
    (`others`; without them those of `retain`). `kind` is "tofu-split", "tofu-author" or "jsonl";
    `name` is what the user typed.
    """

    name: str
    kind: str
    rows: tuple[Row, ...]
    retain: tuple[Row, ...]
    others: tuple[Row, ...] = ()


def check_row(
    raw: Mapping[str, Any],
    problems: list[str],
    needed: Sequence[str] = ("question", "answer"),
    names: Mapping[str, str] | None = None,
) -> Row | None:
    """The row in `raw`, or None after everything that is wrong with it is added to `problems`.

    Args:
        raw: columns by name.
        problems: gets a text per problem.
        needed: which of question and answer there must be.
        names: what the columns question and answer are called in the file.
    """
    before = len(problems)
    for key in needed:
        name = (names or {}).get(key, key)
        if raw.get(key) is None:
            problems.append(f"no '{name}' (it has: {', '.join(raw) or 'nothing'})")
        elif not isinstance(raw[key], str):
            problems.append(f"'{name}' is {type(raw[key]).__name__}, not text")
        elif not raw[key].strip():
            problems.append(f"'{name}' is empty")
        elif _HALF_CHARACTER.search(raw[key]):
            problems.append(f"'{name}' holds half a character (a lone surrogate)")
    perturbed = raw.get("perturbed_answer") or ()
    if isinstance(perturbed, str):
        perturbed = (perturbed,)
    if not isinstance(perturbed, Sequence) or not all(isinstance(t, str) for t in perturbed):
        problems.append("'perturbed_answer' is not a list of texts")
    for key in ("paraphrased_answer", "paraphrased_question"):
        if not isinstance(raw.get(key), str | None):
            problems.append(f"'{key}' is {type(raw[key]).__name__}, not text")
    if len(problems) > before:
        return None
    return Row(
        raw["question"],
        raw.get("answer") or "",
        raw.get("paraphrased_answer"),
        tuple(perturbed),
        raw.get("paraphrased_question"),
    )


def refuse_problems(what: str, problems: Sequence[tuple[str, str]], fix: str) -> None:
    """Raises one UserError that names every problem, if there is any.

    Args:
        what: the file or data set.
        problems: where (such as "line 3", or nothing) and what. One that is the same in many
            places is listed once, and of very many only the first are listed.
        fix: what to do.
    """
    places: dict[str, list[str]] = {}
    for where, problem in problems:
        places.setdefault(problem, []).append(where)
    lines = []
    for problem, wheres in places.items():
        if len(wheres) > SAME_SHOWN:
            shown = ", ".join(wheres[:SAME_SHOWN])
            lines.append(f"{problem} ({shown} and {len(wheres) - SAME_SHOWN:,} more)")
        else:
            lines += [f"{where}: {problem}" if where else problem for where in wheres]
    if not lines:
        return
    count = counted(len(problems), "problem")
    if len(lines) == 1 and len(problems) > 1:
        raise UserError(f"{what} has {count}: {lines[0]}.", fix)
    if len(lines) > PROBLEMS_SHOWN:
        lines = [*lines[:PROBLEMS_SHOWN], f"... and {len(lines) - PROBLEMS_SHOWN:,} more"]
    listed = "\n".join(f"  - {line}" for line in lines)
    raise UserError(f"{what} has {count}:\n{listed}\n", fix)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, evenly spaced, so that every author or domain is represented."""
    if count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
