"""transformers' TrainingArguments of a forget run."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from unlearner.config import UnlearnConfig


def training_arguments(
    config: UnlearnConfig, output_dir: Path, steps: int, accumulation: int, model: Any
) -> TrainingArguments:
    """Everything but what the objective says; one item of the data is one micro-batch.

    Args:
        config: training settings.
        output_dir: where checkpoints go.
        steps: optimizer steps.
        accumulation: micro-batches of a step on one process.
        model: for its device and whether it computes in bf16.
    """
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
