"""`unlearner evaluate`: the figures of a base with its adapters."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapters.errors import BaseMismatch, Interrupted
from evaluation.protocols import protocol_named
from ui.cli import options, own_rows
from ui.cli.commands.everyday.evaluate_metrics import (
    Extras,
    add_metric_flags,
    metric_figures,
    plan_extras,
)
from ui.cli.commands.everyday.evaluate_systems import parse_systems, run_systems
from ui.cli.output import scoring
from ui.cli.output.events import progress_of
from ui.cli.output.gates import check_gates
from unlearner.training import distributed as ranks

if TYPE_CHECKING:
    from adapters.store.store import AdapterStore
    from evaluation.logs.records import EvalLog
    from evaluation.suite import EvalData
    from ui.console import Console


def register(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "evaluate",
        parents=[
            options.base(),
            options.template(system=True),
            options.loading(),
            options.store(),
            options.data(),
            scoring.scoring_flags(),
            options.common(),
        ],
        help="measure a base with its active adapters, or merged weights",
        description="Scores and answers TOFU's four sets with the base and its adapters. With "
        "--out finished results are cached: the same command continues after an interruption.",
        epilog="example:\n  unlearner evaluate --base B --store S --split forget05 "
        "--reference-log retrain.json --out results",
    )
    _add_evaluate_flags(parser)
    parser.set_defaults(run=run_evaluate)


def _add_evaluate_flags(parser: options.Parser) -> None:
    own_rows.add_flags(parser)
    options.add_adapters(parser)
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
    options.add_batch_size(parser)
    add_metric_flags(parser)


@dataclass(frozen=True)
class _Stack:
    """The adapters to evaluate with, in order, and what identifies them."""

    store: AdapterStore | None
    refs: list[str] | None
    active: list[tuple[str, float]]


def run_evaluate(args: argparse.Namespace, console: Console) -> int:
    """Prints all figures of a model; 4 where a gate fails."""
    gates = scoring.gates_of(args, metric_figures(args))
    if args.systems is not None:
        return run_systems(args, console)
    stack = _chosen_stack(args)
    what = own_rows.name_of(args)
    console.words(f"Evaluating {args.base} with {_stack_text(stack)} on {what} ...")
    from evaluation.logs.records import write_json, write_log
    from ui.cli.output.figures import report_figures
    from ui.console import json_value

    references = scoring.read_references(args)
    data = own_rows.eval_data(args, console)
    extras = plan_extras(args, data, protocol_named(args.protocol[0]), console)
    try:
        log = _measure(args, stack, data, references.first, extras, console)
    except KeyboardInterrupt:
        if args.out is None:
            raise
        raise Interrupted(
            f"Interrupted: finished results are cached in {args.out / scoring.PARTS}.",
            "Run the same command again to continue.",
        ) from None
    first, *others = scoring.figures_of(args, log, references)
    summaries = [extras.join(first), *others]
    about = {
        "base": args.base,
        "adapters": [slug for slug, _ in stack.active],
        "split": what,
        "log": str(args.out / scoring.LOG_FILE) if args.out else None,
        "retain_log": str(args.reference_log) if args.reference_log else None,
    }
    named = scoring.with_protocols(about, summaries)
    if args.out and ranks.rank() == 0:
        write_log(log, args.out / scoring.LOG_FILE)
        write_json(args.out / scoring.FIGURES_FILE, json_value(named))
        console.words(f"Wrote {args.out / scoring.LOG_FILE} and {args.out / scoring.FIGURES_FILE}")
    if ranks.rank() == 0:
        for figures in summaries:
            _attach(stack, args, figures)
    report_figures(named, console)
    extras.report(named, console)
    if ranks.rank() == 0:  # last: a format may need what the rows lack, and the figures are shown
        scoring.write_for_others(args, log, references, console)
    check_gates(gates, summaries[0])
    return 0


def _chosen_stack(args: argparse.Namespace) -> _Stack:
    """The adapters that the flags name; without a store the bare base."""
    path = options.store_path(args)
    if args.adapters == []:
        return _Stack(None, [], [])
    if args.store is None and args.adapters is None and not (path / "store.json").is_file():
        return _Stack(None, [], [])
    from adapters.store.store import AdapterStore

    store = AdapterStore.open(path)
    if args.adapters is None:
        return _Stack(store, None, [(one.slug, one.scale) for one in store.active()])
    return _Stack(store, args.adapters, [(store.get(ref).slug, 1.0) for ref in args.adapters])


def _stack_text(stack: _Stack) -> str:
    if not stack.active:
        return "no adapters"
    return ", ".join(slug if s == 1.0 else f"{slug} at {s:g}" for slug, s in stack.active)


def _measure(
    args: argparse.Namespace,
    stack: _Stack,
    data: EvalData,
    retain_log: EvalLog | None,
    extras: Extras,
    console: Console,
) -> EvalLog:
    """Loads the model and evaluates it; only ever the first `--limit` rows where that is given."""
    from adapters.base.fingerprint import fingerprint_base
    from adapters.base.load import base_view, load_base, load_tokenizer, resolve_base
    from adapters.lora.stack import load_stack
    from evaluation.cache import key_of
    from evaluation.suite import evaluate
    from unlearner.tokens.prompts import prompt_format

    fmt = prompt_format(load_tokenizer(args.base, args.revision), args.template, args.system)
    fingerprint = fingerprint_base(resolve_base(args.base, args.revision))
    model: Any = load_base(options.base_spec(args))
    view = base_view(model)
    if stack.store is not None and stack.active:
        try:
            model = load_stack(model, stack.store, stack.refs, base=fingerprint)
        except BaseMismatch as error:
            raise BaseMismatch(
                error.problem, f"{error.fix} `--adapters none` evaluates the bare base."
            ) from error
    key = key_of(base=fingerprint.digest, adapters=stack.active)
    command = shlex.join(["unlearner", *args.words])
    meta = {"split": own_rows.name_of(args), "adapters": stack.active, "command": command, **view}
    log = evaluate(
        model,
        fmt,
        data,
        protocol=args.protocol,
        retain_log=retain_log,
        limit=args.limit,
        key=key,
        resume_dir=args.out / scoring.PARTS if args.out else None,
        on_progress=progress_of(console),
        effort=scoring.effort_of(args),
        meta=meta,
    )
    extras.measure(model, fmt, key, meta, progress_of(console))
    return log


def _attach(stack: _Stack, args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Files the figures with the last adapter of the stack: numbers and words, never a text."""
    if stack.store is None or not stack.active:
        return
    kept = {
        k: v for k, v in figures.items() if not isinstance(v, dict | list) or k in scoring.INTERVALS
    }
    slugs = [slug for slug, _ in stack.active]
    what = own_rows.name_of(args)
    about = {"split": what, "stack": slugs, "scales": dict(stack.active), "limit": args.limit}
    stack.store.attach_eval(slugs[-1], f"{what}-{figures['protocol']}", {**kept, **about})
