"""A step at 7B shape without weights: the training and evaluation code on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from evaluation.benchmark.shapes import SHAPES
from evaluation.benchmark.step import StepSetup, one_device, run_step, score_on_meta, setup_of
from unlearner.config import make_config
from unlearner.objectives.guard import GuardRow
from unlearner.objectives.registry import OBJECTIVES
from unlearner.tokens.batch_plan import Rows
from unlearner.tokens.prompts import IGNORE, Encoded


def row(length: int, prompt: int = 20) -> Encoded:
    ids = [1 + i % 90 for i in range(length)]
    return Encoded(ids, [IGNORE] * prompt + ids[prompt:])


FORGET = [row(60 + i) for i in range(8)]
RETAIN = [row(70 + i) for i in range(8)]


def step(shape: str = "llama2-7b", **options: Any) -> StepSetup:
    return setup_of(FORGET, RETAIN, shape, **{"layers": 2, **options})


@pytest.mark.parametrize(
    ("checkpointing", "padded", "load_in_4bit"),
    [("all", False, True), ("off", True, False)],
)
def test_a_step_at_7b_shape_is_within_its_plan(
    checkpointing: str, padded: bool, load_in_4bit: bool
) -> None:
    """Two of the 32 blocks: the terms' peaks do not coincide, so the low end is not reached."""
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    setup = step(checkpointing=checkpointing, padded=padded, load_in_4bit=load_in_4bit)
    cost = run_step(setup)
    assert cost.within
    assert cost.peak > 0.8 * cost.low
    weights = setup.plan().estimate().terms["weights"][0]
    held = cost.parts["parameter"] + cost.parts.get("other", 0)
    adapter = 4 * setup.plan().adapter_parameters
    assert held - adapter == pytest.approx(weights, rel=0.01)


def test_checkpointing_keeps_the_input_of_a_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "few words", (64, 172, 2, 4, 128))  # the logits would hide it
    whole, saved = (
        run_step(step("few words", pairs=2, checkpointing=c, load_in_4bit=False))
        for c in ("off", "all")
    )
    assert saved.peak < 0.9 * whole.peak


@pytest.mark.parametrize(
    ("objective", "packed"),
    [(name, True) for name in (*OBJECTIVES, "guarded", "alternates", "attacked")]
    + [("simnpo", False), ("dpo", False)],
)
def test_every_objective_keeps_its_tensors_on_one_device(objective: str, packed: bool) -> None:
    # A step on meta takes as long as it has operations: few blocks and rows.
    layers = 2 if objective == "rmu" else 1
    setup = step("tiny", load_in_4bit=False, padded=not packed, layers=layers)
    rows = Rows(FORGET[:2], RETAIN[:2], [[row(40), row(44)]] * 2)
    guard: list[GuardRow] = []
    settings: dict[str, Any] = {"rmu_layer": 1} if objective == "rmu" else {}
    if objective == "guarded":
        n = FORGET[0].n_targets
        tokens, flat = torch.zeros(n, 4, dtype=torch.long), torch.zeros(n)
        guard = [GuardRow(FORGET[0], tokens, torch.zeros(n, 4), flat, flat)] * 2
        rows = replace(rows, guard=[teacher.row for teacher in guard])
    if objective == "alternates":
        rows = replace(rows, alternates=[[row(50)]] * 2)
        settings = {"alternates": 1}
    if objective == "attacked":
        settings = {"attack_weight": 1.0, "attack_rank": 2}
    name = objective if objective in OBJECTIVES else "simnpo"
    settings |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    config = make_config(name, padded=not packed, num_train_epochs=1, **settings)
    config = replace(config, lora=setup.config.lora)
    cost = run_step(replace(setup, config=config, rows=rows, guard=guard))
    assert cost.peak > cost.parts["parameter"]


def test_evaluation_runs_at_7b_shape_in_less_than_training() -> None:
    questions = [[row(60 + i), row(62 + i)] for i in range(8)]
    peaks = score_on_meta(step(load_in_4bit=False), questions, 1024)
    weights = step(load_in_4bit=False).plan().estimate().terms["weights"][0]
    for name in ("trees", "padded"):
        assert weights < peaks[name] < 1.5 * weights, name


def test_a_tensor_left_on_the_cpu_is_an_error() -> None:
    table = torch.empty(9, 4, device="meta")
    with one_device(), pytest.raises(RuntimeError, match=r"embedding.* mixes tensors of cpu and"):
        torch.nn.functional.embedding(torch.zeros(1, 3, dtype=torch.long), table)
    with one_device(), pytest.raises(RuntimeError, match="mixes"):
        table @ torch.ones(4, 2)


def test_a_step_is_taken_for_real() -> None:
    setup = step("tiny", device="cpu", dtype="float32", load_in_4bit=False)
    cost = run_step(setup)
    assert cost.loss is not None
    assert cost.loss > 0
    assert cost.seconds > 0
