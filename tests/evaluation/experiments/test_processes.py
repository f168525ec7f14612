from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from adapters.errors import UserError
from evaluation.experiments.processes import Job, side_by_side
from tests.conftest import until

# A module of its own, so that a spawned process can import it wherever the tests lie.
WORK = """
import os, time
from adapters.errors import UserError

def double(report, number):
    report({"step": number})
    report({"step": number + 1})
    import torch
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    return number * 2, os.getpid(), torch.get_num_threads(), [os.environ[n] for n in names]

def fail(report):
    raise ValueError("the rows ran out")

def refuse(report):
    raise UserError("These rows are bad.", "Mend them.")

def die(report):
    report({"step": 1})
    os._exit(7)

def wait(report, note):
    open(note, "w").write(str(os.getpid()))
    time.sleep(300)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    (tmp_path / "some_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.delitem(__import__("sys").modules, "some_work", raising=False)
    return importlib.import_module("some_work")


def alive(pid: int) -> bool:
    """An orphan that ended may stay a zombie where the first process does not reap."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_jobs_run_at_once_with_one_thread_and_report_by_name(
    work: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    events: list[dict[str, Any]] = []
    jobs = [Job("one", work.double, {"number": 1}), Job("ten", work.double, {"number": 10})]
    results = side_by_side(jobs, events.append)
    assert {name: result[0] for name, result in results.items()} == {"one": 2, "ten": 20}
    pids = {result[1] for result in results.values()}
    assert os.getpid() not in pids
    assert [result[2:] for result in results.values()] == [(1, ["1", "1", "false"])] * 2
    assert [e["step"] for e in events if e["job"] == "one"] == [1, 2]
    assert [e["step"] for e in events if e["job"] == "ten"] == [10, 11]
    # What was set for the children does not stay.
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in os.environ
    assert not any(alive(pid) for pid in pids)


def test_an_error_comes_with_its_traceback_and_ends_the_others(
    work: ModuleType, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    jobs = [Job("bad", work.fail), Job("long", work.wait, {"note": str(note)})]
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="bad failed") as error:
        side_by_side(jobs, lambda event: None)
    assert "the rows ran out" in str(error.value)
    told = "".join(traceback.format_exception(error.value))
    assert "in fail" in told, "the traceback in the other process"
    assert time.monotonic() - started < 100
    assert not (note.exists() and alive(int(note.read_text())))


def test_a_job_ends_with_a_parent_that_is_killed(work: ModuleType, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import some_work\n"
        "from evaluation.experiments.processes import Job, side_by_side\n"
        "if __name__ == '__main__':\n"
        f"    job = Job('long', some_work.wait, {{'note': {str(note)!r}}})\n"
        "    side_by_side([job], lambda event: None)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, str(tmp_path)])}
    with subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=environment) as parent:
        until(lambda: note.exists() and note.read_text() != "", 100)
        parent.kill()
    pid = int(note.read_text())
    until(lambda: not alive(pid), 100)


def test_an_error_of_the_user_passes_through_as_it_is(work: ModuleType) -> None:
    with pytest.raises(UserError) as error:
        side_by_side([Job("asked", work.refuse)], lambda event: None)
    assert (error.value.problem, error.value.fix) == ("These rows are bad.", "Mend them.")


def test_a_job_that_dies_is_reported(work: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="killed ended without a result"):
        side_by_side([Job("killed", work.die)], lambda event: None)
