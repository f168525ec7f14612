"""Reference NLLs of NPO and DPO: one forward a row under the parent stack, before training.

The reference never changes during a run, and rows come back every epoch. Values are kept between
runs in the user's cache: numbers only, under a name that is keyed by all they depend on.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.base.fingerprint import cache_folder
from adapters.lora.stack import parents_only
from unlearner.tokens.batch_plan import Pair, Rows
from unlearner.tokens.packing import pack_rows
from unlearner.tokens.prompts import Encoded, pad_batch
from unlearner.training.likelihood import answer_nll

# Which streams of an objective are compared with the reference by their NLL.
STREAMS: dict[str, tuple[str, ...]] = {"npo": ("forget",), "dpo": ("forget", "refusal")}
# Rows of one forward.
BATCH = 16
References = dict[str, dict[tuple[int, ...], float]]


def row_key(stream: str, pair: Pair) -> tuple[int, ...]:
    """What names a row of a stream: a refusal belongs to its forget row."""
    return (pair.forget, pair.refusal) if stream == "refusal" else (pair.forget,)


def reference_file(key: bytes, depends_on: Mapping[str, Any], rows: Sequence[Encoded]) -> Path:
    """Where the values of these rows are kept; the name tells nothing without the key."""
    text = json.dumps([depends_on, [[row.input_ids, row.labels] for row in rows]], sort_keys=True)
    name = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:32]
    return cache_folder() / "references" / f"{name}.safetensors"


def reference_nlls(
    model: torch.nn.Module,
    rows: Rows,
    steps: Sequence[Sequence[Pair]],
    objective: str,
    parents: Sequence[str],
    *,
    pad: int,
    packed: bool,
    key: bytes,
    depends_on: Mapping[str, Any],
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
        key: of the digests.
        depends_on: base, how it is loaded, parents with hashes and scales, as JSON.
    """
    wanted: list[tuple[str, tuple[int, ...]]] = []
    encoded: list[Encoded] = []
    for stream in STREAMS.get(objective, ()):
        used = {row_key(stream, pair): pair for step in steps for pair in step}
        for name in sorted(used):
            wanted.append((stream, name))
            encoded += rows.stream(stream, [used[name]])
    if not wanted:
        return {}
    path = reference_file(key, depends_on, encoded)
    values = _kept(path, len(wanted))
    if values is None:
        values = _compute(model, encoded, parents, pad, packed)
        _keep(path, values)
    found: References = {stream: {} for stream, _ in wanted}
    for (stream, name), value in zip(wanted, values.tolist(), strict=True):
        found[stream][name] = value
    return found


def _compute(
    model: Any, rows: Sequence[Encoded], parents: Sequence[str], pad: int, packed: bool
) -> torch.Tensor:
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    values = torch.zeros(len(rows), dtype=torch.float32)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), parents_only(model, parents):
            for start in range(0, len(order), BATCH):
                indices = order[start : start + BATCH]
                part = [rows[i] for i in indices]
                batch = pack_rows(part) if packed else pad_batch(part, pad)
                found = answer_nll(model, {k: v.to(device) for k, v in batch.items()})
                values[indices] = found.nll.cpu()
    finally:
        model.train(was_training)
    return values


def _kept(path: Path, count: int) -> torch.Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = load_file(path)["nll"]
    except (OSError, SafetensorError, KeyError):
        return None  # not there, or damaged: computed again, and written over
    return values if values.shape == (count,) and bool(values.isfinite().all()) else None


def _keep(path: Path, values: torch.Tensor) -> None:
    from safetensors.torch import save

    from adapters.atomic_files import write_bytes

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_bytes(path, save({"nll": values}))
