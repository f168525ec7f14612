"""Sums of adapters, from files, in float32: one exact adapter for a stack, re-factored, truncated.

A stack computes `W x + sum_i s_i a_i/r_i B_i A_i x`. Concatenating ranks gives the same function
as one adapter; `fold_stack` adds the same sum to W itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.atomic_files import (
    disk_error,
    fsync_folder,
    remove_tree,
    temporary_name,
    write_bytes,
)
from adapters.errors import UserError
from adapters.lora.format import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterFiles,
    canonical_config,
    check_finite,
    config_bytes,
    read_adapter,
)
from adapters.lora.merge import DtypeName as DtypeName
from adapters.lora.merge import MergeResult as MergeResult
from adapters.lora.merge import fold_stack as fold_stack
from adapters.tensors import write_float32

if TYPE_CHECKING:
    from adapters.tensors import Array

# Directions below this part of the largest one are rounding noise of float32.
NOISE = 1e-6


@dataclass(frozen=True)
class FactorResult:
    """An adapter written with another rank.

    `kept` is the smallest part of ||B A||^2 that a matrix keeps, `error` the largest
    ||B A - B' A'|| / ||B A||. Not `exact`: another adapter, to be evaluated before it is used.
    """

    path: Path
    rank: int
    kept: float
    error: float
    exact: bool


def cat_adapters(adapters: list[tuple[Path, float]], out: Path) -> Path:
    """The new folder `out` with one adapter equal to the scaled sum of the stack.

    Ranks are concatenated: A = [A_1; A_2; ...], B = [s_1 a_1/r_1 B_1, ...] and alpha = r, so that
    B A = sum_i s_i a_i/r_i B_i A_i as the stack adds it up. All adapters must target the same
    modules. Of PEFT's own combinations only `cat` is this sum; `linear` and `svd` are not.
    """
    import numpy as np

    stack = [(read_adapter(Path(path)), float(scale)) for path, scale in adapters]
    _check_stack(stack)
    rank = sum(int(files.config["r"]) for files, _ in stack)
    tensors: dict[str, Array] = {}
    for name_a, name_b in stack[0][0].modules().values():
        tensors[name_a] = np.concatenate([f.header.read(name_a) for f, _ in stack], axis=0)
        scaled = [f.header.read(name_b) * np.float32(s * f.unit) for f, s in stack]
        tensors[name_b] = np.concatenate(scaled, axis=1)
    return _write_adapter(Path(out), stack[0][0].config, rank, tensors)


def factor_adapter(folder: Path, out: Path, rank: int | None = None) -> FactorResult:
    """The adapter of `folder` with other factors: the least rank that loses nothing, or `rank`.

    Per matrix: QR of both thin factors and the SVD of their r x r core (float64), which is the SVD
    of B A without ever making it; the best approximation of each rank (Eckart-Young). A larger
    rank than needed is filled with zeros, for servers that take only certain ranks.
    """
    files = read_adapter(Path(folder))
    check_finite(files)
    if rank is not None and rank < 1:
        raise UserError(f"The rank {rank} is not a positive number.", "Use 1 or more.")
    cores = {module: _core(files, names) for module, names in files.modules().items()}
    needed = max(_numerical_rank(core[1]) for core in cores.values())
    target = needed if rank is None else rank
    tensors: dict[str, Array] = {}
    kept, error = 1.0, 0.0
    for module, (name_a, name_b) in files.modules().items():
        left, values, right = cores[module]
        tensors[name_a], tensors[name_b] = _factors(left, values, right, target)
        total = float((values**2).sum())
        lost = float((values[target:] ** 2).sum()) / total if total else 0.0
        kept, error = min(kept, 1.0 - lost), max(error, lost**0.5)
    path = _write_adapter(Path(out), files.config, target, tensors)
    return FactorResult(path, target, kept, error, exact=target >= needed)


def _core(files: AdapterFiles, names: tuple[str, str]) -> tuple[Any, Any, Any]:
    """Left vectors [out, r], singular values [r], right vectors [r, in] of a/r B A, float64."""
    import numpy as np

    a = files.header.read(names[0]).astype(np.float64)
    b = files.header.read(names[1]).astype(np.float64) * files.unit
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, values, v = np.linalg.svd(r_b @ r_a.T)
    count = len(values)
    return q_b @ u[:, :count], values, v[:count] @ q_a.T


def _numerical_rank(values: Any) -> int:
    return max(1, int((values > NOISE * values.max()).sum())) if values.max() > 0 else 1


def _factors(left: Any, values: Any, right: Any, rank: int) -> tuple[Array, Array]:
    """A [rank, in] and B [out, rank], each with the root of the singular values."""
    import numpy as np

    kept = min(rank, len(values))
    root = np.sqrt(values[:kept])
    a = np.zeros((rank, right.shape[1]), np.float32)
    b = np.zeros((left.shape[0], rank), np.float32)
    a[:kept] = root[:, None] * right[:kept]
    b[:, :kept] = left[:, :kept] * root
    return a, b


def _check_stack(stack: list[tuple[AdapterFiles, float]]) -> None:
    if not stack:
        raise UserError("There is no adapter to combine.", "Name at least one.")
    widths = [
        {name: shape[1] if ".lora_A." in name else shape[0] for name, shape in f.tensors.items()}
        for f, _ in stack
    ]
    for (files, _), width in zip(stack, widths, strict=True):
        check_finite(files)
        if width != widths[0]:
            raise UserError(
                f"{files.weights.parent.name} targets other modules than the first adapter.",
                "Only adapters of the same modules and base make one adapter; merge them instead.",
            )


def _write_adapter(out: Path, like: dict[str, Any], rank: int, tensors: dict[str, Array]) -> Path:
    """The new folder with the tensors, alpha = r, and the rest of the configuration as before."""
    raw = {**like, "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    config = canonical_config(raw, str(raw["base_model_name_or_path"]))
    if out.exists():
        raise UserError(f"{out} exists already.", "Name a folder that does not.")
    aside = out.with_name(temporary_name(out.name))
    try:
        aside.mkdir(parents=True)
        write_float32(aside / WEIGHTS_NAME, tensors)
        write_bytes(aside / CONFIG_NAME, config_bytes(config))
        fsync_folder(aside)
        os.rename(aside, out)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        remove_tree(aside)
    return out
