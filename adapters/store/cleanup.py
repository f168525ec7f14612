"""Remove, export and attach results; collect garbage; recover after a process was killed."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from adapters.errors import StoreCorrupt, UserError
from adapters.guard_records import forget_teacher
from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME
from adapters.store.catalog import (
    EVALS_NAME,
    MANIFEST_NAME,
    SETTINGS_NAME,
    Catalog,
    StoredAdapter,
    manifest_base,
    verify_folder,
)
from adapters.store.journal import Journal
from adapters.store.manifest import SLUG, WORD, ForgetManifest
from adapters.store.publish import base_record
from adapters.store.states import StoreState, after

TRASH_DAYS = 7.0
MAX_EVAL_VALUES = 20_000


@dataclass(frozen=True)
class GcReport:
    """What was deleted, or with `dry_run` would be: adapters by slug, other leftovers by name."""

    adapters: tuple[str, ...]
    leftovers: tuple[str, ...]
    bytes: int
    dry_run: bool


def remove_adapter(
    journal: Journal, catalog: Catalog, state: StoreState, slug: str, *, dry_run: bool
) -> tuple[str, int]:
    """Slug and bytes of the adapter, purged unless `dry_run`. Call it under the lock."""
    if slug in state.stack_slugs:
        raise UserError(
            f"Adapter {slug} is {state.status[slug]}.", f"Run `unlearner adapters revert {slug}`."
        )
    after("purge", slug, state.status[slug])
    children = living_children(catalog, state, slug)
    if children:
        raise UserError(
            f"Adapter {slug} is a parent of {', '.join(children)}.",
            "Remove these first: without their parent they are of no use.",
        )
    size = tree_size(catalog.folder(slug))
    if not dry_run:
        purge(journal, catalog, state, slug)
    return slug, size


def purge(journal: Journal, catalog: Catalog, state: StoreState, slug: str) -> StoreState:
    """The state after deleting the adapter's files; its manifest becomes a tombstone."""
    folder = catalog.folder(slug)
    weights = catalog.stored(slug, state).manifest.files.get(WEIGHTS_NAME)
    _write_tombstone(catalog, slug)
    state = journal.commit(state, "purge", [slug], status={slug: "purged"})
    if folder.exists():
        journal.discard(folder)
    if weights is not None:
        forget_teacher(weights["sha256"])
    return state


def living_children(catalog: Catalog, state: StoreState, slug: str) -> list[str]:
    """Adapters with files that were trained on top of `slug`."""
    return [
        child
        for child, status in state.status.items()
        if child != slug and status != "purged" and slug in catalog.parents_of(child)[0]
    ]


def write_eval(folder: Path, name: str, result: Mapping[str, Any]) -> Path:
    """The new file `evals/<name>.json`; UserError when the result holds text."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise UserError(f"{name!r} cannot name a result.", "Use letters, digits, '.', '-', '_'.")
    count = _count_values(dict(result), name)
    if count > MAX_EVAL_VALUES:
        raise UserError(
            f"The result {name} has {count} values.", "Attach the summary, not the rows."
        )
    evals = _evals_folder(folder)
    path, number = evals / f"{name}.json", 1
    while path.exists():
        number += 1
        path = evals / f"{name}-{number}.json"
    write_json(path, dict(result))
    return path


def write_settings(folder: Path, text: str) -> Path:
    """The file of the adapter's settings, now holding `text`."""
    path = _evals_folder(folder) / SETTINGS_NAME
    write_bytes(path, text.encode())
    return path


def _evals_folder(folder: Path) -> Path:
    evals = folder / EVALS_NAME
    try:
        evals.mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(error, evals) from error
    return evals


def export_adapter(adapter: StoredAdapter, out: Path) -> Path:
    """The new folder `out` with configuration, weights and manifest."""
    if out.exists():
        raise UserError(f"{out} exists already.", "Name a folder that does not.")
    aside = out.with_name(temporary_name(out.name))
    try:
        aside.mkdir(parents=True)
        for name in (CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME):
            copy_file(adapter.path / name, aside / name)
        fsync_folder(aside)
        os.rename(aside, out)
    except OSError as error:
        remove_tree(aside)
        raise disk_error(error, out) from error
    return out


