"""How much memory a forget run will take, by formula, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from unlearner.config import UnlearnConfig, streams_of

GIB = 1024**3
# nf4 with double quantisation, measured on 7B: 4.127 bits a weight.
NF4_BYTES = 4.127 / 8
# float32 weight, gradient and two AdamW moments.
ADAPTER_BYTES = 16
# Saved for backward, bytes a token and layer, fitted to counts on 7B shapes (208 kB for float32
# adapters under autocast): 29.3 per hidden unit and 8 per intermediate unit.
ACTIVATION_HIDDEN, ACTIVATION_INTERMEDIATE = 29.3, 8.0
CHECKPOINT_HIDDEN = 2.0
# Rows of logits that exist at once: `training.likelihood.CHUNK`, which needs torch to import.
CHUNK = 512
# CUDA context and cuBLAS workspace, from published runs; never measured by us.
CONTEXT = (0.35 * GIB, 0.9 * GIB)
# What formulas miss: allocator rounding, layout, kernels' own buffers.
SLACK = 0.15
# From most to least memory, and from fastest to slowest.
CHECKPOINTING = ("off", "4", "3", "2", "all")

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
# config.json of meta-llama/Llama-3.2-1B-Instruct and -3B-Instruct.
LLAMA32_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "vocab_size": 128256,
    "attention_size": 2048,
    "key_value_size": 512,
    "tied": 1,
}
LLAMA32_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "vocab_size": 128256,
    "attention_size": 3072,
    "key_value_size": 1024,
    "tied": 1,
}
LONGEST_TOFU_ROW = 164


@dataclass(frozen=True)
class Holding:
    """How the base is held.

    Attributes:
        load_in_4bit: nf4 projections; embeddings and head stay as they are.
        weight_bytes: bytes of an unquantised weight (2 for bf16, 4 for float32).
        on_gpu: adds context and workspace.
    """

    load_in_4bit: bool
    weight_bytes: int
    on_gpu: bool


@dataclass(frozen=True)
class MemoryEstimate:
    """Terms of the peak, each with its low and high end in bytes."""

    terms: dict[str, tuple[float, float]]

    @property
    def low(self) -> float:
        """Sum of the low ends."""
        return sum(low for low, _ in self.terms.values())

    @property
    def high(self) -> float:
        """Sum of the high ends."""
        return sum(high for _, high in self.terms.values())

    def to_json(self) -> dict[str, Any]:
        """Bytes by term and range, marked as an estimate."""
        return {
            "kind": "estimate",
            "terms_bytes": {
                name: [round(low), round(high)] for name, (low, high) in self.terms.items()
            },
            "low_bytes": round(self.low),
            "high_bytes": round(self.high),
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


def projections(shape: Mapping[str, int]) -> dict[str, tuple[int, int]]:
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


def lora_parameters(shape: Mapping[str, int], config: UnlearnConfig) -> int:
    """Trainable weights of the adapter: `r * (inputs + outputs)` a projection and layer."""
    return _low_rank(shape, config.lora.lora_r, config.lora.target_modules)


def attacker_parameters(shape: Mapping[str, int], config: UnlearnConfig) -> int:
    """Weights of the simulated attacker, which stands beside all seven projections; 0 without."""
    rank = config.train.attack_rank if config.objective.attack_weight else 0
    return _low_rank(shape, rank, tuple(projections(shape)))


def _low_rank(shape: Mapping[str, int], rank: int, modules: Sequence[str]) -> int:
    sizes = projections(shape)
    known = [sizes[name] for name in modules if name in sizes]
    return shape["num_hidden_layers"] * rank * sum(sum(pair) for pair in known)


def tokens_of_a_batch(
    config: UnlearnConfig, lengths: Sequence[int], n_forget: int
) -> tuple[int, int]:
    """Tokens of a packed micro-batch: of average rows, and of the longest there are."""
    train = config.train
    # At least two: guard rows may stand in the place of retain rows.
    streams = max(2, len(streams_of(config.objective)))
    rows = streams * min(train.per_device_train_batch_size, train.batch_size(n_forget))
    cut = sorted((min(length, train.max_length) for length in lengths), reverse=True) or [1]
    longest = sum(cut[:rows]) + max(0, rows - len(cut)) * cut[0]
    return round(rows * sum(cut) / len(cut)), longest


def saved_bytes(shape: Mapping[str, int], tokens: float, setting: str, weight_bytes: int) -> float:
    """Bytes kept for backward by `tokens` tokens under a checkpointing setting.

    A checkpointed layer keeps its input alone; one layer at a time is whole while it is computed
    again.
    """
    h, layers = shape["hidden_size"], shape["num_hidden_layers"]
    scale = weight_bytes / 2
    whole = (ACTIVATION_HIDDEN * h + ACTIVATION_INTERMEDIATE * shape["intermediate_size"]) * scale
    if setting in ("off", "auto"):
        return tokens * layers * whole
    every = 1 if setting == "all" else int(setting)
    checkpointed = -(-layers // every)
    kept = checkpointed * CHECKPOINT_HIDDEN * h * scale + (layers - checkpointed) * whole
    return tokens * (kept + whole)


def estimate(
    shape: Mapping[str, int],
    config: UnlearnConfig,
    lengths: Sequence[int],
    holding: Holding,
    n_forget: int | None = None,
) -> MemoryEstimate:
    """Peak memory of training, from the shape of the base and the lengths of the rows.

    Args:
        shape: see `read_shape`.
        config: LoRA shape, micro-batch size and checkpointing.
        lengths: tokens of the rows.
        holding: how the base is held.
        n_forget: forget rows; a step has no more pairs than these.
    """
    h, vocabulary = shape["hidden_size"], shape["vocab_size"]
    sizes = projections(shape).values()
    linear = shape["num_hidden_layers"] * sum(a * b for a, b in sizes)
    embedding = vocabulary * h * (1 if shape["tied"] else 2)
    per_weight = NF4_BYTES if holding.load_in_4bit else holding.weight_bytes
    weights = linear * per_weight + embedding * holding.weight_bytes
    adapter = float(ADAPTER_BYTES * lora_parameters(shape, config))
    attacker = float(ADAPTER_BYTES * attacker_parameters(shape, config))
    usual, longest = tokens_of_a_batch(config, lengths, n_forget or len(lengths))
    setting, width = config.train.gradient_checkpointing, holding.weight_bytes
    # Logits of a chunk of answer positions, their float32 copy, its softmax and gradient.
    chunk = vocabulary * (width + 12.0)
    terms = {
        "weights": (weights, weights * 1.02),
        "adapter_and_optimizer": (adapter, adapter),
        "activations": (
            saved_bytes(shape, usual, setting, width),
            saved_bytes(shape, longest, setting, width) * (1 + SLACK),
        ),
        "logits": (min(CHUNK, 0.6 * usual) * chunk * 0.8, min(CHUNK, longest) * chunk),
    }
    if attacker:
        terms["attacker"] = (attacker, attacker)
    # A projection is put back together for its product, and again for its gradient.
    largest = max(a * b for a, b in sizes)
    buffers = 2.0 * largest * width if holding.load_in_4bit else 0.0
    if holding.on_gpu or buffers:
        terms["workspace"] = (buffers, 2 * buffers + (0.1 * GIB if holding.on_gpu else 0.0))
    if holding.on_gpu:
        terms["context"] = CONTEXT
    return MemoryEstimate(terms)


def choose_checkpointing(
    shape: Mapping[str, int],
    config: UnlearnConfig,
    lengths: Sequence[int],
    holding: Holding,
    budget: float,
    n_forget: int | None = None,
) -> str:
    """The fastest setting whose high estimate stays within `budget` bytes, else "all"."""
    for setting in CHECKPOINTING:
        tried = with_train(config, gradient_checkpointing=setting)
        if estimate(shape, tried, lengths, holding, n_forget).high <= budget:
            return setting
    return "all"


def with_train(config: UnlearnConfig, **settings: Any) -> UnlearnConfig:
    """The configuration with other training settings."""
    return replace(config, train=replace(config.train, **settings))


@dataclass(frozen=True)
class Change:
    """A configuration that is estimated to fit, and the flags that lead there."""

    flags: tuple[str, ...]
    config: UnlearnConfig
    holding: Holding
    high: float


def smallest_change(
    shape: Mapping[str, int],
    config: UnlearnConfig,
    lengths: Sequence[int],
    holding: Holding,
    budget: float,
    *,
    n_forget: int | None = None,
    factor: float = 1.0,
) -> Change | None:
    """The least that makes a run fit into `budget` bytes by the estimate, or None.

    In this order, each kept when the next is needed too: what costs only time (checkpointing, a
    step in more parts), then what changes what is trained on (4 bit, a smaller attacker), then the
    adapter itself.

    Args:
        shape: see `read_shape`.
        config: the settings that do not fit.
        lengths: tokens of the rows.
        holding: how the base is held.
        budget: bytes there are.
        n_forget: forget rows.
        factor: measured over estimated peak, where there is a measurement.
    """
    flags: dict[str, str] = {}

    def now() -> Change | None:
        high = estimate(shape, config, lengths, holding, n_forget).high * factor
        said = tuple(f"{name} {value}".strip() for name, value in flags.items())
        return Change(said, config, holding, high) if high <= budget else None

    current = config.train.gradient_checkpointing
    order = CHECKPOINTING if current == "auto" else CHECKPOINTING[CHECKPOINTING.index(current) :]
    for setting in order:
        if setting != current:
            flags["--gradient-checkpointing"] = setting
        config = with_train(config, gradient_checkpointing=setting)
        if flags and (found := now()):
            return found
    while (pairs := config.train.per_device_train_batch_size) > 1:
        steps = config.train.gradient_accumulation_steps * pairs
        pairs //= 2
        config = with_train(
            config,
            per_device_train_batch_size=pairs,
            gradient_accumulation_steps=-(-steps // pairs),
        )
        flags["--per-device-train-batch-size"] = str(pairs)
        flags["--gradient-accumulation-steps"] = str(config.train.gradient_accumulation_steps)
        if found := now():
            return found
    if not holding.load_in_4bit:
        holding = replace(holding, load_in_4bit=True)
        flags["--load-in-4bit"] = ""
        if found := now():
            return found
    while config.objective.attack_weight and config.train.attack_rank > 4:
        config = with_train(config, attack_rank=config.train.attack_rank // 2)
        flags["--attack-rank"] = str(config.train.attack_rank)
        if found := now():
            return found
    while config.lora.lora_r > 4:
        config = replace(config, lora=replace(config.lora, lora_r=config.lora.lora_r // 2))
        flags["--lora-r"] = str(config.lora.lora_r)
        if found := now():
            return found
    return None
