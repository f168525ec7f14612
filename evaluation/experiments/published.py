"""A measured comparison held against published rows, and what its hardware will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from evaluation.metrics.forget_quality import ALPHA

if TYPE_CHECKING:
    from evaluation.experiments.presets import Preset

# Model utility of two trainings of one recipe differs by about so much (two public retrained
# models: .6137 and .6203).
UTILITY_BAND = 0.02
# Dense bf16 peak in TFLOP/s by the makers' sheets, and the share of it that is assumed here.
CARDS = {"RTX 4060 (8 GB)": 60.0, "RTX 3090 (24 GB)": 71.0, "RTX 4090 (24 GB)": 165.0}
TRAINING_SHARE, SCORING_SHARE = 0.5, 0.3


class Check(NamedTuple):
    """One figure of one system beside the published one; `text` says it in a sentence."""

    name: str
    figure: str
    measured: float | None
    published: float
    holds: bool
    text: str


def published_rows(preset: Preset, split: str) -> list[dict[str, Any]]:
    """The published figures of a split, one row a system; empty where nothing is published."""
    return [
        {"name": name, "forget_quality": quality, "model_utility": utility}
        for name, (quality, utility) in preset.published.get(split, {}).items()
    ]


def against_published(
    table: Sequence[Mapping[str, Any]], published: Mapping[str, tuple[float, float]]
) -> list[Check]:
    """Every published figure beside the measured one, for the systems that were measured.

    Model utility has to lie within `UTILITY_BAND`. Forget quality is a p-value whose size means
    little between two models that both pass: it has to fall on the same side of 0.05.
    """
    checks = []
    rows = {row["name"]: row for row in table}
    for name, (quality, utility) in published.items():
        if name not in rows:
            continue
        for figure, wanted in (("forget_quality", quality), ("model_utility", utility)):
            checks.append(_check(name, figure, rows[name].get(figure), wanted))
    return checks


def _check(name: str, figure: str, measured: float | None, wanted: float) -> Check:
    if measured is None:
        text = f"{name}: {figure} was not measured, published is {wanted:.3g}"
        return Check(name, figure, None, wanted, False, text)
    if figure == "model_utility":
        holds = abs(measured - wanted) <= UTILITY_BAND
        rule = f"within {UTILITY_BAND} of"
    else:
        holds = (measured > ALPHA) == (wanted > ALPHA)
        rule = f"on the same side of {ALPHA} as"
    word = "is" if holds else "is NOT"
    text = f"{name}: {figure} {measured:.3g} {word} {rule} the published {wanted:.3g}"
    return Check(name, figure, measured, wanted, holds, text)


def time_estimates(preset: Preset, split: str, methods: int, systems: int) -> list[dict[str, Any]]:
    """Minutes of a comparison by card, from counted FLOPs and an assumed share of the peak.

    An estimate by arithmetic: nothing here was measured on a GPU.

    Args:
        preset: whose `cost` is known; else nothing is estimated.
        split: its rows against forget05's.
        methods: how many are trained.
        systems: how many are evaluated.
    """
    if preset.cost is None:
        return []
    rows = int(split[-2:]) / 5
    found = []
    for card, peak in CARDS.items():
        training = preset.cost.checkpointed * rows * methods / (peak * TRAINING_SHARE)
        scoring = preset.cost.evaluation * systems / (peak * SCORING_SHARE)
        found.append(
            {
                "card": card,
                "training_minutes": training * 1000 / 60,
                "evaluation_minutes": scoring * 1000 / 60,
                "kind": "estimate",
            }
        )
    return found
