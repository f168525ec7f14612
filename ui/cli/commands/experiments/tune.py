"""`unlearner tune`: searches the settings of a forget request."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError, did_you_mean
from ui.app.data.commands import flag_words
from ui.cli import models, options
from ui.cli.commands.everyday.forget import read_request
from ui.cli.output.events import show_event
from ui.cli.output.figures import print_comparison
from ui.cli.own_rows import add_alternates_from, refusals
from ui.console import Console, duration_text
from unlearner.config import make_config
from unlearner.objectives.registry import OBJECTIVES
from unlearner.request.rows import Request

if TYPE_CHECKING:
    from evaluation.tuning.search import Range, Tuning


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "tune",
        run_tune,
        "base template loading data settings",
        config=options.OF_BASE,
        help="search the settings of a forget request",
        description="Searches the settings with Optuna: trains one adapter per trial, measures it "
        "without generating answers, stops trials that fall behind, and evaluates the best "
        "settings on the seed they were chosen on and on held-out seeds. Settings given as flags "
        "are not searched. After an interruption the same command continues.",
        epilog="example:\n"
        "  unlearner tune tofu:forget05 --base B --split forget05 --reference-log R.json",
    )
    parser.add_argument("request", metavar="REQUEST", help=options.REQUEST_HELP)
    options.add_split(parser, required=True)
    options.add_reference_log(parser, required=True)
    options.add_retain(parser, default="the rest of TOFU")
    options.add_columns(parser)
    parser.add_argument(
        "--retain-known",
        type=float,
        metavar="P",
        help="keep only the retain rows that the base knows: answer probability above P",
    )
    add_alternates_from(parser)

    parser.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="NAME=LOW:HIGH",
        help="search NAME between these; may be given several times; margin is gamma / beta in "
        "units of Retrain's forget NLL",
    )
    parser.add_argument("--trials", **options.COUNT, default=20, help="in all (20)")
    parser.add_argument(
        "--minutes",
        type=options.positive_number,
        default=30.0,
        metavar="M",
        help="no trial begins later (30)",
    )
    parser.add_argument(
        "--seeds",
        type=_seed_list,
        default=(42, 43, 44),
        metavar="A,B",
        help="the first is searched on, the others are held out (42,43,44)",
    )
    options.add_limit(parser, "measure the chosen settings on the first N rows of each set")
    options.add_out(parser, "folder of the search", default="tune")


def _seed_list(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from None
    if len(set(seeds)) != len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return seeds


def run_tune(args: argparse.Namespace, console: Console) -> int:
    """Searches and prints the table."""
    _check(args)
    console.words(f"Tuning {args.request} on {args.base} in {args.out} ...")
    from evaluation.tuning.search import tune

    with models.resumable(args.out):
        found = tune(_tuning(args, console), lambda event: show_event(event, console))
    _print_chosen(found, console)
    console.words(f"Took {duration_text(found['seconds'])}.")
    console.result(found)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses what can be seen to be wrong before a library is loaded."""
    options.require_split(args.split)
    objective = args.objective
    options.require_known(objective, OBJECTIVES, f"There is no objective '{objective}'.")
    if args.seed is not None:
        raise UserError("A search takes several seeds.", "Give --seeds in place of --seed.")
    if args.retain_known is not None and not 0 <= args.retain_known < 1:
        raise UserError(
            f"--retain-known {args.retain_known:g} is not a probability.", "Give 0 to below 1."
        )


