"""`unlearner ui`: the app in the browser."""

from __future__ import annotations

import argparse
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from ui.app.session import Session
from ui.cli import config_file, options
from ui.cli.commands.everyday import forget
from ui.console import Console
from ui.preview import Preview, make_preview

HOST = "127.0.0.1"


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "ui",
        run_ui,
        "template loading store data",
        help="base and unlearned answers side by side, in the browser",
        description="Opens the app on this machine. The page is there at once; the base is loaded "
        "meanwhile. Nothing is shared, and no question is kept by the page.",
        epilog="examples:\n  unlearner ui --base B --store S --data TOFU\n"
        "  unlearner ui --logs origin.json unlearned.json",
    )
    options.add_base(parser, required=False)
    parser.add_argument(
        "--logs", **options.LOG, nargs="+", default=[], help="evaluation logs for the Runs tab"
    )
    options.add_reference_log(parser)
    for name, command in (("robustness", "robustness"), ("calibration", "calibrate")):
        parser.add_argument(
            f"--{name}",
            **options.FILE,
            nargs="+",
            default=[],
            help=f"results of `unlearner {command}` (default: {name}.json beside the logs)",
        )
    parser.add_argument("--host", default=HOST, help=f"address to listen on (default: {HOST})")
    parser.add_argument("--port", type=options.positive_int, help="port (default: a free one)")
    parser.add_argument(
        "--auth",
        **options.FILE,
        help="lines of name:password; needed for any --host but this machine",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def read_auth(path: Path | None) -> list[tuple[str, str]] | None:
    """Names and passwords of the file, None without one.

    Raises:
        UserError: no file, no line, a line without a colon, or a file that others can read.
    """
    if path is None:
        return None
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"Others can read the passwords in {path}.", f"Run chmod 600 {path}.")
    pairs = [line.partition(":") for line in lines]
    if not pairs or any(not (name and colon and word) for name, colon, word in pairs):
        raise UserError(f"{path} does not hold names and passwords.", "Write name:password lines.")
    return [(name.strip(), word) for name, _, word in pairs]


def jobs_folder() -> Path:
    """Where trainings that the app started are kept: private, outside every store."""
    given = os.environ.get("UNLEARNER_JOBS")
    return Path(given) if given else Path.home() / ".local" / "state" / "unlearner" / "jobs"


def planned(words: Sequence[str]) -> tuple[Preview, dict[str, Any], str]:
    """What a `forget` command trains on, its plan, and its settings as YAML; loads no weights."""
    parser = options.Parser(prog="unlearner")
    commands = parser.add_subparsers(dest="command", parser_class=options.Parser)
    forget.register(commands)
    leaf = commands.choices["forget"]
    args = parser.parse_args(config_file.apply_config(leaf, words))
    config, request = forget.forget_config(args), forget.read_request(args)
    fmt = options.prompts(args)
    preview = make_preview(request, fmt, config.train.max_length)
    return preview, forget.planned(args, config, request), config_file.resolved(leaf, args)


def run_ui(args: argparse.Namespace, console: Console) -> int:
    """Serves the page until Ctrl-C."""
    auth = read_auth(args.auth)
    if args.debug:
        logging.getLogger("unlearner.app").setLevel(logging.DEBUG)
    console.words("Opening the page ...")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="unlearner-") as scratch:
        # Uploads and downloads hold forget text: in a private folder that goes with the app.
        os.environ["GRADIO_TEMP_DIR"] = scratch
        try:
            return _serve(args, console, auth, Path(scratch))
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def _serve(
    args: argparse.Namespace, console: Console, auth: list[tuple[str, str]] | None, scratch: Path
) -> int:
    try:
        from ui.app.build import App, launch
        from ui.app.data.runs import Sources
        from ui.app.jobs import Jobs
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("The app needs gradio.", "pip install 'unlearner[ui]'") from error
    session = Session(
        options.store_path(args),
        options.base_spec(args) if args.base else None,
        args.data,
        args.template,
        args.system,
    )
    files = Sources(
        logs=tuple(args.logs),
        retain_log=args.reference_log,
        robustness=tuple(args.robustness),
        calibration=tuple(args.calibration),
    )
    app = App(session, Jobs(jobs_folder()), planned, files, scratch=scratch)
    app.sources().probes()  # a file that is none is refused before the page opens
    page, url = launch(app, host=args.host, port=args.port, auth=auth, open_browser=args.open)
    console.text(url)
    console.result({"url": url})
    console.words("Ctrl-C ends it; a training that was started goes on.")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
    return 0
