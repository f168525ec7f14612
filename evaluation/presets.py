"""What `reproduce` runs: the published 7B recipe, and a small stand-in for a CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unlearner.tiny import TinyRecipe, TinyShape

# Llama-2-7b-chat on TOFU forget05, model card of
# OPTML-Group/SimNPO-TOFU-forget05-Llama-2-7b-chat (arXiv 2410.07163): forget quality, utility.
PUBLISHED_FORGET05 = {
    "origin": (0.00, 0.62),
    "retrain": (1.00, 0.62),
    "npo": (0.79, 0.57),
    "simnpo": (0.99, 0.58),
}


@dataclass(frozen=True)
class SmallModels:
    """How a preset makes its own Origin and Retrain from random weights.

    Attributes:
        shape: of the Llama.
        recipe: of its training.
        retain_authors: the first so many authors are learned by heart; the evaluated ones are the
            first twenty.
        paraphrased_authors: so many more, of those whose paraphrases the split does not evaluate
            (the forget10 authors it keeps), are learned with paraphrased questions and answers. The
            other retain authors are read once, as background.
        held_out: of every so many paraphrased questions one is kept from training, to measure
            whether what was learned carries over.
        facts: how many times an epoch holds real authors and world facts: these models have no
            other pretraining, so those parts of model utility measure what is kept.
    """

    shape: TinyShape
    recipe: TinyRecipe
    retain_authors: int = 20
    paraphrased_authors: int = 10
    held_out: int = 4
    facts: int = 1


@dataclass(frozen=True)
class Preset:
    """One way to run the comparison.

    Attributes:
        origin: hub id of the model trained on all of TOFU, None where it is trained on the spot.
        retrain: the same without the forget split, by retain split.
        small: how to train both, None where they are given.
        methods: settings over the objective's published defaults, by objective.
        known_retain: keep only retain rows whose answer Origin gives a probability above this: a
            small Origin has learned a part of TOFU, and the rest cannot be retained. None: all.
        unknown_retain: so many of the other rows stay as well, spread evenly: what a model says of
            authors it does not know is what Retrain says of the forgotten ones, and it is kept.
        facts_retain: real authors and world facts stay too. They are training rows of a small
            Origin, which has no other pretraining.
        retain_log: where the public log of a retrained model lies.
        published: rows to stand beside, by split.
        reasons: why these settings, for the plan.
    """

    name: str
    origin: str | None
    retrain: dict[str, str]
    small: SmallModels | None
    methods: dict[str, dict[str, Any]]
    known_retain: float | None = None
    unknown_retain: int = 0
    facts_retain: bool = False
    load_in_4bit: bool = False
    retain_log: str = ""
    published: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    def settings(self, method: str) -> dict[str, Any]:
        """Settings of a method; those under "*" hold for all."""
        return {**self.methods.get("*", {}), **self.methods.get(method, {})}


MINI = Preset(
    name="mini",
    origin=None,
    retrain={},
    small=SmallModels(
        TinyShape(vocab_size=4096, hidden_size=128, intermediate_size=320, num_hidden_layers=4),
        TinyRecipe(epochs=9, pretrain_rows=800, label_smoothing=0.1),
    ),
    # Chosen on forget05, seed 42, out of the settings in docs/results/mini-recipes.jsonl by the
    # teacher-forced probe: optimistic for that seed, docs/recipes.md has the held-out ones.
    methods={
        "*": {
            "per_device_train_batch_size": 5,
            "gradient_accumulation_steps": 1,
            "learning_rate": 4e-4,
            "num_train_epochs": 9,
            "lora_r": 64,
            "lora_alpha": 128,
            "weight_decay": 0.0,
            "warmup_ratio": 0.05,
        },
        "simnpo": {
            "beta": 2.5,
            "gamma": 7.3,
            "forget_weight": 0.3,
            "retain_weight": 1.0,
        },
    },
    known_retain=0.5,
    unknown_retain=200,
    facts_retain=True,
    reasons=(
        "gamma / beta is 0.6 of Retrain's forget NLL: rows push each other past it, and end on it;",
        "small steps (r 64, learning rate 4e-4, 5 pairs) cost the kept rows least on the way;",
        "rows that Origin does not know stay too, as Retrain does not know the forgotten ones.",
    ),
)

LLAMA2_7B = Preset(
    name="llama2-7b",
    origin="OPTML-Group/TOFU-origin-Llama-2-7b-chat",
    retrain={
        "forget01": "open-unlearning/tofu_Llama-2-7b-chat-hf_retain99",
        "forget05": "open-unlearning/tofu_Llama-2-7b-chat-hf_retain95",
        "forget10": "open-unlearning/tofu_Llama-2-7b-chat-hf_retain90",
    },
    small=None,
    methods={
        "*": {
            "learning_rate": 1e-4,
            "num_train_epochs": 10,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 8,
            "lora_r": 16,
            "lora_alpha": 32,
            "gradient_checkpointing": "all",
        },
    },
    load_in_4bit=True,
    retain_log="TOFU/data/retain95_llama_wd0.01/eval_results/ds_size300/"
    "eval_log_aggregated.json of OPTML-Group/Unlearn-Simple",
    published={"forget05": PUBLISHED_FORGET05},
    reasons=(
        "beta, gamma and lambda are the model card's, lambda on the retain term;",
        "10 epochs of 32 pairs are its 62 steps;",
        "learning rate 1e-4: published LoRA work uses ten times the 1e-5 of full fine-tuning;",
        "r 16, alpha 32 on the seven projections: the middle of what is published (r 8 to 32);",
        "4 pairs a forward with checkpointing: fits a small card in 4 bit.",
    ),
)

PRESETS = {preset.name: preset for preset in (MINI, LLAMA2_7B)}
