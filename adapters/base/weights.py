"""The weight files of a base: which of them the model is loaded from, and what they hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adapters.atomic_files import read_json
from adapters.errors import StoreCorrupt, UserError
from adapters.tensors import TensorFile, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder in the loader's order of preference.

    As in transformers, `model.safetensors` wins over an index beside it; otherwise the shards that
    the index lists, sorted.

    Raises:
        UserError: there are none, shards are missing, or config.json names other files.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{folder.name} holds no model weights as safetensors.",
            f"Give the folder of a base, with {SINGLE} or {INDEX}.",
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StoreCorrupt(f"{INDEX} has no weight map.", "Download the base again.")
    names = sorted({str(name) for name in weight_map.values()})
    paths = [folder / name for name in names if Path(name).name == name]
    if len(paths) != len(names) or not all(path.is_file() for path in paths):
        raise UserError(
            f"{folder.name} lacks weight files that its index lists.", "Download it again."
        )
    return paths


def base_shapes(headers: list[TensorFile]) -> dict[str, list[int]]:
    """Shape of every tensor by name, over all shards.

    Raises:
        UserError: two shards hold a tensor of the same name, so that the loader decides which
            counts.
    """
    shapes: dict[str, list[int]] = {}
    for header in headers:
        twice = shapes.keys() & header.tensors.keys()
        if twice:
            raise UserError(
                f"Several weight files of the base hold {min(twice)}.", "Download the base again."
            )
        shapes |= {name: list(tensor.shape) for name, tensor in header.tensors.items()}
    return shapes


def stored_matrices(folder: Path, modules: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shape [out, in] of every stored matrix by the path of its module in the model."""
    names = {
        name: info.shape
        for path in weight_files(folder)
        for name, info in read_header(path).tensors.items()
    }
    prefix = module_prefix(names, modules)
    return {
        prefix + name.removesuffix(".weight"): shape
        for name, shape in names.items()
        if len(shape) == 2
    }


def module_prefix(stored: Iterable[str], modules: Iterable[str]) -> str:
    """What precedes a stored name in the path of its module: nothing, or one part like `model.`.

    A checkpoint of the bare decoder has `layers.0...` where the causal LM has `model.layers.0...`;
    the loader adds the part without a word.
    """
    first = next(iter(modules), "")
    prefix = first.split(".", 1)[0] + "."
    names = list(stored)
    within = first.removeprefix(prefix)
    if any(name.startswith(prefix) for name in names) or f"{within}.weight" not in names:
        return ""
    return prefix
