"""`unlearner evaluate`: the figures of a base with its adapters, or of several systems on it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from adapters.errors import BaseMismatch, UserError
from adapters.lora.stack import load_stack
from adapters.store.store import AdapterStore
from evaluation.logs.records import EvalLog, write_json, write_log
from evaluation.protocols import protocol_named
from ui.cli import models, options, own_rows
from ui.cli.commands.everyday import evaluate_metrics
from ui.cli.models import Stack
from ui.cli.output import scoring
from ui.cli.output.figures import COLUMNS, report_figures
from ui.console import Console, json_value
from unlearner import distributed as ranks

if TYPE_CHECKING:
    from evaluation.suite import EvalData


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "evaluate",
        run_evaluate,
        "base template loading store data",
        config=(*options.OF_BASE, "protocol"),
        help="measure a base with its active adapters, or merged weights",
        description="Scores and answers TOFU's four sets with the base and its adapters. With "
        "--out finished results are cached: the same command continues after an interruption.",
        epilog="example:\n  unlearner evaluate --base B --store S --split forget05 "
        "--reference-log retrain.json --out results",
    )
    scoring.add_flags(parser)
    own_rows.add_flags(parser)
    options.add_adapters(parser)
    options.add_scales(parser)
    parser.add_argument(
        "--systems",
        type=parse_systems,
        metavar="A;B,C",
        help="measure several systems on one loaded base, one row each: 'none;r0001;r0001,r0002'",
    )
    options.add_out(parser, "folder for the log and the figures")
    options.add_limit(parser)
    parser.add_argument(
        "--plain",
        action="store_true",
        help="padded rows and undrafted answers, to check the faster computation",
    )
    options.add_questions_per_batch(parser)
    evaluate_metrics.add_metric_flags(parser)


def run_evaluate(args: argparse.Namespace, console: Console) -> int:
    """Prints all figures of a model; 4 where a gate fails."""
    gates = scoring.gates_of(args, evaluate_metrics.metric_figures(args))
    if args.systems is not None:
        return run_systems(args, console)
    store = _store_of(args)
    stack = models.chosen_stack(args, store) if store is not None else []
    what = own_rows.name_of(args)
    used = [slug if scale == 1.0 else f"{slug} at {scale:g}" for slug, scale in stack]
    names = ", ".join(used) or "no adapters"
    console.words(f"Evaluating {args.base} with {names} on {what} ...")
    if store is not None and not stack and store.list():
        console.words("Note: no adapter of the store is active, so the bare base is measured.")
    from evaluation.metrics.summary import figures_to_file

    references = scoring.read_references(args)
    data = own_rows.eval_data(args, console)
    extras = evaluate_metrics.plan_extras(args, data, protocol_named(args.protocol[0]), console)
    with models.resumable(args.out and args.out / scoring.PARTS):
        log = _measure(args, store, stack, data, references.first, extras, console)
    first, *others = scoring.figures_of(args, log, references)
    summaries = [extras.join(first), *others]
    about = {
        "base": args.base,
        "adapters": [slug for slug, _ in stack],
        "split": what,
        "log": str(args.out / scoring.LOG_FILE) if args.out else None,
        "retain_log": str(args.reference_log) if args.reference_log else None,
    }
    named = scoring.with_protocols(about, summaries)
    if args.out and ranks.rank() == 0:
        write_log(log, args.out / scoring.LOG_FILE)
        write_json(args.out / scoring.FIGURES_FILE, json_value(named))
        console.words(f"Wrote {args.out / scoring.LOG_FILE} and {args.out / scoring.FIGURES_FILE}")
    if ranks.rank() == 0 and store is not None and stack:
        # Filed with the last adapter of the stack: numbers and words, never a text.
        for figures in summaries:
            name, result = figures_to_file(figures, what, dict(stack), args.limit)
            store.attach_eval(stack[-1][0], name, result)
    report_figures(named, console)
    extras.report(named, console)
    if ranks.rank() == 0:  # last: a format may need what the rows lack, and the figures are shown
        scoring.write_for_others(args, log, references, console)
    scoring.check_gates(gates, summaries[0])
    return 0


def _store_of(args: argparse.Namespace) -> AdapterStore | None:
    """The store of the adapters to evaluate with; None where the flags mean the bare base."""
    path = options.store_path(args)
    options.scales_by_ref(args, args.adapters)  # refused without --adapters
    unnamed = args.store is None and args.adapters is None
    if args.adapters == [] or (unnamed and not (path / "store.json").is_file()):
        return None
    return AdapterStore.open(path)


def _measure(
    args: argparse.Namespace,
    store: AdapterStore | None,
    stack: Stack,
    data: EvalData,
    retain_log: EvalLog | None,
    extras: evaluate_metrics.Extras,
    console: Console,
) -> EvalLog:
    """Loads the base with its adapters, and measures it."""
    base = models.load(args)
    model = base.model
    if store is not None and stack:
        slugs, is_active = [slug for slug, _ in stack], args.adapters is None
        try:
            model = load_stack(
                model,
                store,
                slugs,
                dict(stack),
                base=base.fingerprint,
                allow_missing_parents=is_active,
            )
        except BaseMismatch as error:
            raise BaseMismatch(
                error.problem, f"{error.fix} `--adapters none` evaluates the bare base."
            ) from error
    return models.measure(args, base, model, stack, data, retain_log, args.out, console, extras)


def parse_systems(text: str) -> list[list[str]]:
    """`none;r0001;r0001,r0002` as lists of refs, the empty one for the bare base."""
    found = [options.name_list(part) for part in text.split(";") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no system, as in 'none;r0001'")
    return found


def _check_systems(args: argparse.Namespace) -> None:
    if args.adapters is not None:
        raise UserError("--systems names the adapters already.", "Leave out --adapters.")
    for name in ("scales", "fail_if", "metrics", "lm_eval"):
        if getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is for one system.", "Evaluate that one with --adapters.")
    if args.write_tofu or args.write_open_unlearning or args.write_lm_eval:
        raise UserError(
            "--systems measures several models, a public log holds one.",
            "Convert a log of --out with `unlearner score LOG --write-tofu FILE`.",
        )


def run_systems(args: argparse.Namespace, console: Console) -> int:
    """One row a system. The base is loaded once; a system is switched on exactly, so each figure is
    what an evaluation of its own gives. Nothing else is shared: with other weights every token's
    states are others, from the first adapted layer on.
    """
    _check_systems(args)
    store = options.open_store(args)
    systems = [[store.get(ref).slug for ref in refs] for refs in args.systems]
    references = scoring.read_references(args)
    data = own_rows.eval_data(args, console)
    what = own_rows.name_of(args)
    console.words(f"Loading {args.base} for {len(systems)} systems ...")
    base = models.load(args)
    model, table = base.model, []
    for slugs in systems:
        name = ",".join(slug.split("_")[0] for slug in slugs) or "base"
        console.words(f"Evaluating {name} ...")
        model = load_stack(model, store, slugs, base=base.fingerprint)
        stack = [(slug, 1.0) for slug in slugs]
        out = args.out / name.replace(",", "+") if args.out else None
        log = models.measure(args, base, model, stack, data, references.first, out, console)
        if out and ranks.rank() == 0:
            write_log(log, out / scoring.LOG_FILE)
        for figures in scoring.figures_of(args, log, references):
            table.append({**figures, "name": name, "adapters": slugs})
    columns = ("name", "protocol", *COLUMNS[1:])
    console.table([{key: row.get(key) for key in columns} for row in table])
    console.text(f"split {what}")
    console.result({"base": args.base, "split": what, "table": table})
    return 0
