"""Texts scored as one tree, in which every distinct prefix is computed once.

The texts of a question (true, paraphrased, perturbed) begin with the same tokens, and so do all
questions under a chat template with a system prompt. The shared part is found in the tokens, never
assumed to be the prompt: a quote that opens an answer merges with the bracket before it. A tree of
several questions goes through the model as one row, in which each token sees its ancestors only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.errors import UserError
from unlearner import distributed
from unlearner.objectives.hidden import hidden_at
from unlearner.objectives.likelihood import answer_nll, exact_nll, on_device, per_token
from unlearner.tokens.prompts import IGNORE, Encoded, pad_batch

# Attention and its mask are quadratic in it; about three questions of TOFU, of which
# the largest has 661.
TREE_TOKENS = 700
# Nats per token by which a tree may differ from rows of their own: in float32, and in half
# precision, where any two orders of the same sums differ.
TOLERANCE, HALF_TOLERANCE = 1e-4, 3e-2
# Questions whose scores are compared.
COMPARED = 4


class Scored(NamedTuple):
    """One answer: its NLL in nats, summed; |y|; and how many of its leading tokens are the model's
    first choice, with which greedy decoding would have begun.
    """

    nll: float
    n: int
    agreed: int


@dataclass
class Tree:
    """The distinct prefixes of some texts, one node per token.

    Attributes:
        tokens: id of each node.
        parents: its parent's number, -1 for a root; parents come first.
        depths: its position in the text.
        leaves: for each text, the (node, target) pairs that its answer is scored at.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    leaves: list[list[tuple[int, int]]] = field(default_factory=list)


def build_tree(texts: Sequence[Encoded]) -> Tree:
    """The tree of texts. The last token of a text predicts nothing, so EOS needs no node."""
    tree = Tree()
    children: dict[tuple[int, int], int] = {}
    for text in texts:
        node, pairs = -1, []
        for depth, token in enumerate(text.input_ids):
            target = text.labels[depth]
            if target != IGNORE and node >= 0:
                pairs.append((node, target))
            if depth == len(text.input_ids) - 1:
                break
            key = (node, token)
            if key not in children:
                children[key] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(node)
                tree.depths.append(depth)
            node = children[key]
        tree.leaves.append(pairs)
    return tree


def ancestors(parents: Sequence[int]) -> NDArray[np.bool_]:
    """(nodes, nodes): whether the second is the first or one of its ancestors."""
    mask = np.zeros((len(parents), len(parents)), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] = mask[parent]
        mask[node, node] = True
    return mask


def score_trees(
    model: torch.nn.Module,
    questions: Sequence[Sequence[Encoded]],
    *,
    tokens: int = TREE_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[Scored]]:
    """Scores of every text of every question, in their order.

    Args:
        model: a causal LM in eval mode.
        questions: texts of each, prompt included.
        tokens: nodes of one forward; a single question may have more.
        on_progress: called with scored and all texts.
    """
    total = sum(map(len, questions))
    scores: dict[int, list[Scored]] = {}
    with masked_attention(model):
        for indices in packs_of(questions, tokens):
            flat = iter(_score_pack(model, [text for i in indices for text in questions[i]]))
            for i in indices:
                scores[i] = [next(flat) for _ in questions[i]]
            if on_progress is not None:
                on_progress(sum(map(len, scores.values())), total)
    return [scores[i] for i in range(len(questions))]


def packs_of(questions: Sequence[Sequence[Encoded]], budget: int) -> list[list[int]]:
    """Indices of questions, the largest first, so many that their tree stays within `budget`.

    What all questions begin with (BOS, a system prompt) counts once per pack.
    """
    firsts = [texts[0].input_ids for texts in questions]
    columns = zip(*firsts, strict=False)
    same = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    sizes = [len(build_tree(texts).tokens) - same for texts in questions]
    packs: list[list[int]] = []
    room = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if not packs or sizes[i] > room:
            packs.append([])
            room = budget - same
        packs[-1].append(i)
        room -= sizes[i]
    return packs


def _score_pack(model: Any, texts: Sequence[Encoded]) -> list[Scored]:
    tree = build_tree(texts)
    pairs, values, first = forward_tree(model, tree)
    nll, chosen = values.to(torch.float64).tolist(), first.tolist()
    scores = []
    for leaf in tree.leaves:
        places = [pairs[pair] for pair in leaf]
        agreed = next((i for i, place in enumerate(places) if not chosen[place]), len(leaf))
        scores.append(Scored(sum(nll[place] for place in places), len(leaf), agreed))
    return scores


