"""`unlearner adapters combine|import|export|push|pull`: sums, and adapters that come and go."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters.base.load import resolve_base
from adapters.errors import UserError
from adapters.lora.export import export_serving
from adapters.lora.hub import pull_adapter, push_adapter
from adapters.store.store import AdapterStore
from ui.app.data.library import adapter_row
from ui.cli import options
from ui.cli.options import open_store
from ui.console import Console

FORMATS = ("peft", "vllm", "llama.cpp")


def verb(verbs: Any, name: str, run: Callable[..., int], text: str) -> options.Parser:
    """The parser of `adapters NAME`, with the flags that all of them have."""
    about = f"{text[:1].upper()}{text[1:]}."
    return options.add_command(verbs, name, run, "store", help=text, description=about)


def register(verbs: Any) -> None:
    """Adds its commands to those of `adapters`."""
    parser = verb(verbs, "combine", run_combine, "add adapters up into one new adapter")
    parser.add_argument(
        "refs", metavar="REF", nargs="*", help=f"{options.REF}; the stack by default"
    )
    options.add_scales(parser, "named here")
    parser.add_argument(
        "--rank",
        **options.COUNT,
        help="cut to this rank: another adapter, to be evaluated (default: exact)",
    )
    parser.add_argument(
        "--label", metavar="NAME", help="what to call the sum; it is stored in the clear"
    )
    parser = verb(verbs, "import", run_import, "publish a PEFT LoRA from elsewhere")
    parser.add_argument("source", metavar="FOLDER", type=Path, help="folder of the adapter")
    options.add_base(parser, text="the base it was trained on")
    parser = verb(verbs, "export", run_export, "copy an adapter out, for PEFT or for a server")
    parser.add_argument("ref", metavar="REF", help=options.REF)
    options.add_out(parser, "a new folder", required=True)
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

    parser = verb(verbs, "push", run_push, "upload an adapter and its card to the hub")
    parser.add_argument("ref", metavar="REF", help=options.REF)
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository; made where it is missing")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser = verb(verbs, "pull", run_pull, "publish an adapter of the hub in the store")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository of a PEFT LoRA")
    options.add_base(parser, text="the base it was trained on")
    parser.add_argument(
        "--adapter-revision", metavar="REV", help="commit, tag or branch of the adapter"
    )


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
    scales = options.scales_by_ref(args, args.refs)
    store = open_store(args)
    parts = [(_usable(ref, store), scales.get(ref, 1.0)) for ref in args.refs]
    parts = parts or [(one.slug, one.scale) for one in store.active()]
    slugs = [slug for slug, _ in parts]
    for slug in slugs:
        if slugs.count(slug) > 1:
            raise UserError(f"Adapter {slug} is named twice.", "Name it once, or use --scales.")
    names = ", ".join(slugs)
    console.words(f"Adding up {names or 'the stack'} ...")
    summed = store.combine(slugs, dict(parts), rank=args.rank, label=args.label or "")
    origin, rank = summed.manifest.origin, summed.manifest.lora["r"]
    exact = origin["kind"] == "sum"
    console.text(summed.slug)
    if exact:
        console.words(f"The exact sum of {names}, rank {rank}, up to the rounding of float32.")
    else:
        console.words(
            f"Warning: cut to rank {rank}, each matrix keeps {origin['kept']:.1%} of the update or "
            "more. This is another adapter: no figures of its parts apply to it; "
            "evaluate it before use."
        )
    console.hint(f"`unlearner adapters activate {summed.slug}` replaces its parts with it.")
    figures = {"exact": exact, "kept": origin["kept"], "relative_error": origin["error"]}
    table = [{"name": slug, "scale": scale} for slug, scale in parts]
    row = {**adapter_row(summed), "path": summed.path, "supersedes": slugs}
    console.result({**row, **figures, "needs_evaluation": not exact, "table": table})
    return 0


def run_import(args: argparse.Namespace, console: Console) -> int:
    """Publishes an adapter that was trained elsewhere, and prints its row."""
    if not args.source.is_dir():
        raise UserError(f"There is no folder {args.source}.", "Give the folder of a LoRA adapter.")
    return _publish(args.source, str(args.source), args, console)


def _publish(folder: Path, name: str, args: argparse.Namespace, console: Console) -> int:
    """Publishes the adapter in `folder`, called `name` in words, and prints its row."""
    console.words(f"Checking {name} against {args.base} ...")
    base = resolve_base(args.base, args.revision)
    store = AdapterStore.open(options.store_path(args), create=True)
    adapter = store.import_folder(folder, base, base_name=args.base)
    console.words(f"Stored as {adapter.slug}.")
    console.hint(f"switch it on with `unlearner adapters activate {adapter.slug}`.")
    console.result({**adapter_row(adapter), "path": adapter.path})
    return 0


def run_pull(args: argparse.Namespace, console: Console) -> int:
    """Downloads an adapter, checks it as `import` does, and prints its row."""
    console.words(f"Downloading {args.repo} ...")
    with tempfile.TemporaryDirectory(prefix="unlearner-") as scratch:
        folder = pull_adapter(args.repo, args.adapter_revision, Path(scratch))
        return _publish(folder, args.repo, args, console)


def run_push(args: argparse.Namespace, console: Console) -> int:
    """Uploads an adapter and prints where it is."""
    store = open_store(args)
    adapter = store.require_whole(_usable(args.ref, store))
    if adapter.manifest.parents:
        raise UserError(
            f"{adapter.slug} was trained on top of {', '.join(adapter.manifest.parents)}: alone it "
            "is another model.",
            "Push the sum of both, which `unlearner adapters combine` makes.",
        )
    console.words(f"Uploading {adapter.slug} to {args.repo} ...")
    evals = store.evals(adapter.slug)
    url = push_adapter(adapter.path, adapter.manifest, evals, args.repo, private=args.private)
    console.text(url)
    console.result({"name": adapter.slug, "repo": args.repo, "url": url})
    return 0


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
