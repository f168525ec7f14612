"""The terminal: words and progress on stderr, data on stdout, nothing moving off a terminal."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

PLAIN_SECONDS = 5.0  # between two progress lines where the screen cannot be rewritten
LIVE_SECONDS = 0.1
_CLEAR = "\r\x1b[K"


class Console:
    """Everything a command prints. With `as_json` stdout gets one JSON object and nothing else."""

    def __init__(
        self, *, as_json: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None
    ) -> None:
        self.as_json = as_json
        self._out = stdout if stdout is not None else sys.stdout
        self._err = stderr if stderr is not None else sys.stderr
        self.live = _is_terminal(self._err)  # where a line may be rewritten
        self._shown: dict[str, float] = {}
        self._lines: dict[str, str] = {}
        self._line_open = False

    @property
    def styled(self) -> bool:
        """Whether stdout may carry escape codes: a terminal, and NO_COLOR is not set."""
        return _is_terminal(self._out) and not os.environ.get("NO_COLOR")

    def words(self, text: str) -> None:
        """Prints a line of words on stderr, at once."""
        self._close_line()
        print(text, file=self._err, flush=True)

    def urgent(self, text: str) -> None:
        """Prints a line of words from inside a signal handler, where buffers may be in use."""
        try:
            descriptor = self._err.fileno()
        except OSError:  # not a real file
            self.words(text)
            return
        os.write(descriptor, f"{chr(10) if self._line_open else ''}{text}\n".encode())
        self._line_open = False

    def hint(self, text: str) -> None:
        """Names the next command on stderr; a script that asked for JSON does not need it."""
        if not self.as_json:
            self.words(f"Hint: {text}")

    def error(self, problem: str, fix: str = "") -> None:
        """Prints what is wrong and what to do about it on stderr."""
        self.words(f"Error: {problem.rstrip()}")
        if fix:
            self.words(f"Fix: {fix}")

    def text(self, text: str = "") -> None:
        """Prints a line of data on stdout; nothing with --json."""
        if not self.as_json:
            self._close_line()
            print(text, file=self._out, flush=True)

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
        """Prints `rows` as aligned text on stdout; nothing with --json."""
        for line in table_lines(rows, columns):
            self.text(line)

    def result(self, value: Mapping[str, Any]) -> None:
        """Prints the command's result as one JSON object; nothing without --json."""
        if self.as_json:
            self._close_line()
            text = json.dumps(json_value(value), ensure_ascii=False, indent=1, allow_nan=False)
            print(text, file=self._out, flush=True)

    def progress(self, event: Mapping[str, Any]) -> None:
        """Shows a step of long work: one rewritten line on a terminal, else a line now and then.

        Jobs that run side by side (`job`) share the rewritten line.
        """
        line, job = progress_line(event), str(event.get("job", ""))
        last = bool(event.get("steps")) and event.get("step") == event.get("steps")
        pause = LIVE_SECONDS if self.live else PLAIN_SECONDS
        now = time.monotonic()
        if not line or (now - self._shown.get(job, -pause) < pause and not last):
            return
        self._shown[job] = now
        self._lines[job] = line
        if last:
            del self._lines[job]
        if not self.live:
            self.words(line)
        elif last:
            self._rewrite(line)
            self._close_line()
        else:
            self._rewrite(" | ".join(self._lines.values()))

    def _rewrite(self, line: str) -> None:
        width = shutil.get_terminal_size().columns
        self._err.write(_CLEAR + line[: width - 1])
        self._err.flush()
        self._line_open = True

    def _close_line(self) -> None:
        if self._line_open:
            self._err.write("\n")
            self._line_open = False


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def json_value(value: Any) -> Any:
    """`value` as strict JSON: tuples become lists, paths text, NaN and infinities null."""
    if isinstance(value, Mapping):
        return {str(key): json_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_value(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def table_lines(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> list[str]:
    """The rows as aligned text lines under a header: text left, numbers right, None as "-".

    Without `columns` those of all rows are shown, in the order in which they first appear.
    """
    shown = list(columns) or list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell_text(row.get(column)) for column in shown] for row in rows]
    right = [
        any(_is_number(row.get(column)) for row in rows)
        and not any(isinstance(row.get(column), str) for row in rows)
        for column in shown
    ]
    widths = [max(map(len, column)) for column in zip(shown, *cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [shown, *cells]
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell_text(value: Any) -> str:
    """One cell: four significant digits, "-" for what was not measured."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number_text(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(cell_text, value))
    return str(value)


def number_text(value: float) -> str:
    """A number in four significant digits: 0.5712, 12.40, 1.1e-19."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 4 - max(0, math.floor(math.log10(abs(value))) + 1))
        return f"{value:.{digits}f}"
    return f"{value:.1e}"


def setting_text(value: Any) -> str:
    """A setting as one would type it: 1e-04, 0.1375, yes, q_proj,v_proj."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ",".join(map(setting_text, value))
    return cell_text(value)


def duration_text(seconds: float) -> str:
    """Seconds as mm:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    clock = f"{rest // 60:02d}:{rest % 60:02d}"
    return f"{hours}:{clock}" if hours else clock


def size_text(count: float) -> str:
    """Bytes as 512 B, 12.3 MB, 5.4 GB (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


# What a training tells of its losses, and the word for each.
LOSSES = (
    ("loss", "loss"),
    ("forget_loss", "forget"),
    ("attack_loss", "attacked"),
    ("retain_loss", "retain"),
)


def progress_line(event: Mapping[str, Any]) -> str:
    """The words of a progress event; fields it does not have are left out.

    Known keys: message, step, steps, unit (of a step), loss, forget_loss, attack_loss,
    retain_loss, memory_bytes, elapsed and remaining (seconds).
    """
    parts = [str(event["message"])] if event.get("message") else []
    step, steps = event.get("step"), event.get("steps")
    if step is not None:
        parts.append(f"{step:>{len(str(steps))}}/{steps}" if steps else f"{step}")
    for key, word in LOSSES:
        if event.get(key) is not None:
            parts.append(f"{word} {number_text(float(event[key]))}")
    if step is not None and steps and event.get("remaining"):
        # From what remains: a resumed run did not do its first steps now.
        rate = (steps - step) / event["remaining"]
        parts.append(f"{number_text(rate)} {event.get('unit', 'steps')}/s" if rate else "")
    if event.get("memory_bytes"):
        parts.append(size_text(float(event["memory_bytes"])))
    if event.get("elapsed") is not None:
        times = duration_text(float(event["elapsed"]))
        if event.get("remaining") is not None:
            times += f" < {duration_text(float(event['remaining']))}"
        parts.append(times)
    return "  ".join(parts)
