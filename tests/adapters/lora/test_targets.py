"""Which layers an adapter targets on models of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from adapters.errors import UserError
from adapters.lora.targets import check_coverage, default_targets
from tests.families import FAMILIES, LLAMA, make_gpt2, make_model
from unlearner.memory.plan import meta_model


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_are_the_linear_layers_of_the_blocks(family: str) -> None:
    model = make_model(family)
    assert default_targets(model) == FAMILIES[family][2]
    check_coverage(model, default_targets(model))


@pytest.mark.parametrize("family", ["phi", "phi3", "mixtral", "olmoe"])
def test_targets_of_a_llama_do_not_fit_everywhere(family: str) -> None:
    with pytest.raises(UserError, match="gate_proj") as caught:
        check_coverage(make_model(family), LLAMA)
    assert ",".join(FAMILIES[family][2]) in caught.value.fix


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["q_proj", "lm_head"], "lm_head is also outside"),
        (["q_proj", "query"], "no linear layer query"),
        (["gate"], "gate is a router or an embedding"),
        ([], "there are none"),
    ],
)
def test_targets_that_cannot_be_covered(targets: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_coverage(make_model("llama"), targets)


def test_a_layer_that_some_blocks_lack_is_no_target() -> None:
    model = make_model("llama")
    del model.model.layers[1].mlp.up_proj
    assert "up_proj" not in default_targets(model)
    with pytest.raises(UserError, match="only 1 of the blocks have up_proj"):
        check_coverage(model, LLAMA)


def test_gpt2_is_refused_with_the_reason() -> None:
    for refused in (default_targets, lambda model: check_coverage(model, ["c_attn"])):
        with pytest.raises(UserError, match="Conv1D"):
            refused(make_gpt2())


def test_targets_are_found_below_adapters_too() -> None:
    from peft import LoraConfig

    from adapters.lora.peft_layers import wrap

    model: Any = make_model("phi3")
    wrapped = wrap(model, "a", LoraConfig(r=2, target_modules=["qkv_proj"]))
    assert default_targets(wrapped) == FAMILIES["phi3"][2]


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_a_head_of_its_own_must_be_in_the_files(family: str, tmp_path: Path) -> None:
    """The loader would fill one that is missing with random numbers; the config decides."""
    make_model(family).save_pretrained(tmp_path)
    model = meta_model(tmp_path)
    targets, tied = default_targets(model), model.config.tie_word_embeddings
    check_coverage(model, targets)
    weights = load_file(tmp_path / "model.safetensors")
    left = {name: value for name, value in weights.items() if "lm_head" not in name}
    save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
    if tied:
        check_coverage(model, targets)
        return
    with pytest.raises(UserError, match="holds no lm_head"):
        check_coverage(model, targets)
