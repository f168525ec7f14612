"""SimNPO's two published places of lambda side by side, all else equal, with their trajectories.

The model card puts 0.1375 on the retain term, the released README on the forget term: one
objective, two different trade-offs (see `unlearner.config.OBJECTIVE_DEFAULTS`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapters.base.load import load_base
from adapters.environment import threads_for
from evaluation.logs import read_log
from evaluation.logs.records import write_json
from evaluation.tuning.probe import Look, Watch
from evaluation.tuning.search import open_probe, train_once

if TYPE_CHECKING:
    from evaluation.experiments.systems import Report
    from evaluation.tuning.search import Tuning

LOOKS = (0.25, 0.5, 0.75, 1.0)


def compare_lambda(run: Tuning, objectives: Sequence[str], report: Report) -> dict[str, Any]:
    """Looks on the way of each objective, trained with `run.fixed`; also in `out/lambda.json`.

    Nothing is searched: what `run.fixed` does not name is the objective's published default.
    """
    started = time.monotonic()
    run.out.mkdir(parents=True, exist_ok=True)
    probe = open_probe(run.base, run.split, run.data, read_log(run.retain_log))
    model = load_base(run.base)
    with threads_for(model):
        first = {"step": 0, **probe.look(model).to_json()}
    compared: dict[str, Any] = {}
    for name in objectives:
        report({"event": "stage", "text": f"Training with {name}"})
        config = replace(run, objective=name).config({}, 1.0, run.seeds[0])
        looks = [first]

        def tell(step: int, steps: int, look: Look, looks: list[Any] = looks) -> None:
            looks.append({"step": step, **look.to_json()})

        train_once(run, config, Watch(probe, LOOKS, tell), report)
        compared[name] = {
            "forget_weight": config.objective.forget_weight,
            "retain_weight": config.objective.retain_weight,
            "settings": config.to_json(),
            "looks": looks,
        }
    found = {
        "kind": "unlearner-lambda",
        "schema": 1,
        "request": run.request.name,
        "split": run.split,
        "seed": run.seeds[0],
        "compared": compared,
        "seconds": time.monotonic() - started,
    }
    write_json(run.out / "lambda.json", found)
    return found
