"""NLLs of rows outside of training: those of the reference of NPO and DPO, and of any rows.

The reference never changes during a run, and rows come back every epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adapters.environment import evaluating
from adapters.lora.stack import parents_only
from unlearner.objectives.likelihood import answer_nll, on_device
from unlearner.objectives.registry import OBJECTIVES
from unlearner.tokens.batch_plan import Pair, Rows
from unlearner.tokens.packing import pack_rows
from unlearner.tokens.prompts import Encoded, pad_batch

# Rows of one forward.
BATCH = 16
References = dict[str, dict[tuple[int, ...], float]]


def row_key(stream: str, pair: Pair) -> tuple[int, ...]:
    """What names a row of a stream: a refusal belongs to its forget row."""
    return (pair.forget, pair.refusal) if stream == "refusal" else (pair.forget,)


def reference_nlls(
    model: torch.nn.Module,
    rows: Rows,
    steps: Sequence[Sequence[Pair]],
    objective: str,
    parents: Sequence[str],
    *,
    pad: int,
    packed: bool,
) -> References:
    """By stream and row, the summed NLL in nats under base and parents, for the rows of `steps`.

    Args:
        model: PeftModel with the parents attached.
        rows: encoded rows.
        steps: the plan; only rows that it uses are computed.
        objective: its name; {} where it needs no reference.
        parents: names of the parent adapters.
        pad: id that fills padding.
        packed: rows in packs instead of padded batches.
    """
    wanted: list[tuple[str, tuple[int, ...]]] = []
    encoded: list[Encoded] = []
    for stream in OBJECTIVES[objective].reference_streams:
        used = {row_key(stream, pair): pair for step in steps for pair in step}
        for name in sorted(used):
            wanted.append((stream, name))
            encoded += rows.stream(stream, [used[name]])
    if not wanted:
        return {}
    with parents_only(model, parents):
        values = summed_nlls(model, encoded, pad=pad, packed=packed)
    found: References = {stream: {} for stream, _ in wanted}
    for (stream, name), value in zip(wanted, values.tolist(), strict=True):
        found[stream][name] = value
    return found


def summed_nlls(
    model: Any, rows: Sequence[Encoded], *, pad: int, packed: bool = False
) -> torch.Tensor:
    """The summed NLL of every row in nats under `model` as it is, (rows,) float32.

    Args:
        model: whose adapters are switched as they are to count.
        rows: encoded rows.
        pad: id that fills padding.
        packed: rows in packs instead of padded batches.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    values = torch.zeros(len(rows), dtype=torch.float32)
    with evaluating(model):
        for start in range(0, len(order), BATCH):
            indices = order[start : start + BATCH]
            part = [rows[i] for i in indices]
            batch = pack_rows(part) if packed else pad_batch(part, pad)
            scored = answer_nll(model, on_device(batch, device))
            values[indices] = scored.nll.cpu()
    return values
