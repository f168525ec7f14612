"""`unlearner consolidate`: several requests retrained as one adapter that takes their place."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from adapters.errors import UserError
from ui.cli import options
from ui.cli.commands.everyday import forget
from ui.cli.own_rows import other_rows
from ui.console import Console
from unlearner.request.past_requests import joined
from unlearner.request.sources import parse_request


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "consolidate",
        run_consolidate,
        "base template loading settings store data",
        config=(*options.OF_BASE, *options.SETTINGS),
        help="retrain several requests into one adapter that supersedes them",
        description="Trains one adapter for the rows of several requests. It supersedes their "
        "adapters: activating it takes them off the stack. With one REF this is a rebase: its "
        "request is trained again on the stack as it is now. The rows must be given, the store "
        "does not hold them; rows of a replaced adapter that are missing are refused.",
        epilog="examples:\n"
        "  unlearner consolidate r0001 r0002 --rows a.jsonl --rows b.jsonl --base B\n"
        "  unlearner consolidate r0002 --rows b.jsonl --base B --on-stack",
    )
    parser.add_argument("refs", metavar="REF", nargs="+", help=f"adapter to replace: {options.REF}")
    parser.add_argument(
        "--rows", metavar="REQUEST", action="append", required=True, help=options.REQUEST_HELP
    )
    options.add_columns(parser)
    forget.add_run_flags(parser)
    parser.set_defaults(resolve=forget.resolved_settings)


def run_consolidate(args: argparse.Namespace, console: Console) -> int:
    """Trains and stores the adapter, or prints the plan."""
    path = options.store_path(args)
    if not (path / "store.json").is_file():
        raise UserError(f"There is no store at {path}.", "Name one with --store.")
    config = forget.forget_config(args)
    console.words(f"Reading {', '.join(args.rows)} ...")
    columns = options.columns(args)
    request = joined([parse_request(text, args.data, args.retain, columns) for text in args.rows])
    request = replace(request, others=other_rows(args))
    return forget.train_request(args, console, config, request, args.refs)
