"""What `score` and `evaluate` share: protocols, references, gates, and logs for other tools."""

from __future__ import annotations

import argparse
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from adapters.errors import GateFailed, UserError, did_you_mean
from evaluation.logs import read_log
from evaluation.logs.lm_eval import to_lm_eval
from evaluation.logs.records import RECORDED, EvalLog, write_json
from evaluation.logs.tofu import to_tofu
from evaluation.protocols import Protocol, protocol_named
from ui.cli import options
from ui.console import Console

if TYPE_CHECKING:
    from evaluation.suite import Effort

OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
_GATE = re.compile(
    r"\s*([A-Za-z0-9_]+)\s*(<=|>=|==|!=|<|>)\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*"
)
# Words in the reason why a figure is missing, and how to measure it.
_REMEDIES = {
    "retrain reference": "Give --reference-log the log of a model that never saw the forget rows",
    "--retain-metrics": "Give --retain-metrics the token metrics of such a model",
    "--reference)": "Give --reference another base",
    "holdout": "Add --metrics membership and --holdout rows that the base never saw",
    "perturbed answers": "Evaluate a TOFU split, or give --variants with paraphrased_answer and "
    "perturbed_answer",
    "decoded as": "Evaluate again under the --protocol of the gate, with answers",
    "not measured:": "Evaluate a TOFU split, which has all sets, with answers",
    " set": "Evaluate a TOFU split, which has all sets",
    "not measured": "Add what measures it: --metrics all in `evaluate`, the attack or the state in "
    "`robustness`",
    "": "Evaluate every row",
}
LOG_FILE, FIGURES_FILE, PARTS = "eval_log.json", "figures.json", "parts"


def add_flags(parser: options.Parser) -> None:
    """--reference-log, --protocol, --fail-if and --write-...: what is made of a log's rows."""
    options.add_reference_log(parser)
    options.add_second_reference_log(parser)
    options.add_protocol(parser, several=True)
    options.add_fail_if(parser, "model_utility<0.55")
    parser.add_argument(
        "--write-tofu",
        **options.FILE,
        help="write the rows as TOFU's eval_log_aggregated.json, for other tools",
    )
    parser.add_argument(
        "--write-open-unlearning",
        **options.FOLDER,
        help="write open-unlearning's TOFU_EVAL.json and TOFU_SUMMARY.json into this folder",
    )
    parser.add_argument(
        "--write-lm-eval",
        **options.FILE,
        help="write the figures in the layout of the lm-evaluation-harness's results",
    )


def effort_of(args: argparse.Namespace) -> Effort:
    """What the flags say of how the work is done; none of it changes a figure."""
    from evaluation.suite import Effort

    fast = not getattr(args, "plain", False)
    chosen = Effort(shared=fast, drafts=fast)
    size = args.questions_per_batch
    return replace(chosen, batch_size=size) if size else chosen


class Gate(NamedTuple):
    """The command fails if `figure sign limit` holds; `text` is what the user typed."""

    figure: str
    sign: str
    limit: float
    text: str


def parse_gate(text: str, figures: Sequence[str]) -> Gate:
    """The condition in `text`.

    Raises:
        UserError: not `name op number`, or a figure that is not measured (with the nearest one).
    """
    match = _GATE.fullmatch(text)
    if match is None:
        signs = " ".join(OPERATORS)
        raise UserError(
            f"--fail-if {text!r} is not a condition.",
            f'Write NAME OP NUMBER with OP one of {signs}, as in "model_utility<0.55".',
        )
    if match[1] not in figures:
        hint = did_you_mean(match[1], figures)
        raise UserError(f"--fail-if {text!r}: there is no figure '{match[1]}'.", hint)
    return Gate(match[1], match[2], float(match[3]), text)


