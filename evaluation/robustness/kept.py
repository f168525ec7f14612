"""Results of long attacks in files whose names hold what they depend on; numbers only."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from adapters.errors import UserError
from evaluation.cache import Cache, key_of
from evaluation.logs.records import write_json

PART, SCHEMA = "unlearner-robustness-part", 1
Found = TypeVar("Found")


@dataclass(frozen=True)
class Kept:
    """Results in files whose names hold what they depend on; None for no folder, nothing kept."""

    folder: Path | None
    key: Any
    seconds: list[float] = field(default_factory=list)

    def result(self, name: str, depends_on: Any, compute: Callable[[], Found]) -> Found:
        """What stands in the file, else what `compute` gives, written once it is whole."""
        path = self._path(name, depends_on)
        if (found := self._read(path)) is not None:
            self.seconds.append(found["seconds"])
            kept: Found = found["result"]
            return kept
        started = time.monotonic()
        made = compute()
        self._write(path, made, time.monotonic() - started)
        return made

    def rows(
        self, name: str, depends_on: Any, count: int, compute: Callable[[int], list[float]]
    ) -> list[list[float]]:
        """`compute(i)` for `count` rows, written after each: a stopped attack goes on there."""
        path = self._path(name, depends_on)
        found = self._read(path) or {"result": [], "seconds": 0.0}
        made: list[list[float]] = found["result"]
        before, started = float(found["seconds"]), time.monotonic()
        spent = before
        while len(made) < count:
            made.append(compute(len(made)))
            spent = before + time.monotonic() - started
            self._write(path, made, spent, note=False)
        self.seconds.append(spent)
        return made

    def _path(self, name: str, depends_on: Any) -> Path | None:
        return Cache(self.folder, key_of(weights=self.key)).entry(name, on=depends_on).path

    def _read(self, path: Path | None) -> dict[str, Any] | None:
        if path is None or not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known = found["kind"] == PART and found["schema"] == SCHEMA
            return {"result": found["result"], "seconds": found["seconds"]} if known else None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The kept part {path} is damaged ({type(error).__name__}: {error}).",
                "Remove the file: that part is then done again.",
            ) from error

    def _write(self, path: Path | None, result: Any, seconds: float, *, note: bool = True) -> None:
        if note:
            self.seconds.append(seconds)
        if path is not None:
            body = {"kind": PART, "schema": SCHEMA, "result": result, "seconds": seconds}
            write_json(path, body)
