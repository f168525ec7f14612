"""Safetensors headers read strictly and tensors read as NumPy, without torch."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.atomic_files import parse_json
from adapters.errors import StoreCorrupt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `start` is its byte offset in the file, `size` its bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class TensorFile:
    """The header of one safetensors file, checked: offsets tile the data without gap or overlap."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def read(self, name: str) -> Array:
        """The tensor as float32 (bf16 and f16 widen exactly)."""
        info = self.tensors[name]
        return to_float32(self.raw(name), info.dtype).reshape(info.shape)

    def raw(self, name: str, start: int = 0, size: int | None = None) -> bytearray:
        """Bytes of the tensor, `size` of them from `start`."""
        info = self.tensors[name]
        data = bytearray(info.size - start if size is None else size)
        with open(self.path, "rb") as file:
            file.seek(info.start + start)
            if file.readinto(data) != len(data):
                raise StoreCorrupt(f"{self.path.name} ends early.", "Restore it from a copy.")
        return data


def read_header(path: Path) -> TensorFile:
    """The checked header of a safetensors file; StoreCorrupt says what is wrong with it."""
    what = f"{path.parent.name}/{path.name}"
    try:
        total = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
            if not 2 <= length <= total - 8:
                raise _bad(what, "its header length is impossible")
            text = file.read(length)
    except OSError as error:
        raise _bad(what, f"it cannot be read ({error.strerror})") from error
    header = parse_json(text.rstrip(b" "), f"The header of {what}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(what, "its metadata is not text")
    tensors = {name: _tensor(name, entry, 8 + length, what) for name, entry in header.items()}
    position = 8 + length
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.size)):
        if info.start != position:
            raise _bad(what, "its tensors leave a gap or overlap")
        position += info.size
    if position != total:
        raise _bad(what, f"it has {total} bytes where its header promises {position}")
    return TensorFile(path, tensors, metadata)


def write_float32(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write float32 arrays as safetensors: the same tensors give the same bytes."""
    import numpy as np

    entries = {name: ("F32", value.shape) for name, value in tensors.items()}

    def data(name: str) -> Iterator[memoryview]:
        yield memoryview(np.ascontiguousarray(tensors[name], dtype="<f4").tobytes())

    write_stream(path, entries, data)


def write_stream(
    path: Path,
    entries: Mapping[str, tuple[str, Sequence[int]]],
    data: Callable[[str], Iterable[memoryview]],
) -> None:
    """Write the new file `path` tensor by tensor: `entries` has dtype and shape, `data` the bytes.

    Larger items come first, so that every tensor is aligned; then sorted by name. Durable (fsync).
    """
    order = sorted(entries, key=lambda name: (-ITEM_SIZE[entries[name][0]], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape = entries[name]
        end = offset + prod(shape) * ITEM_SIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for chunk in data(name):
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        if file.tell() != 8 + len(text) + offset:
            raise StoreCorrupt(f"{path.name} was not written in full.", "Try again.")


def to_float32(data: bytes | bytearray, dtype: str) -> Array:
    """Flat float32 values of raw bytes in F32, F16, BF16 or F64."""
    import numpy as np

    if dtype == "BF16":
        wide = np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
    return np.frombuffer(data, dtype=kinds[dtype]).astype(np.float32)


def to_bfloat16(values: Array) -> bytes:
    """Bytes of the values rounded to bf16, to nearest even."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").tobytes()


def _tensor(name: str, entry: Any, data_start: int, what: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(what, f"the entry of {name[:80]!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise _bad(what, f"{name[:80]!r} has the unknown dtype {str(dtype)[:20]!r}")
    if not _counts(shape) or len(shape) > 8 or not _counts(offsets) or len(offsets) != 2:
        raise _bad(what, f"the shape or offsets of {name[:80]!r} are malformed")
    size = prod(shape) * ITEM_SIZE[dtype]
    if offsets[1] - offsets[0] != size:
        raise _bad(what, f"{name[:80]!r} does not have the bytes that its shape needs")
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], size)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _bad(what: str, problem: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"{what} is not a whole safetensors file: {problem}.", "Restore it from a copy."
    )
