"""The command `unlearner`: arguments in, exit code out. Parsing needs no model library."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from adapters.errors import GateFailed, Interrupted, UserError, did_you_mean
from ui.cli.commands import config
from ui.cli.commands.adapters import calibrate, consolidate, merge, store
from ui.cli.commands.everyday import (
    ask,
    doctor_preview,
    evaluate,
    forget,
    quickstart,
    report,
    robustness,
    score,
    ui,
)
from ui.cli.commands.experiments import bench, finetune, reproduce, sequence, tune
from ui.cli.config_file import apply_config, keep_beside, lines_named
from ui.cli.parser import SHELLS, Parser, PrintCompletion
from ui.console import Console
from unlearner import distributed as ranks

DESCRIPTION = (
    "Unlearns selected training data from a language model with small LoRA adapters on a frozen "
    "base. Adapters are kept in a store, evaluated against a model that never saw the data, and "
    "reverted by deactivating them."
)
EXAMPLES = """\
first steps:
  unlearner quickstart                                  a complete run on this machine, no download
  unlearner doctor                                      what this machine can run
  unlearner forget tofu:forget05 --base B --dry-run     what a request would cost
exit codes: 0 ok, 1 failure, 2 bad usage or input, 3 does not fit (memory, or adapters of another
base), 4 quality gate failed, 130 interrupted
`unlearner COMMAND --help` shows the flags of a command."""
# The sections of `unlearner --help`: each command with its module, in the order of the list.
SECTIONS = {
    "everyday": {
        "quickstart": quickstart,
        "doctor": doctor_preview,
        "preview": doctor_preview,
        "forget": forget,
        "ask": ask,
        "evaluate": evaluate,
        "score": score,
        "robustness": robustness,
        "report": report,
        "ui": ui,
        "config": config,
    },
    "adapters": {
        "adapters": store,
        "calibrate": calibrate,
        "consolidate": consolidate,
        "merge": merge,
    },
    "experiments": {
        "finetune": finetune,
        "reproduce": reproduce,
        "sequence": sequence,
        "tune": tune,
        "bench": bench,
        "gpu-check": bench,
    },
}
FAILURE, INTERRUPTED = 1, 130


def build_parser(command: str | None = None) -> tuple[Parser, dict[str, Parser]]:
    """The parser, and the parser of each command by its words (`adapters list`).

    With the first word of a command it knows no other: all take a tenth of a second. `config` is
    about all of them.
    """
    one = {name: modules[name] for modules in SECTIONS.values() for name in modules}.get(
        command or ""
    )
    parser = Parser(
        prog="unlearner",
        usage="unlearner COMMAND ...",
        description=DESCRIPTION,
    )
    parser.add_argument("--version", action="version", version=version())
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print the completion script of a shell, for its start-up file",
    )
    commands: Any = parser.add_subparsers(
        dest="command",
        metavar="COMMAND",
        help=argparse.SUPPRESS,
        prog="unlearner",
        parser_class=Parser,
    )
    sections = []
    for title, modules in SECTIONS.items():
        start = len(commands._choices_actions)
        for module in dict.fromkeys(modules.values()):
            if one in (None, config, module):
                module.register(commands)
        entries = [(entry.dest, entry.help) for entry in commands._choices_actions[start:]]
        lines = [f"  {name:<12} {text}" for name, text in entries]
        sections.append("\n".join([f"{title}:", *lines]))
    parser.epilog = "\n\n".join([*sections, EXAMPLES])
    return parser, _leaves("", commands)


def _leaves(prefix: str, commands: Any) -> dict[str, Parser]:
    leaves: dict[str, Parser] = {}
    for name, parser in commands.choices.items():
        words = f"{prefix} {name}".strip()
        nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        leaves |= _leaves(words, nested[0]) if nested else {words: parser}
    return leaves


def version() -> str:
    """`unlearner 0.1.0`, of the installed distribution."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return f"unlearner {installed('unlearner')}"
    except PackageNotFoundError:
        return "unlearner (not installed)"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with `run` the command's function.

    Raises:
        UserError: unknown command or flag (with the nearest known one), missing or bad value.
        SystemExit: after --help, --version and without any argument, which prints the help.
    """
    parser, leaves = build_parser(argv[0] if argv else None)
    if not argv:
        parser.print_help()
        raise SystemExit(0)
    _check_command(argv, leaves)
    two = " ".join(argv[:2])
    words = two if two in leaves else argv[0]
    leaf = leaves.get(words)
    given = argv if leaf is None else apply_config(leaf, argv)
    args, extra = parser.parse_known_args(given)
    if extra:
        flags = [word.split("=")[0] for word in extra if word.startswith("-")]
        if flags:
            hint = did_you_mean(flags[0], leaves[words].option_names())
            raise UserError(f"`unlearner {words}` has no option {flags[0]}.", hint)
        raise UserError(
            f"`unlearner {words}` takes no further argument {extra[0]!r}.",
            f"See `unlearner {words} --help`.",
        )
    args.words, args.parser, args.leaves = list(argv), leaf, leaves
    return args


def _check_command(argv: Sequence[str], leaves: dict[str, Parser]) -> None:
    """Refuses an unknown command with the nearest one; argparse would list all of them."""
    if argv[0].startswith("-"):
        known = ("-h", "--help", "--help-all", "--version", "--print-completion")
        if any(word.split("=")[0] in known for word in argv):
            return
        raise UserError("No command was given.", "See `unlearner --help`.")
    first = sorted({words.split()[0] for words in leaves})
    if argv[0] not in first:
        raise UserError(f"There is no command '{argv[0]}'.", did_you_mean(argv[0], first))
    second = [words.split()[1] for words in leaves if words.startswith(f"{argv[0]} ")]
    if not second or {"-h", "--help", "--help-all"} & set(argv[1:2]):
        return
    if len(argv) < 2 or argv[1].startswith("-"):
        raise UserError(
            f"`unlearner {argv[0]}` needs a command.", f"Choose one of {', '.join(second)}."
        )
    if argv[1] not in second:
        outside = any(argv[1] in modules for modules in SECTIONS.values())
        hint = f"It is `unlearner {argv[1]}`." if outside else did_you_mean(argv[1], second)
        raise UserError(f"`unlearner {argv[0]}` has no command '{argv[1]}'.", hint)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    console = _console("--json" in words)
    debug = "--debug" in words
    try:
        args = parse(words)
        quiet_libraries(console)
        # Only the console writes data: what a library prints is words, and goes to stderr.
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            if not debug:
                warnings.simplefilter("ignore")
                os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for processes it starts
            code = run_command(args, console)
            ranks.wait()  # a process that exits early closes its connections
            return code
    except SystemExit as stop:  # after --help and --version
        return stop.code if isinstance(stop.code, int) else FAILURE
    except BrokenPipeError:  # the reader left
        # The interpreter flushes stdout once more at exit: give it somewhere to go.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except KeyboardInterrupt:
        return _interrupted(console, debug)
    except UserError as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, Interrupted):  # not a mistake
            console.words(f"{error.problem}\n{error.fix}".strip())
        else:
            console.error(error.problem, error.fix)
        return error.exit_code
    except Exception as error:
        if _comes_of_an_interrupt(error):
            return _interrupted(console, debug)
        if debug:
            traceback.print_exc()
        console.error(*unexpected(error))
        return FAILURE
    finally:
        ranks.leave()


def _interrupted(console: Console, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    console.words("Interrupted. What was finished is kept: run the same command again to go on.")
    return INTERRUPTED


def _comes_of_an_interrupt(error: BaseException | None) -> bool:
    """Whether a Ctrl-C is behind the error: Python wraps one that meets it in a class body."""
    seen: set[int] = set()  # causes may form a circle
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def run_command(args: argparse.Namespace, console: Console) -> int:
    """Runs the parsed command; its settings are kept beside what it wrote."""
    try:
        with lines_named(getattr(args, "config_lines", None)):
            code: int = args.run(args, console)
    except GateFailed:  # raised once everything is written
        keep_beside(args)
        raise
    if code == 0:
        keep_beside(args)
    return code


def _console(as_json: bool) -> Console:
    """The console; of several processes of one job only the first prints."""
    if ranks.rank() == 0:
        return Console(as_json=as_json)
    nothing = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    return Console(as_json=as_json, stdout=nothing, stderr=nothing)


def unexpected(error: Exception) -> tuple[str, str]:
    """Problem and fix of an unexpected error."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (
            "Out of memory.",
            "Use a smaller --per-device-train-batch-size or --max-length, "
            "--gradient-checkpointing or --load-in-4bit.",
        )
    text = str(error).strip() or "no message"
    if isinstance(error, OSError) and error.strerror:
        place = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{place}.", "Check the path, its permissions and the free space."
    return (
        f"{type(error).__name__}: {text}",
        "Run the same command with --debug, and report the traceback with `unlearner doctor`.",
    )


def quiet_libraries(console: Console) -> None:
    """Libraries log errors only, and show progress bars only on a terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not console.live:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main())
