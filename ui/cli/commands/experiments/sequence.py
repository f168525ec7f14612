"""`unlearner sequence`: requests that arrive one after another, under each policy."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from evaluation.protocols import DEFAULT, PROTOCOLS
from ui.cli import options
from ui.cli.alternates import add_alternates_from, other_rows
from ui.cli.output.events import show_event

if TYPE_CHECKING:
    from evaluation.experiments.sequence_plan import Plan
    from ui.cli.console import Console

COLUMNS = (
    "policy", "stage", "FQ", "shift", "asked P", "asked NLL", "waiting P", "retain P", "MU",
    "MU of six", "stale", "steps",
)  # fmt: skip
LEGEND = (
    "FQ, shift: of the rows of all requested so far, against Retrain; P, NLL: of their true\n"
    "answers; waiting: authors of the split not asked for; MU of six: its parts without ROUGE;\n"
    "steps: of training in this stage."
)


def register(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "sequence",
        parents=[
            options.base(),
            options.loading(),
            options.settings(),
            options.data(),
            options.common(),
        ],
        help="the authors of a split as requests one after another, under each policy",
        description="Files the authors of a TOFU forget split as requests one after another: each "
        "on the bare base (independent), on top of those before it with their rows guarded "
        "(on-stack), or as one adapter retrained on all rows so far (consolidated). Measures every "
        "author after each arrival, reverts one request, and makes good what that leaves stale. "
        "What stands in --out is not done again.",
        epilog="example:\n  unlearner sequence tofu:forget05 --base B --data TOFU "
        "--retain-log R.json --out S --requests 3 --revert 2",
    )
    _add_flags(parser)
    parser.set_defaults(run=run_sequence_command)


def _add_flags(parser: options.Parser) -> None:
    parser.add_argument("split", metavar="SPLIT", help="tofu:forget01, tofu:forget05 or forget10")
    parser.add_argument(
        "--policies",
        type=options.name_list,
        default=None,
        metavar="P,P",
        help="of independent, on-stack, consolidated (default: all three)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="of all stages")
    parser.add_argument(
        "--retain-log",
        type=Path,
        metavar="LOG",
        help="evaluation of a model that never saw the split; forget quality needs it",
    )
    parser.add_argument(
        "--requests",
        type=options.positive_int,
        metavar="N",
        help="only the split's first N authors are asked for; the others are measured all the same",
    )
    parser.add_argument(
        "--limit",
        type=options.positive_int,
        metavar="N",
        help="measure at most N rows of each author and of each set to be kept",
    )
    parser.add_argument(
        "--revert", type=int, default=0, metavar="N", help="withdraw request N at the end"
    )
    parser.add_argument(
        "--retain",
        metavar="ROWS",
        help="rows to keep: a JSONL file or tofu:SPLIT (default: the split's retain rows)",
    )
    add_alternates_from(parser)
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), default=DEFAULT)


def _plan(args: argparse.Namespace) -> Plan:
    from evaluation.experiments.sequence_plan import Plan, split_authors, utility_rows
    from ui.cli.commands.everyday.forget import forget_config
    from unlearner.config import STREAMS
    from unlearner.request.sources import parse_request
    from unlearner.request.tofu import load_refusals

    config = forget_config(args)
    split = args.split.removeprefix("tofu:")
    retain = None
    if args.retain:
        retain = parse_request(args.split, args.data, args.retain).retain
    authors = split_authors(split, args.data, retain, args.limit, other_rows(args))
    refusals = load_refusals(args.data) if "refusal" in STREAMS[config.objective.name] else []
    return Plan(
        split=split,
        data=args.data,
        base=options.base_spec(args),
        config=config,
        authors=authors,
        count=args.requests or len(authors),
        utility=utility_rows(args.data, args.limit),
        retain_log=args.retain_log,
        protocol=args.protocol,
        refusals=tuple(refusals),
        revert=args.revert,
    )


def run_sequence_command(args: argparse.Namespace, console: Console) -> int:
    """Runs the sequence; one line a stage."""
    if not args.split.startswith("tofu:"):
        raise UserError(f"'{args.split}' is no TOFU split.", "Give tofu:forget05 or the like.")
    console.words(f"Reading {args.split} ...")
    plan = _plan(args)
    console.words("Loading the libraries ...")
    from evaluation.experiments.sequence import run_sequence
    from evaluation.experiments.sequence_plan import POLICIES

    found = run_sequence(
        plan,
        args.policies if args.policies is not None else POLICIES,
        args.out,
        lambda event: show_event(event, console),
    )
    console.table(stage_rows(found), list(COLUMNS))
    console.text(LEGEND)
    for line in found["policies"]:
        cost = line["cost"]
        console.text(
            f"{line['policy']}: {cost['steps']} steps, {cost['pairs']:,} pairs, "
            f"{cost['bytes'] / 2**20:.1f} MiB of adapters for {found['requests']} requests"
        )
    page = _write_page(found, args.out / "sequence.html")
    console.hint(f"the page is {page}, everything is in {args.out / 'sequence.json'}.")
    console.result({"out": args.out / "sequence.json", "page": page, **found})
    return 0


def _write_page(found: Mapping[str, Any], path: Path) -> Path:
    from adapters.atomic_files import write_bytes
    from ui.cli.output.sequence_page import sequence_page

    write_bytes(path, sequence_page(found).encode())
    return path


def stage_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for the base and for every stage of every policy."""
    rows = [_row("-", "origin", found["origin"])]
    for line in found["policies"]:
        for number, stage in enumerate(line["arrivals"], start=1):
            rows.append(_row(line["policy"], f"after {number}", stage))
        rows += [_row(line["policy"], name, line[name]) for name in ("revert", "rebase")
                 if name in line]  # fmt: skip
    return rows


def _row(policy: str, name: str, stage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "policy": policy,
        "stage": name,
        "FQ": stage["forget_quality"],
        "shift": stage["log_r_shift"],
        "asked P": stage["requested_answer_prob"],
        "asked NLL": stage["requested_nll"],
        "waiting P": stage["waiting_answer_prob"],
        "retain P": stage["retain_answer_prob"],
        "MU": stage["model_utility"],
        "MU of six": stage["utility_teacher_forced"],
        "stale": len(stage.get("stale", ())),
        "steps": stage.get("cost", {}).get("steps"),
    }
