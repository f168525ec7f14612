"""Directions of each layer's input that a new adapter leaves alone.

An adapter adds `B A x` to what a layer makes of its input x, which is nothing where A is orthogonal
to x. So A is kept orthogonal to the principal directions of what the layer sees on general prompts
and on rows to keep: they stay as they are while the forget rows move, because there is nothing to
move them with. A term in the loss holds such answers too, but it has to be computed in every step,
and it gives way where the forget term pulls harder.

The constraint is that of gradient projection memory (arXiv 2103.09762) and of null-space editing
(AlphaEdit, arXiv 2410.02355), here on the factor A of LoRA, so that the result is a plain adapter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapters.environment import evaluating
from unlearner.objectives.registry import protected_of
from unlearner.request.rows import spread
from unlearner.tokens.prompts import Encoded

# Rows of one forward.
BATCH = 16
# Retain rows that are looked at.
RETAIN_ROWS = 64


def protected_rows(
    general: Sequence[Encoded], retain: Sequence[Encoded], *, alternates: bool
) -> list[Encoded]:
    """The rows whose inputs are protected: all general ones, and some to keep, evenly of all.

    With alternate answers no row to keep: they are learned in the wording of those rows, which
    would be protected from that.
    """
    return [*general, *spread(retain, 0 if alternates else RETAIN_ROWS)]


class ProtectedDirections:
    """Keeps every trainable `lora_A` of a model orthogonal to its layer's principal inputs."""

    def __init__(
        self, model: torch.nn.Module, rows: Sequence[Encoded], count: int, seed: int
    ) -> None:
        """Find the directions, take them out of each A, and of every gradient from now on.

        Args:
            model: PeftModel with one trainable adapter that does nothing yet.
            rows: whose inputs are left alone, at least one, without padding.
            count: directions of a layer, see `protected_of`.
            seed: of the sketch that they are found by.
        """
        layers = {
            name: factor.weight
            for name, module in model.named_modules()
            for factor in getattr(module, "lora_A", {}).values()
            if factor.weight.requires_grad
        }
        bases = _principal_inputs(model, layers, rows, count, seed)
        self._held = [(layers[name], basis) for name, basis in bases.items()]
        # Otherwise Adam's moments would be those of a gradient that is not followed.
        self._hooks = [
            weight.register_hook(lambda grad, basis=basis: _without(grad, basis))
            for weight, basis in self._held
        ]
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Take the directions out of each A again, after an optimizer step."""
        for weight, basis in self._held:
            weight.copy_(_without(weight, basis))

    def remove(self) -> None:
        """Leave the gradients alone from now on."""
        for hook in self._hooks:
            hook.remove()


def _without(matrix: Tensor, basis: Tensor) -> Tensor:
    """`matrix` (r, inputs) without its part along the columns of `basis` (inputs, count)."""
    held = basis.to(matrix.device)
    return matrix - (matrix @ held) @ held.T


def _principal_inputs(
    model: torch.nn.Module,
    layers: dict[str, torch.nn.Parameter],
    rows: Sequence[Encoded],
    count: int,
    seed: int,
) -> dict[str, Tensor]:
    """By layer, where it saw any token, an orthonormal basis (inputs, count) of what it saw most.

    One pass sketches the range of X^T X, X the inputs (tokens, inputs) of a layer, by X^T (X S)
    with a random S: a whole X^T X of a 7B model's layers would take 20 GB. Layers that are given
    the same tensor share a basis.
    """
    generator = torch.Generator().manual_seed(seed)
    random: dict[int, Tensor] = {}
    sketches: dict[str, Tensor] = {}
    owner: dict[str, str] = {}  # the layer that first saw the same input
    last: list[Any] = [None, ""]

    def see(name: str, given: Tensor) -> None:
        if name not in owner:
            owner[name] = last[1] if given is last[0] else name
        last[:] = [given, owner[name]]
        if owner[name] != name:
            return
        width = given.shape[-1]
        if width not in random:
            columns = protected_of(width, count)
            random[width] = torch.randn(width, columns, generator=generator, dtype=torch.float64)
        x = given.detach().reshape(-1, width).double()
        part = x.T @ (x @ random[width].to(x.device))
        sketches[name] = sketches[name] + part if name in sketches else part

    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name in layers
    ]
    try:
        with evaluating(model):
            for batch in _of_one_length(rows):
                device = next(iter(layers.values())).device
                model(input_ids=torch.tensor(batch, device=device), logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    bases = {name: _orthonormal(sketch) for name, sketch in sketches.items()}
    return {name: bases[owner[name]] for name in layers if name in owner}


def _orthonormal(sketch: Tensor) -> Tensor:
    """A float32 basis of the columns of `sketch`, float64: inputs differ by orders of magnitude.

    Fewer than its columns where the layer saw fewer tokens, as an expert may.
    """
    basis, factor = torch.linalg.qr(sketch)
    lengths = factor.diagonal().abs()
    used: Tensor = basis[:, lengths > 1e-12 * lengths.max()]
    return used.float()


def _of_one_length(rows: Sequence[Encoded]) -> list[list[list[int]]]:
    """The tokens of rows in batches that need no padding."""
    by_length: defaultdict[int, list[list[int]]] = defaultdict(list)
    for row in rows:
        by_length[len(row.input_ids)].append(row.input_ids)
    return [same[i : i + BATCH] for same in by_length.values() for i in range(0, len(same), BATCH)]
