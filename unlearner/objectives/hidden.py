"""Inside a model: states behind a block or in front of the LM head, and its projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adapters.errors import UserError
from unlearner.objectives.likelihood import (
    AnswerHidden,
    causal_model,
    has_plain_head,
    headless,
    lm_head,
    scored,
    scored_logits,
)


def layer_of(asked: int, depth: int) -> int:
    """The block that RMU steers, from 0, in a model of `depth` blocks.

    -1 is block 7 of 32, the layer of arXiv 2403.03218 for a 7B model, at the same share of the
    depth.

    Raises:
        UserError: the model has no such block.
    """
    if asked >= depth:
        raise UserError(
            f"rmu_layer {asked} is not a block of this model: it has {depth}, counted from 0.",
            f"Use --rmu-layer {layer_of(-1, depth)}, or leave the flag away.",
        )
    return 7 * depth // 32 if asked < 0 else asked


def steered_layer(model: Any, asked: int) -> int:
    """`layer_of` for a loaded model, wrapped in PEFT or DDP or not."""
    return layer_of(asked, len(_blocks(model)))


def freeze_above(model: Any, layer: int) -> None:
    """Takes the gradients from every trainable parameter that block `layer` does not depend on."""
    causal = causal_model(model)
    below = {id(p) for block in _blocks(model)[: layer + 1] for p in block.parameters()}
    below |= {id(p) for p in causal.get_input_embeddings().parameters()}
    for parameter in model.parameters():
        if id(parameter) not in below:
            parameter.requires_grad_(False)


def block_states(model: Any, batch: Mapping[str, Tensor], layer: int) -> AnswerHidden:
    """Hidden states behind block `layer` at the positions that predict the labels of `batch`.

    The residual stream as the next block would get it, without a final norm, in the model's own
    dtype. Padding and prompt are left out, except the prompt's last token, which predicts the
    answer's first. The original takes every token of a text, open-unlearning the answer's tokens
    themselves: one position later.

    Args:
        model: a causal LM of transformers, or a wrapper around one.
        batch: from `pad_batch` or `pack_rows`.
        layer: index from 0.
    """
    at = scored(batch)
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hook = _blocks(model)[layer].register_forward_hook(keep)
    try:
        with _cut_behind(model, layer), headless(model):
            scored_logits(model, at)
    finally:
        hook.remove()
    states = seen[0]
    column = at.kept[at.position].to(states.device)
    return AnswerHidden(states[at.batch_row.to(states.device), column], at.targets, at.row, at.n)


def hidden_at(
    model: torch.nn.Module, inputs: Mapping[str, Any], kept: Tensor
) -> tuple[Tensor, torch.nn.Module]:
    """What the head is given at positions `kept` (k,) of one row of tokens, (k, width), and it.

    Where logits are more than the frozen head's output, these are the logits, and the head passes
    them on.
    """
    arguments = {**inputs, "logits_to_keep": kept, "use_cache": False}
    if not has_plain_head(model):
        return model(**arguments).logits[0], torch.nn.Identity()
    with headless(model):
        hidden = model(**arguments).logits[0]
    return hidden, lm_head(model)


def _blocks(model: Any) -> Any:
    return causal_model(model).get_decoder().layers


@contextmanager
def _cut_behind(model: Any, layer: int) -> Iterator[None]:
    """The model ends behind block `layer`, through its own forward, since DDP hooks into that."""
    decoder = causal_model(model).get_decoder()
    blocks = decoder.layers
    decoder.layers = torch.nn.ModuleList(blocks[: layer + 1])
    try:
        yield
    finally:
        decoder.layers = blocks
