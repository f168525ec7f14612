"""Reading and changing the state of a store: one lock, one log, one state file, nothing torn."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters.atomic_files import (
    disk_error,
    is_stale_temp,
    read_json,
    remove_tree,
    temporary_name,
    write_json,
)
from adapters.environment import utc_now
from adapters.errors import StoreCorrupt, UserError
from adapters.store import log as audit
from adapters.store.states import ActiveAdapter, StoreState, apply, stack_json

LOCK_TIMEOUT = 30.0


class Journal:
    """The state of the store in `root`.

    An action counts from the moment its line is in the log. Reading needs no lock: the state is
    state.json plus the lines after it. Changing happens under a file lock (one host, local disk).
    """

    def __init__(self, root: Path, timeout: float = LOCK_TIMEOUT) -> None:
        self.root = root
        self.timeout = timeout
        self.log_path = root / "audit.jsonl"
        self.state_path = root / "state.json"

    def state(self) -> StoreState:
        """The state now. Raises StoreCorrupt when the log does not continue what was recorded."""
        recorded = self.recorded()
        entries, position, _ = audit.read_from(self.log_path, recorded.log)
        return _replay(recorded, entries, position)

    def recorded(self) -> StoreState:
        """What state.json says; the empty state when it is lost or damaged (the log has it all)."""
        if not self.state_path.is_file():
            return StoreState()
        try:
            return StoreState.from_json(read_json(self.state_path))
        except StoreCorrupt:
            return StoreState()

    @contextmanager
    def locked(self) -> Iterator[StoreState]:
        """Inside: nobody else changes the store; gives its state.

        Raises UserError naming the process that holds the lock when it stays taken.
        """
        from filelock import FileLock, Timeout

        holder = self.root / ".lock-holder"
        lock = FileLock(self.root / ".lock", timeout=self.timeout)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"The store is held by {_read_holder(holder)} for more than {self.timeout:g} s.",
                "Wait for it, or end that process; nothing was changed.",
            ) from error
        except OSError as error:
            raise disk_error(error, self.root / ".lock") from error
        try:
            # Only for the message above: a missing name is no fault.
            with contextlib.suppress(OSError):
                holder.write_text(json.dumps({"pid": os.getpid(), "since": utc_now()}))
            self._set_torn_line_aside()
            yield self.state()
        finally:
            lock.release()

    def commit(
        self,
        state: StoreState,
        action: str,
        slugs: Sequence[str],
        *,
        status: Mapping[str, str] | None = None,
        stack: Sequence[ActiveAdapter] | None = None,
        **more: Any,
    ) -> StoreState:
        """Log the action and replace state.json; the state after it. Call it under the lock."""
        entry: dict[str, Any] = {
            "time": utc_now(),
            "actor": _actor(),
            "pid": os.getpid(),
            "action": action,
            "slugs": list(slugs),
            "status": dict(status or {}),
            **{key: value for key, value in more.items() if value is not None},
        }
        if stack is not None:
            entry["stack_before"] = stack_json(state.stack)
            entry["stack"] = stack_json(stack)
        position = audit.append(self.log_path, state.log, entry)
        changed = apply(state, entry, position)
        # The log has the action: when the disk is full now, the next reader adds the line itself.
        with contextlib.suppress(UserError, OSError):
            write_json(self.state_path, changed.to_json())
        return changed

    def sweep(self) -> list[str]:
        """Delete the temporaries that dead processes left behind; their names."""
        swept = []
        for folder in (self.root, self.root / "adapters"):
            for entry in os.scandir(folder) if folder.is_dir() else ():
                if is_stale_temp(Path(entry.path)):
                    remove_tree(Path(entry.path))
                    swept.append(entry.name)
        return swept

    def discard(self, path: Path) -> None:
        """Move `path` out of sight in one step, then delete it."""
        trash = self.root / ".trash"
        trash.mkdir(exist_ok=True)
        target = trash / temporary_name(path.name)
        os.rename(path, target)
        remove_tree(target)

    def _set_torn_line_aside(self) -> None:
        _, position, torn = audit.read_from(self.log_path, self.recorded().log)
        if torn:
            trash = self.root / ".trash"
            try:
                trash.mkdir(exist_ok=True)
                aside = trash / f"torn-line-{position.lines + 1}-{utc_now().replace(':', '')}"
                aside.write_bytes(torn)
                os.truncate(self.log_path, position.offset)
            except OSError as error:
                raise disk_error(error, self.log_path) from error


def _replay(
    state: StoreState, entries: Sequence[Mapping[str, Any]], end: audit.LogPosition
) -> StoreState:
    """`state` with the entries applied, which reach to `end` of the log."""
    for entry in entries:
        state = apply(state, entry, end)
    return state


def _actor() -> str:
    given = os.environ.get("UNLEARNER_ACTOR")
    if given:
        return given[:80]
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}" if hasattr(os, "getuid") else "unknown"


def _read_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {int(holder['pid'])} since {str(holder['since'])[:19]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
