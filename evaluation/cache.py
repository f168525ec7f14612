"""The resume cache: finished results in files whose names hash everything they depend on.

A command that was interrupted runs again and reads what is finished. A result is reused only where
every input is the same, so whoever adds an entry names every input: weights, load options,
template, rows, retain rows, reference log, protocol, limit, settings. The versions of the packages
and of this cache are always part of the key.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from adapters.atomic_files import sha256_file, sha256_json, write_bytes
from adapters.environment import versions
from adapters.errors import UserError
from unlearner import distributed

KIND, SCHEMA = "unlearner-cache", 2
Value = TypeVar("Value")


def key_of(**inputs: Any) -> str:
    """Hex SHA-256 of named inputs, of the package versions and of the cache's schema.

    Two calls give the same key exactly when all inputs are equal. Inputs may be JSON values,
    dataclasses (`Row`, `BaseSpec`, `UnlearnConfig`, `EvalLog`, ...), mappings with string keys,
    sequences, sets and paths. A path to a file counts as the file's bytes.

    Raises:
        TypeError: an input of another kind, a folder among them: name what it holds instead.
        ValueError: NaN or infinity.
    """
    packages = {name: text for name, text in versions().items() if name != "python"}
    return sha256_json({"schema": SCHEMA, "versions": packages, "inputs": _json_value(inputs)})


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        if not value.is_file():
            raise TypeError(f"{value} is no file, so its name does not say what it holds")
        return {"sha256": sha256_file(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return {"type": type(value).__name__, **_json_value(named)}
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("the keys of a mapping must be strings")
        return {name: _json_value(each) for name, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_json_value(each) for each in value), key=json.dumps)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_json_value(each) for each in value]
    raise TypeError(f"{type(value).__name__} is not a JSON value, so it cannot be part of a key")


@dataclass(frozen=True)
class Cache:
    """A folder of finished results.

    Attributes:
        folder: where the files are; None keeps nothing.
        key: `key_of` what all entries depend on, such as the weights.
        seconds: how long each result took that this object gave, also those read from a file.
    """

    folder: Path | None
    key: str
    seconds: list[float] = field(default_factory=list, compare=False)

    def entry(self, name: str, **inputs: Any) -> Entry:
        """The result `name`; another key or other inputs make it another file."""
        if self.folder is None:
            return Entry(None, self.seconds)
        key = key_of(cache=self.key, name=name, **inputs)
        return Entry(self.folder / f"{name}-{key[:16]}.json", self.seconds)


@dataclass(frozen=True)
class Entry:
    """One result of a `Cache`: a JSON value in a file that is written whole or not at all.

    With several processes the first one reads and writes, and all get the same value.
    """

    path: Path | None
    seconds: list[float] = field(default_factory=list, compare=False)

    def read(self) -> Any:
        """The stored value, None where there is none yet.

        Raises:
            UserError: the file is damaged.
        """
        stored = self._stored()
        return None if stored is None else stored["value"]

    def write(self, value: Value, seconds: float = 0.0) -> Value:
        """Stores `value`, which took `seconds` to compute, and gives it back."""
        if self.path is not None and distributed.rank() == 0:
            body = {"kind": KIND, "schema": SCHEMA, "seconds": seconds, "value": value}
            text = json.dumps(body, ensure_ascii=False, allow_nan=False, indent=1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.path, (text + "\n").encode())
        return value

    def result(self, compute: Callable[[], Any]) -> Any:
        """The stored value, else what `compute` gives, as JSON gives it back (lists, no tuples)."""
        stored = self._stored()
        if stored is None:
            started = time.monotonic()
            value = json.loads(json.dumps(compute()))
            stored = {"value": value, "seconds": time.monotonic() - started}
            self.write(**stored)
        self.seconds.append(stored["seconds"])
        return stored["value"]

    def rows(self, count: int, compute: Callable[[int], Any]) -> list[Any]:
        """`compute(i)` for `count` rows, stored after each, so that it continues at any row."""
        stored = self._stored() or {"value": [], "seconds": 0.0}
        values: list[Any] = stored["value"]
        started = time.monotonic() - stored["seconds"]
        seconds = float(stored["seconds"])
        while len(values) < count:
            values.append(compute(len(values)))
            seconds = time.monotonic() - started
            self.write(values, seconds)
        self.seconds.append(seconds)
        return values

    def _stored(self) -> dict[str, Any] | None:
        return distributed.from_first(self._read_file)

    def _read_file(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.is_file():
            return None
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            if raw["kind"] != KIND or raw["schema"] != SCHEMA:
                return None
            return {"value": raw["value"], "seconds": float(raw["seconds"])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The cached result {self.path} is damaged ({type(error).__name__}: {error}).",
                "Delete the file, and the result is computed again.",
            ) from error
