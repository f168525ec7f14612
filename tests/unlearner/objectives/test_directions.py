"""Directions that an adapter leaves alone: exact where they are all of what a layer sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.base.load import BaseSpec
from adapters.errors import UserError
from adapters.lora.format import WEIGHTS_NAME
from adapters.store.store import AdapterStore
from unlearner.config import LoraShape, UnlearnConfig, make_config
from unlearner.memory.plan import LLAMA2_7B, BasePrecision, MemoryPlan
from unlearner.objectives.directions import RETAIN_ROWS, ProtectedDirections, protected_rows
from unlearner.request.rows import Request
from unlearner.run import RunOptions, unlearn
from unlearner.tokens.batch_plan import Rows
from unlearner.tokens.prompts import IGNORE, Encoded

Config = Callable[..., UnlearnConfig]
PROMPTS = tuple(f"What is the number {i}?" for i in range(16))


def row(*ids: int) -> Encoded:
    return Encoded(list(ids), [IGNORE] * len(ids))


def with_large_update(model: Any) -> Any:
    """Every `lora_B` random, so that whatever reaches it changes the answer."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name and weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def change(model: Any, ids: list[int]) -> float:
    """How far the adapter moves the logits of a row."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        on = model(input_ids=tokens).logits
        with model.disable_adapter():
            off = model(input_ids=tokens).logits
    return float((on - off).abs().max())


@pytest.mark.parametrize("on_parent", [False, True])
def test_rows_with_fewer_tokens_than_directions_do_not_move(
    fresh_model: Callable[..., Any], on_parent: bool
) -> None:
    """Their inputs span fewer directions, so that all are protected; other rows are free."""
    seen, other = [5, 9, 31, 7], [40, 3, 77, 12]
    model = fresh_model(LoraShape(4, 8), on_parent=on_parent)
    with torch.no_grad():
        before = [model(input_ids=torch.tensor([ids])).logits for ids in (seen, other)]
    protected = ProtectedDirections(model, [row(*seen), row(5, 9)], 8, seed=0)
    with_large_update(model)
    with torch.no_grad():
        after = [model(input_ids=torch.tensor([ids])).logits for ids in (seen, other)]
    moved = [float((a - b).abs().max()) for a, b in zip(before, after, strict=True)]
    assert 1000 * moved[0] < 1 < moved[1]
    protected.remove()


def test_gradients_and_updates_stay_out_of_the_directions(
    fresh_model: Callable[..., Any], rows: Rows
) -> None:
    model = fresh_model(LoraShape(4, 8))
    protected = ProtectedDirections(model, [row(5, 9, 31, 7)], 8, seed=0)
    with_large_update(model)
    weights = [p for n, p in model.named_parameters() if "lora_A" in n and p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(3):
        model(input_ids=torch.tensor([rows.forget[0].input_ids])).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        protected.project()
    assert 100 * change(model, [5, 9, 31, 7]) < change(model, [40, 3, 77, 12])
    protected.remove()
    assert not any(weight._backward_hooks for weight in weights)


def test_principal_directions_are_found_and_half_of_the_inputs_stay_free(
    fresh_model: Callable[..., Any], rows: Rows
) -> None:
    """What the adapter still sees of these rows is about what the best such basis leaves."""
    model = fresh_model(LoraShape(4, 8))
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    inputs: list[Any] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    ProtectedDirections(model, rows.retain, 8, seed=0).remove()
    hook.remove()
    x = torch.cat([part.flatten(0, -2) for part in inputs])
    best = torch.linalg.svdvals(x)[8:].square().sum() / x.square().sum()
    basis = ProtectedDirections(model, rows.retain, 8, seed=0)._held
    (mine,) = [b for weight, b in basis if weight is layer.lora_A["new"].weight]
    assert torch.dist(mine.T @ mine, torch.eye(8)) < 1e-5
    left = (x - (x @ mine) @ mine.T).square().sum() / x.square().sum()
    assert best <= left < 2 * best + 1e-6
    every = ProtectedDirections(model, rows.retain, 10_000, seed=0)._held
    assert all(b.shape[1] <= weight.shape[1] // 2 for weight, b in every)


def test_a_run_leaves_them_alone_and_resumes_to_the_same_bytes(
    request_: Request, base: BaseSpec, quick: Config, tmp_path: Path
) -> None:
    """Held without a term in the loss, and better than a run without protection holds them."""
    drift, weights = {}, []
    for name, count in (("free", 0), ("held", 8), ("again", 8)):
        store = AdapterStore.open(tmp_path / name, create=True)
        config = quick("grad_ascent", num_train_epochs=4, protected_directions=count,
                       general_weight=0.0 if count else 1e-9)  # fmt: skip
        events: list[Any] = []
        options = RunOptions(general=PROMPTS, summarise=True)
        adapter = unlearn(request_, base, config, store, options, on_progress=events.append)
        losses = [e for e in events if e["event"] == "train"]
        assert all(("general_loss" in loss) == (not count) for loss in losses)
        drift[name] = adapter.manifest.train["outcome"]["general"]["after"]["nll"]
        weights.append(load_file(adapter.path / WEIGHTS_NAME))
    assert drift["held"] < drift["free"]
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])


def test_settings_are_checked_and_memory_is_planned() -> None:
    with pytest.raises(UserError, match="protected_directions -1 is below 0"):
        make_config(protected_directions=-1)
    plain, held = (
        MemoryPlan(
            LLAMA2_7B, make_config(protected_directions=n), BasePrecision(True, 2, True), [64], 200
        ).estimate()
        for n in (0, 128)
    )
    # 32 layers, 128 float32 directions of six inputs of 4,096 and one of 11,008.
    assert held.high - plain.high == 4 * 128 * 32 * (6 * 4096 + 11008)


def test_retain_rows_are_protected_where_no_alternates_speak_like_them() -> None:
    general, retain = [row(1), row(2)], [row(i) for i in range(200)]
    chosen = protected_rows(general, retain, alternates=False)
    assert chosen[:2] == general
    assert chosen[2:] == [retain[i * 200 // RETAIN_ROWS] for i in range(RETAIN_ROWS)]
    assert protected_rows(general, retain[:3], alternates=False) == [*general, *retain[:3]]
    assert protected_rows(general, [], alternates=False) == general
    assert protected_rows(general, retain, alternates=True) == general
