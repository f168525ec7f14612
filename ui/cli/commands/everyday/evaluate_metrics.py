"""The further metrics of `unlearner evaluate`: --metrics (token metrics) and --lm-eval."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.base.load import load_base, load_tokenizer
from adapters.environment import threads_for
from adapters.errors import UserError
from evaluation.inference.lm_harness import load_tasks, run_tasks
from evaluation.logs.token_records import TokenRecords, read_records, write_records
from evaluation.protocols import Protocol
from ui.cli import options
from ui.cli.output.events import Progress, progress_of
from ui.cli.output.scoring import PARTS
from ui.console import Console
from unlearner import distributed as ranks
from unlearner.request.formats import read_rows
from unlearner.request.rows import Row
from unlearner.request.tofu import HOLDOUT_SPLITS, load_split
from unlearner.tokens.prompts import PromptFormat, prompt_format

if TYPE_CHECKING:
    from evaluation.inference.token_suite import TokenPlan
    from evaluation.suite import EvalData

TOKEN_FILE = "token_metrics.json"
# The keys of evaluation.metrics.privacy.GROUPS, which cannot be imported at start.
METRICS = ("extraction", "membership", "kl")


def add_metric_flags(parser: options.Parser) -> None:
    """--metrics and what it needs, and --lm-eval."""
    group = parser.add_argument_group("more metrics")
    group.add_argument(
        "--metrics",
        type=parse_metrics,
        default=(),
        metavar="LIST",
        help=f"also measure {', '.join(METRICS)}, separated by commas, or all",
    )
    group.add_argument(
        "--holdout",
        metavar="FILE|SPLIT",
        help="rows no model was trained on, for membership: a JSONL file or TOFU's holdout01, "
        "holdout05, holdout10 (default: the one of the forget split)",
    )
    group.add_argument(
        "--reference", metavar="B", help="another base, for membership's Reference attack"
    )
    group.add_argument(
        "--retain-metrics",
        **options.FILE,
        help=f"{TOKEN_FILE} of a model that never saw the forget set: privleak needs it",
    )
    group.add_argument(
        "--lm-eval",
        type=options.name_list,
        default=[],
        metavar="TASKS",
        help="tasks of the lm-evaluation-harness, or YAML files of your own, separated by commas "
        "(needs unlearner[lm-eval])",
    )


def parse_metrics(text: str) -> tuple[str, ...]:
    """The metrics in `text`, in a fixed order, each once."""
    names = options.name_list(text)
    unknown = [name for name in names if name not in (*METRICS, "all")]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(METRICS)}, or all")
    return METRICS if "all" in names else tuple(name for name in METRICS if name in names)


def metric_figures(args: argparse.Namespace) -> list[str]:
    """Names that --fail-if may use because --metrics measures them."""
    if not args.metrics:
        return []
    from evaluation.metrics.privacy import GROUPS

    return [key for name in args.metrics for key in GROUPS[name]]


@dataclass
class Extras:
    """Further metrics: what to measure and, once measured, the results."""

    args: argparse.Namespace
    live: bool = False
    plan: TokenPlan | None = None
    retain: TokenRecords | None = None
    tasks: Any = None
    records: TokenRecords | None = None
    lm_eval: list[dict[str, Any]] = field(default_factory=list)

    def measure(
        self,
        model: Any,
        fmt: PromptFormat,
        key: str,
        meta: Mapping[str, Any],
        on_progress: Progress,
    ) -> None:
        """Measures all of it on the loaded model; with --out finished sets are cached."""
        out = self.args.out
        if self.plan is not None:
            from evaluation.inference.token_suite import measure_tokens

            named = self.args.reference
            reference = {"reference": named} if named else {}
            self.records = measure_tokens(
                model,
                fmt,
                self.plan,
                key=key,
                resume_dir=out / PARTS if out else None,
                on_progress=on_progress,
                meta={**meta, "holdout": _holdout_name(self.args), **reference},
            )
            if out and ranks.rank() == 0:
                write_records(self.records, out / TOKEN_FILE)
        if self.tasks is not None:
            named, limit = self.args.lm_eval, self.args.limit
            # The harness draws its own progress bars: only on a terminal, where they may move.
            quiet = contextlib.redirect_stderr(io.StringIO())
            with threads_for(model), contextlib.nullcontext() if self.live else quiet:
                self.lm_eval = ranks.from_first(
                    lambda: run_tasks(model, fmt.tokenizer, named, self.tasks, limit=limit)
                )

    def join(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """The evaluation's figures with what was measured beside them."""
        found = dict(figures)
        if self.records is not None:
            from evaluation.metrics.privacy import summarise_tokens, with_token_figures

            found = with_token_figures(found, summarise_tokens(self.records, self.retain))
        if self.tasks is not None:
            found["lm_eval"] = self.lm_eval
        return found

    def report(self, figures: Mapping[str, Any], console: Console) -> None:
        """Prints the figures that `join` added, as tables; nothing with --json."""
        if self.records is not None and self.args.out:
            console.words(f"Wrote {self.args.out / TOKEN_FILE}")
        names = metric_figures(self.args)
        rows = [_line(name, figures) for name in names if figures.get(name) is not None]
        if rows:
            console.text()
            console.table(rows)
        if self.lm_eval:
            console.text()
            console.table(self.lm_eval)


