"""The answers that a training needs beside those of its rows: alternates and refusals."""

from __future__ import annotations

import argparse

from adapters.errors import UserError
from ui.cli import options
from unlearner.config import UnlearnConfig, streams_of
from unlearner.request.rows import Row
from unlearner.request.sources import rows_named
from unlearner.request.tofu import load_refusals


def add_alternates_from(parser: options.Parser) -> None:
    """Adds the flag."""
    parser.add_argument(
        "--alternates-from",
        metavar="ROWS",
        help="rows whose answers --alternates takes: a file, hub:OWNER/NAME or a TOFU split "
        "(default: the retain rows); better of people whom the base does not know",
    )


def other_rows(args: argparse.Namespace) -> tuple[Row, ...]:
    """The rows of --alternates-from.

    Raises:
        UserError: it was given without --alternates.
    """
    if args.alternates_from is None:
        return ()
    if not args.alternates:
        raise UserError("--alternates-from says nothing alone.", "Add --alternates, such as 20.")
    return tuple(rows_named(args.alternates_from, args.data, columns=options.columns(args)))


def refusals(args: argparse.Namespace, config: UnlearnConfig) -> tuple[str, ...]:
    """Answers that refuse, where the objective trains on them."""
    return tuple(load_refusals(args.data)) if "refusal" in streams_of(config.objective) else ()
