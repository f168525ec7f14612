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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from adapters.base.load import BF16_CAPABILITY, computes_in_bf16, dtype_on
from ui.console import size_text

Status = Literal["ok", "warn", "fail"]
OLDEST_PYTHON = (3, 10)
LOW_DISK, LOW_MEMORY = 10e9, 4e9


@dataclass(frozen=True)
class Finding:
    """The result of one check; `fix` is empty if there is nothing to do."""

    name: str
    status: Status
    detail: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        """name, status, detail, fix."""
        return asdict(self)


NOT_TRIED = "; not tried (--full)"
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


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("python", "fail", found, "Install Python 3.10 or newer.")
    return Finding("python", "ok", f"{found} ({sys.executable})")


def _our_adapters() -> Finding:
    """PyPI's `adapters` (AdapterHub) installs a package of the same name over ours."""
    spec = importlib.util.find_spec("adapters")
    home = Path(spec.origin).parent if spec and spec.origin else None
    ours = Path(__file__).resolve().parent.parent / "adapters"
    fix = "Use a separate environment for unlearner: `pip uninstall adapters`, then reinstall."
    if home is None or home.resolve() != ours:
        return Finding("adapters package", "fail", f"imported from {home}, not from {ours}", fix)
    if _version("adapters") is not None:
        detail = f"PyPI's adapters {_version('adapters')} (AdapterHub) is installed over ours"
        return Finding("adapters package", "fail", detail, fix)
    return Finding("adapters package", "ok", f"ours, {home}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{size_text(memory.available)} free of {size_text(memory.total)}"
    if memory.available < LOW_MEMORY:
        fix = "Close other programs, or use --load-in-4bit and small batches."
        return Finding("memory", "warn", detail, fix)
    return Finding("memory", "ok", detail)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    detail = f"{size_text(free)} free in {folder}"
    if free < LOW_DISK:
        fix = "Free some space: a 7B base takes 13 GB, a merged model as much again."
        return Finding("disk", "warn", detail, fix)
    return Finding("disk", "ok", detail)


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
    wanted = _required(name)
    if not wanted.contains(version, prereleases=True):
        return Finding(name, "fail", f"{version}, but {name}{wanted} is needed", fix)
    return Finding(name, "ok", version)


def _required(name: str) -> SpecifierSet:
    """The versions of a package that unlearner needs, as its metadata states."""
    try:
        lines = importlib.metadata.requires("unlearner") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        lines = []
    requirements = [Requirement(line) for line in lines]
    return next(
        (each.specifier for each in requirements if each.name == name and each.marker is None),
        SpecifierSet(),
    )


def _torch_version() -> Finding:
    found = _package("torch")
    if found.status == "fail":
        fix = "Install torch for this machine (https://pytorch.org/get-started)."
        return Finding("torch", "fail", found.detail, fix)
    return Finding("torch", "ok", f"{found.detail}{NOT_TRIED}")


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
    if float(capability) < BF16_CAPABILITY:
        return Finding("gpu", "warn", detail, NO_BF16)
    return Finding("gpu", "ok", detail)


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        fix = "Install torch for this machine (https://pytorch.org/get-started)."
        return Finding("torch", "fail", f"cannot be imported: {error}", fix)
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
    if not native:
        return Finding("gpu", "warn", detail, NO_BF16)
    return Finding("gpu", "ok", detail)


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
    if error > 0.2:
        return Finding("4-bit", "fail", detail, "Reinstall bitsandbytes: its results are wrong.")
    return Finding("4-bit", "ok", detail)


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
    if importlib.util.find_spec("flash_attn") is None:
        return Finding("attention", "ok", "sdpa")
    return Finding("attention", "ok", f"flash-attention {_version('flash_attn') or '2'}")


def _hub() -> Finding:
    constants = _import("huggingface_hub.constants")
    if constants is None:
        return Finding("hub", "fail", "huggingface_hub is not installed", "Install it.")
    cache = Path(constants.HF_HUB_CACHE)
    kinds = [path.name.split("--")[0] for path in cache.glob("*--*")] if cache.is_dir() else []
    detail = f"cache {cache}: {kinds.count('models')} models, {kinds.count('datasets')} data sets"
    if constants.HF_HUB_OFFLINE:
        fix = "Unset HF_HUB_OFFLINE to download, or give folders with --base and --data."
        return Finding("hub", "warn", f"offline; {detail}", fix)
    return Finding("hub", "ok", detail)


def _store(path: Path) -> Finding:
    from adapters.errors import UserError
    from adapters.store.store import AdapterStore

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
        return Finding(
            "store", "fail", f"the audit log was changed: {'; '.join(log.problems)}", fix
        )
    bad = [result for result in results if not result.ok]
    if bad:
        detail = "; ".join(f"{result.slug}: {', '.join(result.problems)}" for result in bad)
        fix = "Import the adapter again from a copy, or remove it."
        return Finding("store", "fail", detail, fix)
    return Finding("store", "ok", f"{path}: {len(results)} adapters, all intact, log unbroken")
