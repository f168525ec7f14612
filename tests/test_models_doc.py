"""docs/models.md says of every family what is measured here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import FAMILIES
from tests.models_table import COLUMNS, DOC, measure, read_table


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_families_is_what_is_measured(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences are of float32 rounding: at most 1e-5, and the table's within a factor of 30."""
    monkeypatch.setenv("UNLEARNER_KEY", str(tmp_path / "key"))
    documented = read_table(DOC.read_text())[family]
    measured = measure(family, tmp_path)
    assert list(measured) == list(documented) == list(COLUMNS)
    for column in COLUMNS:
        said, seen = documented[column], measured[column]
        if column in ("preview", "dry-run", "forget") or "padded" in (said, seen):
            assert said == seen, column
            continue
        assert float(seen) < 2e-5, column
        assert float(seen) <= 30 * max(float(said), 1e-7), column
    assert measured["stack"] == "0"


def test_the_page_is_short_and_names_every_family() -> None:
    text = DOC.read_text()
    words = [word for word in text.split() if word.strip("|-")]
    assert len(words) <= 900
    assert read_table(text).keys() == FAMILIES.keys()
