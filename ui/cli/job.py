"""Runs one job of the app: `python -m ui.cli.job FOLDER`; see `ui.app.jobs` for the folder."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.errors import Interrupted, UserError
from ui.app import jobs
from ui.cli.main import parse, quiet_libraries, run_command, unexpected
from ui.console import Console


class JobConsole(Console):
    """A console that writes what a command reports into the job's folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(as_json=True)
        self.value: dict[str, Any] = {}
        self._folder = folder

    def words(self, text: str) -> None:
        """A line of words."""
        jobs.append_event(self._folder, {"said": text})

    def urgent(self, text: str) -> None:
        """Notes that the command was told to stop; runs inside a signal handler."""
        jobs.append_event(self._folder, {"said": jobs.STOPPING})

    def progress(self, event: Mapping[str, Any]) -> None:
        """One step."""
        jobs.append_event(self._folder, event)

    def result(self, value: Mapping[str, Any]) -> None:
        """The result, which goes into the outcome."""
        self.value = dict(value)


def main(folder: Path) -> int:
    """Runs the job in `folder`; the command's exit code."""
    words = jobs.begin(folder)
    console = JobConsole(folder)
    outcome: dict[str, Any]
    try:
        args = parse(words)
        quiet_libraries(console)
        code = run_command(args, console)
        outcome = {"status": "done", "text": "Done.", "result": console.value}
    except Interrupted as error:
        code, outcome = error.exit_code, {"status": "saved", "text": error.problem}
    except KeyboardInterrupt:
        code, outcome = 130, {"status": "failed", "text": "Stopped at once; nothing was saved."}
    except UserError as error:
        code, outcome = error.exit_code, {"status": "failed", "text": str(error)}
    except Exception as error:
        traceback.print_exc()  # to the job's log
        code, outcome = 1, {"status": "failed", "text": " ".join(unexpected(error))}
    jobs.end(folder, outcome)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
