"""Checkpoints of a run: what is trained, the optimizer, the schedule and the random numbers.

Tensors are kept as safetensors and everything else as JSON: no pickles. The base and the parent
adapters are files of their own that never change, so they are not copied.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adapters.errors import StoreCorrupt

WEIGHTS_FILE, TENSORS_FILE, STATE_FILE = (
    "trainable.safetensors",
    "state.safetensors",
    "state.json",
)
_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(work: Path) -> Path | None:
    """The latest checkpoint in the folder of a run, None where there is none."""
    steps = {
        int(match[1]): path for path in work.iterdir() if (match := _NAME.fullmatch(path.name))
    }
    return steps[max(steps)] if steps else None


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def begin_checkpoint(work: Path, step: int) -> Path:
    """A new folder beside its final name; `end_checkpoint` renames it."""
    partial = work / f".checkpoint-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def end_checkpoint(partial: Path) -> Path:
    """The finished checkpoint; the earlier ones of the run are removed."""
    folder = partial.with_name(partial.name.removeprefix("."))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for path in folder.parent.iterdir():
        if path != folder and _NAME.fullmatch(path.name):
            shutil.rmtree(path)
    return folder


def write_weights(folder: Path, model: torch.nn.Module) -> None:
    """The trained parameters of `model`."""
    tensors = {n: p.detach().cpu().contiguous() for n, p in trainable(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE)


def read_weights(folder: Path, model: torch.nn.Module) -> None:
    """Put the trained parameters that `write_weights` wrote into `model`.

    Raises:
        RuntimeError: the checkpoint is of another adapter.
    """
    saved, parameters = load_file(folder / WEIGHTS_FILE), trainable(model)
    if saved.keys() != parameters.keys():
        raise RuntimeError(f"the checkpoint {folder} is of another adapter")
    with torch.no_grad():
        for name, tensor in saved.items():
            parameters[name].copy_(tensor)


def write_state(folder: Path, state: Mapping[str, Any], name: str = STATE_FILE) -> None:
    """A nested state of dicts, lists, tensors and JSON values, such as an optimizer's."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_without_tensors(state, "", tensors))
    save_file(tensors, (folder / name).with_suffix(".safetensors"))
    (folder / name).write_text(text, encoding="utf-8")


def read_state(folder: Path, name: str = STATE_FILE) -> Any:
    """What `write_state` wrote; tensors on the CPU.

    Raises:
        StoreCorrupt: the checkpoint is damaged, or was written by another version.
    """
    try:
        tensors = load_file((folder / name).with_suffix(".safetensors"))
        return _with_tensors(json.loads((folder / name).read_text(encoding="utf-8")), tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreCorrupt(
            f"The checkpoint {folder} cannot be read ({type(error).__name__}: {error}).",
            "It is damaged or from another version: run the command without --resume.",
        ) from error


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        # As pairs, since the keys of an optimizer's state are numbers.
        items = [[k, _without_tensors(v, f"{path}.{k}", tensors)] for k, v in value.items()]
        return {"items": items}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _with_tensors(item, tensors) for key, item in value["items"]}


def random_state() -> dict[str, Any]:
    """The states of all random number generators."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss,
                  gauss],
        "torch": torch.get_rng_state(),
    }  # fmt: skip
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned, there or from a checkpoint."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
