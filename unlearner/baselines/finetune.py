"""Origin and Retrain: models fine-tuned on question/answer rows."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.base.load import BaseSpec, dtype_on, load_base, load_tokenizer, resolve_base
from adapters.errors import Interrupted, UserError
from unlearner import distributed
from unlearner.config import LoraShape, TrainConfig
from unlearner.request.rows import Row
from unlearner.tokens.prompts import (
    Encoded,
    PromptFormat,
    Template,
    encode_rows,
    pad_batch,
    pad_id,
    prompt_format,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unlearner.interrupt import Progress
    from unlearner.objectives.directions import ProtectedDirections
    from unlearner.training.loop import Batch, Gradients


@dataclass(frozen=True)
class FinetuneConfig:
    """TOFU's recipe for its models (arXiv 2401.06121): 5 epochs, lr 1e-5, batch 32.

    Attributes:
        learning_rate: 1e-5 for all weights; use about 1e-4 with `lora`.
        num_train_epochs: passes over the rows.
        per_device_train_batch_size: rows of one forward.
        gradient_accumulation_steps: forwards of one optimizer step.
        warmup_ratio: share of the steps with rising learning rate; one epoch of five.
        weight_decay: AdamW's.
        max_length: tokens a row is cut at.
        gradient_checkpointing: trade time for memory.
        protected_directions: with `lora`, directions of each layer's input that the adapter leaves
            alone, so that what the base knows stays: `unlearner.objectives.directions`.
        seed: of the order of rows and the adapter's init.
    """

    learning_rate: float = 1e-5
    num_train_epochs: int = 5
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 4
    warmup_ratio: float = 0.2
    weight_decay: float = 0.01
    max_length: int = 500
    gradient_checkpointing: bool = False
    protected_directions: int = 0
    seed: int = 42


def finetune(
    base: BaseSpec,
    rows: Sequence[Row],
    out: Path,
    config: FinetuneConfig | None = None,
    *,
    lora: LoraShape | None = None,
    template: Template = "auto",
    system: str | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Fine-tune `base` on `rows` and write its full weights to the new folder `out`.

    Only answers and EOS are trained on; the loss of a step is the mean over its answer tokens. With
    `lora` the base stays frozen (and may be in 4 bit); the adapter is then folded into the base's
    original weights in float32. Without it all weights are trained in float32, on a GPU under bf16
    autocast: at a learning rate of 1e-5 most updates of bf16 weights would round away.

    Args:
        base: what to start from.
        rows: question and answer are read.
        out: must not exist yet.
        config: learning rate, epochs and the like.
        lora: shape of the adapter; None trains all weights.
        template: prompt format.
        system: system prompt, see `PromptFormat`.
        on_progress: gets {"event": "train", "step", "steps", "loss", ...} after every step.

    Raises:
        UserError: `out` exists, or all weights of a 4-bit base are to be trained.
        Interrupted: stopped by Ctrl-C; a checkpoint is kept, and the same call continues it.
    """
    from adapters.environment import threads_for
    from unlearner.interrupt import StopRequest
    from unlearner.objectives.likelihood import packs_exactly
    from unlearner.tokens.packing import pack_attention
    from unlearner.training.checkpoint import last_checkpoint
    from unlearner.training.loop import TrainingLoop

    config = config or FinetuneConfig()
    report = on_progress or (lambda event: None)
    if out.exists():
        raise UserError(f"{out} exists already.", "Name a folder that does not, or remove it.")
    if base.load_in_4bit and lora is None:
        raise UserError(
            "The weights of a 4-bit base cannot be trained.", "Add --lora, or load it in bf16."
        )
    if config.protected_directions and lora is None:
        raise UserError(
            "Protected directions are those of an adapter.",
            "Add --lora, or leave --protected-directions out.",
        )
    folder = resolve_base(base.name, base.revision)
    tokenizer = load_tokenizer(str(folder))
    fmt = prompt_format(tokenizer, template, system)
    pairs = [(row.question, row.answer) for row in rows]
    encoded = encode_rows(fmt, pairs, config.max_length, "training")
    distributed.join()
    model, autocast = _load(base, lora, config.seed)
    depends_on = [pairs, asdict(base), asdict(config), lora and asdict(lora), fmt.to_json()]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
    work = out.with_name(f".{out.name}-{key}")
    if distributed.rank() == 0:
        work.mkdir(parents=True, exist_ok=True)
    distributed.wait()
    stop = StopRequest()
    with ExitStack() as stack:
        stack.enter_context(threads_for(model))
        stack.enter_context(pack_attention(model))
        by_length = sorted(encoded, key=lambda row: len(row.input_ids))
        packed, _ = packs_exactly(model, [by_length[0], by_length[-1]])
        protected = _protected(model, fmt, config, report)
        if protected is not None:
            stack.callback(protected.remove)
        task = FinetuneTask(encoded, config, pad_id(tokenizer), packed=packed, protected=protected)
        loop = TrainingLoop(
            model, task, _train_config(config), work, report=report, autocast=autocast
        )
        if (saved := last_checkpoint(work)) is not None:
            loop.load(saved)
        with stop.listening(report):
            loop.run(stop)
    if distributed.any_of(stop.asked) and loop.step < task.steps:
        raise Interrupted(
            f"Stopped after step {loop.step} of {task.steps}; it is saved.",
            "The same command continues it.",
        )
    if distributed.rank() == 0:
        _save(model, tokenizer, base, work, lora)
        shutil.move(str(work / "model"), str(out))
        shutil.rmtree(work)
    distributed.wait()
    return out


