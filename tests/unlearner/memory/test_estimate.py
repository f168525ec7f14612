from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from unlearner.config import LoraShape, UnlearnConfig, make_config
from unlearner.memory.estimate import (
    CHECKPOINTING,
    CHUNK,
    GIB,
    LLAMA2_7B,
    Holding,
    choose_checkpointing,
    estimate,
    lora_parameters,
    projections,
    read_shape,
    saved_bytes,
    smallest_change,
    tokens_of_a_batch,
    with_train,
)  # fmt: skip
from unlearner.memory.probe import advice


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


NF4, BF16 = Holding(True, 2, True), Holding(False, 2, True)


def gib(
    shape: dict[str, int], term: str, config: UnlearnConfig, holding: Holding = NF4
) -> tuple[float, float]:
    """Both ends of a term in GiB, for rows of 69 tokens."""
    low, high = estimate(shape, config, [69], holding, 200).terms[term]
    return low / GIB, high / GIB


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
    held = Holding(load_in_4bit=False, weight_bytes=4, on_gpu=False)
    weights = estimate(shape, make_config(), [1], held).terms["weights"][0]
    # The norms are all that is left out.
    assert weights == 4 * sum(p.numel() for p in model.parameters() if p.ndim == 2)


def test_weights_of_7b_in_nf4_and_bf16(seven_b: dict[str, int]) -> None:
    assert seven_b == LLAMA2_7B
    config = make_config()
    assert gib(seven_b, "weights", config)[0] == pytest.approx(3.60, abs=0.01)
    assert gib(seven_b, "weights", config, BF16)[0] == pytest.approx(12.55, abs=0.01)


@pytest.mark.parametrize(("rank", "expected"), [(8, 0.30), (16, 0.60), (32, 1.19), (64, 2.38)])
def test_adapter_and_optimizer_of_7b(rank: int, expected: float, seven_b: dict[str, int]) -> None:
    config = make_config(lora_r=rank)
    assert gib(seven_b, "adapter_and_optimizer", config)[0] == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("pairs", "plain", "checkpointed"), [(1, 0.86, 0.06), (8, 6.8, 0.48), (16, 13.7, 0.97)]
)
def test_activations_of_7b_are_as_counted(
    pairs: int, plain: float, checkpointed: float, seven_b: dict[str, int]
) -> None:
    config = make_config(per_device_train_batch_size=pairs, gradient_checkpointing="off")
    saved = make_config(per_device_train_batch_size=pairs, gradient_checkpointing="all")
    # Rows of 69 tokens: 138, 1,104 and 2,208 tokens a micro-batch.
    assert gib(seven_b, "activations", config)[0] == pytest.approx(plain, rel=0.02)
    assert gib(seven_b, "activations", saved)[0] == pytest.approx(checkpointed, rel=0.08)


def test_the_sums_of_the_notes_lie_within_the_range(seven_b: dict[str, int]) -> None:
    for setting, pairs, total in (("all", 16, 5.9), ("off", 16, 18.7), ("all", 8, 5.5)):
        config = make_config(per_device_train_batch_size=pairs, gradient_checkpointing=setting)
        told = estimate(seven_b, config, [69], NF4, 200).to_json()
        assert told["kind"] == "estimate"
        assert told["low_bytes"] < total * GIB < told["high_bytes"], (setting, pairs)
        ends = [sum(ends) for ends in zip(*told["terms_bytes"].values(), strict=True)]
        assert ends == pytest.approx([told["low_bytes"], told["high_bytes"]], abs=5)


def test_logits_stop_growing_at_a_chunk(seven_b: dict[str, int]) -> None:
    def high(tokens: int) -> float:
        config = make_config(per_device_train_batch_size=1)
        return estimate(seven_b, config, [tokens], NF4, 1).terms["logits"][1]

    assert high(200) == 2 * high(100)
    assert high(100) < high(400) == high(500000) == CHUNK * 32000 * 14


