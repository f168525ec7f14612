"""The log: its chain, a torn end, a changed middle, and the state made again from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import StoreCorrupt
from adapters.store.store import AdapterStore


@pytest.fixture
def busy(publish: Any, store: AdapterStore) -> AdapterStore:
    """A store with six entries in its log."""
    for i in (1, 2, 3):
        publish(f"000{i}")
    store.activate(["0001", "0002"])
    store.revert("0001")
    store.activate(["0003"])
    return store


def test_chain_is_intact_and_says_what_happened(busy: AdapterStore) -> None:
    report = busy.verify_log()
    assert (report.ok, report.lines, report.torn_bytes) == (True, 6, 0)
    entries = busy.log()
    assert [e["action"] for e in entries] == ["publish"] * 3 + ["activate", "revert", "activate"]
    assert [s["slug"][:5] for s in entries[4]["stack_before"]] == ["r0001", "r0002"]
    assert [s["slug"][:5] for s in entries[4]["stack"]] == ["r0002"]
    assert report.head == json.loads(busy.journal.state_path.read_text())["log"]["head"]


@pytest.mark.parametrize("line", range(6))
def test_every_changed_line_is_reported(busy: AdapterStore, line: int) -> None:
    lines = busy.journal.log_path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"action":', b'"Action":', 1)
    busy.journal.log_path.write_bytes(b"".join(lines))
    report = busy.verify_log()
    assert not report.ok
    # The line itself is shown by the one after it, the last one by state.json.
    assert str(min(line + 2, 6)) in report.problems[0]


def test_removed_lines_are_reported(busy: AdapterStore) -> None:
    lines = busy.journal.log_path.read_bytes().splitlines(keepends=True)
    busy.journal.log_path.write_bytes(b"".join(lines[:2] + lines[3:]))
    assert not busy.verify_log().ok
    busy.journal.log_path.write_bytes(b"".join(lines[:-1]))
    assert "missing at the end" in busy.verify_log().problems[0]
    with pytest.raises(StoreCorrupt, match="lost lines"):
        busy.list()
    busy.journal.log_path.unlink()
    assert busy.verify_log().problems == ("the log is missing",)


@pytest.mark.parametrize("rest", [b'{"action":"rev', b"\0\0\0\0", b"\0\0\0\n"])
def test_a_torn_last_line_is_set_aside(busy: AdapterStore, rest: bytes) -> None:
    before = busy.list()
    with open(busy.journal.log_path, "ab") as file:
        file.write(rest)
    assert busy.list() == before
    busy.revert("0002")
    assert busy.verify_log().ok
    (aside,) = (busy.path / ".trash").glob("torn-line-*")
    assert aside.read_bytes() == rest


def test_state_is_what_the_log_adds_up_to(busy: AdapterStore) -> None:
    state = busy.journal.state()
    for damage in (b"", b"{", b'{"schema":1}', b'{"schema":1,"log":{"offset":-1}}'):
        busy.journal.state_path.write_bytes(damage)
        assert AdapterStore.open(busy.path).journal.state() == state
    busy.journal.state_path.unlink()
    assert AdapterStore.open(busy.path).journal.state() == state


def test_an_older_state_file_is_brought_up_to_date(busy: AdapterStore) -> None:
    old = busy.journal.state_path.read_bytes()
    busy.revert("0003")
    now = busy.journal.state()
    busy.journal.state_path.write_bytes(old)  # killed between the line and the state file
    assert AdapterStore.open(busy.path).journal.state() == now
    busy.activate(["0003"])
    assert busy.verify_log().ok


def test_actor_is_recorded(busy: AdapterStore, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("UNLEARNER_ACTOR", "privacy-desk")
    busy.revert("0002", reason="ticket-12")
    assert busy.log()[-1]["actor"] == "privacy-desk"
    assert busy.log()[-1]["reason"] == "ticket-12"
