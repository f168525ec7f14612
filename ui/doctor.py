"""Checks of this machine: one finding each, with a fix where something is wrong."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from adapters.base.load import BF16_CAPABILITY, computes_in_bf16, dtype_on
from adapters.errors import UserError
from adapters.store.store import AdapterStore
from ui.console import size_text

Status = Literal["ok", "warn", "fail"]
LOW_DISK, LOW_MEMORY = 10e9, 4e9


@dataclass(frozen=True)
class Finding:
    """The result of one check; `fix` is empty if there is nothing to do."""

    name: str
    status: Status
    detail: str
    fix: str = ""


NOT_TRIED = "; not tried (--full)"
INSTALL_TORCH = "Install torch for this machine (https://pytorch.org/get-started)."
NO_BF16 = "Leave --dtype out: this GPU has no bf16, and fp16 is used in its place."
NO_GPU = Finding(
    "gpu", "warn", "no CUDA device", "Small models run on the CPU; a 7B base needs a GPU."
)
NO_FOUR_BIT = Finding(
    "4-bit",
    "warn",
    "bitsandbytes is not installed",
    "For --load-in-4bit: `pip install 'unlearner[quant]'`.",
)


def findings(store: Path, *, full: bool = False) -> Iterator[Finding]:
    """Every finding as soon as it is known, cheap checks first.

    torch and bitsandbytes take seconds to import: only `full` imports them and uses them.
    """
    checks: list[Callable[[], Finding]] = [
        _python,
        _our_adapters,
        _memory,
        lambda: _disk(Path.cwd()),
        lambda: _writable(store),
        _torch if full else _torch_version,
        _gpu if full else _gpu_driver,
        lambda: _package("transformers"),
        lambda: _package("peft"),
        lambda: _package("trl"),
        lambda: _package("datasets"),
        _four_bit if full else _four_bit_version,
        _attention,
        _hub,
        lambda: _store(store),
    ]
    for check in checks:
        yield check()


def _judged(name: str, holds: bool, detail: str, fix: str, otherwise: Status = "warn") -> Finding:
    """A finding that is fine where `holds`, else `otherwise` and to be fixed."""
    return Finding(name, "ok", detail) if holds else Finding(name, otherwise, detail, fix)


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _our_adapters() -> Finding:
    """PyPI's `adapters` (AdapterHub) installs a package of the same name over ours."""
    spec = importlib.util.find_spec("adapters")
    home = Path(spec.origin).parent if spec and spec.origin else None
    ours = Path(__file__).resolve().parent.parent / "adapters"
    fix = "Use a separate environment for unlearner: `pip uninstall adapters`, then reinstall."
    if home is None or home.resolve() != ours:
        return Finding("adapters package", "fail", f"imported from {home}, not from {ours}", fix)
    theirs = _version("adapters")
    detail = f"PyPI's adapters {theirs} (AdapterHub) is installed over ours"
    return _judged(
        "adapters package", theirs is None, detail if theirs else f"ours, {home}", fix, "fail"
    )


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{size_text(memory.available)} free of {size_text(memory.total)}"
    fix = "Close other programs, or use --load-in-4bit and small batches."
    return _judged("memory", memory.available >= LOW_MEMORY, detail, fix)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    detail = f"{size_text(free)} free in {folder}"
    fix = "Free some space: a 7B base takes 13 GB, a merged model as much again."
    return _judged("disk", free >= LOW_DISK, detail, fix)


