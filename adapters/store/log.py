"""The append-only log of a store: one JSON line an action, each holding the hash of the one before.

The log is also the journal: a line on the disk is the moment an action counts. `state.json` is
what the lines add up to, and is made again from them when it is older or lost.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.atomic_files import disk_error, dump_json, parse_json, write_all
from adapters.errors import StoreCorrupt

GENESIS = "0" * 64


@dataclass(frozen=True)
class LogPosition:
    """A place in the log: bytes and lines before it, and the hash of the last of these lines."""

    offset: int = 0
    lines: int = 0
    head: str = GENESIS


@dataclass(frozen=True)
class LogReport:
    """What checking the whole log found; `problems` is empty when the chain is intact."""

    lines: int
    head: str
    problems: tuple[str, ...]
    torn_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether every line is there and unchanged."""
        return not self.problems


def append(path: Path, position: LogPosition, entry: dict[str, Any]) -> LogPosition:
    """Write one line after `position`, durably; the position behind it.

    The caller holds the store's lock. When the disk is full the log is as it was, and UserError
    says so.
    """
    line = dump_json({**entry, "n": position.lines + 1, "prev": position.head}).encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            write_all(descriptor, line + b"\n")
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, position.offset)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise disk_error(error, path) from error
    return LogPosition(position.offset + len(line) + 1, position.lines + 1, _hash(line))


def read_from(path: Path, position: LogPosition) -> tuple[list[dict[str, Any]], LogPosition, bytes]:
    """Entries after `position`, the position behind them, and the bytes of a torn last line.

    Raises StoreCorrupt where the chain does not continue, naming the line.
    """
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() < position.offset:
                raise StoreCorrupt(
                    f"The audit log has lost lines: {position.lines} were written.",
                    "Restore audit.jsonl from a copy.",
                )
            file.seek(position.offset)
            data = file.read()
    except FileNotFoundError as error:
        if position.lines:
            raise StoreCorrupt("The audit log is missing.", "Restore audit.jsonl.") from error
        return [], position, b""
    entries = []
    *lines, torn = data.split(b"\n")
    for index, line in enumerate(lines):
        entry, problem = _read_line(line, position)
        if problem and index == len(lines) - 1 and not torn and not line.strip(b"\0"):
            torn = line + b"\n"  # zeros where a crash lost the data but kept the length
            break
        if problem:
            raise StoreCorrupt(
                f"Line {position.lines + 1} of the audit log {problem}.",
                "`unlearner adapters log --verify` lists all; restore audit.jsonl from a copy.",
            )
        entries.append(entry)
        position = LogPosition(position.offset + len(line) + 1, position.lines + 1, _hash(line))
    return entries, position, torn


def verify(path: Path, expected: LogPosition | None = None) -> LogReport:
    """Check every line of the log against the chain, and the end against `expected`.

    `expected` is the position that state.json vouches for: it also exposes a changed or removed
    last line, which no later line's hash covers.
    """
    if not path.is_file():
        lost = expected is not None and expected.lines > 0
        return LogReport(0, GENESIS, ("the log is missing",) if lost else ())
    *lines, torn = path.read_bytes().split(b"\n")
    problems: list[str] = []
    position = LogPosition()
    for line in lines:
        _, problem = _read_line(line, position)
        if problem:
            problems.append(f"line {position.lines + 1} {problem}")
        position = LogPosition(position.offset + len(line) + 1, position.lines + 1, _hash(line))
        if expected and position.lines == expected.lines and position.head != expected.head:
            problems.append(f"line {position.lines} is not the one that state.json knows")
    if expected and position.lines < expected.lines:
        problems.append(f"{expected.lines - position.lines} lines are missing at the end")
    return LogReport(position.lines, position.head, tuple(problems), len(torn))


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _read_line(line: bytes, position: LogPosition) -> tuple[dict[str, Any], str]:
    """The entry, and what is wrong with the line (empty when nothing is)."""
    try:
        entry = parse_json(line, "the line")
    except StoreCorrupt:
        return {}, "is not valid JSON"
    if entry.get("prev") != position.head:
        return entry, "does not follow the line before it (one of the two was changed)"
    if entry.get("n") != position.lines + 1:
        return entry, "has the wrong number"
    return entry, ""
