"""Does it fit? Two real optimizer steps on the heaviest micro-batch, which change nothing.

The estimate of `unlearner.memory.plan` knows formulas; this measures the machine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STEPS = 2
# The share of the free memory that a run may plan with: the rest is for other processes.
USABLE = 0.95
# What a process takes of a GPU before it allocates anything; `estimate` has the same term.
CUDA_CONTEXT = 400 * 2**20


@dataclass(frozen=True)
class Measured:
    """The peak of two steps in bytes, the limit in bytes, and what was measured."""

    peak: int
    limit: int
    of: str

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak <= self.limit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate memory, on the GPU or for the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may have in all on `device`: what it holds and what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + int(torch.cuda.memory_reserved(device)) + CUDA_CONTEXT
    return int(psutil.virtual_memory().available) + resident_memory()


def budget(device: torch.device, limit: int | None) -> int:
    """Bytes that a run may use: `limit`, or most of what is free."""
    return limit if limit is not None else math.floor(USABLE * free_memory(device))


def measure_peak(
    accumulate: Callable[[], None],
    model: torch.nn.Module,
    make_optimizer: Callable[[], torch.optim.Optimizer],
    limit: int | None = None,
) -> Measured:
    """The peak of two optimizer steps; weights and random numbers are put back.

    Args:
        accumulate: adds the gradient of the heaviest micro-batch.
        model: whose trainable parameters are stepped.
        make_optimizer: the optimizer of the run with a learning rate of 0.
        limit: bytes that may be used; by default most of what is free.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    weights = [p.detach().clone() for p in parameters]
    cpu_state = torch.get_rng_state()
    gpu_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    allowed = budget(device, limit)
    start_counting(device)
    try:
        optimizer = make_optimizer()
        for _ in range(STEPS):
            accumulate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        del optimizer
        highest = peak(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        highest = max(peak(device), allowed + 1)
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, weights, strict=True):
                parameter.grad = None
                parameter.copy_(old)
        torch.set_rng_state(cpu_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, device)
            torch.cuda.empty_cache()
    of = "on the GPU" if device.type == "cuda" else "of this process"
    return Measured(highest, allowed, of)


def start_counting(device: torch.device) -> None:
    """From now on `peak` counts."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        try:
            CLEAR.write_text("5")  # Linux: reset the peak of resident memory
        except OSError:
            return  # not allowed in every container; the peak then counts from the start


def peak(device: torch.device) -> int:
    """The most bytes since `start_counting`: reserved on the GPU, with its context, or resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device)) + CUDA_CONTEXT
    for line in STATUS.read_text().splitlines() if STATUS.is_file() else []:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return peak_memory()


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The peak bytes of this process: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        return max(int(torch.cuda.max_memory_allocated(device)) for device in devices)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def size_text(count: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
