"""`unlearner finetune`: Origin, which knows all, and Retrain, which never saw the request."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from adapters.errors import UserError
from ui.cli import options
from ui.cli.options import LORA_FIELDS, given_settings
from ui.cli.output.events import show_event
from ui.console import Console
from unlearner.baselines.finetune import FinetuneConfig
from unlearner.config import LoraShape
from unlearner.request.tofu import FORGET_SPLITS, load_split

TRAIN_FIELDS = tuple(field.name for field in fields(FinetuneConfig))


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "finetune",
        run_finetune,
        "base template loading data",
        config=("base", "template"),
        help="train the Origin or the Retrain model on TOFU",
        description="Fine-tunes a base on TOFU: Origin on all rows, Retrain on all but the forget "
        "split. The defaults are TOFU's recipe for full fine-tuning.",
        epilog="example:\n  unlearner finetune --kind retrain --split forget05 --base B --out R",
    )
    parser.add_argument(
        "--kind", required=True, choices=("origin", "retrain"), help="which of the two models"
    )
    options.add_split(
        parser,
        default="forget05",
        text="rows that Retrain never sees: forget01, forget05, forget10",
    )
    options.add_out(parser, "a new folder", required=True)
    parser.add_argument(
        "--lora",
        action="store_true",
        help="train a LoRA and fold it in (use a --learning-rate of about 1e-4)",
    )
    options.add_fields(parser.add_argument_group("with --lora"), LoraShape)
    options.add_fields(parser.add_argument_group("training"), FinetuneConfig)


def run_finetune(args: argparse.Namespace, console: Console) -> int:
    """Trains the model and prints its folder."""
    shape = given_settings(args, LORA_FIELDS)
    if shape and not args.lora:
        flag = "--" + next(iter(shape)).replace("_", "-")
        raise UserError(f"{flag} says nothing without --lora.", "Add --lora, or leave it away.")
    options.require_split(args.split)
    name = "full" if args.kind == "origin" else FORGET_SPLITS[args.split]
    console.words(f"Reading {name} ...")
    rows = load_split(name, args.data)
    console.words(f"Loading {args.base} to train on {len(rows)} rows ...")
    from unlearner.baselines.finetune import finetune

    out = finetune(
        options.base_spec(args),
        rows,
        args.out,
        FinetuneConfig(**given_settings(args, TRAIN_FIELDS)),
        lora=LoraShape(**shape) if args.lora else None,
        template=args.template,
        system=args.system,
        on_progress=lambda event: show_event(event, console),
    )
    console.text(str(out))
    console.hint(f"measure it with `unlearner evaluate --base {out} --split {args.split} ...`.")
    console.result({"name": args.kind, "out": out, "base": args.base, "rows": len(rows)})
    return 0
