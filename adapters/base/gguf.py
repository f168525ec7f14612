"""GGUF files as bases: dequantised once into a cache, as safetensors with config and tokenizer.

llama.cpp's quantised formats cannot be trained on or fingerprinted tensor by tensor. transformers
reads many of them (package `gguf`); what it makes of a file is kept, so that a GGUF is from then on
a base like any other.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from adapters.atomic_files import sha256_file, sha256_json, temporary_name, write_bytes
from adapters.base.fingerprint import cache_folder
from adapters.errors import UserError

SUFFIX = ".gguf"
SCHEMA = 1
# Files from this size on are kept in bf16, smaller ones in float32, which loses nothing of them.
LARGE = 2 * 1024**3


def find_gguf(name: str) -> Path | None:
    """The GGUF file that `name` stands for, None where it stands for none.

    `name` is a file, a folder that holds one and no safetensors, or an installed package that ships
    one (which is located, not imported).

    Raises:
        UserError: a folder or package with several, or a file that does not exist.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == SUFFIX:
        if not path.is_file():
            raise UserError(f"There is no file {path}.", "Give the path of a GGUF file.")
        return path
    if path.is_dir():
        return None if any(path.glob("*.safetensors")) else _only(path)
    package = name.replace("-", "_")
    if not package.isidentifier():
        return None
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    return next(filter(None, map(_only, folders)), None)


def _only(folder: Path) -> Path | None:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == SUFFIX)
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{folder} holds several GGUF files: {names}.", "Name one of them.")
    return files[0] if files else None


def dequantised(path: Path) -> Path:
    """Folder of the file's model as safetensors with config and tokenizer, written once.

    Raises:
        UserError: the package `gguf` is missing, or the file cannot be read.
    """
    stat = path.stat()
    stamp = sha256_json([SCHEMA, str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    known = cache_folder() / "gguf" / f"{stamp[:16]}.json"
    if known.is_file():
        folder: Path = known.parent / json.loads(known.read_text(encoding="utf-8"))["folder"]
        if folder.is_dir():
            return folder
    digest = sha256_file(path)
    folder = known.parent / f"{path.stem}-{digest[:12]}"
    if not folder.is_dir():
        partial = known.parent / temporary_name("gguf")
        partial.mkdir(parents=True)
        try:
            with redirect_stderr(StringIO()):  # bars of three libraries
                _convert(path, partial)
            source = {"schema": SCHEMA, "file": path.name, "sha256": digest}
            write_bytes(partial / "gguf_source.json", json.dumps(source, indent=1).encode())
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # unless another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    write_bytes(known, json.dumps({"folder": folder.name}).encode())
    return folder


def _convert(path: Path, out: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"Reading {path.name} needs the package gguf, which is not installed.",
            "pip install gguf",
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if path.stat().st_size >= LARGE else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
        )
    # A damaged file raises anything from struct.error to OverflowError, in three libraries.
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"{path.name} cannot be read: {type(error).__name__}: {reason}",
            "Convert the original model, or give its safetensors.",
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"{path.name} cannot be read: it lacks {len(missing)} tensors of the model, first "
            f"{missing[0]}.",
            "Join a file that was split into parts with `llama-gguf-split --merge`.",
        )
    # The weights are no longer quantised: a plain model of the same configuration takes them.
    settings = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(settings))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.config.dtype = dtype
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