def collect_garbage(journal: Journal, catalog: Catalog, *, dry_run: bool) -> GcReport:
    """Delete superseded adapters that no remaining adapter was trained on, old trash, leftovers.

    Never touched: an adapter of the stack, one that was not superseded, and every parent, near or
    far, of an adapter that stays.
    """
    with journal.locked() as state:
        doomed = _unneeded(catalog, state)
        leftovers = _leftovers(catalog)
        sizes = [tree_size(catalog.folder(slug)) for slug in doomed]
        total = sum(sizes) + sum(tree_size(path) for path in leftovers)
        if not dry_run:
            for slug in doomed:
                state = purge(journal, catalog, state, slug)
            for path in leftovers:
                remove_tree(path)
            if doomed or leftovers:
                journal.commit(state, "gc", doomed, leftovers=len(leftovers))
    names = tuple(path.name for path in leftovers)
    return GcReport(tuple(doomed), names, total, dry_run)


def recover(journal: Journal, catalog: Catalog, state: StoreState) -> None:
    """Finish what a killed process had begun. Call it under the lock."""
    for name in sorted(catalog.on_disk()):
        folder = catalog.folder(name)
        if state.status.get(name) == "purged":
            journal.discard(folder)
        elif name not in state.status and SLUG.fullmatch(name):
            state = _adopt(journal, catalog, state, folder)


def tree_size(path: Path) -> int:
    """Bytes of all files under `path`."""
    if not path.is_dir():
        return path.stat().st_size if path.exists() else 0
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _adopt(journal: Journal, catalog: Catalog, state: StoreState, folder: Path) -> StoreState:
    """A folder that was renamed but not logged is whole: log it, unless it does not belong here."""
    try:
        manifest = ForgetManifest.read(folder / MANIFEST_NAME)
        base = manifest_base(manifest)
        if state.base is not None:
            require_same_base(BaseFingerprint.from_json(state.base["fingerprint"]), base)
    except (StoreCorrupt, UserError):
        return state  # not ours: `verify` lists it
    if not verify_folder(folder, state).ok:
        return state
    more: dict[str, Any] = {} if state.base else {"base": base_record(manifest)}
    more["manifests"] = {folder.name: sha256_file(folder / MANIFEST_NAME)}
    return journal.commit(state, "recover", [folder.name], status={folder.name: "ready"}, **more)


def _unneeded(catalog: Catalog, state: StoreState) -> list[str]:
    """Superseded adapters, children before parents, that no remaining adapter was trained on."""
    doomed = {
        slug
        for slug, status in state.status.items()
        if status == "superseded" and slug not in state.stack_slugs
    }
    waiting = [
        slug for slug, status in state.status.items() if status != "purged" and slug not in doomed
    ]
    needed: set[str] = set()
    while waiting:
        slug = waiting.pop()
        if slug not in needed:
            needed.add(slug)
            waiting.extend(catalog.parents_of(slug)[0])
    return sorted(doomed - needed, reverse=True)


def _leftovers(catalog: Catalog) -> list[Path]:
    trash = catalog.root / ".trash"
    if not trash.is_dir():
        return []
    limit = time.time() - TRASH_DAYS * 86400
    return sorted(p for p in trash.iterdir() if p.name[0] == "." or p.stat().st_mtime < limit)


def _write_tombstone(catalog: Catalog, slug: str) -> None:
    source = catalog.folder(slug) / MANIFEST_NAME
    target = catalog.root / "tombstones" / f"{slug}.json"
    try:
        target.parent.mkdir(exist_ok=True)
        if source.is_file() and not target.exists():
            write_bytes(target, source.read_bytes())
    except OSError as error:
        raise disk_error(error, target) from error


def _count_values(value: Any, where: str) -> int:
    """How many values there are; UserError at the first that is not a number, flag or word."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not WORD.fullmatch(key):
                raise UserError(
                    f"The key {str(key)[:24]!r} in {where} is not a word.", "Rename it."
                )
        return sum(_count_values(v, f"{where}.{k}") for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return sum(_count_values(v, where) for v in value)
    if isinstance(value, str):
        if not WORD.fullmatch(value):
            raise UserError(
                f"{where} is text, which the store does not keep.",
                "Leave questions and answers out: attach numbers.",
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{where} is not finite.", "Attach numbers.")
    elif value is not None and not isinstance(value, (bool, int)):
        raise UserError(f"{where} is a {type(value).__name__}.", "Attach plain numbers.")
    return 1
