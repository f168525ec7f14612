"""The guard: what holds a new adapter to what the stack answers on rows already forgotten.

The teacher is the parent stack (or, from a record, the stack as it was when that request was
trained). Its log-probabilities are computed once: the likeliest tokens of each answer position and
what is left for all others together, and those of the forgotten tokens themselves. A KL alone lets
a forgotten answer come back: its tokens have next to no mass under the teacher, so that making
them many times likelier costs it next to nothing. The square of what their NLL moved sees that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.environment import evaluating
from adapters.errors import StoreCorrupt
from unlearner.objectives.likelihood import (
    Answers,
    answer_logits,
    on_device,
    per_token,
    sum_by_row,
)
from unlearner.tokens.prompts import IGNORE, Encoded, pad_batch

TOP = 256
# Keeps the logarithm of a vanishing rest finite.
_FLOOR = -60.0


class GuardRow(NamedTuple):
    """A row and its teacher, for each of its n answer positions.

    Attributes:
        row: the tokens.
        tokens: (n, k) ids of the k likeliest tokens.
        log_p: (n, k) their log-probabilities, float32.
        rest: (n,) log of the probability of all other tokens together, float32.
        target: (n,) log-probabilities of the row's own answer tokens, float32; NaN where they are
            not recorded.
    """

    row: Encoded
    tokens: Tensor
    log_p: Tensor
    rest: Tensor
    target: Tensor


def teach(
    model: torch.nn.Module, rows: Sequence[Encoded], pad: int, *, top: int = TOP, batch: int = 8
) -> list[GuardRow]:
    """`rows` with the answers of `model` as it is now, without gradient.

    Args:
        model: with the adapters active that are to teach.
        rows: encoded rows of earlier requests.
        pad: id that fills the padding.
        top: how many tokens of a position are kept (the whole vocabulary makes the KL exact).
        batch: rows of one forward.
    """
    device = next(model.parameters()).device
    taught: list[GuardRow] = []
    with evaluating(model):
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            found = answer_logits(model, on_device(pad_batch(part, pad), device))
            log_p = F.log_softmax(found.logits.float(), dim=-1)
            best, tokens = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
            rest = _log_rest(best)
            target = log_p.gather(-1, found.targets.unsqueeze(-1)).squeeze(-1)
            for i, row in enumerate(part):
                mine = found.row == i
                values = (one[mine].cpu() for one in (tokens, best, rest, target))
                taught.append(GuardRow(row, *values))
    return taught


def _log_rest(log_p: Tensor) -> Tensor:
    """Log of what the probabilities exp(log_p) (n, k) leave over, (n,)."""
    left = 1.0 - log_p.exp().sum(-1)
    return left.clamp_min(torch.finfo(left.dtype).tiny).log().clamp_min(_FLOOR)


def guard_kl(found: Answers, teachers: Sequence[GuardRow]) -> Tensor:
    """`KL(teacher || model)` in nats, mean over each row's answer positions, (rows,).

    Over the teacher's likeliest tokens and one class for all others: by the data-processing
    inequality never more than the KL over the whole vocabulary, and equal to it when `tokens`
    holds all of it.

    Args:
        found: the model's answers on these rows, in this order.
        teachers: one a row.
    """
    device = found.at.hidden.device
    tokens = torch.cat([one.tokens for one in teachers]).to(device)
    log_p = torch.cat([one.log_p for one in teachers]).to(device)
    rest = torch.cat([one.rest for one in teachers]).to(device)

    def divergence(logits: Tensor, part: slice) -> Tensor:
        log_q = F.log_softmax(logits.float(), dim=-1).gather(-1, tokens[part])
        token = (log_p[part].exp() * (log_p[part] - log_q)).sum(-1)
        if tokens.shape[-1] < logits.shape[-1]:
            token = token + rest[part].exp() * (rest[part] - _log_rest(log_q))
        return token

    return sum_by_row(per_token(found.at.hidden, found.head, divergence), found.at).per_token


def moved_nll(nll: Tensor, teachers: Sequence[GuardRow]) -> Tensor:
    """`d^2` of each row, d the nats a token that its answer's NLL is off the teacher's, (rows,).

    Zero, and without gradient, where the teacher's is not recorded.

    Args:
        nll: (rows,) the model's mean NLL of these answers, in this order.
        teachers: one a row.
    """
    before = torch.stack([-one.target.mean() for one in teachers]).to(nll.device)
    return (torch.where(before.isnan(), nll.detach(), before) - nll).square()


def without_target(row: GuardRow) -> GuardRow:
    """The teacher with the KL alone: what its answer's NLL is to be is not known."""
    return row._replace(target=torch.full_like(row.target, torch.nan))


def pack_teacher(rows: Sequence[GuardRow]) -> bytes:
    """The rows as the bytes of a safetensors file."""
    from safetensors.torch import save

    return save(
        {
            "ids": torch.tensor([i for one in rows for i in one.row.input_ids]),
            "labels": torch.tensor([i for one in rows for i in one.row.labels]),
            "lengths": torch.tensor([len(one.row.input_ids) for one in rows]),
            "tokens": torch.cat([one.tokens for one in rows]).int(),
            "log_p": torch.cat([one.log_p for one in rows]).contiguous(),
            "rest": torch.cat([one.rest for one in rows]),
            "target": torch.cat([one.target for one in rows]),
        }
    )


def read_teacher(path: Path) -> list[GuardRow]:
    """The rows that `pack_teacher` wrote to `path`.

    Raises:
        StoreCorrupt: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(path)
        lengths = held["lengths"].tolist()
        ids, labels = held["ids"].split(lengths), held["labels"].split(lengths)
        rows = [Encoded(i.tolist(), y.tolist()) for i, y in zip(ids, labels, strict=True)]
        counts = [sum(label != IGNORE for label in row.labels) for row in rows]
        # A record of an earlier release has no such log-probabilities.
        target = held.get("target", torch.full_like(held["rest"], torch.nan))
        parts = (held["tokens"].long(), held["log_p"], held["rest"], target)
        split = [part.split(counts) for part in parts]
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise StoreCorrupt(
            f"The teacher record {path.name} is damaged ({type(error).__name__}).",
            "Remove the file and give the rows of the earlier request with --guard.",
        ) from error
    return [GuardRow(*one) for one in zip(rows, *split, strict=True)]