def check_gates(gates: Sequence[Gate], figures: Mapping[str, Any]) -> None:
    """Returns where no condition holds.

    Raises:
        GateFailed: naming every condition that holds or whose figure could not be measured.
    """
    failed, fixes = [], list[str]()
    for gate in gates:
        value = figures.get(gate.figure)
        if value is None:
            reason = figures.get("reasons", {}).get(gate.figure, "not measured")
            failed.append(f"{gate.text!r} cannot be checked ({reason})")
            fixes.append(next(fix for words, fix in _REMEDIES.items() if words in reason))
        elif OPERATORS[gate.sign](value, gate.limit):
            failed.append(f"{gate.text!r} holds: {gate.figure} is {value:.6g}")
            fixes.append("Train longer, with other weights, or change the gate")
    if failed:
        raise GateFailed(
            f"The quality gate failed: {'; '.join(failed)}.",
            " ".join(f"{fix}." for fix in dict.fromkeys(fixes)),
        )


class References(NamedTuple):
    """Logs of one or two models that never saw the forget set."""

    first: EvalLog | None
    second: EvalLog | None


def read_references(args: argparse.Namespace) -> References:
    """The logs that --reference-log and --second-reference-log name.

    Raises:
        UserError: a log that cannot be read, or a second one without a first.
    """
    if args.second_reference_log and not args.reference_log:
        raise UserError(
            "--second-reference-log is measured against --reference-log, which is missing.",
            "Give both, or the one as --reference-log.",
        )
    paths = (args.reference_log, args.second_reference_log)
    return References(*(read_log(path) if path else None for path in paths))


def gates_of(args: argparse.Namespace, more: Sequence[str] = ()) -> list[Gate]:
    """The conditions of --fail-if and the protocols' names, read before anything is computed.

    `more` are figures that this command measures beside the summary's.
    """
    from evaluation.metrics.summary import BETTER

    return [parse_gate(text, [*BETTER, *more]) for text in args.fail_if]


def figures_of(
    args: argparse.Namespace, log: EvalLog, references: References
) -> list[dict[str, Any]]:
    """The summaries of a log under the protocols of --protocol, in their order."""
    from evaluation.metrics.summary import summarise

    first, second = references.first, references.second
    return [summarise(log, first, protocol=p, second_retain_log=second) for p in args.protocol]


def with_protocols(
    named: Mapping[str, Any], summaries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The result of a command: the first protocol's figures, and all of them under `protocols`."""
    rest = {"protocols": list(summaries)} if len(summaries) > 1 else {}
    return {**named, **summaries[0], **rest}


def write_for_others(
    args: argparse.Namespace, log: EvalLog, references: References, console: Console
) -> None:
    """Writes the public formats that the flags ask for, each with its own protocol's answers.

    open-unlearning's files hold that protocol's figures where the log has its answers, and TOFU's
    log the answers of the first protocol of TOFU's own kind; else the first protocol is written.

    Raises:
        UserError: a row lacks a score that the format demands.
    """
    from evaluation.metrics.summary import write_open_unlearning

    protocols = [protocol_named(name) for name in args.protocol]
    if args.write_tofu:
        own = [p for p in protocols if p.name != "open-unlearning" and _is_answered(log, p)]
        first = (own or protocols)[0]
        names = [n for n in (first.decoding.name, RECORDED) if _has_answers(log, n)]
        path = write_json(args.write_tofu, to_tofu(log, names[0] if names else None))
        console.words(f"Wrote {path}")
    if args.write_open_unlearning:
        theirs = protocol_named("open-unlearning")
        chosen = theirs if _is_answered(log, theirs) else protocols[0]
        folder = args.write_open_unlearning
        for path in write_open_unlearning(log, folder, references.first, chosen.name):
            console.words(f"Wrote {path} (protocol {chosen.name})")
    if args.write_lm_eval:
        name = str(args.log if hasattr(args, "log") else args.base)
        split = str(log.meta.get("split", "forget"))
        results = to_lm_eval(figures_of(args, log, references), split, name)
        console.words(f"Wrote {write_json(args.write_lm_eval, results)}")


def _has_answers(log: EvalLog, decoding: str) -> bool:
    return all(decoding in row.generations for found in log.sets.values() for row in found.rows)


def _is_answered(log: EvalLog, protocol: Protocol) -> bool:
    """Whether figures under `protocol` can be had from the log's scores and answers."""
    cut, longest = log.meta.get("max_length"), log.meta.get("longest_text")
    if cut is not None and longest is not None and longest > min(cut, protocol.max_length):
        return bool(cut == protocol.max_length)
    return _has_answers(log, protocol.decoding.name) or _has_answers(log, RECORDED)
