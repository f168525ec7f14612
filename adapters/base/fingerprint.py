"""Which base is this: hashes of its files and a digest of sampled weights, never its name."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adapters.atomic_files import read_json, sha256_file, sha256_json, write_json
from adapters.base.weights import base_shapes, weight_files
from adapters.errors import BaseMismatch, StoreCorrupt, UserError
from adapters.tensors import TensorFile, TensorInfo, read_header, to_bfloat16, to_float32

SAMPLED_ROWS = 4
SCHEMA = 2
# What does not change the function that the weights compute. All the rest of config.json does.
NEUTRAL = frozenset({
    "architectures", "auto_map", "bos_token_id", "classifier_dropout", "dtype", "embd_pdrop",
    "eos_token_id", "attention_dropout", "attn_pdrop", "finetuning_task", "gradient_checkpointing",
    "hidden_dropout", "id2label", "initializer_range", "label2id", "name_or_path",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "problem_type", "resid_pdrop", "return_dict", "router_aux_loss_coef", "sep_token_id",
    "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "use_cache",
})  # fmt: skip
ROPE = ("rope_theta", "rope_parameters", "rope_scaling")
# What a fingerprint of release 0.1 (schema 1) counts.
ARCHITECTURE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "layer_norm_eps",
    "hidden_act", "tie_word_embeddings", "sliding_window", "attention_bias", "mlp_bias",
)  # fmt: skip


@dataclass(frozen=True)
class BaseFingerprint:
    """Identity of a base. Two bases are the same when configuration, shapes and sample agree.

    Schema 2 counts all of config.json but `NEUTRAL`; schema 1, of release 0.1, only `ARCHITECTURE`.
    `config_v1_sha256` lets one of schema 2 be compared with one of schema 1.

    `files` (SHA-256 of each weight shard) and `tokenizer_sha256` are kept as evidence; a re-sharded
    copy has other files and the same `sample_sha256`, a merged or fine-tuned twin another sample.
    """

    digest: str
    files: dict[str, str]
    config_sha256: str
    tokenizer_sha256: str
    sample_sha256: str
    shapes_sha256: str
    config_v1_sha256: str = ""
    schema: int = 1

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as a JSON object, in the form of its schema."""
        value = asdict(self)
        if self.schema == 1:
            del value["schema"], value["config_v1_sha256"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BaseFingerprint:
        """The fingerprint in `value`; StoreCorrupt when a field is missing or of another kind."""
        schema = value.get("schema", 1)
        if type(schema) is not int or schema not in (1, SCHEMA):
            raise StoreCorrupt(
                f"A base fingerprint has the schema {str(schema)[:20]!r}.",
                "Use the release of unlearner that wrote it.",
            )
        other = ("files", "schema") if schema > 1 else ("files", "schema", "config_v1_sha256")
        names = [name for name in cls.__dataclass_fields__ if name not in other]
        files = value.get("files")
        wrong = [name for name in names if not _is_hash(value.get(name))]
        extra = set(value) - {*names, "files", "schema"}
        if wrong or extra or not isinstance(files, dict) or not files:
            raise StoreCorrupt(
                f"A base fingerprint is malformed: {(wrong + sorted(extra) + ['files'])[0]}.",
                "Restore it from a copy.",
            )
        if not all(isinstance(k, str) and _is_hash(v) for k, v in files.items()):
            raise StoreCorrupt("A base fingerprint lists malformed hashes.", "Restore it.")
        hashes = {name: str(value[name]) for name in names}
        fingerprint = cls(files=dict(files), schema=schema, **hashes)
        if fingerprint.digest != fingerprint._expected_digest():
            raise StoreCorrupt("A base fingerprint contradicts itself.", "Restore it from a copy.")
        return fingerprint

    def config_hash(self, schema: int) -> str:
        """The hash of config.json as `schema` counts it."""
        return self.config_sha256 if schema == self.schema else self.config_v1_sha256

    def _expected_digest(self) -> str:
        version = "" if self.schema == 1 else f"schema {self.schema} {self.config_v1_sha256}"
        text = f"{version}{self.config_sha256}{self.shapes_sha256}{self.sample_sha256}"
        return hashlib.sha256(text.encode()).hexdigest()


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
    raw = read_json(folder / "config.json")
    fingerprint = BaseFingerprint(
        digest="",
        files={path.name: sha256_file(path) for path in shards},
        config_sha256=sha256_json(function_settings(raw)),
        tokenizer_sha256=sha256_file(tokenizer[0]) if tokenizer else "0" * 64,
        sample_sha256=_sample_digest(headers),
        shapes_sha256=sha256_json(base_shapes(headers)),
        config_v1_sha256=sha256_json(architecture(raw)),
        schema=SCHEMA,
    )
    fingerprint = replace(fingerprint, digest=fingerprint._expected_digest())
    _remember(cache_path, key, stamp, fingerprint)
    return fingerprint


def require_same_base(expected: BaseFingerprint, actual: BaseFingerprint) -> None:
    """Raise BaseMismatch, saying what differs, unless both are the same base.

    When one of them was written by release 0.1, config.json counts as it did there.
    """
    schema = min(expected.schema, actual.schema)
    if expected.config_hash(schema) != actual.config_hash(schema):
        difference = "its architecture (config.json) is another"
    elif expected.shapes_sha256 != actual.shapes_sha256:
        difference = "its tensors have other names or shapes"
    elif expected.sample_sha256 == actual.sample_sha256:
        return
    else:
        difference = "it has the same shape but other weights (fine-tuned or merged?)"
    raise BaseMismatch(
        f"This is not the base that the adapters belong to: {difference} "
        f"({actual.digest[:12]} instead of {expected.digest[:12]}).",
        "Give the base that they were trained on, or use another store for adapters of this one.",
    )


def function_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """All of config.json that can change what the weights compute, defaults filled in.

    Settings that are null count as absent, and 1.0 is 1: releases of transformers differ in both.
    """
    rest = {
        key: value
        for key, value in config.items()
        if key not in NEUTRAL and key not in ROPE and key[0] != "_" and value is not None
    }
    if config.get("rope_parameters") and config.get("rope_scaling"):
        rest["rope_scaling"] = config["rope_scaling"]
    if isinstance(rest.get("text_config"), Mapping):
        rest["text_config"] = function_settings(rest["text_config"])
    settings: dict[str, Any] = _plain({**rest, **architecture(config)})
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
            fingerprint = BaseFingerprint.from_json(entry["fingerprint"])
            return fingerprint if fingerprint.schema == SCHEMA else None
    except (StoreCorrupt, KeyError, AttributeError):
        return None  # a cache that is missing or damaged is only slower: hash again
    return None


def _remember(path: Path, key: str, stamp: list[Any], fingerprint: BaseFingerprint) -> None:
    try:
        entries = read_json(path)
    except StoreCorrupt:
        entries = {}
    entries[key] = {"stamp": stamp, "fingerprint": fingerprint.to_json()}
    # Without a writable home the next run hashes again, nothing more.
    with contextlib.suppress(UserError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, entries)