def test_tokens_of_a_batch_are_the_average_and_the_longest() -> None:
    config = make_config(per_device_train_batch_size=2, max_length=50)
    assert tokens_of_a_batch(config, [10, 20, 30, 40, 90], 5) == (120, 140)
    # No more pairs than there are forget rows.
    assert tokens_of_a_batch(config, [10, 20], 1) == (30, 30)


def test_every_nth_layer_lies_between_all_and_none(seven_b: dict[str, int]) -> None:
    found = [saved_bytes(seven_b, 1000, setting, 2) for setting in CHECKPOINTING]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)
    # Half of the layers whole, and the one that is computed again.
    assert found[-2] / found[0] == pytest.approx((17 * 208 + 16 * 8) / (32 * 208), rel=0.01)


def test_checkpointing_is_chosen_by_what_fits(seven_b: dict[str, int]) -> None:
    config = make_config(per_device_train_batch_size=16)
    chosen = {
        card: choose_checkpointing(seven_b, config, [69] * 400, NF4, card * GIB, 200)
        for card in (80, 24, 12, 8, 2)
    }
    assert chosen[80] == chosen[24] == "off"
    assert chosen[8] == chosen[2] == "all"
    assert chosen[12] in ("4", "3", "2", "all")


def test_the_smallest_change_is_what_costs_least(seven_b: dict[str, int]) -> None:
    lengths = [69] * 400

    def flags(held: Holding, budget: float, **settings: Any) -> list[str] | None:
        config = make_config(per_device_train_batch_size=16, **settings)
        found = smallest_change(seven_b, config, lengths, held, budget * GIB, n_forget=200)
        if found is None:
            return None
        # What is told fits by the estimate.
        assert found.high <= budget * GIB
        assert estimate(seven_b, found.config, lengths, found.holding, 200).high == found.high
        return list(found.flags)

    assert flags(NF4, 7.5, gradient_checkpointing="off") == ["--gradient-checkpointing all"]
    divided = flags(NF4, 6.3, gradient_checkpointing="all")
    assert divided == ["--per-device-train-batch-size 4", "--gradient-accumulation-steps 16"]
    assert "--load-in-4bit" in (flags(BF16, 7.0) or [])
    assert (flags(NF4, 5.6, lora_r=64) or [""])[-1].startswith("--lora-r")
    assert flags(NF4, 3.0) is None
    # The attacker is made smaller before the adapter is.
    attacked = {"attack_weight": 1.0, "attack_rank": 128, "lora_r": 64}
    smaller = flags(NF4, 7.7, **attacked) or [""]
    assert smaller[-1].startswith("--attack-rank")
    assert not any(flag.startswith("--lora-r") for flag in smaller)


def test_a_step_keeps_its_pairs_when_it_is_cut_smaller(seven_b: dict[str, int]) -> None:
    config = make_config(per_device_train_batch_size=16, gradient_checkpointing="all")
    found = smallest_change(seven_b, config, [69] * 400, NF4, 6.3 * GIB, n_forget=200)
    assert found is not None
    assert found.config.train.batch_size(200) == config.train.batch_size(200) == 64
    assert with_train(config, seed=3).train.seed == 3


def test_a_stopped_run_goes_on_only_where_its_result_stays(seven_b: dict[str, int]) -> None:
    def said(held: Holding, budget: float, **settings: Any) -> str:
        config = make_config(per_device_train_batch_size=16, **settings)
        return advice(seven_b, config, [69] * 400, held, budget * GIB, 200, resume=True)

    for goes_on in (said(NF4, 7.5), said(NF4, 6.3, gradient_checkpointing="all"), said(NF4, 3.0)):
        assert goes_on.endswith("With --resume the run goes on where it stopped.")
    for another in (said(BF16, 7.0), said(NF4, 5.6, lora_r=64)):
        assert another.endswith("That is another run: it begins anew.")


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
