"""What commands on adapters share: how they name adapters, and how they show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adapters.store.activation import StackChange
from adapters.store.store import AdapterStore
from ui.cli import options
from ui.console import Console

SEE_LIST = "See `unlearner adapters list`."


def verb(verbs: Any, name: str, run: Callable[..., int], text: str) -> options.Parser:
    """The parser of `adapters NAME`, with the flags that all of them have."""
    about = f"{text[:1].upper()}{text[1:]}."
    return options.add_command(verbs, name, run, "store", help=text, description=about)


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
