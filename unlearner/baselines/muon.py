"""Muon in float32: the optimizer that makes tiny Llamas memorise in minutes on a CPU.

torch.optim.Muon orthogonalises in bfloat16, which is some fifty times slower than float32 on CPUs
without bf16 instructions and makes the result depend on them. Source: Keller Jordan, Muon (2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# Quintic Newton-Schulz coefficients published with Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(gradient: Tensor, steps: int = 3) -> Tensor:
    """About `U V^T` of `gradient = U S V^T`, shape (..., rows, columns), float32."""
    x = gradient.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the 2-D weights of hidden layers.

    Args:
        params: 2-D weights; embeddings, heads and norms belong to AdamW.
        lr: step size; the update is scaled by `sqrt(max(1, rows / columns))`.
        momentum: Nesterov momentum.
        weight_decay: decoupled.
        ns_steps: Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ns_steps: int = 3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient; equal shapes go in one batch."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes.setdefault(weight.shape, []).append(weight)
            for shape, weights in shapes.items():
                updates = orthogonalise(
                    torch.stack([self._nesterov(w, group["momentum"]) for w in weights]),
                    group["ns_steps"],
                )
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(update, alpha=scale)

    def _nesterov(self, weight: Tensor, momentum: float) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        gradient = weight.grad
        assert gradient is not None
        buffer.mul_(momentum).add_(gradient)
        return gradient + momentum * buffer
