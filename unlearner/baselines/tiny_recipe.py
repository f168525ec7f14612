"""Shape and training of a small Llama; without torch, for whoever only reads them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TinyShape:
    """Shape of a small Llama with tied embeddings."""

    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 320
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 512


@dataclass(frozen=True)
class TinyRecipe:
    """How a small Llama is trained from scratch.

    Attributes:
        epochs: passes over the rows.
        tokens_per_batch: padded tokens of one step; batches hold rows of similar length.
        muon_lr: of the hidden matrices.
        adamw_lr: of embeddings and norms.
        weight_decay: on the hidden matrices.
        final_lr: share of the learning rate at the last step (cosine after a short warm-up).
        pretrain_rows: background rows read before the first epoch.
        label_smoothing: share of every target spread over the vocabulary. A small model that has
            learned its rows by heart is sure of its errors too; this bounds how sure.
        seed: of weights and order.
    """

    epochs: int = 20
    tokens_per_batch: int = 1024
    muon_lr: float = 0.02
    adamw_lr: float = 4e-3
    weight_decay: float = 0.0
    final_lr: float = 0.02
    pretrain_rows: int = 0
    label_smoothing: float = 0.0
    seed: int = 42
