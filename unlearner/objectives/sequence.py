r"""Unlearning objectives as pure functions of answer likelihoods; `registry` names them.

Notation (SPEC section 2): `nll` (rows,) is the summed negative log-likelihood of an answer in
nats, `n` (rows,) its |y| with EOS, `nbar = nll / n`. Every objective gives one forget and one
retain value a row; the trainer weighs them (`forget_weight`, `retain_weight`) and averages over
the pairs of an optimizer step. Symbols in public code differ:

| here          | OPTML-Group/Unlearn-Simple | locuslab/open-unlearning |
|---------------|----------------------------|--------------------------|
| beta          | beta                       | beta                     |
| gamma         | beta * gamma               | beta * delta             |
| forget_weight | npo_coeff                  | gamma                    |
| retain_weight | grad_diff_coeff            | alpha                    |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from unlearner.objectives import token as by_token
from unlearner.objectives.likelihood import AnswerHidden, AnswerLogits, AnswerNLL, sum_by_row

if TYPE_CHECKING:
    from torch import Tensor

    from unlearner.config import ObjectiveConfig


class Terms(NamedTuple):
    """Per-row values of one micro-batch, unweighted: `forget` (rows,), `retain` (rows,)."""

    forget: Tensor
    retain: Tensor


class AnswerTokens(NamedTuple):
    """A value for each answer position: `value` (targets,) float32, and whose they are, `at`."""

    value: Tensor
    at: AnswerHidden

    @property
    def by_row(self) -> AnswerNLL:
        """Summed over each row's answer."""
        return sum_by_row(self.value, self.at)


