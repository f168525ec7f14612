"""Which base is this: hashes of its files and a digest of sampled weights, never its name."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.atomic_files import read_json, sha256_file, sha256_json, write_json
from adapters.errors import BaseMismatch, StoreCorrupt, UserError
from adapters.tensors import TensorFile, TensorInfo, read_header, to_bfloat16, to_float32

SAMPLED_ROWS = 4
# What decides the function computed from the same weights; the rest of config.json is bookkeeping.
ARCHITECTURE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "layer_norm_eps",
    "hidden_act", "tie_word_embeddings", "sliding_window", "attention_bias", "mlp_bias",
)  # fmt: skip


@dataclass(frozen=True)
class BaseFingerprint:
    """Identity of a base. Two bases are the same when architecture, shapes and sample agree.

    `files` (SHA-256 of each weight shard) and `tokenizer_sha256` are kept as evidence; a re-sharded
    copy has other files and the same `sample_sha256`, a merged or fine-tuned twin another sample.
    """

    digest: str
    files: dict[str, str]
    config_sha256: str
    tokenizer_sha256: str
    sample_sha256: str
    shapes_sha256: str

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BaseFingerprint:
        """The fingerprint in `value`; StoreCorrupt when a field is missing or of another kind."""
        names = [name for name in cls.__dataclass_fields__ if name != "files"]
        files = value.get("files")
        wrong = [name for name in names if not _is_hash(value.get(name))]
        extra = set(value) - {*names, "files"}
        if wrong or extra or not isinstance(files, dict) or not files:
            raise StoreCorrupt(
                f"A base fingerprint is malformed: {(wrong + sorted(extra) + ['files'])[0]}.",
                "Restore it from a copy.",
            )
        if not all(isinstance(k, str) and _is_hash(v) for k, v in files.items()):
            raise StoreCorrupt("A base fingerprint lists malformed hashes.", "Restore it.")
        found = cls(files=dict(files), **{name: str(value[name]) for name in names})
        if found.digest != _digest(found.config_sha256, found.shapes_sha256, found.sample_sha256):
            raise StoreCorrupt("A base fingerprint contradicts itself.", "Restore it from a copy.")
        return found


def fingerprint_base(folder: Path) -> BaseFingerprint:
    """The fingerprint of the base in `folder`, read from its files without loading a model.

    Hashes are cached by path, size and modification time in `~/.cache/unlearner` (or
    `$UNLEARNER_CACHE`). Raises UserError when the folder holds no safetensors model.
    """
    folder = Path(folder).resolve()
    shards = weight_files(folder)
    tokenizer = [folder / n for n in ("tokenizer.json", "tokenizer.model")]
    tokenizer = [path for path in tokenizer if path.is_file()][:1]
    cache_path = cache_folder() / "fingerprints.json"
    key = str(folder)
    stamp = [_stamp(path) for path in [folder / "config.json", *shards, *tokenizer]]
    cached = _cached(cache_path, key, stamp)
    if cached is not None:
        return cached
    headers = [read_header(path) for path in shards]
    config = sha256_json(architecture(read_json(folder / "config.json")))
    shapes = sha256_json(base_shapes(headers))
    sample = _sample_digest(headers)
    found = BaseFingerprint(
        digest=_digest(config, shapes, sample),
        files={path.name: sha256_file(path) for path in shards},
        config_sha256=config,
        tokenizer_sha256=sha256_file(tokenizer[0]) if tokenizer else "0" * 64,
        sample_sha256=sample,
        shapes_sha256=shapes,
    )
    _remember(cache_path, key, stamp, found)
    return found


def require_same_base(expected: BaseFingerprint, actual: BaseFingerprint) -> None:
    """Raise BaseMismatch, saying what differs, unless both are the same base."""
    if expected.digest == actual.digest:
        return
    if expected.config_sha256 != actual.config_sha256:
        difference = "its architecture (config.json) is another"
    elif expected.shapes_sha256 != actual.shapes_sha256:
        difference = "its tensors have other names or shapes"
    else:
        difference = "it has the same shape but other weights (fine-tuned or merged?)"
    raise BaseMismatch(
        f"This is not the base that the adapters belong to: {difference} "
        f"({actual.digest[:12]} instead of {expected.digest[:12]}).",
        "Give the base that they were trained on.",
    )


def weight_files(folder: Path) -> list[Path]:
    """The weight shards of a model folder, sorted: those of the index, else the single file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise StoreCorrupt(f"{index.name} has no weight map.", "Download the base again.")
        names = sorted({str(name) for name in weight_map.values()})
        paths = [folder / name for name in names if Path(name).name == name]
        if len(paths) != len(names) or not all(path.is_file() for path in paths):
            raise UserError(
                f"{folder.name} lacks weight files that its index lists.", "Download it again."
            )
        return paths
    single = folder / "model.safetensors"
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    paths = [path for path in paths if not path.name.startswith("adapter_model")]
    if not paths:
        raise UserError(
            f"{folder.name} holds no model weights as safetensors.", "Give the folder of a base."
        )
    return paths


