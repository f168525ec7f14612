"""UnlearnTrainer: transformers' Trainer with an unlearning objective and its invariants.

Gradient accumulation is exact: every micro-batch contributes its sum over pairs divided by the
pairs of the whole optimizer step, so 8 pairs at once and 2 x 4 give the same gradient.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from adapters.stack import parents_only
from unlearner.config import STREAMS, ObjectiveConfig, UnlearnConfig
from unlearner.guard import GuardRow, guard_kl
from unlearner.likelihood import AnswerLogits, AnswerNLL, answer_logits, row_nll
from unlearner.losses import OBJECTIVES
from unlearner.pairing import Pair, Rows, micro_batches
from unlearner.prompts import pad_batch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

CHECKPOINT_FILE = "trainable.safetensors"


class StepForwards:
    """The forwards of one micro-batch, each run at most once and only when asked for.

    All streams of the model in training share one padded forward; the reference runs only the
    stream it is asked for, without gradient, with the new adapter off and its parents on.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch: Mapping[str, Tensor],
        streams: Sequence[str],
        parents: Sequence[str] = (),
    ) -> None:
        self._model = model
        self._parents = tuple(parents)
        self._batch = batch
        self._streams = tuple(streams)
        self._size = batch["input_ids"].shape[0] // len(self._streams)

    @cached_property
    def _all(self) -> AnswerLogits:
        return answer_logits(self._model, self._batch)

    def _span(self, stream: str) -> slice:
        start = self._streams.index(stream) * self._size
        return slice(start, start + self._size)

    def logits(self, stream: str) -> AnswerLogits:
        """Answer logits of a stream under the model in training."""
        span, found = self._span(stream), self._all
        mine = (found.row >= span.start) & (found.row < span.stop)
        return AnswerLogits(
            found.logits[mine], found.targets[mine], found.row[mine] - span.start, found.n[span]
        )

    def nll(self, stream: str) -> AnswerNLL:
        """Summed NLL of a stream's rows under the model in training."""
        found, span = self._nll_all, self._span(stream)
        return AnswerNLL(found.nll[span], found.n[span])

    @cached_property
    def _nll_all(self) -> AnswerNLL:
        return row_nll(self._all.logits, self._all)

    def reference_logits(self, stream: str) -> AnswerLogits:
        """Answer logits of a stream before this request (parents on, new adapter off)."""
        part = {name: tensor[self._span(stream)] for name, tensor in self._batch.items()}
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad(), parents_only(self._model, self._parents):
                return answer_logits(self._model, part)
        finally:
            self._model.train(was_training)

    def reference_nll(self, stream: str) -> AnswerNLL:
        """Summed NLL of a stream's rows before this request."""
        found = self.reference_logits(stream)
        return row_nll(found.logits, found)


