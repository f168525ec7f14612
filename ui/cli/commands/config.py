"""`unlearner config`: the settings of a command as YAML, with what each is for."""

from __future__ import annotations

import argparse
from typing import Any

from adapters.errors import UserError, did_you_mean
from ui.cli import config_file, options
from ui.console import Console


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "config",
        run_config,
        help="print the settings of a command as YAML, for its --config",
        description="Prints every setting of a command that takes --config, as its flags, a "
        "--config and a --preset resolve it. Edit the file and pass it back with --config.",
        epilog="examples:\n"
        "  unlearner config forget rows.jsonl --retain keep.jsonl --base B > run.yaml\n"
        "  unlearner forget --config run.yaml --lora-r 8 --label case-9\n"
        "  unlearner config forget tofu:forget05 --preset llama2-7b",
    )
    parser.add_argument("name", metavar="COMMAND", help="such as forget, evaluate or tune")
    parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="...", help="what the command takes"
    )


def run_config(args: argparse.Namespace, console: Console) -> int:
    """Prints the YAML; nothing is read but the config."""
    known = {name: leaf for name, leaf in args.leaves.items() if "--config" in leaf.option_names()}
    options.require_known(args.name, known, f"There are no settings of a command '{args.name}'.")
    parser = known[args.name]
    flags = config_file.apply_config(parser, [args.name, *args.flags])[1:]
    with config_file.nothing_required(parser):
        given, extra = parser.parse_known_args(flags)
    if extra:
        raise UserError(
            f"`{parser.prog}` has no option {extra[0]}.",
            did_you_mean(extra[0], parser.option_names()),
        )
    import yaml

    with config_file.lines_named(given.config_lines):
        text = config_file.resolved(parser, given)
    console.text(text.rstrip())
    console.result({"command": args.name, "settings": yaml.safe_load(text)})
    return 0
