"""Jobs side by side, each in a process of its own with one thread, reporting to one place."""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """`work(report=..., **arguments)`: a module-level function and what it is given."""

    name: str
    work: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)


def side_by_side(jobs: Sequence[Job], report: Report) -> dict[str, Any]:
    """The result of every job by name; all run at once, one torch thread each.

    Progress of a job arrives at `report` with its `job` name added.

    Raises:
        UserError: as raised in a job.
        RuntimeError: with the job's traceback, for anything else, or when a job dies.
    """
    context = multiprocessing.get_context("spawn")
    inbox: Any = context.Queue()
    with _one_thread_each():
        running = {
            job.name: context.Process(target=_run, args=(job, inbox), daemon=True) for job in jobs
        }
        for process in running.values():
            process.start()
    results: dict[str, Any] = {}
    try:
        while len(results) < len(jobs):
            _receive(inbox, running, results, report)
    finally:
        for process in running.values():
            process.join(5 if len(results) == len(jobs) else 0)
            if process.is_alive():
                process.terminate()
                process.join()
    return results


def _receive(
    inbox: Any, running: Mapping[str, BaseProcess], results: dict[str, Any], report: Report
) -> None:
    try:
        kind, name, value = inbox.get(timeout=1.0)
    except queue.Empty:
        dead = [n for n, p in running.items() if p.exitcode is not None and n not in results]
        # What a finished job said last may still be on its way.
        if dead and inbox.empty():
            code = running[dead[0]].exitcode
            raise RuntimeError(f"{dead[0]} ended without a result (exit code {code})") from None
        return
    if kind == "progress":
        report({**value, "job": name})
    elif kind == "result":
        results[name] = value
    elif isinstance(value, UserError):
        raise value
    else:
        raise RuntimeError(f"{name} failed:\n{value}")


def _run(job: Job, inbox: Any) -> None:
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    # Bars and notices of libraries would run across the one progress line of the parent.
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        result = job.work(
            report=lambda event: inbox.put(("progress", job.name, event)), **job.arguments
        )
        inbox.put(("result", job.name, result))
    except KeyboardInterrupt:
        # Ctrl-C reaches the whole process group: the parent says what there is to say.
        return
    except UserError as error:
        inbox.put(("error", job.name, error))
    except Exception:
        inbox.put(("error", job.name, traceback.format_exc()))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Inside: new processes start with one thread for OpenMP, MKL and tokenizers."""
    wanted = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
