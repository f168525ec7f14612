"""Adapters made of random numbers, without torch: most of the store never looks at a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.base.fingerprint import BaseFingerprint
from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME
from adapters.store.manifest import ForgetManifest
from adapters.store.store import AdapterStore
from adapters.tensors import write_float32
from tests.families import LLAMA

HIDDEN, INNER, LAYERS = 64, 128, 2  # the shape of the `tiny_base` fixture


def shapes_of(module: str) -> tuple[int, int]:
    """(out, in) of a projection of the tiny base."""
    return {
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }.get(module, (HIDDEN, HIDDEN))


def write_adapter(
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 2,
    layers: int = LAYERS,
    config: dict[str, Any] | None = None,
    change: Callable[[dict[str, Any]], None] | None = None,
    std: float = 0.02,
) -> Path:
    """A LoRA as PEFT saves it; `config` overrides settings, `change` edits the tensors."""
    random = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for layer in range(layers):
        for module in LLAMA:
            part = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            stem = f"base_model.model.model.layers.{layer}.{part}.{module}"
            rows, columns = shapes_of(module)
            tensors[f"{stem}.lora_A.weight"] = random.normal(0, std, (rank, columns))
            tensors[f"{stem}.lora_B.weight"] = random.normal(0, std, (rows, rank))
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    if change:
        change(tensors)
    folder.mkdir(parents=True)
    write_float32(folder / WEIGHTS_NAME, tensors)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": list(LLAMA),
        "bias": "none",
        **(config or {}),
    }
    (folder / CONFIG_NAME).write_text(json.dumps(settings))
    return folder


def some_fingerprint(name: str = "one") -> BaseFingerprint:
    """A well-formed fingerprint of no base in particular."""
    config, shapes = "1" * 64, "2" * 64
    sample = hashlib.sha256(name.encode()).hexdigest()
    digest = hashlib.sha256(f"{config}{shapes}{sample}".encode()).hexdigest()
    return BaseFingerprint(
        digest, {"model.safetensors": "4" * 64}, config, "5" * 64, sample, shapes
    )


def some_manifest(request_id: str = "0001", **fields: Any) -> ForgetManifest:
    """The least that a caller gives."""
    base = {"name": "org/tiny", "fingerprint": some_fingerprint().to_json()}
    return ForgetManifest(**{"request_id": request_id, "base": base, **fields})


@pytest.fixture(autouse=True)
def _private_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("UNLEARNER_KEY", str(home / "key"))
    monkeypatch.setenv("UNLEARNER_CACHE", str(home / "cache"))
    monkeypatch.delenv("UNLEARNER_STORE", raising=False)


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter folder; a new name each call."""
    made = iter(range(1000))

    def make(**options: Any) -> Path:
        return write_adapter(tmp_path / "made" / f"adapter-{next(made)}", **options)

    return make


@pytest.fixture
def make_manifest() -> Callable[..., ForgetManifest]:
    return some_manifest


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore.open(tmp_path / "store", create=True, timeout=5)


@pytest.fixture
def publish(store: AdapterStore, make_adapter: Callable[..., Path]) -> Callable[..., Any]:
    """Publishes a random adapter with manifest fields; returns the StoredAdapter."""

    def run(request_id: str, **fields: Any) -> Any:
        seed = sum(map(ord, request_id))
        return store.publish(make_adapter(seed=seed), some_manifest(request_id, **fields))

    return run


@pytest.fixture
def make_fingerprint() -> Callable[..., BaseFingerprint]:
    return some_fingerprint
