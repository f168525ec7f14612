"""The NLL that forget rows should reach: that of rows which the base never saw.

A model that never saw a row still gives its answer some likelihood. Pushing the forget rows further
only breaks the model, so a run ends soon after their mean NLL per token is that of such rows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from unlearner.config import UnlearnConfig
from unlearner.objectives.registry import OBJECTIVES
from unlearner.tokens.prompts import Encoded
from unlearner.training.early_stop import StopAt
from unlearner.training.references import summed_nlls

# Mean forget NLL of models that never saw the forget set: 2.21 and 2.25 by the public logs of two
# Llama-2-7b, 2.60 on SmolLM2-135M. Alternate answers that come from rows the base knows by heart
# have less (1.40 there; rows it never saw have 2.88). For vocabularies of whole words.
RETRAIN_NLL, WORDS = 2.2, 10_000
# Forget rows that a reading scores at most, and steps between two readings, which begin where a
# step's own forget rows are at this share of the target. Of few rows a step has one, which says
# little of the others, and a reading costs little.
ROWS, EVERY, FROM, FEW = 24, 2, 0.5, 8
# So many times as long to the next reading while the target is far. With alternate answers so many
# steps follow the one that reached it: rows past it are pulled back, and retained rows come back.
PATIENCE, SETTLE = 4, 12
# Readings between the last two, where nothing follows: a step of 20 rows passed a target of 2.2 by
# .7 nats.
REFINE = 3


def with_target(config: UnlearnConfig, nll: float, *, margin: bool = True) -> UnlearnConfig:
    """The settings of a run with the target `nll`; with `margin`, SimNPO's gamma is beta * nll.

    With that gamma the weight of a row's gradient is one half where its NLL is `nll`.

    Args:
        config: settings without a target.
        nll: in nats per token; 0 = no target.
        margin: whether gamma follows from it too.
    """
    objective = replace(config.objective, target=nll)
    if margin and nll and OBJECTIVES[objective.name].loss == "simnpo_terms":
        objective = replace(objective, gamma=objective.beta * nll)
    return replace(config, objective=objective)


def mean_nll(model: Any, rows: Sequence[Encoded], pad: int) -> float:
    """Mean over the rows of their NLL in nats per token, the end of the answer counted."""
    nll: list[float] = summed_nlls(model, rows, pad=pad).tolist()
    return sum(x / row.n_targets for x, row in zip(nll, rows, strict=True)) / len(rows)


def stop_at_target(
    rows: Sequence[Encoded], target: float, pad: int, seed: int, settle: int = SETTLE
) -> StopAt:
    """Ends a run `settle` steps after the mean NLL of the forget rows reached `target`.

    With 0 it ends at once, with the nearest of the last two readings and `REFINE` between them.
    """
    sample = random.Random(seed).sample(list(rows), min(ROWS, len(rows)))

    def measure(model: Any) -> Mapping[str, float]:
        nll = mean_nll(model, sample, pad)
        return {"forget_nll": nll, "target": target, "target_gap": nll - target}

    often = len(sample) <= FEW or settle == 0
    every, start = (1, 0.25 * FROM) if often else (EVERY, FROM)
    return StopAt(
        measure,
        "target_gap",
        every=every,
        from_nll=start * target,
        settle=settle,
        patience=PATIENCE,
        refine=0 if settle else REFINE,
    )
