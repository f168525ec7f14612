"""The optimizers and learning rate schedules of a run, under transformers' names."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

    from unlearner.config import TrainConfig

# Parameters without weight decay, as in transformers' Trainer.
_NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
_BITSANDBYTES = {
    "adamw_8bit": ("AdamW", {**_ADAM, "optim_bits": 8}),
    "adamw_bnb_8bit": ("AdamW", {**_ADAM, "optim_bits": 8}),
    "paged_adamw_8bit": ("AdamW", {**_ADAM, "optim_bits": 8, "is_paged": True}),
    "paged_adamw_32bit": ("AdamW", {**_ADAM, "is_paged": True}),
    "paged_adamw": ("AdamW", {**_ADAM, "is_paged": True}),
    "lion_8bit": ("Lion", {"betas": (0.9, 0.999), "optim_bits": 8}),
    "paged_lion_8bit": ("Lion", {"betas": (0.9, 0.999), "optim_bits": 8, "is_paged": True}),
}
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", *_BITSANDBYTES)
# transformers' schedules that need no arguments of their own.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


def check_names(config: TrainConfig) -> None:
    """Refuse, before anything is loaded, an optimizer or schedule that cannot be created.

    Raises:
        UserError: an unknown name, or a package that is not installed.
    """
    for name, known in (("lr_scheduler_type", SCHEDULES), ("optim", OPTIMIZERS)):
        value = getattr(config, name)
        if value not in known:
            hint = did_you_mean(value, known)
            raise UserError(f"There is no {name} '{value}'.", hint)
    if config.optim in _BITSANDBYTES and find_spec("bitsandbytes") is None:
        raise UserError(
            f"The optimizer {config.optim} needs the package bitsandbytes.",
            "Install it with pip install bitsandbytes, or use --optim adamw_torch.",
        )


def make_optimizer(
    model: torch.nn.Module, config: TrainConfig, rate: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer of what is trained in `model`; norms and biases have no weight decay.

    Args:
        model: with the parameters to train.
        config: `optim`, `learning_rate` and `weight_decay`.
        rate: another learning rate.
    """
    import torch
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], list(_NO_DECAY)))
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in parameters if name in decayed],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in parameters if name not in decayed], "weight_decay": 0.0},
    ]
    kind, options = _kind(config.optim)
    optimizer: torch.optim.Optimizer = kind(
        groups, lr=config.learning_rate if rate is None else rate, **options
    )
    return optimizer


def _kind(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class of an optimizer and the arguments transformers gives it."""
    import torch

    if name in _BITSANDBYTES:
        import bitsandbytes

        kind, options = _BITSANDBYTES[name]
        return getattr(bitsandbytes.optim, kind), dict(options)
    if name == "adafactor":
        from transformers import Adafactor

        return Adafactor, {"scale_parameter": False, "relative_step": False}
    if name == "sgd":
        return torch.optim.SGD, {}
    return torch.optim.AdamW, {**_ADAM, **({"fused": True} if name.endswith("fused") else {})}


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate schedule of a run of `steps` optimizer steps."""
    from transformers import get_scheduler

    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=config.warmup_steps(steps),
        num_training_steps=steps,
    )
    return schedule
