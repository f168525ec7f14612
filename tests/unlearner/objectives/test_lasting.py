"""Options that make forgetting last: sharpness step, rounding noise, what all of them hold."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.base.load import BaseSpec, load_tokenizer
from unlearner.config import UnlearnConfig
from unlearner.objectives.formulas import FORMULAS, OPTION_FORMULAS
from unlearner.objectives.sequence import simnpo
from unlearner.objectives.sharpness import moved, worst_direction
from unlearner.objectives.weight_noise import WeightNoise, rounding_sigma
from unlearner.tokens.batch_plan import Rows, plan_steps
from unlearner.tokens.prompts import pad_batch, pad_id
from unlearner.training.likelihood import answer_nll
from unlearner.training.trainer import UnlearnTrainer

Config = Callable[..., UnlearnConfig]
# The 16 levels of nf4 (arXiv 2305.14314, appendix E).
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(trainer: UnlearnTrainer) -> dict[str, Tensor]:
    found: Any = trainer.model
    return {n: p.detach().clone() for n, p in found.named_parameters() if ".new." in n}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.2,
    "num_train_epochs": 2,
    "weight_decay": 0.0,
}


def test_the_worst_direction_has_the_length_asked_for_and_points_uphill() -> None:
    a = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    b = torch.nn.Parameter(torch.tensor([[3.0]]))
    c = torch.nn.Parameter(torch.tensor([5.0]))
    (a.square().sum() / 2 + 2 * b.sum()).backward()
    found = worst_direction([a, b, c], 0.3)
    # The gradient is (1, 2), (2), nothing: of length 3.
    torch.testing.assert_close(found[0], torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(found[1], torch.tensor([[0.2]]))
    assert found[2].tolist() == [0.0]
    assert a.grad is b.grad is None
    assert [x.tolist() for x in worst_direction([c], 0.3)] == [[0.0]]
    before = a.detach().clone()
    with moved([a, b], found[:2]):
        torch.testing.assert_close(a.detach(), torch.tensor([1.1, 2.2]))
    assert torch.equal(a.detach(), before)


def test_a_step_is_the_forget_gradient_over_there_and_the_retain_gradient_here(
    trainer: Any, quick: Config, rows: Rows, base: BaseSpec
) -> None:
    """Against plain code: one step of SGD on a base that is no longer at lora_B = 0."""
    config = quick("simnpo", **{**SGD, "num_train_epochs": 1}, sam_rho=0.5, retain_weight=0.7)
    run = trainer(config)
    model: Any = run.model
    torch.manual_seed(5)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(0, 0.05)
    start = weights(run)
    pad = pad_id(load_tokenizer(base.name))
    ((*pairs,),) = plan_steps(8, 10, 0, config.train)

    def loss(stream: str) -> Tensor:
        found = answer_nll(model, pad_batch(rows.stream(stream, pairs), pad))
        if stream == "retain":
            return 0.7 * found.per_token.mean()
        return simnpo(found.nll, found.n, 2.5, 0.0).mean()

    here = loss("forget")
    there = torch.autograd.grad(here, trained)
    length = torch.sqrt(sum(g.square().sum() for g in there))
    with torch.no_grad():
        for parameter, g in zip(trained, there, strict=True):
            parameter.add_(0.5 * g / length)
    forget = torch.autograd.grad(loss("forget"), trained)
    with torch.no_grad():
        for parameter, old in zip(trained, start.values(), strict=True):
            parameter.copy_(old)
    kept = torch.autograd.grad(loss("retain"), trained)
    run.train()
    for (name, now), old, f, k in zip(
        weights(run).items(), start.values(), forget, kept, strict=True
    ):
        torch.testing.assert_close(now, old - 0.2 * (f + k), rtol=1e-4, atol=1e-6, msg=name)
    assert run.last_terms["forget_loss"] == pytest.approx(float(here.detach()), rel=1e-5)


@pytest.mark.parametrize("option", ["sam_rho", "noise_scale", "attack_weight"])
def test_an_option_changes_the_result_and_zero_is_off_bit_for_bit(
    option: str, trainer: Any, quick: Config
) -> None:
    found = {}
    for value in (None, 0.0, 0.05):
        run = trainer(quick("simnpo", num_train_epochs=1, **{option: value}))
        run.train()
        found[value] = weights(run)
    assert difference(found[None], found[0.0]) == 0.0
    assert difference(found[0.0], found[0.05]) > 1e-6


@pytest.mark.parametrize(
    ("option", "packed"),
    [({"sam_rho": 0.5}, True), ({"noise_scale": 3.0}, False), ({"attack_weight": 0.5}, True)],
)
def test_a_step_is_the_same_however_it_is_divided(
    option: dict[str, Any], packed: bool, trainer: Any, quick: Config
) -> None:
    found = []
    for micro, accumulation in ((8, 1), (3, 3)):
        run = trainer(
            quick("simnpo", **SGD, **option, per_device_train_batch_size=micro,
                  gradient_accumulation_steps=accumulation),
            guarded=True, packed=packed,
        )  # fmt: skip
        run.train()
        found.append((weights(run), run.last_terms))
    scale = max(float(w.abs().max()) for n, w in found[0][0].items() if "lora_B" in n)
    assert scale > 1e-3
    assert difference(found[0][0], found[1][0]) < 1e-4 * scale
    told = {"forget_loss", "retain_loss", "guard_loss"}
    assert set(found[0][1]) == told | ({"attack_loss"} if "attack_weight" in option else set())
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "option",
    [
        {"sam_rho": 0.5},
        {"noise_scale": 3.0},
        {"attack_weight": 0.5, "attack_steps": 3},
        {"attack_weight": 0.5, "attack_steps": 2, "sam_rho": 0.1},
    ],
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    option: dict[str, Any], trainer: Any, quick: Config, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    class StopAtTwo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                control.should_save = control.should_training_stop = True

    config = quick("simnpo", num_train_epochs=4, **option)
    whole = trainer(config)
    whole.train()
    shutil.rmtree(tmp_path / "run")  # of two checkpoints only the newest step is kept
    half = trainer(config)
    half.add_callback(StopAtTwo())
    half.train()
    rest = trainer(config)
    rest.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert difference(weights(half), weights(rest)) > 0
    assert difference(weights(whole), weights(rest)) == 0.0


@pytest.mark.parametrize("option", ["sam_rho", "attack_weight"])
@pytest.mark.parametrize("objective", ["npo", "kl", "rmu", "grad_ascent"])
def test_every_kind_of_objective_takes_them(
    objective: str, option: str, trainer: Any, quick: Config
) -> None:
    own = {"rmu_layer": 1} if objective == "rmu" else {}
    run = trainer(quick(objective, num_train_epochs=2, **{option: 0.1}, **own))
    result = run.train()
    assert math.isfinite(result.training_loss)
    assert all(float(w.abs().max()) > 0 for n, w in weights(run).items() if "lora_B" in n)


# The noise


def test_sigma_is_of_the_size_of_nf4_s_rounding_error() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 256) * torch.linspace(0.5, 2, 32).unsqueeze(1)
    blocks = weight.unflatten(1, (-1, 64))
    absmax = blocks.abs().amax(-1, keepdim=True)
    nearest = NF4[(blocks / absmax).unsqueeze(-1).sub(NF4).abs().argmin(-1)] * absmax
    error = (nearest - blocks).flatten(1).square().mean(1).sqrt()
    ratio = rounding_sigma(weight) / error
    assert 0.7 < float(ratio.min()) < float(ratio.max()) < 1.3
    # A row whose length is no multiple of 64 has a shorter last block.
    narrow = torch.ones(2, 70)
    torch.testing.assert_close(rounding_sigma(narrow), torch.full((2,), 1 / 15 / math.sqrt(3)))


def test_the_noise_is_a_matrix_of_its_step_and_only_of_training() -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(48, 40, bias=False)})
    layer: Any = model["q_proj"]
    x = torch.eye(48)
    clean = layer(x).detach()
    noise = WeightNoise(model, 2.0, seed=3)
    drawn = []
    for step in range(300):
        noise.step = step
        drawn.append((layer(x) - clean).detach().T)
    noise.step = 7
    assert torch.equal(layer(x).detach() - clean, drawn[7].T)
    # Linear in x, so that it is one matrix for all rows of a step.
    y = torch.randn(5, 48)
    torch.testing.assert_close(layer(y) - y @ layer.weight.T, y @ drawn[7].T, rtol=1e-3, atol=1e-5)
    entries = torch.stack(drawn)
    torch.testing.assert_close(
        entries.std((0, 2)), 2 * rounding_sigma(layer.weight), rtol=0.15, atol=0
    )
    assert float(entries.mean((0, 2)).abs().max()) < 0.01
    model.eval()
    assert torch.equal(layer(x), clean)
    model.train()
    noise.remove()
    assert torch.equal(layer(x), clean)
    other = WeightNoise(model, 2.0, seed=4)
    other.step = 7
    assert not torch.equal(layer(x).detach() - clean, drawn[7].T)


def test_no_noise_is_left_after_training(trainer: Any, quick: Config, rows: Rows) -> None:
    run = trainer(quick("simnpo", num_train_epochs=1, noise_scale=5.0))
    model: Any = run.model
    batch = pad_batch(rows.forget, 0)
    before = answer_nll(model.train(), batch).nll.detach()
    assert not torch.equal(answer_nll(model.eval(), batch).nll, before)
    run.train()
    one = answer_nll(model.train(), batch).nll.detach()
    assert torch.equal(answer_nll(model.eval(), batch).nll.detach(), one)


def test_each_option_has_a_formula() -> None:
    assert set(OPTION_FORMULAS) == {"sam_rho", "noise_scale", "alternates", "attack_weight"}
    assert not set(OPTION_FORMULAS) & set(FORMULAS)
