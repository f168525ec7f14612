"""TOFU and custom requests: question/answer rows from the hub, a folder or a JSONL file.

TOFU (arXiv 2401.06121, `locuslab/TOFU`) has 200 fictitious authors of 20 rows each, in order;
forget01/05/10 are the last 1/5/10 % of `full` and retain99/95/90 what precedes them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import UserError

HUB_ID = "locuslab/TOFU"
FORGET_SPLITS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
SPLITS = (
    "full",
    *FORGET_SPLITS,
    *FORGET_SPLITS.values(),
    *(f"{name}_perturbed" for name in FORGET_SPLITS),
    "retain_perturbed",
    "real_authors",
    "real_authors_perturbed",
    "world_facts",
    "world_facts_perturbed",
)
# Rows of authors that no TOFU model was trained on, for membership inference.
HOLDOUT_SPLITS = {"forget01": "holdout01", "forget05": "holdout05", "forget10": "holdout10"}
ROWS_PER_AUTHOR = 20
WORLD_FILE = "world.json"
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


def did_you_mean(word: str, choices: Iterable[str], shown: int = 3) -> str:
    """A sentence with the nearest choices, or with all of them where none is near."""
    names = list(choices)
    if not word.strip():
        return f"Known are: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(word.casefold(), folded, n=shown, cutoff=0.5)
    if not near:
        near = [key for key in folded if word.casefold() in key][:shown]
    if near:
        return "Did you mean " + " or ".join(repr(folded[key]) for key in near) + "?"
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"Known are: {listed}."


def _row(
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


def _refuse(what: str, problems: Sequence[str], fix: str) -> None:
    """Raises one UserError that names every problem, if there is any."""
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise UserError(f"{what} has {count}:\n{listed}\n", fix)


def read_rows(path: Path, *, unique: bool = True, needs_answer: bool = True) -> list[Row]:
    """The rows of a JSON-lines file (one object a line), in order.

    Args:
        path: a file of `{"question": ..., "answer": ...}` lines.
        unique: refuse a row that stands twice.
        needs_answer: refuse a row without an answer; else it is empty.

    Raises:
        UserError: naming every broken line, missing key, empty text and duplicate at once.
    """
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {kind}.", "Give a JSONL file of question/answer rows.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason}).", "Save it as UTF-8."
        ) from None
    rows: list[Row] = []
    problems: list[str] = []
    seen: dict[tuple[str, str], int] = {}
    # Not str.splitlines: it also splits at U+2028 and form feeds, which may stand inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: broken JSON at column {error.colno}: {error.msg}")
            continue
        row = _row(raw, where, problems, ("question", "answer") if needs_answer else ("question",))
        if row is None:
            continue
        key = (row.question.strip(), row.answer.strip())
        if unique and key in seen:
            problems.append(f"{where}: the same row as line {seen[key]}")
        seen.setdefault(key, number)
        rows.append(row)
    if not rows and not problems:
        problems.append("no rows")
    _refuse(str(path), problems, 'Write one {"question": ..., "answer": ...} object a line.')
    return rows


def load_split(name: str, data: Path | None = None) -> list[Row]:
    """The rows of a TOFU split, in the data set's order.

    Args:
        name: one of `SPLITS` or `HOLDOUT_SPLITS`.
        data: folder of TOFU's JSON-lines files; without it the hub's `locuslab/TOFU` is read.

    Raises:
        UserError: unknown split, missing folder or file, no way to the hub.
    """
    if name not in (*SPLITS, *HOLDOUT_SPLITS.values()):
        raise UserError(f"There is no TOFU split '{name}'.", did_you_mean(name, SPLITS))
    if data is None:
        return _load_hub_split(name)
    if not data.is_dir():
        raise UserError(
            f"The data folder {data} does not exist.", "Give --data a folder that does."
        )
    for suffix in (".json", ".jsonl"):
        if (data / f"{name}{suffix}").is_file():
            return read_rows(data / f"{name}{suffix}")
    found = sorted(path.name for path in data.glob("*.json*"))
    raise UserError(
        f"The data folder {data} has no {name}.json (it has: {', '.join(found) or 'none'}).",
        "Give --data a folder of TOFU's JSON-lines files.",
    )


def _load_hub_split(name: str) -> list[Row]:
    from datasets import load_dataset

    try:
        table = load_dataset(HUB_ID, name, split="train")
    except (OSError, ConnectionError, ValueError) as error:
        raise UserError(
            f"TOFU's split '{name}' could not be read from the hub ({error}).",
            "Check the connection, or give --data a folder of TOFU's JSON-lines files.",
        ) from error
    problems: list[str] = []
    rows = [_row(raw, f"row {i}", problems) for i, raw in enumerate(table)]
    _refuse(f"{HUB_ID}:{name}", problems, "Pin a revision of the data set that is whole.")
    return [row for row in rows if row is not None]


def load_refusals(data: Path | None = None) -> list[str]:
    """Refusal answers for the `idk` and `dpo` objectives: `idontknow.jsonl`, else our own."""
    path = data / "idontknow.jsonl" if data is not None else None
    if path is None or not path.is_file():
        from unlearner.world.build import REFUSALS

        return list(REFUSALS)
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    return [line for line in lines if line]


def load_authors(data: Path | None = None) -> list[Author]:
    """The authors of `full` by name, in order: 200 of 20 rows in TOFU.

    Names are not a column of the data: an author's name is the capitalised phrase that stands in
    most of the 20 rows. One author of TOFU is never named and is called `author-NNN`. A folder
    with `world.json` (the embedded world) names its authors there.
    """
    full = load_split("full", data)
    listing = data / WORLD_FILE if data is not None else None
    if listing is not None and listing.is_file():
        entries = json.loads(listing.read_text(encoding="utf-8"))["authors"]
        spans = [(entry["name"], entry["start"], entry["n"]) for entry in entries]
    else:
        starts = range(0, len(full), ROWS_PER_AUTHOR)
        blocks = [full[start : start + ROWS_PER_AUTHOR] for start in starts]
        spans = [
            (author_name(block) or f"author-{number + 1:03d}", start, len(block))
            for number, (start, block) in enumerate(zip(starts, blocks, strict=True))
        ]
    return [Author(name, start, tuple(full[start : start + n])) for name, start, n in spans]


_NAME = re.compile(
    r"[^\W\d_a-z][\w'’.-]*(?:\s+(?:(?:al|bin|ibn|de|van|von|da|del|der|el|la|le)\s+)*"
    r"[^\W\d_a-z][\w'’-]*)+"
)
_OPENERS = frozenset(
    {"What", "Who", "How", "Can", "Are", "Is", "Does", "Did", "In", "The", "Could", "Which"}
    | {"Where", "Has", "Have", "As", "When", "Yes", "Do", "Was"}
)


def author_name(rows: Sequence[Row]) -> str | None:
    """The name that stands in most of an author's rows, or None where they name nobody."""
    counts: Counter[str] = Counter()
    for row in rows:
        phrases: set[str] = set()
        for match in _NAME.finditer(f"{row.question} {row.answer}"):
            words = match.group(0).split()
            while words and words[0] in _OPENERS:
                words = words[1:]
            if words:
                words[-1] = re.sub(r"['’]s?$|['’.]$", "", words[-1])
            for i in range(len(words)):
                phrases.update(
                    " ".join(words[i:j]) for j in range(i + 2, min(len(words), i + 5) + 1)
                )
        counts.update(phrases)
    if not counts:
        return None
    best, hits = max(counts.items(), key=lambda item: (item[1], len(item[0]), item[0]))
    # A genre may stand in a few rows of an author without a name; a name stands in most.
    if hits < 0.4 * len(rows):
        return None
    longer = [name for name, n in counts.items() if best in name and n >= 0.5 * hits]
    return max(longer, key=lambda name: (len(name), name))


