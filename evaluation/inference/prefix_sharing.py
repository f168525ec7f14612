"""The answers of a question scored as one tree: what they share is computed once.

The texts of a question (true, paraphrased, perturbed) begin with the same tokens. What they share
is found in the tokens themselves, never assumed to be the prompt: a quote that opens an answer
merges with the bracket before it. Trees of several questions go through the model as one row, each
token seeing its ancestors only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from unlearner.tokens.prompts import IGNORE, Encoded

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

# Attention and its mask are quadratic in it; about three questions of TOFU, of which
# the largest has 661.
TREE_TOKENS = 700
TOLERANCE, COARSE = 1e-4, 3e-2


class Scored(NamedTuple):
    """`nll` of an answer in nats, summed, its |y|, and how many of its leading tokens are the
    model's first choice: what greedy decoding would have begun with.
    """

    nll: float
    n: int
    agreed: int


@dataclass
class Tree:
    """The distinct prefixes of some texts: a node a token.

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
    """The tree of one question's texts. The last token of a text predicts nothing: it has no node.

    A node that only ever ends texts is left out, so EOS costs nothing.
    """
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
    import numpy as np

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
        model: a causal LM whose attention takes a mask of its own (sdpa or eager), in eval mode.
        questions: texts of each, prompt included.
        tokens: nodes of one forward; a single question may have more.
        on_progress: called with scored and all texts.
    """
    trees = [build_tree(texts) for texts in questions]
    total = sum(map(len, questions))
    found: dict[int, list[Scored]] = {}
    done = 0
    for indices in packs_of([len(tree.tokens) for tree in trees], tokens):
        for i, scores in zip(indices, _score_pack(model, [trees[i] for i in indices]), strict=True):
            found[i] = scores
            done += len(scores)
        if on_progress is not None:
            on_progress(done, total)
    return [found[i] for i in range(len(trees))]


def packs_of(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of trees, the largest first, so many together that they stay within `budget`."""
    packs: list[list[int]] = []
    room = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if not packs or sizes[i] > room:
            packs.append([])
            room = budget
        packs[-1].append(i)
        room -= sizes[i]
    return packs


def _score_pack(model: Any, trees: Sequence[Tree]) -> list[list[Scored]]:
    import torch

    pairs, values, first = forward_pack(model, trees)
    nll, chosen = values.to(torch.float64).tolist(), first.tolist()
    scores: list[list[Scored]] = []
    offset = 0
    for tree in trees:
        scores.append([])
        for leaf in tree.leaves:
            places = [pairs[offset + node, target] for node, target in leaf]
            agreed = next((i for i, place in enumerate(places) if not chosen[place]), len(leaf))
            scores[-1].append(Scored(sum(nll[place] for place in places), len(leaf), agreed))
        offset += len(tree.tokens)
    return scores


def forward_pack(
    model: Any, trees: Sequence[Tree]
) -> tuple[dict[tuple[int, int], int], torch.Tensor, torch.Tensor]:
    """Every distinct (node of the pack, target) with its place in what follows.

    Returns:
        The places, NLLs (pairs,) in float32, and whether each target is the likeliest token there.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from unlearner.objectives.hidden import hidden_at
    from unlearner.objectives.likelihood import per_token

    device = next(model.parameters()).device
    size = sum(len(tree.tokens) for tree in trees)
    mask = np.zeros((size, size), dtype=bool)
    ids: list[int] = []
    depths: list[int] = []
    pairs: dict[tuple[int, int], int] = {}
    offset = 0
    for tree in trees:
        end = offset + len(tree.tokens)
        mask[offset:end, offset:end] = ancestors(tree.parents)
        ids += tree.tokens
        depths += tree.depths
        for leaf in tree.leaves:
            for node, target in leaf:
                pairs.setdefault((offset + node, target), len(pairs))
        offset = end
    nodes, targets = (torch.tensor(column) for column in zip(*pairs, strict=True))
    kept, index = torch.unique(nodes, return_inverse=True)
    inputs = {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.tensor([depths], device=device),
        "attention_mask": _mask_for(model, torch.from_numpy(mask).to(device)),
    }
    hidden, head = hidden_at(model, inputs, kept.to(device))
    wanted = targets.to(device)
    first: list[torch.Tensor] = []

    def value(logits: torch.Tensor, part: slice) -> torch.Tensor:
        first.append(logits.argmax(-1) == wanted[part])
        return F.cross_entropy(logits.float(), wanted[part], reduction="none")

    nll = per_token(hidden[index.to(device)], head, value)
    return pairs, nll, torch.cat(first)


def _mask_for(model: Any, allowed: torch.Tensor) -> torch.Tensor:
    """(1, 1, nodes, nodes) as the attention takes it: true for sdpa, 0 and -inf for eager."""
    import torch

    allowed = allowed[None, None]
    if _attention(model) == "sdpa":
        return allowed
    dtype = getattr(model, "dtype", torch.float32)
    additive = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return additive.masked_fill(~allowed, torch.finfo(dtype).min)


def _attention(model: Any) -> str:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return str(getattr(inner.config, "_attn_implementation", None))


def shares_exactly(model: Any, texts: Sequence[Encoded]) -> bool:
    """Whether a tree scores these texts as rows of their own do, on this model.

    Attention that takes no mask, sliding windows and positions of another kind show here.
    """
    import torch

    from unlearner.objectives.likelihood import answer_nll
    from unlearner.tokens.prompts import pad_batch

    if _attention(model) not in ("sdpa", "eager"):
        return False
    device = next(model.parameters()).device
    try:
        shared = _score_pack(model, [build_tree(texts)])[0]
        alone = [
            answer_nll(model, {k: v.to(device) for k, v in pad_batch([text], 0).items()})
            for text in texts
        ]
    except (TypeError, ValueError, RuntimeError):
        return False
    allowed = TOLERANCE if getattr(model, "dtype", None) == torch.float32 else COARSE
    return all(
        abs(one.nll / one.n - float(other.per_token)) <= allowed * max(1.0, float(other.per_token))
        for one, other in zip(shared, alone, strict=True)
    )
