"""What commands on adapters share: how they name adapters, and how they show them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ui.cli import options

if TYPE_CHECKING:
    from adapters.store.activation import StackChange
    from adapters.store.store import AdapterStore
    from ui.console import Console

SEE_LIST = "See `unlearner adapters list`."


def verb(verbs: Any, name: str, run: Any, text: str) -> options.Parser:
    """The parser of `adapters NAME`, with the flags that all of them have."""
    parser: options.Parser = verbs.add_parser(
        name,
        parents=[options.store(), options.common()],
        help=text,
        description=f"{text[:1].upper()}{text[1:]}.",
    )
    parser.set_defaults(run=run)
    return parser


def open_store(args: argparse.Namespace) -> AdapterStore:
    """The store that --store names, which must exist."""
    from adapters.store.store import AdapterStore

    return AdapterStore.open(options.store_path(args))


def report_change(change: StackChange, store: AdapterStore, console: Console) -> int:
    """Prints the stack, what changed, and what has to be measured again."""
    table = [{"name": one.slug, "scale": one.scale} for one in change.stack]
    active = [one.slug for one in change.stack]
    if table:
        console.table(table, ["name", "scale"])
    for slug, status in change.changed.items():
        console.words(f"{slug} is now {status}.")
    for slug in change.stale:
        gone = [p for p in store.catalog.parents_of(slug)[0] if p not in active]
        trained = f"on top of {', '.join(gone)}" if gone else "on another stack"
        console.words(
            f"Warning: {slug} was trained {trained}: what it computes now is not measured, part "
            "of what it forgot may be back. It needs re-evaluation."
        )
    if change.stale:
        console.hint("measure the stack again with `unlearner evaluate`, or revert these too.")
    if not change.stack:
        console.words("The stack is empty: the bare base, bit for bit.")
    found = {"active": active, "changed": change.changed, "stale": change.stale, "table": table}
    console.result({"store": str(store.path), **found})
    return 0