class Forwards(Protocol):
    """What an objective may ask of the model for the rows of a micro-batch.

    `stream` is "forget", "retain", "refusal" (the forget question with a refusal as answer) or
    "alternate" (with an alternate answer).
    The reference is the model as it was before this request: base plus parent stack. `seed` is
    the run's, for what an objective draws once.
    """

    seed: int

    def nll(self, stream: str) -> AnswerNLL:
        """Under the model in training."""

    def reference_nll(self, stream: str) -> AnswerNLL:
        """Under the reference, without gradient."""

    def reference_kl(self, stream: str) -> Tensor:
        """`kl_to_reference` of the stream's rows, (rows,)."""

    def tokens(self, stream: str, value: Callable[[Tensor, Tensor], Tensor]) -> AnswerTokens:
        """`value(logits, targets)` of every answer token under the model in training."""

    def tokens_and_reference(
        self, stream: str, value: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> AnswerTokens:
        """`value(logits, logits of the reference, targets)` of every answer token."""

    def states(self, stream: str, layer: int) -> AnswerHidden:
        """Output of a block (-1: see `hidden.steered_layer`) at the stream's answer positions."""

    def reference_states(self, stream: str, layer: int) -> AnswerHidden:
        """The same under the reference, without gradient."""


def simnpo(nll: Tensor, n: Tensor, beta: float, gamma: float) -> Tensor:
    """`-(2/beta) * logsigmoid(beta * nll/n - gamma)` per row, (rows,).

    Source: arXiv 2410.07163 with the placement of gamma of the model card
    OPTML-Group/SimNPO-TOFU-forget05-Llama-2-7b-chat.
    """
    return -(2.0 / beta) * F.logsigmoid(beta * nll / n - gamma)


def npo(nll: Tensor, nll_reference: Tensor, beta: float) -> Tensor:
    """`-(2/beta) * logsigmoid(beta * (nll - nll_reference))` per row, (rows,); summed NLL.

    Source: arXiv 2404.05868. At the reference itself it is `2 ln 2 / beta`.
    """
    return -(2.0 / beta) * F.logsigmoid(beta * (nll - nll_reference))


def dpo(
    nll: Tensor,
    nll_reference: Tensor,
    refusal_nll: Tensor,
    refusal_nll_reference: Tensor,
    beta: float,
) -> Tensor:
    """DPO per row with the refusal preferred over the true answer, scaled by 2/beta, (rows,).

    `-(2/beta) * logsigmoid(beta * ((lp_idk - lp_idk_ref) - (lp_f - lp_f_ref)))`, lp = -nll.
    Source: arXiv 2305.18290 as used for TOFU in OPTML-Group/Unlearn-Simple.
    """
    margin = (refusal_nll_reference - refusal_nll) - (nll_reference - nll)
    return -(2.0 / beta) * F.logsigmoid(beta * margin)


def kl_to_reference(theta: AnswerLogits, reference: AnswerLogits) -> Tensor:
    """`KL(reference || theta)` in nats, mean over each row's answer positions, (rows,).

    Source: arXiv 2401.06121 (KL minimisation); over answer positions only, in float32.
    """
    token = token_kl(theta.logits, reference.logits)
    return sum_by_row(token, theta).per_token


def token_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """`KL(softmax(reference) || softmax(logits))` of each token in nats, float32, (tokens,)."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    log_q = F.log_softmax(reference.float(), dim=-1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def retain_term(step: Forwards, config: ObjectiveConfig) -> Tensor:
    """What the objective keeps, a value a retain row, unweighted: their mean NLL in most."""
    if config.name == "kl":
        return step.reference_kl("retain")
    if config.name != "rmu":
        return step.nll("retain").per_token
    kept = step.states("retain", config.rmu_layer)
    before = step.reference_states("retain", config.rmu_layer).hidden
    return sum_by_row(by_token.squared_distance(kept.hidden, before), kept).per_token


def alternate_term(step: Forwards, config: ObjectiveConfig) -> Tensor:
    """The mean NLL of the step's alternate answers, a value a row, unweighted.

    With `alternate_smoothing` e it is the cross-entropy to (1 - e) of the true token and e of the
    uniform distribution (arXiv 1512.00567).
    """
    smoothing = config.alternate_smoothing
    if not smoothing:
        return step.nll("alternate").per_token
    found = step.tokens("alternate", partial(by_token.token_nll, smoothing=smoothing))
    return found.by_row.per_token


def _retain(step: Forwards, config: ObjectiveConfig, like: Tensor) -> Tensor:
    """The retain term; zeros where it has no weight and is not computed."""
    return retain_term(step, config) if config.retain_weight else torch.zeros_like(like)


def simnpo_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """SimNPO, see `simnpo`."""
    forget = step.nll("forget")
    loss = simnpo(forget.nll, forget.n, config.beta, config.gamma)
    return Terms(loss, _retain(step, config, loss))


def npo_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """NPO, see `npo`."""
    reference = step.reference_nll("forget").nll
    loss = npo(step.nll("forget").nll, reference, config.beta)
    return Terms(loss, _retain(step, config, loss))


def grad_diff_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """Gradient ascent on the forget rows with a retain term."""
    loss = -step.nll("forget").per_token
    return Terms(loss, _retain(step, config, loss))


def grad_ascent_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """Gradient ascent on the forget rows alone."""
    forget = -step.nll("forget").per_token
    return Terms(forget, torch.zeros_like(forget))


def idk_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """The refusal is learned as the answer."""
    loss = step.nll("refusal").per_token
    return Terms(loss, _retain(step, config, loss))


def dpo_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """DPO, see `dpo`."""
    forget = dpo(
        step.nll("forget").nll,
        step.reference_nll("forget").nll,
        step.nll("refusal").nll,
        step.reference_nll("refusal").nll,
        config.beta,
    )
    return Terms(forget, _retain(step, config, forget))


def rmu_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """RMU at the positions that predict the answer. Source: arXiv 2403.03218."""
    at = step.states("forget", config.rmu_layer)
    goal = config.rmu_coefficient * by_token.steering_vector(at.hidden.shape[-1], step.seed)
    away = by_token.squared_distance(at.hidden, goal.to(at.hidden.device))
    loss = sum_by_row(away, at).per_token
    return Terms(loss, _retain(step, config, loss))


def undial_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """UNDIAL, see `token.undial`."""

    def value(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        return by_token.undial(logits, reference, targets, config.beta)

    loss = step.tokens_and_reference("forget", value).by_row.per_token
    return Terms(loss, _retain(step, config, loss))


def wga_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """Weighted gradient ascent, see `token.wga`."""
    found = step.tokens("forget", lambda logits, y: by_token.wga(logits, y, config.beta))
    loss = found.by_row.per_token
    return Terms(loss, _retain(step, config, loss))


def satimp_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """SatImp, see `token.satimp`."""

    def value(logits: Tensor, targets: Tensor) -> Tensor:
        return by_token.satimp(logits, targets, config.beta, config.beta2)

    loss = step.tokens("forget", value).by_row.per_token
    return Terms(loss, _retain(step, config, loss))


def ihl_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """The inverted hinge loss, see `token.ihl`."""
    loss = step.tokens("forget", by_token.ihl).by_row.per_token
    return Terms(loss, _retain(step, config, loss))


def ceu_terms(step: Forwards, config: ObjectiveConfig) -> Terms:
    """CE-U, see `token.ceu`."""
    found = step.tokens("forget", by_token.ceu)
    counted = by_token.after_first(found.at.row, config.ceu_skip)
    total = sum_by_row(found.value * counted.to(found.value.device), found.at)
    # An answer of no more tokens than are skipped has nothing left to forget.
    loss = total.nll / (total.n - config.ceu_skip).clamp_min(1)
    return Terms(loss, _retain(step, config, loss))
