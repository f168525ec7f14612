"""The parser of the command line: problems with their fix, and which flags `--help` shows."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from adapters.errors import UserError

# What `--help` leaves to `--help-all`; at most 25 flags remain in every command.
RARE = frozenset(
    {
        "debug", "revision", "dtype", "device", "attention", "system", "question-column",
        "answer-column", "second-reference-log", "write-tofu", "write-open-unlearning",
        "write-lm-eval", "plain",
        # the objective
        "beta", "beta2", "gamma", "rmu-layer", "rmu-coefficient", "ceu-skip",
        "forget-weight", "general-weight", "protected-directions", "general-prompts",
        "excess-weight", "settle", "guard-weight", "alternates", "alternate-weight",
        "alternate-smoothing", "alternates-from", "attack-weight", "attack-gamma", "attack-steps",
        "attack-rate", "attack-rank",
        # adapter and training
        "lora-alpha", "lora-dropout", "target-modules", "gradient-accumulation-steps",
        "warmup-ratio", "lr-scheduler-type", "weight-decay", "max-grad-norm", "max-length",
        "gradient-checkpointing", "padded", "optim", "memory-limit",
        # the run
        "restart", "keep-teacher", "independent", "unseen", "stop-at", "stop-every", "stop-rows",
        "full", "any-size",
        # measuring
        "variants", "holdout", "reference", "retain-metrics", "lm-eval", "states", "relearn-share",
        "relearn-steps", "relearn-lr", "relearn-with", "samples", "temperature", "top-p",
        "sample-rows", "paraphrase-rows", "cap-gb", "retain-known",
    }
)  # fmt: skip
# In these commands some are needed often, and others only with a flag that is rare itself.
SHOWN_IN = {
    "ask": {"temperature"},
    "doctor": {"full"},
    "finetune": {"weight-decay"},
    "merge": {"dtype"},
    "preview": {"max-length", "system", "question-column", "answer-column"},
    "reproduce": {"full"},
}
RARE_IN = {"forget": {"reference-log"}, "tune": {"seed"}}
SHELLS = ("bash", "zsh")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing and leaving.

    Flags are never abbreviated: a script must not change its meaning when a flag is added.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        # Examples below the flags keep their lines; the text above them is wrapped here.
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if options.get("description"):
            options["description"] = textwrap.fill(options["description"], 88)
        super().__init__(**options)
        if self.add_help:
            self.add_argument("--help-all", action=_HelpAll, help="show every flag and exit")

    @property
    def words(self) -> list[str]:
        """The words of the command after `unlearner`, as in `adapters list`."""
        return self.prog.split()[1:]

    def format_help(self) -> str:
        """The help without the rare flags."""
        rare = {action: action.help for action in self._actions if self._is_rare(action)}
        if not rare:
            return self.format_help_all()
        for action in rare:
            action.help = argparse.SUPPRESS
        try:
            text = self.format_help_all()
        finally:
            for action, words in rare.items():
                action.help = words
        flags = "flag" if len(rare) == 1 else "flags"
        return f"{text}\n`{self.prog} --help-all` shows {len(rare)} more {flags}.\n"

    def format_help_all(self) -> str:
        """The help with every flag."""
        usage, self.usage = self.usage, self.usage or self._short_usage()
        try:
            return super().format_help()
        finally:
            self.usage = usage

    def _short_usage(self) -> str:
        """The command with what it needs; argparse would list every flag."""
        formatter = self._get_formatter()
        positional = [action for action in self._actions if not action.option_strings]
        needed = [action for action in self._actions if action.option_strings and action.required]
        words = [
            f"{action.option_strings[-1]} {formatter._format_args(action, action.dest.upper())}"
            for action in needed
        ]
        words += [
            f"({' | '.join(action.option_strings[-1] for action in group._group_actions)})"
            for group in self._mutually_exclusive_groups
            if group.required
        ]
        words += [formatter._format_args(action, action.dest.upper()) for action in positional]
        return " ".join([self.prog, *words, "[flags]"])

    def _is_rare(self, action: argparse.Action) -> bool:
        if action.help == argparse.SUPPRESS:
            return False
        command = " ".join(self.words)
        rare = RARE - SHOWN_IN.get(command, set()) | RARE_IN.get(command, set())
        return any(name.removeprefix("--") in rare for name in action.option_strings)

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's words and where to read more."""
        raise UserError(f"{message[:1].upper()}{message[1:]}.", f"See `{self.prog} --help`.")

    def option_names(self) -> list[str]:
        """Every long flag of this parser."""
        return [
            name
            for action in self._actions
            for name in action.option_strings
            if name.startswith("--")
        ]


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, 0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        assert isinstance(parser, Parser)
        print(parser.format_help_all(), end="")
        raise SystemExit(0)


class PrintCompletion(argparse.Action):
    """Prints the completion script of a shell, by shtab, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, *__: object) -> None:
        """Prints the script for `shell`."""
        import shtab

        _complete_paths(parser, shtab.FILE)
        print(shtab.complete(parser, shell))
        raise SystemExit(0)


def _complete_paths(parser: argparse.ArgumentParser, files: Any) -> None:
    """Complete names of files after every flag that takes a path, in all commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            action.help = None  # shtab leaves out what the help does not show
            for command in action.choices.values():
                _complete_paths(command, files)
        elif action.type is Path or action.dest in ("config", "request", "retain", "rows", "base"):
            vars(action)["complete"] = files
