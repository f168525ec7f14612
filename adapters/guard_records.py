"""Recorded teachers: what a stack answered on the rows it forgot, kept outside every store.

A later request can be held to such a record without its rows being given again. A record holds the
rows as tokens, which is forget text: it is made only when asked for, lies beside the key of the
digests with mode 600, never in a store, and goes when its adapter is removed.
"""

from __future__ import annotations

from pathlib import Path

from adapters.atomic_files import disk_error, write_bytes
from adapters.digests import key_path

FOLDER = "teachers"


def teacher_path(weights_sha256: str) -> Path:
    """The record of the adapter whose weights have this SHA-256; it need not exist."""
    return key_path().parent / FOLDER / f"{weights_sha256[:32]}.safetensors"


def write_teacher(weights_sha256: str, data: bytes) -> Path:
    """The new record, readable by its owner only."""
    path = teacher_path(weights_sha256)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise disk_error(error, path) from error
    write_bytes(path, data, mode=0o600)
    return path


def forget_teacher(weights_sha256: str) -> bool:
    """Whether there was a record; it is gone."""
    path = teacher_path(weights_sha256)
    if not path.is_file():
        return False
    path.unlink()
    return True
