"""`unlearner sequence`: requests that arrive one after another, under each policy."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import counted
from evaluation.logs.records import write_text
from ui.cli import options
from ui.cli.commands.everyday.forget import chosen_by_user, forget_config
from ui.cli.output.events import show_event
from ui.cli.own_rows import add_alternates_from, other_rows, refusals
from ui.console import Console
from unlearner.request.sources import parse_request
from unlearner.request.tofu import split_name

if TYPE_CHECKING:
    from evaluation.experiments.sequence import Plan

# The figures of a stage, by the head of their column.
FIGURES = {
    "FQ": "forget_quality",
    "shift": "log_r_shift",
    "requested P": "requested_answer_prob",
    "requested NLL": "requested_nll",
    "waiting P": "waiting_answer_prob",
    "retain P": "retain_answer_prob",
    "MU": "model_utility",
    "MU of six": "utility_teacher_forced",
}
COLUMNS = ("policy", "stage", *FIGURES, "stale", "steps")
LEGEND = (
    "FQ, shift: of the rows of all authors requested so far, against Retrain; P, NLL: of their\n"
    "true answers; waiting: authors of the split that are not requested; MU of six: its six parts\n"
    "without ROUGE; steps: trained in this stage."
)
CURVES = ("requested P", "retain P")  # drawn over the number of requests


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "sequence",
        run_sequence_command,
        "base template loading settings data",
        config=(*options.OF_BASE, *options.SETTINGS),
        help="the authors of a split as requests one after another, under each policy",
        description="Files the authors of a TOFU forget split as requests one after another: each "
        "on top of the earlier ones with their rows guarded (on-stack), or as one adapter "
        "retrained on all rows so far (consolidated). Measures every author after each arrival, "
        "reverts one request, and retrains what that leaves stale. Settings that are not given are "
        "chosen as in `forget`. Finished stages in --out are not repeated.",
        epilog="example:\n  unlearner sequence tofu:forget05 --base B --data TOFU "
        "--reference-log R.json --out S --requests 3 --revert 2",
    )
    parser.add_argument(
        "split", type=split_name, metavar="SPLIT", help="forget01, forget05 or forget10"
    )
    parser.add_argument(
        "--policies",
        type=options.name_list,
        metavar="P,P",
        help="on-stack, consolidated (default: both)",
    )
    options.add_out(parser, "folder of all stages", required=True)
    options.add_reference_log(parser)
    parser.add_argument(
        "--requests",
        **options.COUNT,
        help="request only the first N authors of the split; all are measured",
    )
    options.add_limit(parser, "measure at most N rows of each author and of each retained set")
    parser.add_argument(
        "--revert", type=int, default=0, metavar="N", help="revert request N at the end"
    )
    options.add_retain(parser, default="the split's retain rows")
    options.add_columns(parser)
    add_alternates_from(parser)
    options.add_protocol(parser)


def _plan(args: argparse.Namespace) -> Plan:
    from evaluation.experiments.sequence import Plan, split_authors, utility_rows

    config = forget_config(args)
    retain = None
    if args.retain:
        retain = parse_request(args.split, args.data, args.retain, options.columns(args)).retain
    authors = split_authors(args.split, args.data, retain, args.limit, other_rows(args))
    return Plan(
        split=args.split,
        data=args.data,
        base=options.base_spec(args),
        config=config,
        given=chosen_by_user(args),
        authors=authors,
        count=args.requests or len(authors),
        utility=utility_rows(args.data, args.limit),
        reference_log=args.reference_log,
        protocol=args.protocol,
        refusals=refusals(args, config),
        revert=args.revert,
        template=args.template,
        system=args.system,
    )


def run_sequence_command(args: argparse.Namespace, console: Console) -> int:
    """Runs the sequence and prints one row per stage."""
    options.require_split(args.split)
    console.words(f"Reading {args.split} ...")
    plan = _plan(args)
    console.words("Loading the libraries ...")
    from evaluation.experiments.sequence import POLICIES, run_sequence

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
            f"{line['policy']}: {counted(cost['steps'], 'step')}, "
            f"{counted(cost['pairs'], 'pair')}, {cost['bytes'] / 2**20:.1f} MiB of adapters for "
            f"{counted(found['requests'], 'request')}"
        )
    files = _write_files(found, args.out)
    console.hint(f"table and plot are {' and '.join(map(str, files))}.")
    console.result({"out": args.out / "sequence.json", **found})
    return 0


def _write_files(found: Mapping[str, Any], out: Path) -> list[Path]:
    """Writes the tables as Markdown, and the curves of probability as SVG."""
    from evaluation.report.plots import line_chart, svg_file

    title = f"{counted(found['requests'], 'request')} of {found['split']}, one after another"
    lines = [f"# {title}", "", f"Base {found['base']}, protocol {found['protocol']}.", ""]
    lines += _markdown(COLUMNS, [[row[name] for name in COLUMNS] for row in stage_rows(found)])
    for line in found["policies"]:
        lines += ["", f"## {line['policy']}: rise of each author's NLL, nats per token", ""]
        rows = [[number, *change] for number, change in enumerate(line["interference"], start=1)]
        lines += _markdown(("request", *found["authors"]), rows)
    files = [write_text(out / "sequence.md", "\n".join(lines) + "\n")]
    curves = {
        f"{line['policy']}, {name}": [
            (float(number), stage[FIGURES[name]])
            for number, stage in enumerate([found["origin"], *line["arrivals"]])
            if stage[FIGURES[name]] is not None
        ]
        for line in found["policies"]
        for name in CURVES
    }
    chart = line_chart(
        "sequence", title, curves, "requests", "mean answer probability", ys=(0.0, 1.0)
    )
    if chart is not None:
        files.append(write_text(out / "sequence.svg", svg_file(chart)))
    return files


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cell(value) for value in line)} |" for line in lines]


def stage_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for the base and for every stage of every policy."""
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
        **{head: stage[key] for head, key in FIGURES.items()},
        "stale": len(stage.get("stale", ())),
        "steps": stage.get("cost", {}).get("steps"),
    }