def _writable(store: Path) -> Finding:
    folder = next(path for path in [store.absolute(), *store.absolute().parents] if path.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".unlearner-doctor-"):
            pass
    except OSError as error:
        fix = "Give --store a folder you may write to."
        return Finding("write access", "fail", f"{folder}: {error.strerror}", fix)
    return Finding("write access", "ok", f"{folder}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Finding:
    version = _version(name)
    fix = "Run `pip install --upgrade unlearner`, which brings every package that it needs."
    if version is None:
        return Finding(name, "fail", "not installed", fix)
    try:
        lines = importlib.metadata.requires("unlearner") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        lines = []
    needed = [r for r in map(Requirement, lines) if r.name == name and r.marker is None]
    wanted = needed[0].specifier if needed else SpecifierSet()
    if wanted.contains(version, prereleases=True):
        return Finding(name, "ok", version)
    return Finding(name, "fail", f"{version}, but {name}{wanted} is needed", fix)


def _torch_version() -> Finding:
    found = _package("torch")
    if found.status == "fail":
        return replace(found, fix=INSTALL_TORCH)
    return replace(found, detail=f"{found.detail}{NOT_TRIED}")


def _gpu_driver() -> Finding:
    """What the driver says, without torch."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return NO_GPU
    asked = [tool, "--query-gpu=name,memory.free,memory.total,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    cells = [cell.strip() for cell in done.stdout.partition("\n")[0].split(",")]
    if done.returncode != 0 or len(cells) != 4:
        return NO_GPU
    name, free, total, capability = cells
    detail = f"{name}, {free} of {total} free{NOT_TRIED}"
    return _judged("gpu", float(capability) >= BF16_CAPABILITY, detail, NO_BF16)


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", "fail", f"cannot be imported: {error}", INSTALL_TORCH)
    threads = torch.get_num_threads()
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("torch", "ok", f"{torch.__version__}, {cuda}, {threads} threads")


def _gpu() -> Finding:
    torch = _import("torch")
    if torch is None or not torch.cuda.is_available():
        return NO_GPU
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    native = computes_in_bf16()
    more = torch.cuda.device_count() - 1
    detail = (
        f"{name}, {'bf16' if native else 'no bf16'}, {size_text(free)} of {size_text(total)} free"
        + (f", and {more} more" if more else "")
    )
    return _judged("gpu", native, detail, NO_BF16)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _four_bit_version() -> Finding:
    version = _version("bitsandbytes")
    if version is None:
        return NO_FOUR_BIT
    return Finding("4-bit", "ok", f"bitsandbytes {version}{NOT_TRIED}")


def _four_bit() -> Finding:
    """A real nf4 matrix product on the device that would be used, against the float one."""
    torch, bnb = _import("torch"), _import("bitsandbytes")
    if torch is None or bnb is None:
        return NO_FOUR_BIT
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        error = _four_bit_error(torch, bnb, device)
    except Exception as problem:  # bitsandbytes raises whatever its backend raises
        fix = "Reinstall bitsandbytes for this torch, or omit --load-in-4bit."
        return Finding("4-bit", "warn", f"bitsandbytes {bnb.__version__}: {problem}", fix)
    detail = f"bitsandbytes {bnb.__version__} on {device}, nf4 product off by {error:.1%}"
    fix = "Reinstall bitsandbytes: its results are wrong."
    return _judged("4-bit", error <= 0.2, detail, fix, "fail")


def _four_bit_error(torch: Any, bnb: Any, device: str) -> float:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    x = torch.randn(4, 64, generator=generator)
    dtype = dtype_on("auto", device)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=dtype)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    with torch.no_grad():
        got = layer.to(device)(x.to(device, dtype)).float().cpu()
    right = x @ weight.T
    return float((got - right).norm() / right.norm())


def _attention() -> Finding:
    flash = importlib.util.find_spec("flash_attn") is not None
    kernel = f"flash-attention {_version('flash_attn') or '2'}" if flash else "sdpa"
    return Finding("attention", "ok", kernel)


def _hub() -> Finding:
    constants = _import("huggingface_hub.constants")
    if constants is None:
        return Finding("hub", "fail", "huggingface_hub is not installed", "Install it.")
    cache = Path(constants.HF_HUB_CACHE)
    kinds = [path.name.split("--")[0] for path in cache.glob("*--*")] if cache.is_dir() else []
    detail = f"cache {cache}: {kinds.count('models')} models, {kinds.count('datasets')} data sets"
    fix = "Unset HF_HUB_OFFLINE to download, or give folders with --base and --data."
    offline = constants.HF_HUB_OFFLINE
    return _judged("hub", not offline, f"offline; {detail}" if offline else detail, fix)


def _store(path: Path) -> Finding:
    if not (path / "store.json").is_file():
        return Finding("store", "ok", f"none in {path} yet")
    try:
        store = AdapterStore.open(path)
        results = store.verify(None, None)
        log = store.verify_log()
    except UserError as error:
        return Finding("store", "fail", error.problem, error.fix)
    if not log.ok:
        fix = "See `unlearner adapters log --verify`; restore audit.jsonl from a copy."
        detail = f"the audit log was changed: {'; '.join(log.problems)}"
        return Finding("store", "fail", detail, fix)
    bad = [result for result in results if not result.ok]
    if bad:
        detail = "; ".join(f"{result.slug}: {', '.join(result.problems)}" for result in bad)
        fix = "Import the adapter again from a copy, or remove it."
        return Finding("store", "fail", detail, fix)
    return Finding("store", "ok", f"{path}: {len(results)} adapters, all intact, log unbroken")
