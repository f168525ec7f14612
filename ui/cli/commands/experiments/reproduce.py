"""`unlearner reproduce`: the published comparison, from training to table."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapters.base.load import BaseSpec
from adapters.errors import GateFailed, UserError
from ui.app.data.commands import command, flag_words
from ui.cli import models, options
from ui.cli.commands.adapters import merge
from ui.cli.options import PRESETS
from ui.cli.output.events import show_event
from ui.cli.output.figures import HEADS, print_comparison
from ui.console import Console, duration_text, setting_text, size_text
from unlearner.objectives.registry import OBJECTIVES
from unlearner.request.tofu import FORGET_SPLITS

if TYPE_CHECKING:
    from evaluation.experiments.reproduce import Reproduction


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "reproduce",
        run_reproduce,
        "data",
        config=(),
        help="Origin, Retrain and unlearned models on TOFU in one table",
        description="Repeats the published comparison: trains or loads Origin and Retrain, "
        "unlearns with each method and evaluates all. After an interruption the same command "
        "continues.",
        epilog="examples:\n  unlearner reproduce tofu-forget05 --preset mini --data TOFU\n"
        "  unlearner reproduce tofu-forget05 --preset llama2-7b --dry-run",
    )
    options.add_loading(parser, either_way=True)
    parser.add_argument("target", metavar="TARGET", help="a split: forget01, forget05 or forget10")
    parser.add_argument(
        "--preset",
        default=PRESETS[0],
        metavar="NAME",
        help=f"{' or '.join(PRESETS)} (default: {PRESETS[0]})",
    )
    parser.add_argument("--origin", metavar="B", help="a model trained on everything")
    parser.add_argument("--retrain", metavar="B", help="a model that never saw the forget split")
    options.add_reference_log(parser, use="in place of --retrain")
    parser.add_argument(
        "--methods",
        **options.NAMES,
        default=["npo", "simnpo"],
        help="objectives to compare (default: npo,simnpo)",
    )
    options.add_protocol(parser, several=True)
    options.add_limit(parser)
    options.add_out(parser, "folder for models, stores and logs", default="reproduce")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, load nothing")

    parser.add_argument(
        "--full",
        action="store_true",
        help="train all weights in float32 instead of an adapter, as published work does, for "
        "comparison: small models",
    )
    parser.add_argument(
        "--any-size", action="store_true", help="with --full: also above 300 million weights"
    )
    parser.add_argument(
        "--gate",
        action="store_true",
        help="exit with code 4 if a measured figure misses the published one: model utility by "
        "more than 0.02, forget quality on the other side of 0.05",
    )
    parser.add_argument(
        "--release",
        **options.FOLDER,
        help="also merge the last method's adapter into full weights in this folder, evaluate them "
        "and write a model card",
    )


def run_reproduce(args: argparse.Namespace, console: Console) -> int:
    """Runs the comparison and prints its table beside the published rows."""
    split = args.target.removeprefix("tofu:").removeprefix("tofu-")
    options.require_known(split, FORGET_SPLITS, f"'{args.target}' cannot be reproduced.")
    options.require_known(args.preset, PRESETS, f"There is no preset '{args.preset}'.")
    for method in args.methods:
        options.require_known(method, OBJECTIVES, f"There is no objective '{method}'.")
    if args.any_size and not args.full:
        raise UserError("--any-size has an effect only with --full.", "Add --full or drop it.")
    if args.full and args.load_in_4bit:
        raise UserError("The weights of a 4-bit base cannot be trained.", "Leave out --full.")
    if args.full and args.release:
        raise UserError("--release merges an adapter, and --full trains none.", "Leave out one.")
    protocols = tuple(args.protocol)
    console.words(f"Reproducing {args.target} ({args.preset}) in {args.out} ...")
    from evaluation.experiments.reproduce import Reproduction, plan, reproduce

    run = Reproduction(
        split,
        args.preset,
        args.out,
        data=args.data,
        origin=args.origin,
        retrain=args.retrain,
        reference_log=args.reference_log,
        methods=tuple(args.methods),
        base=BaseSpec("", dtype=args.dtype, device=args.device, attention=args.attention),
        load_in_4bit=args.load_in_4bit,
        protocols=protocols,
        limit=args.limit,
        full=args.full,
        any_size=args.any_size,
    )
    _check_gate(args, run)
    if args.dry_run:
        made = plan(run)
        _print_plan(made, console)
        console.result({"dry_run": True, **made})
        return 0
    with models.resumable(args.out):
        found = reproduce(run, lambda event: show_event(event, console))
    print_comparison(found["table"], console)
    _print_published(found, console)
    for check in found.get("checks", ()):
        console.text(check["text"])
    console.words(f"Took {duration_text(found['seconds'])}; all logs are in {args.out}.")
    if args.release:
        found = {**found, "release": release_system(args, run, found, console)}
    console.result(found)
    missed = [check["text"] for check in found["checks"] if not check["holds"]]
    if args.gate and missed:
        raise GateFailed(
            f"The gate failed: {'; '.join(missed)}.",
            "See docs/seven-b.md for what moves these figures.",
        )
    return 0


def _check_gate(args: argparse.Namespace, run: Reproduction) -> None:
    """Refuses --gate before any work where nothing measured can be compared.

    Raises:
        UserError: nothing is published for the split, or another protocol is measured.
    """
    preset = run.chosen
    if not args.gate:
        return
    if run.split not in preset.published:
        raise UserError(
            f"--gate has nothing to compare with: no figures are published for {preset.name} on "
            f"{run.split}.",
            "Leave it out.",
        )
    if preset.published_protocol not in run.protocols:
        raise UserError(
            f"The published figures of {preset.name} were measured by the protocol "
            f"{preset.published_protocol}, and this run measures {', '.join(run.protocols)}.",
            f"Add --protocol {','.join([*run.protocols, preset.published_protocol])}.",
        )


def release_system(
    args: argparse.Namespace, run: Reproduction, found: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    """Merges the last method's adapter into --release and evaluates it, as `merge` does."""
    method = run.methods[-1]
    flags = flag_words(
        base=found["origin"],
        store=found["stores"][method],
        out=args.release,
        split=run.split,
        template=run.chosen.template,
        reference_log=found["logs"]["retrain"],
        protocol=run.protocols[0],
        data=args.data,
        limit=args.limit,
    )
    console.words(f"Releasing {method}: {command('merge', *flags)}")
    parser = options.Parser(prog="unlearner")
    merge.register(parser.add_subparsers(dest="command", parser_class=options.Parser))
    return merge.merge_release(parser.parse_args(["merge", *flags]), console)


def _print_plan(made: Mapping[str, Any], console: Console) -> None:
    for key in ("target", "preset", "origin", "retrain", "data", "protocol", "dtype", "out"):
        console.text(f"{key:<9} {made[key]}")
    console.text(f"trained   {'all weights' if made['full'] else 'an adapter'}")
    console.text(f"4-bit     {'yes' if made['load_in_4bit'] else 'no'}")
    for method, config in made["methods"].items():
        console.text(f"{method}: {made['steps'][method]} steps")
        for part in config.values():
            settings = ", ".join(f"{key} {setting_text(value)}" for key, value in part.items())
            for line in textwrap.wrap(settings, 92):
                console.text(f"  {line}")
    for reason in made["reasons"]:
        console.text(f"because   {reason}")
    if made["memory"]:
        low, high = (size_text(made["memory"][key]) for key in ("low_bytes", "high_bytes"))
        console.text(f"memory    estimate {low} to {high}")
    _print_published(made, console)


def _print_published(found: Mapping[str, Any], console: Console) -> None:
    if rows := found["published"]:
        console.text(f"\npublished, not measured here (protocol {found['published_protocol']}):")
        console.table([{HEADS.get(key, key): row[key] for key in row} for row in rows])
