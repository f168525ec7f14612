"""Adapters in one signed file, to be moved to another store of the same base.

A bundle is an uncompressed zip of `bundle.json` (every file with its SHA-256), `signature.json`
(Ed25519 over bundle.json) and the files. Reading it trusts nothing: names, sizes, hashes and the
signature are checked before anything is unpacked, and every adapter passes the checks of an import.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.atomic_files import disk_error, dump_json, parse_json, sha256_file, temporary_name
from adapters.base.fingerprint import fingerprint_base, require_same_base
from adapters.digests import store_key
from adapters.errors import StoreCorrupt, UserError
from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from adapters.store import log as audit
from adapters.store.import_peft import require_fits
from adapters.store.manifest import SLUG, ForgetManifest
from adapters.store.verify import EVALS_NAME, MANIFEST_NAME, manifest_base

if TYPE_CHECKING:
    from adapters.store.catalog import StoredAdapter
    from adapters.store.store import AdapterStore

SCHEMA = 1
PREFIX = b"unlearner bundle 1\n"
MAX_BUNDLE = 1 << 40
# What zipfile raises on files that are no zip, or a mutilated one.
BROKEN = (
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error,
    KeyError, ValueError, RuntimeError, EOFError, OSError,
)  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """A bundle that was written or checked: its adapters, who signed it (public key), its size."""

    path: Path
    slugs: tuple[str, ...]
    signer: str
    bytes: int


def export_bundle(
    store: AdapterStore,
    out: Path,
    refs: Sequence[str] | None = None,
    *,
    key: Path | None = None,
    sign: bool = True,
) -> Bundle:
    """The new file `out` with adapters and all their parents; every living one by default.

    Signed with the key at `key`, else `$UNLEARNER_SIGNING_KEY`, else
    `~/.config/unlearner/signing-key`, which is created on first use.
    """
    chosen = _with_ancestors(store, refs)
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already.", "Name a file that does not.")
    files: dict[str, Path] = {}
    for slug in chosen:
        folder = store.require_whole(slug).path
        names = [CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME]
        names += [f"{EVALS_NAME}/{p.name}" for p in sorted((folder / EVALS_NAME).glob("*.json"))]
        files.update({f"adapters/{slug}/{name}": folder / name for name in names})
    content = {
        "schema": SCHEMA,
        "created": audit.now(),
        "adapters": chosen,
        "files": {
            name: {"sha256": sha256_file(path), "size": path.stat().st_size}
            for name, path in files.items()
        },
    }
    text = dump_json(content).encode()
    signature = _sign(text, key) if sign else {}
    aside = out.with_name(temporary_name(out.name))
    try:
        with zipfile.ZipFile(aside, "x", zipfile.ZIP_STORED) as archive:
            archive.writestr("bundle.json", text)
            archive.writestr("signature.json", dump_json(signature))
            for name, path in files.items():
                archive.write(path, name)
        os.rename(aside, out)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise disk_error(error, out) from error
    return Bundle(out, tuple(chosen), str(signature.get("public_key", "")), out.stat().st_size)


def import_bundle(
    store: AdapterStore,
    path: Path,
    base_folder: Path,
    *,
    trusted: Sequence[str] = (),
    allow_unsigned: bool = False,
) -> list[StoredAdapter]:
    """The bundle's adapters as they are in this store now, parents first; none is activated.

    Numbers are given anew. An adapter that is here already (same weights, request and parents) is
    not stored twice. `trusted` lists the public keys that may have signed; empty accepts any valid
    signature.
    """
    with tempfile.TemporaryDirectory() as scratch:
        bundle = read_bundle(
            Path(path), unpack=Path(scratch), trusted=trusted, allow_unsigned=allow_unsigned
        )
        folders = [Path(scratch) / "adapters" / slug for slug in bundle.slugs]
        manifests = [ForgetManifest.read(folder / MANIFEST_NAME) for folder in folders]
        base = fingerprint_base(Path(base_folder))
        for folder, manifest in zip(folders, manifests, strict=True):
            require_same_base(manifest_base(manifest), base)
            _require_as_recorded(folder, manifest)
            require_fits(read_adapter(folder), Path(base_folder))
        renamed: dict[str, str] = {}
        stored = []
        for folder, manifest in zip(folders, manifests, strict=True):
            adapter = _store_one(store, folder, manifest, renamed, bundle.signer)
            renamed[manifest.slug] = adapter.slug
            stored.append(adapter)
        return stored


def read_bundle(
    path: Path,
    *,
    unpack: Path | None = None,
    trusted: Sequence[str] = (),
    allow_unsigned: bool = False,
) -> Bundle:
    """What is in the bundle, after checking signature, names, sizes and every hash.

    With `unpack` the files are written there. Raises StoreCorrupt for a damaged bundle, UserError
    for one that nobody trusted has signed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            text = _entry(archive, "bundle.json", 8 << 20)
            content = parse_json(text, "bundle.json")
            signer = _signer(text, parse_json(_entry(archive, "signature.json", 4096), "signature"))
            _check_signer(signer, trusted, allow_unsigned)
            slugs, files = _listing(content)
            names = [info.filename for info in archive.infolist()]
            if sorted(names) != sorted([*files, "bundle.json", "signature.json"]):
                raise StoreCorrupt("The bundle holds other files than it lists.", "Get it again.")
            for name, entry in files.items():
                _unpack(archive, name, entry, unpack)
            return Bundle(path, tuple(slugs), signer, path.stat().st_size)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.", "Check the path.") from error
    except BROKEN as error:
        raise StoreCorrupt(
            f"{path.name} is not a whole bundle: {error}.", "Get it again."
        ) from error


