"""The simulated relearning attack: what a step computes, when an attack begins, what is left."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.base.load import BaseSpec, load_tokenizer
from adapters.errors import UserError
from unlearner import distributed
from unlearner.config import LoraShape, TrainConfig, UnlearnConfig, make_config
from unlearner.interrupt import StopRequest
from unlearner.memory.plan import LLAMA2_7B, BasePrecision, MemoryPlan
from unlearner.objectives.likelihood import answer_nll
from unlearner.objectives.sequence import simnpo
from unlearner.request.rows import Request
from unlearner.tokens.batch_plan import Rows, plan_steps
from unlearner.tokens.prompts import encode_rows, pad_batch, pad_id, prompt_format
from unlearner.training.relearning_attack import SCALE, Attacker

Config = Callable[..., UnlearnConfig]


def attacker_on(model: torch.nn.Module, **settings: Any) -> Attacker:
    return Attacker(model, TrainConfig(attack_rank=3, **settings))


def bring_back(attacker: Attacker, model: Any, batch: dict[str, Tensor]) -> float:
    """One step of an attack; the mean NLL a token before it."""
    with attacker.on():
        found = answer_nll(model, batch).per_token.mean()
        attacker.learn(found)
    attacker.step()
    return float(found.detach())


def test_an_attack_brings_answers_back_and_begins_anew(
    fresh_model: Any, base: BaseSpec, request_: Request
) -> None:
    model = fresh_model(LoraShape()).train()
    fmt = prompt_format(load_tokenizer(base.name))
    # The base knows its rows: with other answers there is something to bring back.
    turned = [(row.question, row.answer[::-1]) for row in request_.rows]
    batch = pad_batch(encode_rows(fmt, turned, 128, "these"), 0)
    clean = float(answer_nll(model, batch).per_token.mean().detach())
    attacker = attacker_on(model, attack_steps=4, attack_rate=3e-3)
    told = [bring_back(attacker, model, batch) for _ in range(8)]
    # A fresh attack computes what the model computes; the fifth step starts the second attack.
    assert told[0] == told[4] == clean
    assert told[0] > told[1] > told[2] > told[3] < told[4]
    assert told[1:4] != told[5:]  # other first weights
    assert float(answer_nll(model, batch).per_token.mean().detach()) == clean
    assert all(p.grad is None for p in model.parameters())


def test_the_attacked_model_is_the_base_with_the_attackers_product(fresh_model: Any) -> None:
    model = fresh_model(LoraShape())
    name, layer = next(
        (n, m) for n, m in model.named_modules() if n.endswith("layers.0.mlp.up_proj")
    )
    attacker = attacker_on(model)
    for tensor in attacker.parameters:
        torch.nn.init.normal_(tensor, 0, 0.1)
    d, c = attacker._factors[name]
    x = torch.randn(5, layer.in_features)
    clean = layer.eval()(x)
    with attacker.on():
        assert torch.equal(layer(x), clean)  # the reference is computed in evaluation mode
        layer.train()
        torch.testing.assert_close(layer(x), clean + x @ (SCALE * d @ c).T)
    assert torch.equal(layer(x), clean)
    with attacker.on():
        attacker.remove()
        assert torch.equal(layer(x), clean)


def test_a_step_adds_the_forget_gradient_under_attack(
    loop: Any, quick: Config, rows: Rows, base: BaseSpec
) -> None:
    """Against plain code: one step of SGD while an attack has weights of its own."""
    sgd = {"optim": "sgd", "learning_rate": 0.2, "weight_decay": 0.0, "num_train_epochs": 1}
    config = quick("simnpo", **sgd, retain_weight=0.7, gamma=1.0, attack_weight=0.5,
                   attack_gamma=0.25, attack_rank=3, attack_rate=1e-3)  # fmt: skip
    run = loop(config)
    model: Any = run.bare
    torch.manual_seed(5)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for tensor in [*trained, *run.task._attacker.parameters]:
            tensor.normal_(0, 0.05)
    start = [p.detach().clone() for p in trained]
    weights = [t.detach().clone() for t in run.task._attacker.parameters]
    pad = pad_id(load_tokenizer(base.name))
    ((*pairs,),) = plan_steps(8, 10, 0, config.train)
    model.train()

    def nlls(stream: str) -> Any:
        return answer_nll(model, pad_batch(rows.stream(stream, pairs), pad))

    forget = nlls("forget")
    loss = simnpo(forget.nll, forget.n, 2.5, 1.0).mean() + 0.7 * nlls("retain").per_token.mean()
    with run.task._attacker.on():
        hit = nlls("forget")
        there = simnpo(hit.nll, hit.n, 2.5, 0.25).mean()
        gradients = torch.autograd.grad(loss + 0.5 * there, trained, retain_graph=True)
        back = torch.autograd.grad(hit.per_token.mean(), run.task._attacker.parameters)
    seen: list[dict[str, Tensor]] = []
    made = run.task._attacker
    step = made.step
    made.step = lambda: (step(), seen.extend({"w": t.detach().clone()} for t in made.parameters))
    run.finish()
    for p, old, g in zip(trained, start, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.2 * g, rtol=1e-4, atol=1e-6)
    # AdamW's first step is the rate against the sign of the gradient, where there is one.
    for now, old, g in zip(seen, weights, back, strict=True):
        clear = g.abs() > 1e-5
        assert clear.any()
        moved = (old - now["w"])[clear]
        torch.testing.assert_close(moved, 1e-3 * g.sign()[clear], rtol=0.02, atol=1e-7)
    assert run.losses[-1]["attack_loss"] == pytest.approx(float(there.detach()), rel=1e-5)
    assert run.losses[-1]["forget_loss"] == pytest.approx(
        float(simnpo(forget.nll, forget.n, 2.5, 1.0).mean().detach()), rel=1e-5
    )


def test_it_is_gone_after_training(loop: Any, quick: Config) -> None:
    run = loop(quick("simnpo", num_train_epochs=1, attack_weight=0.5))
    before = set(dict(run.bare.named_parameters()))
    run.finish()
    assert set(dict(run.bare.named_parameters())) == before
    assert not any(m._forward_hooks for m in run.bare.modules())


def test_the_measured_step_counts_it_and_moves_nothing(loop: Any, quick: Config) -> None:
    run = loop(quick("simnpo", num_train_epochs=1, attack_weight=0.5))
    before = [t.detach().clone() for t in run.task._attacker.parameters]
    run.probe()
    assert all(
        torch.equal(a, b) for a, b in zip(before, run.task._attacker.parameters, strict=True)
    )
    run.finish()  # takes nothing of it over
    other = loop(quick("simnpo", num_train_epochs=1, attack_weight=0.5))
    other.finish()
    for one, two in zip(run.bare.parameters(), other.bare.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_it_cannot_attack_is_refused(
    loop: Any, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="attack_weight needs forget answers, which idk"):
        make_config("idk", attack_weight=0.5)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="--attack-weight needs one process"):
        loop(quick("simnpo", attack_weight=0.5))


def test_the_memory_plan_has_room_for_it() -> None:
    plan = {}
    for weight in (0.0, 1.0):
        config = make_config(attack_weight=weight, lora_r=8, attack_rank=8)
        precision = BasePrecision(True, 2, True)
        plan[weight] = MemoryPlan(LLAMA2_7B, config, precision, [164], 1).estimate().terms
    assert "attacker" not in plan[0.0]
    # All seven projections, as the adapter of the same rank.
    assert plan[1.0]["attacker"] == plan[1.0]["adapter_and_optimizer"]


def test_checkpointing_changes_nothing(loop: Any, quick: Config) -> None:
    """Activations are computed again while the attack is on, as the first time."""
    found = []
    for setting in ("off", "all"):
        run = loop(
            quick("simnpo", num_train_epochs=4, attack_weight=0.5, attack_rate=1e-2,
                  gradient_checkpointing=setting)
        )  # fmt: skip
        run.finish()
        found.append([p.detach() for p in run.bare.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.2,
    "num_train_epochs": 2,
    "weight_decay": 0.0,
}


def adapter(run: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in run.bare.named_parameters() if ".new." in n}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_it_changes_the_result_and_a_weight_of_zero_is_off_bit_for_bit(
    loop: Any, quick: Config
) -> None:
    found = {
        value: adapter(loop(quick(num_train_epochs=1, attack_weight=value)).finish())
        for value in (None, 0.0, 0.05)
    }
    assert difference(found[None], found[0.0]) == 0.0
    assert difference(found[0.0], found[0.05]) > 1e-6


def test_a_step_is_the_same_however_it_is_divided(loop: Any, quick: Config) -> None:
    found = []
    for micro, accumulation in ((8, 1), (3, 3)):
        config = quick(**SGD, attack_weight=0.5, per_device_train_batch_size=micro,
                       gradient_accumulation_steps=accumulation)  # fmt: skip
        run = loop(config, guarded=True, packed=True).finish()
        found.append((adapter(run), run.losses[-1]))
    scale = max(float(w.abs().max()) for n, w in found[0][0].items() if "lora_B" in n)
    assert scale > 1e-3
    assert difference(found[0][0], found[1][0]) < 1e-4 * scale
    assert set(found[0][1]) == {"forget_loss", "retain_loss", "guard_loss", "attack_loss"}
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4, abs=1e-6)


def test_a_resumed_run_is_the_run_that_was_not_stopped(
    loop: Any, quick: Config, tmp_path: Path
) -> None:
    config = quick(num_train_epochs=4, attack_weight=0.5, attack_steps=3)
    whole = loop(config).finish()
    shutil.rmtree(tmp_path / "run")  # only the newest checkpoint is kept
    half, stop = loop(config), StopRequest()
    half._after_step = lambda step, steps, model: setattr(stop, "asked", step == 2)
    half.run(stop)
    assert not list((tmp_path / "run").rglob("*.pt"))
    rest = loop(config)
    rest.load(tmp_path / "run" / "checkpoint-2")
    rest.finish()
    assert difference(adapter(half), adapter(rest)) > 0
    assert difference(adapter(whole), adapter(rest)) == 0.0


@pytest.mark.parametrize("objective", ["npo", "kl", "rmu", "grad_ascent"])
def test_every_kind_of_objective_takes_it(objective: str, loop: Any, quick: Config) -> None:
    own = {"rmu_layer": 1} if objective == "rmu" else {}
    run = loop(quick(objective, num_train_epochs=2, attack_weight=0.1, **own)).finish()
    assert all(math.isfinite(value) for terms in run.losses for value in terms.values())
    assert all(float(w.abs().max()) > 0 for n, w in adapter(run).items() if "lora_B" in n)
