"""Jobs side by side, each in its own process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from adapters.errors import UserError

Report = Callable[[dict[str, Any]], None]
# How often progress is passed on, in seconds.
TICK = 0.1
# Where a job's process puts its progress; set when the process starts.
_inbox: Any = None


@dataclass(frozen=True)
class Job:
    """`work(report=..., **arguments)`: a module-level function and its arguments."""

    name: str
    work: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)


def threads_each(processes: int) -> int:
    """Torch threads of each of so many processes that share this machine's cores."""
    return max(1, (os.cpu_count() or 2) // processes)


def side_by_side(jobs: Sequence[Job], report: Report, threads: int = 1) -> dict[str, Any]:
    """The result of every job by name; all run at once, with so many torch threads each.

    Progress of a job arrives at `report` with its `job` name added. When a job fails the others are
    ended.

    Raises:
        UserError: as raised in a job.
        RuntimeError: a job raised anything else (the cause has its traceback), or its process died.
    """
    context = multiprocessing.get_context("spawn")
    inbox: Any = context.Queue()
    others = set(multiprocessing.active_children())

    def pass_on() -> None:
        while True:
            try:
                name, event = inbox.get(timeout=TICK)
            except queue.Empty:
                return
            report({**event, "job": name})

    pool = ProcessPoolExecutor(len(jobs), context, _start, (inbox, threads))
    try:
        futures = {job.name: pool.submit(_run, job) for job in jobs}
        left = set(futures.values())
        while left and not any(f.done() and f.exception() for f in futures.values()):
            pass_on()
            left = wait(left, timeout=0, return_when=FIRST_EXCEPTION).not_done
        pass_on()
        failed = [name for name, f in futures.items() if f.done() and f.exception()]
        if failed:
            error = futures[failed[0]].exception()
            if isinstance(error, UserError):
                raise error
            if isinstance(error, BrokenProcessPool):
                names = ", ".join(futures)
                raise RuntimeError(f"a process of {names} ended without a result") from error
            raise RuntimeError(f"{failed[0]} failed: {error!r}") from error
        return {name: f.result() for name, f in futures.items()}
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # what still runs here runs for nothing
        pool.shutdown(wait=True, cancel_futures=True)


def _start(inbox: Any, threads: int) -> None:
    global _inbox
    _inbox = inbox
    # Before torch and transformers are imported, which read them. Progress bars and notices of
    # libraries would overwrite the parent's progress line.
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if "torch" in sys.modules:  # by the script that called, which a new process imports again
        sys.modules["torch"].set_num_threads(threads)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Ctrl-C reaches the whole process group: the parent ends its jobs itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process where its parent was killed and could not do it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(job: Job) -> Any:
    return job.work(report=lambda event: _inbox.put((job.name, event)), **job.arguments)
