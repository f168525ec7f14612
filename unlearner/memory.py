"""How much memory a forget run will take, by formula, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from unlearner.config import UnlearnConfig

GIB = 1024**3
# nf4 with double quantisation, measured on 7B: 4.127 bits a weight.
NF4_BYTES = 4.127 / 8
# float32 weight, gradient and two AdamW moments.
ADAPTER_BYTES = 16
# Saved for backward, bytes a token and layer, fitted to counts on 7B shapes (208 kB for float32
# adapters under autocast): 29.3 per hidden unit and 8 per intermediate unit.
ACTIVATION_HIDDEN, ACTIVATION_INTERMEDIATE = 29.3, 8.0
CHECKPOINT_HIDDEN = 2.0
# Dequantisation buffers, cuBLAS workspace and CUDA context.
GPU_OVERHEAD = 0.78 * GIB
RANGE = 0.2

# config.json of Llama-2-7b, and the longest of TOFU's training rows in its tokens.
LLAMA2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "attention_size": 4096,
    "key_value_size": 4096,
    "tied": 0,
}
LONGEST_TOFU_ROW = 164


@dataclass(frozen=True)
class MemoryEstimate:
    """Terms of the peak in bytes; `low` and `high` bound the sum by plus or minus 20 %."""

    terms: dict[str, float]

    @property
    def total(self) -> float:
        """Sum of the terms."""
        return sum(self.terms.values())

    def to_json(self) -> dict[str, Any]:
        """Bytes by term, total and range, marked as an estimate."""
        return {
            "kind": "estimate",
            "terms_bytes": {name: round(value) for name, value in self.terms.items()},
            "total_bytes": round(self.total),
            "low_bytes": round(self.total * (1 - RANGE)),
            "high_bytes": round(self.total * (1 + RANGE)),
        }


def read_shape(folder: Path) -> dict[str, int]:
    """Sizes of a Llama-like base from its config.json alone.

    Raises:
        UserError: no config, or one without the sizes.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json.", "Give a folder that holds a whole model.")
    config = json.loads(path.read_text(encoding="utf-8"))
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    missing = [name for name in (*names, "num_attention_heads") if not config.get(name)]
    if missing:
        raise UserError(
            f"The config.json of {folder} does not say {', '.join(missing)}.",
            "Estimates are made for Llama-like models.",
        )
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    return {
        **{name: int(config[name]) for name in names},
        "attention_size": heads * head,
        "key_value_size": int(config.get("num_key_value_heads") or heads) * head,
        "tied": int(bool(config.get("tie_word_embeddings"))),
    }


def projections(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the seven projections of one block."""
    h, ff = shape["hidden_size"], shape["intermediate_size"]
    q, kv = shape["attention_size"], shape["key_value_size"]
    return {
        "q_proj": (h, q),
        "k_proj": (h, kv),
        "v_proj": (h, kv),
        "o_proj": (q, h),
        "gate_proj": (h, ff),
        "up_proj": (h, ff),
        "down_proj": (ff, h),
    }


def lora_parameters(shape: dict[str, int], config: UnlearnConfig) -> int:
    """Trainable weights of the adapter: `r * (inputs + outputs)` a projection and layer."""
    sizes = projections(shape)
    known = [sizes[name] for name in config.lora.target_modules if name in sizes]
    return shape["num_hidden_layers"] * config.lora.lora_r * sum(sum(pair) for pair in known)


def estimate(
    shape: dict[str, int],
    config: UnlearnConfig,
    lengths: Sequence[int],
    *,
    load_in_4bit: bool,
    weight_bytes: int,
    on_gpu: bool,
) -> MemoryEstimate:
    """Peak memory of training, from the shape of the base and the lengths of the rows.

    Args:
        shape: see `read_shape`.
        config: LoRA shape, micro-batch size and checkpointing.
        lengths: tokens of the rows; the longest decide the padded micro-batch.
        load_in_4bit: nf4 projections; embeddings and head stay as they are.
        weight_bytes: bytes of an unquantised weight (2 for bf16, 4 for float32).
        on_gpu: adds context and workspace.
    """
    h, layers, vocabulary = shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]
    linear = layers * sum(a * b for a, b in projections(shape).values())
    embedding = vocabulary * h * (1 if shape["tied"] else 2)
    rows = 2 * config.train.per_device_train_batch_size
    longest = min(max(lengths, default=1), config.train.max_length)
    tokens = rows * longest
    per_layer = ACTIVATION_HIDDEN * h + ACTIVATION_INTERMEDIATE * shape["intermediate_size"]
    scale = weight_bytes / 2
    saved = tokens * layers * per_layer * scale
    if config.train.gradient_checkpointing:
        saved = tokens * scale * (layers * CHECKPOINT_HIDDEN * h + per_layer)
    terms = {
        "weights": linear * (NF4_BYTES if load_in_4bit else weight_bytes)
        + embedding * weight_bytes,
        "adapter_and_optimizer": float(ADAPTER_BYTES * lora_parameters(shape, config)),
        "activations": saved,
        # Logits of the answer positions, their float32 copy and its gradient.
        "logits": tokens * vocabulary * (weight_bytes + 8.0),
    }
    if on_gpu:
        terms["context_and_workspace"] = GPU_OVERHEAD
    return MemoryEstimate(terms)
