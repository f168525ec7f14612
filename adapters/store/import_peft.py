"""Adapters that come from elsewhere: a PEFT LoRA checked against the base, then published."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.atomic_files import copy_file, sha256_file, write_json
from adapters.base.fingerprint import fingerprint_base
from adapters.errors import UserError
from adapters.lora.format import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_finite,
    read_adapter,
    require_fits,
)
from adapters.store.manifest import ForgetManifest
from adapters.tensors import write_float32

if TYPE_CHECKING:
    from adapters.store.catalog import StoredAdapter
    from adapters.store.store import AdapterStore


def import_adapter(
    store: AdapterStore, folder: Path, base_folder: Path, *, request_id: str, base_name: str
) -> StoredAdapter:
    """The adapter of `folder` in the store, with policy `imported`.

    Every tensor is checked against the base's own shapes; bf16 and f16 are widened to float32,
    which loses nothing. Symbolic links, other formats and other kinds of adapters are refused.
    """
    _refuse_links(folder)
    files = read_adapter(folder, any_float=True)
    check_finite(files)
    require_fits(files, base_folder)
    config = files.config
    manifest = ForgetManifest(
        # Not the folder's name: that may say whom the adapter forgets.
        request_id=request_id or f"imported-{sha256_file(files.weights)[:8]}",
        policy="imported",
        base={
            "name": base_name or str(config["base_model_name_or_path"]) or base_folder.name,
            "revision": None,
            "fingerprint": fingerprint_base(base_folder).to_json(),
        },
        origin={"kind": "peft", "dtypes": sorted({t.dtype for t in files.header.tensors.values()})},
        lora={
            "r": config["r"],
            "alpha": config["lora_alpha"],
            "target_modules": config["target_modules"],
        },
    )
    with tempfile.TemporaryDirectory() as scratch:
        clean = Path(scratch)
        write_json(clean / CONFIG_NAME, config)
        if {info.dtype for info in files.header.tensors.values()} == {"F32"}:
            copy_file(files.weights, clean / WEIGHTS_NAME)
        else:
            tensors = {name: files.header.read(name) for name in files.tensors}
            write_float32(clean / WEIGHTS_NAME, tensors)
        return store.publish(clean, manifest)


def _refuse_links(folder: Path) -> None:
    parts = list(folder.parts)
    while parts and parts[0] == "..":
        parts.pop(0)  # the way a person types a neighbouring folder
    if ".." in parts:
        raise UserError(f"The path {folder} has '..' in it.", "Give the folder itself.")
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.", "Give the folder of a PEFT adapter.")
    for entry in [folder, *(Path(e.path) for e in os.scandir(folder))]:
        if entry.is_symlink():
            raise UserError(
                f"{entry.name} is a symbolic link.", "Copy the files themselves, then import."
            )
