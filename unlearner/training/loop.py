"""The training loop: gradients of whole optimizer steps, checkpoints, Ctrl-C, one line a step.

A task says which micro-batches a step has and what their loss is (`unlearner.training.unlearning`,
`unlearner.baselines.finetune`). Gradient accumulation is exact: every micro-batch contributes its
sum over rows divided by the rows of the whole step, so 8 pairs at once, 2 x 4, and 2 processes with
4 each give the same gradient.

Autocast, loss scaling and DDP are torch's own and not `accelerate.Accelerator`'s, whose precision
and device are fixed for the life of the process, while the app and `tune` train several times.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from adapters.errors import Diverged, UserError
from unlearner import distributed
from unlearner.config import TrainConfig
from unlearner.interrupt import Progress, StopRequest
from unlearner.memory.probe import Measured, measure_peak, peak_memory
from unlearner.objectives.likelihood import on_device
from unlearner.training.checkpoint import (
    begin_checkpoint,
    end_checkpoint,
    random_state,
    read_state,
    read_weights,
    set_random_state,
    trainable,
    write_state,
    write_weights,
)
from unlearner.training.early_stop import EarlyStop
from unlearner.training.optimizer import make_optimizer, make_schedule

Batch = dict[str, Tensor]
# Optimizer steps that loss scaling may skip in a row before the run counts as diverged.
SKIPPED_STEPS = 20


class Gradients(Protocol):
    """What a task computes gradients with."""

    model: torch.nn.Module

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward passes."""

    def backward(self, loss: Tensor, inputs: Sequence[Tensor] | None = None) -> None:
        """Add the gradient of `loss` to all parameters that are trained, or to `inputs` only."""


class Task(Protocol):
    """What is trained."""

    steps: int

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step, counted from 0."""

    def heaviest_batch(self) -> Batch:
        """The micro-batch of the run that needs the most memory."""

    def accumulate(self, gradients: Gradients, batch: Batch) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch; its terms of the step's loss, for the log."""

    def end_step(self) -> None:
        """Called after every optimizer step."""

    def reserve(self) -> None:
        """Allocate what a later step will hold, before memory is measured."""

    def release(self) -> None:
        """Free what `reserve` allocated."""

    def write(self, folder: Path) -> None:
        """Add the task's own state to a checkpoint."""

    def read(self, folder: Path) -> None:
        """Restore it."""


