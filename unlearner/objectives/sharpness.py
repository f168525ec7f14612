"""Sharpness-aware forgetting: the forget gradient is taken where forgetting is undone the most.

    min_theta  w_f max_{||e|| <= rho} L_f(theta + e) + w_r L_r(theta) + w_g L_g(theta)

To first order the worst e is `rho * g / ||g||`, g the gradient of L_f at theta, the norm over all
trained weights together. The step then applies `w_f grad L_f(theta + e) + grad of the rest at
theta`. g is that of the whole optimizer step, so the result does not depend on how a step is cut
into micro-batches. Cost: every forget row is run twice. Source: arXiv 2502.05374 (SAM against
relearning; rho 0.01 on full weights), SAM: arXiv 2010.01412.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def worst_direction(parameters: Sequence[torch.nn.Parameter], rho: float) -> list[Tensor]:
    """`rho * g / ||g||` of each parameter from its `.grad`, which is then cleared.

    Zeros where there is no gradient at all: a flat loss has no worst direction.

    Args:
        parameters: all that is trained.
        rho: length of the step over all of them together.
    """
    found = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in parameters]
    length = torch.stack([g.float().square().sum() for g in found]).sum().sqrt()
    factor = rho / length if float(length) > 0 else torch.zeros_like(length)
    for parameter in parameters:
        parameter.grad = None
    return [g * factor.to(g.dtype) for g in found]


@contextmanager
def moved(parameters: Sequence[torch.nn.Parameter], by: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters are moved; afterwards they are what they were, bit for bit."""
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, offset in zip(parameters, by, strict=True):
            parameter.add_(offset)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)
