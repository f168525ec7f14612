"""Sequence likelihood of answers: the LM head runs on answer positions only, NLL in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from unlearner.prompts import IGNORE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class AnswerLogits(NamedTuple):
    """Logits of the answer positions of a batch, flattened row by row.

    Attributes:
        logits: (targets, vocabulary), the model's own dtype.
        targets: (targets,) token ids.
        row: (targets,) index of the row each target belongs to.
        n: (rows,) |y| of each row.
    """

    logits: Tensor
    targets: Tensor
    row: Tensor
    n: Tensor


class AnswerNLL(NamedTuple):
    """`nll` (rows,) summed negative log-likelihood in nats, float32; `n` (rows,) |y|."""

    nll: Tensor
    n: Tensor

    @property
    def per_token(self) -> Tensor:
        """(rows,) mean NLL per answer token, EOS counted."""
        return self.nll / self.n


def answer_logits(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> AnswerLogits:
    """Logits that predict the labels of `batch`, without those of prompt and padding.

    Args:
        model: a causal LM of transformers, or a PeftModel around one.
        batch: `input_ids`, `attention_mask`, `labels` (rows, length); labels -100 are skipped.
    """
    labels = batch["labels"][:, 1:]
    row, column = torch.nonzero(labels != IGNORE, as_tuple=True)
    # One index list serves all rows of `logits_to_keep`: keep the columns any row needs, then pick.
    kept, position = torch.unique(column, return_inverse=True)
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=kept,
        use_cache=False,
    )
    counts = torch.zeros(labels.shape[0], dtype=torch.long, device=labels.device)
    counts.index_add_(0, row, torch.ones_like(row))
    return AnswerLogits(out.logits[row, position], labels[row, column], row, counts)


def answer_nll(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> AnswerNLL:
    """Summed NLL and |y| of every row: `nll_i = sum over labels of -log p` (SPEC section 2)."""
    found = answer_logits(model, batch)
    return row_nll(found.logits, found)


def row_nll(logits: Tensor, found: AnswerLogits) -> AnswerNLL:
    """Summed NLL of every row under `logits` (targets, vocabulary) at the positions of `found`."""
    token = F.cross_entropy(logits.float(), found.targets, reduction="none")
    total = torch.zeros(found.n.shape[0], dtype=torch.float32, device=token.device)
    return AnswerNLL(total.index_add(0, found.row, token), found.n)
