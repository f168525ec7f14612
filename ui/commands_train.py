"""`unlearner forget`: from a request to an adapter in the store."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ui import options
from ui.commands_info import REQUEST_HELP
from ui.commands_store import adapter_row
from ui.console import size_text
from ui.events import show_event
from ui.options import LORA_FIELDS, OBJECTIVE_FIELDS, TRAIN_FIELDS, given_settings
from unlearner.config import STREAMS, make_config

if TYPE_CHECKING:
    from ui.console import Console
    from unlearner.config import UnlearnConfig


def register(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "forget",
        parents=[
            options.base(),
            options.template(),
            options.loading(),
            options.settings(),
            options.store(),
            options.data(),
            options.common(),
        ],
        help="train an adapter that forgets a request, and store it",
        description="Turns a request into one forget adapter on the frozen base. The defaults are "
        "the published recipe of the objective.",
        epilog="examples:\n"
        "  unlearner forget tofu:forget05 --base B --load-in-4bit --dry-run\n"
        "  unlearner forget 'tofu:author=Hina Ameen' --base B --label request-17\n"
        "  unlearner forget rows.jsonl --retain keep.jsonl --base B --objective npo",
    )
    _add_forget_flags(parser)
    parser.set_defaults(run=run_forget)


def _add_forget_flags(parser: options.Parser) -> None:
    parser.add_argument("request", metavar="REQUEST", help=REQUEST_HELP)
    parser.add_argument(
        "--retain",
        metavar="ROWS",
        help="rows to keep: a JSONL file or tofu:SPLIT (default: the rest of TOFU)",
    )
    parser.add_argument(
        "--label", metavar="NAME", help="what to call the adapter; it is stored in the clear"
    )
    placing = parser.add_mutually_exclusive_group()
    placing.add_argument(
        "--on-stack",
        action="store_true",
        default=None,
        dest="on_stack",
        help="train on top of the active adapters (default where some are active)",
    )
    placing.add_argument(
        "--independent",
        action="store_false",
        default=None,
        dest="on_stack",
        help="train on the bare base, whatever is active",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print rows, steps and memory, load no model"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the interrupted run of the same request"
    )


def forget_config(args: argparse.Namespace) -> UnlearnConfig:
    """The settings of a run: the objective's published ones with the given flags."""
    names = (*OBJECTIVE_FIELDS, *LORA_FIELDS, *TRAIN_FIELDS)
    return make_config(args.objective, **given_settings(args, names))


def run_forget(args: argparse.Namespace, console: Console) -> int:
    """Trains and stores one adapter, or prints the plan."""
    config = forget_config(args)
    console.words(f"Reading {args.request} ...")
    from adapters.store import AdapterStore
    from unlearner.data import load_refusals, parse_request

    request = parse_request(args.request, args.data, args.retain)
    needs_refusals = "refusal" in STREAMS[config.objective.name]
    refusals = load_refusals(args.data) if needs_refusals else []
    path = options.store_path(args)
    placing: dict[str, Any] = {"on_stack": args.on_stack, "template": args.template}
    console.words("Loading the libraries ...")
    from unlearner.run import plan, prepare, unlearn

    base = options.base_spec(args)
    if args.dry_run:
        store = AdapterStore.open(path) if (path / "store.json").is_file() else None
        made = plan(prepare(request, base, config, store, **placing, refusals=refusals))
        _print_plan(made, console)
        return 0
    adapter = unlearn(
        request,
        base,
        config,
        AdapterStore.open(path, create=True),
        **placing,
        label=args.label,
        resume=args.resume,
        refusals=refusals,
        on_progress=lambda event: show_event(event, console),
    )
    console.text(adapter.slug)
    console.hint(
        f"measure it with `unlearner evaluate --adapters {adapter.slug} ...`, "
        f"switch it on with `unlearner adapters activate {adapter.slug}`."
    )
    console.result({**adapter_row(adapter), "path": adapter.path, "store": path})
    return 0


def _print_plan(made: Mapping[str, Any], console: Console) -> None:
    memory = made["memory"]
    console.text(f"request   forget {made['forget_rows']} rows, retain {made['retain_rows']} rows")
    console.text(f"stack     on {', '.join(made['parents']) or 'the bare base'}")
    console.text(
        f"plan      {made['steps']} steps of {made['pairs_per_step']} pairs, rows of up to "
        f"{made['longest_row_tokens']} tokens"
    )
    console.text(f"adapter   {made['adapter_parameters']:,} parameters")
    console.text(
        f"memory    estimate {size_text(memory['low_bytes'])} to {size_text(memory['high_bytes'])}"
    )
    for name, count in memory["terms_bytes"].items():
        console.text(f"          {name.replace('_', ' ')} {size_text(count)}")
    console.result({"dry_run": True, **made})
