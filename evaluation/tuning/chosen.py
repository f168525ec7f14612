"""What a search chose, measured in full: answers, every seed, and the command that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.experiments.systems import Measured, Report, digest, forget_and_measure, table_rows
from evaluation.tuning.probe import KEPT_UTILITY, NLL_WITHIN
from unlearner.config import UnlearnConfig, make_config

if TYPE_CHECKING:
    from evaluation.tuning.search import Tuning

FORGOTTEN = 0.5


def on_seed(
    run: Tuning,
    config: UnlearnConfig,
    seed: int,
    what: Measured,
    origin: Mapping[str, Any],
    report: Report,
) -> dict[str, Any]:
    """The settings trained with this seed and measured in full, answers and all."""
    report({"event": "stage", "text": f"Training and measuring seed {seed}"})
    seeded = replace(config, train=replace(config.train, seed=seed))
    work = run.out / f"seed-{seed}-{digest(seeded.to_json(), asdict(run.base))}"
    log = forget_and_measure(
        report,
        requests=[run.request],
        base=run.base,
        config=seeded,
        store=work / "forget-store",
        what=what,
        log=work / "log.json",
    )
    row = table_rows(f"seed {seed}", Path(log), run.retain_log, what.protocols)[0]
    return {**row, "seed": seed, "reached": reached(row, origin), "log": log}


def reached(row: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, bool | None]:
    """Which parts of the goal a measured row holds; None where a figure is missing.

    FQ above one half, model utility at least 0.97 of Origin's, forget NLL within a tenth of
    Retrain's. Whether the answers are fluent is for people to read.
    """
    kept, whole = row["model_utility"], origin["model_utility"]
    ratio = row["forget_nll"] / row["retrain_forget_nll"]
    return {
        "forget_quality": row["forget_quality"] > FORGOTTEN,
        "model_utility": None if kept is None or whole is None else kept >= KEPT_UTILITY * whole,
        "forget_nll": 2 - NLL_WITHIN <= ratio <= NLL_WITHIN,
    }


def setting_words(config: UnlearnConfig) -> list[str]:
    """The flags of `unlearner forget` that give exactly these settings."""
    name = config.objective.name
    usual = make_config(name).to_json()
    words = ["--objective", name]
    for part, settings in config.to_json().items():
        for key, value in settings.items():
            if key == "name" or value == usual[part][key]:
                continue
            flag = "--" + key.replace("_", "-")
            if value is True:
                words.append(flag)
            else:
                text = ",".join(value) if isinstance(value, list | tuple) else str(value)
                words += [flag, text]
    return words
