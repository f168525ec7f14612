"""`unlearner fluency`: how much like language the recorded answers of evaluation logs are."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ui.cli import options
from ui.cli.commands.everyday.evaluate import progress_of
from ui.cli.console import cell_text

if TYPE_CHECKING:
    from ui.cli.console import Console
    from unlearner.request.rows import Row


def register(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "fluency",
        parents=[options.template(), options.loading(), options.common()],
        help="how much like language the recorded answers of logs are",
        description="Asks a judge how likely the recorded greedy answers are, and counts "
        "repetition in them. A low judge_nll is an answer much as the judge would say it; that "
        "does not make it true.",
        epilog="example:\n  unlearner fluency origin/eval_log.json retrain/eval_log.json "
        "unlearned/eval_log.json --judge RETRAIN2",
    )
    parser.add_argument(
        "logs", metavar="LOG", type=Path, nargs="+", help="evaluation logs with generated answers"
    )
    parser.add_argument(
        "--set", default="forget", metavar="NAME",
        help="whose answers: forget, retain, real_authors or world_facts (default: forget)",
    )  # fmt: skip
    group = parser.add_argument_group("judge")
    group.add_argument(
        "--judge", dest="base", required=True, metavar="BASE",
        help="hub id or folder of a model that never saw the forget rows: a second Retrain, or any "
        "fluent model; one that saw them calls the true answers the fluent ones",
    )  # fmt: skip
    group.add_argument("--revision", metavar="REV", help="commit, tag or branch of a hub judge")
    parser.set_defaults(run=run_fluency)


def run_fluency(args: argparse.Namespace, console: Console) -> int:
    """Prints a line a log; everything is read and checked before the judge is loaded."""
    console.words(f"Reading {', '.join(map(str, args.logs))} ...")
    from evaluation.logs.records import read_log
    from evaluation.metrics.text import fluency, judge_losses, recorded_answers

    answers = recorded_answers([(str(path), read_log(path)) for path in args.logs], args.set)
    same = _same_questions(answers)
    if not same:
        console.words("Note: the logs do not ask the same questions: compare with care.")
    console.words(f"Loading the judge {args.base} ...")
    from adapters.base.load import load_base, load_tokenizer
    from adapters.environment import threads_for
    from unlearner.tokens.prompts import prompt_format

    fmt = prompt_format(load_tokenizer(args.base, args.revision), args.template)
    model: Any = load_base(options.base_spec(args))
    show, table = progress_of(console), []
    with threads_for(model):
        for path, name, rows in zip(args.logs, short_names(args.logs), answers, strict=True):
            losses = judge_losses(model, fmt, rows, on_progress=partial(show, name))
            table.append({"log": name, "path": str(path), **fluency(rows, losses)})
    console.table([_line(row) for row in table])
    for row in table:
        for key, reason in row["reasons"].items():
            console.words(f"{row['log']}: {key} is missing: {reason}.")
    console.result({"set": args.set, "judge": args.base, "same_questions": same, "table": table})
    return 0


def short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as short as tells them apart: a file's name, its parent before it."""
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _same_questions(answers: Sequence[Sequence[Row]]) -> bool:
    asked = [[row.question for row in rows] for rows in answers]
    return all(questions == asked[0] for questions in asked)


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    line = {key: row[key] for key in ("log", "n", "scored", "empty")}
    for key in ("judge_nll", "distinct_2"):
        span = row[f"{key}_interval"]
        line[key] = None if span is None else f"{cell_text(row[key])} [{cell_text(span)}]"
    return line | {key: row[key] for key in ("repeated_share", "words")}
