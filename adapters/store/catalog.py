"""What a store holds: adapters by name, their manifests, and whether they are as recorded."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from adapters.atomic_files import sha256_file
from adapters.base.fingerprint import BaseFingerprint, require_same_base
from adapters.errors import AdapterNotFound, StoreCorrupt, UserError
from adapters.lora.format import CONFIG_NAME, check_finite, config_bytes, read_adapter
from adapters.store.manifest import ForgetManifest
from adapters.store.states import StoreState

MANIFEST_NAME = "forget_manifest.json"
EVALS_NAME = "evals"
# The settings of the run that made an adapter or a result, as `--config` takes them.
SETTINGS_NAME = "run.yaml"


@dataclass(frozen=True)
class VerifyResult:
    """Result of checking one adapter; `problems` is empty when all is as recorded."""

    slug: str
    problems: tuple[str, ...]
    wrong_base: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class StoredAdapter:
    """One adapter of the store. `problem` is set, and the manifest blank, when it is unreadable."""

    slug: str
    path: Path
    manifest: ForgetManifest
    status: str
    scale: float | None = None
    problem: str = ""

    @property
    def label(self) -> str:
        """The name that people see."""
        return self.manifest.label or self.slug

    @property
    def active(self) -> bool:
        """Whether it is part of the stack."""
        return self.scale is not None

    @property
    def size(self) -> int:
        """Bytes of its two files."""
        return sum(int(entry["size"]) for entry in self.manifest.files.values())


class Catalog:
    """The adapters in the store at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, slug: str) -> Path:
        """Where the adapter lies."""
        return self.root / "adapters" / slug

    def manifest(self, slug: str) -> ForgetManifest:
        """The adapter's manifest; StoreCorrupt when it cannot be read."""
        return ForgetManifest.read(self.folder(slug) / MANIFEST_NAME)

    def parents_of(self, slug: str) -> tuple[tuple[str, ...], dict[str, float]]:
        """Parents in order and their scales; none for an unreadable manifest: `verify` tells."""
        try:
            manifest = self.manifest(slug)
        except StoreCorrupt:
            return (), {}
        return manifest.parents, manifest.parent_scales

    def on_disk(self) -> list[str]:
        """Names in the folder of adapters, without temporaries."""
        return [e.name for e in os.scandir(self.root / "adapters") if not e.name.startswith(".")]

    def listed(self, state: StoreState, *, purged: bool = False) -> list[StoredAdapter]:
        """All adapters in the order of their numbers."""
        return [self.stored(slug, state) for slug in self.slugs(state, purged=purged)]

    def slugs(self, state: StoreState, *, purged: bool = False) -> list[str]:
        """Slugs in the order of their numbers."""
        chosen = [s for s, status in state.status.items() if purged or status != "purged"]
        return sorted(chosen, key=lambda slug: (int(slug[1:].split("_")[0]), slug))

    def stored(self, slug: str, state: StoreState) -> StoredAdapter:
        """The adapter as listed: an unreadable manifest is a problem of this one only."""
        status = state.status[slug]
        scale = {active.slug: active.scale for active in state.stack}.get(slug)
        file = self.folder(slug) / MANIFEST_NAME
        if status == "purged":
            file = self.root / "tombstones" / f"{slug}.json"
        try:
            return StoredAdapter(slug, self.folder(slug), ForgetManifest.read(file), status, scale)
        except StoreCorrupt as error:
            blank = ForgetManifest(request_id="", slug=slug)
            return StoredAdapter(slug, self.folder(slug), blank, status, scale, error.problem)

    def verify(
        self, slug: str, state: StoreState, base: BaseFingerprint | None = None
    ) -> VerifyResult:
        """Check the adapter."""
        return verify_folder(self.folder(slug), state, base)

    def resolve(self, ref: str, state: StoreState) -> str:
        """The slug that `ref` names: slug, unique start of one, label or request id."""
        living = self.slugs(state)
        if ref in living:
            return ref
        if state.status.get(ref) == "purged":
            raise AdapterNotFound(f"Adapter {ref} was removed.", "Its manifest is in tombstones/.")
        hits = [slug for slug in living if ref and slug.startswith(ref)]
        names = list(living)
        if not hits:
            listed = self.listed(state)
            hits = [a.slug for a in listed if ref in (a.manifest.label, a.manifest.request_id)]
            names += [a.manifest.label for a in listed if a.manifest.label]
        if len(hits) == 1 and ref:
            return hits[0]
        if len(hits) > 1 and ref:
            raise AdapterNotFound(
                f"{ref!r} names {len(hits)} adapters: {', '.join(hits[:5])}.", "Give a slug."
            )
        near = difflib.get_close_matches(ref, names, n=1, cutoff=0.5)
        fix = f"Did you mean {near[0]!r}?" if near else "`unlearner adapters list` shows all."
        raise AdapterNotFound(f"No adapter is called {ref!r}.", fix)