def forward_tree(
    model: Any, tree: Tree
) -> tuple[dict[tuple[int, int], int], torch.Tensor, torch.Tensor]:
    """Every distinct (node, target) of the tree's leaves with its place in what follows.

    Returns:
        The places, NLLs (pairs,) in float32, and whether each target is the likeliest token there.
    """
    device = next(model.parameters()).device
    pairs: dict[tuple[int, int], int] = {}
    for pair in chain.from_iterable(tree.leaves):
        pairs.setdefault(pair, len(pairs))
    nodes, targets = (torch.tensor(column) for column in zip(*pairs, strict=True))
    positions, index = torch.unique(nodes, return_inverse=True)
    inputs = {
        "input_ids": torch.tensor([tree.tokens], device=device),
        "position_ids": torch.tensor([tree.depths], device=device),
        "attention_mask": _mask_for(model, torch.from_numpy(ancestors(tree.parents)).to(device)),
    }
    hidden, head = hidden_at(model, inputs, positions.to(device))
    wanted = targets.to(device)
    first: list[torch.Tensor] = []

    def value(logits: torch.Tensor, part: slice) -> torch.Tensor:
        first.append(logits.argmax(-1) == wanted[part])
        return exact_nll(logits, wanted[part])

    nll = per_token(hidden[index.to(device)], head, value)
    return pairs, nll, torch.cat(first)


def _mask_for(model: Any, allowed: torch.Tensor) -> torch.Tensor:
    """(1, 1, nodes, nodes) as the attention takes it: true for sdpa, 0 and -inf for eager."""
    allowed = allowed[None, None]
    if getattr(_causal(model).config, "_attn_implementation", None) == "sdpa":
        return allowed
    dtype = getattr(model, "dtype", torch.float32)
    additive = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return additive.masked_fill(~allowed, torch.finfo(dtype).min)


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def masked_attention(model: Any) -> Iterator[None]:
    """Inside, attention takes the mask that a tree needs.

    Flash-attention and kernels for packed rows do not: sdpa replaces them, or eager where a model
    has no sdpa.
    """
    inner = _causal(model)
    configs = {id(m.config): m.config for m in inner.modules() if hasattr(m, "config")}
    before = {
        key: config._attn_implementation
        for key, config in configs.items()
        if getattr(config, "_attn_implementation", None) not in (None, "sdpa", "eager")
    }
    name = "sdpa" if getattr(inner, "_supports_sdpa", False) else "eager"
    try:
        for key in before:
            configs[key]._attn_implementation = name
        yield
    finally:
        for key, attention in before.items():
            configs[key]._attn_implementation = attention


def sharing_problem(model: Any, questions: Sequence[Sequence[Encoded]]) -> str | None:
    """Why trees do not score these texts as padded rows do on this model; None if they do.

    Sliding windows shorter than a text, positions of another kind and recurrent layers show here.
    The first questions and the longest are compared. Half precision differs text by text, so there
    the mean must agree as well: what shifts all texts alike would shift the figures. With several
    processes a problem of one is a problem of all, so that all take the same way.

    Args:
        model: a causal LM in eval mode.
        questions: texts of each, prompt included.

    Raises:
        UserError: the forward of a tree failed; out of memory is raised as it is.
    """
    problem = _difference(model, questions) if questions else None
    if distributed.any_of(problem is not None):
        return problem or "it differs from padded rows in another process"
    return None


def _difference(model: Any, questions: Sequence[Sequence[Encoded]]) -> str | None:
    longest = max(questions, key=lambda texts: max(len(text.input_ids) for text in texts))
    others = [texts for texts in questions[:COMPARED] if texts is not longest]
    compared = [longest, *others[: COMPARED - 1]]
    try:
        with masked_attention(model):
            shared = _score_pack(model, [text for texts in compared for text in texts])
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError) as error:
        return f"the model takes no tree ({error})"
    except RuntimeError as error:
        raise UserError(
            f"Scoring texts as a tree of shared prefixes failed: {error}",
            "Score padded rows instead: --plain, or Effort(shared=False).",
        ) from error
    half = getattr(model, "dtype", None) != torch.float32
    allowed = HALF_TOLERANCE if half else TOLERANCE
    device = next(model.parameters()).device
    rows: list[float] = []
    for texts in compared:
        batch = on_device(pad_batch(texts, 0), device)
        rows += answer_nll(model, batch).per_token.tolist()
    differences = [
        (score.nll / score.n - row) / max(1.0, row) for score, row in zip(shared, rows, strict=True)
    ]
    largest = max(map(abs, differences))
    if largest > allowed:
        return f"it differs from padded rows by {largest:.2g} nats per token"
    mean = abs(sum(differences)) / len(differences)
    spread = math.sqrt(sum(each**2 for each in differences)) / len(differences)
    if mean > max(allowed / 10, 3 * spread):
        return f"it differs from padded rows by {mean:.2g} nats per token in the mean"
    return None
