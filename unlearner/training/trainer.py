"""UnlearnTrainer: transformers' Trainer with an unlearning objective and its invariants.

Gradient accumulation is exact: every micro-batch contributes its sum over pairs divided by the
pairs of the whole optimizer step, so 8 pairs at once, 2 x 4, and 2 processes with 4 each give the
same gradient.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from adapters.errors import UserError
from unlearner.config import ObjectiveConfig, UnlearnConfig, streams_of
from unlearner.memory.probe import longest_pairs
from unlearner.objectives.guard import GuardRow, guard_kl, moved_nll
from unlearner.objectives.sequence import OBJECTIVES, alternate_term, retain_term
from unlearner.objectives.sharpness import moved, worst_direction
from unlearner.objectives.weight_noise import WeightNoise
from unlearner.tokens.batch_plan import Pair, Rows, micro_batches
from unlearner.tokens.packing import pack_rows
from unlearner.tokens.prompts import pad_batch
from unlearner.training import distributed as ranks
from unlearner.training.arguments import training_arguments
from unlearner.training.callbacks import LoraMoved, trainable
from unlearner.training.forward import REFERENCE, StepForwards, of_streams
from unlearner.training.hidden import freeze_above, steered_layer
from unlearner.training.references import References, row_key
from unlearner.training.relearning_attack import Attacker

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
        attacked = config.objective.attack_weight > 0
        for flag, asked in (("--sam-rho", self._rho), ("--attack-weight", attacked)):
            if asked and ranks.world_size() > 1:
                raise UserError(f"{flag} needs one process.", "Start one, or leave the flag away.")
        self._attacker = Attacker(model, config.train) if attacked else None
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
            args=training_arguments(config, output_dir, len(steps), accumulation, model),
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
        self._waiting = [*samples]
        return samples, self._pairs

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; afterwards the model computes without noise and attacker."""
        if self._attacker is not None:
            self._attacker.release()
        try:
            return super().train(*args, **kwargs)
        finally:
            for added in (self._noise, self._attacker):
                if added is not None:
                    added.remove()

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """The micro-batch's gradient, with `sam_rho` and an attacker also that taken elsewhere."""
        if self._noise is not None:
            self._noise.step = self.state.global_step
        loss: Tensor
        if self._rho:
            loss = self._sharp_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._attacker is not None:
            loss = loss + self._attacked_step(model, inputs, self._attacker)
        self._waiting.pop()
        if not self._waiting:
            self._tell_terms()
            if self._attacker is not None:
                self._attacker.step()
        return loss

    def _sharp_step(self, model: torch.nn.Module, inputs: Any, items: Any) -> Tensor:
        trained = [parameter for _, parameter in trainable(model)]
        if len(self._waiting) == self.current_gradient_accumulation_steps:
            self._worst = self._climb(model, trained)
        loss: Tensor = torch.zeros((), device=self.args.device)
        if set(KEPT) & set(self._streams):
            self._part = "kept"
            loss = loss + super().training_step(model, inputs, items)
        self._part = "moved"
        with moved(trained, self._worst):
            loss = loss + super().training_step(model, inputs, items)
        self._part = "all"
        return loss

    def _attacked_step(self, model: torch.nn.Module, inputs: Any, attacker: Attacker) -> Tensor:
        """Adds the forget gradient under attack and the attacker's gradient."""
        model.train()
        config = self.objective
        step = self._forwards(model, *self._side(self._prepare_inputs(inputs), kept=False))
        with attacker.on():
            with self.compute_loss_context_manager():
                value = self._forget_alone(step, replace(config, gamma=config.attack_gamma))
                attacker.learn(step.nll("forget").per_token.sum() / self._pairs)
                loss: Tensor = config.attack_weight * value
            loss.backward(inputs=[parameter for _, parameter in trainable(model)])
        self._terms.append({"attack_loss": float(value.detach())})
        return loss.detach()

    def _climb(self, model: torch.nn.Module, trained: Sequence[torch.nn.Parameter]) -> list[Tensor]:
        """The direction in which the forget loss of the whole step rises fastest."""
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
        weighed = [getattr(self.objective, f"{name}_weight") * x for name, x in parts.items()]
        # DDP takes the mean of the processes' gradients; the step's loss is their sum.
        return torch.stack(weighed).sum() * ranks.world_size()

    def _parts(self, model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms that are asked for now, each a sum over pairs / pairs of the step."""
        streams, config, pairs = self._streams, self.objective, self._pairs
        if self._part != "all":
            inputs, streams = self._side(inputs, kept=self._part == "kept")
        step = self._forwards(model, inputs, streams)
        parts: dict[str, Tensor] = {}
        if self._part == "all":
            terms = OBJECTIVES[config.name](step, config)
            parts = {"forget": terms.forget.sum() / pairs, "retain": terms.retain.sum() / pairs}
        elif self._part != "kept":
            parts["forget"] = self._forget_alone(step, config)
        elif "retain" in streams:
            parts["retain"] = retain_term(step, config).sum() / pairs
        if "alternate" in streams:
            parts["alternate"] = alternate_term(step, config).sum() / pairs
        if "guard" in streams:
            teachers = [self._guard[i] for i in inputs["guard"].tolist()]
            kept = guard_kl(step.answers("guard"), teachers)
            parts["guard"] = (kept + moved_nll(step.nll("guard").per_token, teachers)).sum() / pairs
        return parts

    def _side(self, inputs: Mapping[str, Tensor], *, kept: bool) -> tuple[Any, tuple[str, ...]]:
        """The rows of what is kept, or of what is forgotten, and their streams."""
        wanted = tuple(name for name in self._streams if (name in KEPT) == kept)
        return of_streams(inputs, self._streams, wanted), wanted

    def _forget_alone(self, step: StepForwards, config: ObjectiveConfig) -> Tensor:
        alone = replace(config, retain_weight=0.0)
        return OBJECTIVES[alone.name](step, alone).forget.sum() / self._pairs

    def _forwards(
        self, model: torch.nn.Module, inputs: Mapping[str, Tensor], streams: Sequence[str]
    ) -> StepForwards:
        more = {"seed": self.args.seed, "frozen": self._frozen}
        return StepForwards(model, inputs, streams, self._parents, self._bare, **more)

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
        attacker = self._attacker
        # As in training: the attacker's moments and gradient stand while the other rows run.
        if attacker is not None:
            attacker.reserve()

        def loss() -> Tensor:
            self._bare.train()
            if attacker is not None:
                self._attacked_step(self._bare, batch, attacker)
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
        if self._attacker is not None:
            self._attacker.save(Path(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(os.path.join(resume_from_checkpoint, CHECKPOINT_FILE))
        mine = dict(trainable(model or self.model))
        if saved.keys() != mine.keys():
            raise RuntimeError(f"the checkpoint {resume_from_checkpoint} is of another adapter")
        with torch.no_grad():
            for name, tensor in saved.items():
                mine[name].copy_(tensor)
        if self._attacker is not None:
            self._attacker.load(Path(resume_from_checkpoint))
