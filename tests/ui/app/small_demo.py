"""Runs a job of the app, whose demo world is so small that a test can wait for it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

SIZES = {"n_authors": 6, "forget_authors": 2, "evaluated_authors": 2, "requests": 2}


def main(place: Path) -> int:
    """`ui.cli.job.main` with small sizes; everything else is the real quickstart."""
    from evaluation.experiments import quickstart
    from ui.cli import job
    from unlearner.baselines.tiny_recipe import TinyRecipe, TinyShape

    small = quickstart.Quickstart(
        world=SIZES,
        shape=TinyShape(
            vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2,
        ),
        recipe=TinyRecipe(epochs=1, pretrain_rows=20),
        background_rows=40,
        simnpo=_once(quickstart.SIMNPO),
        npo=_once(quickstart.NPO),
    )  # fmt: skip
    whole = quickstart.quickstart
    quickstart.quickstart = lambda out, on_progress, settings=None: whole(out, on_progress, small)
    return job.main(place)


def _once(config):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, num_train_epochs=1))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
