"""`unlearner score`: figures from recorded evaluation logs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

from adapters.base.load import load_base
from adapters.environment import threads_for
from adapters.errors import UserError
from evaluation.logs import read_log
from evaluation.logs.records import EvalLog
from ui.cli import options
from ui.cli.output import scoring
from ui.cli.output.events import progress_of
from ui.cli.output.figures import report_figures
from ui.console import Console, cell_text


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "score",
        run_score,
        "template loading",
        config=("protocol", "template"),
        help="forget quality and model utility from recorded logs, no model",
        description="Computes all figures from an evaluation log: this tool's, TOFU's "
        "eval_log_aggregated.json in either layout, or open-unlearning's TOFU_EVAL.json.",
        epilog="example:\n  unlearner score unlearned.json --reference-log retrain.json",
    )
    scoring.add_flags(parser)
    parser.add_argument("log", **options.LOG, help="evaluation log with its rows")
    group = parser.add_argument_group(
        "fluency",
        "A judge says how fluent the recorded answers are, which does not make an answer true.\n"
        "--template and the loading flags below are for the judge.",
    )
    group.add_argument(
        "--fluency-judge",
        dest="base",
        metavar="MODEL",
        help="hub id or folder of a model that never saw the forget rows: a second Retrain, or any "
        "fluent model; one that saw them finds the true answers the most fluent",
    )
    group.add_argument(
        "--fluency-set",
        metavar="NAME",
        help="whose answers: forget, retain, real_authors or world_facts (default: forget)",
    )
    parser.set_defaults(revision=None)


def run_score(args: argparse.Namespace, console: Console) -> int:
    """Prints all figures of a log; 4 where a gate fails."""
    console.words(f"Reading {args.log} ...")
    if args.fluency_set and not args.base:
        raise UserError("--fluency-set needs a judge.", "Add --fluency-judge MODEL.")
    gates = scoring.gates_of(args)
    references = scoring.read_references(args)
    log = read_log(args.log)
    summaries = scoring.figures_of(args, log, references)
    named = {"log": str(args.log), "retain_log": args.reference_log and str(args.reference_log)}
    fluency = _fluency(args, log, references, console) if args.base else None
    scoring.write_for_others(args, log, references, console)
    figures = scoring.with_protocols(named, summaries)
    report_figures(figures if fluency is None else {**figures, "fluency": fluency}, console)
    if fluency is not None:
        console.text()
        console.table([_line(row) for row in fluency["table"]])
    scoring.check_gates(gates, summaries[0])
    return 0


def _fluency(
    args: argparse.Namespace, log: EvalLog, references: scoring.References, console: Console
) -> dict[str, Any]:
    """Figures of the log's answers and of its references'; checked before the judge is loaded."""
    from evaluation.inference.scoring import judge_losses
    from evaluation.metrics.text import fluency, recorded_answers

    names = ("log", "retain_log", "second_retain_log")
    given = (args.log, args.reference_log, args.second_reference_log)
    every = zip(names, given, (log, *references), strict=True)
    logs = [(name, str(path), each) for name, path, each in every if each is not None]
    of_set = args.fluency_set or "forget"
    answers = recorded_answers([(path, each) for _, path, each in logs], of_set)
    questions = [[row.question for row in rows] for rows in answers]
    same = all(each == questions[0] for each in questions)
    if not same:
        console.words("Note: the logs do not ask the same questions: compare with care.")
    console.words(f"Loading the judge {args.base} ...")
    fmt = options.prompts(args)
    model: Any = load_base(options.base_spec(args))
    show, table = progress_of(console), []
    with threads_for(model):
        for (name, path, _), rows in zip(logs, answers, strict=True):
            losses = judge_losses(model, fmt, rows, on_progress=partial(show, f"{name}: fluency"))
            table.append({"log": name, "path": path, **fluency(rows, losses)})
    for row in table:
        for key, reason in row["reasons"].items():
            console.words(f"{row['log']}: {key} is missing: {reason}.")
    return {"set": of_set, "judge": args.base, "same_questions": same, "table": table}


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    line = {key: row[key] for key in ("log", "n", "scored", "empty")}
    for key in ("judge_nll", "distinct_2"):
        span = row[f"{key}_interval"]
        line[key] = None if span is None else f"{cell_text(row[key])} [{cell_text(span)}]"
    return line | {key: row[key] for key in ("repeated_share", "words")}
