r"""Unlearning objectives as pure functions of answer likelihoods, and one dict that names them.

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
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from unlearner.likelihood import AnswerLogits, AnswerNLL, sum_by_row

if TYPE_CHECKING:
    from torch import Tensor

    from unlearner.config import ObjectiveConfig


class Terms(NamedTuple):
    """Per-row values of one micro-batch, unweighted: `forget` (rows,), `retain` (rows,)."""

    forget: Tensor
    retain: Tensor


class Forwards(Protocol):
    """What an objective may ask of the model for the rows of a micro-batch.

    `stream` is "forget", "retain" or "refusal" (the forget question with a refusal as answer).
    The reference is the model as it was before this request: base plus parent stack.
    """

    def nll(self, stream: str) -> AnswerNLL:
        """Under the model in training."""

    def reference_nll(self, stream: str) -> AnswerNLL:
        """Under the reference, without gradient."""

    def reference_kl(self, stream: str) -> Tensor:
        """`kl_to_reference` of the stream's rows, (rows,)."""


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


def _simnpo(step: Forwards, config: ObjectiveConfig) -> Terms:
    forget = step.nll("forget")
    return Terms(
        simnpo(forget.nll, forget.n, config.beta, config.gamma), step.nll("retain").per_token
    )


def _npo(step: Forwards, config: ObjectiveConfig) -> Terms:
    reference = step.reference_nll("forget").nll
    return Terms(npo(step.nll("forget").nll, reference, config.beta), step.nll("retain").per_token)


def _grad_diff(step: Forwards, config: ObjectiveConfig) -> Terms:
    return Terms(-step.nll("forget").per_token, step.nll("retain").per_token)


def _grad_ascent(step: Forwards, config: ObjectiveConfig) -> Terms:
    forget = -step.nll("forget").per_token
    return Terms(forget, torch.zeros_like(forget))


def _kl(step: Forwards, config: ObjectiveConfig) -> Terms:
    return Terms(-step.nll("forget").per_token, step.reference_kl("retain"))


def _idk(step: Forwards, config: ObjectiveConfig) -> Terms:
    return Terms(step.nll("refusal").per_token, step.nll("retain").per_token)


def _dpo(step: Forwards, config: ObjectiveConfig) -> Terms:
    forget = dpo(
        step.nll("forget").nll,
        step.reference_nll("forget").nll,
        step.nll("refusal").nll,
        step.reference_nll("refusal").nll,
        config.beta,
    )
    return Terms(forget, step.nll("retain").per_token)


OBJECTIVES: dict[str, Callable[[Forwards, ObjectiveConfig], Terms]] = {
    "simnpo": _simnpo,
    "simnpo-readme": _simnpo,
    "npo": _npo,
    "grad_ascent": _grad_ascent,
    "grad_diff": _grad_diff,
    "kl": _kl,
    "idk": _idk,
    "dpo": _dpo,
}
