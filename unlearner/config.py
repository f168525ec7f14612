"""Every setting of a forget run, with its default and its reason, in one place."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from adapters.errors import UserError, did_you_mean
from unlearner.objectives.registry import OBJECTIVES

# PEFT's word for all linear layers of the blocks, without the head; routers are left out too.
ALL_LINEAR = ("all-linear",)
# What these are in a Llama.
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


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which loss, and its constants (SPEC section 2).

    Attributes:
        name: a key of `unlearner.objectives.registry.OBJECTIVES`.
        beta: inverse temperature; what UNDIAL takes off the teacher's logit of the true token; the
            exponent of p in WGA and SatImp. Unused by grad_ascent, grad_diff, kl, idk, rmu, ceu
            and ihl.
        beta2: SatImp's exponent of 1 - p.
        gamma: SimNPO's margin in `beta * nbar - gamma`.
        rmu_layer: block whose output RMU steers, from 0; -1 is the one at 7/32 of the depth.
        rmu_coefficient: RMU's c, the length of the vector that forget states are steered to.
        ceu_skip: how many tokens at the beginning of an answer CE-U leaves alone.
        forget_weight: w_f, on the forget term.
        retain_weight: w_r, on the retain term; the model card's lambda.
        guard_weight: on what keeps earlier requests of the stack forgotten, where their
            rows or recorded teachers are at hand (see `unlearner.objectives.guard`).
        alternates: so many alternate answers a forget question: those of the retain rows with the
            nearest questions (see `unlearner.request.alternates`); 0 = off.
        alternate_weight: w_a, on the mean NLL of an alternate answer to the forget question.
        alternate_smoothing: share of each of their targets that is spread over the vocabulary, so
            that they are not known more surely than a base that was trained so knows anything.
        attack_weight: w_x, on the forget term of the model under a simulated relearning attack
            (see `unlearner.training.relearning_attack`); 0 = off.
        attack_gamma: SimNPO's margin in that term.
        general_weight: w_g, on the KL from the base on neutral prompts that it answered itself
            (see `unlearner.training.general`); 0 = off.
        protected_directions: so many principal directions of what each adapted layer sees on those
            prompts and on retain rows are left alone (see `unlearner.objectives.directions`);
            0 = off.
        target: mean NLL of the forget rows in nats per token at which the run ends, that of rows
            which the base never saw (see `unlearner.training.target`); 0 = none.
        settle: optimizer steps that follow the one at which the target was reached; 0 keeps the
            nearest weights of the last two readings and between them; -1 = 12 with alternate
            answers, else 0.
        excess_weight: w_e, on the square of what a forget row's NLL per token is above `target`.
    """

    name: str = "simnpo"
    beta: float = 2.5
    beta2: float = 1.0
    gamma: float = 0.0
    rmu_layer: int = -1
    rmu_coefficient: float = 20.0
    ceu_skip: int = 1
    forget_weight: float = 1.0
    retain_weight: float = 0.1375
    guard_weight: float = 1.0
    alternates: int = 0
    alternate_weight: float = 1.0
    alternate_smoothing: float = 0.0
    attack_weight: float = 0.0
    attack_gamma: float = 0.0
    general_weight: float = 0.0
    protected_directions: int = 0
    target: float = 0.0
    settle: int = -1
    excess_weight: float = 0.5


def default_objective(name: str) -> ObjectiveConfig:
    """An objective with its published constants.

    Raises:
        UserError: there is no such objective.
    """
    if name not in OBJECTIVES:
        hint = did_you_mean(name, OBJECTIVES)
        raise UserError(f"There is no objective '{name}'.", hint)
    defaults: dict[str, Any] = dict(OBJECTIVES[name].defaults)
    return ObjectiveConfig(name, **defaults)


def streams_of(objective: ObjectiveConfig) -> tuple[str, ...]:
    """The streams that are read with these weights: a retain term of weight 0 is not computed."""
    names = OBJECTIVES[objective.name].streams
    names = names if objective.retain_weight else tuple(n for n in names if n != "retain")
    alternates = objective.alternates and objective.alternate_weight
    return (*names, "alternate") if alternates else names


