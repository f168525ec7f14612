"""Runs commands in this process: what they print on each stream, and their exit code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Ran:
    """The outcome of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as the one JSON object that --json promises."""
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`run("score", path, "--json")` calls main and gives back what happened."""
    from ui.cli import main

    for name in ("UNLEARNER_DATA", "UNLEARNER_STORE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    # Commands set these for libraries and for processes they start: undone after each test.
    for name in ("PYTHONWARNINGS", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    monkeypatch.setenv("UNLEARNER_KEY", str(tmp_path / "home" / "key"))
    monkeypatch.setenv("UNLEARNER_CACHE", str(tmp_path / "home" / "cache"))

    def call(*words: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call
