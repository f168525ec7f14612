"""Long work as processes of their own: they outlive the page and the app, and are found again.

A job is a command of the command line in a private folder: `job.json` (title and words),
`events.jsonl` (its progress), `outcome.json` (how it ended), `process.json` (who runs it).
`python -m ui.cli.job FOLDER` runs it. Ctrl-C's signal makes a training finish its step and save.

Whatever names a person is removed when the job can no longer continue: only the command, numbers
and an outcome without those names stay in the folder. `clear_history` deletes ended jobs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from adapters.atomic_files import write_bytes
from adapters.errors import UserError
from ui.console import json_value

JOB, EVENTS, OUTCOME, PROCESS, ERRORS = (
    "job.json", "events.jsonl", "outcome.json", "process.json", "stderr.txt",
)  # fmt: skip
REQUEST, RETAIN = "request.jsonl", "retain.jsonl"  # rows that a job reads, private
SHOWN_FILES = {REQUEST: "rows.jsonl", RETAIN: "keep.jsonl"}  # what a reader's own would be called
STARTED = "started.json"
STOPPING, RESUMED = "stopping", "Continuing."
ENDED = ("done", "saved", "failed", "died", "withdrawn")
CONTINUABLE = ("saved", "died")
LOG_CHARACTERS = 8000  # of the end of a failed job's error stream
STARTUP_SECONDS = 60  # an interpreter that imports torch on a slow disk
REMOVED = "[removed]"


@dataclass(frozen=True)
class JobView:
    """A job as the page shows it.

    `status` is waiting, starting, running, stopping, done, saved (interrupted with a checkpoint),
    failed, died (its process is gone without a word) or withdrawn; `position` counts those ahead.
    """

    name: str
    title: str
    words: tuple[str, ...]
    status: str
    position: int
    steps: tuple[dict[str, Any], ...]
    said: str
    outcome: dict[str, Any]

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in ENDED


class Jobs:
    """The jobs in a folder; one runs at a time, the others wait in the order they came.

    Several app processes may share the folder: a file lock lets only one of them change it.
    """

    def __init__(self, folder: Path, runner: Sequence[str] = ("-m", "ui.cli.job")) -> None:
        """`runner` is what the interpreter is given to run a job's folder."""
        self.folder = folder
        self._runner = list(runner)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(self.folder, 0o700)
        with FileLock(self.folder / ".lock"):
            yield

    def submit(
        self,
        title: str,
        words: Sequence[str],
        files: Mapping[str, str] | None = None,
        name: str | None = None,
        private: Sequence[str] = (),
    ) -> str:
        """The name of a new job that runs `unlearner WORDS`; starts at once if nothing runs.

        `files` are the texts of `REQUEST` and `RETAIN`: private files, put where `words` hold
        these names and deleted when the job is done. `private` are names that must not outlive it.
        """
        name = name or time.strftime("%Y%m%d-%H%M%S-") + os.urandom(2).hex()
        with self._changing():
            place = self.folder / name
            place.mkdir(mode=0o700)
            filled = [str(place / word) if word in (files or {}) else word for word in words]
            for file_name, text in (files or {}).items():
                descriptor = os.open(place / file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
            job = {"title": title, "words": filled, "made": time.time_ns()}
            _write(place / JOB, {**job, "private": list(private)})
        self.advance()
        return name

    def resume(self, name: str) -> str:
        """Queues a saved job, or one whose process died, again; what to tell the reader.

        It continues from its last checkpoint, or from the start if it has none.
        """
        place = self._place(name)
        with self._changing():
            if self.view(name).status not in CONTINUABLE:
                raise UserError("Only an interrupted job can continue.")
            job = _read(place / JOB)
            # The quickstart continues by itself; a training needs the flag.
            flagged = "--resume" in job["words"] or job["words"][0] != "forget"
            words = [*job["words"], *([] if flagged else ["--resume"])]
            append_event(place, {"said": RESUMED})
            for file in (OUTCOME, STARTED):
                (place / file).unlink(missing_ok=True)
            _write(place / JOB, {**job, "words": words, "made": time.time_ns()})
        self.advance()
        return "The job is queued again."

    def advance(self) -> None:
        """Starts the first waiting job unless one is running."""
        if not self.folder.is_dir():
            return
        with self._changing():
            views = self.views()
            if any(view.status in ("starting", "running", "stopping") for view in views):
                return
            waiting = [view for view in views if view.status == "waiting"]
            if waiting:
                self._start(self._place(waiting[0].name))

    def _start(self, place: Path) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        # Noted first: an app that dies between the two lines must not start the job twice.
        _write(place / STARTED, {"time": time.time()})
        with (place / ERRORS).open("ab") as errors:
            # A session of its own: closing the app's terminal must not stop the training.
            process = subprocess.Popen(
                [sys.executable, *self._runner, str(place)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie

    def cancel(self, name: str) -> str:
        """Stops a job: a running one saves and ends, a waiting one is withdrawn."""
        place = self._place(name)
        with self._changing():
            view = self.view(name)
            if view.status == "waiting":
                end(place, {"status": "withdrawn", "text": "Withdrawn before it began."})
                return "Withdrawn."
        if view.ended:
            return "The job has already ended."
        if view.status == "starting":
            raise UserError("The job is just starting.", "Cancel it in a moment.")
        os.kill(int(_read(place / PROCESS)["pid"]), signal.SIGINT)
        return "It finishes this step and saves."

    def clear_history(self) -> int:
        """Deletes every ended job; how many. Interrupted ones can then no longer continue."""
        with self._changing():
            ended = [view.name for view in self.views() if view.ended]
            _event.cache_clear()  # they may quote a row
            for name in ended:
                shutil.rmtree(self._place(name))
        return len(ended)

    def views(self) -> list[JobView]:
        """All jobs, the oldest first."""
        if not self.folder.is_dir():
            return []
        jobs = {path.parent.name: _read(path) for path in self.folder.glob(f"*/{JOB}")}
        views: list[JobView] = []
        for name in sorted(jobs, key=lambda name: int(jobs[name].get("made", 0))):
            if (self.folder / name / JOB).is_file():  # another app may have cleared it
                views.append(self.view(name, sum(not view.ended for view in views)))
        return views

    def view(self, name: str, position: int = 0) -> JobView:
        """One job as it is now."""
        place = self._place(name)
        steps, said, stopping = _events(place)
        job, outcome = _read(place / JOB), _read(place / OUTCOME)
        status = str(outcome.get("status") or _status(place, stopping))
        if status == "died":
            outcome = {**outcome, "log": _tail(place / ERRORS)}
        return JobView(
            name, job["title"], tuple(job["words"]), status, position, steps, said, outcome
        )

    def _place(self, name: str) -> Path:
        place = self.folder / name
        if "/" in name or name.startswith(".") or not (place / JOB).is_file():
            raise UserError(f"There is no job {name!r}.")
        return place


def _events(place: Path) -> tuple[tuple[dict[str, Any], ...], str, bool]:
    """All steps of a job, its last message, and whether it was asked to stop."""
    steps, said, stopping, text = list[dict[str, Any]](), "", False, b""
    with contextlib.suppress(FileNotFoundError):
        text = (place / EVENTS).read_bytes()
    for line in text.rpartition(b"\n")[0].splitlines():  # the last line may be half written
        event = _event(line)
        if event.get("step") is not None:
            steps.append(event)
        said = str(event.get("said", said))
        # A job that was stopped and resumed is no longer stopping.
        if event.get("said") in (STOPPING, RESUMED):
            stopping = event["said"] == STOPPING
    return tuple(steps), said, stopping


@functools.lru_cache(maxsize=20_000)  # a page looks every second: only new lines are parsed
def _event(line: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(line)
    return value


def _status(place: Path, stopping: bool) -> str:
    if not (place / STARTED).is_file():
        return "waiting"
    process = _read(place / PROCESS)
    begun = process.get("for") == _read(place / JOB).get("made")
    if begun and _born(int(process["pid"])) == process["born"]:
        return "stopping" if stopping else "running"
    # The process file comes seconds after the start, with the interpreter.
    fresh = time.time() - float(_read(place / STARTED).get("time", 0)) < STARTUP_SECONDS
    return "starting" if fresh and not begun else "died"


def _born(pid: int) -> float | None:
    """When the process began, which tells it from a later one of the same id; None if gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def begin(place: Path) -> list[str]:
    """Notes that this process runs the job in `place`; the words of its command."""
    job = _read(place / JOB)
    pid = os.getpid()
    _write(place / PROCESS, {"pid": pid, "born": _born(pid), "for": job["made"]})
    words: list[str] = job["words"]
    return words


def end(place: Path, outcome: Mapping[str, Any]) -> None:
    """Files how a job ended and, unless it can continue, removes what names a person."""
    if outcome["status"] in CONTINUABLE:
        _write(place / OUTCOME, outcome)
        return
    job = _read(place / JOB)
    texts = {text for name in (REQUEST, RETAIN) for text in _row_texts(place / name)}
    private = sorted({*job.get("private", ()), *texts}, key=len, reverse=True)
    if outcome["status"] == "failed":
        outcome = {**outcome, "log": _public_lines(_tail(place / ERRORS), private)}
    for name in (REQUEST, RETAIN, ERRORS):
        (place / name).unlink(missing_ok=True)
    if private:
        job = _without(job, private)
        outcome = _without(dict(outcome), private)
    # Words may quote a row: only numbers are needed for the curves.
    steps, _, _ = _events(place)
    kept = [{key: v for key, v in step.items() if not isinstance(v, str)} for step in steps]
    write_bytes(place / EVENTS, "".join(json.dumps(step) + "\n" for step in kept).encode())
    _write(place / JOB, {**job, "private": []})
    _write(place / OUTCOME, outcome)


def _tail(path: Path) -> str:
    """The end of what a job wrote to its error stream."""
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:].strip()


def _public_lines(log: str, private: Sequence[str]) -> str:
    """The log without the lines that hold a name of the private texts: a message may quote one."""
    names = {word for text in private for word in re.findall(r"\b[^\W\d_a-z]\w+", text)}
    return "\n".join(
        REMOVED if names & set(re.findall(r"\w+", line)) else line for line in log.splitlines()
    )


def _row_texts(path: Path) -> set[str]:
    """Every text of the rows in a request's file."""
    texts: set[str] = set()
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that is no row is private as it is
                row = json.loads(line)
                values = row.values() if isinstance(row, dict) else ()
                texts |= {value for value in values if isinstance(value, str)}
            texts.add(line)
    return {text for text in texts if text.strip()}


def _without(value: Any, private: Sequence[str]) -> Any:
    """`value` with each private text replaced, wherever it occurs."""
    if isinstance(value, Mapping):
        return {key: _without(part, private) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without(part, private) for part in value]
    if isinstance(value, str):
        for text in private:
            value = value.replace(text, REMOVED)
    return value


def append_event(place: Path, event: Mapping[str, Any]) -> None:
    """Appends one event to those of the job in `place`."""
    with (place / EVENTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({**json_value(event), "time": time.time()}) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value


def _write(path: Path, value: Mapping[str, Any]) -> None:
    write_bytes(path, json.dumps(json_value(value)).encode())
