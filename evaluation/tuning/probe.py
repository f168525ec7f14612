"""A quick measurement of a model in training: teacher-forced, no answers, no bootstrap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from evaluation.logs.records import EvalLog
from evaluation.metrics.summary import summarise
from evaluation.suite import EvalData, evaluate
from unlearner.tokens.prompts import PromptFormat

# One in so many rows of the retained sets is measured, and all of the forget set.
RETAIN_STRIDE, FACTS_STRIDE = 3, 2


class NotFinite(ArithmeticError):
    """The model's losses are NaN or infinite: the training has broken it."""


@dataclass(frozen=True)
class Look:
    """The figures of one measurement.

    Attributes:
        forget_quality: p of the KS test of log R against Retrain, all rows of the forget set.
        ks: its distance D.
        log_r_shift: median of log R minus Retrain's.
        forget_nll: mean over the forget rows, nats per token.
        nll_ratio: forget NLL over Retrain's; 1 is the aim.
        retain_answer_prob: mean over a third of the retain rows.
        utility: harmonic mean of the six parts of model utility that need no answers, on some of
            the rows: comparable with other looks only, not with model utility.
    """

    forget_quality: float
    ks: float
    log_r_shift: float
    forget_nll: float
    nll_ratio: float
    retain_answer_prob: float
    utility: float


@dataclass(frozen=True)
class Probe:
    """Measures a model against one recorded Retrain.

    Attributes:
        fmt: prompts and tokenizer.
        data: all forget rows and some of the others; see `thinned`.
        reference_log: of the retrained model, with its forget set.
    """

    fmt: PromptFormat
    data: EvalData
    reference_log: EvalLog

    def look(self, model: Any) -> Look:
        """The figures of the model; its mode (training or evaluation) is kept.

        Raises:
            NotFinite: the model's losses are NaN or infinite.
            UserError: the reference holds other forget rows.
        """
        from scipy.stats import hmean

        log = evaluate(model, self.fmt, self.data, retain_log=self.reference_log, generate=False)
        scores = [row.answer_score for each in log.sets.values() for row in each.rows]
        if not all(score is None or math.isfinite(score.mean_nll) for score in scores):
            raise NotFinite("the loss of an answer is NaN or infinite")
        figures = summarise(log, self.reference_log, resamples=0)
        names = ("forget_quality", "ks", "log_r_shift", "forget_nll", "retain_answer_prob")
        return Look(
            **{name: figures[name] for name in names},
            nll_ratio=figures["forget_nll"] / figures["retrain_forget_nll"],
            utility=float(hmean(list(figures["model_utility_parts"].values()))),
        )


def thinned(data: EvalData) -> EvalData:
    """All forget rows, every third retain row and every second fact."""
    return EvalData(
        forget=data.forget,
        retain=data.retain[:300:RETAIN_STRIDE],
        real_authors=data.real_authors[::FACTS_STRIDE],
        world_facts=data.world_facts[::FACTS_STRIDE],
    )


KEPT_UTILITY = 0.97
NLL_WITHIN = 1.1
FORMULA = (
    f"D + 5 max(0, {KEPT_UTILITY} - utility / Origin's) "
    f"+ max(0, |ln(forget NLL / Retrain's)| - ln {NLL_WITHIN})"
)


def loss_of(look: Look, origin: Look) -> float:
    """`FORMULA` of a look: 0 is a forget set like Retrain's with all else kept, lower is better.

    It uses D, not p, which is flat at 0 where nothing is forgotten yet.
    """
    # An Origin without any utility has none to lose.
    share = look.utility / origin.utility if origin.utility else 1.0
    lost = max(0.0, KEPT_UTILITY - share)
    far = abs(math.log(max(look.nll_ratio, 1e-9))) - math.log(NLL_WITHIN)
    return look.ks + 5.0 * lost + max(0.0, far)
