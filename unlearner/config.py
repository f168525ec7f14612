"""Every setting of a forget run, with its default and its reason, in one place."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from adapters.errors import UserError

# The seven projections of a Llama block: peft's "all-linear" without the LM head.
TARGET_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
CHECKPOINTING = r"auto|off|all|[2-9]|[1-9]\d{1,2}"
ObjectiveName = Literal[
    "simnpo", "simnpo-readme", "npo", "grad_ascent", "grad_diff", "kl", "idk", "dpo"
]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which loss, and its constants (SPEC section 2).

    Attributes:
        name: a key of `unlearner.losses.OBJECTIVES`.
        beta: inverse temperature; unused by grad_ascent, grad_diff, kl and idk.
        gamma: SimNPO's margin in `beta * nbar - gamma`.
        forget_weight: w_f, on the forget term.
        retain_weight: w_r, on the retain term; the model card's lambda.
        guard_weight: on the KL that keeps earlier requests of the stack forgotten, where their
            rows or recorded teachers are at hand (see `unlearner.guard`).
    """

    name: ObjectiveName = "simnpo"
    beta: float = 2.5
    gamma: float = 0.0
    forget_weight: float = 1.0
    retain_weight: float = 0.1375
    guard_weight: float = 1.0


# Published constants of each objective. `simnpo` is the card of
# OPTML-Group/SimNPO-TOFU-forget05-Llama-2-7b-chat; `simnpo-readme` is what the released README
# and yaml run, lambda on the forget term, known to under-forget.
OBJECTIVE_DEFAULTS: dict[str, ObjectiveConfig] = {
    "simnpo": ObjectiveConfig(),
    "simnpo-readme": ObjectiveConfig("simnpo-readme", forget_weight=0.1375, retain_weight=1.0),
    "npo": ObjectiveConfig("npo", beta=0.1, retain_weight=1.0),
    "grad_ascent": ObjectiveConfig("grad_ascent", retain_weight=0.0),
    "grad_diff": ObjectiveConfig("grad_diff", retain_weight=1.0),
    "kl": ObjectiveConfig("kl", retain_weight=1.0),
    "idk": ObjectiveConfig("idk", retain_weight=1.0),
    "dpo": ObjectiveConfig("dpo", beta=0.1, retain_weight=1.0),
}

# What each one minimises, in a line, for model cards and reports; the code is `unlearner.losses`.
_ON_BOTH = "w_f {} + w_r {}, means over the pairs of a step"
_RETAIN = "nll_r/|y_r|"
FORMULAS: dict[str, str] = {
    "simnpo": _ON_BOTH.format("(-2/beta) log sigmoid(beta nll_f/|y_f| - gamma)", _RETAIN),
    "simnpo-readme": _ON_BOTH.format("(-2/beta) log sigmoid(beta nll_f/|y_f| - gamma)", _RETAIN),
    "npo": _ON_BOTH.format("(-2/beta) log sigmoid(beta (nll_f - nll_f,reference))", _RETAIN),
    "grad_ascent": "w_f (-nll_f/|y_f|), mean over the forget rows of a step",
    "grad_diff": _ON_BOTH.format("(-nll_f/|y_f|)", _RETAIN),
    "kl": _ON_BOTH.format("(-nll_f/|y_f|)", "KL(reference || model) on the retain answer"),
    "idk": _ON_BOTH.format("nll of a refusal/|y|", _RETAIN),
    "dpo": _ON_BOTH.format(
        "(-2/beta) log sigmoid(beta ((nll_refusal,reference - nll_refusal) - "
        "(nll_f,reference - nll_f)))",
        _RETAIN,
    ),
}

# Which row streams an objective reads. Beside the defaults, so that a request can be checked
# before torch is imported.
STREAMS: dict[str, tuple[str, ...]] = {
    "simnpo": ("forget", "retain"),
    "simnpo-readme": ("forget", "retain"),
    "npo": ("forget", "retain"),
    "grad_ascent": ("forget",),
    "grad_diff": ("forget", "retain"),
    "kl": ("forget", "retain"),
    "idk": ("refusal", "retain"),
    "dpo": ("forget", "refusal", "retain"),
}


