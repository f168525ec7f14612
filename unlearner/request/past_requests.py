"""Earlier requests that a new one must respect: whose rows may not be trained back.

The store holds no text, so a row is recognised by the keyed digest of its question.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.digests import key_id, marks_of, normalised
from adapters.errors import StoreCorrupt, UserError
from unlearner.request.rows import Request, Row

if TYPE_CHECKING:
    from adapters.store.store import AdapterStore

# What such an adapter forgot is meant to be forgotten in the model that is being made.
IN_FORCE = ("active", "stale", "merged")


@dataclass(frozen=True)
class Earlier:
    """A request in force: the marks of its questions, and whether they can be compared at all.

    `unknown` says in words why some of its rows cannot be recognised; empty where all can.
    """

    slug: str
    marks: frozenset[str]
    unknown: str = ""


def requests_in_force(
    store: AdapterStore | None, key: bytes, without: Collection[str] = ()
) -> list[Earlier]:
    """The requests whose adapters are active, stale or merged, except those in `without`."""
    if store is None:
        return []
    status = store.journal.state().status
    chosen = [slug for slug, now in status.items() if now in IN_FORCE and slug not in without]
    return [recall(store, slug, key) for slug in sorted(chosen)]


def recall(store: AdapterStore, slug: str, key: bytes) -> Earlier:
    """What is known of one adapter's rows; a sum of others has the rows of its parts."""
    state = store.journal.state()
    marks: set[str] = set()
    why: list[str] = []
    waiting, seen = [slug], set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            found = store.catalog.stored(one, state)
            if found.problem:
                raise StoreCorrupt(found.problem, "")
        except (KeyError, StoreCorrupt):
            why.append(f"the manifest of {one} cannot be read")
            continue
        forget = found.manifest.data.get("forget")
        if forget is None:
            waiting += found.manifest.supersedes
            if not found.manifest.supersedes:
                why.append(f"{one} does not say which rows it forgot")
        elif "marks" not in forget:
            why.append(f"{one} was made by a release that did not record its rows one by one")
        elif forget.get("key_id") != key_id(key):
            why.append(f"the rows of {one} were recorded under another key")
        else:
            marks.update(forget["marks"])
    return Earlier(slug, frozenset(marks), "; ".join(why))


def without_rows_of(
    earlier: Sequence[Earlier], rows: Sequence[Row], key: bytes
) -> tuple[tuple[Row, ...], dict[str, int]]:
    """`rows` that belong to no request of `earlier`, and how many each of them took away."""
    taken: dict[str, int] = {}
    kept = []
    for row in rows:
        marks = marks_of(key, row.question)
        owner = next((one.slug for one in earlier if marks & one.marks), None)
        if owner is None:
            kept.append(row)
        else:
            taken[owner] = taken.get(owner, 0) + 1
    return tuple(kept), taken


def require_all_rows(earlier: Sequence[Earlier], rows: Sequence[Row], key: bytes) -> None:
    """Refuses to take the place of requests whose rows are not all among `rows`.

    Raises:
        UserError: rows that would come back, or rows that cannot be compared.
    """
    given = frozenset[str]().union(*(marks_of(key, row.question) for row in rows))
    for one in earlier:
        if one.unknown:
            raise UserError(
                f"It cannot be checked that the rows of {one.slug} are all there: {one.unknown}.",
                "Point UNLEARNER_KEY at the key they were recorded under, or file a new request "
                "and revert the old one.",
            )
        missing = len(one.marks - given)
        if missing:
            raise UserError(
                f"{missing} of {len(one.marks)} rows of {one.slug} are not among the rows given: "
                "they would come back.",
                "Give the rows of every request that is to be replaced.",
            )


def check_guard(
    earlier: Sequence[Earlier], guard: Sequence[Row], asked: Sequence[Row], key: bytes
) -> None:
    """Refuses guard rows that are not of an earlier request, or are to be forgotten now.

    Raises:
        UserError: naming the first such row by its number.
    """
    if guard and not earlier:
        raise UserError(
            "There is no earlier request to guard.",
            "A guard belongs to a run on top of the active stack: activate it, or drop --guard.",
        )
    known = frozenset[str]().union(*(one.marks for one in earlier))
    all_known = not any(one.unknown for one in earlier)
    now = {normalised(row.question) for row in asked}
    for number, row in enumerate(guard, start=1):
        if normalised(row.question) in now:
            raise UserError(
                f"Guard row {number} is also a row of the request.",
                "Guard rows are those of earlier requests: remove it from one of the two.",
            )
        if all_known and not marks_of(key, row.question) & known:
            raise UserError(
                f"Guard row {number} is not a row of an active request.",
                "A guard keeps forgotten rows forgotten: what must be kept goes to --retain.",
            )


def joined(requests: Sequence[Request]) -> Request:
    """Several requests as one: all their rows once, and the retain rows that none of them names."""
    if len(requests) == 1:
        return requests[0]
    rows = {normalised(row.question): row for request in requests for row in request.rows}
    kept = [{normalised(row.question) for row in request.retain} for request in requests]
    common = set.intersection(*kept) - set(rows)
    retain = tuple(row for row in requests[0].retain if normalised(row.question) in common)
    others = {normalised(row.question): row for request in requests for row in request.others}
    left = tuple(row for asked, row in others.items() if asked not in rows)
    name = "+".join(request.name for request in requests)
    return Request(name, "joined", tuple(rows.values()), retain, left)
