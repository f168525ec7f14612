"""Every unlearning objective: its loss, the rows it reads, its published constants, its formula.

This module imports no torch, so that a command line or a configuration can be checked against it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unlearner.config import ObjectiveConfig
    from unlearner.objectives.sequence import Forwards, Terms


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        name: what `--objective` calls it.
        loss: the function of `unlearner.objectives.sequence` that computes its two terms.
        streams: the rows it reads: "forget", "retain", "refusal".
        formula: what it minimises, for model cards and reports.
        defaults: its published constants, where they differ from `ObjectiveConfig`'s.
        reference_streams: the streams whose summed NLL under the reference it needs. The reference
            never changes, so these are computed once, before training.
        reference_forward: whether it compares with the reference token by token, which takes a
            forward of the reference in every step.
    """

    name: str
    loss: str
    streams: tuple[str, ...]
    formula: str
    defaults: Mapping[str, float] = field(default_factory=dict)
    reference_streams: tuple[str, ...] = ()
    reference_forward: bool = False

    def terms(self, step: Forwards, config: ObjectiveConfig) -> Terms:
        """The forget and the retain term of every pair of a micro-batch, unweighted."""
        result: Terms = pkgutil.resolve_name(f"unlearner.objectives.sequence:{self.loss}")(
            step, config
        )
        return result


_PAIRS = "w_f {} + w_r {}, means over the pairs of a step"
_RETAIN = "nll_r/|y_r|"
_BOTH = ("forget", "retain")

# `simnpo` is the card of OPTML-Group/SimNPO-TOFU-forget05-Llama-2-7b-chat; `simnpo-readme` is what
# the released README and yaml run, with lambda on the forget term, known to under-forget. `undial`
# and `ceu` have no retain term as published; `satimp` has the weights of its class and README (its
# yaml in locuslab/open-unlearning has them the other way round); `rmu` has layer 7 of 32, c = 20
# and the retain weight 100 of the released script of arXiv 2403.03218: these belong to a model and
# must be tuned (published: c from 2 to 300, retain weights from 1 to 1,200).
OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            "simnpo",
            "simnpo_terms",
            _BOTH,
            _PAIRS.format("(-2/beta) log sigmoid(beta nll_f/|y_f| - gamma)", _RETAIN),
        ),
        Objective(
            "simnpo-readme",
            "simnpo_terms",
            _BOTH,
            _PAIRS.format("(-2/beta) log sigmoid(beta nll_f/|y_f| - gamma)", _RETAIN),
            {"forget_weight": 0.1375, "retain_weight": 1.0},
        ),
        Objective(
            "npo",
            "npo_terms",
            _BOTH,
            _PAIRS.format("(-2/beta) log sigmoid(beta (nll_f - nll_f,reference))", _RETAIN),
            {"beta": 0.1, "retain_weight": 1.0},
            reference_streams=("forget",),
        ),
        Objective(
            "grad_ascent",
            "grad_ascent_terms",
            ("forget",),
            "w_f (-nll_f/|y_f|), mean over the forget rows of a step",
            {"retain_weight": 0.0},
        ),
        Objective(
            "grad_diff",
            "grad_diff_terms",
            _BOTH,
            _PAIRS.format("(-nll_f/|y_f|)", _RETAIN),
            {"retain_weight": 1.0},
        ),
        Objective(
            "kl",
            "grad_diff_terms",  # it differs from grad_diff in its retain term
            _BOTH,
            _PAIRS.format("(-nll_f/|y_f|)", "KL(reference || model) on the retain answer"),
            {"retain_weight": 1.0},
            reference_forward=True,
        ),
        Objective(
            "idk",
            "idk_terms",
            ("refusal", "retain"),
            _PAIRS.format("nll of a refusal/|y|", _RETAIN),
            {"retain_weight": 1.0},
        ),
        Objective(
            "dpo",
            "dpo_terms",
            ("forget", "refusal", "retain"),
            _PAIRS.format(
                "(-2/beta) log sigmoid(beta ((nll_refusal,reference - nll_refusal) - "
                "(nll_f,reference - nll_f)))",
                _RETAIN,
            ),
            {"beta": 0.1, "retain_weight": 1.0},
            reference_streams=("forget", "refusal"),
        ),
        Objective(
            "rmu",
            "rmu_terms",
            _BOTH,
            _PAIRS.format(
                "mean over answer positions and width of (h_f - c u)^2",
                "that of (h_r - h_r,reference)^2, h the output of block rmu_layer, "
                "c = rmu_coefficient, u uniform in [0, 1) scaled to length 1",
            ),
            {"retain_weight": 100.0},
            reference_forward=True,
        ),
        Objective(
            "undial",
            "undial_terms",
            _BOTH,
            _PAIRS.format(
                "cross-entropy to softmax(reference logits - beta on the true token), "
                "mean over y_f",
                _RETAIN,
            ),
            {"beta": 10.0, "retain_weight": 0.0},
            reference_forward=True,
        ),
        Objective(
            "wga",
            "wga_terms",
            _BOTH,
            _PAIRS.format("(-mean over y_f of p^beta nll, p^beta held fixed)", _RETAIN),
            {"beta": 1.0, "retain_weight": 1.0},
        ),
        Objective(
            "satimp",
            "satimp_terms",
            _BOTH,
            _PAIRS.format(
                "(-mean over y_f of p^beta (1-p)^beta2 nll, both factors held fixed)", _RETAIN
            ),
            {"beta": 5.0, "retain_weight": 0.1},
        ),
        Objective(
            "ceu",
            "ceu_terms",
            _BOTH,
            _PAIRS.format(
                "cross-entropy to the model's own distribution (held fixed) without the true "
                "token, mean over y_f without its first ceu_skip tokens",
                _RETAIN,
            ),
            {"retain_weight": 0.0},
        ),
        Objective(
            "ihl",
            "ihl_terms",
            _BOTH,
            _PAIRS.format("mean over y_f of 1 + p - (the largest p of another token)", _RETAIN),
            {"retain_weight": 1.0},
        ),
    )
}

# What these settings add to any objective.
OPTION_FORMULAS: dict[str, str] = {
    "alternates": "+ w_a nll_a/|y_a|, y_a one of the answers of the nearest retain questions, put "
    "to the forget question, each target of it (1 - alternate_smoothing) of the token and "
    "alternate_smoothing of the uniform distribution",
    "attack_weight": "+ w_x of the forget value with margin attack_gamma on the model under a "
    "simulated relearning attack, restarted every attack_steps",
    "general_weight": "+ w_g KL(base || model) on the base's own answers to neutral prompts",
    "protected_directions": "A of every layer orthogonal to so many principal directions of its "
    "inputs on neutral prompts and retain rows",
    "target": "+ w_e max(0, nll_f/|y_f| - target)^2, until the mean of nll_f/|y_f| is the target",
}


def protected_of(width: int, count: int) -> int:
    """How many of a layer's `width` inputs are protected: half at most, so that it can adapt."""
    return min(count, max(1, width // 2))
