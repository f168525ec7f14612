"""The memory plan: counts of real models, the range of the notes, the smallest change that fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from unlearner.config import LoraShape, UnlearnConfig, make_config
from unlearner.memory.plan import (
    CHECKPOINTING,
    CHUNK,
    GIB,
    LLAMA2_7B,
    BasePrecision,
    MemoryPlan,
    read_shape,
)

NF4, BF16 = BasePrecision(True, 2, True), BasePrecision(False, 2, True)
FLOAT32 = BasePrecision(False, 4, False)


def seven_b(
    config: UnlearnConfig, precision: BasePrecision = NF4, lengths: Any = (69,), n: int = 200
) -> MemoryPlan:
    """Llama-2-7b with rows of 69 tokens, as TOFU has them on average."""
    return MemoryPlan(LLAMA2_7B, config, precision, lengths, n)


def gib(term: str, config: UnlearnConfig, precision: BasePrecision = NF4) -> tuple[float, float]:
    """Both ends of a term in GiB."""
    low, high = seven_b(config, precision).estimate().terms[term]
    return low / GIB, high / GIB


def test_the_shape_of_7b_is_that_of_its_config(tmp_path: Path) -> None:
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
    assert read_shape(tmp_path) == LLAMA2_7B


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 2, "head_dim": 8}),
        ("qwen3", {"head_dim": 16}),
        ("phi3", {"pad_token_id": 0}),
        ("gemma2", {"head_dim": 16}),
        ("phi", {}),
    ],
)
def test_the_weights_of_any_family_are_counted_as_they_are(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Fused projections, other names and tied heads; nothing is allocated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **{**sizes, **settings})
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    assert shape.linear_weights + shape.other == sum(p.numel() for p in model.parameters())
    assert shape.layers == 3
    linear = {n.rsplit(".", 1)[-1] for n, m in model.model.layers.named_modules()
              if type(m).__name__ == "Linear"}  # fmt: skip
    assert set(shape.linear) == linear
    assert shape.plain_head == (family != "gemma2")


def test_sizes_in_a_nested_text_config_are_read(tmp_path: Path) -> None:
    """An estimate must not refuse a run because a model is described in two levels."""
    from transformers import AutoConfig

    text = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    AutoConfig.for_model("gemma3", text_config=text, vision_config=vision).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert (shape.layers, shape.hidden_size, shape.vocab_size) == (2, 64, 128)
    assert {"q_proj", "down_proj"} <= set(shape.linear)


def test_adapter_parameters_are_the_real_count(tiny_base: Path, fresh_model: Any) -> None:
    for lora in (LoraShape(3, 6), LoraShape(5, 5, target_modules=("q_proj", "down_proj"))):
        real = sum(p.numel() for p in fresh_model(lora).parameters() if p.requires_grad)
        config = replace(make_config(), lora=lora)
        plan = MemoryPlan(read_shape(tiny_base), config, FLOAT32, [1], 1)
        assert plan.adapter_parameters == real > 0


def test_weights_of_7b_in_nf4_and_bf16() -> None:
    assert gib("weights", make_config())[0] == pytest.approx(3.60, abs=0.01)
    assert gib("weights", make_config(), BF16)[0] == pytest.approx(12.55, abs=0.01)


@pytest.mark.parametrize(("rank", "expected"), [(8, 0.30), (16, 0.60), (32, 1.19), (64, 2.38)])
def test_adapter_and_optimizer_of_7b(rank: int, expected: float) -> None:
    config = make_config(lora_r=rank)
    assert gib("adapter_and_optimizer", config)[0] == pytest.approx(expected, abs=0.006)


def test_the_optimizer_counts_what_it_keeps() -> None:
    sizes = [
        gib("adapter_and_optimizer", make_config(optim=name))[0]
        for name in ("adamw_torch", "paged_adamw_32bit", "adamw_8bit", "sgd")
    ]
    assert sizes[0] == sizes[1] == pytest.approx(1.6 * sizes[2]) == pytest.approx(2 * sizes[3])


@pytest.mark.parametrize(
    ("pairs", "plain", "checkpointed"), [(1, 0.86, 0.06), (8, 6.8, 0.48), (16, 13.7, 0.97)]
)
def test_activations_of_7b_are_as_counted(pairs: int, plain: float, checkpointed: float) -> None:
    config = make_config(per_device_train_batch_size=pairs, gradient_checkpointing="off")
    saved = make_config(per_device_train_batch_size=pairs, gradient_checkpointing="all")
    # Rows of 69 tokens: 138, 1,104 and 2,208 tokens a micro-batch.
    assert gib("activations", config)[0] == pytest.approx(plain, rel=0.02)
    assert gib("activations", saved)[0] == pytest.approx(checkpointed, rel=0.08)


def test_the_sums_of_the_notes_are_within_the_range() -> None:
    for setting, pairs, total in (("all", 16, 5.9), ("off", 16, 18.7), ("all", 8, 5.5)):
        config = make_config(per_device_train_batch_size=pairs, gradient_checkpointing=setting)
        estimate = seven_b(config).estimate().to_json()
        assert estimate["kind"] == "estimate"
        assert estimate["low_bytes"] < total * GIB < estimate["high_bytes"], (setting, pairs)
        ends = [sum(ends) for ends in zip(*estimate["terms_bytes"].values(), strict=True)]
        expected = [estimate["low_bytes"], estimate["high_bytes"]]
        assert ends == pytest.approx(expected, abs=5)


def test_logits_stop_growing_at_a_chunk_unless_the_head_is_not_plain() -> None:
    config = make_config(per_device_train_batch_size=1)

    def high(tokens: int, **shape: Any) -> float:
        plan = seven_b(config, lengths=[tokens], n=1)
        plan = replace(plan, shape=replace(plan.shape, **shape))
        return plan.estimate().terms["logits"][1]

    assert high(200) == 2 * high(100)
    assert high(100) < high(400) == high(500000) == CHUNK * 32000 * 14
    assert high(400, plain_head=False) == 800 * 32000 * 14


def test_tokens_per_batch_are_the_average_and_the_longest() -> None:
    config = make_config(per_device_train_batch_size=2, max_length=50)
    assert seven_b(config, lengths=[10, 20, 30, 40, 90], n=5).tokens_per_batch() == (120, 140)
    # No more pairs than there are forget rows.
    assert seven_b(config, lengths=[10, 20], n=1).tokens_per_batch() == (30, 30)
    general = make_config(per_device_train_batch_size=1, general_weight=1.0)
    assert seven_b(general, lengths=[10, 20, 30], n=5).tokens_per_batch() == (60, 60)


def test_every_nth_layer_is_between_all_and_none() -> None:
    found = [
        seven_b(make_config(gradient_checkpointing=setting)).saved_bytes(1000)
        for setting in CHECKPOINTING
    ]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)
    # Half of the layers whole, and the one that is computed again.
    assert found[-2] / found[0] == pytest.approx((17 * 208 + 16 * 8) / (32 * 208), rel=0.01)


def test_checkpointing_is_chosen_by_what_fits() -> None:
    plan = seven_b(make_config(per_device_train_batch_size=16), lengths=[69] * 400)
    chosen = {card: plan.choose_checkpointing(card * GIB) for card in (80, 24, 12, 8, 2)}
    assert chosen[80] == chosen[24] == "off"
    assert chosen[8] == chosen[2] == "all"
    assert chosen[12] in ("4", "3", "2", "all")


def flags(precision: BasePrecision, budget: float, **settings: Any) -> list[str] | None:
    config = make_config(per_device_train_batch_size=16, **settings)
    change = seven_b(config, precision, [69] * 400).smallest_change(budget * GIB)
    if change is None:
        return None
    # What is advised fits by the estimate.
    assert change.high == change.plan.estimate().high <= budget * GIB
    return list(change.flags)


def test_the_smallest_change_is_what_costs_least() -> None:
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


@pytest.mark.parametrize("setting", ["auto", "off", "all", "2", "3", "4", "8", "31"])
def test_every_checkpointing_setting_can_be_advised_on(setting: str) -> None:
    """An interval that is not in the list ended in a ValueError in place of the advice."""
    found = flags(NF4, 6.3, gradient_checkpointing=setting)
    assert found is not None
    assert found[-1].startswith(("--gradient", "--per-device"))


def test_a_step_keeps_its_pairs_when_it_is_divided_further() -> None:
    config = make_config(per_device_train_batch_size=16, gradient_checkpointing="all")
    change = seven_b(config, lengths=[69] * 400).smallest_change(6.3 * GIB)
    assert change is not None
    assert change.plan.config.train.batch_size(200) == config.train.batch_size(200) == 64
    assert seven_b(config).with_train(seed=3).config.train.seed == 3


def test_a_stopped_run_continues_only_where_its_result_is_the_same() -> None:
    def advice(precision: BasePrecision, budget: float, **settings: Any) -> str:
        config = make_config(per_device_train_batch_size=16, **settings)
        return seven_b(config, precision, [69] * 400).advice(budget * GIB, resume=True)

    same = [advice(NF4, 7.5), advice(NF4, 6.3, gradient_checkpointing="all"), advice(NF4, 3.0)]
    for text in same:
        assert text.endswith("With --resume the run continues where it stopped.")
    for text in (advice(BF16, 7.0), advice(NF4, 5.6, lora_r=64)):
        assert text.endswith("training restarts from step 0.")


@pytest.mark.parametrize("config", [None, {"hidden_size": 64, "vocab_size": 9}])
def test_a_folder_without_a_model_configuration(config: Any, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no config\.json that transformers can use"):
        read_shape(tmp_path)
