"""Reading what a store holds: manifests, names, folders. Changes nothing and takes no lock."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from adapters.base.fingerprint import BaseFingerprint
from adapters.errors import AdapterNotFound, StoreCorrupt
from adapters.store.manifest import ForgetManifest
from adapters.store.states import StoreState
from adapters.store.verify import MANIFEST_NAME, VerifyResult, verify_folder


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
        """What checking the adapter found."""
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
