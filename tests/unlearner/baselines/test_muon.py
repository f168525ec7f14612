from __future__ import annotations

import math

import pytest
import torch

from unlearner.baselines.muon import Muon, orthogonalise


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (3, 24, 40)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    gradient = 1e-3 * torch.randn(shape)
    before = torch.linalg.svdvals(gradient)
    found = orthogonalise(gradient, steps=6)
    values = torch.linalg.svdvals(found)
    assert found.shape == shape
    assert float(before.max()) < 0.05
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    # Three steps, the default, already bring the large ones there and turn none around.
    quick = torch.linalg.svdvals(orthogonalise(gradient))
    assert 0.6 < float(quick.median()) <= float(quick.max()) < 1.3


def test_directions_are_kept() -> None:
    gradient = torch.randn(12, 20)
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    found = u.T @ orthogonalise(gradient, steps=6) @ vt.T
    off = found - torch.diag(found.diag())
    assert float(off.abs().max()) < 1e-4
    assert float(found.diag().min()) > 0.6


def test_scale_does_not_matter_and_zero_stays_zero() -> None:
    gradient = torch.randn(8, 8)
    torch.testing.assert_close(orthogonalise(gradient), orthogonalise(1e4 * gradient))
    assert float(orthogonalise(torch.zeros(4, 6)).abs().max()) == 0
    assert orthogonalise(gradient.bfloat16()).dtype == torch.float32


def test_a_step_is_nesterov_orthogonalised_and_scaled() -> None:
    weight = torch.nn.Parameter(torch.randn(12, 3))
    start, first, second = weight.detach().clone(), torch.randn(12, 3), torch.randn(12, 3)
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    weight.grad = first.clone()
    optimizer.step()
    scale = 0.1 * math.sqrt(12 / 3)
    expected = start * (1 - 0.05) - scale * orthogonalise(first + 0.9 * first)
    torch.testing.assert_close(weight.detach(), expected)
    weight.grad = second.clone()
    optimizer.step()
    buffer = 0.9 * first + second
    expected = expected * (1 - 0.05) - scale * orthogonalise(second + 0.9 * buffer)
    torch.testing.assert_close(weight.detach(), expected)


def test_weights_in_one_batch_do_not_touch_each_other() -> None:
    gradients = [torch.randn(6, 10) for _ in range(3)] + [torch.randn(10, 6)]
    together = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    still = torch.nn.Parameter(torch.ones(6, 10))
    for weight, gradient in zip(together, gradients, strict=True):
        weight.grad = gradient.clone()
    Muon([*together, still]).step()
    for weight, gradient in zip(together, gradients, strict=True):
        alone = torch.nn.Parameter(torch.zeros_like(gradient))
        alone.grad = gradient.clone()
        Muon([alone]).step()
        torch.testing.assert_close(weight, alone)
        assert float(weight.detach().abs().max()) > 0
    assert torch.equal(still.detach(), torch.ones(6, 10))


def test_it_beats_standing_still_and_plain_descent_on_a_hard_slope() -> None:
    # Inputs whose directions differ a thousandfold in size: plain descent crawls along the small.
    inputs = torch.randn(64, 16) * torch.logspace(0, -3, 16)
    target = inputs @ torch.randn(16, 16)

    def loss_after(make: object) -> float:
        weight = torch.nn.Parameter(torch.zeros(16, 16))
        optimizer = make([weight])  # type: ignore[operator]
        for step in range(150):
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * (1 - step / 150)
            loss = ((inputs @ weight - target) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    start = float((target**2).mean())
    ours = loss_after(lambda w: Muon(w, lr=0.2, momentum=0.8))
    plain = min(loss_after(lambda w, lr=lr: torch.optim.SGD(w, lr=lr)) for lr in (0.1, 1.0, 5.0))
    assert ours < 1e-2 * start
    assert ours < plain
