"""What is chosen for a request and a model where nobody said otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from unlearner.config import make_config
from unlearner.defaults import suited

PUBLISHED = 7_000_000_000
SMOLLM2 = 135_000_000


@pytest.mark.parametrize(
    ("rows", "pairs", "steps"),
    [(5, 1, 50), (20, 3, 66), (40, 6, 66), (100, 16, 62), (200, 32, 62), (400, 32, 125)],
)
def test_a_small_request_keeps_the_published_steps_by_smaller_batches(
    rows: int, pairs: int, steps: int
) -> None:
    train = suited(make_config(), (), rows, PUBLISHED).config.train
    assert (train.batch_size(rows), train.steps(rows)) == (pairs, steps)
    assert train.per_device_train_batch_size <= 8


def test_a_small_model_that_ends_at_a_target_takes_small_steps() -> None:
    def batch(objective: str = "simnpo", weights: int = SMOLLM2, **options: Any) -> int:
        given = options.pop("given", ())
        chosen = suited(make_config(objective), given, 100, weights, **options)
        assert ("at most" in chosen.reasons["batch"]) == (chosen.config.train.batch_size(100) == 6)
        return chosen.config.train.batch_size(100)

    assert [batch(), batch(target="auto"), batch(target=2.2), batch("npo")] == [6] * 4
    nowhere = [batch(target=0.0), batch(given=["gamma"]), batch("idk"), batch(weights=PUBLISHED)]
    assert nowhere == [16] * 4


@pytest.mark.parametrize("rows", [5, 20, 40, 60, 100, 200, 400])
def test_a_cpu_takes_the_same_steps_in_smaller_forwards(rows: int) -> None:
    train = suited(make_config(), (), rows, SMOLLM2).config.train
    on_cpu = suited(make_config(), (), rows, SMOLLM2, on_cpu=True).config.train
    assert on_cpu.batch_size(rows) == train.batch_size(rows)
    assert on_cpu.per_device_train_batch_size <= 2
    # A large model is planned for a card on machines without one.
    large = suited(make_config(), (), rows, PUBLISHED, on_cpu=True).config
    assert large == suited(make_config(), (), rows, PUBLISHED).config


@pytest.mark.parametrize(
    "given", ["per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"]
)
def test_a_batch_or_epochs_that_are_given_stay(given: str) -> None:
    config = make_config(**{given: 4})
    assert suited(config, [given], 5, PUBLISHED).config.train == config.train


def test_a_large_model_keeps_the_published_constants() -> None:
    chosen = suited(make_config(), (), 200, PUBLISHED)
    published = make_config()
    assert chosen.config.train == published.train
    assert chosen.config.objective.beta == published.objective.beta
    assert chosen.config.objective.retain_weight == published.objective.retain_weight
    assert chosen.finds_target


def test_what_is_given_wins_and_every_choice_is_explained() -> None:
    given = {
        "learning_rate": 3e-4,
        "beta": 2.0,
        "retain_weight": 0.5,
        "protected_directions": 0,
        "gamma": 1.0,
        "num_train_epochs": 3,
    }
    config = make_config(**given)
    assert suited(config, given, 20, SMOLLM2).config == config
    assert suited(config, given, 20, SMOLLM2).reasons == {}
    open_ = suited(make_config(), (), 20, SMOLLM2)
    names = ["batch", "learning_rate", "beta", "retain_weight", "protected_directions", "target"]
    assert [*open_.reasons] == names
    assert "66 steps of 3 pairs" in open_.reasons["batch"]
    assert "135.0 million" in open_.reasons["learning_rate"]
    tiny = suited(make_config(), (), 20, 40_000)
    assert "fewer than one million" in tiny.reasons["learning_rate"]
    assert open_.config.train.learning_rate > make_config().train.learning_rate


@pytest.mark.parametrize(
    ("objective", "finds"),
    [
        *(("npo", True), ("kl", True), ("grad_diff", True), ("ihl", True), ("wga", True)),
        *(("satimp", True), ("ceu", True)),
        *(("idk", False), ("rmu", False)),
    ],
)
def test_only_objectives_that_may_overshoot_look_for_a_target(objective: str, finds: bool) -> None:
    assert suited(make_config(objective), (), 20, SMOLLM2).finds_target is finds
    assert not suited(make_config(objective), (), 20, SMOLLM2, target=2.0).finds_target
