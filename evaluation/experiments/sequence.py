"""Requests that arrive one after another, under each policy for where a new adapter is trained.

on-stack: each adapter is trained on top of the earlier ones, whose rows are guarded.
consolidated: after each arrival one adapter is trained on the rows of all requests so far; it
supersedes the one before.
(Adapters trained alone and activated together do not add up: docs/results/sequences.md.)

After each arrival every author of the split is evaluated; then one request can be reverted, and
what that leaves stale is trained again. Each policy has its own store. What a stage trained is
cached with all its inputs; figures are always computed from the logs, so another reference log or
more measured rows train nothing again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from adapters.base.load import BaseSpec
from adapters.errors import UserError
from adapters.store.store import AdapterStore
from evaluation.cache import Cache, key_of
from evaluation.experiments.systems import (
    Measured,
    Report,
    base_inputs,
    measure,
    tagged,
    trained_adapter,
)
from evaluation.logs import read_log
from evaluation.logs.matching import match_rows
from evaluation.logs.records import SETS, EvalLog, RowRecord, write_json
from evaluation.metrics.bootstrap import Floats
from evaluation.metrics.forget_quality import ForgetQuality, forget_quality
from evaluation.metrics.summary import set_values
from evaluation.metrics.utility import UTILITY_SETS, model_utility
from evaluation.protocols import DEFAULT, protocol_named
from evaluation.suite import EvalData
from unlearner.config import UnlearnConfig
from unlearner.request.past_requests import joined
from unlearner.request.rows import Request, Row
from unlearner.request.tofu import FORGET_SPLITS, load_authors, load_split
from unlearner.run import RunOptions
from unlearner.tokens.prompts import Template

POLICIES = ("on-stack", "consolidated")
KIND = "unlearner-sequence"
SCHEMA = 1
Span = tuple[int, int]


@dataclass(frozen=True)
class Arrival:
    """One author of the split: the request to forget it, and the rows it is measured on."""

    name: str
    request: Request
    measured: tuple[Row, ...]


@dataclass(frozen=True)
class Plan:
    """A whole sequence.

    Attributes:
        data: folder of TOFU's files, else the hub.
        authors: all of the split, in order; the first `count` are requested one by one.
        utility: rows that must be retained, by set.
        given: settings that are not chosen for each request and the model; None for all.
        reference_log: of a model that never saw the split; forget quality needs it.
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
    given: Collection[str] | None = None
    reference_log: Path | None = None
    protocol: str = "tofu"
    refusals: tuple[str, ...] = ()
    revert: int = 0
    template: Template = "auto"
    system: str | None = None

    @property
    def what(self) -> Measured:
        """How every stage is measured."""
        return Measured(
            self.data, self.split, (self.protocol,), template=self.template, system=self.system
        )

    @property
    def requests(self) -> tuple[Arrival, ...]:
        """Those that arrive."""
        return self.authors[: self.count]

    @property
    def forget_rows(self) -> tuple[Row, ...]:
        """The measured rows of all authors, in their order."""
        return tuple(row for author in self.authors for row in author.measured)

    def spans(self) -> list[Span]:
        """Start and end of each author's rows in `forget_rows`."""
        ends = list(accumulate((len(author.measured) for author in self.authors), initial=0))
        return list(pairwise(ends))


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
        retain: retain rows; by default those of the split's retain split, which holds no author
            that is requested later.
        limit: measure at most this many rows of each author.
        others: rows whose answers are alternates; by default the retain rows.

    Raises:
        UserError: an unknown split, or rows of it that belong to no author.
    """
    if split not in FORGET_SPLITS:
        raise UserError(f"'{split}' is no forget split.", f"Choose {', '.join(FORGET_SPLITS)}.")
    retained = tuple(load_split(FORGET_SPLITS[split], data) if retain is None else retain)
    perturbed = {_key(row): row for row in load_split(f"{split}_perturbed", data)}
    left = {_key(row) for row in load_split(split, data)}
    arrivals = []
    for author in load_authors(data):
        rows = tuple(row for row in author.rows if _key(row) in left)
        if not rows:
            continue
        left -= {_key(row) for row in rows}
        measured = tuple(perturbed[_key(row)] for row in rows if _key(row) in perturbed)[:limit]
        name = f"tofu:author={author.name}"
        request = Request(name, "tofu-author", rows, retained, tuple(others))
        arrivals.append(Arrival(author.name, request, measured))
    if left:
        raise UserError(
            f"{len(left)} rows of {split} belong to no author of full.json.",
            "Give --data a folder whose splits belong together.",
        )
    return tuple(arrivals)


def _key(row: Row) -> str:
    return "".join(row.question.split())


def utility_rows(data: Path | None, limit: int | None = None) -> EvalData:
    """Retain rows, real authors and world facts, at most `limit` of each; no forget rows."""
    return EvalData((), *(load_split(f"{name}_perturbed", data)[:limit] for name in SETS[1:]))


def check_plan(plan: Plan, policies: Sequence[str]) -> None:
    """Raises UserError for an unknown policy, a request number out of range or too many rows."""
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


def run_sequence(
    plan: Plan, policies: Sequence[str], out: Path, report: Report | None = None
) -> dict[str, Any]:
    """The sequence under each policy, as the JSON that is also written to `out/sequence.json`.

    Finished stages with the same inputs are not repeated. `report` gets the events of training and
    measuring, with "job" for the policy.

    Raises:
        UserError: an unknown policy, a request number that does not arrive, rows that the
            reference log does not have.
        Interrupted: stopped on request; the same call continues.
    """
    check_plan(plan, policies)
    report = report or (lambda event: None)
    reference = read_log(plan.reference_log) if plan.reference_log else None
    bare = [RowRecord(row.question, row.answer) for row in plan.forget_rows]
    quality_of(bare, reference)  # refuses a reference of other rows before any work
    origin = _Line(plan, "origin", out, report, reference).measure("origin", [], generate=True)
    result = {
        "kind": KIND,
        "schema": SCHEMA,
        "split": plan.split,
        "protocol": plan.protocol,
        "base": plan.base.name,
        "retain_log": plan.reference_log is not None,
        "authors": [author.name for author in plan.authors],
        "requests": plan.count,
        "rows_measured": len(plan.forget_rows),
        "settings": plan.config.to_json(),
        "origin": figures(origin, plan.spans(), frozenset(), reference, plan.protocol),
        "policies": [_Line(plan, name, out, report, reference).run(origin) for name in policies],
    }
    written: dict[str, Any] = json.loads(write_json(out / "sequence.json", result).read_text())
    return written


@dataclass(frozen=True)
class _Line:
    """The sequence under one policy, in its own folder and store."""

    plan: Plan
    policy: str
    out: Path
    report: Report
    reference: EvalLog | None

    @cached_property
    def tell(self) -> Report:
        return tagged(self.report, job=self.policy)

    @cached_property
    def key(self) -> str:
        """Of all that decides what is trained; a revert at the end closes the store."""
        plan = self.plan
        return key_of(
            base=base_inputs(plan.base),
            config=plan.config,
            given=None if plan.given is None else sorted(plan.given),
            requests=[author.request for author in plan.authors],
            refusals=plan.refusals,
            template=plan.what.prompts,
            end=[plan.count, plan.revert] if plan.revert else None,
        )

    @property
    def folder(self) -> Path:
        return self.out / f"{self.policy}-{self.key[:12]}"

    @property
    def stages(self) -> Cache:
        """What the stages trained, and what the store said after each."""
        return Cache(self.folder / "stages", self.key)

    def run(self, origin: EvalLog) -> dict[str, Any]:
        """Every arrival, how it changed each author's NLL, and the revert."""
        arrivals, logs = [], [origin]
        for number in range(1, self.plan.count + 1):
            name, requested = f"arrival-{number:02d}", frozenset(range(number))
            stage = self.stages.entry(name).result(partial(self._arrive, number))
            last = number == self.plan.count
            arrivals.append(self._with_figures(name, stage, requested, generate=last))
            logs.append(read_log(self._log_path(name)))
        spans = self.plan.spans()
        line: dict[str, Any] = {
            "policy": self.policy,
            "arrivals": arrivals,
            "interference": [step_between(a, b, spans) for a, b in pairwise(logs)],
            "cost": _sum([stage["cost"] for stage in arrivals]),
        }
        if not self.plan.revert:
            return line
        others = frozenset(range(self.plan.count)) - {self.plan.revert - 1}
        for kind, work in (("revert", self._revert), ("rebase", self._rebase)):
            name = f"{kind}-{self.plan.revert:02d}"
            stage = self.stages.entry(name).result(work)
            line[kind] = self._with_figures(name, stage, others, generate=kind == "rebase")
        return line

    def measure(self, name: str, slugs: Sequence[str], *, generate: bool = False) -> EvalLog:
        """The log of the base with these adapters active, on the rows of all authors and sets."""
        measure(
            self.tell,
            base=self.plan.base,
            what=self.plan.what,
            log=self._log_path(name),
            store=self.folder / "store",
            adapters=slugs,
            rows=replace(self.plan.utility, forget=self.plan.forget_rows),
            generate=generate,
            allow_missing_parents=True,  # stale adapters are measured too
        )
        return read_log(self._log_path(name))

    def _log_path(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.json"

    def _store(self) -> AdapterStore:
        return AdapterStore.open(self.folder / "store", create=True)

    def _with_figures(
        self, name: str, stage: dict[str, Any], requested: frozenset[int], *, generate: bool
    ) -> dict[str, Any]:
        log = self.measure(name, stage["active"], generate=generate)
        values = figures(log, self.plan.spans(), requested, self.reference, self.plan.protocol)
        return {"name": name, **stage, **values, "log": f"logs/{name}.json"}

    def _arrive(self, number: int) -> dict[str, Any]:
        self.tell({"event": "arrive", "text": f"request {number} of {self.plan.count}"})
        label, earlier = f"request-{number}", range(1, number)
        if self.policy == "consolidated":
            last = [self._slug(f"request-{number - 1}")] if number > 1 else []
            result = self._train(label, [*earlier, number], on_stack=False, replaces=last)
        else:
            result = self._train(label, [number], on_stack=number > 1, guarded=earlier)
        return result | self._state()

    def _train(
        self,
        label: str,
        numbers: Sequence[int],
        *,
        on_stack: bool,
        guarded: Sequence[int] = (),
        replaces: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The active adapter of some requests and its cost, trained unless the store holds it."""
        plan, started = self.plan, time.monotonic()
        requests = [plan.requests[n - 1].request for n in numbers]
        request = joined(requests) if self.policy == "consolidated" else requests[0]
        options = RunOptions(
            on_stack=on_stack,
            label=label,
            resume=True,
            template=plan.template,
            system=plan.system,
            refusals=plan.refusals,
            given=plan.given,
            summarise=True,
            guard=[row for n in guarded for row in plan.requests[n - 1].request.rows],
            replaces=replaces,
        )
        store = self._store()
        is_new = all(adapter.manifest.label != label for adapter in store.list())
        adapter = trained_adapter(self.tell, store, request, plan.base, plan.config, options)
        seconds = self.stages.entry(f"seconds-{label}")
        if is_new:
            seconds.write(time.monotonic() - started)
        train = adapter.manifest.train
        sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
        batch = replace(plan.config.train, **{name: train[name] for name in sizes})
        cost = {
            "steps": train["steps"],
            "pairs": train["steps"] * batch.batch_size(len(request.rows)),
            # None: the process ended after publishing, before it could note the time.
            "seconds": seconds.read(),
            "bytes": adapter.size,
        }
        return {"slug": adapter.slug, "cost": cost, "outcome": train["outcome"]}

    def _slug(self, label: str) -> str:
        return self._store().get(label).slug

    def _state(self) -> dict[str, Any]:
        """The store's active stack, and what the store says of its adapters."""
        store = self._store()
        active = [adapter.slug for adapter in store.active()]
        status = {adapter.slug: adapter.status for adapter in store.list()}
        stale = [slug for slug in active if status[slug] == "stale"]
        return {"active": active, "stale": stale, "status": status}

    def _revert(self) -> dict[str, Any]:
        """The store reverts one request. A consolidated adapter can only be reverted whole."""
        number = self.plan.revert
        last = self.plan.count if self.policy == "consolidated" else number
        store, slug = self._store(), self._slug(f"request-{last}")
        self.tell({"event": "revert", "text": f"reverting request {number}"})
        if store.get(slug).active:
            store.revert(slug, reason="request withdrawn")
        return {"slug": slug} | self._state()

    def _rebase(self) -> dict[str, Any]:
        """Trains again what the revert left stale or took away with it."""
        number, costs = self.plan.revert, []
        others = [n for n in range(1, self.plan.count + 1) if n != number]
        if self.policy == "consolidated" and others:
            result = self._train(f"rebase-{self.plan.count}", others, on_stack=False)
            costs.append(result["cost"])
        if self.policy == "on-stack":
            store = self._store()
            old = {n: self._slug(f"request-{n}") for n in others if n > number}
            for n in reversed(old):  # children before their parents
                if store.get(old[n]).active:
                    store.revert(old[n], reason="rebase")
            for n, slug in old.items():
                earlier = [m for m in others if m < n]
                result = self._train(
                    f"rebase-{n}", [n], on_stack=bool(earlier), guarded=earlier, replaces=[slug]
                )
                costs.append(result["cost"])
        return {"trained": len(costs), "cost": _sum(costs)} | self._state()


def _sum(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Total cost; seconds are None where those of one part are unknown."""
    seconds = [cost["seconds"] for cost in costs]
    names = ("steps", "pairs", "bytes")
    total = {name: sum(cost[name] for cost in costs) for name in names}
    return total | {"seconds": None if None in seconds else sum(seconds)}


def figures(
    log: EvalLog,
    spans: Sequence[Span],
    requested: frozenset[int],
    reference: EvalLog | None,
    protocol: str = DEFAULT,
) -> dict[str, Any]:
    """The figures of one stage.

    `authors`: mean answer probability P and mean NLL (nats per token) of each; `requested_*` and
    `waiting_*`: the means over rows of requested and other authors (None where there are none);
    `forget_quality`, `ks`, `log_r_shift`, `direction`: of the rows of all requested so far against
    the reference (None without one); `retain_*`; `model_utility` where answers were generated;
    `utility_teacher_forced`: harmonic mean of its six parts that need no generation (probability
    and truth ratio of the three sets), not comparable with model utility.

    Args:
        log: its forget set holds the rows of all authors in order.
        spans: start and end of each author's rows.
        requested: indices of the authors requested so far.
        reference: log of a model that never saw the split.
        protocol: of the truth ratio and the answers.
    """
    from scipy.stats import hmean

    chosen = protocol_named(protocol)
    rows, nll = log.sets["forget"].rows, _nll(log)
    places: dict[bool, list[int]] = {True: [], False: []}
    for n, span in enumerate(spans):
        places[n in requested] += range(*span)
    values = {
        name: set_values(name, log.sets[name].rows, chosen)
        for name in UTILITY_SETS.values()
        if name in log.sets
    }
    utility = model_utility(values, resamples=0)
    parts = [part for title, part in utility.parts.items() if not title.endswith("ROUGE")]
    retain = values.get("retain", {})
    return {
        "authors": [
            {"requested": n in requested, **_means(nll[slice(*s)])} for n, s in enumerate(spans)
        ],
        **{f"requested_{key}": value for key, value in _means(nll[places[True]]).items()},
        **{f"waiting_{key}": value for key, value in _means(nll[places[False]]).items()},
        **quality_of([rows[i] for i in places[True]], reference, protocol),
        "retain_answer_prob": _mean(retain.get("answer_prob")),
        "retain_nll": _mean(retain.get("nll")),
        "model_utility": utility.value,
        "utility_teacher_forced": float(hmean(parts)) if len(parts) == 6 else None,
    }


def quality_of(
    rows: Sequence[RowRecord], reference: EvalLog | None, protocol: str = DEFAULT
) -> dict[str, Any]:
    """Forget quality of some forget rows against the same rows of the reference.

    All values are None without rows, reference or scores; rows without scores are only checked to
    be in the reference.

    Raises:
        UserError: the reference holds other rows.
    """
    quality = ForgetQuality()
    if reference is not None and "forget" in reference.sets and rows:
        match = match_rows(rows, reference.sets["forget"].rows, subset=True)
        ours, theirs = (
            set_values("forget", each, protocol_named(protocol)).get("log_r")
            for each in (match.ours, match.theirs)
        )
        if ours is not None and theirs is not None:
            quality = forget_quality(ours, theirs, resamples=0)
    return {
        "forget_quality": quality.p,
        "ks": quality.d,
        "log_r_shift": quality.shift,
        "direction": quality.direction,
    }


def step_between(before: EvalLog, after: EvalLog, spans: Sequence[Span]) -> list[float]:
    """How much each author's mean NLL (nats per token) rose from one log to the other."""
    change = _nll(after) - _nll(before)
    return [float(change[slice(*span)].mean()) for span in spans]


def _nll(log: EvalLog) -> Floats:
    scores = [row.answer_score for row in log.sets["forget"].rows]
    return np.array([score.mean_nll for score in scores if score is not None], dtype=np.float64)


def _means(nll: Floats) -> dict[str, Any]:
    return {"answer_prob": _mean(np.exp(-nll)), "nll": _mean(nll)}


def _mean(values: Floats | None) -> float | None:
    return float(values.mean()) if values is not None and values.size else None
