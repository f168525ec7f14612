"""Stop a run where it reaches a reference or target, instead of after a number of epochs.

Every few steps a measure given by the caller says how far the model is from a model that never saw
the forget set: below 0 it has forgotten too little, above 0 too much. The run ends once the sign
turns, with the weights of the nearer of the last two readings, or with weights between them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from adapters.errors import Diverged, StoreCorrupt
from unlearner import distributed
from unlearner.interrupt import Progress
from unlearner.tokens.packing import plain_attention

PROBES = 20
STATE_FILE, WEIGHTS_FILE = "gap.json", "gap.safetensors"
Quantity = Literal["gap", "nll_gap", "target_gap"]
Measure = Callable[[Any], Mapping[str, float]]


@dataclass(frozen=True)
class StopAt:
    """What ends a run early.

    Attributes:
        measure: the figures of a model, which it does not change.
        quantity: the figure that must reach 0 from below: "gap" (shift of the median log R against
            the retrain reference), "nll_gap" (mean forget NLL minus the reference's) or
            "target_gap" (mean forget NLL minus the target).
        key: a short name that changes with what is measured; of a measure that the caller of a run
            gives, part of the run folder's name.
        every: optimizer steps between readings; None for about 20 readings per run.
        settle: steps that follow the one at which the sign turned; the weights of the last one are
            then kept, whatever its distance. 0 keeps the nearer of the last two readings.
        patience: so many times `every` may pass before a reading where the change between the last
            two says that 0 is far; 1 for equal intervals.
        from_nll: no reading is taken while a step's own forget NLL per token is below this, but
            after the last step.
        refine: without `settle`, so many readings of weights between those of the last two: one
            step of a small request may pass 0 by far.
    """

    measure: Measure
    quantity: Quantity = "gap"
    key: str = "gap"
    every: int | None = None
    from_nll: float = 0.0
    settle: int = 0
    patience: int = 1
    refine: int = 0

    def steps_between(self, steps: int) -> int:
        """Steps between two readings in a run of `steps`."""
        return self.every or max(1, math.ceil(steps / PROBES))


@dataclass
class Trace:
    """The readings of a run and what followed from them.

    Attributes:
        readings: `[step, distance]`, the first before any training; 28.4 is between two steps.
        stopped_at: the step at which the run ended because the sign had turned.
        kept: the step whose weights are the result, None while it is the last one.
    """

    readings: list[list[float]] = field(default_factory=list)
    stopped_at: int | None = None
    kept: float | None = None

    @property
    def reached(self) -> int | None:
        """The step at which the sign had turned upwards, None while it has not."""
        turns = (step for (_, old), (step, new) in pairwise(self.readings) if old < 0 <= new)
        return next(map(int, turns), None)

    def add(self, step: int, distance: float, settle: int = 0) -> bool:
        """Record a reading; whether the weights of the reading before are the ones to keep.

        `stopped_at` and `kept` are set where the distance has come from below 0 to 0 or above. The
        untrained weights are never kept: an adapter that does nothing forgets nothing.
        """
        self.readings.append([step, distance])
        reached = self.reached
        if reached is None:
            return False
        if settle:
            if step >= reached + settle:
                self.stopped_at = self.kept = step
            return False
        before = self.readings[-2]
        nearer = before[0] > 0 and abs(before[1]) < abs(distance)
        self.stopped_at = step
        self.kept = int(before[0]) if nearer else step
        return nearer

    def wait(self, every: int, patience: int) -> int:
        """Steps to the next reading: half of what the last two readings say is left to 0."""
        if patience == 1 or len(self.readings) < 2:
            return every
        (before, old), (step, distance) = self.readings[-2:]
        slope = (distance - old) / max(1, step - before)
        left = -distance / slope / 2 if slope > 0 else math.inf
        return int(min(max(left, every), every * patience))

    def distance_at(self, step: float) -> float:
        """The reading of a step; the last one where the step is read twice."""
        return next(value for at, value in reversed(self.readings) if at == step)


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model may be measured; modes, random numbers and attention are restored after."""
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


class EarlyStop:
    """Takes the readings of a run and ends it once the sign of the distance turns."""

    def __init__(self, stop: StopAt, log: Path, report: Progress) -> None:
        """Start with no readings.

        Args:
            stop: what ends the run.
            log: JSON lines, appended: one of event "gap" per reading.
            report: called with every line.
        """
        self.trace = Trace()
        self._stop, self._log, self._report = stop, log, report
        self._every = 0
        self._before: dict[str, Tensor] = {}

    def begin(self, step: int, steps: int, model: torch.nn.Module) -> None:
        """Take the reading that the first step is compared with, unless a checkpoint held one."""
        self._every = self._stop.steps_between(steps)
        if self._before:
            return
        self._take(step, steps, model)
        if self.trace.readings[-1][1] >= 0:
            text = "nothing is under-forgotten at the start: the run ends only after it was"
            if self._stop.quantity == "target_gap":
                text = "these rows are no likelier than rows the base never saw: is this the base?"
            self._report({"event": "note", "text": text})

    def after_step(
        self, step: int, steps: int, model: torch.nn.Module, terms: Mapping[str, float]
    ) -> bool:
        """Take a reading when one is due, and after the last step; whether the run is over."""
        far = terms.get("forget_nll", math.inf) < self._stop.from_nll
        if step != steps and (far or not self._due(step)):
            return False
        ended = self._take(step, steps, model)
        distance = self.trace.readings[-1][1]
        if not ended and step == steps and distance < 0:
            what = "target" if self._stop.quantity == "target_gap" else "reference"
            text = (
                f"the {what} was not reached: too little is forgotten at the end, by "
                f"{-distance:.3f} nats per token"
            )
            self._report({"event": "note", "text": text})
        return ended

    def _due(self, step: int) -> bool:
        reached = self.trace.reached
        if self._stop.settle and reached is not None:
            return step >= reached + self._stop.settle
        wait = self.trace.wait(self._every, self._stop.patience)
        if wait == self._every:
            return step % self._every == 0
        return step >= self.trace.readings[-1][0] + wait

    def write(self, folder: Path) -> None:
        """Keep the readings and the weights of the last one with a checkpoint."""
        from safetensors.torch import save

        from adapters.atomic_files import write_bytes, write_json

        write_bytes(folder / WEIGHTS_FILE, save(self._before))
        write_json(folder / STATE_FILE, asdict(self.trace))

    def read(self, folder: Path) -> None:
        """Restore the readings kept with a checkpoint; without them the run measures where it is.

        Raises:
            StoreCorrupt: they are damaged.
        """
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
                f"Remove {path}: the run then takes a reading where it continues.",
            ) from error

    def record(self, steps: int) -> dict[str, Any]:
        """For the manifest; `stopped_at_step` is None where the run of `steps` reached its end.

        `gap` is the distance of the weights that were kept, `gap_trace` every reading.
        """
        readings = self.trace.readings
        kept = self.trace.kept if self.trace.kept is not None else readings[-1][0]
        return {
            "stop_at": self._stop.quantity,
            "gap_every": self._stop.steps_between(steps),
            "stopped_at_step": self.trace.stopped_at,
            "kept_step": kept,
            "gap": self.trace.distance_at(kept),
            "gap_trace": readings,
        }

    def _measure(self, step: int, model: torch.nn.Module) -> tuple[dict[str, float], float]:
        """The figures, and the distance among them."""
        with undisturbed(model):
            figures = dict(self._stop.measure(model))
        distance = float(figures[self._stop.quantity])
        if not math.isfinite(distance):
            what = self._stop.quantity.replace("_", " ")
            raise Diverged(
                f"The {what} after step {step} is not a finite number.",
                "Most likely the learning rate is too high: lower --learning-rate, or clip "
                "gradients with --max-grad-norm 1.",
            )
        return figures, distance

    def _take(self, step: int, steps: int, model: torch.nn.Module) -> bool:
        """Measure; whether the run is over. The nearest weights are then in the model."""
        figures, distance = self._measure(step, model)
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        go_back = self.trace.add(step, distance, self._stop.settle)
        if self._stop.refine and self.trace.stopped_at is not None and not self._stop.settle:
            go_back = False
            figures = self._refine(step, model, weights, figures)
        line = {"event": "gap", "step": step, "steps": steps, **figures}
        line |= {
            "stopped_at_step": self.trace.stopped_at,
            "kept_step": self.trace.kept,
            "reached_at_step": self.trace.reached,
        }
        if distributed.rank() == 0:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._report(line)
        if go_back:
            with torch.no_grad():
                for name, parameter in weights.items():
                    parameter.copy_(self._before[name])
        self._before = {n: p.detach().cpu().clone().contiguous() for n, p in weights.items()}
        return self.trace.stopped_at is not None

    def _refine(
        self,
        step: int,
        model: torch.nn.Module,
        weights: Mapping[str, torch.nn.Parameter],
        figures: Mapping[str, float],
    ) -> dict[str, float]:
        """Put the nearest of the last two readings and some between into the model; its figures.

        Where a straight line between the nearest weights on both sides crosses 0, and, as a curve
        would leave one side where it is, every second time in the middle. Of the untrained weights
        at least one step is gone.
        """
        after = {name: weight.detach().clone() for name, weight in weights.items()}

        def go_to(share: float) -> None:
            with torch.no_grad():
                for name, weight in weights.items():
                    before = self._before[name].to(weight.device)
                    weight.copy_(torch.lerp(before, after[name], share))

        (before, under), (_, over) = self.trace.readings[-2:]
        low, high, least = (0.0, under), (1.0, over), 0.0 if before else 1 / step
        tried = [(1.0, over, dict(figures))]
        for number in range(self._stop.refine if least < 1 else 0):
            part = 0.5 if number % 2 else -low[1] / (high[1] - low[1])
            share = max(least, low[0] + part * (high[0] - low[0]))
            go_to(share)
            found, distance = self._measure(step, model)
            tried.append((share, distance, found))
            low, high = ((share, distance), high) if distance < 0 else (low, (share, distance))
        share, distance, found = min(tried, key=lambda one: abs(one[1]))
        if before and abs(under) < abs(distance):
            go_to(0.0)
            self.trace.kept = int(before)
            return self._measure(step, model)[0]
        go_to(share)
        self.trace.kept = step
        if share < 1:
            # Never a whole step, which would be another reading's.
            place = before + share * (step - before)
            place += 0.0005 * (place == int(place))
            self.trace.kept = min(max(round(place, 4), before + 0.0001), step - 0.0001)
            self.trace.readings.append([self.trace.kept, distance])
        return found
