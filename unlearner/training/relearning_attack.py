"""A simulated relearning attack beside the training, so that what is forgotten stays forgotten.

    min_theta  w_f L_f(theta) + w_x L_f(theta, attacked) + w_r L_r(theta) + ...

The attacker is a LoRA of its own beside every projection, `y = W x + s B A x + 2 D C x` with D
(out, k) and C (k, in): D zero and C random when an attack begins, both trained by AdamW to bring
the forget answers back (mean `nll / n`), one step after each optimizer step of the adapter, on the
forget rows of that step. After `attack_steps` of them the next attack begins from nothing. So the
adapter meets, in turn, every state of an attack; where a request has many rows, mostly on such as
this attack has not trained on.
The gradient is of first order: the attacker's weights stand still while the adapter's is taken.

The attacker needs no gradient of the base, which may be nf4, and goes away after training. Both
gradients are those of the whole optimizer step, however it is cut into micro-batches. Cost: every
forget row is run twice forwards and three times backwards. Tamper resistance by inner attacks:
arXiv 2408.00761, where each is a fine-tuning of all weights; this is a cheap relative.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.environment import attack_rates
from adapters.lora.targets import default_targets
from unlearner.config import TrainConfig
from unlearner.training.checkpoint import read_state, write_state

# alpha / r of the attacker, that of an adapter by default.
SCALE = 2.0
ATTACKER_FILE = "attacker.json"


class Attacker:
    """The attacker's weights, their optimizer, and hooks that add them in training while `on`."""

    def __init__(self, model: torch.nn.Module, config: TrainConfig) -> None:
        """Puts an attacker beside every projection of the model; it does nothing until `on`.

        Args:
            model: PEFT around it or not; the base's weights may be nf4.
            config: `attack_steps`, `attack_rate` (0: that of the attack by the model's size),
                `attack_rank` and the seed of its first weights.
        """
        self._steps, self._rank, self._seed = config.attack_steps, config.attack_rank, config.seed
        self._on = False
        self._count = 0
        self._reserved: list[Tensor] = []
        self._handles: list[Any] = []
        self._layers: dict[str, tuple[int, int, torch.device]] = {}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in projections_of(model):
            device = next(module.parameters()).device
            self._layers[name] = (module.out_features, module.in_features, device)
            self._handles.append(module.register_forward_hook(self._hook(name)))
        # Of the projections alone: embeddings and head are not counted.
        size = sum(out * into for out, into, _ in self._layers.values())
        self._rate = config.attack_rate or attack_rates(size)[1]
        self._begin()

    @property
    def parameters(self) -> list[Tensor]:
        """All weights of the attacker, float32."""
        return [tensor for pair in self._factors.values() for tensor in pair]

    def _begin(self) -> None:
        """A new attack: D zero, C normal of variance 1 / in, from seed and count."""
        source = torch.Generator().manual_seed(self._seed * 1_000_003 + self._count)
        for name, (out, into, device) in self._layers.items():
            c = torch.empty(self._rank, into).normal_(0, into**-0.5, generator=source)
            d = torch.zeros(out, self._rank, device=device)
            self._factors[name] = (d.requires_grad_(), c.to(device).requires_grad_())
        self._optimizer = torch.optim.AdamW(self.parameters, lr=self._rate, weight_decay=0.0)

    def _hook(self, name: str) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            # The reference of an objective is computed in evaluation mode, and is not attacked.
            if not (self._on and module.training):
                return None
            d, c = self._factors[name]
            return output + SCALE * ((inputs[0].to(c.dtype) @ c.T) @ d.T).to(output.dtype)

        return add

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, forwards and backwards in training mode are of the attacked model."""
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def learn(self, nll: Tensor) -> None:
        """Adds the gradient of a micro-batch's share of the attacker's loss; keeps the graph.

        Args:
            nll: sum over its rows of `nll / n`, divided by the rows of the step.
        """
        gradients = torch.autograd.grad(nll, self.parameters, retain_graph=True)
        for tensor, found in zip(self.parameters, gradients, strict=True):
            tensor.grad = found if tensor.grad is None else tensor.grad + found

    def reserve(self) -> None:
        """Takes the room of AdamW's two moments, for a measurement before they are there."""
        self._reserved = [torch.zeros_like(tensor) for tensor in self.parameters for _ in range(2)]

    def release(self) -> None:
        """Gives that room back, and the gradient that the measurement left."""
        self._reserved = []
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Its step at the end of an optimizer step; after the last one the next attack begins."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._count += 1
        if self._count % self._steps == 0:
            self._begin()

    def remove(self) -> None:
        """The model is that of before; the attacker can still be saved."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def save(self, folder: Path) -> None:
        """Beside a checkpoint, so that a resumed run goes on with the same attack."""
        state = {
            "count": self._count,
            "factors": self.parameters,
            "optimizer": self._optimizer.state_dict(),
        }
        write_state(folder, state, ATTACKER_FILE)

    def load(self, folder: Path) -> None:
        """What `save` wrote.

        Raises:
            ValueError: it is of an attacker with another number of matrices.
        """
        state = read_state(folder, ATTACKER_FILE)
        self._count = int(state["count"])
        self._begin()
        with torch.no_grad():
            for tensor, saved in zip(self.parameters, state["factors"], strict=True):
                tensor.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])


def projections_of(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Names and modules of the linear layers of every block, an adapter's layer where one is.

    What a forward hook on them adds stands beside the weight and all adapters.
    """
    names = set(default_targets(model))
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in names and hasattr(module, "in_features")
    ]