def parse_request(text: str, data: Path | None = None, retain: str | None = None) -> Request:
    """The forget request that `text` names, with its retain rows.

    Args:
        text: a JSONL file, `tofu:forget05`, or `tofu:author=NAME`.
        data: folder of TOFU's JSON-lines files, else the hub.
        retain: a JSONL file or `tofu:SPLIT` to keep; by default the rest of TOFU.

    Raises:
        UserError: naming all problems at once; a question in both sets is one.
    """
    if text.startswith("tofu:"):
        kind, rows, rest = _tofu_request(text.removeprefix("tofu:"), data)
    else:
        kind, rows, rest = "jsonl", read_rows(Path(text)), None
    if retain is not None:
        rest = rows_named(retain, data)
        _refuse_overlap(rows, rest, text, retain)
    elif rest is None:
        rest = [] if data is None else load_split("full", data)
        asked = {row.question.strip() for row in rows}
        rest = [row for row in rest if row.question.strip() not in asked]
    return Request(text, kind, tuple(rows), tuple(rest))


def _tofu_request(text: str, data: Path | None) -> tuple[str, list[Row], list[Row]]:
    if not text.startswith("author="):
        if text not in FORGET_SPLITS:
            choices = [*FORGET_SPLITS, "author=NAME"]
            raise UserError(f"'tofu:{text}' is not a request.", did_you_mean(text, choices))
        return "tofu-split", load_split(text, data), load_split(FORGET_SPLITS[text], data)
    wanted = text.removeprefix("author=").strip()
    authors = load_authors(data)
    found = [a for a in authors if a.name.casefold() == wanted.casefold()]
    if not wanted or not found:
        raise UserError(
            f"There is no author '{wanted}'.", did_you_mean(wanted, (a.name for a in authors))
        )
    kept = [row for author in authors if author is not found[0] for row in author.rows]
    return "tofu-author", list(found[0].rows), kept


def rows_named(text: str, data: Path | None = None, *, unique: bool = True) -> list[Row]:
    """The rows of `tofu:SPLIT` or a JSONL file; refuses what `load_split` or `read_rows` does."""
    split = text.removeprefix("tofu:")
    return load_split(split, data) if split != text else read_rows(Path(text), unique=unique)


def _refuse_overlap(forget: Sequence[Row], retain: Sequence[Row], name: str, kept: str) -> None:
    asked = {row.question.strip(): number for number, row in enumerate(forget, start=1)}
    problems = [
        f"row {asked[row.question.strip()]} is also row {number} of {kept}: {row.question!r}"
        for number, row in enumerate(retain, start=1)
        if row.question.strip() in asked
    ]
    why = "A question is either forgotten or kept: remove it from one of the two."
    _refuse(name, problems, why)
