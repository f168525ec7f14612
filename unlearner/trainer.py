"""UnlearnTrainer: transformers' Trainer with an unlearning objective and its invariants.

Gradient accumulation is exact: every micro-batch contributes its sum over pairs divided by the
pairs of the whole optimizer step, so 8 pairs at once, 2 x 4, and 2 processes with 4 each give the
same gradient.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from adapters.errors import UserError
from unlearner import ranks
from unlearner.callbacks import LoraMoved, trainable
from unlearner.config import ObjectiveConfig, UnlearnConfig, streams_of
from unlearner.forwards import REFERENCE, StepForwards, of_streams
from unlearner.guard import GuardRow, guard_kl
from unlearner.hidden import freeze_above, steered_layer
from unlearner.losses import OBJECTIVES, retain_term
from unlearner.packing import pack_rows
from unlearner.pairing import Pair, Rows, micro_batches
from unlearner.preflight import longest_pairs
from unlearner.prompts import pad_batch
from unlearner.references import References, row_key
from unlearner.sharpness import moved, worst_direction
from unlearner.weight_noise import WeightNoise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

CHECKPOINT_FILE = "trainable.safetensors"
# What is not forgotten: with `sam_rho` its gradient is taken where the weights are.
KEPT = ("retain", "guard", "alternate")


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
        packed: bool = False,
        references: References | None = None,
        frozen: torch.nn.Module | None = None,
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
            packed: rows of a micro-batch in one pack; else a padded batch.
            references: NLLs from `references.reference_nlls`; without them the reference runs
                with every step.
            frozen: a copy of `model` as it was, where all of its weights train.
            callbacks: transformers callbacks.
        """
        self.objective: ObjectiveConfig = config.objective
        self._streams = streams_of(config.objective) + (("guard",) if guard else ())
        self._guard = guard
        self._rows = rows
        self._pad = pad_token_id
        self._packed = packed
        self._references = references or {}
        self._parents = tuple(parents)
        self._bare = model
        self._frozen = frozen
        self._steps = steps
        self._pairs = len(steps[0])
        if config.objective.name == "rmu":
            freeze_above(model, steered_layer(model, config.objective.rmu_layer))
        self._rho = config.train.sam_rho
        if self._rho and ranks.world_size() > 1:
            raise UserError("--sam-rho needs one process.", "Start one, or leave the flag away.")
        self._part = "all"
        self._worst: list[Tensor] = []
        self._waiting: list[Any] = []
        scale, seed = config.train.noise_scale, config.train.seed
        self._noise = WeightNoise(model, scale, seed) if scale else None
        self._terms: list[dict[str, float]] = []
        self.last_terms: dict[str, float] = {}
        batches = micro_batches(
            steps,
            config.train.per_device_train_batch_size,
            ranks.world_size(),
            None if packed else self._longest,
        )
        accumulation = len(batches) // len(steps) // ranks.world_size()
        super().__init__(
            model=model,
            args=_arguments(config, output_dir, len(steps), accumulation, model),
            train_dataset=_MicroBatches(batches),
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
        rows = [row for name in self._streams for row in self._rows.stream(name, pairs)]
        batch = pack_rows(rows) if self._packed else pad_batch(rows, self._pad)
        if self._guard:
            batch["guard"] = torch.tensor([pair.guard for pair in pairs])
        for name, known in self._references.items():
            values = [known[row_key(name, pair)] for pair in pairs]
            batch[REFERENCE.format(name)] = torch.tensor(values)
        return batch

    def _longest(self, pair: Pair) -> int:
        rows = [row for name in self._streams for row in self._rows.stream(name, [pair])]
        return max(len(row.input_ids) for row in rows)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """The micro-batches of one optimizer step, and how many pairs all processes have in it."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waiting = [*samples] if self._rho else []
        return samples, self._pairs

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; afterwards the model computes without noise."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._noise is not None:
                self._noise.remove()

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """The micro-batch's gradient; with `sam_rho` that of its forget rows is taken elsewhere."""
        if self._noise is not None:
            self._noise.step = self.state.global_step
        if not self._rho:
            whole: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return whole
        trained = [parameter for _, parameter in trainable(model)]
        if len(self._waiting) == self.current_gradient_accumulation_steps:
            self._worst = self._climb(model, trained)
        self._waiting.pop()
        loss: Tensor = torch.zeros((), device=self.args.device)
        if set(KEPT) & set(self._streams):
            self._part = "kept"
            loss = loss + super().training_step(model, inputs, num_items_in_batch)
        self._part = "moved"
        with moved(trained, self._worst):
            loss = loss + super().training_step(model, inputs, num_items_in_batch)
        self._part = "all"
        if not self._waiting:
            self._tell_terms()
        return loss

    def _climb(self, model: torch.nn.Module, trained: Sequence[torch.nn.Parameter]) -> list[Tensor]:
        """Where the forget loss of the whole step rises fastest, see `unlearner.sharpness`."""
        self._part = "forget"
        model.train()
        for batch in self._waiting:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(batch))
            loss.backward()
        return worst_direction(trained, self._rho)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Tensor:
        """The micro-batch's share of the step's loss: sum over its pairs / pairs of the step."""
        parts = self._parts(model, inputs)
        if self._part != "moved":
            self._terms.append({f"{name}_loss": float(x.detach()) for name, x in parts.items()})
        if self._part == "all" and len(self._terms) == self.current_gradient_accumulation_steps:
            self._tell_terms()
        weighed = [getattr(self.objective, f"{name}_weight") * x for name, x in parts.items()]
        # DDP takes the mean of the processes' gradients; the step's loss is their sum.
        return torch.stack(weighed).sum() * ranks.world_size()

    def _parts(self, model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms that are asked for now, each a sum over pairs / pairs of the step."""
        streams, config, pairs = self._streams, self.objective, self._pairs
        if self._part != "all":
            kept = self._part == "kept"
            wanted = tuple(name for name in streams if (name in KEPT) == kept)
            inputs, streams = of_streams(inputs, streams, wanted), wanted
        more = {"seed": self.args.seed, "frozen": self._frozen}
        step = StepForwards(model, inputs, streams, self._parents, self._bare, **more)
        parts: dict[str, Tensor] = {}
        if self._part == "all":
            terms = OBJECTIVES[config.name](step, config)
            parts = {"forget": terms.forget.sum() / pairs, "retain": terms.retain.sum() / pairs}
        elif self._part != "kept":
            alone = replace(config, retain_weight=0.0)
            parts["forget"] = OBJECTIVES[config.name](step, alone).forget.sum() / pairs
        elif "retain" in streams:
            parts["retain"] = retain_term(step, config).sum() / pairs
        if "alternate" in streams:
            parts["alternate"] = step.nll("alternate").per_token.sum() / pairs
        if "guard" in streams:
            teachers = [self._guard[i] for i in inputs["guard"].tolist()]
            parts["guard"] = guard_kl(step.answers("guard"), teachers).sum() / pairs
        return parts

    def _tell_terms(self) -> None:
        """The terms of the step that ends, summed over its micro-batches and all processes."""
        mine = {"forget_loss": 0.0, "retain_loss": 0.0}
        for one in self._terms:
            for name, value in one.items():
                mine[name] = mine.get(name, 0.0) + value
        self.last_terms = ranks.sums(mine)
        self._terms.clear()

    def longest_loss(self) -> Callable[[], Tensor]:
        """The loss of the micro-batch of the longest rows there are, as often as it is called."""
        pairs = longest_pairs(self._steps, len(self.train_dataset[0]), self._longest)
        device = next(self._bare.parameters()).device
        batch = {name: x.to(device) for name, x in self._collate([pairs]).items()}
        self.current_gradient_accumulation_steps = 0  # its terms are not those of a step

        def loss() -> Tensor:
            self._bare.train()
            with self.compute_loss_context_manager():
                found = self.compute_loss(self._bare, batch)
            self._terms.clear()
            return found

        return loss

    def save_here(self) -> None:
        """A checkpoint of the last whole step, outside the schedule."""
        self._save_checkpoint(self.model, None)
        self.callback_handler.on_save(self.args, self.state, self.control)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Only what is trained: parents and base are files of their own and never change.
        folder = output_dir or self.args.output_dir
        os.makedirs(folder, exist_ok=True)
        tensors = {n: p.detach().contiguous().cpu() for n, p in trainable(self.model)}
        save_file(tensors, os.path.join(folder, CHECKPOINT_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(os.path.join(resume_from_checkpoint, CHECKPOINT_FILE))
        mine = dict(trainable(model or self.model))
        if saved.keys() != mine.keys():
            raise RuntimeError(f"the checkpoint {resume_from_checkpoint} is of another adapter")
        with torch.no_grad():
            for name, tensor in saved.items():
                mine[name].copy_(tensor)


def _arguments(
    config: UnlearnConfig, output_dir: Path, steps: int, accumulation: int, model: Any
) -> TrainingArguments:
    train = config.train
    weights = next(model.parameters())
    half = weights.is_cuda and getattr(model, "dtype", weights.dtype) == torch.bfloat16
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
        # The adapter stays float32; under autocast its products are made in the base's bf16.
        bf16=half,
        use_cpu=not weights.is_cuda,
        ddp_find_unused_parameters=False,
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


def checkpointing_arguments(setting: str) -> dict[str, Any]:
    """Activation checkpointing under the name this transformers has for it (renamed in 5.2x).

    Args:
        setting: "off", "all", or "N" for every N-th layer.
    """
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation" if "activation_checkpointing" in known else "gradient"
    if setting in ("off", "auto"):  # whoever asks for auto has it resolved by the memory plan
        return {f"{name}_checkpointing": False}  # said aloud: TRL's own default is on
    options: dict[str, Any] = {"use_reentrant": False}
    if setting != "all":
        options["every_n_layers"] = int(setting)
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": options}
