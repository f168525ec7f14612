"""Rows of different lengths in one forward: a pack instead of a padded batch.

A pack is one row of tokens with positions that start again at 0 for each of its rows. Attention
must not look across: `pack_attention` runs it row by row (torch's varlen kernel on a GPU, a loop
elsewhere); where another implementation is chosen, transformers masks by the positions, as long as
no cache is made. `objectives.likelihood.packs_exactly` checks that on the model at hand before
anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearner.tokens.prompts import Encoded

# The name of the attention below, which keeps the rows of a pack apart by itself.
PACK_ATTENTION = "unlearner_varlen"


def pack_rows(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """The rows behind one another, without padding.

    Returns:
        `input_ids`, `position_ids`, `labels`, `row_of_token` of shape (1, tokens) and `starts`
        (rows + 1,), where each row begins and the last ends. No attention mask: with one, rows
        would see each other.
    """
    lengths = [len(row.input_ids) for row in rows]
    columns = {
        "input_ids": [i for row in rows for i in row.input_ids],
        "position_ids": [i for length in lengths for i in range(length)],
        "labels": [i for row in rows for i in row.labels],
        "row_of_token": [i for i, length in enumerate(lengths) for _ in range(length)],
    }
    packed = {name: torch.tensor([values], dtype=torch.long) for name, values in columns.items()}
    packed["starts"] = torch.tensor([0, *lengths], dtype=torch.long).cumsum(0)
    return packed


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a pack; transformers' sdpa for anything else.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, size); key and value likewise with their own number of heads.
        key: see query.
        value: see query.
        attention_mask: of transformers; not needed for a pack.
        scaling: of the scores.
        dropout: of the attention weights; a pack has none.
        cu_seq_lens_q: (rows + 1,) where rows begin; None for batches that are no pack.
        max_length_q: tokens of the longest row.
        **kwargs: what else transformers hands to attention.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        longest = int(max_length_q or 0)
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        mixed = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),  # causal: the default looks ahead
            enable_gqa=grouped,
        )
        assert isinstance(mixed, torch.Tensor)
        return mixed.unsqueeze(0), None
    starts = cu_seq_lens_q.tolist()
    rows = [
        F.scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b],
            value[:, :, a:b],
            is_causal=True,
            scale=scaling,
            enable_gqa=grouped,
        )
        for a, b in pairwise(starts)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACK_ATTENTION, varlen_attention)
    # Padded batches still get their mask.
    AttentionMaskInterface.register(PACK_ATTENTION, sdpa_mask)


@contextmanager
def pack_attention(model: Any) -> Iterator[None]:
    """Inside, an sdpa model attends row by row in packs; other implementations stay.

    It must last from forward to backward: activation checkpointing runs attention again there.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = causal.config
    if getattr(config, "_attn_implementation", None) != "sdpa":
        yield
        return
    _register()
    config._attn_implementation = PACK_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Inside `pack_attention`, sdpa again: trees of answers bring a mask of their own."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = causal.config
    if getattr(config, "_attn_implementation", None) != PACK_ATTENTION:
        yield
        return
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = PACK_ATTENTION
