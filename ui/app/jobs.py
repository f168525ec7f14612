"""Long work as processes of their own: they outlive the page and the app, and are found again.

A job is a command of the command line in a private folder: `job.json` (its words and its name),
`events.jsonl` (what it told), `outcome.json` (how it ended), `running.lock` (held while it runs).
`python -m ui.app.jobs FOLDER` runs it. Ctrl-C's signal makes a training finish its step and save.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from ui.console import Console, json_value

JOB, EVENTS, OUTCOME, LOCK, REQUEST = (
    "job.json", "events.jsonl", "outcome.json", "running.lock", "request.jsonl",
)  # fmt: skip
STOPPING, RESUMED = "stopping", "Going on."
ENDED = ("done", "saved", "failed", "died", "withdrawn")


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
    """The jobs in a folder; one runs at a time, the others wait in the order they came."""

    def __init__(self, folder: Path, runner: Sequence[str] = ("-m", "ui.app.jobs")) -> None:
        """`runner` is what the interpreter is given to run a job's folder."""
        self.folder = folder
        self._runner = list(runner)
        self._starting = threading.Lock()

    def submit(
        self, title: str, words: Sequence[str], request: str | None = None, name: str | None = None
    ) -> str:
        """The name of a new job that runs `unlearner WORDS`; starts at once if nothing runs.

        `request` is put into a private file that stands where `words` hold `REQUEST`; it is
        deleted when the job is done.
        """
        name = name or time.strftime("%Y%m%d-%H%M%S-") + os.urandom(2).hex()
        place = self.folder / name
        place.mkdir(parents=True, mode=0o700)
        os.chmod(self.folder, 0o700)
        filled = [str(place / REQUEST) if word == REQUEST else word for word in words]
        if request is not None:
            descriptor = os.open(place / REQUEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(request)
        _write(place / JOB, {"title": title, "words": filled, "made": time.time_ns()})
        self.advance()
        return name

    def resume(self, name: str) -> None:
        """Puts a saved job, or one whose process died, back in line.

        It goes on from its last checkpoint, a job without one from the start.
        """
        place = self._place(name)
        if self.view(name).status not in ("saved", "died"):
            raise UserError("Only an interrupted job can go on.")
        job = _read(place / JOB)
        # The quickstart goes on by itself; a training is told to.
        told = "--resume" in job["words"] or job["words"][0] != "forget"
        words = [*job["words"], *([] if told else ["--resume"])]
        _append(place, {"said": RESUMED})
        (place / OUTCOME).unlink(missing_ok=True)
        (place / "started").unlink(missing_ok=True)
        _write(place / JOB, {**job, "words": words, "made": time.time_ns()})
        self.advance()

    def advance(self) -> None:
        """Starts the first job in line unless one is running."""
        with self._starting:
            views = self.views()
            if any(view.status in ("starting", "running", "stopping") for view in views):
                return
            waiting = [view for view in views if view.status == "waiting"]
            if waiting:
                self._start(self._place(waiting[0].name))

    def _start(self, place: Path) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        with (place / "stderr.txt").open("ab") as errors:
            # A session of its own: closing the app's terminal must not stop the training.
            process = subprocess.Popen(
                [sys.executable, *self._runner, str(place)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        _write(place / "started", {"pid": process.pid, "time": time.time()})
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie is left behind

    def cancel(self, name: str) -> str:
        """What became of it: a running job saves and ends, a waiting one is withdrawn."""
        view, place = self.view(name), self._place(name)
        if view.status == "waiting":
            _write(place / OUTCOME, {"status": "withdrawn", "text": "Withdrawn before it began."})
            (place / REQUEST).unlink(missing_ok=True)
            return "Withdrawn."
        if view.ended:
            return "It has ended already."
        if view.status == "starting":
            raise UserError("The job is just starting.", "Cancel it in a moment.")
        os.kill(int(_read(place / LOCK)["pid"]), signal.SIGINT)
        return "It finishes its step and saves."

    def forget(self, name: str) -> None:
        """Deletes what is known of an ended job."""
        if not self.view(name).ended:
            raise UserError("The job has not ended.", "Cancel it first.")
        shutil.rmtree(self._place(name))

    def views(self) -> list[JobView]:
        """All jobs, the oldest first."""
        if not self.folder.is_dir():
            return []
        names = [path.parent.name for path in self.folder.glob(f"*/{JOB}")]
        found = sorted(names, key=lambda name: _read(self.folder / name / JOB)["made"])
        views: list[JobView] = []
        for name in found:
            ahead = sum(not view.ended for view in views)
            views.append(self.view(name, ahead))
        return views

    def view(self, name: str, position: int = 0) -> JobView:
        """One job as it stands."""
        place = self._place(name)
        job, outcome = _read(place / JOB), _read(place / OUTCOME)
        events = _events(place / EVENTS)
        steps = tuple(e for e in events if e.get("step") is not None)
        said = next((str(e["said"]) for e in reversed(events) if "said" in e), "")
        status = str(outcome.get("status") or _status(place, events))
        return JobView(
            name, job["title"], tuple(job["words"]), status, position, steps, said, outcome
        )

    def _place(self, name: str) -> Path:
        place = self.folder / name
        if "/" in name or name.startswith(".") or not (place / JOB).is_file():
            raise UserError(f"There is no job {name!r}.")
        return place


def _status(place: Path, events: Sequence[Mapping[str, Any]]) -> str:
    if not (place / "started").is_file():
        return "waiting"
    if not (place / LOCK).is_file() or not _alive(place):
        # The lock comes seconds after the start, with the interpreter.
        fresh = time.time() - float(_read(place / "started").get("time", 0)) < 60
        begun = (place / LOCK).is_file() and _read(place / LOCK).get("for") == _stamp(place)
        return "starting" if fresh and not begun else "died"
    # A job that goes on was asked to stop once, but that is over.
    signs = [e["said"] for e in events if e.get("said") in (STOPPING, RESUMED)]
    return "stopping" if signs[-1:] == [STOPPING] else "running"


def _stamp(place: Path) -> Any:
    return _read(place / JOB).get("made")


def _alive(place: Path) -> bool:
    """Whether the process in the lock file lives and is still the one that wrote it."""
    held = _read(place / LOCK)
    if held.get("for") != _stamp(place):
        return False
    return _birth(int(held["pid"])) == held.get("birth")


def _birth(pid: int) -> str | None:
    """What tells a process from a later one with the same number; None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        return str(pid)
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] == "Z" else fields[19]


def _events(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may be half written
    return [json.loads(line) for line in lines]


def _append(place: Path, event: Mapping[str, Any]) -> None:
    with (place / EVENTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({**json_value(event), "time": time.time()}) + "\n")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write(path: Path, value: Mapping[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    aside.write_text(json.dumps(json_value(value)), encoding="utf-8")
    aside.replace(path)


class JobConsole(Console):
    """A console that writes what a command tells into the job's folder."""

    def __init__(self, place: Path) -> None:
        super().__init__(as_json=True)
        self.found: dict[str, Any] = {}
        self._place = place

    def _tell(self, event: Mapping[str, Any]) -> None:
        _append(self._place, event)

    def words(self, text: str) -> None:
        """A line of words."""
        self._tell({"said": text})

    def urgent(self, text: str) -> None:
        """The word that it was asked to stop; comes from inside a signal handler."""
        self._tell({"said": STOPPING})

    def progress(self, event: Mapping[str, Any]) -> None:
        """One step."""
        self._tell(event)

    def result(self, value: Mapping[str, Any]) -> None:
        """The result, kept until the end."""
        self.found = dict(value)


def main(place: Path) -> int:
    """Runs the job in `place`; the command's exit code."""
    from adapters.errors import Interrupted
    from ui.cli.main import _quiet_libraries, parse, unexpected

    job = _read(place / JOB)
    _write(place / LOCK, {"pid": os.getpid(), "birth": _birth(os.getpid()), "for": job["made"]})
    console = JobConsole(place)
    try:
        args = parse(job["words"])
        _quiet_libraries(console)
        code: int = args.run(args, console)
        outcome = {"status": "done", "text": "Done.", "result": console.found}
    except Interrupted as error:
        code, outcome = error.exit_code, {"status": "saved", "text": error.problem}
    except KeyboardInterrupt:
        code, outcome = 130, {"status": "failed", "text": "Stopped at once; nothing was saved."}
    except UserError as error:
        code, outcome = error.exit_code, {"status": "failed", "text": str(error)}
    except Exception as error:
        code, outcome = 1, {"status": "failed", "text": " ".join(unexpected(error))}
    if outcome["status"] != "saved":
        (place / REQUEST).unlink(missing_ok=True)
    _write(place / OUTCOME, outcome)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
