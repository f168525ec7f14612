from __future__ import annotations

from collections import Counter

import pytest

from unlearner.config import TrainConfig
from unlearner.tokens.batch_plan import Pair, Rows, micro_batches, plan_steps
from unlearner.tokens.prompts import Encoded


def flat(steps: list[list[Pair]]) -> list[Pair]:
    return [pair for step in steps for pair in step]


def config(epochs: int = 3, micro: int = 4, accumulation: int = 2, seed: int = 42) -> TrainConfig:
    return TrainConfig(
        num_train_epochs=epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        seed=seed,
    )


def test_every_epoch_is_a_fresh_permutation_of_the_forget_rows() -> None:
    pairs = flat(plan_steps(24, 100, 0, config(epochs=4)))
    epochs = [[pair.forget for pair in pairs[i : i + 24]] for i in range(0, 96, 24)]
    assert len(pairs) == 96
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(24)) not in epochs


def test_epochs_stay_whole_where_batches_cross_them() -> None:
    # 30 rows in batches of 8: 11 steps, the 12th would be a part of one.
    steps = plan_steps(30, 50, 0, config(epochs=3))
    assert [len(step) for step in steps] == [8] * 11
    order = [pair.forget for pair in flat(steps)]
    assert sorted(order[:30]) == sorted(order[30:60]) == list(range(30))
    assert len(set(order[60:])) == 28


def test_a_forget_row_meets_another_retain_row_in_every_epoch() -> None:
    pairs = flat(plan_steps(40, 400, 0, config(epochs=5)))
    met: dict[int, set[int]] = {}
    for pair in pairs:
        met.setdefault(pair.forget, set()).add(pair.retain)
    # The released SimNPO code would give one each.
    assert all(len(retain) == 5 for retain in met.values())
    # No retain row comes twice before all have come once.
    assert len({pair.retain for pair in pairs}) == 200


def test_few_retain_rows_are_all_used_equally_often() -> None:
    pairs = flat(plan_steps(40, 8, 0, config(epochs=2)))
    assert set(Counter(pair.retain for pair in pairs).values()) == {10}
    order = [pair.retain for pair in pairs]
    assert order[:8] != order[8:16]


def test_refusals_are_spread_and_streams_that_are_not_there_are_zero() -> None:
    pairs = flat(plan_steps(40, 0, 10, config(epochs=2)))
    assert set(Counter(pair.refusal for pair in pairs).values()) == {8}
    assert {pair.retain for pair in pairs} == {0}
    assert {pair.refusal for pair in flat(plan_steps(40, 5, 0, config()))} == {0}
    # One stream's draws do not depend on whether another is there.
    with_retain = flat(plan_steps(40, 7, 10, config(epochs=2)))
    assert [p.forget for p in with_retain] == [p.forget for p in pairs]
    assert [p.refusal for p in with_retain] == [p.refusal for p in pairs]


def test_the_plan_is_a_function_of_the_seed_alone() -> None:
    plan = plan_steps(24, 100, 5, config())
    assert plan == plan_steps(24, 100, 5, config())
    assert plan != plan_steps(24, 100, 5, config(seed=43))
    # However a step is divided, it has the same pairs.
    assert plan == plan_steps(24, 100, 5, config(micro=8, accumulation=1))
    assert plan == plan_steps(24, 100, 5, config(micro=1, accumulation=8))
    # More epochs only add to the end.
    assert plan_steps(24, 100, 5, config(epochs=5))[: len(plan)] == plan


@pytest.mark.parametrize(
    ("n_forget", "epochs", "steps", "pairs"),
    [(200, 10, 62, 32), (20, 10, 10, 20), (1, 3, 3, 1), (33, 1, 1, 32), (32, 1, 1, 32)],
)
def test_steps_are_whole_batches_of_all_passes(
    n_forget: int, epochs: int, steps: int, pairs: int
) -> None:
    train = config(epochs, 8, 4)
    plan = plan_steps(n_forget, 50, 0, train)
    assert (len(plan), len(plan[0])) == (steps, pairs)
    assert (train.steps(n_forget), train.batch_size(n_forget)) == (steps, pairs)
    assert {len(step) for step in plan} == {pairs}


@pytest.mark.parametrize("size", [1, 3, 5, 7, 8, 9])
def test_micro_batches_cover_every_step_exactly(size: int) -> None:
    steps = plan_steps(24, 100, 0, config())
    batches = micro_batches(steps, size)
    each = -(-8 // size)
    assert len(batches) == each * len(steps)
    for number, step in enumerate(steps):
        mine = batches[number * each : (number + 1) * each]
        assert [pair for batch in mine for pair in batch] == step
        assert all(0 < len(batch) <= size for batch in mine)


def test_a_refusal_answers_its_own_forget_question() -> None:
    def encoded(*ids: int) -> Encoded:
        return Encoded(list(ids), list(ids))

    rows = Rows(
        forget=[encoded(1), encoded(2)],
        retain=[encoded(3), encoded(4)],
        refusals=[[encoded(10), encoded(11)], [encoded(20), encoded(21)]],
    )
    pairs = [Pair(1, 0, 0), Pair(0, 1, 1), Pair(1, 1, 1)]
    told = {
        name: [row.input_ids[0] for row in rows.stream(name, pairs)]
        for name in ("forget", "retain", "refusal")
    }
    assert told == {"forget": [2, 1, 2], "retain": [3, 4, 4], "refusal": [20, 11, 21]}
