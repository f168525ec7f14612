"""Tiny random models of the families that a base may belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
# Family -> (configuration class, settings, targets).
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("LlamaConfig", {}, LLAMA),
    "mistral": ("MistralConfig", {"sliding_window": 4}, LLAMA),
    "qwen2": ("Qwen2Config", {}, LLAMA),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, LLAMA),
    "gemma2": ("Gemma2Config", {"head_dim": 8}, LLAMA),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8}, LLAMA),
    "phi": ("PhiConfig", {}, ("dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj")),
    "phi3": ("Phi3Config", {}, ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}, ATTENTION),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
}


def make_model(family: str, **changes: Any) -> Any:
    """The model with random weights, float32, the same for the same call."""
    import torch
    import transformers

    name, settings, _ = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **settings, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def make_gpt2() -> Any:
    """A GPT-2, whose weights are Conv1D."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def save_model(family: str, folder: Path, **changes: Any) -> Path:
    """The folder with the model's weights and configuration."""
    make_model(family, **changes).save_pretrained(folder)
    return folder