def _tuning(args: argparse.Namespace, console: Console) -> Tuning:
    from evaluation.tuning.search import Tuning

    request = read_request(args)
    kept = args.retain
    if args.retain_known is not None:
        request, kept = _known(args, request, console)
    names = (*options.OBJECTIVE_FIELDS, *options.LORA_FIELDS, *options.TRAIN_FIELDS)
    fixed = options.given_settings(args, names)
    space = space_of(args.objective, fixed, args.range)
    if not space:
        console.words("Every setting is given: nothing is searched, each seed is measured.")
    return Tuning(
        request,
        args.split,
        options.base_spec(args),
        args.reference_log,
        args.out,
        data=args.data,
        objective=args.objective,
        fixed=fixed,
        space=space,
        trials=args.trials,
        minutes=args.minutes,
        seeds=args.seeds,
        limit=args.limit,
        template=args.template,
        system=args.system,
        refusals=refusals(args, make_config(args.objective)),
        words=_words(args, kept),
    )


def _words(args: argparse.Namespace, kept: str | None) -> tuple[str, ...]:
    same = [
        *("base", "revision", "data", "system", "question_column", "answer_column"),
        *("alternates_from", "template", "dtype", "device", "attention", "load_in_4bit"),
    ]
    flags = flag_words(**{name: getattr(args, name) for name in same}, retain=kept)
    return ("unlearner", "forget", args.request, *flags)


def _known(args: argparse.Namespace, request: Request, console: Console) -> tuple[Request, str]:
    """The request with the retain rows the base knows, and the file they are written to."""
    from evaluation.experiments.small_rows import known_rows, write_rows

    console.words("Finding the retain rows that the base knows ...")
    found = known_rows(
        options.base_spec(args), request.retain, args.retain_known, args.template, args.system
    )
    rows = tuple(request.retain[i] for i in found)
    if not rows:
        raise UserError(
            f"{args.base} gives no retain row a probability above {args.retain_known:g}.",
            "Lower --retain-known, or give a base that was trained on TOFU.",
        )
    return replace(request, retain=rows), str(write_rows(args.out / "retain.jsonl", rows))


def space_of(objective: str, fixed: Mapping[str, Any], ranges: Sequence[str]) -> dict[str, Range]:
    """The search space: the table of `tuning.search` without what is fixed, with these ranges.

    Raises:
        UserError: a range that cannot be read, of a setting that is fixed or not searched.
    """
    from evaluation.tuning.search import MARGIN_OBJECTIVES, SPACE, WHOLE, Range

    space = {name: values for name, values in SPACE.items() if name not in fixed}
    if objective not in MARGIN_OBJECTIVES or "gamma" in fixed:
        space.pop("margin", None)
    for text in ranges:
        name, _, bounds = text.partition("=")
        name = name.replace("-", "_")
        if name not in space:
            problem = f"'{name}' is given or not searched"
            raise UserError(f"--range {text}: {problem}.", did_you_mean(name, space))
        try:
            low, high = (float(part) for part in bounds.split(":"))
        except ValueError:
            raise UserError(
                f"--range {text} cannot be read.", "Write it like learning_rate=5e-4:2e-3."
            ) from None
        whole = name in WHOLE and (low % 1 or high % 1)
        if low > high or low <= 0 or whole:
            raise UserError(
                f"--range {text} is no range of {name}.",
                "Give two numbers above 0, the lower one first"
                + (", both whole." if name in WHOLE else "."),
            )
        space[name] = Range(low, high, log=space[name].log)
    return space


def _print_chosen(found: Mapping[str, Any], console: Console) -> None:
    chosen = found["chosen"]
    rows = [found["origin"], chosen["selected"], *chosen["held_out"]]
    tried = "nothing was searched: the settings were given"
    if chosen["trial"] is not None:
        tried = (
            f"tried {found['tried']}: {found['finished']} finished, {found['pruned']} stopped "
            f"early, {found['failed']} failed; chosen: trial {chosen['trial']} on seed "
            f"{chosen['selected']['seed']}, the other seeds were held out"
        )
    console.text(tried)
    print_comparison([dict(row) for row in rows], console)
    for row in rows[1:]:
        missed = [name for name, held in row["reached"].items() if held is False]
        verdict = f"misses {', '.join(missed)}" if missed else "reaches the goal"
        console.text(f"{row['name']}: {verdict}")
    console.text("\n" + shlex.join(found["command"]))
