from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest

from adapters.errors import UserError
from unlearner.config import (
    TARGET_MODULES,
    LoraShape,
    ObjectiveConfig,
    TrainConfig,
    UnlearnConfig,
    default_objective,
    make_config,
)
from unlearner.objectives.registry import OBJECTIVES


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_brings_its_published_constants(name: str) -> None:
    config = make_config(name)
    assert config.objective == default_objective(name)
    assert (config.lora, config.train) == (LoraShape(), TrainConfig())


def test_overrides_land_in_their_part_and_none_is_the_default() -> None:
    config = make_config(
        "npo", beta=0.5, lora_r=4, learning_rate=1e-3, seed=0, gamma=None, max_grad_norm=0.0
    )
    assert config.objective == ObjectiveConfig("npo", beta=0.5, retain_weight=1.0)
    assert config.lora == LoraShape(lora_r=4)
    assert config.train == TrainConfig(learning_rate=1e-3, seed=0)
    with pytest.raises(TypeError, match="no such setting: lorar"):
        make_config(lorar=4)


def test_the_names_of_settings_are_unique_across_the_parts() -> None:
    names = [f.name for part in (ObjectiveConfig, LoraShape, TrainConfig) for f in fields(part)]
    assert len(set(names)) == len(names)


def test_an_unknown_objective_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="no objective 'simpo'") as error:
        make_config("simpo")
    assert "'simnpo'" in error.value.fix


def test_all_settings_that_cannot_be_used_are_named_at_once() -> None:
    bad = {
        "beta": 0.0,
        "beta2": -1.0,
        "rmu_layer": -2,
        "rmu_coefficient": 0.0,
        "ceu_skip": -1,
        "forget_weight": -1.0,
        "retain_weight": -0.5,
        "alternate_smoothing": 1.0,
        "attack_weight": -1.0,
        "attack_steps": 0,
        "attack_rate": -0.1,
        "attack_rank": 0,
        "lora_r": 0,
        "lora_alpha": 0,
        "lora_dropout": 1.0,
        "target_modules": (),
        "learning_rate": 0.0,
        "num_train_epochs": 0,
        "per_device_train_batch_size": 0,
        "warmup_ratio": 1.5,
        "weight_decay": -0.1,
        "max_grad_norm": -1.0,
        "max_length": 7,
    }
    with pytest.raises(UserError) as error:
        make_config(**bad)
    assert [name for name in bad if name not in error.value.problem] == []
    assert error.value.problem.count(";") == len(bad) - 1
    assert error.value.exit_code == 2


def test_only_the_seven_projections_are_adapted_each_once() -> None:
    assert make_config(target_modules=("v_proj", "q_proj")).lora.target_modules[0] == "v_proj"
    with pytest.raises(UserError, match="target_modules q_proj,lm_head go beyond q_proj,k_proj"):
        make_config(target_modules=("q_proj", "lm_head"))
    with pytest.raises(UserError, match="twice"):
        make_config(target_modules=("q_proj", "q_proj"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["beta", "gamma", "retain_weight", "learning_rate", "weight_decay"]
)
def test_a_setting_is_a_finite_number(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        make_config(**{name: value})


def test_a_configuration_is_plain_json() -> None:
    config = make_config("dpo", lora_r=3)
    told = json.loads(json.dumps(config.to_json()))
    assert told["objective"]["name"] == "dpo"
    assert told["lora"] == {
        "lora_r": 3,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": list(TARGET_MODULES),
    }
    assert told["train"]["learning_rate"] == TrainConfig().learning_rate
    assert UnlearnConfig() == make_config()
