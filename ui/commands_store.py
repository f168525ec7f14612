"""`unlearner adapters ...`: what is in the store, what is active, and what happened to it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from ui import options
from ui.console import size_text

if TYPE_CHECKING:
    from adapters.catalog import StoredAdapter
    from adapters.restack import StackChange
    from adapters.store import AdapterStore
    from ui.console import Console

REF = "slug, its unique start, or label"
REVERSIBLE = (
    "An adapter suppresses, it does not erase: whoever can switch it off has everything back."
)


def register(commands: Any) -> None:
    """Adds `adapters` with its ten commands."""
    parent = commands.add_parser(
        "adapters",
        help="list, activate, revert, verify and move forget adapters",
        description="Works on the store of forget adapters. " + REVERSIBLE,
    )
    verbs = parent.add_subparsers(dest="verb", metavar="COMMAND", title="commands")
    parser = _verb(verbs, "list", run_list, "all adapters with their status")
    parser.add_argument("--all", action="store_true", help="also those that were removed")
    parser = _verb(verbs, "show", run_show, "everything that is known about one adapter")
    parser.add_argument("ref", metavar="REF", help=REF)
    parser = _verb(verbs, "verify", run_verify, "check hashes, tensors, parents, base and log")
    parser.add_argument("ref", metavar="REF", nargs="?", help=f"{REF}; all by default")
    parser.add_argument("--base", metavar="B", help="also check that it belongs to this base")
    parser.add_argument("--revision", metavar="REV", help="commit, tag or branch of a hub base")
    parser = _verb(verbs, "activate", run_activate, "add adapters to the end of the stack")
    parser.add_argument("refs", metavar="REF", nargs="+", help=REF)
    parser.add_argument(
        "--scales", metavar="X,Y", help="one factor an adapter, 0 to 1.5 (default: 1 = as trained)"
    )
    parser.add_argument("--with-parents", action="store_true", help="activate their parents too")
    parser.add_argument("--only", action="store_true", help="take everything else off the stack")
    parser = _verb(verbs, "revert", run_revert, "switch adapters off: exactly the model before")
    parser.add_argument("refs", metavar="REF", nargs="*", help=REF)
    parser.add_argument("--all", action="store_true", help="back to the bare base")
    parser.add_argument("--reason", default="", metavar="WORDS", help="written into the log")
    parser = _verb(verbs, "remove", run_remove, "delete an adapter's files")
    parser.add_argument("ref", metavar="REF", help=REF)
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")
    parser = _verb(verbs, "import", run_import, "take in a PEFT LoRA from elsewhere")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder of the adapter")
    parser.add_argument("--base", required=True, metavar="B", help="the base it was trained on")
    parser.add_argument("--revision", metavar="REV", help="commit, tag or branch of a hub base")
    parser = _verb(verbs, "export", run_export, "copy an adapter out, as PEFT loads it")
    parser.add_argument("ref", metavar="REF", help=REF)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser = _verb(verbs, "log", run_log, "what happened to the store, oldest first")
    parser.add_argument("--verify", action="store_true", help="check the chain of its hashes")
    parser = _verb(verbs, "gc", run_gc, "delete what nobody needs: superseded, leftovers")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")


def _verb(verbs: Any, name: str, run: Any, text: str) -> options.Parser:
    parser: options.Parser = verbs.add_parser(
        name,
        parents=[options.store(), options.common()],
        help=text,
        description=f"{text[:1].upper()}{text[1:]}.",
    )
    parser.set_defaults(run=run)
    return parser


def _open(args: argparse.Namespace) -> AdapterStore:
    from adapters.store import AdapterStore

    return AdapterStore.open(options.store_path(args))


def run_list(args: argparse.Namespace, console: Console) -> int:
    """One line an adapter: status and scale, what it forgets in numbers, its size."""
    store = _open(args)
    found = store.list(purged=args.all)
    table = [adapter_row(adapter) for adapter in found]
    columns = ["name", "label", "status", "scale", "rows", "objective", "rank", "size", "created"]
    shown = [{**row, "size": size_text(row["bytes"]), "rank": row["lora_r"]} for row in table]
    if shown:
        console.table(shown, columns)
    else:
        console.words(f"No adapters in {store.path} yet: `unlearner forget` makes one.")
    for adapter in found:
        if adapter.problem:
            console.words(f"Warning: {adapter.slug}: {adapter.problem}")
    active = [one.slug for one in store.active()]
    console.words("Active: " + (", ".join(active) or "nothing, the bare base"))
    console.result({"store": str(store.path), "active": active, "table": table})
    return 0


def adapter_row(adapter: StoredAdapter) -> dict[str, Any]:
    """An adapter as a table row; counts and settings, never a text."""
    manifest = adapter.manifest
    return {
        "name": adapter.slug,
        "label": adapter.label,
        "status": adapter.status,
        "scale": adapter.scale,
        "rows": manifest.data.get("forget", {}).get("n"),
        "objective": manifest.objective.get("name"),
        "lora_r": manifest.lora.get("r", manifest.lora.get("lora_r")),
        "parents": list(manifest.parents),
        "policy": manifest.policy,
        "bytes": adapter.size,
        "created": manifest.created[:19],
        "problem": adapter.problem or None,
    }


def run_show(args: argparse.Namespace, console: Console) -> int:
    """Prints status, manifest and attached evaluations."""
    store = _open(args)
    adapter = store.get(args.ref)
    evals = store.evals(adapter.slug)
    manifest = adapter.manifest.to_json()
    for key, value in {**adapter_row(adapter), "path": adapter.path}.items():
        if value not in (None, []):
            console.text(f"{key:<11} {', '.join(value) if isinstance(value, list) else value}")
    for part in ("base", "data", "objective", "lora", "train", "env", "norms"):
        console.text(f"{part}:")
        for line in _nested(manifest[part]):
            console.text(f"  {line}")
    for name, figures in evals.items():
        quality, utility = figures.get("forget_quality"), figures.get("model_utility")
        console.text(f"eval {name}: forget_quality {quality}, model_utility {utility}")
    row = adapter_row(adapter)
    console.result({**row, "path": adapter.path, "manifest": manifest, "evals": evals})
    return 0


def _nested(value: dict[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, part in value.items():
        if isinstance(part, dict):
            lines += _nested(part, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} {part}")
    return lines


def run_verify(args: argparse.Namespace, console: Console) -> int:
    """0 when all is as recorded, 3 when the only trouble is another base, else 1."""
    store = _open(args)
    base = None
    if args.base:
        console.words(f"Reading {args.base} ...")
        from adapters.base_model import resolve_base
        from adapters.fingerprint import fingerprint_base

        base = fingerprint_base(resolve_base(args.base, args.revision))
    results = store.verify(args.ref, base)
    log = store.verify_log()
    table = [{"name": r.slug, "ok": r.ok, "problems": list(r.problems)} for r in results]
    for result in results:
        console.text(f"{'ok' if result.ok else 'fail':<5} {result.slug}")
        for problem in result.problems:
            console.text(f"      {problem}")
    console.text(f"{'ok' if log.ok else 'fail':<5} log of {log.lines} entries")
    for problem in log.problems:
        console.text(f"      {problem}")
    bad = [result for result in results if not result.ok]
    console.result({"ok": not bad and log.ok, "log_problems": list(log.problems), "table": table})
    if not log.ok or any(not result.wrong_base or len(result.problems) > 1 for result in bad):
        return 1
    return 3 if bad else 0


def run_activate(args: argparse.Namespace, console: Console) -> int:
    """Adds to the stack and prints it."""
    scales = None
    if args.scales is not None:
        numbers = _numbers(args.scales)
        if len(numbers) != len(args.refs):
            raise UserError(
                f"--scales has {len(numbers)} numbers for {len(args.refs)} adapters.",
                "Give one for each, divided by commas.",
            )
        scales = dict(zip(args.refs, numbers, strict=True))
    store = _open(args)
    change = store.activate(args.refs, scales, with_parents=args.with_parents, only=args.only)
    return _report_change(change, store, console)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--scales {text!r} is not a list of numbers.", "Write it as in --scales 1,0.5."
        ) from None


def run_revert(args: argparse.Namespace, console: Console) -> int:
    """Takes adapters off the stack, the last of them first, and prints what is left."""
    if bool(args.refs) == args.all:
        raise UserError(
            "Name adapters to revert, or --all of them.", "See `unlearner adapters list`."
        )
    store = _open(args)
    if args.all:
        return _report_change(store.deactivate_all(args.reason), store, console)
    place = {one.slug: i for i, one in enumerate(store.active())}
    slugs = dict.fromkeys(store.get(ref).slug for ref in args.refs)
    changed: dict[str, str] = {}
    # What is not in the stack comes first: it is refused before anything is changed.
    for slug in sorted(slugs, key=lambda slug: place.get(slug, len(place)), reverse=True):
        change = store.revert(slug, args.reason)
        changed |= change.changed
    return _report_change(type(change)(change.stack, changed), store, console)


def _report_change(change: StackChange, store: AdapterStore, console: Console) -> int:
    table = [{"name": one.slug, "scale": one.scale} for one in change.stack]
    console.table(table, ["name", "scale"])
    for slug, status in change.changed.items():
        console.words(f"{slug} is now {status}.")
    for slug in change.stale:
        console.words(
            f"Warning: {slug} was trained on another stack; what it computes now is not measured."
        )
    if change.stale:
        console.hint("measure it again with `unlearner evaluate`, or revert it too.")
    if not change.stack:
        console.words("The stack is empty: the bare base, bit for bit.")
    active = [one.slug for one in change.stack]
    console.result(
        {"store": str(store.path), "active": active, "changed": change.changed, "table": table}
    )
    return 0


def run_remove(args: argparse.Namespace, console: Console) -> int:
    """Deletes the files of one adapter, after asking."""
    store = _open(args)
    slug, size = store.remove(args.ref, dry_run=True)
    if args.dry_run:
        console.words(f"Would delete {slug}, {size_text(size)}.")
    else:
        if not args.yes:
            _ask(f"Delete {slug} ({size_text(size)}) for good?", console)
        slug, size = store.remove(args.ref)
        console.words(f"Deleted {slug}, {size_text(size)}; its manifest stays as a tombstone.")
    console.result({"name": slug, "bytes": size, "removed": not args.dry_run})
    return 0


def _ask(question: str, console: Console) -> None:
    if console.as_json or not sys.stdin.isatty():
        raise UserError("Nobody can be asked here.", "Add --yes to go ahead.")
    console.words(f"{question} [y/N]")
    if input().strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was deleted.", "")


def run_import(args: argparse.Namespace, console: Console) -> int:
    """Publishes a foreign adapter and prints its row."""
    console.words(f"Checking {args.folder} against {args.base} ...")
    from adapters.base_model import resolve_base
    from adapters.store import AdapterStore

    base = resolve_base(args.base, args.revision)
    if not args.folder.is_dir():
        raise UserError(f"There is no folder {args.folder}.", "Give the folder of a LoRA adapter.")
    store = AdapterStore.open(options.store_path(args), create=True)
    adapter = store.import_folder(args.folder, base, base_name=args.base)
    console.words(f"Stored as {adapter.slug}.")
    console.hint(f"switch it on with `unlearner adapters activate {adapter.slug}`.")
    console.result({**adapter_row(adapter), "path": adapter.path})
    return 0


def run_export(args: argparse.Namespace, console: Console) -> int:
    """Copies an adapter into a new folder and prints the path."""
    store = _open(args)
    slug, path = store.get(args.ref).slug, store.export(args.ref, args.out)
    console.text(str(path))
    console.result({"name": slug, "path": path})
    return 0


def run_log(args: argparse.Namespace, console: Console) -> int:
    """Prints every entry; with --verify 1 where the chain is broken."""
    store = _open(args)
    if args.verify:
        report = store.verify_log()
        console.text(f"{report.lines} entries, head {report.head}")
        for problem in report.problems:
            console.text(f"fail  {problem}")
        ok = {"ok": report.ok, "entries": report.lines, "head": report.head}
        console.result({**ok, "problems": list(report.problems)})
        return 0 if report.ok else 1
    entries = store.log()
    for entry in entries:
        slugs = ", ".join(entry.get("slugs", [])) or "-"
        console.text(f"{entry.get('time', '')}  {entry.get('action', ''):<11} {slugs}")
    console.result({"table": [{"name": entry.get("action"), **entry} for entry in entries]})
    return 0


def run_gc(args: argparse.Namespace, console: Console) -> int:
    """Deletes, or with --dry-run lists, what is no longer needed."""
    found = _open(args).gc(args.dry_run)
    gone = [*found.adapters, *found.leftovers]
    for name in gone:
        console.text(name)
    verb = "Would delete" if found.dry_run else "Deleted"
    what = f"{len(found.adapters)} adapters and {len(found.leftovers)} leftovers"
    console.words(f"{verb} {what}, {size_text(found.bytes)}.")
    console.result({**vars(found), "table": [{"name": name} for name in gone]})
    return 0
