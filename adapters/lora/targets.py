"""Which linear layers of a model an adapter can cover, and whether a choice of them is covered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.base.weights import stored_matrices
from adapters.errors import UserError
from adapters.lora.format import FORBIDDEN


def default_targets(model: Any) -> tuple[str, ...]:
    """Names of the linear layers that every block of the model has, sorted.

    Embeddings, head and routers are left out. Experts that the model holds as one fused parameter
    are no linear layers and stay frozen. For a Llama these are the seven projections, for Phi
    `dense`, `fc1`, `fc2`, `k_proj`, `q_proj`, `v_proj`.

    Raises:
        UserError: no block has a linear layer (GPT-2's are `Conv1D`).
    """
    layers = _layers_by_name(model)
    every = set().union(*layers.values()) if layers else set()
    names = tuple(sorted(name for name, where in layers.items() if where == every))
    if not names:
        raise UserError(
            f"{_class_name(model)} has no linear layer that an adapter could target{_why(model)}.",
            "Use a model whose attention and MLP are nn.Linear, such as Llama, Qwen, Gemma or Phi.",
        )
    return names


def check_coverage(model: Any, targets: Sequence[str]) -> None:
    """Check that every target names a linear layer in every block, and nothing outside of them.

    PEFT takes a target that matches nothing, or only some layers, without a word; such an adapter
    trains to the end and can then be neither published nor merged. Call it before training.

    Raises:
        UserError: names the targets that do not match and those that would.
    """
    possible = default_targets(model)
    layers = _layers_by_name(model)
    outside = {_last(path) for path in linear_layers(model) if block_of(path) is None}
    problems = []
    for name in dict.fromkeys(targets):
        if name in outside:
            problems.append(f"{name} is also outside of the blocks")
        elif name in FORBIDDEN:
            problems.append(f"{name} is a router or an embedding")
        elif name not in layers:
            problems.append(f"there is no linear layer {name}")
        elif name not in possible:
            problems.append(f"only {len(layers[name])} of the blocks have {name}")
    if not targets:
        problems.append("there are none")
    if problems:
        raise UserError(
            f"The target modules do not fit {_class_name(model)}: {'; '.join(problems)}.",
            f"Use {','.join(possible)}, or some of them.",
        )
    _check_stored_names(model, targets)


def block_of(path: str) -> int | None:
    """Number of the block that a module belongs to; None outside of the blocks."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def linear_layers(model: Any) -> dict[str, Any]:
    """Linear layers by their path in the bare base, also where LoRA layers wrap them already."""
    from torch import nn

    layers = {}
    for path, module in _inner(model).named_modules():
        parts = path.split(".")
        if "base_layer" in parts or any(part.startswith("lora_") for part in parts):
            continue
        if isinstance(getattr(module, "base_layer", module), nn.Linear):
            layers[path] = module
    return layers


def _check_stored_names(model: Any, targets: Sequence[str]) -> None:
    """Refuse a base whose files name the targeted weights otherwise than the model does."""
    folder = Path(_inner(model).name_or_path or "/nowhere")
    if not any(folder.glob("*.safetensors")):
        return  # made in memory
    paths = sorted(path for path in linear_layers(model) if _last(path) in targets)
    stored = set(stored_matrices(folder, paths))
    if (head := _own_head(model)) and not any(name.endswith(head) for name in stored):
        raise UserError(
            f"{folder.name} holds no {head}, which its config.json says is not the embedding.",
            "Download the base again, or set tie_word_embeddings in its config.json.",
        )
    missing = sorted(set(paths) - stored)
    if missing:
        raise UserError(
            f"The weights in {folder.name} have other names than the model's layers: there is no "
            f"matrix for {missing[0]}. An adapter could be trained, but not merged.",
            "Load the base with transformers and save it again with save_pretrained.",
        )


def _own_head(model: Any) -> str:
    """Path of a head with weights of its own; empty where it has the embedding's."""
    inner = _inner(model)
    if inner.config.get_text_config().tie_word_embeddings:
        return ""
    head = inner.get_output_embeddings()
    return next((path for path, module in inner.named_modules() if module is head), "")


def _layers_by_name(model: Any) -> dict[str, set[int]]:
    """Numbers of the blocks that hold a linear layer, by its name; routers are left out."""
    layers: dict[str, set[int]] = {}
    for path in linear_layers(model):
        block = block_of(path)
        if block is not None and _last(path) not in FORBIDDEN:
            layers.setdefault(_last(path), set()).add(block)
    return layers


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _class_name(model: Any) -> str:
    return type(_inner(model)).__name__


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _why(model: Any) -> str:
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    return ": its weights are Conv1D, stored transposed" if transposed else ""
