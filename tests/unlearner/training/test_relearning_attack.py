"""The simulated relearning attack: what a step computes, when an attack begins, what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.base.load import BaseSpec, load_tokenizer
from adapters.errors import UserError
from unlearner.config import LoraShape, TrainConfig, UnlearnConfig, make_config
from unlearner.memory import estimate as memory
from unlearner.objectives.sequence import simnpo
from unlearner.request.rows import Request
from unlearner.tokens.batch_plan import Rows, plan_steps
from unlearner.tokens.prompts import encode_rows, pad_batch, pad_id, prompt_format
from unlearner.training import distributed as ranks
from unlearner.training.likelihood import answer_nll
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
    trainer: Any, quick: Config, rows: Rows, base: BaseSpec
) -> None:
    """Against plain code: one step of SGD while an attack has weights of its own."""
    sgd = {"optim": "sgd", "learning_rate": 0.2, "weight_decay": 0.0, "num_train_epochs": 1}
    config = quick("simnpo", **sgd, retain_weight=0.7, gamma=1.0, attack_weight=0.5,
                   attack_gamma=0.25, attack_rank=3, attack_rate=1e-3)  # fmt: skip
    run = trainer(config)
    model: Any = run.model
    torch.manual_seed(5)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for tensor in [*trained, *run._attacker.parameters]:
            tensor.normal_(0, 0.05)
    start = [p.detach().clone() for p in trained]
    weights = [t.detach().clone() for t in run._attacker.parameters]
    pad = pad_id(load_tokenizer(base.name))
    ((*pairs,),) = plan_steps(8, 10, 0, config.train)
    model.train()

    def nlls(stream: str) -> Any:
        return answer_nll(model, pad_batch(rows.stream(stream, pairs), pad))

    forget = nlls("forget")
    loss = simnpo(forget.nll, forget.n, 2.5, 1.0).mean() + 0.7 * nlls("retain").per_token.mean()
    with run._attacker.on():
        hit = nlls("forget")
        there = simnpo(hit.nll, hit.n, 2.5, 0.25).mean()
        gradients = torch.autograd.grad(loss + 0.5 * there, trained, retain_graph=True)
        back = torch.autograd.grad(hit.per_token.mean(), run._attacker.parameters)
    seen: list[dict[str, Tensor]] = []
    made = run._attacker
    step = made.step
    made.step = lambda: (step(), seen.extend({"w": t.detach().clone()} for t in made.parameters))
    run.train()
    for p, old, g in zip(trained, start, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.2 * g, rtol=1e-4, atol=1e-6)
    # AdamW's first step is the rate against the sign of the gradient, where there is one.
    for now, old, g in zip(seen, weights, back, strict=True):
        clear = g.abs() > 1e-5
        assert clear.any()
        moved = (old - now["w"])[clear]
        torch.testing.assert_close(moved, 1e-3 * g.sign()[clear], rtol=0.02, atol=1e-7)
    assert run.last_terms["attack_loss"] == pytest.approx(float(there.detach()), rel=1e-5)
    assert run.last_terms["forget_loss"] == pytest.approx(
        float(simnpo(forget.nll, forget.n, 2.5, 1.0).mean().detach()), rel=1e-5
    )


def test_it_is_gone_after_training(trainer: Any, quick: Config) -> None:
    run = trainer(quick("simnpo", num_train_epochs=1, attack_weight=0.5))
    before = set(dict(run.model.named_parameters()))
    run.train()
    assert set(dict(run.model.named_parameters())) == before
    assert not any(m._forward_hooks for m in run.model.modules())


def test_the_measured_step_counts_it_and_moves_nothing(trainer: Any, quick: Config) -> None:
    run = trainer(quick("simnpo", num_train_epochs=1, attack_weight=0.5))
    before = [t.detach().clone() for t in run._attacker.parameters]
    loss = run.longest_loss()
    loss().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, run._attacker.parameters, strict=True))
    assert run._terms == []
    run.train()  # takes nothing of it over
    other = trainer(quick("simnpo", num_train_epochs=1, attack_weight=0.5))
    other.train()
    for one, two in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_it_cannot_attack_is_refused(
    trainer: Any, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="attack_weight needs forget answers, which idk"):
        make_config("idk", attack_weight=0.5)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(UserError, match="--attack-weight needs one process"):
        trainer(quick("simnpo", attack_weight=0.5))


def test_the_memory_plan_has_room_for_it() -> None:
    plan = {}
    for weight in (0.0, 1.0):
        config = make_config(attack_weight=weight, lora_r=8, attack_rank=8)
        held = memory.Holding(True, 2, True)
        plan[weight] = memory.estimate(memory.LLAMA2_7B, config, [164], held).terms
    assert "attacker" not in plan[0.0]
    # All seven projections, as the adapter of the same rank.
    assert plan[1.0]["attacker"] == plan[1.0]["adapter_and_optimizer"]


def test_checkpointing_changes_nothing(trainer: Any, quick: Config) -> None:
    """Activations are computed again while the attack is on, as the first time."""
    found = []
    for setting in ("off", "all"):
        run = trainer(
            quick("simnpo", num_train_epochs=4, attack_weight=0.5, attack_rate=1e-2,
                  gradient_checkpointing=setting)
        )  # fmt: skip
        run.train()
        found.append([p.detach() for p in run.model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
