"""Which layers an adapter targets on models of every family."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.errors import UserError
from adapters.lora.targets import check_coverage, default_targets
from tests.families import FAMILIES, LLAMA, make_gpt2, make_model


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
