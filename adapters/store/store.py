"""The store of forget adapters: publish, list, activate, revert, verify, remove.

Layout: `store.json`, `state.json`, `audit.jsonl`, `adapters/<slug>/` (immutable once published),
`runs/<key>/` (training in progress), `tombstones/<slug>.json`. See `journal` for what makes
changes whole, `states` for which are allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from adapters.atomic_files import disk_error, read_json, write_json
from adapters.base.fingerprint import BaseFingerprint, require_same_base
from adapters.environment import utc_now
from adapters.errors import StoreCorrupt, UserError
from adapters.store import cleanup
from adapters.store import log as audit
from adapters.store.activation import StackChange, activate_stack, restack
from adapters.store.catalog import EVALS_NAME, Catalog, VerifyResult, manifest_base, require_ok
from adapters.store.catalog import StoredAdapter as StoredAdapter
from adapters.store.cleanup import GcReport
from adapters.store.journal import LOCK_TIMEOUT, Journal
from adapters.store.manifest import SLUG, ForgetManifest
from adapters.store.publish import publish_folder
from adapters.store.states import ActiveAdapter, after

SCHEMA = 1
# `AdapterStore.list` takes the name of the type inside the class.
StoredAdapters: TypeAlias = list[StoredAdapter]
Stack: TypeAlias = list[ActiveAdapter]
VerifyResults: TypeAlias = list[VerifyResult]
LogEntries: TypeAlias = list[dict[str, Any]]


class AdapterStore:
    """A folder of forget adapters for one base. Open it with `AdapterStore.open`."""

    def __init__(self, path: Path, timeout: float = LOCK_TIMEOUT) -> None:
        self.path = path
        self.journal = Journal(path, timeout)
        self.catalog = Catalog(path)

    @classmethod
    def open(
        cls, path: Path, *, create: bool = False, timeout: float = LOCK_TIMEOUT
    ) -> AdapterStore:
        """The store at `path`, leftovers of killed processes cleared away.

        Raises UserError when there is none (unless `create`) or when it is of a newer release.
        """
        path = Path(path)
        if not (path / "store.json").is_file():
            if not create:
                raise UserError(
                    f"There is no store at {path}.",
                    "Name one with --store, or file a request: `unlearner forget` creates it.",
                )
            _create(path)
        schema = read_json(path / "store.json", f"store.json of {path}").get("schema")
        if schema != SCHEMA:
            raise UserError(
                f"The store at {path} has schema {schema!r}, this release reads {SCHEMA}.",
                "Use the release of unlearner that wrote it.",
            )
        store = cls(path, timeout)
        if os.access(path, os.W_OK):
            store.journal.sweep()
            store._recover()
        return store

    def list(self, *, purged: bool = False) -> StoredAdapters:
        """All adapters in the order of their numbers; purged ones only when asked for."""
        return self.catalog.listed(self.journal.state(), purged=purged)

    def get(self, ref: str) -> StoredAdapter:
        """The adapter that `ref` names: slug, unique start of a slug, label or request id.

        Raises AdapterNotFound, with the nearest name, when no adapter or more than one matches.
        """
        state = self.journal.state()
        adapter = self.catalog.stored(self.catalog.resolve(ref, state), state)
        if adapter.problem:
            raise StoreCorrupt(
                adapter.problem, f"Remove {adapter.slug}, or restore it from a copy."
            )
        return adapter

    def active(self) -> Stack:
        """The stack: slugs and scales in order."""
        return [*self.journal.state().stack]

    def base(self) -> BaseFingerprint | None:
        """The base that all adapters here belong to; None before the first."""
        recorded = self.journal.state().base
        return None if recorded is None else BaseFingerprint.from_json(recorded["fingerprint"])

    def base_name(self) -> str:
        """The base's name as given with the first adapter, or an empty string."""
        return str((self.journal.state().base or {}).get("name") or "")

    def adapter_path(self, ref: str) -> Path:
        """Folder of the adapter, as PEFT loads it."""
        return self.get(ref).path

    def work_dir(self, key: str) -> Path:
        """Folder for the checkpoints of a training in progress, created."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", key):
            raise UserError(f"{key!r} cannot name a run.", "Use letters, digits, '.', '-' and '_'.")
        folder = self.path / "runs" / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        return folder

    def publish(self, folder: Path, manifest: ForgetManifest) -> StoredAdapter:
        """The adapter stored from `folder`, which stays as it is; status ready.

        `folder` holds adapter_config.json and adapter_model.safetensors; see ForgetManifest for
        the fields to give. All or nothing: on any refusal or failure the store is unchanged.
        """
        return publish_folder(self.journal, self.catalog, Path(folder), manifest)

    def activate(
        self,
        refs: Sequence[str],
        scales: Mapping[str, float] | None = None,
        *,
        with_parents: bool = False,
        only: bool = False,
    ) -> StackChange:
        """The stack after adding `refs` at its end, in this order (`only`: nothing else stays).

        A parent goes before its children. Parents must be active already, in `refs`, or asked for
        by `with_parents`. `scales` are by ref, 0 to 1.5. What an activated adapter supersedes
        leaves the stack.
        """
        with self.journal.locked() as state:
            slugs = [self.catalog.resolve(ref, state) for ref in refs]
            given = {self.catalog.resolve(ref, state): v for ref, v in (scales or {}).items()}
            return activate_stack(
                self.journal,
                self.catalog,
                state,
                slugs,
                given,
                with_parents=with_parents,
                only=only,
            )

    def revert(self, ref: str, reason: str = "") -> StackChange:
        """The stack without `ref`: switched off exactly, its files stay.

        Adapters trained on top of it stay in the stack and become stale: what they compute now was
        never measured. Reverting the last of the stack leaves nothing stale.
        """
        with self.journal.locked() as state:
            slug = self.catalog.resolve(ref, state)
            if slug not in state.stack_slugs:
                raise UserError(
                    f"Adapter {slug} is {state.status[slug]}, not in the stack.",
                    "`unlearner adapters list` shows what is active.",
                )
            stack = [active for active in state.stack if active.slug != slug]
            return restack(
                self.journal, self.catalog, state, "revert", [slug], stack, reason=reason
            )

    def deactivate_all(self, reason: str = "") -> StackChange:
        """The empty stack: the bare base."""
        with self.journal.locked() as state:
            slugs = state.stack_slugs
            return restack(self.journal, self.catalog, state, "revert", slugs, [], reason=reason)

    def verify(self, ref: str | None = None, base: BaseFingerprint | None = None) -> VerifyResults:
        """Check one adapter, or all that are not purged; nothing is changed."""
        state = self.journal.state()
        if ref is not None:
            return [self.catalog.verify(self.catalog.resolve(ref, state), state, base)]
        results = [self.catalog.verify(slug, state, base) for slug in self.catalog.slugs(state)]
        unknown = sorted(set(self.catalog.on_disk()) - set(state.status))
        return results + [VerifyResult(s, ("it was never published here",)) for s in unknown]

    def require_whole(self, ref: str, base: BaseFingerprint | None = None) -> StoredAdapter:
        """The adapter, after checking every byte; StoreCorrupt or BaseMismatch when it fails."""
        adapter = self.get(ref)
        if base is not None:
            require_same_base(manifest_base(adapter.manifest), base)
        require_ok(self.catalog.verify(adapter.slug, self.journal.state()))
        return adapter

    def quarantine(self, ref: str, reason: str) -> StackChange:
        """Mark an adapter whose files or base are not as recorded; it leaves the stack."""
        with self.journal.locked() as state:
            slug = self.catalog.resolve(ref, state)
            stack = [active for active in state.stack if active.slug != slug]
            return restack(
                self.journal, self.catalog, state, "quarantine", [slug], stack, reason=reason
            )

    def release(self, ref: str) -> StackChange:
        """Take an adapter out of quarantine, after verifying it; its status is reverted."""
        with self.journal.locked() as state:
            slug = self.catalog.resolve(ref, state)
            require_ok(self.catalog.verify(slug, state))
            return restack(self.journal, self.catalog, state, "release", [slug], state.stack)

    def mark_merged(self, refs: Sequence[str], into: str) -> StackChange:
        """Record that adapters were folded into released weights called `into`."""
        with self.journal.locked() as state:
            slugs = [self.catalog.resolve(ref, state) for ref in refs]
            return restack(
                self.journal, self.catalog, state, "merge", slugs, state.stack, reason=into
            )

    def remove(self, ref: str, *, dry_run: bool = False) -> tuple[str, int]:
        """Slug and bytes of the adapter whose files are deleted; its manifest stays as tombstone.

        Refused while it is in the stack, or a parent of an adapter that still has its files.
        """
        with self.journal.locked() as state:
            slug = self.catalog.resolve(ref, state)
            return cleanup.remove_adapter(self.journal, self.catalog, state, slug, dry_run=dry_run)

    def attach_eval(self, ref: str, name: str, result: Mapping[str, Any]) -> Path:
        """The new file `evals/<name>.json` beside the adapter (`<name>-2` when taken).

        Numbers, flags and words only: a result with answers in it is refused. When the result's
        `stack` is the current stack, every stale adapter in it counts as re-evaluated.
        """
        with self.journal.locked() as state:
            slug = self.catalog.resolve(ref, state)
            path = cleanup.write_eval(self.catalog.folder(slug), name, result)
            measured = state.stack_slugs if result.get("stack") == [*state.stack_slugs] else ()
            stale = [other for other in measured if state.status[other] == "stale"]
            status = {other: after("clear_stale", other, "stale") for other in stale}
            self.journal.commit(state, "evaluate", [slug], status=status, file=path.name)
            return path

    def keep_settings(self, ref: str, text: str) -> Path:
        """The file beside the adapter with the settings of the run that made it, as YAML."""
        return cleanup.write_settings(self.get(ref).path, text)

    def evals(self, ref: str) -> dict[str, dict[str, Any]]:
        """Results attached to the adapter, by name."""
        folder = self.get(ref).path / EVALS_NAME
        return {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}

    def log(self) -> LogEntries:
        """Every entry of the audit log, oldest first."""
        return audit.read_from(self.journal.log_path, audit.LogPosition())[0]

    def verify_log(self) -> audit.LogReport:
        """Check the hash chain of the whole log."""
        return audit.verify(self.journal.log_path, self.journal.recorded().log)

    def import_folder(
        self, path: Path, base_folder: Path, *, request_id: str = "", base_name: str = ""
    ) -> StoredAdapter:
        """A PEFT LoRA from elsewhere, checked against the base in `base_folder` and published."""
        from adapters.store.import_peft import import_adapter

        return import_adapter(
            self, Path(path), Path(base_folder), request_id=request_id, base_name=base_name
        )

    def export(self, ref: str, out: Path) -> Path:
        """The new folder `out` with the adapter's files and manifest, as PEFT loads it."""
        return cleanup.export_adapter(self.require_whole(ref), Path(out))

    def combine(
        self,
        refs: Sequence[str] | None = None,
        scales: Mapping[str, float] | None = None,
        *,
        rank: int | None = None,
        label: str = "",
    ) -> StoredAdapter:
        """The sum of adapters (the stack by default) as one new adapter that supersedes them."""
        from adapters.store.derive import combine

        return combine(self, refs, scales, rank=rank, label=label)

    def gc(self, dry_run: bool = False) -> GcReport:
        """What was (or would be) deleted: superseded adapters nobody needs, leftovers, trash."""
        return cleanup.collect_garbage(self.journal, self.catalog, dry_run=dry_run)

    def _recover(self) -> None:
        """Finish what a killed process had begun: adopt a whole adapter, end a removal."""
        state = self.journal.state()
        on_disk = set(self.catalog.on_disk())
        gone = {slug for slug, status in state.status.items() if status == "purged"}
        if on_disk & gone or any(SLUG.fullmatch(s) for s in on_disk - set(state.status)):
            with self.journal.locked() as state:
                cleanup.recover(self.journal, self.catalog, state)


def _create(path: Path) -> None:
    """Make an empty store; when another process does so at the same time, one of them wins."""
    if path.exists() and not _could_become_store(path):
        raise UserError(f"{path} is not empty and not a store.", "Name a new folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "adapters").mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error
    write_json(path / "store.json", {"schema": SCHEMA, "created": utc_now()})


def _could_become_store(path: Path) -> bool:
    """Empty, or what another process has just begun to make."""
    if not path.is_dir():
        return False
    seen = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    return seen <= {"adapters", "store.json"} and not any((path / "adapters").glob("r*"))