def verify_folder(
    folder: Path, state: StoreState, base: BaseFingerprint | None = None
) -> VerifyResult:
    """Check the adapter in `folder` of a store; every problem is named."""
    slug = folder.name
    try:
        manifest = ForgetManifest.read(folder / MANIFEST_NAME)
    except UserError as error:
        return VerifyResult(slug, (error.problem,))
    problems = [] if manifest.slug == slug else [f"its manifest is that of {manifest.slug}"]
    recorded = state.manifests.get(slug)
    if recorded and sha256_file(folder / MANIFEST_NAME) != recorded:
        problems.append(f"{MANIFEST_NAME} was changed since it was published")
    problems += _file_problems(folder, manifest)
    if not problems:
        problems += _content_problems(folder, manifest)
    problems += [
        f"its parent {parent} is {state.status.get(parent, 'not in this store')}"
        for parent in manifest.parents
        if state.status.get(parent) in (None, "purged", "quarantined")
    ]
    wrong_base = False
    if base is not None:
        try:
            require_same_base(manifest_base(manifest), base)
        except UserError as error:
            problems.append(error.problem)
            wrong_base = True
    return VerifyResult(slug, tuple(problems), wrong_base)


def manifest_base(manifest: ForgetManifest) -> BaseFingerprint:
    """The fingerprint of the base that the adapter was trained on."""
    value = manifest.base.get("fingerprint")
    if not isinstance(value, dict):
        raise UserError(
            f"The manifest of request {manifest.request_id} does not say which base it is for.",
            "Give base={'fingerprint': fingerprint_base(folder).to_json(), ...}.",
        )
    return BaseFingerprint.from_json(value)


def _file_problems(folder: Path, manifest: ForgetManifest) -> list[str]:
    problems = []
    for name, entry in sorted(manifest.files.items()):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
        elif sha256_file(path) != entry["sha256"]:
            problems.append(f"{name} was changed (its SHA-256 is another)")
    known = {*manifest.files, MANIFEST_NAME, EVALS_NAME}
    extra = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if extra:
        problems.append(f"{extra[0]} does not belong there")
    return problems


def _content_problems(folder: Path, manifest: ForgetManifest) -> list[str]:
    try:
        files = read_adapter(folder)
        check_finite(files)
    except UserError as error:
        return [error.problem]
    if (folder / CONFIG_NAME).read_bytes() != config_bytes(files.config):
        return [f"{CONFIG_NAME} is not in canonical form"]
    if manifest.slug.rsplit("_", 1)[-1] != manifest.files[files.weights.name]["sha256"][:8]:
        return ["its name does not carry the hash of its weights"]
    return []


def require_ok(result: VerifyResult) -> None:
    """Raise StoreCorrupt with the problems of a result, unless there are none."""
    if result.problems:
        raise StoreCorrupt(
            f"Adapter {result.slug} is not as recorded: {'; '.join(result.problems)}.",
            "Restore it from a copy, or train it again.",
        )
