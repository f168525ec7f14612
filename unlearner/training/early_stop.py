"""Stopping a training where it meets the retrain reference, instead of after so many epochs.

Every few steps a measure given by the caller says how far the model is from a model that never saw
the forget set: below 0 it has forgotten too little, above 0 too much. The run ends once the sign
turns, with the weights of the nearer of the two last readings.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainerCallback

from adapters.errors import StoreCorrupt
from unlearner.tokens.packing import plain_attention
from unlearner.training.callbacks import Progress

if TYPE_CHECKING:
    from torch import Tensor

PROBES = 20
STATE_FILE, WEIGHTS_FILE = "gap.json", "gap.safetensors"
Quantity = Literal["gap", "nll_gap"]
Measure = Callable[[Any], Mapping[str, float]]


@dataclass(frozen=True)
class StopAt:
    """What ends a training early.

    Attributes:
        measure: the figures of a model as it is; it leaves the model alone.
        quantity: which figure must reach 0 from below, "gap" (shift of the median log R against
            the retrain reference) or "nll_gap" (mean forget NLL less the reference's).
        key: a short name that changes with what is measured; names the run's folder with others.
        every: optimizer steps between readings; None for about 20 readings a run.
    """

    measure: Measure
    quantity: Quantity = "gap"
    key: str = "gap"
    every: int | None = None

    def steps_between(self, steps: int) -> int:
        """Steps between two readings of a run of `steps`."""
        return self.every or max(1, math.ceil(steps / PROBES))


@dataclass
class Trace:
    """The readings of a run and what followed from them, as they are kept with a checkpoint.

    Attributes:
        readings: `[step, distance]`, the first before any training.
        stopped_at: the step at which the sign had turned, None while it has not.
        kept: the step whose weights are the result, None while it is the last one.
    """

    readings: list[list[float]] = field(default_factory=list)
    stopped_at: int | None = None
    kept: int | None = None

    def add(self, step: int, distance: float) -> bool:
        """Takes a reading; whether the earlier weights are the ones to keep.

        `stopped_at` and `kept` are set where the distance has come from below 0 to 0 or above. The
        weights before any training are never kept: an adapter that does nothing forgets nothing.
        """
        before = self.readings[-1] if self.readings else None
        self.readings.append([step, distance])
        if before is None or not before[1] < 0 <= distance:
            return False
        nearer = before[0] > 0 and abs(before[1]) < abs(distance)
        self.stopped_at = step
        self.kept = int(before[0]) if nearer else step
        return nearer

    def distance_at(self, step: int) -> float:
        """The reading of a step; the last one where the step is read twice."""
        return next(value for at, value in reversed(self.readings) if at == step)


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model may be measured: modes, random numbers and attention are put back after."""
    import numpy as np

    modes = [(module, module.training) for module in model.modules()]
    python, arrays = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), plain_attention(model):
            model.eval()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        for module, mode in modes:
            module.training = mode


class GapCallback(TrainerCallback):
    """Reads the distance, tells it, and ends the training once its sign turns."""

    def __init__(
        self, stop: StopAt, steps: int, log: Path, report: Progress, last: str | None = None
    ) -> None:
        """Takes what to measure and where to write.

        Args:
            stop: what ends the training.
            steps: optimizer steps of the whole run.
            log: JSON lines, appended: one of event "gap" a reading.
            report: called with every line.
            last: folder of the checkpoint that the run continues from.

        Raises:
            StoreCorrupt: the readings kept with that checkpoint are damaged.
        """
        self.trace = Trace()
        self._stop = stop
        self._steps = steps
        self._every = stop.steps_between(steps)
        self._log = log
        self._report = report
        self._before: dict[str, Tensor] = {}
        if last is not None:
            self._read(Path(last))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The reading that the first step is compared with, unless a checkpoint held one."""
        if not self._before:
            self._take(state, kwargs["model"])
            if self.trace.readings[-1][1] >= 0:
                text = "nothing is under-forgotten at the start: the run ends only after it was"
                self._report({"event": "note", "text": text})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A reading when it is due, and after the last step."""
        if state.global_step % self._every and state.global_step != self._steps:
            return
        if self._take(state, kwargs["model"]):
            control.should_training_stop = True
            control.should_save = True  # publishing may fail: the result need not be made again

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says so where the run came to its end and the reference was not reached."""
        at, distance = self.trace.readings[-1]
        if self.trace.stopped_at is None and at == self._steps and distance < 0:
            text = (
                f"the reference was not reached: the run ends at {distance:+.3f}, under-forgotten"
            )
            self._report({"event": "note", "text": text})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps readings and the weights of the last one with the checkpoint."""
        from safetensors.torch import save

        from adapters.atomic_files import write_bytes, write_json

        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_bytes(folder / WEIGHTS_FILE, save(self._before))
            write_json(folder / STATE_FILE, asdict(self.trace))

    def record(self) -> dict[str, Any]:
        """What the manifest tells of it; `stopped_at_step` is None where the run went to its end.

        `gap` is the distance of the weights that were kept, `gap_trace` every reading.
        """
        readings = self.trace.readings
        kept = self.trace.kept if self.trace.kept is not None else int(readings[-1][0])
        return {
            "stop_at": self._stop.quantity,
            "gap_every": self._every,
            "stopped_at_step": self.trace.stopped_at,
            "kept_step": kept,
            "gap": self.trace.distance_at(kept),
            "gap_trace": readings,
        }

    def _take(self, state: Any, model: torch.nn.Module) -> bool:
        """Measures; whether the run is over. The nearer weights are then in the model."""
        with undisturbed(model):
            figures = dict(self._stop.measure(model))
        distance = float(figures[self._stop.quantity])
        if not math.isfinite(distance):
            raise RuntimeError(
                f"the {self._stop.quantity} after step {state.global_step} is no number"
            )
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        go_back = self.trace.add(state.global_step, distance)
        line = {"event": "gap", "step": state.global_step, "steps": self._steps, **figures}
        line |= {"stopped_at_step": self.trace.stopped_at, "kept_step": self.trace.kept}
        if state.is_world_process_zero:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._report(line)
        if go_back:
            with torch.no_grad():
                for name, parameter in weights.items():
                    parameter.copy_(self._before[name])
        self._before = {n: p.detach().cpu().clone().contiguous() for n, p in weights.items()}
        return self.trace.stopped_at is not None

    def _read(self, folder: Path) -> None:
        """The readings kept with a checkpoint; without them the run measures where it goes on."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / STATE_FILE
        if not path.is_file():
            return
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            self.trace = Trace(raw["readings"], raw["stopped_at"], raw["kept"])
            self._before = load_file(folder / WEIGHTS_FILE)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise StoreCorrupt(
                f"The readings in {folder} are damaged ({type(error).__name__}: {error}).",
                f"Remove {path}: the run then measures where it goes on.",
            ) from error