def _line(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    low, high = figures.get(f"{name}_interval") or (None, None)
    better = figures["better"][name]
    line = {"figure": name, "value": figures[name], "low": low, "high": high, "better": better}
    return {**line, "retrain": figures.get(f"retrain_{name}")}


def plan_extras(
    args: argparse.Namespace, data: EvalData, protocol: Protocol, console: Console
) -> Extras:
    """The further metrics of the flags, checked before the base is loaded.

    The base of --reference is loaded, measured and released here, so that two bases are never in
    memory at once.

    Raises:
        UserError: a flag without the metric it is for, rows or files that cannot be had, a task
            the harness does not know.
    """
    for flag in ("holdout", "reference", "retain_metrics"):
        if getattr(args, flag) is not None and "membership" not in args.metrics:
            raise UserError(
                f"--{flag.replace('_', '-')} is for membership inference, which is not measured.",
                "Add --metrics membership.",
            )
    extras = Extras(args, console.live)
    if args.lm_eval:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        console.words("Loading the tasks of lm-eval ...")
        extras.tasks = load_tasks(args.lm_eval)
    if not args.metrics:
        return extras
    from evaluation.inference.token_suite import TokenData, TokenPlan, check_holdout
    from evaluation.metrics.privacy import match_retrained

    attacked = "membership" in args.metrics
    holdout = _holdout_rows(args) if attacked else ()
    rows = TokenData(tuple(data.forget), tuple(data.retain), tuple(holdout))
    if attacked:
        check_holdout(rows)
    plan = TokenPlan(args.metrics, rows, protocol.max_rows, protocol.max_length, limit=args.limit)
    if args.retain_metrics is not None:
        extras.retain = read_records(args.retain_metrics)
        questions = {name: [row.question for row in rows] for name, rows in plan.sets.items()}
        match_retrained(questions, vars(plan), extras.retain)
    if args.reference is not None:
        plan = replace(plan, reference=_reference_losses(args, plan, console))
    extras.plan = plan
    return extras


def _holdout_name(args: argparse.Namespace) -> str | None:
    """The name of the holdout rows, by default those of the forget split."""
    if "membership" not in args.metrics:
        return None
    name: str | None = args.holdout or HOLDOUT_SPLITS.get(args.split or "")
    return name


def _holdout_rows(args: argparse.Namespace) -> Sequence[Row]:
    name = _holdout_name(args)
    if name is None:
        raise UserError(
            "Membership inference needs rows that no model was trained on.",
            "Give a JSONL file of such rows with --holdout.",
        )
    if name not in HOLDOUT_SPLITS.values():
        return read_rows(Path(name))
    try:
        return load_split(name, args.data)
    except UserError as error:
        raise UserError(
            error.problem,
            f"{error.fix} Or name rows that no model was trained on with --holdout FILE.",
        ) from error


def _reference_losses(
    args: argparse.Namespace, plan: TokenPlan, console: Console
) -> dict[str, list[float]]:
    from evaluation.inference.token_suite import reference_losses

    console.words(f"Measuring the reference base {args.reference} ...")
    measured = options.prompts(args)
    fmt = prompt_format(load_tokenizer(args.reference), args.template, args.system)
    spec = replace(options.base_spec(args), name=args.reference, revision=None)
    model: Any = load_base(spec)
    with threads_for(model):
        return reference_losses(model, fmt, measured, plan, on_progress=progress_of(console))
