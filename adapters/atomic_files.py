"""Files that are never torn: strict JSON, SHA-256, write aside, fsync, rename."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from adapters.errors import StoreCorrupt, UserError

MAX_JSON = 8 << 20
# Process id, machine (missing in names of release 0.1) and random digits.
TEMPORARY = re.compile(r"\.tmp-(?P<pid>\d{1,10})-(?P<machine>[0-9a-f]{8})?[0-9a-f]{8}(-|$)")
FOREIGN_TEMP_SECONDS = 86_400.0


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of `value` in the one way that `dump_json` writes it."""
    return hashlib.sha256(dump_json(value).encode()).hexdigest()


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON with sorted keys; NaN and infinity are refused with ValueError."""
    separators = (",", ": ") if indent else (",", ":")
    return json.dumps(
        value,
        sort_keys=True,
        indent=indent,
        separators=separators,
        allow_nan=False,
        ensure_ascii=False,
    )


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`; StoreCorrupt for anything doubtful.

    Repeated keys, NaN, too much nesting and too much text are refused: two readers could take
    them differently.
    """
    if len(data) > MAX_JSON:
        raise StoreCorrupt(f"{what} is longer than {MAX_JSON} bytes.", "Restore it from a copy.")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        if b"\\u" in data:
            dump_json(value).encode()  # half a surrogate pair cannot be written again
    except (ValueError, RecursionError) as error:
        raise StoreCorrupt(
            f"{what} is not valid JSON: {error}", "Restore it from a copy."
        ) from error
    if not isinstance(value, dict):
        raise StoreCorrupt(f"{what} is not a JSON object.", "Restore it from a copy.")
    return value


def read_json(path: Path, what: str | None = None) -> dict[str, Any]:
    """The JSON object in the file; StoreCorrupt names the file as `what`."""
    name = what or f"{path.parent.name}/{path.name}"
    try:
        if path.stat().st_size > MAX_JSON:
            raise StoreCorrupt(f"{name} is longer than {MAX_JSON} bytes.", "Restore it.")
        return parse_json(path.read_bytes(), name)
    except FileNotFoundError as error:
        raise StoreCorrupt(f"{name} is missing.", "Restore it from a copy.") from error
    except OSError as error:
        raise StoreCorrupt(
            f"{name} cannot be read: {error.strerror}.", "Check the disk."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON; after a crash either the old or the new file is there."""
    write_bytes(path, (dump_json(value, indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`: temporary name, fsync, rename, fsync of the folder.

    `mode` holds from the start, so a private file is never readable by others.
    """
    path = Path(path)
    temporary = path.with_name(temporary_name(path.name))
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise
    fsync_folder(path.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte; a short write (full disk) raises OSError."""
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        view = view[written:]


def copy_file(source: Path, target: Path) -> str:
    """Hex SHA-256 of the bytes copied to the new file `target`, which is on the disk (fsync)."""
    digest = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "xb") as writer:
        while chunk := reader.read(1 << 22):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable (a no-op where folders cannot be opened)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(name: str = "") -> str:
    """A new hidden name that says which process of which machine made it."""
    suffix = f"-{name}" if name else ""
    return f".tmp-{os.getpid()}-{_machine()}{secrets.token_hex(4)}{suffix}"


def is_stale_temp(path: Path) -> bool:
    """Whether `path` is a temporary that no process works on any more.

    Process ids say nothing about another machine or container: a temporary of theirs, or one whose
    origin is unknown, is stale when it was last written to more than a day ago.
    """
    match = TEMPORARY.match(path.name)
    if match is None:
        return False
    if match["machine"] == _machine():
        import psutil

        return not psutil.pid_exists(int(match["pid"]))
    try:
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        written = max(file.lstat().st_mtime for file in files)
    except OSError:
        return False  # its process has just renamed or removed it
    return time.time() - written > FOREIGN_TEMP_SECONDS


@functools.cache
def _machine() -> str:
    """8 hex digits of the set of processes that process ids are unique in."""
    parts = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            link = os.path.islink(path)
            parts.append(os.readlink(path) if link else Path(path).read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def remove_tree(path: Path) -> None:
    """Delete a folder or file; one that another process deletes at the same time is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def disk_error(error: OSError, path: Path) -> UserError:
    """The UserError for a failed write: full disk, read-only folder, or what the system says."""
    reason = error.strerror or str(error)
    return UserError(
        f"{path.name} cannot be written in {path.parent}: {reason}.",
        "Nothing was changed: free some space or check the folder's permissions, then try again.",
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key appears twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large")
    return value