class _MicroBatches(Dataset[list[Pair]]):
    """Micro-batches in their planned order."""

    def __init__(self, batches: Sequence[list[Pair]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[Pair]:
        return self._batches[index]


class UnlearnTrainer(Trainer):
    """Trains the one trainable adapter of a PeftModel on planned forget/retain pairs."""

    def __init__(
        self,
        model: torch.nn.Module,
        rows: Rows,
        steps: Sequence[Sequence[Pair]],
        config: UnlearnConfig,
        output_dir: Path,
        *,
        pad_token_id: int,
        parents: Sequence[str] = (),
        guard: Sequence[GuardRow] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Plans micro-batches and hands transformers' Trainer its arguments.

        Args:
            model: PeftModel whose only trainable parameters are the new adapter's.
            rows: encoded rows of every stream the objective reads.
            steps: pairs of every optimizer step, see `pairing.plan_steps`.
            config: objective, LoRA shape and training settings.
            output_dir: where checkpoints go.
            pad_token_id: fills the padding, which is never a label.
            parents: names of the adapters this one is trained on top of.
            guard: teachers of `rows.guard`, one for each; empty for no guard.
            callbacks: transformers callbacks.
        """
        self.objective: ObjectiveConfig = config.objective
        self._streams = STREAMS[config.objective.name] + (("guard",) if guard else ())
        self._guard = guard
        self._rows = rows
        self._pad = pad_token_id
        self._parents = tuple(parents)
        self._terms: list[dict[str, float]] = []
        self.last_terms: dict[str, float] = {}
        pairs = len(steps[0])
        micro = min(config.train.per_device_train_batch_size, pairs)
        super().__init__(
            model=model,
            args=_arguments(config, output_dir, len(steps), math.ceil(pairs / micro)),
            train_dataset=_MicroBatches(micro_batches(steps, micro)),
            data_collator=self._collate,
            callbacks=[LoraMoved(), *callbacks],
        )
        # It prints to stdout, which is for data.
        self.remove_callback(PrinterCallback)
        # The loss below is already divided by the pairs of the whole step.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def _collate(self, items: list[list[Pair]]) -> dict[str, Tensor]:
        (pairs,) = items
        batch = pad_batch(
            [row for name in self._streams for row in self._rows.stream(name, pairs)], self._pad
        )
        if self._guard:
            batch["guard"] = torch.tensor([pair.guard for pair in pairs])
        return batch

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """The micro-batches of one optimizer step, and how many pairs they hold together."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, sum(len(batch["input_ids"]) for batch in samples) // len(self._streams)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Tensor:
        """The micro-batch's share of the step's loss: sum over its pairs / pairs of the step."""
        step = StepForwards(model, inputs, self._streams, self._parents)
        terms = OBJECTIVES[self.objective.name](step, self.objective)
        pairs = num_items_in_batch or len(terms.forget)
        parts = {"forget": terms.forget.sum() / pairs, "retain": terms.retain.sum() / pairs}
        if self._guard:
            teachers = [self._guard[i] for i in inputs["guard"].tolist()]
            parts["guard"] = guard_kl(step.logits("guard"), teachers).sum() / pairs
        self._terms.append({f"{name}_loss": float(x.detach()) for name, x in parts.items()})
        if len(self._terms) == self.current_gradient_accumulation_steps:
            self.last_terms = {
                name: sum(one[name] for one in self._terms) for name in self._terms[0]
            }
            self._terms.clear()
        weighed = [getattr(self.objective, f"{name}_weight") * x for name, x in parts.items()]
        return torch.stack(weighed).sum()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Only what is trained: parents and base are files of their own and never change.
        folder = output_dir or self.args.output_dir
        os.makedirs(folder, exist_ok=True)
        tensors = {n: p.detach().contiguous().cpu() for n, p in _trainable(self.model)}
        save_file(tensors, os.path.join(folder, CHECKPOINT_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(os.path.join(resume_from_checkpoint, CHECKPOINT_FILE))
        mine = dict(_trainable(model or self.model))
        if saved.keys() != mine.keys():
            raise RuntimeError(f"the checkpoint {resume_from_checkpoint} is of another adapter")
        with torch.no_grad():
            for name, tensor in saved.items():
                mine[name].copy_(tensor)


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _arguments(
    config: UnlearnConfig, output_dir: Path, steps: int, accumulation: int
) -> TrainingArguments:
    train = config.train
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=1,  # one item is one planned micro-batch
        gradient_accumulation_steps=accumulation,
        learning_rate=train.learning_rate,
        warmup_steps=math.ceil(train.warmup_ratio * steps),
        lr_scheduler_type=train.lr_scheduler_type,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
        seed=train.seed,
        data_seed=train.seed,
        **checkpointing_arguments(train.gradient_checkpointing),
        logging_strategy="no",
        save_strategy="steps",
        save_steps=max(25, steps // 4),
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def checkpointing_arguments(wanted: bool) -> dict[str, Any]:
    """Activation checkpointing under the name this transformers has for it (renamed in 5.2x)."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation" if "activation_checkpointing" in known else "gradient"
    if not wanted:
        return {f"{name}_checkpointing": False}  # said aloud: TRL's own default is on
    return {
        f"{name}_checkpointing": True,
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
    }


class LoraMoved(TrainerCallback):
    """Stops a run whose adapter does not train.

    Gradient checkpointing without input gradients leaves every `lora_B` at zero while the loss
    looks healthy. The first optimizer step with a learning rate above 0 must move them all.
    """

    def __init__(self) -> None:
        self._before: dict[str, Tensor] | None = None
        self._done = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remembers every trainable `lora_B` before the first step that can move it."""
        rate = max(group["lr"] for group in kwargs["optimizer"].param_groups)
        if not self._done and rate > 0:
            self._before = {
                name: p.detach().clone()
                for name, p in _trainable(kwargs["model"])
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
        now = dict(_trainable(kwargs["model"]))
        still = [name for name, old in self._before.items() if torch.equal(old, now[name])]
        self._before = None
        if still:
            raise RuntimeError(
                f"{len(still)} lora_B matrices did not move in the first step (e.g. {still[0]}): "
                "the adapter does not train"
            )