class FinetuneTask:
    """The mean NLL of the answer tokens of a step, for `loop.TrainingLoop`."""

    def __init__(
        self,
        rows: Sequence[Encoded],
        config: FinetuneConfig,
        pad: int,
        *,
        packed: bool,
        protected: ProtectedDirections | None = None,
    ) -> None:
        """Draw the order of the rows: a new permutation in every epoch, from the seed.

        Args:
            rows: what is learned.
            config: epochs, batch size, seed.
            pad: the id that fills padding.
            packed: whether the rows of a micro-batch form one pack; otherwise they are padded.
            protected: what the adapter leaves alone, where there is anything.
        """
        import numpy

        self._rows, self._pad, self._packed, self._protected = rows, pad, packed, protected
        self._size = config.per_device_train_batch_size
        per_step = self._size * config.gradient_accumulation_steps * distributed.world_size()
        random = numpy.random.default_rng(config.seed)
        orders = [random.permutation(len(rows)) for _ in range(config.num_train_epochs)]
        self._steps = [
            order[start : start + per_step].tolist()
            for order in orders
            for start in range(0, len(rows), per_step)
        ]
        self.steps = len(self._steps)
        self._targets = 1

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step: rows of like length together."""
        chosen = sorted(self._steps[step], key=lambda i: -len(self._rows[i].input_ids))
        self._targets = sum(self._rows[i].n_targets for i in chosen)
        # Every process has as many, so that none waits for another; the last may repeat no row.
        share = chosen[distributed.rank() :: distributed.world_size()]
        count = -(-len(chosen) // (self._size * distributed.world_size()))
        return [self._collate(share[number::count]) for number in range(count)]

    def heaviest_batch(self) -> Batch:
        """As many of the longest rows as a micro-batch holds."""
        order = sorted(range(len(self._rows)), key=lambda i: -len(self._rows[i].input_ids))
        return self._collate(order[: self._size])

    def accumulate(self, gradients: Gradients, batch: Batch) -> dict[str, Tensor]:
        """Add the gradient of a micro-batch: its summed NLL / answer tokens of the step."""
        from unlearner.objectives.likelihood import answer_nll

        with gradients.autocast():
            loss = answer_nll(gradients.model, batch).nll.sum() / self._targets
            # DDP takes the mean of the processes' gradients; the step's loss is their sum.
            weighted = loss * distributed.world_size()
        gradients.backward(weighted)
        return {"loss": loss.detach()}

    def end_step(self) -> None:
        """What is protected is left alone again."""
        if self._protected is not None:
            self._protected.project()

    def reserve(self) -> None:
        """A step holds nothing beside the model and its optimizer."""

    def release(self) -> None:
        """So there is nothing to free."""

    def write(self, folder: Path) -> None:
        """A checkpoint needs no state of this task."""

    def read(self, folder: Path) -> None:
        """See `write`."""

    def _collate(self, indices: Sequence[int]) -> Batch:
        from unlearner.tokens.packing import pack_rows

        rows = [self._rows[i] for i in indices]
        return pack_rows(rows) if self._packed else pad_batch(rows, self._pad)


def _load(
    base: BaseSpec, lora: LoraShape | None, seed: int
) -> tuple[torch.nn.Module, torch.dtype | None]:
    """The model with what is to be trained, and the precision of its forward passes."""
    import torch

    from adapters.lora.stack import add_trainable
    from unlearner.run import NEW, lora_config, with_targets

    if lora is not None:
        model: Any = load_base(base)
        torch.manual_seed(seed)
        return add_trainable(model, NEW, lora_config(with_targets(lora, model)), []), None
    model = load_base(replace(base, dtype="float32"))
    model.requires_grad_(True)
    device = next(model.parameters()).device
    if device.type != "cuda" or base.dtype == "float32":
        return model, None
    return model, dtype_on(base.dtype, str(device))


def _protected(
    model: Any, fmt: PromptFormat, config: FinetuneConfig, report: Progress
) -> ProtectedDirections | None:
    """What the adapter leaves alone of the base's own answers to neutral prompts."""
    from unlearner.objectives.directions import ProtectedDirections
    from unlearner.training.general import answers_of_base, own_prompts

    if not config.protected_directions:
        return None
    prompts = own_prompts(0)  # the fewest: nothing is trained on them
    report({"event": "note", "text": f"the base answers {len(prompts)} general prompts"})
    rows = answers_of_base(model, fmt, prompts)
    return ProtectedDirections(model, rows, config.protected_directions, config.seed)


def _train_config(config: FinetuneConfig) -> TrainConfig:
    return TrainConfig(
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_train_epochs,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        warmup_ratio=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        gradient_checkpointing="all" if config.gradient_checkpointing else "off",
        seed=config.seed,
    )


def _save(model: Any, tokenizer: Any, base: BaseSpec, work: Path, lora: LoraShape | None) -> None:
    """Full weights in the folder `model` of `work`."""
    whole = work / "model"
    shutil.rmtree(whole, ignore_errors=True)
    if lora is None:
        device = next(model.parameters()).device
        if device.type == "cuda":
            model = model.to(dtype_on(base.dtype, str(device)))
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        return
    from adapters.lora.merge import fold_stack
    from adapters.lora.stack import save_adapter
    from unlearner.run import NEW

    adapter = save_adapter(model, NEW, work / "adapter")
    fold_stack(resolve_base(base.name, base.revision), [(adapter, 1.0)], whole)
