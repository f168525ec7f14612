"""Token objectives against plain full-logit code, and their gradients against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.base.load import BaseSpec, load_tokenizer
from adapters.errors import UserError
from adapters.lora.stack import parents_only
from unlearner.config import ObjectiveConfig, UnlearnConfig, default_objective
from unlearner.objectives import likelihood
from unlearner.objectives import token as losses_token
from unlearner.objectives.hidden import freeze_above, layer_of
from unlearner.objectives.registry import OBJECTIVES
from unlearner.objectives.sequence import Terms
from unlearner.request.rows import Request
from unlearner.tokens.packing import pack_attention, pack_rows
from unlearner.tokens.prompts import Encoded, encode_rows, pad_batch, pad_id, prompt_format
from unlearner.training.forward import StepForwards
from unlearner.training.loop import enable_checkpointing

NEW = ("rmu", "undial", "wga", "satimp", "ceu", "ihl")


def given_logits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a reference's and targets of six tokens in float64."""
    torch.manual_seed(seed)
    logits = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, 7, dtype=torch.float64)
    return logits, reference, torch.randint(0, 7, (6,))


def test_undial_is_a_function_of_the_logits_with_the_gradient_torch_finds_by_differences() -> None:
    logits, reference, targets = given_logits()
    assert torch.autograd.gradcheck(
        lambda x: losses_token.undial(x, reference, targets, 2.5), (logits,)
    )
    # Least at the teacher that it is drawn to.
    goal = reference - 2.5 * F.one_hot(targets, 7)
    at_goal = losses_token.undial(goal, reference, targets, 2.5)
    entropy = -(goal.softmax(-1) * goal.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(at_goal, entropy)
    assert (losses_token.undial(logits, reference, targets, 2.5) > at_goal).all()


def test_weights_are_held_fixed() -> None:
    """The gradient is the weight times gradient ascent's, `onehot - p` in the logits."""
    logits, _, targets = given_logits()
    p = logits.detach().softmax(-1)
    true = p.gather(1, targets.unsqueeze(1))
    ascent = F.one_hot(targets, 7) - p
    cases: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "wga": (lambda x: losses_token.wga(x, targets, 1.5), true**1.5),
        "satimp": (
            lambda x: losses_token.satimp(x, targets, 5.0, 2.0),
            true**5 * (1 - true) ** 2,
        ),
    }
    for name, (loss, weight) in cases.items():
        (found,) = torch.autograd.grad(loss(logits).sum(), logits)
        torch.testing.assert_close(found, weight * ascent, msg=name)
        nll = -true.squeeze(1).log()
        torch.testing.assert_close(loss(logits).detach(), -weight.squeeze(1) * nll, msg=name)


def test_ceu_pulls_the_model_to_itself_without_the_true_token() -> None:
    logits, _, targets = given_logits()
    p = logits.detach().softmax(-1)
    without = p * (1 - F.one_hot(targets, 7))
    (found,) = torch.autograd.grad(losses_token.ceu(logits, targets).sum(), logits)
    torch.testing.assert_close(found, p - without / without.sum(-1, keepdim=True))


def test_ihl_moves_the_true_token_and_its_strongest_rival() -> None:
    logits, _, targets = given_logits()
    assert torch.autograd.gradcheck(lambda x: losses_token.ihl(x, targets), (logits,))
    p = logits.detach().softmax(-1)
    true = F.one_hot(targets, 7)
    rival = F.one_hot((p - 2 * true).argmax(-1), 7)
    margin = (p * (true - rival)).sum(-1, keepdim=True)
    (found,) = torch.autograd.grad(losses_token.ihl(logits, targets).sum(), logits)
    torch.testing.assert_close(found, p * (true - rival - margin))


def test_ihl_is_2_for_a_sure_token_and_0_for_another() -> None:
    logits = torch.tensor([[99.0, 0.0, 0.0], [0.0, 99.0, 0.0], [0.0, 0.0, 0.0]])
    found = losses_token.ihl(logits, torch.tensor([0, 0, 0]))
    torch.testing.assert_close(found, torch.tensor([2.0, 0.0, 1.0]))


