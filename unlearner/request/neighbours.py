"""The rows of a pool that lie nearest to a forget set: what is most at risk of going with it.

A retain set of far-away rows keeps far-away knowledge; what a request damages first is what reads
like it. Likeness is the cosine of TF-IDF vectors over words (question and answer), which needs no
model and tells the same on every machine.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from adapters.digests import normalised
from adapters.errors import UserError
from unlearner.request.rows import Row

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# From here on two rows say the same: keeping one would keep what is to be forgotten.
SAME = 0.85
_WORD = re.compile(r"\w+")


class Neighbours(NamedTuple):
    """Rows of the pool, the nearest first for each forget row in turn.

    Attributes:
        rows: chosen rows, each once.
        likeness: cosine with the forget row that each was chosen for, 0 to 1.
        left_out: rows of the pool with a forget row's question or almost its words.
    """

    rows: tuple[Row, ...]
    likeness: tuple[float, ...]
    left_out: int


def nearest_rows(forget: Sequence[Row], pool: Sequence[Row], count: int) -> Neighbours:
    """The `count` rows of `pool` nearest to `forget`, taken in turns so that every row has some.

    Args:
        forget: rows to be forgotten, at least one.
        pool: rows that may be kept; those that stand in `forget` are left out.
        count: how many; fewer where the pool has no more.

    Raises:
        UserError: nothing is left of the pool.
    """
    if count < 1:
        raise UserError(f"{count} neighbours are none.", "Ask for at least 1.")
    weights = tf_idf([f"{row.question} {row.answer}" for row in (*forget, *pool)])
    wanted, offered = weights[: len(forget)], weights[len(forget) :]
    likeness = (wanted @ offered.T).toarray()
    asked = {normalised(row.question) for row in forget}
    same = (likeness.max(axis=0) >= SAME) if len(pool) else []
    kept = [
        i for i, row in enumerate(pool) if normalised(row.question) not in asked and not same[i]
    ]
    if not kept:
        raise UserError(
            "No row of the pool is left: all of them stand in the forget set.",
            "Give other rows to mine neighbours from.",
        )
    ranked = [sorted(kept, key=lambda i: (-likeness[f, i], i)) for f in range(len(forget))]
    chosen: dict[int, float] = {}
    for turn in range(len(kept)):
        for f, order in enumerate(ranked):
            if len(chosen) < count:
                chosen.setdefault(order[turn], float(likeness[f, order[turn]]))
    return Neighbours(tuple(pool[i] for i in chosen), tuple(chosen.values()), len(pool) - len(kept))


def tf_idf(texts: Sequence[str]) -> csr_matrix:
    """Unit vectors (texts, words): (1 + log tf) * (1 + log((1 + N) / (1 + df)))."""
    import numpy as np
    from scipy.sparse import csr_matrix

    counts = [Counter(_WORD.findall(text.casefold())) for text in texts]
    frequency = Counter(word for words in counts for word in words)
    column = {word: number for number, word in enumerate(sorted(frequency))}
    values, places, starts = [], [], [0]
    for words in counts:
        weights = {
            column[word]: (1 + math.log(n))
            * (1 + math.log((1 + len(texts)) / (1 + frequency[word])))
            for word, n in words.items()
        }
        length = math.sqrt(sum(value * value for value in weights.values())) or 1.0
        for place in sorted(weights):
            places.append(place)
            values.append(weights[place] / length)
        starts.append(len(places))
    return csr_matrix((np.array(values), places, starts), shape=(len(texts), len(column)))
