"""Objectives whose loss is a sum over tokens, and RMU's over hidden states: pure functions.

`logits` (tokens, vocabulary) are those that predict the answer's labels `targets` (tokens,), EOS
among them; `nll` is `-log p` of a token in nats and p its probability. Every function gives one
float32 value a token; a row's value is the mean over its own answer, so a long answer weighs as
much as a short one and padding is in no mean. Public codes average over all tokens of a
micro-batch instead, see docs/objectives.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_nll(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """`-log p(target)` of each token in nats, float32, (tokens,).

    With `smoothing` e: the cross-entropy to (1 - e) of the target and e of the uniform
    distribution over the vocabulary.
    """
    wide, wanted = _wide(logits), targets.to(logits.device)
    return F.cross_entropy(wide, wanted, reduction="none", label_smoothing=smoothing)


def wga(logits: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Weighted gradient ascent: `-p^beta * nll`, p^beta without gradient, (tokens,).

    Its gradient is that of gradient ascent times p^beta: a token that is forgotten stops pulling.
    Source: arXiv 2502.19301; locuslab/open-unlearning, WGA.
    """
    nll = token_nll(logits, targets)
    return -(-beta * nll.detach()).exp() * nll


def satimp(logits: Tensor, targets: Tensor, beta: float, beta2: float) -> Tensor:
    """`-p^beta * (1 - p)^beta2 * nll`, both factors without gradient, (tokens,).

    The first factor lets go of what is forgotten (saturation), the second passes over tokens that
    are sure anyway (importance). Source: arXiv 2505.11953; locuslab/open-unlearning, SatImp.
    """
    nll = token_nll(logits, targets)
    fixed = nll.detach()
    saturation, importance = (-beta * fixed).exp(), (-torch.expm1(-fixed)) ** beta2
    return -saturation * importance * nll


def undial(logits: Tensor, reference: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Cross-entropy to the reference whose logit of the true token is lowered by beta, (tokens,).

    `-sum_v q_v log p_v` with `q = softmax(reference - beta * onehot(target))`. It is least where
    the model is q, so it is bounded. Source: arXiv 2402.10052; locuslab/open-unlearning, UNDIAL.
    """
    goal = _wide(reference)
    true = targets.to(goal.device).unsqueeze(1)
    lowered = goal.scatter(1, true, goal.gather(1, true) - beta)
    return _cross_entropy(logits, lowered.softmax(-1))


def ceu(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy to the model's own distribution without the true token, (tokens,).

    `-sum_v q_v log p_v` with `q = softmax(logits, true token at minus infinity)` without gradient;
    its gradient in the logits is `p - q`. Source: arXiv 2503.01224; locuslab/open-unlearning, CEU.
    """
    without = _wide(logits.detach()).scatter(
        1, targets.to(logits.device).unsqueeze(1), float("-inf")
    )
    return _cross_entropy(logits, without.softmax(-1))


def ihl(logits: Tensor, targets: Tensor) -> Tensor:
    """Inverted hinge loss: `1 + p(true) - max over v != true of p(v)`, (tokens,).

    It is in [0, 2]: 0 where another token has all of the probability. Its gradient moves the true
    token and its strongest rival, and fades as the true token is forgotten. Source: arXiv
    2408.06621.
    """
    p = _wide(logits).softmax(-1)
    true = targets.to(p.device).unsqueeze(1)
    rival = p.scatter(1, true, -1.0).max(-1).values
    return 1 + p.gather(1, true).squeeze(1) - rival


def steering_vector(width: int, seed: int) -> Tensor:
    """RMU's direction u: uniform in [0, 1) a coordinate, scaled to length 1, float32, (width,).

    The same for all rows, steps and processes of a run. Source: arXiv 2403.03218.
    """
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    length: Tensor = drawn.norm()
    return drawn / length


def squared_distance(hidden: Tensor, goal: Tensor) -> Tensor:
    """Mean over the width of `(hidden - goal)^2` in float32, (tokens,).

    Args:
        hidden: (tokens, width).
        goal: the same shape, or (width,) for all tokens.
    """
    return (_wide(hidden) - _wide(goal)).square().mean(-1)


def after_first(row: Tensor, skip: int) -> Tensor:
    """1 for each token behind the first `skip` tokens of its row, else 0, float32, (tokens,).

    Args:
        row: (tokens,) index of each token's row; tokens of a row stand together, in order.
        skip: how many to leave out.
    """
    place = torch.arange(len(row), device=row.device)
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = row[1:] != row[:-1]
    first = torch.where(begins, place, torch.zeros_like(place)).cummax(0).values
    return ((place - first) >= skip).float()


def _cross_entropy(logits: Tensor, goal: Tensor) -> Tensor:
    return -(goal * F.log_softmax(_wide(logits), dim=-1)).sum(-1)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: the models compute in less."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
