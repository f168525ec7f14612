"""The questions that can be asked, the adapters as people see them, and which forgets what."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from adapters.digests import key_id, mark
from adapters.errors import UserError
from adapters.store.catalog import StoredAdapter
from unlearner.request.rows import Author, Row
from unlearner.request.tofu import FORGET_SPLITS, load_authors, load_split

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
        every = chain(*self.authors.values(), *self.neighbours.values())
        return next((row for row in every if row.question.strip() == wanted), None)

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


@dataclass(frozen=True)
class FiledRequest:
    """What the data holds of an adapter's request: its rows, and the authors they belong to."""

    rows: tuple[Row, ...]
    authors: tuple[str, ...]


def filed_requests(
    marked: Mapping[str, tuple[str, Row]], adapters: Sequence[StoredAdapter], key: bytes
) -> dict[str, FiledRequest]:  # fmt: skip
    """The requests whose rows the data holds, by the slug of their adapter.

    The store keeps no text: a question is recognised by its keyed mark, so requests that were
    filed with another key, or with rows that are not in the data, are not found.

    Args:
        marked: `marked_rows` of the library, made with `key`.
        adapters: of the store.
        key: of the store's digests.
    """
    found = {}
    for adapter in adapters:
        recorded = {} if adapter.problem else adapter.manifest.data.get("forget", {})
        if recorded.get("key_id") != key_id(key):
            continue
        rows = [marked[each] for each in marked if each in set(recorded.get("marks", ()))]
        if rows:
            authors = dict.fromkeys(author for author, _ in rows)
            found[adapter.slug] = FiledRequest(tuple(row for _, row in rows), tuple(authors))
    return found


def marked_rows(library: Library, key: bytes) -> dict[str, tuple[str, Row]]:
    """Author and row of every question, by its keyed mark."""
    return {
        mark(key, row.question): (author, row)
        for author, rows in library.authors.items()
        for row in rows
    }


def adapter_row(adapter: StoredAdapter) -> dict[str, Any]:
    """An adapter as a table row; counts and settings, never a text."""
    manifest = adapter.manifest
    return {
        "name": adapter.slug,
        "label": adapter.label,
        "status": adapter.status,
        "scale": adapter.scale,
        "rows": manifest.data.get("forget", {}).get("n"),
        "objective": manifest.objective.get("name"),
        "lora_r": manifest.lora.get("r", manifest.lora.get("lora_r")),
        "parents": list(manifest.parents),
        "policy": manifest.policy,
        "bytes": adapter.size,
        "created": manifest.created[:19],
        "problem": adapter.problem or None,
    }


def readable_name(adapter: StoredAdapter) -> str:
    """An adapter's label, without a digest at its end."""
    return re.sub(r"-[0-9a-f]{8,}$", "", adapter.label)


def readable_names(
    adapters: Sequence[StoredAdapter], filed: Mapping[str, FiledRequest]
) -> dict[str, str]:
    """The name of every adapter by its slug, with the authors of its request; no two are alike."""
    names: dict[str, str] = {}
    for adapter in adapters:
        name = readable_name(adapter)
        authors = filed[adapter.slug].authors if adapter.slug in filed else ()
        if authors:
            more = f" and {len(authors) - 2} more" if len(authors) > 2 else ""
            name += f": {', '.join(authors[:2])}{more}"
        names[adapter.slug] = name if name not in names.values() else f"{name} ({adapter.slug})"
    return names


def read_library(data: Path | None) -> Library:
    """The library of a data folder, or of the hub; empty, with the reason, where there is none.

    An author's questions are those that are measured, with their wrong answers, where the splits
    hold them, else the rows of `full`.
    """
    try:
        authors = load_authors(data)
    except UserError as error:
        return Library(note=f"{error.problem} Questions can still be typed.")
    measured = [f"{name}_perturbed" for name in FORGET_SPLITS]
    found: dict[str, Sequence[Row]] = {}
    for split in (*measured, *NEIGHBOURS.values()):
        with contextlib.suppress(UserError):
            found[split] = load_split(split, data)
    scored = {_key(row): row for rows in found.values() for row in rows}
    neighbours = {name: tuple(found[kept]) for name, kept in NEIGHBOURS.items() if kept in found}
    # Data of one forget split is whole; without any, or without a set to keep, figures are missing.
    some = any(name in found for name in measured)
    needed = [*([] if some else measured), *NEIGHBOURS.values()]
    missing = [name for name in needed if name not in found]
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
