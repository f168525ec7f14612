"""Which rows meet in which step: a seeded plan, drawn before training starts.

The whole order is a function of the seed, so a resumed run continues it by position alone and a
run does not depend on how a step is divided into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from adapters.errors import UserError
from unlearner.tokens.prompts import Encoded

if TYPE_CHECKING:
    from unlearner.config import TrainConfig


# Streams that are held to recorded answers; a batch names the teacher of each pair by its index.
TAUGHT = ("guard", "general")


class Pair(NamedTuple):
    """Indices of a forget row, the retain row it meets, the refusal it would get, a guard row,
    which of its alternate answers, and a general prompt.
    """

    forget: int
    retain: int
    refusal: int
    guard: int = 0
    alternate: int = 0
    general: int = 0


@dataclass(frozen=True)
class Rows:
    """Encoded rows of a run. `refusals[i][j]` is forget row i answered by refusal j; `guard` are
    rows of earlier requests, where they are held to what was reached; `alternates[i][j]` is forget
    row i with its alternate answer j, equally many for each; `general` are neutral prompts with the
    base's own answers.
    """

    forget: Sequence[Encoded]
    retain: Sequence[Encoded]
    refusals: Sequence[Sequence[Encoded]] = ()
    guard: Sequence[Encoded] = ()
    alternates: Sequence[Sequence[Encoded]] = ()
    general: Sequence[Encoded] = ()

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row a micro-batch can hold."""
        more = [row for choices in (*self.refusals, *self.alternates) for row in choices]
        rows = (*self.forget, *self.retain, *more, *self.guard, *self.general)
        return [len(row.input_ids) for row in rows]

    @property
    def cut(self) -> list[tuple[str, int, int]]:
        """Name, cut rows and all rows of every set in which some row was cut."""
        sets = {
            "forget": self.forget,
            "retain": self.retain,
            "refusal": [row for choices in self.refusals for row in choices],
            "guard": self.guard,
            "alternate": [row for choices in self.alternates for row in choices],
        }
        counts = [(name, sum(row.cut for row in rows), len(rows)) for name, rows in sets.items()]
        return [count for count in counts if count[1]]

    def stream(self, name: str, pairs: Sequence[Pair]) -> list[Encoded]:
        """The rows of a stream for `pairs`: forget, retain, refusal, guard, alternate, general."""
        if name == "alternate":
            return [self.alternates[pair.forget][pair.alternate] for pair in pairs]
        if name == "refusal":
            return [self.refusals[pair.forget][pair.refusal] for pair in pairs]
        rows = getattr(self, name)
        return [rows[getattr(pair, name)] for pair in pairs]


def _draws(rng: np.random.Generator, n: int, count: int) -> Iterator[int]:
    """`count` indices below `n`: whole permutations one after another."""
    left = count
    while left > 0:
        for index in rng.permutation(n)[:left]:
            yield int(index)
        left -= n


def plan_of(rows: Rows, config: TrainConfig) -> list[list[Pair]]:
    """The pairs of every optimizer step of a run on `rows`, see `plan_steps`."""
    return plan_steps(
        len(rows.forget),
        len(rows.retain),
        len(rows.refusals[0]) if rows.refusals else 0,
        config,
        len(rows.guard),
        len(rows.alternates[0]) if rows.alternates else 0,
        len(rows.general),
    )


def plan_steps(
    n_forget: int,
    n_retain: int,
    n_refusals: int,
    config: TrainConfig,
    n_guard: int = 0,
    n_alternates: int = 0,
    n_general: int = 0,
) -> list[list[Pair]]:
    """The pairs of every optimizer step.

    Forget rows come in a fresh permutation each epoch. Retain rows are drawn without replacement
    until all were used, so the pairing is new in every epoch (the released SimNPO code freezes it:
    each forget row meets one fixed retain row).

    Args:
        n_forget: forget rows, at least 1.
        n_retain: retain rows; 0 where the objective has no retain term.
        n_refusals: refusal answers; 0 where the objective has none.
        config: gives epochs, batch size and seed.
        n_guard: rows of earlier requests; each pair meets one.
        n_alternates: alternate answers of a forget row; each pair trains one of them.
        n_general: prompts that are held to the base's answers; each pair meets one.
    """
    batch, steps = config.batch_size(n_forget), config.steps(n_forget)
    total = batch * steps
    seeds = np.random.SeedSequence(config.seed).spawn(6)
    counts = (n_forget, n_retain, n_refusals, n_guard, n_alternates, n_general)
    drawn = (
        list(_draws(np.random.default_rng(seed), n, total)) if n else [0] * total
        for seed, n in zip(seeds, counts, strict=True)
    )
    pairs = [Pair(*indices) for indices in zip(*drawn, strict=True)]
    return [pairs[start : start + batch] for start in range(0, total, batch)]


def micro_batches(
    steps: Sequence[Sequence[Pair]],
    size: int,
    processes: int = 1,
    length: Callable[[Pair], int] | None = None,
) -> list[list[Pair]]:
    """Every step cut into equally many micro-batches of at most `size` pairs.

    Args:
        steps: the pairs of every optimizer step, equally many.
        size: pairs of a micro-batch at most.
        processes: the number of micro-batches of a step is a multiple of it.
        length: longest row of a pair in tokens: pairs of like length then share a micro-batch,
            so that less is padding. The step's gradient does not depend on it.

    Raises:
        UserError: fewer pairs in a step than processes.
    """
    pairs = len(steps[0])
    if pairs < processes:
        raise UserError(
            f"A step of {pairs} pairs cannot be shared by {processes} processes.",
            "Start fewer, or raise --per-device-train-batch-size.",
        )
    count = processes * math.ceil(math.ceil(pairs / size) / processes)
    while count > pairs:
        count -= processes
    bounds = [round(i * pairs / count) for i in range(count + 1)]
    if processes == 1:
        bounds = [*range(0, pairs, size), pairs]
    chosen = []
    for step in steps:
        ordered = list(step) if length is None else sorted(step, key=length, reverse=True)
        chosen += [ordered[a:b] for a, b in pairwise(bounds)]
    return chosen