def _store_one(
    store: AdapterStore,
    folder: Path,
    manifest: ForgetManifest,
    renamed: dict[str, str],
    signer: str,
) -> StoredAdapter:
    parents = tuple(renamed[parent] for parent in manifest.parents)
    weights = manifest.files[WEIGHTS_NAME]["sha256"]
    for there in store.list():
        known = there.manifest
        same = not there.problem and known.files[WEIGHTS_NAME]["sha256"] == weights
        if same and (known.parents, known.request_id) == (parents, manifest.request_id):
            return there
    scales = {renamed[slug]: scale for slug, scale in manifest.parent_scales.items()}
    fresh = replace(
        manifest,
        parents=parents,
        parent_scales=scales,
        supersedes=tuple(renamed[slug] for slug in manifest.supersedes if slug in renamed),
        origin={"kind": "bundle", "slug": manifest.slug, "signer": signer or "unsigned"},
        slug="",
        parent_sha256={},
        files={},
        norms={},
    )
    stored = store.publish(folder, fresh)
    for path in sorted((folder / EVALS_NAME).glob("*.json")):
        store.attach_eval(stored.slug, path.stem, parse_json(path.read_bytes(), path.name))
    return store.get(stored.slug)


def _require_as_recorded(folder: Path, manifest: ForgetManifest) -> None:
    for name, entry in manifest.files.items():
        if sha256_file(folder / name) != entry["sha256"]:
            raise StoreCorrupt(
                f"{name} of {manifest.slug} in the bundle is not the one its manifest records.",
                "Get the bundle again.",
            )


def _with_ancestors(store: AdapterStore, refs: Sequence[str] | None) -> list[str]:
    if refs is None:
        chosen = [a.slug for a in store.list() if a.status != "quarantined"]
    else:
        chosen = [store.get(ref).slug for ref in refs]
    ordered: dict[str, None] = {}
    for slug in chosen:
        for needed in (*store.get(slug).manifest.parents, slug):
            ordered[needed] = None
    if not ordered:
        raise UserError("There is no adapter to bundle.", "Name at least one.")
    # By number: a parent is always older than its children.
    return sorted(ordered, key=lambda slug: int(slug[1:].split("_")[0]))


