"""What a training run tells while it runs, and how it stops when asked to."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from unlearner.training.distributed import any_of

Progress = Callable[[dict[str, Any]], None]


class StopRequest:
    """Whether the user asked to stop; the first signal sets it, the second one acts at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self, on_progress: Progress | None = None) -> Iterator[StopRequest]:
        """Inside: Ctrl-C and SIGTERM ask the run to finish its step and save.

        A second signal does what it would have done before (a KeyboardInterrupt). Outside the
        main thread signals cannot be caught and stay as they are.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            restore()
            if on_progress is not None:
                on_progress({"event": "stopping"})

        kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in kept.items():
                signal.signal(number, handler)

        for number in kept:
            signal.signal(number, ask)
        try:
            yield self
        finally:
            restore()


class RunCallback(TrainerCallback):
    """Writes one line a step to `metrics.jsonl`, reports it, and saves and stops on request."""

    def __init__(
        self, terms: Callable[[], dict[str, float]], stop: StopRequest, log: Path, report: Progress
    ) -> None:
        """Takes what to ask and whom to tell.

        Args:
            terms: gives the last step's `forget_loss` and `retain_loss`.
            stop: asked after every step.
            log: JSON lines, appended.
            report: called with every line.
        """
        self._terms = terms
        self._stop = stop
        self._log = log
        self._report = report
        self._started = 0.0
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock; a resumed run begins at its own step."""
        self._started = time.monotonic()
        self._first = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One line: step, losses, learning rate, elapsed and remaining seconds, memory."""
        self.tell(state, self._terms(), kwargs["lr_scheduler"].get_last_lr()[0])
        self.stop_if_asked(control)

    def tell(self, state: Any, terms: dict[str, float], rate: float) -> None:
        """Writes and reports the line of the step that just ended."""
        elapsed = time.monotonic() - self._started
        done = state.global_step - self._first
        line = {
            "event": "train",
            "step": state.global_step,
            "steps": state.max_steps,
            **terms,
            "learning_rate": rate,
            "elapsed": elapsed,
            "remaining": elapsed / done * (state.max_steps - state.global_step),
            "memory_bytes": peak_memory(),
        }
        if not state.is_world_process_zero:
            return
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._report(line)

    def stop_if_asked(self, control: Any) -> None:
        """Has the trainer save and end after this step, where somebody asked for it."""
        if any_of(self._stop.asked):  # one process that stops alone would leave the others waiting
            control.should_save = True
            control.should_training_stop = True


class LoggedCallback(RunCallback):
    """The same for a trainer whose loss is known only once it is logged, after the step."""

    def __init__(self, stop: StopRequest, log: Path, report: Progress) -> None:
        """Takes whom to ask and whom to tell, see `RunCallback`."""
        super().__init__(dict, stop, log, report)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Only asks whether to stop."""
        self.stop_if_asked(control)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One line of the step that was logged."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self.tell(state, {"loss": float(logs["loss"])}, float(logs.get("learning_rate", 0.0)))


class LoraMoved(TrainerCallback):
    """Stops a run whose adapter does not train.

    Gradient checkpointing without input gradients leaves every `lora_B` at zero while the loss
    looks healthy. The first optimizer step with a learning rate above 0 must move them all.
    """

    def __init__(self) -> None:
        self._before: dict[str, torch.Tensor] | None = None
        self._done = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remembers every trainable `lora_B` before the first step that can move it."""
        rate = max(group["lr"] for group in kwargs["optimizer"].param_groups)
        if not self._done and rate > 0:
            self._before = {
                name: p.detach().clone()
                for name, p in trainable(kwargs["model"])
                if "lora_B" in name
            }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compares them after it.

        Raises:
            RuntimeError: naming the matrices that stand still.
        """
        if self._before is None or self._done:
            return
        self._done = True
        now = dict(trainable(kwargs["model"]))
        still = [name for name, old in self._before.items() if torch.equal(old, now[name])]
        self._before = None
        if still:
            raise RuntimeError(
                f"{len(still)} lora_B matrices did not move in the first step (e.g. {still[0]}): "
                "the adapter does not train"
            )


def trainable(model: Any) -> list[tuple[str, Any]]:
    """Names and parameters of all that is trained."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def peak_memory() -> int:
    """Peak bytes of this process: allocated on the GPU where there is one, else resident."""
    import resource
    import sys

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
