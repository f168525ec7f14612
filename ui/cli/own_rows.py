"""Which rows `evaluate` measures: a split of TOFU, or rows of one's own and what goes with them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.digests import normalised
from adapters.errors import UserError
from ui.cli import options
from ui.console import Console
from unlearner.request.formats import read_rows
from unlearner.request.rows import Row
from unlearner.request.sources import refuse_overlap, rows_named
from unlearner.request.tofu import load_split

if TYPE_CHECKING:
    from evaluation.suite import EvalData

OWN = "own-rows"
OF_OWN_ROWS = ("retain", "neighbours", "variants", "question_column", "answer_column")


def add_flags(parser: options.Parser) -> None:
    """--split or --rows, and for the latter --retain, --neighbours and --variants."""
    which = parser.add_mutually_exclusive_group(required=True)
    options.add_split(which)
    which.add_argument(
        "--rows",
        metavar="ROWS",
        help="the rows that were to be forgotten: a file or hub:OWNER/NAME",
    )
    group = parser.add_argument_group("with --rows")
    options.add_retain(group)
    options.add_columns(group)
    group.add_argument(
        "--neighbours",
        **options.COUNT,
        help="of the rows of --retain only the N nearest to the forget rows, by their words",
    )
    group.add_argument(
        "--variants",
        **options.FILE,
        help="JSONL with paraphrased_answer and perturbed_answer of these rows, by question",
    )


def name_of(args: argparse.Namespace) -> str:
    """What figures of these rows are filed under; the name of a file may tell whom it is about."""
    return str(args.split) if args.split else OWN


def eval_data(args: argparse.Namespace, console: Console) -> EvalData:
    """The rows to evaluate.

    With --rows real authors and world facts come along where --data names a folder that has them.

    Raises:
        UserError: rows that cannot be read, flags of --rows without it, neighbours without a pool.
    """
    from evaluation.suite import EvalData, load_eval_data

    if args.split:
        given = [name for name in OF_OWN_ROWS if getattr(args, name)]
        if given:
            flag = given[0].replace("_", "-")
            raise UserError(f"--{flag} belongs to --rows.", "TOFU's splits bring their own.")
        return load_eval_data(args.split, args.data)
    forget: Sequence[Row] = rows_named(args.rows, args.data, columns=options.columns(args))
    if args.variants:
        forget = with_variants(forget, read_rows_of_variants(args.variants))
    retain = kept_rows(args, forget, console)
    refuse_overlap(forget, retain, args.rows, str(args.retain))
    world: dict[str, Any] = {}
    if args.data is not None:
        for name in ("real_authors", "world_facts"):
            if any((args.data / f"{name}_perturbed{s}").is_file() for s in (".json", ".jsonl")):
                world[name] = load_split(f"{name}_perturbed", args.data)
    return EvalData(forget, retain, **world)


def kept_rows(args: argparse.Namespace, forget: Sequence[Row], console: Console) -> Sequence[Row]:
    """The rows of --retain, or the nearest of them."""
    if args.retain is None:
        if args.neighbours:
            raise UserError("--neighbours needs rows to choose from.", "Name them with --retain.")
        return []
    found = rows_named(
        args.retain, args.data, unique=False, columns=replace(options.columns(args), optional=True)
    )
    return mined(found, forget, args.neighbours, console)


def mined(
    pool: Sequence[Row], forget: Sequence[Row], count: int | None, console: Console
) -> Sequence[Row]:
    """The `count` rows of `pool` nearest to `forget`, said in words; None leaves the pool whole."""
    if count is None:
        return pool
    from unlearner.request.neighbours import nearest_rows

    found = nearest_rows(forget, pool, count)
    mean = sum(found.likeness) / len(found.likeness)
    console.words(
        f"Note: {len(found.rows)} neighbours of {len(pool)} rows, mean likeness {mean:.2f}; left "
        f"out as part of the request: {found.left_out}."
    )
    return found.rows


def read_rows_of_variants(path: Path) -> list[Row]:
    """Rows of a file of variants, which may leave out the answer.

    Raises:
        UserError: every line that is no row, at once.
    """
    return read_rows(path, unique=False, needs_answer=False)


def with_variants(rows: Sequence[Row], variants: Sequence[Row]) -> list[Row]:
    """The rows with the paraphrased and perturbed answers of the variant of the same question.

    Raises:
        UserError: variants of questions that are not among the rows.
    """
    by_question = {normalised(row.question): row for row in variants}
    own = {normalised(row.question) for row in rows}
    strangers = [row.question for row in variants if normalised(row.question) not in own]
    if strangers:
        raise UserError(
            f"{len(strangers)} variants belong to none of the rows, for example {strangers[0]!r}.",
            "A variant names the question of its row.",
        )
    made = []
    for row in rows:
        found = by_question.get(normalised(row.question), row)
        made.append(
            replace(
                row,
                paraphrased_answer=found.paraphrased_answer or row.paraphrased_answer,
                perturbed_answers=found.perturbed_answers or row.perturbed_answers,
                paraphrased_question=found.paraphrased_question or row.paraphrased_question,
            )
        )
    return made
