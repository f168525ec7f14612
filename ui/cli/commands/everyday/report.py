"""`unlearner report`: recorded measurements as Markdown, one HTML file, CSV and plots."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ui.app.data import commands as command_lines
from ui.cli import options
from ui.console import Console

if TYPE_CHECKING:
    from evaluation.report.build import ReportRequest

OUT, TITLE = "report", "Unlearning report"


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "report",
        run_report,
        help="write recorded measurements as Markdown, one HTML file, CSV and plots",
        description="Writes one report of logs, strength curves and robustness cards: the table "
        "with its intervals, forgetting against keeping, distributions, best and worst answers, "
        "and the source of every figure. No model is loaded. The same inputs give the same bytes.",
        epilog="examples:\n"
        "  unlearner report results --out report\n"
        "  unlearner report origin=full.json npo.json --reference-log retrain.json",
    )
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="NAME=LOG, a log, or a folder that evaluate, reproduce or quickstart wrote",
    )
    options.add_reference_log(
        parser, use="needed for forget quality (default: the system named retrain)"
    )
    options.add_second_reference_log(parser)
    options.add_protocol(parser, several=True, default=None)
    for name in ("robustness", "calibration"):
        parser.add_argument(
            f"--{name}",
            **options.FILE,
            nargs="+",
            action="extend",
            default=[],
            help=f"{name}.json, in addition to those found in folders",
        )
    options.add_out(parser, "folder to write", default=OUT)
    parser.add_argument("--title", default=TITLE, metavar="TEXT", help="title of the report")
    parser.add_argument(
        "--tried",
        **options.COUNT,
        help="number of configurations tried before these (default: as searches recorded it)",
    )
    parser.add_argument(
        "--published",
        choices=("forget05", "forget10", "none"),
        help="published rows to show (default: those of the split that the logs state)",
    )
    parser.add_argument(
        "--without-answers", action="store_true", help="leave out every question and answer"
    )
    parser.add_argument("--png", action="store_true", help="write the plots as PNG too")
    parser.add_argument("--date", default="", metavar="TEXT", help="date to print (default: none)")


def run_report(args: argparse.Namespace, console: Console) -> int:
    """Writes the report and prints the names of its files."""
    console.words(f"Reading {', '.join(args.inputs)} ...")
    from evaluation.report.files import make_report

    request = report_request(args)
    request = replace(request, command=command_lines.report(request, png=args.png))
    written = make_report(request, args.out, png=args.png)
    report = written.report
    for text in report.warnings:
        console.words(f"Note: {text}.")
    for path in written.files:
        console.text(str(path))
    if report.answers:
        console.words(
            "Note: the report holds answers of the forget set (--without-answers leaves them out)."
        )
    console.result(
        {
            "html": str(written.html),
            "files": [str(path) for path in written.files],
            "retrain": report.retrain,
            "tried": report.tried,
            "warnings": list(report.warnings),
            "table": [
                {**system.figures, "name": system.name, "source": system.role}
                for view in report.views
                for system in view.systems
            ],
        }
    )
    return 0


def report_request(args: argparse.Namespace) -> ReportRequest:
    """The request that the flags describe."""
    from evaluation.report.build import ReportRequest

    same = ("title", "tried", "published", "without_answers", "date")
    return ReportRequest(
        tuple(args.inputs),
        args.reference_log,
        args.second_reference_log,
        tuple(args.protocol or ()),
        tuple(args.robustness),
        tuple(args.calibration),
        **{name: getattr(args, name) for name in same},
    )
