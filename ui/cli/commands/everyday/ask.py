"""`unlearner ask`: the comparison and the author sheet of the app, in a terminal."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapters.errors import UserError
from ui.app.data.library import Library, read_library
from ui.cli import options
from ui.console import Console
from unlearner.request.sources import rows_named

SIDES = (("base", "base"), ("unlearned", "stack"))
SCORES = ("fact_recall", "rouge_l_recall", "answer_prob", "truth_ratio")


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "ask",
        run_ask,
        "base template loading store data",
        help="ask base and unlearned model the same question, side by side",
        description="What the app's Compare tab and author sheet show. Where the question is one "
        "of --rows or --data, each answer gets its figures and a verdict: states it, wrong, made "
        "up, refuses or broken.",
        epilog="examples:\n  unlearner ask --base B --store S 'Where was Hina Ameen born?'\n"
        "  unlearner ask --base B --store S --author 'Hina Ameen'",
    )
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="of the rows, or any other")
    parser.add_argument(
        "--rows",
        metavar="ROWS",
        action="append",
        default=[],
        help="your own rows with the true answers: a file or hub:OWNER/NAME; may be repeated",
    )
    options.add_columns(parser)
    parser.add_argument(
        "--author",
        metavar="NAME",
        help="every question of this author of --data, and neighbours beside them",
    )
    parser.add_argument(
        "--neighbours",
        **options.COUNT,
        default=5,
        help="with --author: rows of each kept set (default: 5)",
    )
    options.add_adapters(parser)
    options.add_scales(parser)
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of the answers (default: 0, greedy)",
    )
    parser.add_argument(
        "--seed", type=options.seed, default=0, metavar="N", help="of sampled answers (default: 0)"
    )
    parser.add_argument(
        "--max-new", **options.COUNT, default=200, help="longest answer in tokens (default: 200)"
    )


def run_ask(args: argparse.Namespace, console: Console) -> int:
    """Answers the question, or every question of the author, both ways."""
    if (args.question is None) == (args.author is None):
        raise UserError("Give a question or --author NAME, one of the two.")
    strengths = options.scales_by_ref(args, args.adapters)
    console.words(f"Loading {args.base} ...")
    from ui.app.actions import Actions
    from ui.app.session import Session

    session = Session(
        options.store_path(args),
        options.base_spec(args),
        args.data,
        template=args.template,
        system=args.system,
        questions=_questions(args),
    )
    session.start()
    session.wait()
    if session.state == "failed":
        raise UserError(session.problem)
    if session.library.note:
        console.words(f"Note: {session.library.note}")
    actions = Actions(session)
    if args.author is not None:
        found = actions.sheet(args.author, args.adapters, args.neighbours, strengths)
        _print_sheet(found, console)
    else:
        found = actions.compare(
            args.question, args.adapters, strengths, args.temperature, args.seed, args.max_new
        )
        _print_frame(found, console)
    console.result(found)
    return 0


def _questions(args: argparse.Namespace) -> Library:
    """The rows with true answers: those of --rows, and of --data or, for an author, the hub."""
    columns = options.columns(args)
    own = [row for text in args.rows for row in rows_named(text, args.data, columns=columns)]
    wanted = args.data is not None or args.author is not None
    found = read_library(args.data) if wanted else Library()
    return replace(found, neighbours={"your rows": tuple(own), **found.neighbours})


def _print_frame(found: Mapping[str, Any], console: Console) -> None:
    stack = ", ".join(f"{slug} x {scale:g}" for slug, scale in found["stack"])
    console.words(f"Active in the model: {stack or 'no adapter'}")
    for key, name in SIDES:
        console.text(f"{name:<6} {found[key]['text']}")
    if found["truth"] is not None:
        console.text(f"truth  {found['truth']}")
    console.text()
    console.table(
        [
            {"name": name, "verdict": found[key]["word"], **{s: found[key][s] for s in SCORES}}
            for key, name in SIDES
        ]
    )


def _print_sheet(found: Mapping[str, Any], console: Console) -> None:
    for row in found["rows"]:
        console.text(f"Q      {row['question']}  ({row['group']})")
        for key, name in SIDES:
            console.text(f"{name:<6} {row[key]['text']}  [{row[key]['word']}]")
        console.text(f"truth  {row['truth']}\n")
    console.table(found["tally"])
