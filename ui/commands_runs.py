"""`unlearner quickstart` and `unlearner reproduce`: whole comparisons, from training to table."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import GateFailed, Interrupted, UserError
from evaluation.protocols import DEFAULT, PROTOCOLS, protocols_named
from ui import options
from ui.console import duration_text, setting_text, size_text
from ui.events import show_event
from unlearner.config import OBJECTIVE_DEFAULTS
from unlearner.data import FORGET_SPLITS, did_you_mean

if TYPE_CHECKING:
    from evaluation.reproduce import Reproduction
    from ui.console import Console

COLUMNS = (
    "name",
    "forget_quality",
    "ks",
    "log_r_shift",
    "direction",
    "model_utility",
    "forget_answer_prob",
    "forget_nll",
    "retain_answer_prob",
    "retain_nll",
)
HEADS = {
    "forget_quality": "FQ",
    "ks": "D",
    "log_r_shift": "shift",
    "model_utility": "MU",
    "forget_answer_prob": "forget P",
    "forget_nll": "forget NLL",
    "retain_answer_prob": "retain P",
    "retain_nll": "retain NLL",
}
LEGEND = (
    "FQ: forget quality, p of the KS test against Retrain, higher is better; D: its distance;\n"
    "shift: of log R against Retrain, best at 0; MU: model utility, higher is better;\n"
    "P: mean answer probability; NLL: nats a token."
)
ANSWER_TITLES = {
    "forget": "Asked to forget",
    "retain": "To be kept: other authors",
    "world_facts": "To be kept: facts of the world",
}
LONGEST_ANSWER = 160
PRESETS = ("mini", "llama2-7b", "llama3.2-1b", "llama3.2-3b")


def register(commands: Any) -> None:
    """Adds the two commands."""
    parser = commands.add_parser(
        "quickstart",
        parents=[options.common()],
        help="the whole story on an embedded world: CPU, minutes, no download",
        description="Trains Origin and Retrain on a made-up world of authors, files two forget "
        "requests, measures them beside the baselines, reverts one, merges. A second run reuses "
        "what stands.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart"),
        metavar="DIR",
        help="folder for models, store and logs (default: ./quickstart)",
    )
    parser.set_defaults(run=run_quickstart)
    parser = commands.add_parser(
        "reproduce",
        parents=[options.loading(either_way=True), options.data(), options.common()],
        help="Origin, Retrain and unlearned models on TOFU in one table",
        description="Does the published comparison: trains or takes Origin and Retrain, unlearns "
        "with each method and measures all. Interrupted, the same command continues.",
        epilog="examples:\n  unlearner reproduce tofu-forget05 --preset mini --data TOFU\n"
        "  unlearner reproduce tofu-forget05 --preset llama2-7b --dry-run",
    )
    _add_reproduce_flags(parser)
    parser.set_defaults(run=run_reproduce)


def _add_reproduce_flags(parser: options.Parser) -> None:
    parser.add_argument("target", metavar="TARGET", help="tofu-forget01, -forget05 or -forget10")
    parser.add_argument(
        "--preset",
        default=PRESETS[0],
        metavar="NAME",
        help=f"{' or '.join(PRESETS)} (default: {PRESETS[0]})",
    )
    parser.add_argument("--origin", metavar="B", help="a model that was trained on everything")
    parser.add_argument("--retrain", metavar="B", help="one that never saw the forget split")
    parser.add_argument(
        "--retain-log", type=Path, metavar="LOG", help="evaluation log in place of --retrain"
    )
    parser.add_argument(
        "--methods",
        type=options.name_list,
        default=["npo", "simnpo"],
        metavar="A,B",
        help="objectives to compare (default: npo,simnpo)",
    )
    parser.add_argument(
        "--protocol",
        default=DEFAULT,
        metavar="NAME",
        help=f"{', '.join(PROTOCOLS)}, several with commas, or all (default: {DEFAULT})",
    )
    parser.add_argument(
        "--limit",
        type=options.positive_int,
        metavar="N",
        help="measure only the first N rows of each set: for a quick look",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("reproduce"),
        metavar="DIR",
        help="folder for models, stores and logs (default: ./reproduce)",
    )
    _add_outcome_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, load nothing")


def _add_outcome_flags(parser: options.Parser) -> None:
    parser.add_argument(
        "--gate",
        action="store_true",
        help="leave with 4 where a measured figure misses the published one: model utility by more "
        "than 0.02, forget quality on the other side of 0.05",
    )
    parser.add_argument(
        "--release",
        type=Path,
        metavar="DIR",
        help="then fold the last method's adapter into full weights there, measured again, with a "
        "model card",
    )


def run_quickstart(args: argparse.Namespace, console: Console) -> int:
    """Runs the quickstart and prints its table, answers and proofs."""
    console.words(f"Quickstart in {args.out}: loading the libraries ...")
    from evaluation.quickstart import quickstart

    try:
        found = quickstart(args.out, lambda event: show_event(event, console))
    except (KeyboardInterrupt, Interrupted):
        raise _stopped(args.out) from None
    print_comparison(found["table"], console)
    _print_answers(found["answers"], console)
    _print_proofs(found, console)
    console.words(f"Took {duration_text(found['seconds'])}. What to try next:")
    for command in next_commands(found):
        console.words(f"  {command}")
    console.result(found)
    return 0


def _print_answers(answers: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A few answers before and after: those to be forgotten, then those to be kept."""
    for name, title in ANSWER_TITLES.items():
        mine = [answer for answer in answers if answer["set"] == name]
        if mine:
            console.text(f"\n{title}")
        for answer in mine:
            console.text(f"  Q       {answer['question']}")
            console.text(f"  truth   {answer['answer']}")
            console.text(f"  before  {_shortened(answer['origin'])}")
            console.text(f"  after   {_shortened(answer['simnpo'])}\n")


