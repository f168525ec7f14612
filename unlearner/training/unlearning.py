"""The loss of a forget run, micro-batch by micro-batch: the objective and what is added to it.

Added are alternate answers, the guard of earlier requests, the general prompts that are held to the
base, the pull on rows that are past the target, and the simulated attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.errors import UserError
from unlearner import distributed
from unlearner.config import UnlearnConfig, streams_of
from unlearner.objectives.directions import ProtectedDirections
from unlearner.objectives.guard import GuardRow, guard_kl, moved_nll
from unlearner.objectives.hidden import freeze_above, steered_layer
from unlearner.objectives.registry import OBJECTIVES
from unlearner.objectives.sequence import alternate_term
from unlearner.tokens.batch_plan import TAUGHT, Pair, Rows, micro_batches
from unlearner.tokens.packing import pack_rows
from unlearner.tokens.prompts import pad_batch
from unlearner.training.checkpoint import trainable
from unlearner.training.forward import REFERENCE, StepForwards, of_streams
from unlearner.training.loop import Batch, Gradients
from unlearner.training.references import References, row_key
from unlearner.training.relearning_attack import Attacker

# The rows whose answers are to stay as they are.
KEPT = ("retain", "guard", "alternate", "general")


@dataclass(frozen=True)
class UnlearnData:
    """The rows of a run and what was computed of them before training.

    Attributes:
        rows: encoded rows of every stream that the objective reads.
        plan: the pairs of every optimizer step, see `batch_plan.plan_steps`.
        pad: the id that fills padding, which is never a label.
        packed: whether the rows of a micro-batch form one pack; otherwise they are padded.
        guard: teachers of `rows.guard`, one for each; empty for no guard.
        general: teachers of `rows.general`, one for each; empty for no such stream.
        references: NLLs from `references.reference_nlls`; without them the reference runs in every
            step.
        parents: names of the adapters that the new one is trained on top of.
        frozen: a copy of the model as it was, where all of its weights are trained.
        protected: what the adapter leaves alone, where there is anything.
    """

    rows: Rows
    plan: Sequence[Sequence[Pair]]
    pad: int
    packed: bool = False
    guard: Sequence[GuardRow] = ()
    general: Sequence[GuardRow] = ()
    references: References = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    frozen: torch.nn.Module | None = None
    protected: ProtectedDirections | None = None


class UnlearnTask:
    """The objective on planned pairs of forget and retain rows, for `loop.TrainingLoop`."""

    def __init__(self, model: torch.nn.Module, data: UnlearnData, config: UnlearnConfig) -> None:
        """Cut every step into micro-batches.

        Args:
            model: whose parameters are trained; RMU freezes those above its block.
            data: rows and plan.
            config: objective and training settings.

        Raises:
            UserError: a simulated attack with several processes.
        """
        objective = config.objective
        if objective.name == "rmu":
            freeze_above(model, steered_layer(model, objective.rmu_layer))
        if objective.attack_weight > 0 and distributed.world_size() > 1:
            raise UserError(
                "--attack-weight needs one process.", "Start one, or leave out --attack-weight."
            )
        self.steps = len(data.plan)
        self._bare, self._data, self._objective = model, data, objective
        self._seed = config.train.seed
        self._teachers = {name: rows for name in TAUGHT if (rows := getattr(data, name))}
        self._streams = (*streams_of(objective), *self._teachers)
        self._pairs = len(data.plan[0])
        self._attacker = Attacker(model, config.train) if objective.attack_weight > 0 else None
        batches = micro_batches(
            data.plan,
            config.train.per_device_train_batch_size,
            distributed.world_size(),
            None if data.packed else self._longest,
        )
        count = len(batches) // self.steps
        self._batches = [batches[i : i + count] for i in range(0, len(batches), count)]

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step, counted from 0."""
        share = self._batches[step][distributed.rank() :: distributed.world_size()]
        return [self._collate(pairs) for pairs in share]

    def heaviest_batch(self) -> Batch:
        """The micro-batch of the run with the most tokens, padding counted."""
        return self._collate(max((b for step in self._batches for b in step), key=self._tokens))

    def accumulate(self, gradients: Gradients, batch: Batch) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch: sum over its pairs / pairs of the step."""
        with gradients.autocast():
            parts, nll = self._parts(gradients.model, batch)
            weighted = [getattr(self._objective, f"{name}_weight") * x for name, x in parts.items()]
            # DDP takes the mean of the processes' gradients; the step's loss is their sum.
            loss = torch.stack(weighted).sum() * distributed.world_size()
        gradients.backward(loss)
        terms = {f"{name}_loss": value.detach() for name, value in parts.items()}
        if nll is not None:
            terms["forget_nll"] = nll.detach().sum() / self._pairs
        if self._attacker is not None:
            terms["attack_loss"] = self._accumulate_attacked(gradients, batch, self._attacker)
        return terms

    def _parts(
        self, model: torch.nn.Module, batch: Batch
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The unweighted terms, each a sum over the pairs / pairs of the step.

        With a target also the NLL per token of the forget rows, (pairs,).
        """
        config, pairs = self._objective, self._pairs
        step = self._forwards(model, batch, self._streams)
        terms = OBJECTIVES[config.name].terms(step, config)
        parts = {"forget": terms.forget.sum() / pairs, "retain": terms.retain.sum() / pairs}
        if "alternate" in self._streams:
            parts["alternate"] = alternate_term(step, config).sum() / pairs
        if "guard" in self._streams:
            teachers = [self._data.guard[i] for i in batch["guard"].tolist()]
            distance = guard_kl(step.answers("guard"), teachers)
            moved = moved_nll(step.nll("guard").per_token, teachers)
            parts["guard"] = (distance + moved).sum() / pairs
        if "general" in self._streams:
            teachers = [self._data.general[i] for i in batch["general"].tolist()]
            parts["general"] = guard_kl(step.answers("general"), teachers).sum() / pairs
        if not config.target:
            return parts, None
        nll = step.nll("forget").per_token
        parts["excess"] = (nll - config.target).clamp_min(0).square().sum() / pairs
        return parts, nll

    def _accumulate_attacked(
        self, gradients: Gradients, batch: Batch, attacker: Attacker
    ) -> Tensor:
        """Add the forget gradient under attack, and the attacker's own; the term, unweighted."""
        config = self._objective
        forget = tuple(name for name in self._streams if name not in KEPT)
        step = self._forwards(gradients.model, of_streams(batch, self._streams, forget), forget)
        attacked = replace(config, retain_weight=0.0, gamma=config.attack_gamma)
        with attacker.on():
            with gradients.autocast():
                terms = OBJECTIVES[config.name].terms(step, attacked)
                value = terms.forget.sum() / self._pairs
                attacker.learn(step.nll("forget").per_token.sum() / self._pairs)
            gradients.backward(
                config.attack_weight * value, inputs=list(trainable(self._bare).values())
            )
        return value.detach()

    def end_step(self) -> None:
        """The attacker's own step; what is protected is left alone again."""
        if self._data.protected is not None:
            self._data.protected.project()
        if self._attacker is not None:
            self._attacker.step()

    def reserve(self) -> None:
        """The attacker's moments and gradient are held while the other rows run."""
        if self._attacker is not None:
            self._attacker.reserve()

    def release(self) -> None:
        """Free them, and the gradient that a measurement left."""
        if self._attacker is not None:
            self._attacker.release()

    def remove(self) -> None:
        """Remove the attacker from the model."""
        if self._attacker is not None:
            self._attacker.remove()

    def write(self, folder: Path) -> None:
        """Add the attacker to a checkpoint."""
        if self._attacker is not None:
            self._attacker.save(folder)

    def read(self, folder: Path) -> None:
        """Restore it."""
        if self._attacker is not None:
            self._attacker.load(folder)

    def _rows(self, pairs: Sequence[Pair]) -> list[Any]:
        return [row for name in self._streams for row in self._data.rows.stream(name, pairs)]

    def _collate(self, pairs: Sequence[Pair]) -> Batch:
        rows = self._rows(pairs)
        batch = pack_rows(rows) if self._data.packed else pad_batch(rows, self._data.pad)
        for name in self._teachers:
            batch[name] = torch.tensor([getattr(pair, name) for pair in pairs])
        for name, known in self._data.references.items():
            values = [known[row_key(name, pair)] for pair in pairs]
            batch[REFERENCE.format(name)] = torch.tensor(values)
        return batch

    def _longest(self, pair: Pair) -> int:
        return max(len(row.input_ids) for row in self._rows([pair]))

    def _tokens(self, pairs: Sequence[Pair]) -> int:
        lengths = [len(row.input_ids) for row in self._rows(pairs)]
        return sum(lengths) if self._data.packed else max(lengths) * len(lengths)

    def _forwards(
        self, model: torch.nn.Module, batch: Batch, streams: Sequence[str]
    ) -> StepForwards:
        return StepForwards(
            model,
            batch,
            streams,
            self._data.parents,
            self._bare,
            seed=self._seed,
            frozen=self._data.frozen,
        )
