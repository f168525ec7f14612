"""`unlearner adapters`: what the store holds, what is active, and what can go."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from adapters.base.fingerprint import fingerprint_base
from adapters.base.load import resolve_base
from adapters.errors import UserError
from adapters.store.activation import StackChange
from adapters.store.store import AdapterStore
from ui.app.data.library import adapter_row
from ui.cli import options
from ui.cli.commands.adapters import exchange
from ui.cli.commands.adapters.exchange import verb
from ui.cli.options import open_store
from ui.cli.output.events import outcome_lines
from ui.console import Console, size_text

REVERSIBLE = (
    "An adapter suppresses, it does not erase: whoever can switch it off has everything back."
)
SEE_LIST = "See `unlearner adapters list`."
# Figures of an evaluation that `show` prints.
SHOWN = ("forget_quality", "model_utility", "forget_answer_prob", "retain_answer_prob")


def register(commands: Any) -> None:
    """Adds `adapters` with its commands."""
    parent = commands.add_parser(
        "adapters",
        help="list, activate, revert, verify and move forget adapters",
        description="Works on the store of forget adapters. " + REVERSIBLE,
    )
    verbs = parent.add_subparsers(dest="verb", metavar="COMMAND", title="commands")
    parser = verb(verbs, "list", run_list, "list adapters and their status")
    parser.add_argument("--all", action="store_true", help="also those that were removed")
    parser = verb(verbs, "show", run_show, "show everything known about one adapter")
    parser.add_argument("ref", metavar="REF", help=options.REF)
    parser = verb(verbs, "verify", run_verify, "check hashes, tensors, parents, base and log")
    parser.add_argument("ref", metavar="REF", nargs="?", help=f"{options.REF}; all by default")
    options.add_base(parser, required=False, text="also check that it belongs to this base")
    parser = verb(verbs, "log", run_log, "show what happened to the store, oldest first")
    parser.add_argument("--verify", action="store_true", help="check the chain of its hashes")
    parser = verb(verbs, "activate", run_activate, "add adapters to the end of the stack")
    parser.add_argument("refs", metavar="REF", nargs="+", help=options.REF)
    options.add_scales(parser, "named here")
    parser.add_argument("--with-parents", action="store_true", help="activate their parents too")
    parser.add_argument("--only", action="store_true", help="take everything else off the stack")
    parser = verb(verbs, "revert", run_revert, "deactivate adapters: exactly the model before")
    parser.add_argument("refs", metavar="REF", nargs="*", help=options.REF)
    parser.add_argument("--all", action="store_true", help="back to the bare base")
    parser.add_argument("--reason", default="", metavar="WORDS", help="written into the log")
    parser = verb(verbs, "quarantine", run_quarantine, "take a suspect adapter out of use")
    parser.add_argument("ref", metavar="REF", help=options.REF)
    parser.add_argument("--reason", required=True, metavar="WORDS", help="written into the log")
    parser = verb(verbs, "release", run_release, "verify an adapter and end its quarantine")
    parser.add_argument("ref", metavar="REF", help=options.REF)
    parser = verb(verbs, "remove", run_remove, "delete an adapter's files")
    parser.add_argument("ref", metavar="REF", help=options.REF)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")
    parser = verb(verbs, "gc", run_gc, "delete superseded adapters and leftovers")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    exchange.register(verbs)


def run_list(args: argparse.Namespace, console: Console) -> int:
    """One line per adapter: status and scale, what it forgets in numbers, its size."""
    store = open_store(args)
    listed = store.list(purged=args.all)
    table = [adapter_row(adapter) for adapter in listed]
    columns = ["name", "label", "status", "scale", "rows", "objective", "rank", "size", "created"]
    shown = [{**row, "size": size_text(row["bytes"]), "rank": row["lora_r"]} for row in table]
    if shown:
        console.table(shown, columns)
    else:
        console.words(f"No adapters in {store.path} yet: `unlearner forget` makes one.")
    for adapter in listed:
        if adapter.problem:
            console.words(f"Warning: {adapter.slug}: {adapter.problem}")
    active = [adapter.slug for adapter in store.active()]
    console.words(f"Active: {', '.join(active) or 'nothing, the bare base'}")
    console.result({"store": str(store.path), "active": active, "table": table})
    return 0


def run_show(args: argparse.Namespace, console: Console) -> int:
    """Prints status, manifest and attached evaluations."""
    store = open_store(args)
    adapter = store.get(args.ref)
    evals = store.evals(adapter.slug)
    manifest = adapter.manifest.to_json()
    row = adapter_row(adapter)
    for key, value in {**row, "path": adapter.path}.items():
        if value not in (None, []):
            console.text(f"{key:<11} {', '.join(value) if isinstance(value, list) else value}")
    for part in ("base", "data", "objective", "lora", "train", "env"):
        console.text(f"{part}:")
        facts = {key: value for key, value in manifest[part].items() if key != "outcome"}
        for line in _nested(facts):
            console.text(f"  {line}")
    for line in outcome_lines(manifest["train"].get("outcome", {})):
        console.text(line)
    for name, figures in evals.items():
        limit = figures.get("limit")
        part = "" if limit is None else f" (partial: the first {limit} rows of each set)"
        values = [f"{key} {figures[key]:.4g}" for key in SHOWN if figures.get(key) is not None]
        console.text(f"eval {name}: {', '.join(values) or 'no figures'}{part}")
    console.result({**row, "path": adapter.path, "manifest": manifest, "evals": evals})
    return 0


def _nested(value: dict[str, Any], prefix: str = "") -> list[str]:
    """Names and values for people: no digests, lists of records as counts."""
    lines: list[str] = []
    for key, part in value.items():
        if key in ("fingerprint", "key_id") or key.endswith("digest") or part is None:
            continue
        if isinstance(part, dict):
            lines += _nested(part, f"{prefix}{key}.")
        elif isinstance(part, list) and (key == "marks" or any(isinstance(p, list) for p in part)):
            lines.append(f"{prefix}{key} {len(part)}")
        elif isinstance(part, list):
            lines.append(f"{prefix}{key} {', '.join(map(str, part))}")
        else:
            shown = f"{part:.4g}" if isinstance(part, float) else part
            lines.append(f"{prefix}{key} {shown}")
    return lines


def run_verify(args: argparse.Namespace, console: Console) -> int:
    """0 when all is as recorded, 3 when the only trouble is another base, else 1."""
    store = open_store(args)
    base = None
    if args.base:
        console.words(f"Reading {args.base} ...")
        base = fingerprint_base(resolve_base(args.base, args.revision))
    results = store.verify(args.ref, base)
    log = store.verify_log()
    table = [{"name": r.slug, "ok": r.ok, "problems": list(r.problems)} for r in results]
    checks = [(r.ok, r.slug, r.problems) for r in results]
    for ok, name, problems in [*checks, (log.ok, f"log of {log.lines} entries", log.problems)]:
        console.text(f"{'ok' if ok else 'fail':<5} {name}")
        for problem in problems:
            console.text(f"      {problem}")
    bad = [result for result in results if not result.ok]
    console.result({"ok": not bad and log.ok, "log_problems": list(log.problems), "table": table})
    if not log.ok or any(not result.wrong_base or len(result.problems) > 1 for result in bad):
        return 1
    return 3 if bad else 0


def report_change(change: StackChange, store: AdapterStore, console: Console) -> int:
    """Prints the stack, what changed, and what has to be measured again."""
    table = [{"name": one.slug, "scale": one.scale} for one in change.stack]
    active = [one.slug for one in change.stack]
    if table:
        console.table(table, ["name", "scale"])
    for slug, status in change.changed.items():
        console.words(f"{slug} is now {status}.")
    for slug in change.stale:
        gone = [p for p in store.catalog.parents_of(slug)[0] if p not in active]
        trained = f"on top of {', '.join(gone)}" if gone else "on another stack"
        console.words(
            f"Warning: {slug} was trained {trained}: what it computes now is not measured, part "
            "of what it forgot may be back. It needs re-evaluation."
        )
    if change.stale:
        console.hint("measure the stack again with `unlearner evaluate`, or revert these too.")
    if not change.stack:
        console.words("The stack is empty: the bare base, bit for bit.")
    found = {"active": active, "changed": change.changed, "stale": change.stale, "table": table}
    console.result({"store": str(store.path), **found})
    return 0


def run_activate(args: argparse.Namespace, console: Console) -> int:
    """Adds to the stack and prints it."""
    scales = options.scales_by_ref(args, args.refs)
    store = open_store(args)
    change = store.activate(args.refs, scales, with_parents=args.with_parents, only=args.only)
    return report_change(change, store, console)


def run_revert(args: argparse.Namespace, console: Console) -> int:
    """Takes adapters off the stack, the last of them first, and prints what is left."""
    if bool(args.refs) == args.all:
        raise UserError("Name adapters to revert, or --all of them.", SEE_LIST)
    store = open_store(args)
    if args.all:
        return report_change(store.deactivate_all(args.reason), store, console)
    place = {adapter.slug: i for i, adapter in enumerate(store.active())}
    slugs = dict.fromkeys(store.get(ref).slug for ref in args.refs)
    changed: dict[str, str] = {}
    # What is not in the stack comes first: it is refused before anything is changed.
    for slug in sorted(slugs, key=lambda slug: place.get(slug, len(place)), reverse=True):
        change = store.revert(slug, args.reason)
        changed |= change.changed
    return report_change(type(change)(change.stack, changed), store, console)


def run_quarantine(args: argparse.Namespace, console: Console) -> int:
    """Takes an adapter off the stack and out of use, and prints what is left."""
    store = open_store(args)
    slug, status = _status_of(args.ref, store)
    if status == "quarantined":
        raise UserError(
            f"Adapter {slug} is quarantined already.",
            f"`unlearner adapters release {slug}` verifies it and ends that.",
        )
    return report_change(store.quarantine(slug, args.reason), store, console)


def run_release(args: argparse.Namespace, console: Console) -> int:
    """Verifies a quarantined adapter; when all is as recorded it is reverted, not active."""
    store = open_store(args)
    slug, status = _status_of(args.ref, store)
    if status != "quarantined":
        raise UserError(f"Adapter {slug} is {status}, not quarantined.", SEE_LIST)
    change = store.release(slug)
    console.hint(f"switch it on with `unlearner adapters activate {slug}`.")
    return report_change(change, store, console)


def _status_of(ref: str, store: AdapterStore) -> tuple[str, str]:
    """Slug and status, also of an adapter whose manifest cannot be read."""
    state = store.journal.state()
    slug = store.catalog.resolve(ref, state)
    return slug, state.status[slug]


def run_remove(args: argparse.Namespace, console: Console) -> int:
    """Deletes the files of one adapter, after asking."""
    store = open_store(args)
    slug, size = store.remove(args.ref, dry_run=True)
    if args.dry_run:
        console.words(f"Would delete {slug}, {size_text(size)}.")
    else:
        if not args.yes:
            _ask(f"Delete {slug} ({size_text(size)}) for good?", console)
        slug, size = store.remove(args.ref)
        console.words(f"Deleted {slug}, {size_text(size)}; its manifest stays as a tombstone.")
    done = {"removed": not args.dry_run, "dry_run": args.dry_run}
    console.result({"name": slug, "bytes": size, **done})
    return 0


def _ask(question: str, console: Console) -> None:
    if console.as_json or not sys.stdin.isatty():
        raise UserError("Nobody can be asked here.", "Add --yes to go ahead.")
    console.words(f"{question} [y/N]")
    if input().strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was deleted.", "")


def run_log(args: argparse.Namespace, console: Console) -> int:
    """Prints every entry; with --verify, exit code 1 where the chain is broken."""
    store = open_store(args)
    if args.verify:
        report = store.verify_log()
        console.text(
            f"{'ok' if report.ok else 'fail':<5} {report.lines} entries, head {report.head}"
        )
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
    report = open_store(args).gc(args.dry_run)
    gone = [*report.adapters, *report.leftovers]
    for name in gone:
        console.text(name)
    verb = "Would delete" if report.dry_run else "Deleted"
    what = f"{len(report.adapters)} adapters and {len(report.leftovers)} leftovers"
    console.words(f"{verb} {what}, {size_text(report.bytes)}.")
    console.result({**vars(report), "table": [{"name": name} for name in gone]})
    return 0
