"""Settings that suit a request and a model, for whatever the user leaves open.

The published recipes are for 200 rows and seven billion weights: on a request of 20 rows, or on a
small model, they end before anything is forgotten. Presets do not come through here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapters.errors import counted
from unlearner.config import UnlearnConfig

# Optimizer steps of the published run: 200 rows, 10 epochs, 32 pairs a step (arXiv 2410.07163).
STEPS = 62
LARGEST_BATCH, LARGEST_FORWARD = 32, 8
# Pairs of a small model's step at most, where the run ends at a target: on SmolLM2-135M-Instruct
# 100 rows reach it with 378 pairs in steps of 6 and with 624 in steps of 16, and less is lost.
LARGEST_SMALL_BATCH = 6
# Pairs of one forward on a CPU, which gains nothing from more: a step of 8 pairs of SmolLM2 takes
# 4.2 GB and 9.2 seconds at once, 2.5 GB and 9.5 seconds in twos, 1.7 GB and 10.2 one by one.
LARGEST_ON_CPU = 2
BATCH_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
)
# Weights below which a model is small, and its rate: measured on 1.3 million (trained on the spot)
# and on 135 million (SmolLM2-135M-Instruct). Above, the published rate of LoRA.
SMALL, SMALL_RATE = 1_000_000_000, 1e-3
# SimNPO's constants on small models: measured on SmolLM2-135M-Instruct.
SMALL_SIMNPO = {"beta": 4.0, "retain_weight": 2.0}
# Measured on SmolLM2-135M-Instruct, whose blocks are 576 wide.
PROTECTED_DIRECTIONS = 192
# What a run chooses where it is not given; gamma follows the target.
CHOSEN = (*BATCH_SETTINGS, "learning_rate", *SMALL_SIMNPO, "gamma", "protected_directions")
# The objectives that stop at the NLL of unseen rows by themselves. All but the first two push past
# any target: all steps of `kl` leave SmolLM2-135M-Instruct a forget NLL of 126, of `ceu` 24, of
# `wga` 20, of `satimp` 13.
TARGETED = ("simnpo", "npo", "grad_ascent", "grad_diff", "kl", "ihl", "wga", "satimp", "ceu")
# Why something was chosen, in one word for manifests; "model-size" for all that is not here.
CAUSES = {
    "batch": "published-steps",
    "protected_directions": "keeps-knowledge",
    "target": "unseen-nll",
}


@dataclass(frozen=True)
class Suited:
    """Settings with what was chosen for this request and model, and why.

    Attributes:
        config: complete but for the target.
        finds_target: whether the target is to be measured on the model.
        reasons: by name of what was chosen, why.
    """

    config: UnlearnConfig
    finds_target: bool
    reasons: Mapping[str, str]


def _millions(weights: int) -> str:
    return "fewer than one million" if weights < 1e6 else f"{weights / 1e6:,.1f} million"


def suited(
    config: UnlearnConfig,
    given: Collection[str],
    rows: int,
    weights: int,
    *,
    target: float | str | None = None,
    on_cpu: bool = False,
) -> Suited:
    """`config` with the settings that are not `given` chosen for the request and the model.

    Args:
        config: what was given, over the published defaults.
        given: names of settings that stay as they are.
        rows: forget rows.
        weights: of the base.
        target: where the run is to end, in nats per token, or "auto"; 0: nowhere; None: not given.
        on_cpu: divide the steps of a small model into smaller forwards, which does not change
            their result.
    """
    objective: dict[str, Any] = {}
    train: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    small = weights < SMALL
    targeted = config.objective.name in TARGETED
    finds_target = targeted and target is None and "gamma" not in given
    if not set(BATCH_SETTINGS) & set(given):
        short = small and targeted and (finds_target or bool(target))
        largest = LARGEST_SMALL_BATCH if short else LARGEST_BATCH
        wanted = max(1, round(rows * config.train.num_train_epochs / STEPS))
        pairs = min(largest, wanted)
        forwards = -(-pairs // LARGEST_FORWARD)
        size = -(-pairs // forwards)
        if on_cpu and small:
            pairs = size * forwards
            size = next(n for n in range(LARGEST_ON_CPU, 0, -1) if pairs % n == 0)
            forwards = pairs // size
        train |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": forwards}
        chosen = replace(config.train, **train)
        batch = chosen.batch_size(rows)
        at_most = f", a small model takes {largest} at most" if short and wanted > largest else ""
        reasons["batch"] = (
            f"{counted(chosen.steps(rows), 'step')} of {counted(batch, 'pair')} (a row to "
            f"forget and one to keep): the published run has {STEPS} steps of {LARGEST_BATCH} for "
            f"200 rows{at_most}"
        )
    if "learning_rate" not in given and small:
        train["learning_rate"] = SMALL_RATE
        reasons["learning_rate"] = (
            f"learning rate {SMALL_RATE:g}: measured on models of 1.3 and 135 million weights, "
            f"this one has {_millions(weights)}"
        )
    if config.objective.name == "simnpo" and small:
        for name, value in SMALL_SIMNPO.items():
            if name not in given:
                objective[name] = value
                reasons[name] = f"{name} {value:g}: measured on models of 135 million weights"
    if "protected_directions" not in given:
        objective["protected_directions"] = PROTECTED_DIRECTIONS
        reasons["protected_directions"] = (
            f"protected_directions {PROTECTED_DIRECTIONS}: what each layer sees most of on neutral "
            "prompts and retain rows is left alone, so that they are answered as before (0: off)"
        )
    suits = replace(
        config,
        objective=replace(config.objective, **objective),
        train=replace(config.train, **train),
    )
    if finds_target:
        reasons["target"] = (
            "target auto: forgotten answers are to end as unlikely as rows that the base never saw"
        )
    return Suited(suits, finds_target, reasons)