def _shortened(text: str | None) -> str:
    if text is None:
        return "-"
    return text if len(text) <= LONGEST_ANSWER else f"{text[:LONGEST_ANSWER]} [...]"


def _print_proofs(found: Mapping[str, Any], console: Console) -> None:
    revert, merge = found["revert"], found["merge"]
    exact = "bit for bit" if revert["bit_exact"] else "NOT bit for bit"
    console.text(f"revert    {revert['adapter']}, largest difference of any logit:")
    console.text(f"  {revert['effect']:.3g}  with it against without it: what it does")
    console.text(f"  {revert['without']:.3g}  reverted against a stack that never held it")
    console.text(
        f"  {revert['base']:.3g}  all switched off against the bare base: {exact} the same"
    )
    console.text(f"  {revert['again']:.3g}  switched on again against before")
    gap = merge["max_logit_difference"]
    console.text(f"merge     {merge['folder']}, largest difference to the stack {gap:.3g}")


def next_commands(found: Mapping[str, Any]) -> list[str]:
    """Commands that work on what the quickstart left behind."""
    base = f"--base {shlex.quote(found['base'])}"
    data = f"--data {shlex.quote(found['data'])}"
    store = f"--store {shlex.quote(found['store'])}"
    log = shlex.quote(str(Path(found["folder"]) / "logs" / "retrain.json"))
    author = shlex.quote(f"tofu:author={found['requests'][0][0]}")
    return [
        f"unlearner adapters list {store}",
        f"unlearner preview {author} {base} {data}",
        f"unlearner evaluate {base} {store} {data} --split {found['split']} --retain-log {log}",
        "unlearner reproduce tofu-forget05 --preset llama2-7b --dry-run",
    ]


