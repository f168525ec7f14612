"""Rows beside a request's: those that `evaluate` measures, other answers, and refusals."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapters.digests import normalised
from adapters.errors import UserError
from ui.cli import options
from ui.console import Console
from unlearner.config import UnlearnConfig, streams_of
from unlearner.request.formats import read_rows
from unlearner.request.neighbours import nearest_rows
from unlearner.request.rows import Row
from unlearner.request.sources import refuse_overlap, rows_named
from unlearner.request.tofu import load_refusals, load_split

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
        variants = read_rows(args.variants, unique=False, needs_answer=False)
        forget = with_variants(forget, variants)
    retain: Sequence[Row] = ()
    if args.retain is not None:
        columns = replace(options.columns(args), optional=True)
        pool = rows_named(args.retain, args.data, unique=False, columns=columns)
        retain = mined(pool, forget, args.neighbours, console)
    elif args.neighbours:
        raise UserError("--neighbours needs rows to choose from.", "Name them with --retain.")
    refuse_overlap(forget, retain, args.rows, str(args.retain))
    world: dict[str, Any] = {}
    if args.data is not None:
        for name in ("real_authors", "world_facts"):
            if any((args.data / f"{name}_perturbed{s}").is_file() for s in (".json", ".jsonl")):
                world[name] = load_split(f"{name}_perturbed", args.data)
    return EvalData(forget, retain, **world)


def mined(
    pool: Sequence[Row], forget: Sequence[Row], count: int | None, console: Console
) -> Sequence[Row]:
    """The `count` rows of `pool` nearest to `forget`, said in words; None leaves the pool whole."""
    if count is None:
        return pool
    found = nearest_rows(forget, pool, count)
    mean = sum(found.likeness) / len(found.likeness)
    console.words(
        f"Note: {len(found.rows)} neighbours of {len(pool)} rows, mean likeness {mean:.2f}; left "
        f"out as part of the request: {found.left_out}."
    )
    return found.rows


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
