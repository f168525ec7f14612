"""A stack folded into the base's weights: float32 sums, one rounding, one tensor in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters.atomic_files import (
    disk_error,
    fsync_folder,
    read_json,
    remove_tree,
    temporary_name,
    write_json,
)
from adapters.base.weights import base_shapes, module_prefix, weight_files
from adapters.errors import DoesNotFit, StoreCorrupt, UserError
from adapters.lora.format import AdapterFiles, check_finite, read_adapter, require_fits
from adapters.lora.targets import block_of, linear_layers
from adapters.tensors import ITEM_SIZE, TensorFile, read_header, write_stream

if TYPE_CHECKING:
    import torch

DtypeName = Literal["float32", "bfloat16", "float16"]
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
NAMES = {code: name for name, code in CODES.items()}
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt",
)  # fmt: skip
BLOCK = 1 << 20  # elements that are summed at a time
Update = tuple[AdapterFiles, tuple[str, str], float]


@dataclass(frozen=True)
class MergeResult:
    """Weights written by `fold_stack`: where, how many matrices changed, and by how much.

    `relative_change` is the largest ||update|| / ||W|| of each kind of projection.
    """

    path: Path
    shards: tuple[str, ...]
    dtype: str
    matrices: int
    relative_change: dict[str, float] = field(default_factory=dict)
    from_4bit_view: bool = False


def fold_stack(
    base_folder: Path,
    adapters: list[tuple[Path, float]],
    out: Path,
    dtype: DtypeName | None = None,
    *,
    from_4bit_view: bool = False,
    loaded_dtype: DtypeName | None = None,
) -> MergeResult:
    """The new folder `out`: a plain model with the stack folded into the base's weights.

    Every matrix is W + sum_i s_i a_i/r_i B_i A_i, summed in float32 and rounded once to `dtype`
    (the base's own by default). Tensors are read, folded and written one by one, in the base's own
    shards. `from_4bit_view` folds into the projections as nf4 (quantised and back), the base that a
    QLoRA adapter was trained on; `loaded_dtype` is the dtype in which that base was loaded before
    it was quantised (the stored one by default), which decides the nf4 values.

    Raises:
        UserError: the base is stored quantised.
        BaseMismatch: an adapter belongs to another base.
        DoesNotFit: the disk is too small.
    """
    base_folder, out = Path(base_folder), Path(out)
    stack = [(read_adapter(Path(path)), float(scale)) for path, scale in adapters]
    _check_request(base_folder, out, stack, dtype)
    quantised = quantised_layers(base_folder) if from_4bit_view else set()
    merge = _Merge(base_folder, stack, dtype, quantised, loaded_dtype)
    aside = out.with_name(temporary_name(out.name))
    try:
        aside.mkdir(parents=True)
        shards = merge.write(aside)
        _copy_companions(base_folder, aside, merge.kind())
        fsync_folder(aside)
        os.rename(aside, out)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        remove_tree(aside)
    relative = {name: max(values) for name, values in sorted(merge.changes.items())}
    count = sum(len(values) for values in merge.changes.values())
    return MergeResult(out, shards, merge.kind(), count, relative, from_4bit_view)


class _Merge:
    """One run over the shards, and what it counted."""

    def __init__(
        self,
        base_folder: Path,
        stack: list[tuple[AdapterFiles, float]],
        dtype: DtypeName | None,
        quantised: set[str],
        loaded_dtype: DtypeName | None,
    ) -> None:
        self.modules = [(files, files.modules(), scale) for files, scale in stack]
        self.dtype = dtype
        self.quantised = quantised
        self.loaded_dtype = loaded_dtype
        self.shards = weight_files(base_folder)
        names = base_shapes([read_header(shard) for shard in self.shards])
        paths = quantised.union(*(modules for _, modules, _ in self.modules))
        self.prefix = module_prefix(names, sorted(paths))
        self.changes: dict[str, list[float]] = {}
        self.sizes: dict[str, int] = {}

    def write(self, aside: Path) -> tuple[str, ...]:
        """Names of the shards written, each under its old name, with the index when several."""
        weight_map: dict[str, str] = {}
        for shard in self.shards:
            source = read_header(shard)
            entries = {n: (self._code(t.dtype), t.shape) for n, t in source.tensors.items()}
            write_stream(aside / shard.name, entries, partial(self._data, source))
            weight_map.update(dict.fromkeys(entries, shard.name))
        if len(self.shards) > 1:
            index = {"metadata": {"total_size": sum(self.sizes.values())}, "weight_map": weight_map}
            write_json(aside / "model.safetensors.index.json", index)
        return tuple(shard.name for shard in self.shards)

    def kind(self) -> str:
        """Name of the dtype that most bytes have."""
        largest = max(self.sizes, key=lambda code: self.sizes[code])
        return NAMES.get(largest, largest.lower())

    def _code(self, stored: str) -> str:
        return CODES[self.dtype] if self.dtype and stored in NAMES else stored

    def _data(self, source: TensorFile, name: str) -> Iterator[memoryview]:
        """The bytes of the tensor as written."""
        info = source.tensors[name]
        code = self._code(info.dtype)
        size = info.size // ITEM_SIZE[info.dtype] * ITEM_SIZE[code]
        self.sizes[code] = self.sizes.get(code, 0) + size
        path = self.prefix + name.removesuffix(".weight")
        updates: list[Update] = [(f, m[path], s) for f, m, s in self.modules if path in m]
        viewed = path in self.quantised
        if not updates and not viewed and code == info.dtype:
            for start in range(0, info.size, 1 << 24):
                yield memoryview(source.raw(name, start, min(1 << 24, info.size - start)))
            return
        matrices = [_matrices(files, names, s) for files, names, s in updates]
        squares, change = 0.0, 0.0
        for start, block in _blocks(source, name, whole=viewed):
            result = _nf4_view(block, self.loaded_dtype) if viewed else block.float()
            if updates:
                total = _sum_of_updates(matrices, start, result)
                squares += float(result.norm()) ** 2
                change += float(total.norm()) ** 2
                result += total
            yield _as_bytes(result, code, name)
        if updates:
            kind = path.rsplit(".", 1)[-1]
            self.changes.setdefault(kind, []).append((change / squares) ** 0.5 if squares else 0.0)


def _blocks(source: TensorFile, name: str, *, whole: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """The tensor in blocks of rows with the number of their first row, or in one piece.

    A matrix of a large model is hundreds of megabytes in float32, several times over while it is
    summed: only a block at a time is.
    """
    shape = source.tensors[name].shape
    if whole or len(shape) != 2:
        yield 0, _as_tensor(source, name, shape, 0)
        return
    rows = max(1, BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], rows):
        yield start, _as_tensor(source, name, (min(rows, shape[0] - start), shape[1]), start)


def _as_tensor(source: TensorFile, name: str, shape: Sequence[int], first_row: int) -> torch.Tensor:
    import torch

    info = source.tensors[name]
    kind = getattr(torch, NAMES[info.dtype])
    size = prod(shape) * ITEM_SIZE[info.dtype]
    if size == 0:
        return torch.zeros(tuple(shape), dtype=kind)
    start = first_row * prod(shape[1:]) * ITEM_SIZE[info.dtype]
    return torch.frombuffer(source.raw(name, start, size), dtype=kind).reshape(tuple(shape))


def _matrices(
    files: AdapterFiles, names: tuple[str, str], scale: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and the factor of their product."""
    import torch

    a, b = (torch.from_numpy(files.header.read(name)) for name in names)
    return a, b, scale * files.unit


def _sum_of_updates(
    matrices: Sequence[tuple[torch.Tensor, torch.Tensor, float]], start: int, like: torch.Tensor
) -> torch.Tensor:
    """Sum of s a/r B A on the rows from `start` that `like` has, float32."""
    import torch

    total = torch.zeros_like(like)
    for a, b, factor in matrices:
        total.addmm_(b[start : start + like.shape[0]], a, alpha=factor)
    return total


def _as_bytes(values: torch.Tensor, code: str, name: str) -> memoryview:
    import torch

    rounded = values.to(getattr(torch, NAMES[code]))
    if not bool(rounded.isfinite().all()):
        raise StoreCorrupt(
            f"{name} has values that {NAMES[code]} cannot hold.", "Merge with --dtype float32."
        )
    return memoryview(rounded.contiguous().view(-1).view(torch.uint8).numpy().data)


def quantised_layers(base_folder: Path) -> set[str]:
    """Paths of the layers that loading in 4 bits quantises: the linear layers of the blocks."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(base_folder), local_files_only=True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    return {path for path in linear_layers(model) if block_of(path) is not None}


def _nf4_view(weight: torch.Tensor, loaded_dtype: DtypeName | None) -> torch.Tensor:
    """The matrix as an nf4 base with double quantisation computes with it, in float32."""
    import importlib.util

    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "The 4-bit view needs the package bitsandbytes.",
            "Install it with `pip install unlearner[quant]`.",
        )
    from bitsandbytes import functional

    if loaded_dtype is not None:
        weight = weight.to(getattr(torch, loaded_dtype))
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    view: torch.Tensor = functional.dequantize_4bit(packed, state).float()
    return view


def require_full_weights(base_folder: Path) -> None:
    """Refuse a base that is stored quantised.

    Raises:
        UserError: config.json declares a quantisation.
    """
    if read_json(base_folder / "config.json").get("quantization_config"):
        raise UserError(
            f"The base {base_folder.name} is stored quantised: merging into it would erase the "
            "forgetting.",
            "Give the original weights; --from-4bit-view folds into their 4-bit view.",
        )


def _check_request(
    base_folder: Path,
    out: Path,
    stack: list[tuple[AdapterFiles, float]],
    dtype: DtypeName | None,
) -> None:
    if dtype is not None and dtype not in CODES:
        raise UserError(f"{dtype!r} is not a dtype.", f"Use one of {', '.join(CODES)}.")
    require_full_weights(base_folder)
    for files, _ in stack:
        check_finite(files)
        require_fits(files, base_folder)
    if out.exists():
        raise UserError(f"{out} exists already.", "Name a folder that does not.")
    need = 0
    for path in weight_files(base_folder):
        for info in read_header(path).tensors.values():
            code = CODES[dtype] if dtype and info.dtype in NAMES else info.dtype
            need += info.size // ITEM_SIZE[info.dtype] * ITEM_SIZE[code]
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise DoesNotFit(
            f"The merged weights need {need / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB.",
            "Free some space, or name another disk with --out.",
        )


def _copy_companions(base_folder: Path, aside: Path, dtype: str) -> None:
    for name in COMPANIONS:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, aside / name)
    config: dict[str, Any] = read_json(aside / "config.json")
    config["dtype"] = dtype
    config.pop("torch_dtype", None)
    config.pop("_name_or_path", None)
    write_json(aside / "config.json", config)
