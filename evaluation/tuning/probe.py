"""A quick measurement of a model in training: teacher-forced, no answers, no bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from evaluation.metrics.summary import summarise
from evaluation.suite import EvalData, evaluate

if TYPE_CHECKING:
    import torch

    from evaluation.logs.records import EvalLog
    from unlearner.tokens.prompts import PromptFormat

# Every so many rows of the sets that are kept; the forget set is looked at whole.
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

    def to_json(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


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
        found = summarise(log, self.reference_log, resamples=0)
        parts = list(found["model_utility_parts"].values())
        return Look(
            forget_quality=found["forget_quality"],
            ks=found["ks"],
            log_r_shift=found["log_r_shift"],
            forget_nll=found["forget_nll"],
            nll_ratio=found["forget_nll"] / found["retrain_forget_nll"],
            retain_answer_prob=found["retain_answer_prob"],
            utility=float(hmean(parts)),
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
    kept = look.utility / origin.utility if origin.utility else 1.0
    lost = max(0.0, KEPT_UTILITY - kept)
    far = abs(math.log(max(look.nll_ratio, 1e-9))) - math.log(NLL_WITHIN)
    return look.ks + 5.0 * lost + max(0.0, far)


class Watch:
    """Measures the model after chosen steps and at the end."""

    def __init__(
        self, probe: Probe, shares: Sequence[float], tell: Callable[[int, int, Look], None]
    ) -> None:
        """Takes the probe, when to use it, and a callback.

        Args:
            probe: measures the model.
            shares: fractions of all steps after which it measures; 1 is the last step.
            tell: called with step, steps and look; may raise to end the training.
        """
        self._probe = probe
        self._shares = shares
        self._tell = tell

    def __call__(self, step: int, steps: int, model: torch.nn.Module) -> None:
        """Measures after one of the chosen steps."""
        chosen = {max(1, round(share * steps)) for share in self._shares}
        if step in chosen:
            self._tell(step, steps, self._probe.look(model))
