"""`unlearner ask`: the comparison and the author sheet of the app, in a terminal."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from ui.cli import options

if TYPE_CHECKING:
    from ui.console import Console

SIDES = (("base", "base"), ("unlearned", "stack"))
SCORES = ("fact_recall", "rouge_l_recall", "answer_prob", "truth_ratio")


def register(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "ask",
        parents=[
            options.base(), options.template(), options.loading(), options.store(),
            options.data(), options.common(),
        ],
        help="ask base and unlearned model the same question, side by side",
        description="What the app's Compare tab and author sheet show. Each answer gets its "
        "figures where the question is one of the data, and a verdict in a word.",
        epilog="examples:\n  unlearner ask --base B --store S 'Where was Hina Ameen born?'\n"
        "  unlearner ask --base B --store S --author 'Hina Ameen'",
    )  # fmt: skip
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="of the data, or any other")
    parser.add_argument(
        "--author", metavar="NAME", help="every question of this author, and neighbours beside them"
    )
    parser.add_argument(
        "--neighbours", type=options.positive_int, default=5, metavar="N",
        help="with --author: rows of each kept set (default: 5)",
    )  # fmt: skip
    options.add_adapters(parser)
    options.add_scales(parser)
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T",
        help="of the answers (default: 0, greedy)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=options.seed, default=0, metavar="N", help="of sampled answers (default: 0)"
    )
    parser.add_argument(
        "--max-new", type=options.positive_int, default=200, metavar="N",
        help="longest answer in tokens (default: 200)",
    )  # fmt: skip
    parser.set_defaults(run=run_ask)


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
    )
    session.start()
    session.wait()
    if session.state == "failed":
        raise UserError(session.problem)
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


def _print_frame(found: Mapping[str, Any], console: Console) -> None:
    stack = ", ".join(f"{slug} x {scale:g}" for slug, scale in found["stack"])
    console.words(f"Read back from the model: {stack or 'no adapter is active'}")
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
