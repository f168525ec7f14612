"""Sequence likelihood of answers: hidden states and LM head on answer positions only.

The head is frozen, so a token's loss is a function of its own hidden state: it is computed chunk
by chunk in float32, together with its gradient, and no tensor of the size targets x vocabulary is
ever whole. What a batch is (padded rows or one pack) is written in its keys, see
`unlearner.tokens.packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.environment import evaluating
from unlearner.tokens.batch_plan import TAUGHT
from unlearner.tokens.packing import PACK_ATTENTION, pack_rows
from unlearner.tokens.prompts import IGNORE, Encoded, pad_batch

# Rows of logits that exist at once: 512 x 32,000 in float32 are 62 MiB.
CHUNK = 512
# Relative to the mean NLL of a row: float32 and what bf16 kernels of other shapes differ by.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
COARSE = 3e-2


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


class AnswerHidden(NamedTuple):
    """What the LM head is given at the answer positions of a batch, flattened row by row.

    Attributes:
        hidden: (targets, width), the model's own dtype.
        targets: (targets,) token ids.
        row: (targets,) index of the row each target belongs to.
        n: (rows,) |y| of each row.
    """

    hidden: Tensor
    targets: Tensor
    row: Tensor
    n: Tensor

    def rows(self, start: int, stop: int) -> AnswerHidden:
        """Only rows `start` to `stop`, counted from 0 again."""
        mine = torch.nonzero((self.row >= start) & (self.row < stop)).squeeze(1)
        there = mine.to(self.hidden.device)
        return AnswerHidden(
            self.hidden[there], self.targets[there], self.row[mine] - start, self.n[start:stop]
        )


class AnswerNLL(NamedTuple):
    """`nll` (rows,) summed negative log-likelihood in nats, float32; `n` (rows,) |y|."""

    nll: Tensor
    n: Tensor

    @property
    def per_token(self) -> Tensor:
        """(rows,) mean NLL per answer token, EOS counted."""
        return self.nll / self.n


class Scored(NamedTuple):
    """Which positions are scored: what the model is called with, and how to read its output."""

    inputs: dict[str, Any]
    kept: Tensor
    batch_row: Tensor
    position: Tensor
    targets: Tensor
    row: Tensor
    n: Tensor


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch for a model on `device`.

    Labels, where rows begin and which teachers they have stay on the CPU: what is scored is found
    there, without waiting for a GPU, and also where tensors have no values (the meta device).
    """
    here = ("labels", "row_of_token", "starts", *TAUGHT)
    return {name: t if name in here else t.to(device) for name, t in batch.items()}


def scored(batch: Mapping[str, Tensor]) -> Scored:
    """The answer positions of a padded batch or of a pack; `row` stays where the labels are."""
    device = batch["input_ids"].device
    if "row_of_token" in batch:
        labels, owner = batch["labels"][0, 1:], batch["row_of_token"][0, 1:]
        kept = torch.nonzero(labels != IGNORE).squeeze(1)
        row = owner[kept]
        names = ("input_ids", "position_ids")
        inputs: dict[str, Any] = {name: batch[name] for name in names}
        inputs |= _varlen_arguments(batch)
        n_rows = int(batch["starts"].shape[0]) - 1
        position = torch.arange(len(kept), device=kept.device)
        batch_row, targets = torch.zeros_like(position), labels[kept]
    else:
        labels = batch["labels"][:, 1:]
        batch_row, column = torch.nonzero(labels != IGNORE, as_tuple=True)
        # One index list serves all rows of `logits_to_keep`: keep the columns any row needs.
        kept, position = torch.unique(column, return_inverse=True)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        n_rows, row, targets = labels.shape[0], batch_row, labels[batch_row, column]
    n = torch.zeros(n_rows, dtype=torch.long, device=labels.device)
    n.index_add_(0, row, torch.ones_like(row))
    kept, batch_row, position, targets, n = (
        tensor.to(device) for tensor in (kept, batch_row, position, targets, n)
    )
    return Scored(inputs, kept, batch_row, position, targets, row, n)


