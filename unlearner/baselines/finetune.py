"""Origin and Retrain: models fine-tuned on question/answer rows by TRL's SFTTrainer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.base.load import BaseSpec, load_base, load_tokenizer, resolve_base
from adapters.errors import Interrupted, UserError
from unlearner.config import LoraShape
from unlearner.request.rows import Row
from unlearner.tokens.prompts import encode_rows, pad_id, prompt_format
from unlearner.training import distributed as ranks

if TYPE_CHECKING:
    from unlearner.training.callbacks import Progress, StopRequest


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
    seed: int = 42


def finetune(
    base: BaseSpec,
    rows: Sequence[Row],
    out: Path,
    config: FinetuneConfig | None = None,
    *,
    lora: LoraShape | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """`out`, a folder with full weights of `base` fine-tuned on `rows`.

    Only answers and EOS are trained on. With `lora` the base stays frozen (and may be in 4 bit);
    the adapter is then folded into the base's original weights in float32.

    Args:
        base: what to start from.
        rows: question and answer are read.
        out: must not exist yet.
        config: learning rate, epochs and the like.
        lora: shape of the adapter; None trains all weights.
        on_progress: gets {"event": "train", "step", "steps", "loss", ...} after every step.

    Raises:
        UserError: `out` exists, or all weights of a 4-bit base are asked for.
        Interrupted: stopped by Ctrl-C; nothing is kept.
    """
    config = config or FinetuneConfig()
    if out.exists():
        raise UserError(f"{out} exists already.", "Name a folder that does not, or remove it.")
    if base.load_in_4bit and lora is None:
        raise UserError(
            "The weights of a 4-bit base cannot be trained.", "Add --lora, or load it in bf16."
        )
    folder = resolve_base(base.name, base.revision)
    tokenizer = load_tokenizer(str(folder))
    fmt = prompt_format(tokenizer)
    pairs = [(row.question, row.answer) for row in rows]
    encoded = encode_rows(fmt, pairs, config.max_length, "training")
    ranks.join()
    model = _prepared(base, lora, config.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".finetune-", dir=out.parent) as work:
        trainer, stop = _trainer(model, tokenizer, encoded, config, Path(work), on_progress)
        with stop.listening(on_progress):
            trainer.train()
        if ranks.any_of(stop.asked) and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(
                f"Stopped after step {trainer.state.global_step}; nothing was kept.",
                "Run the same command again.",
            )
        _save(trainer, tokenizer, folder, Path(work), out, lora)
    ranks.wait()
    return out


def _prepared(base: BaseSpec, lora: LoraShape | None, seed: int) -> Any:
    import torch
    from peft import LoraConfig

    from adapters.lora.stack import add_trainable

    model = load_base(base)
    if lora is None:
        model.requires_grad_(True)
        return model
    torch.manual_seed(seed)
    shape = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return add_trainable(model, "finetune", shape, [])


def _arguments(config: FinetuneConfig, rows: int, folder: Path) -> Any:
    import torch
    from trl import SFTConfig

    from unlearner.training.arguments import checkpointing_arguments

    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    size *= ranks.world_size()
    steps = max(1, -(-rows // size) * config.num_train_epochs)
    return SFTConfig(
        output_dir=str(folder),
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_train_epochs,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        warmup_steps=round(config.warmup_ratio * steps),
        lr_scheduler_type="linear",
        weight_decay=config.weight_decay,
        max_length=None,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        # The rows are tokenised and masked already, exactly as they are evaluated.
        dataset_kwargs={"skip_prepare_dataset": True},
        **checkpointing_arguments("all" if config.gradient_checkpointing else "off"),
    )


def _trainer(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Any],
    config: FinetuneConfig,
    work: Path,
    on_progress: Progress | None,
) -> tuple[Any, StopRequest]:
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from unlearner.training.callbacks import LoggedCallback, StopRequest

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id(tokenizer))
    table = Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in encoded],
            "labels": [row.labels for row in encoded],
        }
    )
    trainer = SFTTrainer(
        model=model,
        args=_arguments(config, len(encoded), work / "run"),
        train_dataset=table,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    stop = StopRequest()
    report = on_progress or (lambda event: None)
    trainer.add_callback(LoggedCallback(stop, work / "metrics.jsonl", report))
    return trainer, stop


def _save(
    trainer: Any, tokenizer: Any, base: Path, work: Path, out: Path, lora: LoraShape | None
) -> None:
    """Full weights in `out`, whole when it exists; every process takes part, the first writes."""
    whole = work / "model"
    if lora is None:
        trainer.save_model(str(whole))  # under FSDP this gathers the shards of all processes
        if ranks.rank() == 0:
            tokenizer.save_pretrained(whole)
    elif ranks.rank() == 0:
        from adapters.lora.merge import fold_stack
        from adapters.lora.stack import save_adapter

        adapter = save_adapter(trainer.model, "finetune", work / "adapter")
        fold_stack(base, [(adapter, 1.0)], whole)
    if ranks.rank() == 0:
        shutil.move(str(whole), str(out))
