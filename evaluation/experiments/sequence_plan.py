"""What arrives in a sequence of requests: the authors of a forget split, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.base.load import BaseSpec
from adapters.errors import UserError
from evaluation.suite import EvalData
from unlearner.config import UnlearnConfig
from unlearner.request.rows import Request, Row
from unlearner.request.tofu import FORGET_SPLITS, load_authors, load_split

POLICIES = ("independent", "on-stack", "consolidated")


@dataclass(frozen=True)
class Arrival:
    """One author of the split: what a request for it trains on, and the rows it is measured on."""

    name: str
    request: Request
    measured: tuple[Row, ...]


@dataclass(frozen=True)
class Plan:
    """A whole sequence.

    Attributes:
        split: the forget split that the authors are of.
        data: folder of TOFU's files, else the hub.
        base: what all adapters are trained on and measured with.
        config: of every request's training.
        authors: all of the split, in its order; the first `count` are requested one by one.
        count: how many requests arrive.
        utility: rows that must be kept, by set.
        retain_log: of a model that never saw the split; forget quality needs it.
        protocol: of the measurements.
        refusals: for objectives that need them.
        revert: number of the request that is reverted at the end, from 1; 0 for none.
    """

    split: str
    data: Path | None
    base: BaseSpec
    config: UnlearnConfig
    authors: tuple[Arrival, ...]
    count: int
    utility: EvalData
    retain_log: Path | None = None
    protocol: str = "tofu"
    refusals: tuple[str, ...] = ()
    revert: int = 0

    @property
    def requests(self) -> tuple[Arrival, ...]:
        """Those that arrive."""
        return self.authors[: self.count]

    @property
    def forget_rows(self) -> tuple[Row, ...]:
        """The measured rows of all authors, in their order."""
        return tuple(row for author in self.authors for row in author.measured)

    def spans(self) -> list[tuple[int, int]]:
        """Where each author's rows begin and end among `forget_rows`."""
        ends, total = [], 0
        for author in self.authors:
            ends.append((total, total + len(author.measured)))
            total += len(author.measured)
        return ends


def split_authors(
    split: str,
    data: Path | None,
    retain: Sequence[Row] | None = None,
    limit: int | None = None,
    others: Sequence[Row] = (),
) -> tuple[Arrival, ...]:
    """The authors whose rows make up a forget split, in its order.

    Args:
        split: forget01, forget05 or forget10.
        data: folder of TOFU's files, else the hub.
        retain: rows to keep; by default the split's retain split, so that no author of the split
            is trained on before it is asked for.
        limit: measure at most so many rows of each author.
        others: whose answers are alternates; without them those of the retain rows.

    Raises:
        UserError: no such split, or rows of it that are no author's.
    """
    if split not in FORGET_SPLITS:
        raise UserError(f"'{split}' is no forget split.", f"Choose {', '.join(FORGET_SPLITS)}.")
    kept = tuple(load_split(FORGET_SPLITS[split], data) if retain is None else retain)
    perturbed = {_key(row): row for row in load_split(f"{split}_perturbed", data)}
    left = {_key(row) for row in load_split(split, data)}
    found = []
    for author in load_authors(data):
        rows = tuple(row for row in author.rows if _key(row) in left)
        if not rows:
            continue
        left -= {_key(row) for row in rows}
        measured = tuple(perturbed[_key(row)] for row in rows if _key(row) in perturbed)[:limit]
        request = Request(f"tofu:author={author.name}", "tofu-author", rows, kept, tuple(others))
        found.append(Arrival(author.name, request, measured))
    if left:
        raise UserError(
            f"{len(left)} rows of {split} belong to no author of full.json.",
            "Give --data a folder whose splits belong together.",
        )
    return tuple(found)


def _key(row: Row) -> str:
    return "".join(row.question.split())


def utility_rows(data: Path | None, limit: int | None = None) -> EvalData:
    """Retain rows, real authors and world facts, at most `limit` of each; no forget rows."""
    names = ("retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    return EvalData((), *(load_split(name, data)[:limit] for name in names))


def check_plan(plan: Plan, policies: Sequence[str]) -> None:
    """Refuses what cannot be done.

    Raises:
        UserError: an unknown policy, a request number that does not arrive, too many rows.
    """
    from evaluation.protocols import protocol_named

    unknown = [policy for policy in policies if policy not in POLICIES]
    if unknown or not policies:
        raise UserError(
            f"{unknown[0] if unknown else 'none'!r} is no policy.",
            f"Choose of {','.join(POLICIES)}.",
        )
    if not 1 <= plan.count <= len(plan.authors):
        raise UserError(
            f"{plan.count} requests cannot arrive: the split has {len(plan.authors)} authors.",
            "Name fewer with --requests.",
        )
    if not 0 <= plan.revert <= plan.count:
        raise UserError(
            f"Request {plan.revert} cannot be reverted: {plan.count} arrive.",
            "Give --revert one of their numbers, or 0 for none.",
        )
    most = protocol_named(plan.protocol).max_rows
    if most is not None and len(plan.forget_rows) > most:
        raise UserError(
            f"Protocol {plan.protocol} looks at {most} forget rows and the split has "
            f"{len(plan.forget_rows)}.",
            "Use --protocol open-unlearning, or fewer rows of each author with --limit.",
        )
