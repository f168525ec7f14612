"""Noise of the size of 4-bit rounding on the weights, while an adapter is trained.

Rounding merged weights to nf4 undoes what was learned in steps smaller than the grid. In training
every projection then computes `y = W x + s B A x + X * E x` with a random E, so that forgetting
must hold for the weights nearby:

    E = diag(sigma) Z V^T / sqrt(k),  Z (out, k) standard normal,  V (in, k) random signs,  k = 8
    sigma_i = mean over the blocks of 64 weights in row i of  absmax / 15 / sqrt(3)

An entry of E has mean 0 and standard deviation sigma_i: nf4 has 16 levels over [-absmax, absmax]
of a block, 2 absmax / 15 apart on average, and a uniform error within one step has the standard
deviation step / sqrt(12). X is `noise_scale`; 1 is rounding's own size. E is one and the same for
all rows of an optimizer step, drawn anew for each from the seed and the step's number; the
reference and every measurement are without it. nf4: arXiv 2305.14314.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch

from unlearner.training.hidden import projections_of

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
RANK = 8


def rounding_sigma(weight: Tensor) -> Tensor:
    """Standard deviation of nf4's rounding error in each row of `weight` (out, in), (out,)."""
    rows = weight.float().abs()
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK))
    absmax = padded.unflatten(1, (-1, BLOCK)).amax(-1)
    sigma: Tensor = absmax.mean(1) / (15 * math.sqrt(3))
    return sigma


class WeightNoise:
    """Hooks on the projections of a model that add the noise in training mode.

    `step` is the number of the optimizer step; it names the noise.
    """

    def __init__(self, model: torch.nn.Module, scale: float, seed: int) -> None:
        """Takes the weights' sizes and begins.

        Args:
            model: PEFT around it or not; the base's weights may be nf4.
            scale: X.
            seed: of all draws.
        """
        self.step = 0
        self._seed = seed
        self._drawn: dict[str, tuple[int, Tensor, Tensor]] = {}
        self._handles: list[Any] = []
        for name, module in projections_of(model):
            sigma = scale * rounding_sigma(_weight(module))
            self._handles.append(module.register_forward_hook(self._hook(name, sigma)))

    def remove(self) -> None:
        """The model computes without noise again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._drawn.clear()

    def _hook(self, name: str, sigma: Tensor) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            if not module.training:
                return None
            out, into = self._factors(name, sigma, inputs[0].shape[-1])
            noise = (inputs[0].to(into.dtype) @ into) @ out.T
            return output + noise.to(output.dtype)

        return add

    def _factors(self, name: str, sigma: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """`diag(sigma) Z / sqrt(k)` and V of this step, drawn once a step."""
        kept = self._drawn.get(name)
        if kept is None or kept[0] != self.step:
            text = f"{self._seed} {self.step} {name}".encode()
            number = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
            source = torch.Generator().manual_seed(number)
            z = torch.randn(sigma.shape[0], RANK, generator=source).to(sigma.device)
            v = torch.randint(0, 2, (width, RANK), generator=source).to(sigma.device)
            kept = (self.step, sigma.unsqueeze(1) * z / math.sqrt(RANK), 2.0 * v - 1.0)
            self._drawn[name] = kept
        return kept[1], kept[2]


def _weight(module: Any) -> Tensor:
    """The base's weight of a projection, (out, in) in float32."""
    layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    weight: Tensor = layer.weight.detach()
    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        from bitsandbytes import functional

        weight = functional.dequantize_4bit(weight, state)
    return weight.float()
