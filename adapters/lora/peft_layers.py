"""Read and switch PEFT's LoRA layers directly, because PEFT's own calls validate nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import BaseMismatch, StoreCorrupt

if TYPE_CHECKING:
    from peft import LoraConfig


def base_folder(model: Any) -> str:
    """Folder or hub id that the bare base was loaded from."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return str(inner.name_or_path)


def lora_layers(model: Any) -> Iterator[Any]:
    """Every LoRA layer of the model."""
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def adapter_parameters(layer: Any, name: str) -> list[Any]:
    """A and B of one adapter in one layer."""
    return [*layer.lora_A[name].parameters(), *layer.lora_B[name].parameters()]


def adapter_tensors(model: Any, name: str) -> dict[str, Any]:
    """The adapter's parameters under the names of its file.

    Not by state_dict(): that walks the whole base, and makes bitsandbytes requantise packed layers.
    """
    infix = f".{name}.weight"
    return {
        key.removesuffix(infix) + ".weight": parameter
        for key, parameter in model.named_parameters()
        if key.endswith((f".lora_A{infix}", f".lora_B{infix}"))
    }


def active_names(model: Any) -> list[str]:
    """Names that act in the forward pass, in order; the layers must agree."""
    found = {
        () if layer.disable_adapters else tuple(layer.active_adapters)
        for layer in lora_layers(model)
    }
    if len(found) > 1:
        raise StoreCorrupt(
            "The layers of the model do not agree on which adapters are active.",
            "Activate the stack again.",
        )
    names = list(next(iter(found), ()))
    if len(set(names)) != len(names):
        raise StoreCorrupt(f"An adapter is active twice: {names}.", "Activate the stack again.")
    return names


def switch(model: Any, names: Sequence[str]) -> None:
    """Make `names` active without gradients, and keep PEFT's own idea of the active one valid."""
    if not hasattr(model, "peft_config"):
        return  # a bare base, and no names: nothing to switch
    for layer in lora_layers(model):
        layer._disable_adapters = False
    model.base_model.set_adapter(list(names), inference_mode=True)
    # PeftModel looks up a config under this name on every forward, also with nothing active.
    model.active_adapter = names[-1] if names else next(iter(model.peft_config))


def inject(model: Any, name: str, config: LoraConfig) -> Any:
    """The PEFT model with a new adapter `name`; what is active is then to be set again."""
    config.base_model_name_or_path = base_folder(model)
    if not hasattr(model, "peft_config"):
        return wrap(model, name, config)
    model.add_adapter(name, config)
    return model


def wrap(model: Any, name: str, config: LoraConfig) -> Any:
    """The PEFT model of a base with a first adapter `name`."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT 0.21 asks the model for a property that transformers 5.23 renamed; both still work.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config, adapter_name=name)


def frozen_config(config: Mapping[str, Any]) -> LoraConfig:
    """PEFT's configuration for an adapter that is not trained: without dropout."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=0.0,
        target_modules=list(config["target_modules"]),
        bias="none",
        inference_mode=True,
    )


def plain_config(config: LoraConfig) -> dict[str, Any]:
    """The configuration as the JSON of a saved adapter would hold it."""
    raw = dict(config.to_dict())
    targets = raw["target_modules"]
    raw["target_modules"] = sorted(targets) if isinstance(targets, (set, list)) else targets
    return {key: getattr(value, "value", value) for key, value in raw.items()}


def check_fits(
    model: Any, tensors: Mapping[str, tuple[int, ...]], targets: Sequence[str], folder: Path
) -> None:
    """Every targeted layer of the base must be filled, and nothing may be left over."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    expected: dict[str, tuple[int, int]] = {}
    for path, module in inner.named_modules():
        if path.rsplit(".", 1)[-1] in targets and hasattr(module, "in_features"):
            key = f"base_model.model.{path}.lora_"
            expected[key + "A.weight"] = (-1, module.in_features)
            expected[key + "B.weight"] = (module.out_features, -1)
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(expected))
    wrong = [
        key
        for key in sorted(set(expected) & set(tensors))
        if any(
            want not in (-1, have) for want, have in zip(expected[key], tensors[key], strict=True)
        )
    ]
    if missing or unexpected or wrong:
        first = (missing + unexpected + wrong)[0]
        raise BaseMismatch(
            f"The adapter in {folder.name} does not fit this base: {len(missing)} tensors missing, "
            f"{len(unexpected)} left over, {len(wrong)} of another shape, first {first}.",
            "Use the base that it was trained on.",
        )


def compare_with_file(model: Any, name: str, tensors: Mapping[str, Any], weights: Path) -> None:
    """Raise StoreCorrupt unless every parameter in memory is the file's tensor."""
    live = adapter_tensors(model, name)
    for key, value in tensors.items():
        if key not in live or not bool((live[key].cpu() == value.to(live[key].dtype)).all()):
            raise StoreCorrupt(
                f"{key} in memory differs from {weights.name} of {weights.parent.name}.",
                "Load the base and the stack again.",
            )
    if set(live) != set(tensors):
        raise StoreCorrupt(
            f"{weights.parent.name} left {len(set(live) - set(tensors))} tensors unfilled.",
            "Load the base and the stack again.",
        )
