"""`unlearner adapters ...`: adapters that come and go, their sums, and stacks kept by name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from ui.adapter_row import adapter_row
from ui.cli import options
from ui.cli.commands.adapters.store import (
    REF,
    open_store,
    report_change,
    scales_by_ref,
    verb,
)
from ui.console import size_text
from unlearner.request.rows import did_you_mean

if TYPE_CHECKING:
    from adapters.store.store import AdapterStore
    from ui.console import Console

FORMATS = ("peft", "vllm", "llama.cpp", "ollama")


def register(verbs: Any) -> None:
    """Adds its commands to those of `adapters`."""
    _register_stacks(verbs)
    _register_moves(verbs)


def _register_stacks(verbs: Any) -> None:
    verb(verbs, "stacks", run_stacks, "the stacks that were saved by name")
    parser = verb(verbs, "save-stack", run_save_stack, "keep the active stack under a name")
    parser.add_argument("name", metavar="NAME", help="letters, digits, '.', '-' and '_'")
    parser.add_argument("--replace", action="store_true", help="overwrite a stack of this name")
    parser = verb(verbs, "use-stack", run_use_stack, "make exactly a saved stack active")
    parser.add_argument("name", metavar="NAME", help="as `unlearner adapters stacks` lists it")
    parser = verb(verbs, "combine", run_combine, "sum adapters up into one new adapter")
    parser.add_argument("refs", metavar="REF", nargs="*", help=f"{REF}; the stack by default")
    parser.add_argument("--scales", metavar="X,Y", help="one factor an adapter (default: 1)")
    parser.add_argument(
        "--rank",
        type=options.positive_int,
        metavar="N",
        help="cut to this rank: another adapter, to be evaluated (default: exact)",
    )
    parser.add_argument(
        "--label", default="", metavar="NAME", help="request id of the sum, a word of your own"
    )


def _register_moves(verbs: Any) -> None:
    parser = verb(verbs, "import", run_import, "take in a PEFT LoRA or a signed bundle")
    parser.add_argument(
        "source", metavar="FOLDER|FILE", type=Path, help="folder of an adapter, or a bundle"
    )
    options.add_base(parser, text="the base it was trained on")
    parser.add_argument(
        "--public-key",
        action="append",
        metavar="HEX",
        help="who may have signed the bundle, as `bundle` printed it; give it again for more",
    )
    parser = verb(verbs, "export", run_export, "copy an adapter out, for PEFT or for a server")
    parser.add_argument("ref", metavar="REF", help=REF)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="peft",
        help="who loads it: peft takes it as it is; a server gets its parents summed in, as it "
        "runs one adapter only (default: peft)",
    )
    parser.add_argument(
        "--base-name",
        metavar="NAME",
        help="name under which the server has the base, letter by letter (default: the store's)",
    )
    parser = verb(verbs, "bundle", run_bundle, "write adapters and their parents to a signed file")
    parser.add_argument(
        "refs", metavar="REF", nargs="*", help=f"{REF}; by default all not in quarantine"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new file")
    key = os.environ.get("UNLEARNER_SIGNING_KEY")
    parser.add_argument(
        "--key",
        type=Path,
        metavar="KEYFILE",
        default=Path(key) if key else None,
        required=not key,
        help="private key that signs (environment: UNLEARNER_SIGNING_KEY)",
    )
    parser.add_argument("--create-key", action="store_true", help="make KEYFILE if there is none")


def run_stacks(args: argparse.Namespace, console: Console) -> int:
    """One line a saved stack: its adapters in order, and whether it can still be used."""
    store = open_store(args)
    status = {adapter.slug: adapter.status for adapter in store.list()}
    now = store.active()
    table = [
        {
            "name": name,
            "adapters": [one.slug for one in stack],
            "scales": [one.scale for one in stack],
            "active": stack == now,
            "missing": [s.slug for s in stack if status.get(s.slug) in (None, "quarantined")],
        }
        for name, stack in store.stacks().items()
    ]
    if table:
        console.table(table, ["name", "adapters", "scales", "active", "missing"])
    else:
        console.words("No stack is saved: `unlearner adapters save-stack NAME` saves the active.")
    console.result({"store": str(store.path), "table": table})
    return 0


def run_save_stack(args: argparse.Namespace, console: Console) -> int:
    """Writes the active stack under a name."""
    store = open_store(args)
    if args.name in store.stacks() and not args.replace:
        raise UserError(
            f"A stack is saved as {args.name!r} already.", "Use another name, or add --replace."
        )
    path, stack = store.save_stack(args.name), store.active()
    names = ", ".join(one.slug for one in stack) or "nothing, the bare base"
    console.words(f"Saved as {args.name}: {names}.")
    console.text(str(path))
    table = [{"name": one.slug, "scale": one.scale} for one in stack]
    console.result({"stack": args.name, "path": path, "table": table})
    return 0


def run_use_stack(args: argparse.Namespace, console: Console) -> int:
    """Makes exactly the saved stack active and prints it."""
    store = open_store(args)
    saved = store.stacks()
    if args.name not in saved:
        fix = did_you_mean(args.name, saved) if saved else "`save-stack NAME` saves the active one."
        raise UserError(f"No stack is saved as {args.name!r}.", fix)
    return report_change(store.use_stack(args.name), store, console)


def _usable(ref: str, store: AdapterStore) -> str:
    """The slug; an adapter in quarantine is not given to anyone."""
    adapter = store.get(ref)
    if adapter.status == "quarantined":
        raise UserError(
            f"Adapter {adapter.slug} is quarantined.",
            f"Run `unlearner adapters release {adapter.slug}`, which verifies it first.",
        )
    return adapter.slug


def run_combine(args: argparse.Namespace, console: Console) -> int:
    """Publishes the sum, says whether it is exact, and prints its slug."""
    scales = scales_by_ref(args) or {}
    store = open_store(args)
    if args.label:
        _check_label(args.label)
    parts = [(_usable(ref, store), scales.get(ref, 1.0)) for ref in args.refs]
    parts = parts or [(one.slug, one.scale) for one in store.active()]
    slugs = [slug for slug, _ in parts]
    for slug in slugs:
        if slugs.count(slug) > 1:
            raise UserError(f"Adapter {slug} is named twice.", "Name it once, or use --scales.")
    names = ", ".join(slugs)
    console.words(f"Adding up {names or 'the stack'} ...")
    made = store.combine(slugs, dict(parts), rank=args.rank, request_id=args.label)
    origin, rank = made.manifest.origin, made.manifest.lora["r"]
    exact = origin["kind"] == "sum"
    console.text(made.slug)
    if exact:
        console.words(f"The exact sum of {names}, rank {rank}, up to the rounding of float32.")
    else:
        console.words(
            f"Warning: cut to rank {rank}, a matrix keeps {origin['kept']:.1%} of the update or "
            "more. This is another adapter: no figures of its parts hold for it, it needs its own "
            "evaluation."
        )
    console.hint(f"`unlearner adapters activate {made.slug}` puts it in the place of its parts.")
    figures = {"exact": exact, "kept": origin["kept"], "relative_error": origin["error"]}
    table = [{"name": slug, "scale": scale} for slug, scale in parts]
    row = {**adapter_row(made), "path": made.path, "supersedes": slugs}
    console.result({**row, **figures, "needs_evaluation": not exact, "table": table})
    return 0


def _check_label(label: str) -> None:
    from adapters.store.manifest import REQUEST_ID

    if not REQUEST_ID.fullmatch(label):
        raise UserError(
            f"--label {label!r} is not one plain word.",
            "Use up to 64 letters, digits, '.', '-' and '_'.",
        )


def run_import(args: argparse.Namespace, console: Console) -> int:
    """Publishes a foreign adapter, or those of a bundle, and prints rows."""
    if args.source.is_file():
        return _import_bundle(args, console)
    if not args.source.is_dir():
        raise UserError(
            f"There is no folder or bundle {args.source}.",
            "Give the folder of a LoRA adapter, or a file made by `unlearner adapters bundle`.",
        )
    if args.public_key:
        raise UserError(
            f"{args.source} is a folder, which nobody has signed.",
            "Leave out --public-key, or give a bundle.",
        )
    console.words(f"Checking {args.source} against {args.base} ...")
    from adapters.base.load import resolve_base
    from adapters.store.store import AdapterStore

    base = resolve_base(args.base, args.revision)
    store = AdapterStore.open(options.store_path(args), create=True)
    adapter = store.import_folder(args.source, base, base_name=args.base)
    console.words(f"Stored as {adapter.slug}.")
    console.hint(f"switch it on with `unlearner adapters activate {adapter.slug}`.")
    console.result({**adapter_row(adapter), "path": adapter.path})
    return 0


def _import_bundle(args: argparse.Namespace, console: Console) -> int:
    from adapters.base.load import resolve_base
    from adapters.store.bundle import import_bundle, read_bundle
    from adapters.store.store import AdapterStore

    keys = _public_keys(args)
    console.words(f"Checking signature and files of {args.source} ...")
    # Read once before there is a store: a refused bundle leaves nothing behind.
    bundle = read_bundle(args.source, trusted=keys)
    console.words(f"Signed by {bundle.signer}. Checking it against {args.base} ...")
    base = resolve_base(args.base, args.revision)
    store = AdapterStore.open(options.store_path(args), create=True)
    known = {adapter.slug for adapter in store.list()}
    stored = import_bundle(store, args.source, base, trusted=keys)
    table = [{**adapter_row(one), "new": one.slug not in known} for one in stored]
    console.table(table, ["name", "label", "status", "rows", "objective", "new"])
    console.hint("switch them on with `unlearner adapters activate REF --with-parents`.")
    console.result({"bundle": args.source, "public_key": bundle.signer, "table": table})
    return 0


def _public_keys(args: argparse.Namespace) -> list[str]:
    """The keys in --public-key; without one any signature would do, which proves nothing."""
    from adapters.store.manifest import HEX64

    if not args.public_key:
        raise UserError(
            f"{args.source} is a file: a bundle is taken in only from a signer you name.",
            "Add --public-key as its maker told you; of a PEFT adapter give the folder.",
        )
    keys = [key.strip().lower() for key in args.public_key]
    for key in keys:
        if not HEX64.fullmatch(key):
            raise UserError(
                f"--public-key {key[:70]!r} is not a public key.",
                "It has 64 hex digits, as `unlearner adapters bundle` printed them.",
            )
    return keys


def run_export(args: argparse.Namespace, console: Console) -> int:
    """Writes an adapter into a new folder and prints the path."""
    store = open_store(args)
    if args.format != "peft":
        return _export_serving(args, store, console)
    if args.base_name is not None:
        raise UserError(
            "--base-name is for servers: PEFT gets the adapter as it is.",
            "Leave it out, or choose another --format.",
        )
    slug, path = store.get(args.ref).slug, store.export(args.ref, args.out)
    console.text(str(path))
    console.result({"name": slug, "path": path, "format": args.format})
    return 0


def _export_serving(args: argparse.Namespace, store: AdapterStore, console: Console) -> int:
    from adapters.lora.export import export_serving

    slug = _usable(args.ref, store)
    name = args.base_name if args.base_name is not None else store.base_name()
    if not name:
        raise UserError(
            f"{args.format} compares the base's name, and none is given.",
            "Add --base-name with the name under which the base is served.",
        )
    manifest = store.get(slug).manifest
    # What it computes is defined on top of its parents, and a server runs one adapter.
    parts = [(parent, manifest.parent_scales.get(parent, 1.0)) for parent in manifest.parents]
    parts.append((slug, 1.0))
    folders = [(store.require_whole(part).path, scale) for part, scale in parts]
    made = export_serving(
        folders,
        args.out,
        target=args.format,
        base_name=name,
        trained_on=str(manifest.base.get("view", {}).get("quantization", "none")),
    )
    if len(parts) > 1:
        parents = ", ".join(manifest.parents)
        console.words(f"Summed with {parents}, on top of which {slug} was trained.")
    for note in made.notes:
        console.words(f"Note: {note}")
    console.text(str(made.path))
    console.hint(f"use it with `{made.command}`.")
    table = [{"name": part, "scale": scale} for part, scale in parts]
    found = {"path": made.path, "format": made.target, "rank": made.rank, "base_name": name}
    told = {"command": made.command, "notes": made.notes}
    console.result({"name": slug, **found, **told, "table": table})
    return 0


def run_bundle(args: argparse.Namespace, console: Console) -> int:
    """Writes the bundle and prints its path, and the public key that others check it with."""
    store = open_store(args)
    key = args.key.expanduser()
    if key.resolve().is_relative_to(store.path.resolve()):
        raise UserError(
            f"The key {args.key} lies in the store, where whoever copies the store gets it.",
            "Name a file outside the store.",
        )
    if not key.is_file() and not args.create_key:
        raise UserError(
            f"There is no signing key {args.key}.", "Check the path, or make one with --create-key."
        )
    slugs = [_usable(ref, store) for ref in args.refs]
    from adapters.store.bundle import export_bundle

    console.words("Checking and copying the adapters ...")
    created = not key.exists()
    made = export_bundle(store, args.out, slugs or None, key=key)
    if created:
        console.words(f"Made the key {args.key}: keep it secret, and keep a copy.")
    console.words(f"Bundled {', '.join(made.slugs)}, {size_text(made.bytes)}.")
    console.words(f"Public key: {made.signer}")
    console.text(str(made.path))
    console.hint(
        f"the other side runs `unlearner adapters import FILE --public-key {made.signer}`."
    )
    found = {"path": made.path, "public_key": made.signer, "bytes": made.bytes}
    table = [{"name": slug} for slug in made.slugs]
    console.result({**found, "key_created": created, "table": table})
    return 0
