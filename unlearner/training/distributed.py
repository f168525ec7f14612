"""Several processes of one job, as `accelerate launch` and `torchrun` start them.

Without a launcher everything here is the identity. On CPUs the processes talk through gloo.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def world_size() -> int:
    """How many processes share the job."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1)


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0") or 0) if world_size() > 1 else 0


def join() -> None:
    """Meets the other processes, once; every later call here needs it."""
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Ends the meeting, so that no process waits for one that is gone."""
    if world_size() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            # A trainer's cycles still hold the group; its threads must end before the interpreter
            # does, or they now and then abort the process at its exit.
            gc.collect()


def wait() -> None:
    """Waits for all processes that have met."""
    if world_size() > 1:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.barrier()


def from_first(make: Callable[[], Result]) -> Result:
    """`make()` as run by the first process alone, given to all; its exception is raised by all."""
    if world_size() == 1:
        return make()
    import torch.distributed

    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: Result = box[0]
    return result


def any_of(flag: bool) -> bool:
    """Whether `flag` holds in any process."""
    if world_size() == 1:
        return flag
    import torch.distributed

    flags: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(flags, flag)
    return any(flags)


def largest(value: int) -> int:
    """The largest `value` of any process."""
    if world_size() == 1:
        return value
    import torch.distributed

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return int(max(found))


def sums(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over the processes, which must all have the same keys."""
    if world_size() == 1:
        return values
    import torch.distributed

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, values)
    return {name: sum(one[name] for one in found) for name in values}


def spread(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]
) -> list[Result]:
    """`work(items)` with the items dealt out to the processes: each exactly once, in order.

    Samplers that pad the last batch count rows twice; dealing out does not, whatever the numbers.
    """
    count = world_size()
    if count == 1:
        return list(work(items))
    import torch.distributed

    mine = list(work(items[rank() :: count]))
    found: list[Any] = [None] * count
    torch.distributed.all_gather_object(found, mine)
    return [found[i % count][i // count] for i in range(len(items))]