class TrainingLoop:
    """Trains the parameters of a model that require gradients."""

    def __init__(
        self,
        model: torch.nn.Module,
        task: Task,
        config: TrainConfig,
        work: Path,
        *,
        report: Progress = lambda event: None,
        after_step: Callable[[int, int, torch.nn.Module], None] | None = None,
        early_stop: EarlyStop | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Turn checkpointing on, wrap the model for several processes, create the optimizer.

        Args:
            model: on its device; the parameters to train are float32.
            task: micro-batches and losses.
            config: optimizer, schedule, checkpointing and seed; `gradient_checkpointing` is
                resolved, "auto" counts as "off".
            work: an existing folder for checkpoints and `metrics.jsonl`.
            report: called with a dict per event.
            after_step: called with the step, the number of steps and the model.
            early_stop: ends the run before its last step.
            autocast: the dtype of the forward passes; by default `autocast_dtype(model)`.
        """
        set_seed(config.seed)
        # A torch DataLoader takes one number when it starts. So did earlier versions, and dropout
        # masks follow from it.
        torch.empty((), dtype=torch.int64).random_()
        self.task, self.config, self.work = task, config, work
        self.bare = model
        self.device = next(model.parameters()).device
        self.step = 0
        self._report, self._after_step, self._early_stop = report, after_step, early_stop
        enable_checkpointing(model, config.gradient_checkpointing)
        self.model: torch.nn.Module = model
        if distributed.world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(model, device_ids=devices)
        self._dtype = autocast_dtype(model) if autocast is None else autocast
        # Gradients of fp16 vanish unless the loss is scaled.
        scaled = self._dtype == torch.float16
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self._optimizer = make_optimizer(model, config)
        self._schedule = make_schedule(self._optimizer, config, task.steps)
        self._skipped = 0
        self._moved = not any("lora_B" in name for name in trainable(model))
        self._start, self._first = time.monotonic(), 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward passes: the base's, where it is bf16 or fp16 on a GPU."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype)

    def backward(self, loss: Tensor, inputs: Sequence[Tensor] | None = None) -> None:
        """Add the gradient of `loss` to all parameters that are trained, or to `inputs` only."""
        self._scaler.scale(loss).backward(inputs=inputs)

    def probe(self, limit: int | None = None) -> Measured:
        """The peak memory of two optimizer steps on the heaviest micro-batch, in bytes.

        Everything is as in training; weights and random numbers are put back.
        """
        batch = on_device(self.task.heaviest_batch(), self.device)
        whole, self.model = self.model, self.bare  # without waiting for the other processes

        def accumulate() -> None:
            self.model.train()
            self.task.accumulate(self, batch)

        self.task.reserve()
        try:
            return measure_peak(
                accumulate, self.bare, lambda: make_optimizer(self.bare, self.config, rate=0), limit
            )
        finally:
            self.task.release()
            self.model = whole

    def run(self, stop: StopRequest) -> None:
        """Train from the current step until the end, an early stop or a request to stop.

        Raises:
            Diverged: the loss or its gradient is not finite; the step before is saved.
            RuntimeError: the adapter does not train.
        """
        self._start, self._first = time.monotonic(), self.step
        watch = self._early_stop
        if watch is not None:
            watch.begin(self.step, self.task.steps, self.bare)
        while self.step < self.task.steps and not self.ended_early:
            terms = self._take_step()
            self.step += 1
            self._log(terms)
            if self._after_step is not None:
                self._after_step(self.step, self.task.steps, self.bare)
            steps = self.task.steps
            ended = watch is not None and watch.after_step(self.step, steps, self.bare, terms)
            stopping = distributed.any_of(stop.asked)
            last = self.step == self.task.steps
            if ended or stopping or last or self.step % max(25, self.task.steps // 4) == 0:
                self.save()
            if stopping:
                break

    @property
    def ended_early(self) -> bool:
        """Whether the early stop has ended the run."""
        return self._early_stop is not None and self._early_stop.trace.stopped_at is not None

    def _take_step(self) -> dict[str, float]:
        """One optimizer step; the terms of its loss, summed over micro-batches and processes."""
        totals: dict[str, Tensor] = {}
        batches = self.task.micro_batches(self.step)
        for number, batch in enumerate(batches):
            self.model.train()
            last = number == len(batches) - 1
            wait = isinstance(self.model, DistributedDataParallel) and not last
            with self.model.no_sync() if wait else nullcontext():  # type: ignore[operator]
                terms = self.task.accumulate(self, on_device(batch, self.device))
            for name, value in terms.items():
                totals[name] = totals[name] + value if name in totals else value
        self._scaler.unscale_(self._optimizer)
        parameters = trainable(self.bare)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        if self.config.max_grad_norm:
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), self.config.max_grad_norm)
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        summed = distributed.sums({name: float(value) for name, value in totals.items()})
        self._check_finite(summed, float(norm))
        before = self._before_first_update(parameters)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if not self._skipped:
            self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._check_moved(before, parameters)
        self.task.end_step()
        return {**summed, "grad_norm": float(norm)}

    def _check_finite(self, terms: Mapping[str, float], norm: float) -> None:
        """Stop before an update that would destroy the weights."""
        if math.isfinite(norm) and all(math.isfinite(value) for value in terms.values()):
            self._skipped = 0
            return
        self._skipped += 1
        if self._scaler.is_enabled() and self._skipped <= SKIPPED_STEPS:
            return  # the scaler skips this update and lowers its scale
        wrong = [name for name, value in terms.items() if not math.isfinite(value)]
        what = wrong[0].replace("_", " ") if wrong else "gradient"
        self._optimizer.zero_grad(set_to_none=True)
        if self.step and distributed.world_size() == 1:
            self.save()
        saved = f"step {self.step} is saved" if self.step else "nothing was saved yet"
        rate, scaled = self._schedule.get_last_lr()[0], self._scaler.is_enabled()
        raise Diverged(
            f"The {what} of step {self.step + 1} is not a finite number; {saved}.",
            f"Most likely the learning rate is too high (it was {rate:.2g}): lower "
            "--learning-rate, or clip gradients with --max-grad-norm 1."
            + (" float16 may also overflow: try --dtype float32." if scaled else ""),
        )

    def _before_first_update(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every `lora_B` before the first update that can move it."""
        rate = max(group["lr"] for group in self._optimizer.param_groups)
        if self._moved or rate == 0 or self._skipped:
            return {}
        return {n: p.detach().clone() for n, p in parameters.items() if "lora_B" in n}

    def _check_moved(self, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
        """Stop a run whose adapter does not train.

        Checkpointing without input gradients leaves every `lora_B` at zero while the loss looks
        healthy. The first update with a learning rate above 0 must move them all.
        """
        if not before:
            return
        self._moved = True
        still = [name for name, old in before.items() if torch.equal(old, now[name])]
        if still:
            raise RuntimeError(
                f"{len(still)} lora_B matrices did not move in the first step (e.g. {still[0]}): "
                "the adapter does not train"
            )

    def _log(self, terms: Mapping[str, float]) -> None:
        """One line in `metrics.jsonl`: losses, learning rate, seconds elapsed and left, memory."""
        elapsed = time.monotonic() - self._start
        left = elapsed / (self.step - self._first) * (self.task.steps - self.step)
        line = {
            "event": "train",
            "step": self.step,
            "steps": self.task.steps,
            **terms,
            "learning_rate": self._schedule.get_last_lr()[0],
            "elapsed": elapsed,
            "remaining": left,
            "memory_bytes": peak_memory(),
        }
        if distributed.rank() == 0:
            with (self.work / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._report(line)

    def save(self) -> None:
        """Write a checkpoint of the last whole step; the earlier one is removed."""
        randoms = distributed.gather(random_state())
        if distributed.rank() == 0:
            partial = begin_checkpoint(self.work, self.step)
            write_weights(partial, self.bare)
            state = {
                "step": self.step,
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
                "scaler": self._scaler.state_dict(),
                "random": randoms,
            }
            write_state(partial, state)
            self.task.write(partial)
            if self._early_stop is not None:
                self._early_stop.write(partial)
            end_checkpoint(partial)
        distributed.wait()

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            StoreCorrupt: it is damaged or of another version.
        """
        state = read_state(folder)
        read_weights(folder, self.bare)
        self.step = int(state["step"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        randoms = state["random"]
        set_random_state(randoms[min(distributed.rank(), len(randoms) - 1)])
        self._moved = True
        self.task.read(folder)
        if self._early_stop is not None:
            self._early_stop.read(folder)


def autocast_dtype(model: torch.nn.Module) -> torch.dtype | None:
    """The precision of the forward passes on a GPU: that of the base, if it is a half one.

    The adapter stays float32; under autocast its products are computed in the base's precision. On
    CPUs PEFT casts the inputs instead, and no autocast is used.
    """
    weights = next(model.parameters())
    dtype = getattr(model, "dtype", weights.dtype)
    half = dtype in (torch.bfloat16, torch.float16)
    return dtype if half and weights.is_cuda else None


def enable_checkpointing(model: Any, setting: str) -> None:
    """Recompute activations in the backward pass: "off", "all", or "N" for every N-th layer.

    Raises:
        UserError: the installed transformers cannot do it for every N-th layer.
    """
    if setting in ("off", "auto"):
        return
    every, options = 1 if setting == "all" else int(setting), {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=options, every_n_layers=every
        )
    elif every == 1:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    else:
        raise UserError(
            f"The installed transformers cannot recompute only every {every}th layer.",
            "Use --gradient-checkpointing all, or install a newer transformers.",
        )
