"""What a run did: the likelihood of forget, retain and general rows before and after it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearner.tokens.batch_plan import Pair
from unlearner.tokens.prompts import Encoded
from unlearner.training.references import summed_nlls

# Rows of each set that are measured at most, and how many make a held-out set.
ROWS, ENOUGH = {"forget": 24, "retain": 16, "general": 16}, 8
# Shares of the probability before: more than the first left of the forget rows, less than the
# second left of the others.
FORGOTTEN, HELD = 0.8, 0.9
# Forget rows below this probability, or with this share of the target's NLL, were never learned.
KNOWN, NEAR = 0.1, 0.8
# NLLs above this many times the target are far past it.
PAST = 1.5


@dataclass(frozen=True)
class Watched:
    """Rows that are measured before and after a run.

    Attributes:
        rows: by set: "forget", and "retain" and "general" where there are any.
        held_out: by set, whether no row of it is trained on.
        of: by set, the number of rows that these are a sample of.
    """

    rows: Mapping[str, Sequence[Encoded]]
    held_out: Mapping[str, bool]
    of: Mapping[str, int]


def watched_rows(
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    general: Sequence[Encoded],
    plan: Sequence[Sequence[Pair]],
    seed: int,
    *,
    general_held_out: bool,
) -> Watched:
    """A seeded sample of each set, of the retain rows those that the plan leaves out.

    Args:
        forget: rows to be forgotten.
        retain: rows to keep, of which `plan` uses some or all.
        general: neutral prompts with the base's answers.
        plan: the pairs of every step.
        seed: of the samples.
        general_held_out: whether none of `general` is trained on.
    """
    used = {pair.retain for step in plan for pair in step}
    unused = [row for i, row in enumerate(retain) if i not in used]
    sets = {
        "forget": list(forget),
        "retain": unused if len(unused) >= ENOUGH else list(retain),
        "general": list(general),
    }
    draw = random.Random(seed)
    rows = {
        name: draw.sample(part, min(ROWS[name], len(part))) for name, part in sets.items() if part
    }
    held_out = {"retain": len(unused) >= ENOUGH, "general": general_held_out}
    of = {name: len(sets[name]) for name in rows}
    return Watched(rows, {name: held_out.get(name, False) for name in rows}, of)


def measured(model: Any, watched: Watched, pad: int) -> dict[str, dict[str, float]]:
    """By set the means over the rows of P = exp(-NLL per token) and of that NLL in nats."""
    figures = {}
    for name, rows in watched.rows.items():
        totals = summed_nlls(model, rows, pad=pad).tolist()
        nll = [total / row.n_targets for total, row in zip(totals, rows, strict=True)]
        probability = sum(math.exp(-x) for x in nll) / len(nll)
        figures[name] = {"probability": probability, "nll": sum(nll) / len(nll)}
    return figures


def outcome(
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]],
    watched: Watched,
) -> dict[str, dict[str, Any]]:
    """For the manifest, by set: rows, of how many, whether held out, figures before and after."""
    return {
        name: {
            "rows": len(rows),
            "of": watched.of[name],
            "held_out": watched.held_out[name],
            "before": dict(before[name]),
            "after": dict(after[name]),
        }
        for name, rows in watched.rows.items()
    }


def hardly_known(forget: Mapping[str, float], settings: Mapping[str, Any]) -> str:
    """Says so where a base may never have learned the forget rows; empty otherwise.

    Args:
        forget: their figures before training, from `measured`.
        settings: of the objective, by name.
    """
    target = float(settings.get("target", 0.0))
    if target and forget["nll"] >= NEAR * target:
        return (
            f"the base finds the forget rows about as unlikely (NLL {forget['nll']:.2f}) as rows "
            f"that it never saw ({target:.2f}): it must be a model that was trained on them, see "
            "--base and --template"
        )
    if forget["probability"] < KNOWN:
        return (
            f"the base hardly knew the forget rows (probability {forget['probability']:.3f}): "
            "check --base and --template"
        )
    return ""


def remarks(sets: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What follows from an outcome, with the flag to turn; empty where all went well.

    Args:
        sets: from `outcome`.
        settings: of objective and training, by name, as a manifest has them.
    """
    texts = []
    was, now = sets["forget"]["before"], sets["forget"]["after"]
    rate = settings["learning_rate"]
    target = float(settings.get("target", 0.0))
    if hint := hardly_known(was, settings):
        texts.append(hint)
    elif now["probability"] > FORGOTTEN * was["probability"]:
        texts.append(
            f"almost nothing was forgotten: raise --learning-rate (it was {rate:g}) or "
            f"--num-train-epochs ({settings['num_train_epochs']})"
        )
    elif target and now["nll"] > PAST * target:
        texts.append(
            f"the forget rows are far past the target of {target:.2f}: lower --learning-rate (it "
            f"was {rate:g})"
        )
    keeping = {
        "retain": ("retained rows", "retain_weight"),
        "general": ("general answers", "protected_directions"),
    }
    for name, (what, setting) in keeping.items():
        if name not in sets:
            continue
        left = sets[name]["after"]["probability"] / sets[name]["before"]["probability"]
        if left < HELD:
            texts.append(
                f"{what} lost {1 - left:.0%} of their probability: raise "
                f"--{setting.replace('_', '-')} (it was {settings[setting]:g}), or lower "
                "--learning-rate"
            )
    return texts