def _varlen_arguments(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Where rows begin, under the names that attention for packed rows reads."""
    starts = batch["starts"].int()
    longest = int((starts[1:] - starts[:-1]).max())
    if batch["input_ids"].is_cuda:  # its kernels read them there
        starts = starts.to(batch["input_ids"].device)
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def answer_logits(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> AnswerLogits:
    """Logits that predict the labels of `batch`, without those of prompt and padding.

    Args:
        model: a causal LM of transformers, or a PeftModel around one.
        batch: from `pad_batch` or `pack_rows`; labels of -100 are skipped.
    """
    at = scored(batch)
    return AnswerLogits(scored_logits(model, at), at.targets, at.row, at.n)


def scored_logits(model: torch.nn.Module, at: Scored) -> Tensor:
    """(targets, vocabulary): the model's output at the scored positions alone."""
    # Without `use_cache=False` rows of a pack would see each other, silently.
    out = model(**_inputs(model, at), logits_to_keep=at.kept, use_cache=False)
    logits: Tensor = out.logits[at.batch_row, at.position]
    return logits


def _inputs(model: Any, at: Scored) -> dict[str, Any]:
    """What the model is called with; attention for packs needs no mask, so none is built."""
    config = causal_model(model).config
    if "cu_seq_lens_q" in at.inputs and config._attn_implementation == PACK_ATTENTION:
        return {**at.inputs, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    return at.inputs


def answer_hidden(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> AnswerHidden:
    """What the LM head of `model` would be given at the answer positions of `batch`.

    Args:
        model: a causal LM of transformers whose head is its last step, or a wrapper around one.
        batch: from `pad_batch` or `pack_rows`.
    """
    at = scored(batch)
    with headless(model):
        return AnswerHidden(scored_logits(model, at), at.targets, at.row, at.n)


class Answers(NamedTuple):
    """Hidden states of the answer positions and the head that turns them into logits."""

    at: AnswerHidden
    head: torch.nn.Module

    def rows(self, start: int, stop: int) -> Answers:
        """Only rows `start` to `stop`, counted from 0 again."""
        return Answers(self.at.rows(start, stop), self.head)

    def nll(self, chunk: int = CHUNK) -> AnswerNLL:
        """Summed NLL of every row."""
        return sum_by_row(hidden_nll(self.at.hidden, self.head, self.at.targets, chunk), self.at)


def answers(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Answers:
    """The answer positions of `batch` under `model`, ready for any loss a token.

    Where logits are more than the frozen head's output (a trained head, soft caps), the logits
    themselves stand for the hidden states, and the head passes them on.
    """
    if has_plain_head(model):
        return Answers(answer_hidden(model, batch), lm_head(model))
    found = answer_logits(model, batch)
    return Answers(AnswerHidden(*found), torch.nn.Identity())


def lm_head(model: Any) -> torch.nn.Module:
    """The LM head of a causal LM, or of what is wrapped in PEFT or DDP."""
    head: torch.nn.Module = causal_model(model).get_output_embeddings()
    return head


def causal_model(model: Any) -> Any:
    """The transformers model inside PEFT or DDP."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@contextmanager
def headless(model: Any) -> Iterator[None]:
    """The model's head passes on what it is given: its forward, hooks and all, gives hidden states.

    Through the model's own forward, since DDP and activation checkpointing hook into that.
    """
    causal = causal_model(model)
    head = causal.get_output_embeddings()
    name = next(name for name, child in causal.named_children() if child is head)
    setattr(causal, name, torch.nn.Identity())
    try:
        yield
    finally:
        setattr(causal, name, head)


def has_plain_head(model: Any) -> bool:
    """Whether logits are the frozen head's output and nothing else: no soft cap, no scaling."""
    causal = causal_model(model)
    config, head = causal.config, causal.get_output_embeddings()
    scalings = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in scalings)
    frozen = head is not None and not any(p.requires_grad for p in head.parameters())
    child = any(module is head for module in causal.children())
    return frozen and child and not scaled


def _as_weight(hidden: Tensor, head: torch.nn.Module) -> Tensor:
    """Hidden states in the dtype of the head: under autocast they may come in float32."""
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point():
        return hidden
    return hidden.to(weight.dtype)


class _PerToken(torch.autograd.Function):
    """A value a token from its hidden state, with the gradient worked out in the forward.

    A token's value depends on its own hidden state alone, so the gradient of the sum over a chunk
    holds every token's own gradient; the backward scales them. That is exact for any function of
    the values, sequence losses such as SimNPO's among them, and stores (targets, width) instead of
    (targets, vocabulary). TRL's chunked function computes the same for log-probabilities and
    recomputes the logits in its backward; this one spares that, and serves KL terms as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: torch.nn.Module,
        value: Callable[[Tensor, slice], Tensor],
        chunk: int,
    ) -> Tensor:
        """`value(logits of the chunk, which tokens)` for all tokens, (targets,) float32."""
        needed = hidden.requires_grad
        found: list[Tensor] = []
        gradients: list[Tensor] = []
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, min(start + chunk, hidden.shape[0]))
            with torch.set_grad_enabled(needed):
                piece = hidden[part].detach().requires_grad_(needed)
                values = value(head(_as_weight(piece, head)), part)
                if needed:
                    # Not `autograd.grad`: torch's counter of FLOPs cannot watch that.
                    values.sum().backward()
                    assert piece.grad is not None
                    gradients.append(piece.grad)
            found.append(values.detach())
        if needed:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The stored gradients, each scaled by its token's."""
        (saved,) = ctx.saved_tensors
        return (saved * gradient[0].unsqueeze(-1)).to(saved.dtype), None, None, None


def per_token(
    hidden: Tensor,
    head: torch.nn.Module,
    value: Callable[[Tensor, slice], Tensor],
    chunk: int = CHUNK,
) -> Tensor:
    """`value` of every token, (targets,), the logits of at most `chunk` tokens at a time.

    Args:
        hidden: (targets, width).
        head: the frozen LM head.
        value: from the logits (tokens, vocabulary) of some tokens, and which these are, to one
            float32 value each; a token's value may depend on its own logits only. Without
            gradient it may give several values a token, as columns.
        chunk: tokens at a time.
    """
    result: Tensor = _PerToken.apply(hidden, head, value, chunk)
    return result


def exact_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """`-log p(target)` of each row of logits in float32 nats: (tokens, vocabulary) to (tokens,).

    On a CPU cross-entropy errs by up to 7e-5 nats, logsumexp minus the target's logit by 1e-6.
    """
    logits = logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def hidden_nll(
    hidden: Tensor, head: torch.nn.Module, targets: Tensor, chunk: int = CHUNK
) -> Tensor:
    """`-log p(target)` of every token in nats, (targets,) float32; see `per_token`."""

    def value(logits: Tensor, part: slice) -> Tensor:
        wanted = targets[part].to(logits.device)
        if logits.requires_grad:  # the gradient is exact, and takes one tensor of logits less
            return F.cross_entropy(logits.float(), wanted, reduction="none")
        return exact_nll(logits, wanted)

    return per_token(hidden, head, value, chunk)


def answer_nll(
    model: torch.nn.Module, batch: Mapping[str, Tensor], chunk: int = CHUNK
) -> AnswerNLL:
    """Summed NLL and |y| of every row: `nll_i = sum over labels of -log p` (SPEC section 2)."""
    return answers(model, batch).nll(chunk)


def sum_by_row(token: Tensor, at: AnswerHidden | AnswerLogits) -> AnswerNLL:
    """Values (targets,) summed over the answer of each row."""
    row, n = at.row.to(token.device), at.n.to(token.device)
    total = torch.zeros(n.shape[0], dtype=torch.float32, device=token.device)
    return AnswerNLL(total.index_add(0, row, token), n)


def packs_exactly(model: torch.nn.Module, rows: Sequence[Encoded]) -> tuple[bool, float]:
    """Whether rows score the same in a pack as alone, and the largest difference per token.

    Args:
        model: as it is, adapters included.
        rows: two or more, of different lengths.
    """
    first = next(model.parameters())
    try:
        with evaluating(model):
            packed = answer_nll(model, on_device(pack_rows(rows), first.device))
            alone = [
                answer_nll(model, on_device(pad_batch([row], 0), first.device)) for row in rows
            ]
    except (TypeError, ValueError, RuntimeError):
        # A model that takes no positions, or whose kernel knows no packs, cannot pack.
        if first.is_cuda and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False, float("inf")
    single = torch.stack([one.per_token[0] for one in alone])
    gap = float((packed.per_token - single).abs().max())
    allowed = TOLERANCE.get(getattr(model, "dtype", first.dtype), COARSE)
    return gap <= allowed * max(1.0, float(single.max())), gap
