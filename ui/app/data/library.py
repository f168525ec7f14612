"""The questions the app can ask: authors with their rows, and the neighbours that must stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.digests import key_id, mark
from adapters.errors import UserError
from unlearner.request.rows import Author, Row
from unlearner.request.tofu import FORGET_SPLITS, load_authors, load_split

if TYPE_CHECKING:
    from adapters.store.catalog import StoredAdapter

MOST_TELLINGS = 4
NEIGHBOURS = {
    "retain authors": "retain_perturbed",
    "real authors": "real_authors_perturbed",
    "world facts": "world_facts_perturbed",
}


@dataclass(frozen=True)
class Library:
    """Authors by name, and rows of the sets that are kept; `note` says what could not be read."""

    authors: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    neighbours: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    note: str = ""

    def row(self, question: str) -> Row | None:
        """The row of a question, wherever it stands; None for one that was typed."""
        wanted = question.strip()
        for rows in (*self.authors.values(), *self.neighbours.values()):
            for row in rows:
                if row.question.strip() == wanted:
                    return row
        return None

    def beside(self, rows: Sequence[Row], n: int = 20) -> list[tuple[str, Row]]:
        """Rows to be kept, with the name of their set: `n` of each, none of them in `rows`."""
        own = {row.question for row in rows}
        found = []
        for name, rows in self.neighbours.items():
            kept = [row for row in rows if row.question not in own]
            # Spread over the set, and one further each time: authors have equally many rows, and
            # an even step would always meet the same kind of question.
            places = {(k * len(kept) // n + k) % len(kept) for k in range(n)} if kept else set()
            found += [(name, kept[place]) for place in sorted(places)]
        return found


def requested(
    library: Library, adapters: Sequence[StoredAdapter], key: bytes
) -> dict[str, tuple[Row, ...]]:  # fmt: skip
    """The questions of each filed request that the data holds, by a name for the request.

    The store keeps no text: a question is recognised by its keyed mark, so requests that were
    filed with another key, or with rows that are not in the data, are not found.
    """
    mine = key_id(key)
    marks = [
        (adapter.label, set(told.get("marks", ())))
        for adapter in adapters
        if not adapter.problem
        and (told := adapter.manifest.data.get("forget", {})).get("key_id") == mine
    ]
    by_mark = {mark(key, row.question): row for rows in library.authors.values() for row in rows}
    found = {}
    for label, wanted in marks:
        rows = tuple(row for known, row in by_mark.items() if known in wanted)
        if rows:
            found[f"filed: {label}"] = rows
    return found


def read_library(data: Path | None) -> Library:
    """The library of a data folder, or of the hub; empty, with the reason, where there is none.

    An author's questions are those that are measured, with their wrong answers, where the splits
    hold them, else the rows of `full`.
    """
    try:
        authors = load_authors(data)
    except UserError as error:
        return Library(note=f"{error.problem} Questions can still be typed.")
    scored: dict[tuple[str, str], Row] = {}
    neighbours = {}
    missing = []
    for split in (*(f"{name}_perturbed" for name in FORGET_SPLITS), *NEIGHBOURS.values()):
        try:
            rows = load_split(split, data)
        except UserError:
            missing.append(split)
            continue
        scored |= {_key(row): row for row in rows}
        for name, kept in NEIGHBOURS.items():
            if kept == split:
                neighbours[name] = tuple(rows)
    note = f"Not in the data: {', '.join(missing)}." if missing else ""
    return Library({a.name: _measured(a, scored) for a in authors}, neighbours, note)


def _measured(author: Author, scored: Mapping[tuple[str, str], Row]) -> tuple[Row, ...]:
    """The author's rows with their wrong answers where there are some.

    The embedded world tells each fact in three ways and measures one: there only the measured rows
    count. In TOFU all rows of an author are measured, or none (but for a chance match).
    """
    found = [scored.get(_key(row)) for row in author.rows]
    measured = tuple(dict.fromkeys(row for row in found if row is not None))
    if len(measured) >= len(author.rows) / MOST_TELLINGS:
        return measured
    return tuple(known or row for known, row in zip(found, author.rows, strict=True))


def _key(row: Row) -> tuple[str, str]:
    return row.question.strip(), row.answer.strip()
