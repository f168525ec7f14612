"""`--fail-if "model_utility<0.55"`: a condition on a measured figure that fails the command."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adapters.errors import GateFailed, UserError

OPERATORS = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
_GATE = re.compile(
    r"\s*([A-Za-z0-9_]+)\s*(<=|>=|==|!=|<|>)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*"
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
    from adapters.errors import did_you_mean

    match = _GATE.fullmatch(text)
    try:
        limit = float(match[3]) if match else None
    except ValueError:
        limit = None
    if match is None or limit is None:
        signs = " ".join(OPERATORS)
        raise UserError(
            f"--fail-if {text!r} is not a condition.",
            f'Write NAME OP NUMBER with OP one of {signs}, as in "model_utility<0.55".',
        )
    if match[1] not in figures:
        hint = did_you_mean(match[1], figures)
        raise UserError(f"--fail-if {text!r}: there is no figure '{match[1]}'.", hint)
    return Gate(match[1], match[2], limit, text)


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
