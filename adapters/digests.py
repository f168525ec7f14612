"""Keyed digests: what the store keeps in place of forget text, and the key that makes them."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from adapters.atomic_files import temporary_name, write_bytes
from adapters.errors import UserError

MARK = re.compile(r"[0-9a-f]{32}")
# Unicode's default-ignorable characters outside of category Cf: fillers and variation selectors.
_NOT_SHOWN = frozenset(
    map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x3164, 0xFFA0,
              *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)  # fmt: skip


def digest_rows(key: bytes, rows: Iterable[tuple[str, str]]) -> str:
    """Hex HMAC-SHA256 over (question, answer) rows: the same set of rows gives the same digest.

    The order of the rows does not matter. Without the key nobody can test whether some short text
    was among the rows, which a plain hash would allow.
    """
    marks = sorted(
        hmac.new(key, _framed(question) + _framed(answer), hashlib.sha256).digest()
        for question, answer in rows
    )
    return hmac.new(key, b"rows" + b"".join(marks), hashlib.sha256).hexdigest()


def normalised(text: str) -> str:
    """The text without what does not make it another one: case, Unicode form, white space and
    characters that are not shown (zero-width spaces and joiners, soft hyphens, byte-order marks).

    Two questions are the same one if and only if this is equal.
    """
    shown = "".join(c for c in text if unicodedata.category(c) != "Cf" and c not in _NOT_SHOWN)
    folded = unicodedata.normalize("NFKC", shown).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def mark(key: bytes, question: str) -> str:
    """32 hex digits that recognise one question again, for who holds the key.

    The question alone, `normalised`: the same question answered in other words is about the same
    thing, and must not be trained back.
    """
    return _mark(key, normalised(question))


def marks_of(key: bytes, question: str) -> frozenset[str]:
    """`mark`, and what release 0.1 recorded for this question, which kept characters not shown."""
    old = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    return frozenset({mark(key, question), _mark(key, old)})


def _mark(key: bytes, plain: str) -> str:
    return hmac.new(key, b"question" + _framed(plain), hashlib.sha256).hexdigest()[:32]


def key_id(key: bytes) -> str:
    """8 hex digits that tell two keys apart; marks of another key cannot be compared."""
    return hmac.new(key, b"key", hashlib.sha256).hexdigest()[:8]


def key_path(path: Path | None = None) -> Path:
    """Where the key lies: `path`, else `$UNLEARNER_KEY`, else `~/.config/unlearner/key`."""
    given = path or os.environ.get("UNLEARNER_KEY")
    return Path(given).expanduser() if given else Path.home() / ".config" / "unlearner" / "key"


def store_key(path: Path | None = None) -> bytes:
    """The 32-byte key of the digests, created on first use, readable by its owner only.

    Kept outside every store, see `key_path`.
    """
    place = key_path(path)
    if not place.exists():
        _create_key(place)
    try:
        mode = stat.S_IMODE(place.stat().st_mode)
        key = bytes.fromhex(place.read_text(encoding="ascii").strip())
    except OSError as error:
        raise UserError(
            f"The key {place} cannot be read: {error.strerror}.", "Check it."
        ) from error
    except ValueError as error:
        raise UserError(f"The key {place} is not 64 hex digits.", "Restore it.") from error
    if len(key) != 32:
        raise UserError(f"The key {place} is not 64 hex digits.", "Restore it.")
    if os.name != "nt" and mode & 0o077:
        raise UserError(
            f"The key {place} can be read by others (mode {mode:o}).", f"Run chmod 600 {place}."
        )
    return key


def _create_key(place: Path) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = place.with_name(temporary_name(place.name))
        write_bytes(aside, (secrets.token_hex(32) + "\n").encode(), mode=0o600)
        try:
            os.link(aside, place)  # fails if another process was first: then its key is the key
        except FileExistsError:
            return
        finally:
            aside.unlink()
    except OSError as error:
        raise UserError(
            f"The key of the digests cannot be created at {place}: {error.strerror}.",
            "Point UNLEARNER_KEY at a file that can be written, outside the store.",
        ) from error


def _framed(text: str) -> bytes:
    data = text.encode("utf-8")
    return len(data).to_bytes(8, "big") + data
