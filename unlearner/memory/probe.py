"""Will it fit? Two real steps on the longest micro-batch, before a run begins, that change nothing.

The estimate of `unlearner.memory.estimate` knows formulas; this knows the machine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapters.errors import DoesNotFit
from unlearner.memory import estimate as memory
from unlearner.prepare import recipe
from unlearner.tokens.batch_plan import Pair

if TYPE_CHECKING:
    from unlearner.config import UnlearnConfig

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STEPS = 2
# Of what is free, what a run may plan with: the rest is for what else happens on the machine.
USABLE = 0.95


@dataclass(frozen=True)
class Measured:
    """The peak of two steps in bytes, what the limit is, and what was measured."""

    peak: int
    limit: int
    of: str

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak <= self.limit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not get memory, on the GPU or for the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still get and those it holds, on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + int(torch.cuda.memory_reserved(device))
    if not Path("/proc/meminfo").is_file():
        return sys.maxsize
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 + _resident("VmRSS")
    return sys.maxsize


def _resident(name: str) -> int:
    for line in STATUS.read_text().splitlines() if STATUS.is_file() else []:
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def longest_pairs(steps: Sequence[Sequence[Pair]], size: int, length: Callable[[Pair], int]) -> Any:
    """The micro-batch of `size` pairs that has the most tokens a plan could put together."""
    pairs = sorted({pair for step in steps for pair in step}, key=length, reverse=True)
    chosen = pairs[:size]
    return chosen + [chosen[0]] * (size - len(chosen))


def two_steps(
    loss: Callable[[], torch.Tensor],
    model: torch.nn.Module,
    config: UnlearnConfig,
    limit: int | None = None,
) -> Measured:
    """The peak of two whole optimizer steps; weights and random numbers are put back.

    Args:
        loss: forward of the longest micro-batch.
        model: whose trainable parameters are stepped.
        config: for the size of the optimizer's state.
        limit: bytes there may be; by default what is free.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    kept = [p.detach().clone() for p in trained]
    cpu_state = torch.get_rng_state()
    gpu_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    # What is measured against: before the steps, since they hold what they take.
    allowed = limit if limit is not None else math.floor(USABLE * free_memory(device))
    start_counting(device)
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    try:
        for _ in range(STEPS):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        highest = peak(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        highest = max(peak(device), allowed + 1)
    finally:
        del optimizer
        with torch.no_grad():
            for parameter, old in zip(trained, kept, strict=True):
                parameter.grad = None
                parameter.copy_(old)
        torch.set_rng_state(cpu_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, device)
            torch.cuda.empty_cache()
    of = "allocated on the GPU" if device.type == "cuda" else "of this process"
    return Measured(highest, allowed, of)


def start_counting(device: torch.device) -> None:
    """From now on `peak` counts."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")  # Linux: the peak of resident memory starts anew


def peak(device: torch.device) -> int:
    """Most bytes since `start_counting`: reserved on the GPU, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    from unlearner.training.callbacks import peak_memory

    return _resident("VmHWM") or peak_memory()


def require_fit(
    measured: Measured,
    shape: dict[str, int],
    config: UnlearnConfig,
    lengths: Sequence[int],
    holding: memory.Holding,
    n_forget: int,
) -> None:
    """Refuses a run whose two steps took more than there is, with the least that would fit.

    Raises:
        DoesNotFit: exit code 3.
    """
    if measured.fits:
        return
    expected = memory.estimate(shape, config, lengths, holding, n_forget).high
    factor = max(1.0, measured.peak / expected) if expected else 1.0
    raise DoesNotFit(
        f"Two steps on the longest rows need {gib(measured.peak)} {measured.of}, and "
        f"{gib(measured.limit)} may be used.",
        advice(shape, config, lengths, holding, measured.limit, n_forget, factor),
    )


def advice(
    shape: dict[str, int],
    config: UnlearnConfig,
    lengths: Sequence[int],
    holding: memory.Holding,
    budget: float,
    n_forget: int,
    factor: float = 1.0,
    *,
    resume: bool = False,
) -> str:
    """What to change so that it fits, as flags; or that nothing here would do.

    With `resume` it also says whether a stopped run goes on with them, or is another run.
    """
    found = memory.smallest_change(
        shape, config, lengths, holding, budget, n_forget=n_forget, factor=factor
    )
    goes_on = " With --resume the run goes on where it stopped." if resume else ""
    if found is None:
        no = "No setting here fits by the estimate: take a smaller base or a larger card."
        return no + goes_on
    said = f"Add {' '.join(found.flags)} (estimated at {gib(found.high)} or less)."
    same = found.holding == holding and recipe(found.config, n_forget) == recipe(config, n_forget)
    return said + (goes_on if same or not resume else " That is another run: it begins anew.")


def gib(count: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{count / memory.GIB:.2f} GiB" if count >= memory.GIB else f"{count / 2**20:.0f} MiB"
