"""A cheap look at a model while it unlearns: teacher-forced figures, no answers, no bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from evaluation.metrics.summary import summarise
from evaluation.suite import EvalData, evaluate

if TYPE_CHECKING:
    from evaluation.logs.records import EvalLog
    from unlearner.tokens.prompts import PromptFormat

# Every so many rows of the sets that are kept; the forget set is looked at whole.
RETAIN_STRIDE, FACTS_STRIDE = 3, 2


@dataclass(frozen=True)
class Look:
    """What one look found.

    Attributes:
        forget_quality: p of the KS test of log R against Retrain, all rows of the forget set.
        ks: its distance D.
        log_r_shift: median of log R minus Retrain's.
        forget_nll: mean over the forget rows, nats a token.
        nll_ratio: that of Retrain's; 1 is the aim.
        retain_answer_prob: mean over a third of the retain rows.
        utility: harmonic mean of the six parts of model utility that need no answers, on a part of
            the rows: comparable with other looks alone, not with model utility.
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
    """Looks at a model as it stands, against one recorded Retrain.

    Attributes:
        fmt: prompts and tokenizer.
        data: all of the forget rows, a part of the others; see `thinned`.
        retain_log: of the retrained model, with its forget set.
    """

    fmt: PromptFormat
    data: EvalData
    retain_log: EvalLog

    def look(self, model: Any) -> Look:
        """The figures of the model as it stands; its mode stays as it is.

        Raises:
            ValueError: the model's losses are not finite.
            UserError: the log holds other forget rows.
        """
        log = evaluate(model, self.fmt, self.data, retain_log=self.retain_log, generate=False)
        found = summarise(log, self.retain_log, resamples=0)
        from scipy.stats import hmean

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


def loss(look: Look, origin: Look) -> float:
    """`FORMULA` of a look: 0 is a forget set like Retrain's with all else kept, lower is better.

    D, not p: p is flat at 0 where nothing is forgotten yet, and a search cannot climb it.
    """
    # An Origin without any utility has none to lose.
    kept = look.utility / origin.utility if origin.utility else 1.0
    lost = max(0.0, KEPT_UTILITY - kept)
    far = abs(math.log(max(look.nll_ratio, 1e-9))) - math.log(NLL_WITHIN)
    return look.ks + 5.0 * lost + max(0.0, far)


class Watch(TrainerCallback):
    """Looks at the model after chosen steps and at the end, and tells what it saw."""

    def __init__(
        self, probe: Probe, shares: Sequence[float], tell: Callable[[int, int, Look], None]
    ) -> None:
        """Takes when to look and whom to tell.

        Args:
            probe: how to look.
            shares: of all steps after which it looks; 1 is the last step.
            tell: called with step, steps and look; may raise to end the training.
        """
        self._probe = probe
        self._shares = shares
        self._tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Looks where this step is one of the chosen."""
        chosen = {max(1, round(share * state.max_steps)) for share in self._shares}
        if state.global_step in chosen:
            self._tell(state.global_step, state.max_steps, self._probe.look(kwargs["model"]))
