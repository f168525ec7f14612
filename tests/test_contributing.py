"""CONTRIBUTING names files that exist, and walks a request through each file once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_file_it_names_exists() -> None:
    paths = re.findall(r"`((?:adapters|unlearner|evaluation|ui|tests)/[\w./]*)`", TEXT)
    assert len(paths) > 50
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_walk_names_each_file_once() -> None:
    walk = TEXT.split("## The way of a request")[1].split("\n## ")[0]
    times = Counter(re.findall(r"`([\w/]+\.py)`", walk))
    assert [path for path, number in times.items() if number > 1] == []
