"""The states of an adapter, what leads from one to another, and what a log entry changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapters.atomic_files import sha256_json
from adapters.errors import StoreCorrupt, UserError
from adapters.store.log import LogPosition
from adapters.store.manifest import SLUG

# ready       published, never active           reverted     taken off the stack; the files stay
# active      part of the stack                 superseded   another adapter took its place
# stale       active, but a parent left the stack: what it computes now was never measured
# merged      folded into released weights      quarantined  its files or base are not as recorded
# purged      files gone, manifest kept as a tombstone
STATES = (
    "ready", "active", "reverted", "superseded", "stale", "merged", "quarantined", "purged",
)  # fmt: skip
IN_STACK = ("active", "stale", "merged")
# action -> {status before: status after}; everything else is refused.
TRANSITIONS: dict[str, dict[str, str]] = {
    "activate": {
        "ready": "active", "reverted": "active", "superseded": "active", "active": "active",
        "merged": "merged", "stale": "stale",
    },
    "revert": {"active": "reverted", "stale": "reverted", "merged": "reverted"},
    "mark_stale": {"active": "stale", "stale": "stale", "merged": "stale"},
    "clear_stale": {"stale": "active"},
    "supersede": {
        "ready": "superseded", "active": "superseded", "reverted": "superseded",
        "stale": "superseded", "merged": "superseded", "superseded": "superseded",
    },
    "merge": {"ready": "merged", "active": "merged", "reverted": "merged", "merged": "merged"},
    "quarantine": {
        "ready": "quarantined", "active": "quarantined", "reverted": "quarantined",
        "superseded": "quarantined", "stale": "quarantined", "merged": "quarantined",
    },
    "release": {"quarantined": "reverted"},
    "purge": {
        "ready": "purged", "reverted": "purged", "superseded": "purged", "merged": "purged",
        "quarantined": "purged",
    },
}  # fmt: skip
REFUSALS = {
    "activate": "verify it, and release it from quarantine",
    "revert": "only an adapter of the stack can be reverted",
    "purge": "revert it first",
}


@dataclass(frozen=True)
class ActiveAdapter:
    """One place of the stack: an adapter and the factor of its trained strength."""

    slug: str
    scale: float = 1.0


@dataclass(frozen=True)
class StoreState:
    """What the log adds up to: the stack in order, every adapter's status, the base, the SHA-256
    of every manifest as published, and the end of the log.
    """

    stack: tuple[ActiveAdapter, ...] = ()
    status: dict[str, str] = field(default_factory=dict)
    base: dict[str, Any] | None = None
    manifests: dict[str, str] = field(default_factory=dict)
    log: LogPosition = field(default_factory=LogPosition)

    @property
    def stack_slugs(self) -> tuple[str, ...]:
        """Slugs of the stack in order."""
        return tuple(active.slug for active in self.stack)

    def next_number(self, on_disk: Iterable[str] = ()) -> int:
        """The number of the next adapter: never one that was used before."""
        used = [int(s[1:].split("_")[0]) for s in [*self.status, *on_disk] if SLUG.fullmatch(s)]
        return max(used, default=0) + 1

    def to_json(self) -> dict[str, Any]:
        """The state as the JSON object of state.json, with a hash that shows damage."""
        value = {
            "schema": 1,
            "stack": stack_json(self.stack),
            "status": self.status,
            "base": self.base,
            "manifests": self.manifests,
            "log": {"offset": self.log.offset, "lines": self.log.lines, "head": self.log.head},
        }
        return {**value, "check": sha256_json(value)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StoreState:
        """The state in `value`; StoreCorrupt when it is malformed."""
        rest = {key: inner for key, inner in value.items() if key != "check"}
        log, base = rest.get("log"), rest.get("base")
        if rest.get("schema") != 1 or value.get("check") != sha256_json(rest):
            raise StoreCorrupt("state.json was damaged.", "It is made again from the log.")
        if not isinstance(log, dict) or not (base is None or isinstance(base, dict)):
            raise StoreCorrupt("state.json is malformed.", "It is made again from the log.")
        offset, lines, head = log.get("offset"), log.get("lines"), log.get("head")
        if type(offset) is not int or type(lines) is not int or min(offset, lines) < 0:
            raise StoreCorrupt("state.json is malformed.", "It is made again from the log.")
        if not isinstance(head, str) or not re.fullmatch(r"[0-9a-f]{64}", head):
            raise StoreCorrupt("state.json is malformed.", "It is made again from the log.")
        stack, status = stack_from_json(value.get("stack")), _status(value.get("status"))
        manifests = _hashes(value.get("manifests"))
        return cls(stack, status, base, manifests, LogPosition(offset, lines, head))


def apply(state: StoreState, entry: Mapping[str, Any], log: LogPosition) -> StoreState:
    """The state after one entry of the log, which ends at `log`."""
    status = {**state.status, **_status(entry.get("status", {}))}
    stack = stack_from_json(entry["stack"]) if "stack" in entry else state.stack
    base = entry.get("base", state.base)
    manifests = {**state.manifests, **_hashes(entry.get("manifests", {}))}
    return StoreState(stack, status, base, manifests, log)


def after(action: str, slug: str, status: str) -> str:
    """The status of `slug` after `action`; UserError when the table does not allow it."""
    allowed = TRANSITIONS[action]
    if status not in allowed:
        raise UserError(
            f"Adapter {slug} is {status}: `{action}` is possible from {', '.join(allowed)}.",
            f"Instead, {REFUSALS[action]}." if action in REFUSALS else "",
        )
    return allowed[status]


def stack_json(stack: Iterable[ActiveAdapter]) -> list[dict[str, Any]]:
    """The stack as JSON."""
    return [{"slug": active.slug, "scale": active.scale} for active in stack]


def stack_from_json(value: Any) -> tuple[ActiveAdapter, ...]:
    """The stack in JSON; StoreCorrupt when malformed."""
    entries = value if isinstance(value, list) else [None]
    stack = []
    for entry in entries:
        slug = entry.get("slug") if isinstance(entry, dict) else None
        scale = entry.get("scale") if isinstance(entry, dict) else None
        if not isinstance(slug, str) or not SLUG.fullmatch(slug) or type(scale) not in (int, float):
            raise StoreCorrupt("The recorded stack is malformed.", "Restore the audit log.")
        stack.append(ActiveAdapter(slug, float(scale or 0.0)))
    return tuple(stack)


def _status(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(
        isinstance(slug, str) and SLUG.fullmatch(slug) and state in STATES
        for slug, state in value.items()
    ):
        raise StoreCorrupt("The recorded states are malformed.", "Restore the audit log.")
    return dict(value)


def _hashes(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(
        SLUG.fullmatch(slug) and isinstance(sha, str) for slug, sha in value.items()
    ):
        raise StoreCorrupt("The recorded manifests are malformed.", "Restore the audit log.")
    return dict(value)
