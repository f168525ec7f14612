"""Finished pieces of an evaluation, kept in files whose names hold what they depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from evaluation.logs.records import RowRecord, row_from_json, row_json, write_json
from unlearner.training import distributed as ranks

PART = "unlearner-eval-part"
PART_SCHEMA = 1


@dataclass(frozen=True)
class Part:
    """One finished piece of an evaluation in a file whose name holds what it depends on."""

    path: Path | None

    def read(self) -> list[RowRecord] | None:
        """Its rows, None where the piece is still to be done."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            if raw.get("kind") != PART or raw.get("schema") != PART_SCHEMA:
                return None
            where = self.path.name
            return [row_from_json(row, f"{where} row {i}") for i, row in enumerate(raw["rows"])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"The kept part {self.path} is damaged ({type(error).__name__}: {error}).",
                "Remove the file: that part is then done again.",
            ) from error

    def write(self, rows: list[RowRecord]) -> list[RowRecord]:
        """`rows`, kept where there is a folder for it."""
        if self.path is not None and ranks.rank() == 0:
            body = {"kind": PART, "schema": PART_SCHEMA, "rows": [row_json(row) for row in rows]}
            write_json(self.path, body)
        return rows


@dataclass(frozen=True)
class Parts:
    """The folder of finished parts, None for none, and the key of the weights."""

    folder: Path | None
    key: str

    def named(self, name: str, depends_on: Any) -> Part:
        """The part of that name; another key, other rows or settings make it another file."""
        if self.folder is None:
            return Part(None)
        return Part(part_path(self.folder, name, [self.key, depends_on]))


def part_path(folder: Path, name: str, depends_on: Any) -> Path:
    """The file of a finished piece; whatever it depends on (JSON values) is in its name."""
    text = json.dumps(depends_on, ensure_ascii=False, sort_keys=True)
    return folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
