"""Putting an adapter into a store: checked, written aside, renamed, logged."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.atomic_files import (
    copy_file,
    disk_error,
    fsync_folder,
    remove_tree,
    sha256_file,
    temporary_name,
    write_bytes,
    write_json,
)
from adapters.base.fingerprint import BaseFingerprint, require_same_base
from adapters.environment import utc_now
from adapters.errors import UserError
from adapters.lora.format import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterFiles,
    canonical_config,
    check_finite,
    config_bytes,
    public_name,
    read_adapter,
    update_norms,
)
from adapters.store.catalog import MANIFEST_NAME, Catalog, StoredAdapter, manifest_base
from adapters.store.journal import Journal
from adapters.store.manifest import ForgetManifest
from adapters.store.states import StoreState


def publish_folder(
    journal: Journal, catalog: Catalog, folder: Path, manifest: ForgetManifest
) -> StoredAdapter:
    """The adapter of `folder` as it is stored now.

    Everything is checked before the store is touched; a failure while writing leaves it as it was.
    """
    manifest = manifest.checked()
    base = manifest_base(manifest)
    files = read_adapter(folder)
    check_finite(files)
    _check_shape_claims(manifest, files)
    _require_base(journal.state(), base)
    aside = journal.root / "adapters" / temporary_name()
    try:
        filled = _write_aside(aside, files, manifest)
        with journal.locked() as state:
            _require_base(state, base)
            filled = _with_parents(state, catalog, filled)
            stored = _commit(journal, state, aside, filled)
            return StoredAdapter(stored.slug, catalog.folder(stored.slug), stored, "ready")
    except OSError as error:
        raise disk_error(error, aside) from error
    finally:
        remove_tree(aside)


def _write_aside(aside: Path, files: AdapterFiles, manifest: ForgetManifest) -> ForgetManifest:
    """Copy the two files to `aside`; the manifest with their hashes, the norms and the time."""
    aside.mkdir()
    name = str(manifest.base.get("name") or "") or str(files.config["base_model_name_or_path"])
    config = canonical_config(files.config, name)
    write_bytes(aside / CONFIG_NAME, config_bytes(config))
    copied = copy_file(files.weights, aside / WEIGHTS_NAME)
    sizes: dict[str, dict[str, Any]] = {
        WEIGHTS_NAME: {"sha256": copied, "size": (aside / WEIGHTS_NAME).stat().st_size},
        CONFIG_NAME: {
            "sha256": sha256_file(aside / CONFIG_NAME),
            "size": (aside / CONFIG_NAME).stat().st_size,
        },
    }
    # What was checked is the source: the copy must be the same file.
    if read_adapter(aside).header.tensors != files.header.tensors:
        raise UserError(f"{files.weights} changed while it was read.", "Publish it again.")
    base = {**manifest.base, "name": public_name(name)}
    return replace(
        manifest,
        base=base,
        files=sizes,
        norms=update_norms(files),
        created=manifest.created or utc_now(),
    )


def _commit(
    journal: Journal, state: StoreState, aside: Path, manifest: ForgetManifest
) -> ForgetManifest:
    """Rename `aside` to its slug and log it; taken back when the log cannot be written."""
    on_disk = [entry.name for entry in os.scandir(journal.root / "adapters")]
    number = state.next_number(on_disk)
    slug = f"r{number:04d}_{manifest.files[WEIGHTS_NAME]['sha256'][:8]}"
    manifest = replace(manifest, slug=slug)
    write_json(aside / MANIFEST_NAME, manifest.to_json())
    manifest = ForgetManifest.read(aside / MANIFEST_NAME)  # what cannot be read is not published
    fsync_folder(aside)
    final = journal.root / "adapters" / slug
    os.rename(aside, final)
    try:
        fsync_folder(final.parent)
        entry: dict[str, Any] = {
            "request_id": manifest.request_id,
            "manifests": {slug: sha256_file(final / MANIFEST_NAME)},
        }
        if state.base is None:
            entry["base"] = base_record(manifest)
        journal.commit(state, "publish", [slug], status={slug: "ready"}, **entry)
    except (OSError, UserError):
        with contextlib.suppress(OSError):
            os.rename(final, aside)
        raise
    return manifest


def base_record(manifest: ForgetManifest) -> dict[str, Any]:
    """What the store remembers of its base."""
    return {key: manifest.base.get(key) for key in ("name", "revision", "fingerprint")}


def _require_base(state: StoreState, base: BaseFingerprint) -> None:
    if state.base is not None:
        require_same_base(BaseFingerprint.from_json(state.base["fingerprint"]), base)


def _with_parents(state: StoreState, catalog: Catalog, manifest: ForgetManifest) -> ForgetManifest:
    """The manifest with its parents' hashes; parents and superseded must be in the store."""
    for slug in (*manifest.parents, *manifest.supersedes):
        if state.status.get(slug) in (None, "purged", "quarantined"):
            raise UserError(
                f"The manifest names {slug}, which is {state.status.get(slug, 'not')} in this "
                "store.",
                "Publish into the store that holds its parents.",
            )
    hashes = {
        slug: str(catalog.manifest(slug).files[WEIGHTS_NAME]["sha256"]) for slug in manifest.parents
    }
    return replace(manifest, parent_sha256=hashes)


def _check_shape_claims(manifest: ForgetManifest, files: AdapterFiles) -> None:
    """What the manifest says about the LoRA must be what the files are."""
    names = {
        "r": "r",
        "lora_r": "r",
        "alpha": "lora_alpha",
        "lora_alpha": "lora_alpha",
        "target_modules": "target_modules",
    }
    for claim, setting in names.items():
        said, actual = manifest.lora.get(claim), files.config[setting]
        if isinstance(said, (list, tuple)):
            said = sorted(said)
        if said is not None and said != actual:
            raise UserError(
                f"The manifest says lora {claim} is {said}, the adapter's is {actual}.",
                "Publish the adapter that this manifest is about.",
            )
