"""`unlearner evaluate --systems`: the base, adapters and stacks measured on one loaded model."""

from __future__ import annotations

import argparse

from adapters.errors import UserError
from adapters.lora.stack import load_stack
from evaluation.logs.records import write_log
from ui.cli import models, options, own_rows
from ui.cli.output import scoring
from ui.cli.output.figures import COLUMNS
from ui.console import Console
from unlearner import distributed as ranks


def parse_systems(text: str) -> list[list[str]]:
    """`none;r0001;r0001,r0002` as lists of refs, the empty one for the bare base."""
    found = [options.name_list(part) for part in text.split(";") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no system, as in 'none;r0001'")
    return found


def _check(args: argparse.Namespace) -> None:
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
    _check(args)
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
