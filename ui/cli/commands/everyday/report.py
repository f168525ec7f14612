"""`unlearner report`: recorded measurements as Markdown, one HTML file, CSV and plots; no model."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.protocols import PROTOCOLS, protocol_named
from ui.cli import options

if TYPE_CHECKING:
    from evaluation.report.tree import ReportRequest
    from ui.cli.console import Console

OUT, TITLE = Path("report"), "Unlearning report"


def register(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "report",
        parents=[options.common()],
        help="Markdown, one HTML file, CSV and plots from recorded measurements, no model",
        description="Puts logs, strength curves and robustness cards into one report: the table "
        "with its errors, what is forgotten against what is kept, distributions, best and worst "
        "answers, and where each figure comes from. Same inputs, same bytes.",
        epilog="examples:\n"
        "  unlearner report results --out report\n"
        "  unlearner report origin=full.json npo.json --retain-log retrain.json",
    )
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="NAME=LOG, a log, or a folder that evaluate, reproduce or quickstart wrote",
    )
    parser.add_argument(
        "--retain-log",
        type=Path,
        metavar="LOG",
        help="log of a model that never saw the forget set (default: the system called retrain)",
    )
    parser.add_argument(
        "--second-retain-log",
        type=Path,
        metavar="LOG",
        help="log of a second such model: how far two of them lie apart",
    )
    parser.add_argument(
        "--protocol",
        type=options.name_list,
        default=[],
        metavar="P[,P]",
        help=f"{', '.join(PROTOCOLS)} (default: the one the first log states, else tofu)",
    )
    _add_card_flags(parser)
    parser.set_defaults(run=run_report)


def _add_card_flags(parser: options.Parser) -> None:
    for name in ("robustness", "calibration"):
        parser.add_argument(
            f"--{name}",
            type=Path,
            nargs="+",
            action="extend",
            default=[],
            metavar="FILE",
            help=f"{name}.json beside those found in folders",
        )
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR", help=f"folder to write (default: {OUT})"
    )
    parser.add_argument("--title", default=TITLE, metavar="T", help="its title")
    parser.add_argument(
        "--tried",
        type=options.positive_int,
        metavar="N",
        help="how many configurations were tried before these (default: as searches recorded it)",
    )
    parser.add_argument(
        "--published",
        choices=("forget05", "forget10", "none"),
        help="published rows beside ours (default: those of the split that the logs state)",
    )
    parser.add_argument(
        "--without-answers", action="store_true", help="leave out every question and answer"
    )
    parser.add_argument("--png", action="store_true", help="plots as PNG too (needs matplotlib)")
    parser.add_argument(
        "--date", default="", metavar="TEXT", help="a date to print (default: none)"
    )


def run_report(args: argparse.Namespace, console: Console) -> int:
    """Writes the report and names its files."""
    for name in args.protocol:
        protocol_named(name)
    console.words(f"Reading {', '.join(args.inputs)} ...")
    from evaluation.report.files import make_report

    request = _request(args)
    request = replace(request, command=command_text(request, png=args.png))
    written = make_report(request, args.out, png=args.png)
    for text in written.report.warnings:
        console.words(f"Note: {text}.")
    for path in written.files:
        console.text(str(path))
    if not args.without_answers and written.report.answers:
        console.words(
            "Note: it holds answers of the forget set (--without-answers leaves them out)."
        )
    console.result(
        {
            "html": str(written.html),
            "files": [str(path) for path in written.files],
            "retrain": written.report.retrain,
            "tried": written.report.tried,
            "warnings": list(written.report.warnings),
            "table": [
                {**one.figures, "name": one.name, "source": one.role}
                for view in written.report.views
                for one in view.systems
            ],
        }
    )
    return 0


def _request(args: argparse.Namespace) -> ReportRequest:
    """What the flags ask for."""
    from evaluation.report.tree import ReportRequest

    return ReportRequest(
        inputs=tuple(args.inputs),
        retain_log=args.retain_log,
        second_retain_log=args.second_retain_log,
        protocols=tuple(args.protocol),
        robustness=tuple(args.robustness),
        calibration=tuple(args.calibration),
        title=args.title,
        tried=args.tried,
        published=args.published,
        without_answers=args.without_answers,
        date=args.date,
    )


def command_text(request: ReportRequest, *, png: bool = False) -> str:
    """The command that makes the same report, without where it is written: that changes no byte."""
    words: list[object] = ["unlearner", "report", *request.inputs]
    named = {
        "--retain-log": request.retain_log,
        "--second-retain-log": request.second_retain_log,
        "--protocol": ",".join(request.protocols) or None,
        "--tried": request.tried,
        "--published": request.published,
        "--title": request.title if request.title != TITLE else None,
        "--date": request.date or None,
    }
    for flag, value in named.items():
        words += [] if value is None else [flag, value]
    cards = {"--robustness": request.robustness, "--calibration": request.calibration}
    for flag, files in cards.items():
        words += [flag, *files] if files else []
    words += ["--without-answers"] * request.without_answers + ["--png"] * png
    return shlex.join(map(str, words))
