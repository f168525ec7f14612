"""`unlearner doctor` and `unlearner preview`: look before you run."""

from __future__ import annotations

import argparse
from typing import Any

from ui.cli import options
from ui.console import Console
from ui.preview import Preview, make_preview, row_text
from unlearner.config import TrainConfig
from unlearner.request.sources import parse_request

SHOWN_AT_ONCE = 3


def register(commands: Any) -> None:
    """Adds the two commands."""
    parser = options.add_command(
        commands,
        "doctor",
        run_doctor,
        "store",
        help="what this machine can run, each finding with its fix",
        description="Checks this machine and says how to fix what is missing.",
        epilog="examples:\n  unlearner doctor\n  unlearner doctor --full --store S",
    )
    parser.add_argument(
        "--full", action="store_true", help="also use torch and bitsandbytes, which takes seconds"
    )
    parser = options.add_command(
        commands,
        "preview",
        run_preview,
        "base template data",
        help="what a request is trained on, token by token",
        description="Shows each row as it is trained on: the prompt dim, the loss tokens "
        "underlined (in brackets off a terminal). Needs the tokenizer's files only.",
        epilog="example:\n  unlearner preview tofu:forget05 --base B",
    )
    parser.add_argument("request", metavar="REQUEST", help=options.REQUEST_HELP)
    options.add_retain(parser, "also show these rows")
    options.add_columns(parser)
    parser.add_argument(
        "--max-length",
        **options.COUNT,
        default=TrainConfig().max_length,
        help=f"cut rows at this many tokens (default: {TrainConfig().max_length})",
    )
    parser.add_argument(
        "--rows",
        **options.COUNT,
        default=SHOWN_AT_ONCE,
        help=f"rows to print; --json prints all (default: {SHOWN_AT_ONCE})",
    )


def run_doctor(args: argparse.Namespace, console: Console) -> int:
    """Prints every finding as it comes; 1 if one is a failure."""
    from ui.doctor import findings

    console.words("Looking at this machine ...")
    found = []
    for finding in findings(options.store_path(args), full=args.full):
        found.append(finding)
        console.text(f"{finding.status:<5} {finding.name:<17} {finding.detail}")
        if finding.fix:
            console.text(f"{'':<23} -> {finding.fix}")
    failed = sum(finding.status == "fail" for finding in found)
    console.result({"ok": failed == 0, "table": [vars(finding) for finding in found]})
    console.words(f"{failed} of {len(found)} failed." if failed else "Nothing stands in the way.")
    return 1 if failed else 0


def run_preview(args: argparse.Namespace, console: Console) -> int:
    """Prints the first rows of a request, or all of them as JSON."""
    console.words(f"Loading the tokenizer of {args.base} ...")
    request = parse_request(args.request, args.data, args.retain, options.columns(args))
    fmt = options.prompts(args)
    preview = make_preview(request, fmt, args.max_length, with_retain=args.retain is not None)
    _print_preview(preview, args.rows, console)
    console.result(preview.to_json())
    if preview.without_targets:
        names = ", ".join(row.name for row in preview.without_targets[:10])
        console.words(
            f"Warning: at --max-length {args.max_length} no answer token is left in {names}; "
            "`unlearner forget` would refuse them."
        )
    return 0


def _print_preview(preview: Preview, shown: int, console: Console) -> None:
    for row in [*preview.forget[:shown], *preview.retain[:shown]]:
        tokens = f"{row.encoded.n_prompt} prompt + {row.encoded.n_targets} loss tokens"
        console.text(f"{row.name}  ({tokens})")
        console.text(f"  {row_text(row, preview.fmt.tokenizer, console.styled)}")
        console.text()
    for kind, rows in (("forget", preview.forget), ("retain", preview.retain)):
        if rows:
            lengths = [len(row.encoded.input_ids) for row in rows]
            targets = sum(row.encoded.n_targets for row in rows)
            console.text(
                f"{kind}: {len(rows)} rows, {targets} loss tokens, "
                f"rows of {min(lengths)} to {max(lengths)} tokens"
            )
    if preview.fmt.preamble:
        console.text(f"system prompt: {preview.fmt.preamble}")
    if preview.fmt.date:
        console.text(f"date: {preview.fmt.date}, fixed so that prompts do not change by the day")
    console.text(
        f"template {preview.fmt.name}, cut at {preview.max_length} tokens: "
        f"{len(preview.cut)} rows are longer"
    )
    if preview.unknown:
        console.text(f"{preview.unknown} of {preview.rows} rows {preview.fmt.about_unknown}")
