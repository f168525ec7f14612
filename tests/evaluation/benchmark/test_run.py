"""Counted figures are guarded here; what is timed is a command, not a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from evaluation.benchmark import flops, shapes
from evaluation.benchmark.baseline import measure
from evaluation.benchmark.run import (
    Line,
    Workload,
    count,
    load_workload,
)  # fmt: skip

# Two of Llama-2-7b's 32 blocks: weights in their projections, and in the head.
LAYERS = 2
LINEAR, HEAD = LAYERS * (4 * 4096 * 4096 + 3 * 4096 * 11008), 4096 * 32000


@pytest.fixture(scope="module")
def work(shared: Path) -> Workload:
    return load_workload(shared / "tofu", str(shared / "llama2-tokenizer"))


def attention(length: int) -> int:
    """Products of scores and values in a forward, counted in full."""
    return 4 * length * length * 4096 * LAYERS


def test_the_counter_sees_what_the_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on meta tensors of the 7B shape: within 0.1 % of 2 FLOPs per weight and token."""
    monkeypatch.setitem(shapes.SHAPES, "wide", (4096, 11008, LAYERS, 32, 32000))
    full = shapes.new_llama("wide")
    forward = 2 * (LINEAR + HEAD) * 200 + attention(200)
    assert flops.plain_scoring_row(full).flops == pytest.approx(forward, rel=1e-3)
    # Forward, gradients of inputs and of weights, and forward again: without the head, and without
    # each block's last product, which backward does not need.
    down = LAYERS * 4096 * 11008
    trained = 2 * 500 * (4 * LINEAR - down + 3 * HEAD) + 4 * attention(500)
    assert flops.plain_training_row(full).flops == pytest.approx(trained, rel=2e-3)


@pytest.mark.slow
def test_the_whole_plan_follows_from_a_micro_batch(work: Workload) -> None:
    """FLOPs a token of four other micro-batches: within 1 % of the first."""
    model = shapes.with_lora(shapes.new_llama("llama2-7b"), 16)
    found = []
    for start in (0, 40, 120):
        rows = work.forget[start : start + 8] + work.retain[start : start + 8]
        tokens = sum(len(row.input_ids) for row in rows)
        found.append(flops.training_step(model, rows, packed=True).flops / tokens)
    assert max(found) < 1.01 * min(found)


@pytest.mark.slow
def test_the_targets_of_a_job_and_an_evaluation_hold(work: Workload) -> None:
    lines = {line.name: line for line in count(work, "llama2-7b")}
    assert lines["training FLOPs of one job"].plain == pytest.approx(100.7, rel=1e-3)
    assert (lines["training FLOPs of one job"].ratio or 0) >= 13.5
    assert (lines["the same with full checkpointing"].ratio or 0) >= 9
    assert lines["teacher-forced FLOPs"].plain == pytest.approx(12.21, rel=1e-3)
    assert (lines["teacher-forced FLOPs"].ratio or 0) >= 6
    assert (lines["the same, ours without checkpointing"].ours or 0) < 310


def test_a_tokenizer_needs_rows_and_the_world_needs_nothing() -> None:
    with pytest.raises(UserError, match="no rows to encode"):
        load_workload(None, "T")
    world = load_workload(None, None)
    assert world.source == "embedded world"
    assert min(len(world.forget), len(world.retain), len(world.questions)) > 8


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", (32, 48, 2, 4, 1500))
    monkeypatch.setattr(flops, "PLAIN_TRAIN", 120)
    monkeypatch.setattr(flops, "PLAIN_EVAL", 100)


@pytest.mark.usefixtures("small_shape")
def test_both_ways_are_timed_in_one_run() -> None:
    said: list[str] = []
    lines = measure(load_workload(None, None), "tiny", seconds=0.01, on_progress=said.append)
    assert said == ["training rows/s", "scoring rows/s", "generation rows/s"]
    assert [line.unit for line in lines] == ["rows/s", "MB"] * 3
    for line in lines:
        assert line.plain is not None
        assert line.ours is not None
        assert min(line.plain, line.ours) > 0
        assert line.ratio is not None
    assert lines[0].target == "at least 4 x"
    assert isinstance(lines[0].met, bool)


@pytest.mark.usefixtures("small_shape")
def test_random_weights_go_into_nf4() -> None:
    pytest.importorskip("bitsandbytes")
    import torch

    torch.manual_seed(0)
    model = shapes.new_llama("tiny", "cpu", "float32")
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for block in model.model.layers:
            shapes.quantise_block(block)
        after = model(input_ids=ids).logits
    names = {type(m).__name__ for m in model.modules()}
    assert "Linear4bit" in names
    assert type(model.lm_head).__name__ == "Linear"
    assert 0 < float((before - after).abs().max()) < 0.5 * float(before.abs().max())


def test_a_line_under_a_heading() -> None:
    line: Any = Line("training rows/s", "rows/s", 1.0, 2.0, 2.0).under("8 GB: ")
    assert line.name == "8 GB: training rows/s"


def test_a_model_is_built_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B model built in float32 takes 27 GB before it is cast: no card of 24 GB holds it."""
    import torch

    monkeypatch.setitem(shapes.SHAPES, "tiny", (32, 48, 2, 4, 1500))
    sizes: list[int] = []
    real = torch.nn.Parameter.__new__

    def watch(cls: Any, data: Any = None, *words: Any, **named: Any) -> Any:
        sizes.append(data.element_size())
        return real(cls, data, *words, **named)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", watch)
    model = shapes.new_llama("tiny", "cpu", "bfloat16")
    assert set(sizes) == {2}
    assert model.dtype == torch.bfloat16
