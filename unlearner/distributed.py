"""Several processes of one job, as `accelerate launch` and `torchrun` start them.

Without a launcher every function here is the identity. On CPUs the processes talk through gloo.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from adapters.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def world_size() -> int:
    """The number of processes that share the job."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0") or 0) if world_size() > 1 else 0


def join() -> None:
    """Initialise the process group, which the functions below need with several processes.

    Raises:
        UserError: the launcher was configured for FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError(
            "Training under FSDP is not supported: the base is frozen and shared as it is.",
            "Start the processes with torchrun, or set distributed_type to MULTI_GPU.",
        )
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Destroy the process group, so that no process waits for one that has exited."""
    if world_size() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            # Reference cycles may still hold the group. Its threads must end before the
            # interpreter does, or they occasionally abort the process at exit.
            gc.collect()


def wait() -> None:
    """Wait until all processes get here."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def gather(value: Item) -> list[Item]:
    """The `value` of every process, by rank."""
    if world_size() == 1:
        return [value]
    from accelerate.utils import gather_object

    values: list[Item] = gather_object([value])
    return values


def from_first(make: Callable[[], Result]) -> Result:
    """`make()`, run by the first process only and sent to all; its exception is raised by all."""
    if world_size() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return any(gather(flag))


def largest(value: int) -> int:
    """The largest `value` of any process."""
    return max(gather(value))


def sums(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over the processes, which must all have the same keys."""
    parts = gather(values)
    return {name: sum(part[name] for part in parts) for name in values}


def spread(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result]:
    """`work(items)`, with the items shared among the processes: each exactly once, in order.

    Samplers that pad the last batch count rows twice; this does not, whatever the numbers. An
    exception in one process is raised in all of them, so that none waits for a result that never
    comes.
    """
    count = world_size()
    results: list[Result] = []
    failure: Exception | None = None
    try:
        results = list(work(items[rank() :: count]))
    except Exception as error:
        if count == 1:
            raise
        failure = error
    parts = gather((results, failure))
    for _, problem in parts:
        if problem is not None:
            raise problem
    return [parts[i % count][0][i // count] for i in range(len(items))]