@dataclass(frozen=True)
class LoraShape:
    """Shape of the adapter. Plain LoRA only: uniform r and alpha, no bias, no dropout by default.

    Attributes:
        lora_r: rank; published LoRA unlearning uses 4 to 32.
        lora_alpha: the update is scaled by alpha / r.
        lora_dropout: 0, since it makes evaluation differ from training and costs memory.
        target_modules: names of linear layers; by default all that every block of the model has.
            Embeddings, head and routers are never adapted.
    """

    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ALL_LINEAR


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
        attack_steps: optimizer steps of one simulated relearning attack, with `attack_weight`.
        attack_rate: the attacker's learning rate, constant; 0 = by the model's size, as in
            `robustness`.
        attack_rank: rank of the attacker's LoRA.
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
    attack_steps: int = 20
    attack_rate: float = 0.0
    attack_rank: int = 16
    optim: str = "adamw_torch"
    seed: int = 42

    def steps(self, n_forget: int) -> int:
        """Optimizer steps: whole batches in `num_train_epochs` passes, at least one."""
        return max(1, self.num_train_epochs * n_forget // self.batch_size(n_forget))

    def batch_size(self, n_forget: int) -> int:
        """Pairs of one optimizer step: never more than there are forget rows."""
        pairs = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return min(pairs, n_forget)

    def warmup_steps(self, steps: int) -> int:
        """Steps with a rising learning rate, always fewer than `steps`.

        The first of them has rate 0, so a run that only warms up may not train at all.
        """
        return min(math.ceil(self.warmup_ratio * steps), steps - 1)


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

    def recipe(self, n_forget: int) -> dict[str, Any]:
        """The settings that decide the result.

        How a step is divided and recomputed does not, so that a run that ran out of memory can be
        resumed with other such settings.
        """
        settings = self.to_json()
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "gradient_checkpointing",
            "padded",
        ):
            del settings["train"][name]
        return {**settings, "pairs_per_step": self.train.batch_size(n_forget)}


def _objective_checks(objective: ObjectiveConfig) -> list[tuple[bool, str]]:
    """Whether each constant can be used, and what is wrong with it if not."""
    above = ("beta", "rmu_coefficient")
    names = (
        *("beta2", "ceu_skip", "alternates"),
        *("forget_weight", "retain_weight", "guard_weight", "alternate_weight", "attack_weight"),
        *("general_weight", "protected_directions", "target", "excess_weight"),
    )
    values = asdict(objective)
    return [
        *((values[name] > 0, f"{name} {values[name]} is not above 0") for name in above),
        *((values[name] >= 0, f"{name} {values[name]} is below 0") for name in names),
        (objective.rmu_layer >= -1, f"rmu_layer {objective.rmu_layer} is below -1"),
        (objective.settle >= -1, f"settle {objective.settle} is below -1"),
        (
            0 <= objective.alternate_smoothing < 1,
            f"alternate_smoothing {objective.alternate_smoothing} is not in [0, 1)",
        ),
    ]


def _problems(config: UnlearnConfig) -> list[str]:
    """Everything that is wrong, in words that name flag and value."""
    objective, lora, train = config.objective, config.lora, config.train
    known = OBJECTIVES
    checks = [
        (objective.name in known, f"objective {objective.name!r} is not one of {', '.join(known)}"),
        *_objective_checks(objective),
        (lora.lora_r >= 1, f"lora_r {lora.lora_r} is below 1"),
        (lora.lora_alpha > 0, f"lora_alpha {lora.lora_alpha} is not above 0"),
        (0 <= lora.lora_dropout < 1, f"lora_dropout {lora.lora_dropout} is not in [0, 1)"),
        (bool(lora.target_modules), "target_modules is empty"),
        (
            len(set(lora.target_modules)) == len(lora.target_modules),
            "target_modules names a projection twice",
        ),
        (train.learning_rate > 0, f"learning_rate {train.learning_rate} is not above 0"),
        (train.num_train_epochs >= 1, f"num_train_epochs {train.num_train_epochs} is below 1"),
        (train.max_length >= 8, f"max_length {train.max_length} is below 8"),
        (0 <= train.warmup_ratio <= 1, f"warmup_ratio {train.warmup_ratio} is not in [0, 1]"),
        (train.attack_steps >= 1, f"attack_steps {train.attack_steps} is below 1"),
        (train.attack_rank >= 1, f"attack_rank {train.attack_rank} is below 1"),
        (train.attack_rate >= 0, f"attack_rate {train.attack_rate} is below 0"),
        (
            not objective.attack_weight
            or objective.name not in known
            or "forget" in known[objective.name].streams,
            f"attack_weight needs forget answers, which {objective.name} does not train on",
        ),
        (
            not objective.target
            or objective.name not in known
            or "forget" in known[objective.name].streams,
            f"target needs forget answers, which {objective.name} does not train on",
        ),
        (0 <= train.seed < 2**32, f"seed {train.seed} is not in [0, 2^32)"),
        (train.weight_decay >= 0, f"weight_decay {train.weight_decay} is below 0"),
        (
            re.fullmatch(CHECKPOINTING, train.gradient_checkpointing) is not None,
            f"gradient_checkpointing {train.gradient_checkpointing!r} is not auto, off, all or a "
            "number from 2",
        ),
        (train.max_grad_norm >= 0, f"max_grad_norm {train.max_grad_norm} is below 0"),
        *(
            (getattr(train, name) >= 1, f"{name} {getattr(train, name)} is below 1")
            for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
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
    given = {key: value for key, value in overrides.items() if value is not None}
    parts: list[Any] = [default_objective(objective), LoraShape(), TrainConfig()]
    built = []
    for part in parts:
        settings = {f.name: given.pop(f.name) for f in fields(part) if f.name in given}
        built.append(replace(part, **settings))
    if given:
        raise TypeError(f"no such setting: {', '.join(given)}")
    return UnlearnConfig(*built)
