from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from unlearner.config import LoraShape, UnlearnConfig, make_config
from unlearner.memory import GIB, LLAMA2_7B, estimate, lora_parameters, projections, read_shape


@pytest.fixture
def seven_b(tmp_path: Path) -> dict[str, int]:
    """Llama-2-7b, from the config.json that its hub page shows."""
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_shape(tmp_path)


def gib(
    shape: dict[str, int], term: str, config: UnlearnConfig, tokens: int = 69, **options: Any
) -> float:
    """One term, in GiB, of a micro-batch with rows of `tokens` tokens."""
    chosen = {"load_in_4bit": True, "weight_bytes": 2, "on_gpu": True, **options}
    return estimate(shape, config, [tokens, 3], **chosen).terms[term] / GIB


def test_lora_parameters_are_the_real_count(tiny_base: Path, fresh_model: Any) -> None:
    for shape in (LoraShape(3, 6), LoraShape(5, 5, target_modules=("q_proj", "down_proj"))):
        model = fresh_model(shape)
        real = sum(p.numel() for p in model.parameters() if p.requires_grad)
        config = replace(make_config(), lora=shape)
        assert lora_parameters(read_shape(tiny_base), config) == real > 0


def test_grouped_heads_and_ties_are_counted(
    make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_llama(
        tmp_path / "m", layers=1, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True
    )
    shape = read_shape(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[0]
    real = {
        name.rsplit(".", 1)[-1]: (module.in_features, module.out_features)
        for name, module in layer.named_modules()
        if hasattr(module, "in_features")
    }
    assert projections(shape) == real
    assert real["k_proj"] == (64, 16)
    weights = estimate(
        shape, make_config(), [1], load_in_4bit=False, weight_bytes=4, on_gpu=False
    ).terms["weights"]
    # The norms are all that is left out.
    assert weights == 4 * sum(p.numel() for p in model.parameters() if p.ndim == 2)


def test_weights_of_7b_in_nf4_and_bf16(seven_b: dict[str, int]) -> None:
    assert seven_b == LLAMA2_7B
    config = make_config()
    assert gib(seven_b, "weights", config) == pytest.approx(3.60, abs=0.01)
    assert gib(seven_b, "weights", config, load_in_4bit=False) == pytest.approx(12.55, abs=0.01)


@pytest.mark.parametrize(("rank", "expected"), [(8, 0.30), (16, 0.60), (32, 1.19), (64, 2.38)])
def test_adapter_and_optimizer_of_7b(rank: int, expected: float, seven_b: dict[str, int]) -> None:
    config = make_config(lora_r=rank)
    assert gib(seven_b, "adapter_and_optimizer", config) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("pairs", "plain", "checkpointed"), [(1, 0.86, 0.06), (8, 6.8, 0.48), (16, 13.7, 0.97)]
)
def test_activations_of_7b_are_as_counted(
    pairs: int, plain: float, checkpointed: float, seven_b: dict[str, int]
) -> None:
    config = make_config(per_device_train_batch_size=pairs)
    saved = make_config(per_device_train_batch_size=pairs, gradient_checkpointing=True)
    # Rows of 69 tokens: 138, 1,104 and 2,208 tokens a micro-batch.
    assert gib(seven_b, "activations", config) == pytest.approx(plain, rel=0.02)
    assert gib(seven_b, "activations", saved) == pytest.approx(checkpointed, rel=0.08)


def test_the_measured_sums_lie_within_the_range(seven_b: dict[str, int]) -> None:
    for checkpointing, total in ((True, 5.9), (False, 18.7)):
        config = make_config(per_device_train_batch_size=16, gradient_checkpointing=checkpointing)
        told = estimate(
            seven_b, config, [69], load_in_4bit=True, weight_bytes=2, on_gpu=True
        ).to_json()
        assert told["kind"] == "estimate"
        assert told["low_bytes"] < total * GIB < told["high_bytes"]
        assert told["total_bytes"] == pytest.approx(sum(told["terms_bytes"].values()), abs=5)


def test_the_longest_row_decides_up_to_the_cut(seven_b: dict[str, int]) -> None:
    config = make_config(max_length=200)
    assert gib(seven_b, "logits", config, 200) == 2 * gib(seven_b, "logits", config, 100)
    assert gib(seven_b, "logits", config, 5000) == gib(seven_b, "logits", config, 200)


@pytest.mark.parametrize(
    ("config", "problem"),
    [(None, "no config.json"), ({"hidden_size": 64, "vocab_size": 9}, "intermediate_size, num_h")],
)
def test_a_base_that_does_not_tell_its_sizes(
    config: dict[str, int] | None, problem: str, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=problem):
        read_shape(tmp_path)