@pytest.mark.parametrize("loss", ["wga", "satimp", "undial", "ceu", "ihl"])
def test_sure_and_impossible_tokens_stay_finite(loss: str) -> None:
    logits = torch.tensor([[80.0, -80.0, 0.0], [-300.0, 300.0, 0.0]], dtype=torch.bfloat16)
    logits.requires_grad_()
    targets = torch.tensor([0, 0])
    values = {
        "wga": lambda: losses_token.wga(logits, targets, 1.0),
        "satimp": lambda: losses_token.satimp(logits, targets, 5.0, 1.0),
        "undial": lambda: losses_token.undial(logits, logits.detach(), targets, 10.0),
        "ceu": lambda: losses_token.ceu(logits, targets),
        "ihl": lambda: losses_token.ihl(logits, targets),
    }
    found = values[loss]()
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert torch.isfinite(found).all()
    assert torch.isfinite(gradient).all()


def test_the_steering_vector_is_of_length_one_and_drawn_from_its_seed() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = losses_token.steering_vector(64, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert math.isclose(float(one.norm()), 1.0, rel_tol=1e-6)
    assert (one >= 0).all()
    assert torch.equal(one, losses_token.steering_vector(64, 3))
    assert not torch.equal(one, losses_token.steering_vector(64, 4))


def test_tokens_behind_the_first_of_each_row_are_counted() -> None:
    row = torch.tensor([0, 0, 0, 1, 2, 2])
    assert losses_token.after_first(row, 1).tolist() == [0, 1, 1, 0, 0, 1]
    assert losses_token.after_first(row, 2).tolist() == [0, 0, 1, 0, 0, 0]
    assert losses_token.after_first(row, 0).tolist() == [1] * 6


def test_the_steered_block_is_at_seven_thirty_seconds_of_the_depth() -> None:
    assert [layer_of(-1, depth) for depth in (2, 16, 28, 32, 80)] == [0, 3, 6, 7, 17]
    assert layer_of(1, 2) == 1
    with pytest.raises(UserError, match="rmu_layer 2 is not a block of this model: it has 2"):
        layer_of(2, 2)


# On a model: forwards in chunks of the head, packs, padding, a parent stack as reference


@pytest.fixture(scope="module")
def encoded(base: BaseSpec, request_: Request) -> dict[str, list[Encoded]]:
    fmt = prompt_format(load_tokenizer(base.name))

    def of(rows: Any) -> list[Encoded]:
        return encode_rows(fmt, [(row.question, row.answer) for row in rows], 128, "these")

    return {"forget": of(request_.rows[:4]), "retain": of(request_.retain[:4])}


@pytest.fixture
def model(fresh_model: Callable[..., Any], quick: Callable[..., UnlearnConfig]) -> Any:
    """On top of a parent, and moved away from it."""
    found = fresh_model(quick().lora, on_parent=True)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if ".new." in name and "lora_B" in name:
                parameter.normal_(0, 0.05)
    return found


def chosen(name: str) -> ObjectiveConfig:
    """The published constants with a retain term, and the deeper of the two blocks."""
    return replace(default_objective(name), retain_weight=0.5, rmu_layer=1)


def terms_of(model: Any, batch: dict[str, Tensor], name: str) -> Terms:
    step = StepForwards(model, batch, OBJECTIVES[name].streams, ["parent"], seed=11)
    return OBJECTIVES[name].terms(step, chosen(name))


def gradient(model: Any, terms: Terms) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(
        terms.forget.sum() + 0.5 * terms.retain.sum(), parameters, allow_unused=True
    )
    return torch.cat([g.flatten() for g in found if g is not None])


def plainly(model: Any, rows: dict[str, list[Encoded]], name: str) -> Terms:
    """The objective row by row, from whole logits of one unpadded row at a time."""
    config = chosen(name)
    forget = [_forget(model, row, name, config) for row in rows["forget"]]
    retain = []
    for row in rows["retain"]:
        logits, labels, states = _whole(model, row)
        if name == "rmu":
            with torch.no_grad(), parents_only(model, ["parent"]):
                before = _whole(model, row)[2]
            retain.append((states - before).pow(2).mean())
        else:
            retain.append(F.cross_entropy(logits, labels))
    return Terms(torch.stack(forget), torch.stack(retain))


def _whole(model: Any, row: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and states behind block 1 at the answer positions of a row."""
    kept: list[Tensor] = []
    block = model.get_base_model().model.layers[1]
    hook = block.register_forward_hook(lambda m, i, out: kept.append(out))
    logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
    hook.remove()
    labels = torch.tensor(row.labels)[1:]
    at = labels != -100
    states = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return logits[at], labels[at], states[0, :-1][at]


def _forget(model: Any, row: Encoded, name: str, config: ObjectiveConfig) -> Tensor:
    logits, labels, states = _whole(model, row)
    log_p = logits.log_softmax(-1)
    true = log_p[torch.arange(len(labels)), labels]
    if name == "rmu":
        u = torch.rand(states.shape[-1], generator=torch.Generator().manual_seed(11))
        return (states - config.rmu_coefficient * u / u.norm()).pow(2).mean()
    if name == "undial":
        with torch.no_grad(), parents_only(model, ["parent"]):
            teacher = _whole(model, row)[0]
        teacher = teacher - config.beta * F.one_hot(labels, teacher.shape[-1])
        return -(teacher.softmax(-1) * log_p).sum(-1).mean()
    if name == "ihl":
        rivals = log_p.exp().masked_fill(F.one_hot(labels, log_p.shape[-1]).bool(), 0.0)
        return (1 + true.exp() - rivals.amax(-1)).mean()
    p = true.detach().exp()
    if name == "wga":
        return (p**config.beta * true).mean()
    if name == "satimp":
        return (p**config.beta * (1 - p) ** config.beta2 * true).mean()
    goal = logits.detach().clone()
    goal[torch.arange(len(labels)), labels] = -math.inf
    return -(goal.softmax(-1) * log_p).sum(-1)[1:].mean()


@pytest.mark.parametrize("name", NEW)
def test_packs_padding_and_plain_code_agree_in_value_and_gradient(
    name: str, model: Any, encoded: dict[str, list[Encoded]], base: BaseSpec, monkeypatch: Any
) -> None:
    monkeypatch.setattr(likelihood, "CHUNK", 7)
    rows = [*encoded["forget"], *encoded["retain"]]
    expected = plainly(model, encoded, name)
    slope = gradient(model, expected)
    assert slope.abs().max() > 0
    pad = pad_id(load_tokenizer(base.name))
    padded = terms_of(model, pad_batch(rows, pad), name)
    with pack_attention(model):
        packed = terms_of(model, pack_rows(rows), name)
        in_packs = gradient(model, packed)
    for found, its in ((padded, gradient(model, padded)), (packed, in_packs)):
        torch.testing.assert_close(found.forget, expected.forget, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(found.retain, expected.retain, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(its, slope, rtol=1e-3, atol=1e-5 * float(slope.abs().max()))


def test_rmu_runs_no_block_above_the_one_it_steers(
    model: Any, encoded: dict[str, list[Encoded]]
) -> None:
    layers = model.get_base_model().model.layers
    ran: list[int] = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda m, i, out, index=index: ran.append(index))
    step = StepForwards(model, pad_batch(encoded["forget"], 0), ["forget"], ["parent"])
    step.states("forget", 0)
    assert ran == [0]
    assert len(model.get_base_model().model.layers) == len(layers) == 2
    freeze_above(model, 0)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("layers.0." in n and ".new." in n for n in trained)


@pytest.mark.parametrize("name", ["rmu", "undial"])
def test_recomputed_activations_give_the_same_gradient(
    name: str, model: Any, encoded: dict[str, list[Encoded]]
) -> None:
    rows = [*encoded["forget"], *encoded["retain"]]
    batch = pad_batch(rows, 0)
    model.train()
    plain = gradient(model, terms_of(model, batch, name))
    enable_checkpointing(model, "all")
    again: list[int] = []
    layer = model.get_base_model().model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda m, i: again.append(1))
    found = terms_of(model, batch, name)
    once = len(again)
    recomputed = gradient(model, found)
    assert len(again) > once
    torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)