@dataclass(frozen=True)
class LoraShape:
    """Shape of the adapter. Plain LoRA only: uniform r and alpha, no bias, no dropout by default.

    Attributes:
        lora_r: rank; published LoRA unlearning uses 4 to 32.
        lora_alpha: the update is scaled by alpha / r.
        lora_dropout: 0, since it makes evaluation differ from training and costs memory.
        target_modules: the seven projections; embeddings and head stay untouched.
    """

    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGET_MODULES


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast (transformers' spellings).

    Attributes:
        learning_rate: published full fine-tunes use 1e-5, LoRA about ten times that.
        num_train_epochs: passes over the forget rows.
        per_device_train_batch_size: forget/retain pairs of one forward.
        gradient_accumulation_steps: forwards of one optimizer step; the result does not depend
            on how a step is divided.
        warmup_ratio: share of the steps with rising learning rate.
        lr_scheduler_type: transformers' schedule name.
        weight_decay: AdamW's, on the adapter.
        max_grad_norm: 0 = no clipping, as the published recipe.
        max_length: a row is cut at this many tokens, prompt included.
        gradient_checkpointing: trade time for memory: "off", "all", a number N for every N-th
            layer, or "auto", as much as the memory plan asks for.
        padded: padded batches, sorted by length, instead of packs.
        optim: transformers' optimizer name.
        seed: of pairing, order and adapter init.
    """

    learning_rate: float = 1e-4
    num_train_epochs: int = 10
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 4
    warmup_ratio: float = 0.1
    lr_scheduler_type: str = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float = 0.0
    max_length: int = 500
    gradient_checkpointing: str = "auto"
    padded: bool = False
    optim: str = "adamw_torch"
    seed: int = 42

    def steps(self, n_forget: int) -> int:
        """Optimizer steps: whole batches in `num_train_epochs` passes, at least one."""
        return max(1, self.num_train_epochs * n_forget // self.batch_size(n_forget))

    def batch_size(self, n_forget: int) -> int:
        """Pairs of one optimizer step: never more than there are forget rows."""
        asked = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return min(asked, n_forget)


@dataclass(frozen=True)
class UnlearnConfig:
    """A whole forget run: objective, adapter shape, training."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraShape = field(default_factory=LoraShape)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise UserError(
                "These settings cannot be used: " + "; ".join(problems) + ".",
                "Correct them and run again.",
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)


def _problems(config: UnlearnConfig) -> list[str]:
    """Everything that is wrong, in words that name flag and value."""
    objective, lora, train = config.objective, config.lora, config.train
    known = OBJECTIVE_DEFAULTS
    checks = [
        (objective.name in known, f"objective {objective.name!r} is not one of {', '.join(known)}"),
        (objective.beta > 0, f"beta {objective.beta} is not above 0"),
        (objective.forget_weight >= 0, f"forget_weight {objective.forget_weight} is below 0"),
        (objective.retain_weight >= 0, f"retain_weight {objective.retain_weight} is below 0"),
        (objective.guard_weight >= 0, f"guard_weight {objective.guard_weight} is below 0"),
        (lora.lora_r >= 1, f"lora_r {lora.lora_r} is below 1"),
        (lora.lora_alpha > 0, f"lora_alpha {lora.lora_alpha} is not above 0"),
        (0 <= lora.lora_dropout < 1, f"lora_dropout {lora.lora_dropout} is not in [0, 1)"),
        (bool(lora.target_modules), "target_modules is empty"),
        (
            set(lora.target_modules) <= set(TARGET_MODULES),
            f"target_modules {','.join(lora.target_modules)} go beyond {','.join(TARGET_MODULES)}",
        ),
        (
            len(set(lora.target_modules)) == len(lora.target_modules),
            "target_modules names a projection twice",
        ),
        (train.learning_rate > 0, f"learning_rate {train.learning_rate} is not above 0"),
        (train.num_train_epochs >= 1, f"num_train_epochs {train.num_train_epochs} is below 1"),
        (train.max_length >= 8, f"max_length {train.max_length} is below 8"),
        (0 <= train.warmup_ratio <= 1, f"warmup_ratio {train.warmup_ratio} is not in [0, 1]"),
        (train.weight_decay >= 0, f"weight_decay {train.weight_decay} is below 0"),
        (
            re.fullmatch(CHECKPOINTING, train.gradient_checkpointing) is not None,
            f"gradient_checkpointing {train.gradient_checkpointing!r} is not auto, off, all or a "
            "number from 2",
        ),
        (train.max_grad_norm >= 0, f"max_grad_norm {train.max_grad_norm} is below 0"),
        (
            min(train.per_device_train_batch_size, train.gradient_accumulation_steps) >= 1,
            "per_device_train_batch_size and gradient_accumulation_steps must be at least 1",
        ),
    ]
    numbers = {**asdict(objective), **asdict(lora), **asdict(train)}
    checks += [
        (math.isfinite(value), f"{name} {value} is not a finite number")
        for name, value in numbers.items()
        if isinstance(value, float)
    ]
    return [problem for holds, problem in checks if not holds]


def make_config(objective: str = "simnpo", **overrides: Any) -> UnlearnConfig:
    """The published defaults of `objective` with flat overrides by field name (None = default).

    Raises:
        UserError: unknown objective, or settings that cannot be used, all at once.
    """
    if objective not in OBJECTIVE_DEFAULTS:
        from unlearner.data import did_you_mean

        hint = did_you_mean(objective, OBJECTIVE_DEFAULTS)
        raise UserError(f"There is no objective '{objective}'.", hint)
    given = {key: value for key, value in overrides.items() if value is not None}
    parts: list[Any] = [OBJECTIVE_DEFAULTS[objective], LoraShape(), TrainConfig()]
    built = []
    for part in parts:
        mine = {f.name: given.pop(f.name) for f in fields(part) if f.name in given}
        built.append(replace(part, **mine))
    if given:
        raise TypeError(f"no such setting: {', '.join(given)}")
    return UnlearnConfig(*built)
