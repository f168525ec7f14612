"""The console: data on stdout, words on stderr, one moving line on a terminal only."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from ui import console as module
from ui.cli.output.events import show_event
from ui.console import Console, cell_text, duration_text, progress_line, size_text, table_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The console's clock; the test moves it."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    return now


def test_json_mode_prints_one_object_and_no_text() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(as_json=True, stdout=out, stderr=err)
    console.text("a line for people")
    console.table([{"name": "origin", "forget_quality": 0.1}])
    console.words("loading")
    console.hint("try this")
    console.result({"path": Path("a/b"), "p": math.nan, "d": math.inf, "table": ({"n": 1},)})
    assert json.loads(out.getvalue()) == {"path": "a/b", "p": None, "d": None, "table": [{"n": 1}]}
    assert err.getvalue() == "loading\n"


def test_text_mode_prints_no_json() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(stdout=out, stderr=err)
    console.text("a line")
    console.result({"a": 1})
    console.hint("try this")
    assert out.getvalue() == "a line\n"
    assert err.getvalue() == "Hint: try this\n"


def test_table_aligns_text_left_and_numbers_right() -> None:
    rows = [
        {"name": "origin", "forget_quality": 1.3e-22, "n": 200, "ok": True},
        {"name": "npo", "forget_quality": 0.5, "n": 20, "extra": "word"},
    ]
    assert table_lines(rows) == [
        "name    forget_quality    n  ok   extra",
        "origin         1.3e-22  200  yes  -",
        "npo             0.5000   20  -    word",
    ]
    assert table_lines(rows, ["name", "n"]) == ["name      n", "origin  200", "npo      20"]
    assert table_lines([], ["name"]) == ["name"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (math.nan, "-"), (0.0, "0"), (0.57123, "0.5712"), (12.3456, "12.35"),
        (1234.5, "1234"), (1.1e-19, "1.1e-19"), (2e7, "2.0e+07"), (-0.25, "-0.2500"),
        (True, "yes"), (7, "7"), (["a", 2], "a, 2"), (math.inf, "inf"),
    ],
)  # fmt: skip
def test_cells(value: object, text: str) -> None:
    assert cell_text(value) == text


def test_times_and_sizes() -> None:
    assert [duration_text(s) for s in (0, 59.6, 242, 3725)] == [
        "00:00",
        "01:00",
        "04:02",
        "1:02:05",
    ]
    assert [size_text(n) for n in (512, 12_300_000, 5.4e9, 2e12)] == [
        "512 B", "12.3 MB", "5.4 GB", "2.0 TB",
    ]  # fmt: skip


def test_progress_line_has_step_losses_rate_memory_and_times() -> None:
    event = {
        "event": "train", "step": 4, "steps": 60, "loss": 0.412, "forget_loss": 0.201,
        "retain_loss": 0.211, "memory_bytes": 5.4e9, "elapsed": 2.0, "remaining": 28.0,
    }  # fmt: skip
    line = progress_line(event)
    assert line == (
        " 4/60  loss 0.4120  forget 0.2010  retain 0.2110  2.000 steps/s  5.4 GB  00:02 < 00:28"
    )
    assert "forget 0.2010  attacked 0.5000  retain" in progress_line({**event, "attack_loss": 0.5})
    assert progress_line({"event": "load"}) == ""
    assert progress_line({"message": "loading the base", "elapsed": 1}) == "loading the base  00:01"


def test_off_a_terminal_a_plain_line_every_few_seconds_and_at_the_end(clock: list[float]) -> None:
    err = io.StringIO()
    console = Console(stderr=err)
    for step in range(1, 31):
        console.progress({"step": step, "steps": 30})
        clock[0] += 1
    assert [line.strip() for line in err.getvalue().splitlines()] == [
        f"{n}/30" for n in (1, 6, 11, 16, 21, 26, 30)
    ]
    assert "\x1b" not in err.getvalue()
    assert "\r" not in err.getvalue()


def test_on_a_terminal_one_line_is_rewritten_and_closed(clock: list[float]) -> None:
    err = Terminal()
    console = Console(stderr=err)
    for step in (1, 2, 3):
        console.progress({"step": step, "steps": 9})
        clock[0] += 1
    console.words("saved")
    assert err.getvalue() == "\r\x1b[K1/9\r\x1b[K2/9\r\x1b[K3/9\nsaved\n"


def test_jobs_side_by_side_share_the_line_and_keep_their_own_pace(clock: list[float]) -> None:
    terminal, plain = Terminal(), io.StringIO()
    for err in (terminal, plain):
        console = Console(stderr=err)
        for step in (1, 2):
            for job in ("origin", "retrain"):
                event = {"event": "pretrain", "job": job, "step": step, "steps": 2}
                show_event(event, console)
        clock[0] += 100
    assert plain.getvalue().splitlines() == [
        "origin training  1/2", "retrain training  1/2",
        "origin training  2/2", "retrain training  2/2",
    ]  # fmt: skip
    assert terminal.getvalue() == (
        "\r\x1b[Korigin training  1/2"
        "\r\x1b[Korigin training  1/2 | retrain training  1/2"
        "\r\x1b[Korigin training  2/2\n"
        "\r\x1b[Kretrain training  2/2\n"
    )


def test_words_of_a_job_and_of_a_measurement() -> None:
    err = io.StringIO()
    console = Console(stderr=err)
    show_event({"event": "load", "job": "npo"}, console)
    show_event({"event": "measure", "text": "forget: scores", "step": 3, "steps": 4}, console)
    show_event({"event": "unknown"}, console)
    assert err.getvalue() == "npo: Loading the base ...\nforget: scores  3/4\n"


def test_a_line_never_wraps(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    err = Terminal()
    Console(stderr=err).progress({"message": "x" * 200, "step": 1, "steps": 9})
    assert len(err.getvalue().removeprefix("\r\x1b[K")) == 39


def test_a_dumb_terminal_gets_plain_lines(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    err = Terminal()
    Console(stderr=err).progress({"step": 1, "steps": 9})
    assert err.getvalue() == "1/9\n"


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Console(stdout=Terminal()).styled
    assert not Console(stdout=io.StringIO()).styled
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Console(stdout=Terminal()).styled