def base_shapes(headers: list[TensorFile]) -> dict[str, list[int]]:
    """Shape of every tensor by name, over all shards."""
    return {name: list(t.shape) for header in headers for name, t in header.tensors.items()}


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of config.json that decides what the weights compute, defaults filled in.

    Releases of transformers write the same model differently: rope_theta moved into
    rope_parameters, and defaults appeared.
    """
    kept = {key: config.get(key) for key in ARCHITECTURE}
    heads, hidden = kept["num_attention_heads"], kept["hidden_size"]
    if kept["num_key_value_heads"] is None:
        kept["num_key_value_heads"] = heads
    if kept["head_dim"] is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        kept["head_dim"] = hidden // heads
    for flag in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        kept[flag] = bool(kept[flag])
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope["theta"] = float(rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    return {**kept, "rope": {**rope, "kind": kind}}


def _sample_digest(headers: list[TensorFile]) -> str:
    """SHA-256 over a few rows of every matrix and all of every vector, as bf16 bytes."""
    where = {name: header for header in headers for name in header.tensors}
    digest = hashlib.sha256()
    for name in sorted(where):
        info = where[name].tensors[name]
        digest.update(f"{name}{list(info.shape)}".encode())
        for start, size in _sampled_ranges(info):
            data: bytes | bytearray = where[name].raw(name, start, size)
            if info.dtype in ("F32", "F16", "F64"):
                data = to_bfloat16(to_float32(data, info.dtype))
            digest.update(data)
    return digest.hexdigest()


def _sampled_ranges(info: TensorInfo) -> list[tuple[int, int]]:
    """Byte ranges (start, size) of the sampled rows inside the tensor."""
    rows = info.shape[0] if len(info.shape) > 1 else 1
    if rows <= SAMPLED_ROWS or not info.size:
        return [(0, info.size)]
    row_size = info.size // rows
    picked = sorted({(rows - 1) * i // (SAMPLED_ROWS - 1) for i in range(SAMPLED_ROWS)})
    return [(row * row_size, row_size) for row in picked]


def _digest(config: str, shapes: str, sample: str) -> str:
    return hashlib.sha256(f"{config}{shapes}{sample}".encode()).hexdigest()


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _stamp(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise UserError(f"{path.parent.name} has no {path.name}.", "Give a whole model.") from error
    return [str(path), status.st_size, status.st_mtime_ns]


def cache_folder() -> Path:
    """The user's cache: `$UNLEARNER_CACHE`, else ~/.cache/unlearner."""
    given = os.environ.get("UNLEARNER_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "unlearner"


def _cached(path: Path, key: str, stamp: list[Any]) -> BaseFingerprint | None:
    try:
        entry = read_json(path).get(key)
        if isinstance(entry, dict) and entry.get("stamp") == stamp:
            return BaseFingerprint.from_json(entry["fingerprint"])
    except (StoreCorrupt, KeyError, AttributeError):
        return None  # a cache that is missing or damaged is only slower: hash again
    return None


def _remember(path: Path, key: str, stamp: list[Any], found: BaseFingerprint) -> None:
    try:
        entries = read_json(path)
    except StoreCorrupt:
        entries = {}
    entries[key] = {"stamp": stamp, "fingerprint": found.to_json()}
    # Without a writable home the next run hashes again; nothing else is lost.
    with contextlib.suppress(UserError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, entries)
