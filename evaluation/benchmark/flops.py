"""FLOPs and bytes of the project's own code on shapes that need not fit this machine.

Models are built on torch's meta device: every operation runs without data, and torch's counter
sees each product. The standard implementation is counted on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unlearner.tokens.prompts import Encoded

if TYPE_CHECKING:
    import torch

# Lengths to which the standard implementation pads: training, and teacher-forced evaluation.
PLAIN_TRAIN, PLAIN_EVAL = 500, 200


@dataclass(frozen=True)
class Counted:
    """FLOPs of some rows, and the bytes saved for backward."""

    flops: int
    saved_bytes: int = 0


@contextmanager
def _counting(model: Any) -> Iterator[Callable[[], Counted]]:
    """Counts the operations inside; the bytes saved for backward exclude weights."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    weights = {_memory_of(parameter) for parameter in model.parameters()}
    saved: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no freed memory is reused and missed

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        # A tensor saved by two operations, or a view of it, exists once.
        where = _memory_of(tensor)
        if where not in weights and where not in saved:
            saved[where] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    counter = FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor)
    with counter, hooks:
        yield lambda: Counted(counter.get_total_flops(), sum(saved.values()))


def _memory_of(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, also on meta."""
    return int(tensor.untyped_storage()._cdata)


def training_step(
    model: Any, rows: Sequence[Encoded], *, packed: bool, checkpointing: str = "off"
) -> Counted:
    """Forward and backward of this project on `rows`, forget and retain: one pack, chunked head."""
    from unlearner.objectives.likelihood import answer_nll, on_device
    from unlearner.tokens.packing import pack_attention, pack_rows
    from unlearner.tokens.prompts import pad_batch

    device = next(model.parameters()).device
    batch = on_device(pack_rows(rows) if packed else pad_batch(rows, 0), device)
    _checkpoint(model, checkpointing)
    with pack_attention(model), _counting(model) as counted:
        answer_nll(model, batch).per_token.sum().backward()
        return counted()


def plain_training_row(
    model: Any, checkpointing: str = "all", length: int | None = None
) -> Counted:
    """Forward and backward of one row as in the released code: padded, all logits."""
    ids, mask = _plain_inputs(model, length or PLAIN_TRAIN)
    _checkpoint(model, checkpointing)
    with _counting(model) as counted:
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        return counted()


def _checkpoint(model: Any, setting: str) -> None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if setting == "off":
        inner.activation_checkpointing_disable()
        inner.eval()
        return
    every = 1 if setting == "all" else int(setting)
    inner.train()
    inner.enable_input_require_grads()
    inner.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)


def scoring(model: Any, questions: Sequence[Sequence[Encoded]]) -> Counted:
    """Teacher-forced scores of some questions as one tree."""
    import torch

    from evaluation.inference.prefix_sharing import build_tree, forward_tree

    _checkpoint(model, "off")
    tree = build_tree([text for texts in questions for text in texts])
    with torch.no_grad(), _counting(model) as counted:
        forward_tree(model, tree)
        return counted()


def plain_scoring_row(model: Any, length: int | None = None) -> Counted:
    """One row of the official evaluation: padded, all logits."""
    import torch

    ids, mask = _plain_inputs(model, length or PLAIN_EVAL)
    _checkpoint(model, "off")
    with torch.no_grad(), _counting(model) as counted:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        return counted()


def _plain_inputs(model: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (1, length) and a mask (1, 1, length, length).

    The mask is given, so that transformers does not look into meta tensors for one.
    """
    import torch

    device = next(model.parameters()).device
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    return ids, torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
