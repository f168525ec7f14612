"""What a result depends on besides data and settings: versions, commit, device, threads."""

from __future__ import annotations

import gc
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "unlearner",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
)
# mallopt's number of the size, in bytes, from which blocks are mapped; and that size.
_M_MMAP_THRESHOLD, LARGEST_KEPT = -3, 2**20
# Below this many weights a second thread spends its time waiting for the first.
SMALL_MODEL = 20_000_000
# Above this many weights an adapter is trained rather than all: AdamW takes 16 bytes per weight.
FULL_LIMIT = 1_000_000_000
# By size: (weights below, rate of all weights, rate of an adapter). Only the first line has been
# tried by us; the others follow the rates at which models of that size are commonly tuned.
_ATTACK_RATES = ((SMALL_MODEL, 3e-4, 3e-3), (FULL_LIMIT, 5e-5, 5e-4), (math.inf, 1e-5, 2e-4))


def utc_now() -> str:
    """The time in UTC, as written in logs and manifests."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def versions() -> dict[str, str]:
    """Installed versions of the packages a result depends on, and Python's."""
    return dict(_installed())


@cache  # one evaluation asks ten times, and each reads the metadata of every package
def _installed() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


@cache  # of the code as it was imported
def commit() -> str | None:
    """The commit this code runs from, `-dirty` with uncommitted changes; None outside git.

    Only the repository whose root holds this package counts: an installed package may lie in a
    virtual environment inside a repository of the user's.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            cwd=root,
            # Inside a git hook these name the repository of the hook.
            env={k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def describe(device: str, seed: int) -> dict[str, Any]:
    """The `env` of a manifest: versions, commit, seed, device and its name."""
    import torch

    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    return {
        "versions": versions(),
        "commit": commit(),
        "seed": seed,
        "device": device,
        "device_name": name.replace(" ", "-"),
    }


def free_memory() -> None:
    """Frees models that nothing refers to: a PEFT model holds itself in reference cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def return_freed_memory() -> bool:
    """From now on this process gives freed memory back to the system at once; whether it can.

    The GNU C library keeps freed blocks of up to 32 MiB, and seldom finds use for an aligned one,
    as all of torch's are, before its release 2.38: a training step then holds several times what
    its tensors take. Giving them back costs time, since every new block is cleared again.
    """
    import ctypes

    library = ctypes.CDLL(None) if os.name == "posix" else None
    if library is None or not hasattr(library, "mallopt"):
        return False
    changed = bool(library.mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT))
    library.malloc_trim(0)
    return changed


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; the model's mode is put back afterwards."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def threads_for(model: torch.nn.Module) -> Iterator[None]:
    """Inside: one torch thread where the model is small and on the CPU."""
    import torch

    before = torch.get_num_threads()
    weights = sum(p.numel() for p in model.parameters())
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if on_cpu and weights < SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def attack_rates(weights: int) -> tuple[float, float]:
    """Constant learning rates of a relearning attack on a model of so many weights.

    Returns:
        That of an attack on all weights, and that of one by an adapter.
    """
    _, full, adapter = next(line for line in _ATTACK_RATES if weights < line[0])
    return full, adapter
