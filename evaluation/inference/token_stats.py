"""What a model says of every token of an answer, from one teacher-forced pass, and the KL of two.

Log-probabilities are float32 log-softmax of the answer positions alone, a chunk of tokens at a
time: no tensor of the size batch x time x vocabulary exists. Nothing here depends on how texts are
batched or padded, but for rounding (1e-5 in float32).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.environment import evaluating
from adapters.lora.stack import base_only
from evaluation.inference.scoring import BATCH_TOKENS, padded_batches
from unlearner.objectives.likelihood import AnswerHidden, Answers, answers, exact_nll, per_token
from unlearner.tokens.prompts import IGNORE, Encoded

OnBatch = Callable[[int, int], None]
# Tokens whose logits exist at once, a few copies of them in float32: 4 x 128 x 32,000 are 62 MiB.
CHUNK = 128
# Masked vocabulary has log p = -inf: this keeps 0 * log 0 at 0 and moves no possible token.
_FLOOR = -1e4


@dataclass(frozen=True)
class AnswerTokens:
    """One answer under a model, token by token, EOS included.

    Attributes:
        labels: (n,) the token ids.
        first: (n,) the model's first choice at each position, given the true tokens before it.
        log_p: (n,) log p(label), nats.
        mean: (n,) `mu = sum_v p_v log p_v` over the vocabulary, nats (minus the entropy).
        variance: (n,) `sum_v p_v (log p_v - mu)^2`, nats squared.
    """

    labels: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    log_p: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    variance: npt.NDArray[np.float64]

    @property
    def mean_nll(self) -> float:
        """Nats per token (SPEC: nbar)."""
        return float(-self.log_p.mean())


def answer_tokens(
    model: torch.nn.Module,
    texts: Sequence[Encoded],
    pad: int,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: OnBatch | None = None,
) -> list[AnswerTokens]:
    """Every answer's tokens under `model`, in the order of `texts`.

    Args:
        model: a causal LM with its active adapters; its mode is restored.
        texts: encoded rows, cut; each has at least each label.
        pad: id that fills the padding.
        batch_tokens: tokens of a batch, padding included.
        on_batch: called with finished and all texts.
    """
    results: dict[int, AnswerTokens] = {}
    with evaluating(model):
        for indices, batch in padded_batches(model, texts, pad, batch_tokens):
            rows = _row_columns(answers(model, batch), _four)
            for i, (log_p, mean, variance, first) in zip(indices, rows, strict=True):
                labels = np.array([y for y in texts[i].labels if y != IGNORE], dtype=np.int64)
                results[i] = AnswerTokens(labels, first.astype(np.int64), log_p, mean, variance)
            if on_batch is not None:
                on_batch(len(results), len(texts))
    return [results[i] for i in range(len(texts))]


def base_kl(
    model: Any,
    texts: Sequence[Encoded],
    pad: int,
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: OnBatch | None = None,
) -> list[float]:
    """`KL(base || stack) = sum_v p_base (log p_base - log p_stack)`, per token, in nats.

    The mean over the answer's positions, EOS included. Base and stack are the same loaded model,
    with its adapters off and on: no second copy, and exactly 0 where the adapters do nothing.

    Args:
        model: with the stack active; its state is as before afterwards.
        texts, pad, batch_tokens, on_batch: see `answer_tokens`.
    """
    results: dict[int, float] = {}
    with evaluating(model):
        for indices, batch in padded_batches(model, texts, pad, batch_tokens):
            stack = answers(model, batch)
            with base_only(model):
                base = answers(model, batch)
            # The head is frozen and the same for both: it takes their hidden states as pairs.
            pairs = torch.stack([base.at.hidden, stack.at.hidden], dim=1)
            both = Answers(AnswerHidden(pairs, *stack.at[1:]), stack.head)
            for i, (kl,) in zip(indices, _row_columns(both, _divergence), strict=True):
                results[i] = max(0.0, float(kl.mean()))  # below 0 by rounding alone
            if on_batch is not None:
                on_batch(len(results), len(texts))
    return [results[i] for i in range(len(texts))]


def _row_columns(
    states: Answers, value: Callable[[Tensor, Tensor], Tensor]
) -> list[list[npt.NDArray[np.float64]]]:
    """`value(logits, targets)` (tokens, columns) of the batch, row by row, column by column."""
    at = states.at

    def of_chunk(logits: Tensor, part: slice) -> Tensor:
        return value(logits, at.targets[part].to(logits.device))

    # Float64 holds token ids exactly beside the float32 values.
    columns = per_token(at.hidden, states.head, of_chunk, CHUNK).to("cpu", torch.float64).numpy()
    ends = np.cumsum(at.n.cpu().numpy())[:-1]
    return [list(rows.T) for rows in np.split(columns, ends)]


def _four(logits: Tensor, targets: Tensor) -> Tensor:
    """Log p(target), mean and variance of log p, and the first choice: (tokens, 4)."""
    target = -exact_nll(logits, targets)
    log_p = _log_softmax(logits)
    p = log_p.exp()
    mean = (p * log_p).sum(-1)
    # Around the mean, not as a difference of squares: that cancels where one token has it all.
    variance = (p * (log_p - mean.unsqueeze(-1)).square()).sum(-1)
    first = logits.argmax(-1)
    return torch.stack([x.double() for x in (target, mean, variance, first)], dim=-1)


def _divergence(pairs: Tensor, targets: Tensor) -> Tensor:
    """KL of each pair of logits (tokens, 2, vocabulary): (tokens, 1)."""
    log_p, log_q = _log_softmax(pairs).unbind(1)
    return (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True).double()


def _log_softmax(logits: Tensor) -> Tensor:
    """Float32 log p over the vocabulary, by logsumexp: more exact on a CPU than log_softmax."""
    logits = logits.float()
    return (logits - logits.logsumexp(-1, keepdim=True)).clamp_min(_FLOOR)
