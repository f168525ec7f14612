"""What a forget request is made of, and the checks that every row passes wherever it comes from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import UserError

# JSON may escape one half of a pair; no tokenizer takes it.
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


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
    raw: Any, where: str, problems: list[str], needed: Sequence[str] = ("question", "answer")
) -> Row | None:
    """The row in `raw`, or None after writing down everything that is wrong with it."""
    if not isinstance(raw, dict):
        problems.append(f"{where}: not a JSON object but {type(raw).__name__}")
        return None
    before = len(problems)
    for key in needed:
        if key not in raw:
            problems.append(f"{where}: no '{key}' (it has: {', '.join(raw) or 'nothing'})")
        elif not isinstance(raw[key], str):
            problems.append(f"{where}: '{key}' is {type(raw[key]).__name__}, not text")
        elif not raw[key].strip():
            problems.append(f"{where}: '{key}' is empty")
        elif _HALF_CHARACTER.search(raw[key]):
            problems.append(f"{where}: '{key}' holds half a character (a lone surrogate)")
    perturbed = raw.get("perturbed_answer") or ()
    if isinstance(perturbed, str):
        perturbed = (perturbed,)
    if not isinstance(perturbed, Sequence) or not all(isinstance(t, str) for t in perturbed):
        problems.append(f"{where}: 'perturbed_answer' is not a list of texts")
    for key in ("paraphrased_answer", "paraphrased_question"):
        if not isinstance(raw.get(key), str | None):
            problems.append(f"{where}: '{key}' is {type(raw[key]).__name__}, not text")
    if len(problems) > before:
        return None
    return Row(
        raw["question"],
        raw.get("answer") or "",
        raw.get("paraphrased_answer"),
        tuple(perturbed),
        raw.get("paraphrased_question"),
    )


def refuse_problems(what: str, problems: Sequence[str], fix: str) -> None:
    """Raises one UserError that names every problem, if there is any."""
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise UserError(f"{what} has {count}:\n{listed}\n", fix)