def _listing(content: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Slugs and files of bundle.json; only plain names below adapters/<slug>/ are possible."""
    slugs, files = content.get("adapters"), content.get("files")
    if (
        content.get("schema") != SCHEMA
        or not isinstance(slugs, list)
        or not isinstance(files, dict)
    ):
        raise StoreCorrupt("bundle.json is malformed.", "Get the bundle again.")
    if not slugs or not all(isinstance(slug, str) and SLUG.fullmatch(slug) for slug in slugs):
        raise StoreCorrupt("bundle.json names no proper adapters.", "Get the bundle again.")
    needed = {
        f"adapters/{s}/{n}" for s in slugs for n in (CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME)
    }
    for name, entry in files.items():
        folder, _, last = name.rpartition("/")
        evals = folder in {f"adapters/{slug}/{EVALS_NAME}" for slug in slugs}
        fine = name in needed or (evals and last.endswith(".json") and last[0] != ".")
        sized = isinstance(entry, dict) and type(entry.get("size")) is int
        if not fine or not sized or not 0 <= entry["size"] < MAX_BUNDLE or "\\" in name:
            raise StoreCorrupt(f"The bundle lists {name[:80]!r}.", "It was not made by unlearner.")
    if needed - set(files) or len(set(slugs)) != len(slugs):
        raise StoreCorrupt("The bundle lacks files of an adapter.", "Get it again.")
    return slugs, files


def _unpack(
    archive: zipfile.ZipFile, name: str, entry: dict[str, Any], unpack: Path | None
) -> None:
    """Check one file against its hash, and write it below `unpack`."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != entry["size"]:
        raise StoreCorrupt(f"{name} in the bundle is not as listed.", "Get it again.")
    digest = sha256()
    target = unpack / name if unpack else Path(os.devnull)
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as reader, open(target, "wb") as writer:
        while chunk := reader.read(1 << 22):
            digest.update(chunk)
            writer.write(chunk)
    if digest.hexdigest() != entry.get("sha256"):
        raise StoreCorrupt(f"{name} in the bundle was changed.", "Get it again.")


def _entry(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > limit or info.compress_type != zipfile.ZIP_STORED:
        raise StoreCorrupt(f"{name} in the bundle is too large.", "It was not made by unlearner.")
    return archive.read(info)


def _check_signer(signer: str, trusted: Sequence[str], allow_unsigned: bool) -> None:
    if not signer and not allow_unsigned:
        raise UserError(
            "The bundle is not signed.", "Ask for a signed one, or allow unsigned ones explicitly."
        )
    if trusted and signer not in trusted:
        raise UserError(
            f"The bundle is signed by {signer[:16] or 'nobody'}, who is not trusted here.",
            "Compare the public key with its owner's, then add it to the trusted ones.",
        )


def _sign(text: bytes, key: Path | None) -> dict[str, str]:
    """The signature of `text` as JSON, with the public key."""
    ed25519, serialization = _cryptography()
    given = key or os.environ.get("UNLEARNER_SIGNING_KEY")
    place = Path(given) if given else Path.home() / ".config" / "unlearner" / "signing-key"
    private = ed25519.Ed25519PrivateKey.from_private_bytes(store_key(place))
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    return {
        "algorithm": "ed25519",
        "public_key": private.public_key().public_bytes(*raw).hex(),
        "signature": private.sign(PREFIX + text).hex(),
    }


def _signer(text: bytes, signature: dict[str, Any]) -> str:
    """The public key whose signature over `text` is valid; empty when there is none."""
    if not signature:
        return ""
    ed25519, _ = _cryptography()
    from cryptography.exceptions import InvalidSignature

    public = str(signature.get("public_key"))
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(str(signature.get("signature"))), PREFIX + text)
    except (InvalidSignature, ValueError) as error:
        raise StoreCorrupt(
            "The signature of the bundle is not valid: it was changed after signing.",
            "Get it again.",
        ) from error
    return public.lower()


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UserError(
            "Signing and checking bundles needs the package cryptography.",
            "Install it with `pip install unlearner[sign]`.",
        ) from error
    return ed25519, serialization