def run_reproduce(args: argparse.Namespace, console: Console) -> int:
    """Runs the comparison and prints its table beside the published rows."""
    split = args.target.removeprefix("tofu-")
    if not args.target.startswith("tofu-") or split not in FORGET_SPLITS:
        known = [f"tofu-{name}" for name in FORGET_SPLITS]
        raise UserError(f"'{args.target}' cannot be reproduced.", did_you_mean(args.target, known))
    if args.preset not in PRESETS:
        hint = did_you_mean(args.preset, PRESETS)
        raise UserError(f"There is no preset '{args.preset}'.", hint)
    for method in args.methods:
        if method not in OBJECTIVE_DEFAULTS:
            hint = did_you_mean(method, OBJECTIVE_DEFAULTS)
            raise UserError(f"There is no objective '{method}'.", hint)
    protocols = tuple(protocol.name for protocol in protocols_named(args.protocol))
    console.words(f"Reproducing {args.target} ({args.preset}) in {args.out} ...")
    from adapters.base_model import BaseSpec
    from evaluation.reproduce import Reproduction, plan, reproduce

    run = Reproduction(
        split,
        args.preset,
        args.out,
        data=args.data,
        origin=args.origin,
        retrain=args.retrain,
        retain_log=args.retain_log,
        methods=tuple(args.methods),
        base=BaseSpec("", dtype=args.dtype, device=args.device, attention=args.attention),
        load_in_4bit=args.load_in_4bit,
        protocols=protocols,
        limit=args.limit,
    )
    if args.dry_run:
        made = plan(run)
        _print_plan(made, console)
        console.result({"dry_run": True, **made})
        return 0
    try:
        found = reproduce(run, lambda event: show_event(event, console))
    except (KeyboardInterrupt, Interrupted):
        raise _stopped(args.out) from None
    print_comparison(found["table"], console)
    _print_published(found["published"], console)
    for check in found.get("checks", ()):
        console.text(check["text"])
    console.words(f"Took {duration_text(found['seconds'])}; all logs are in {args.out}.")
    if args.release:
        found = {**found, "release": release_system(args, run, found, console)}
    console.result(found)
    _require_published(args, found)
    return 0


def _require_published(args: argparse.Namespace, found: Mapping[str, Any]) -> None:
    """Returns where --gate was not given, or every check holds.

    Raises:
        GateFailed: naming what misses, or that there is nothing published to hold against.
    """
    if not args.gate:
        return
    missed = [check["text"] for check in found["checks"] if not check["holds"]]
    if missed or not found["checks"]:
        raise GateFailed(
            f"The gate failed: {'; '.join(missed) or 'nothing is published for this split'}.",
            "See docs/seven-b.md for what moves these figures.",
        )


def release_system(
    args: argparse.Namespace, run: Reproduction, found: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    """Folds the last method's adapter into --release, as `unlearner merge` does, measured again."""
    from ui.cli import parse
    from ui.commands_merge import merge_release

    method = run.methods[-1]
    words = ["merge", "--base", found["origin"], "--store", found["stores"][method]]
    words += ["--out", str(args.release), "--split", run.split, "--template", run.chosen.template]
    words += ["--retain-log", found["logs"]["retrain"], "--protocol", run.protocols[0]]
    words += ["--data", str(args.data)] if args.data else []
    words += ["--limit", str(args.limit)] if args.limit else []
    console.words(f"Releasing {method}: unlearner {shlex.join(words)}")
    return merge_release(parse(words), console)


def _print_plan(made: Mapping[str, Any], console: Console) -> None:
    for key in ("target", "preset", "origin", "retrain", "data", "protocol", "dtype", "out"):
        console.text(f"{key:<9} {made[key]}")
    console.text(f"4-bit     {'yes' if made['load_in_4bit'] else 'no'}")
    for method, config in made["methods"].items():
        console.text(f"{method}: {made['steps'][method]} steps")
        for part in config.values():
            settings = ", ".join(f"{key} {setting_text(value)}" for key, value in part.items())
            for line in textwrap.wrap(settings, 92):
                console.text(f"  {line}")
    for reason in made["reasons"]:
        console.text(f"because   {reason}")
    for line in made["time"]:
        minutes = f"{line['training_minutes']:.0f} + {line['evaluation_minutes']:.0f} min"
        console.text(f"time      estimate {minutes} of training and evaluation on {line['card']}")
    if made["memory"]:
        low, high = (size_text(made["memory"][key]) for key in ("low_bytes", "high_bytes"))
        console.text(f"memory    estimate {low} to {high}")
    _print_published(made["published"], console)


def _print_published(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    if rows:
        console.text("\npublished, not measured here:")
        console.table([{HEADS.get(key, key): row[key] for key in row} for row in rows])


def _stopped(out: Path) -> Interrupted:
    return Interrupted(
        f"Interrupted: what was finished is kept in {out}.",
        "Run the same command again to continue.",
    )


def print_comparison(table: list[dict[str, Any]], console: Console) -> None:
    """Prints the systems of a comparison, one a line."""
    several = len({row.get("protocol") for row in table}) > 1
    columns = ("protocol", *COLUMNS) if several else COLUMNS
    console.table([{HEADS.get(key, key): row.get(key) for key in columns} for row in table])
    console.text(LEGEND)
