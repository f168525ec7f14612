"""Requests that arrive one after another, under each policy for where a new adapter is trained.

independent: every adapter on the bare base, all of them active together. on-stack: every adapter on
top of those before it, whose rows are guarded. consolidated: after each arrival one adapter
retrained on the rows of all requests so far, which takes the place of the last one.

After each arrival every author of the split is measured; then one request is reverted and what
that leaves is made good. Everything happens in a store of the policy's own, by the store's own
operations. Every stage leaves a file, so a sequence that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from evaluation.experiments.sequence_figures import figures, interference, quality_of, step_between
from evaluation.experiments.sequence_plan import Plan, check_plan
from evaluation.experiments.systems import Measured, digest, measure
from evaluation.logs import read_log
from evaluation.logs.records import write_json
from evaluation.suite import EvalData
from unlearner.config import UnlearnConfig
from unlearner.request.rows import Request, Row

if TYPE_CHECKING:
    from adapters.store.store import AdapterStore
    from evaluation.logs.records import EvalLog

Report = Callable[[dict[str, Any]], None]
KIND = "unlearner-sequence"
SCHEMA = 1


def run_sequence(
    plan: Plan, policies: Sequence[str], out: Path, report: Report | None = None
) -> dict[str, Any]:
    """The sequence under each policy, as the JSON that is also written to `out/sequence.json`.

    Args:
        plan: what arrives, and how it is trained and measured.
        policies: of `POLICIES`.
        out: folder of all stages; what stands there for the same plan is not done again.
        report: gets the events of training and measuring, with "job" for the policy.

    Raises:
        UserError: an unknown policy, a request number that does not arrive, rows that the retrain
            log does not have.
        Interrupted: stopped on request; the same call goes on.
    """
    check_plan(plan, policies)
    tell = report or (lambda event: None)
    retain = read_log(plan.retain_log) if plan.retain_log else None
    quality_of(plan.forget_rows, retain)  # refuses a reference of other rows before any work
    origin = _Line(plan, "origin", out, tell, retain).measure("origin", [], generate=True)
    start = figures(origin, plan.spans(), frozenset(), retain, plan.protocol)
    lines = [_Line(plan, policy, out, tell, retain, origin).run() for policy in policies]
    result = {
        "kind": KIND,
        "schema": SCHEMA,
        "split": plan.split,
        "protocol": plan.protocol,
        "base": plan.base.name,
        "retain_log": plan.retain_log is not None,
        "authors": [author.name for author in plan.authors],
        "requests": plan.count,
        "rows_measured": len(plan.forget_rows),
        "settings": plan.config.to_json(),
        "origin": start,
        "policies": lines,
    }
    told: dict[str, Any] = json.loads(write_json(out / "sequence.json", result).read_text("utf-8"))
    return told


@dataclass
class _Line:
    """The sequence under one policy, in its own folder and store."""

    plan: Plan
    policy: str
    out: Path
    report: Report
    retain: EvalLog | None
    origin: EvalLog | None = None
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        plan = self.plan
        depends = [plan.base, plan.config.to_json(), plan.split, plan.protocol, plan.refusals]
        depends += [[a.request.name, a.request.rows, a.measured] for a in plan.authors]
        first = plan.authors[0].request
        depends += [first.retain, first.others, plan.utility]
        self.folder = self.out / f"{self.policy}-{digest(*depends)}"

    def run(self) -> dict[str, Any]:
        """Every arrival, what each one did to each author, and the revert."""
        assert self.origin is not None
        self._refuse_other_history()
        stages, logs = [], [self.origin]
        for number in range(1, self.plan.count + 1):
            stages.append(self.stage(f"arrival-{number:02d}", partial(self._arrive, number)))
            logs.append(read_log(self.folder / stages[-1]["log"]))
        spans = self.plan.spans()
        told: dict[str, Any] = {
            "policy": self.policy,
            "arrivals": stages,
            "interference": [step_between(a, b, spans) for a, b in pairwise(logs)],
            "alone": self._alone() if self.policy == "independent" else None,
            "cost": _sum([stage["cost"] for stage in stages]),
        }
        if self.plan.revert:
            told["revert"] = self.stage(f"revert-{self.plan.revert:02d}", self._revert)
            told["rebase"] = self.stage(f"rebase-{self.plan.revert:02d}", self._rebase)
        return told

    def _refuse_other_history(self) -> None:
        """A store in which a request was reverted, or more arrived, is at another point."""
        count, number = self.plan.count, self.plan.revert
        done = {path.stem for path in self.folder.glob("*-[0-9][0-9].json")}
        arrived = {f"arrival-{n:02d}" for n in range(1, count + 1)}
        reverted = {name for name in done if name.startswith("revert-")}
        later = {name for name in done if name.startswith("arrival-")} - arrived
        if (reverted and (reverted != {f"revert-{number:02d}"} or arrived - done)) or (
            later and number
        ):
            raise UserError(
                f"In {self.folder} a sequence of other requests or another revert has run.",
                "Ask for the same again, or name another --out.",
            )

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` gives, from its file where it was done before."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_json(path, {"name": name, **work()})
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def measure(self, name: str, slugs: Sequence[str], *, generate: bool = False) -> EvalLog:
        """The log of the base with these adapters active, on the rows of all authors and sets."""
        return self._log(name, slugs, replace(self.plan.utility, forget=self.plan.forget_rows),
                         generate)  # fmt: skip

    def _log(self, name: str, slugs: Sequence[str], rows: EvalData, generate: bool) -> EvalLog:
        path = self.folder / "logs" / f"{name}.json"
        store = self._store() if slugs else None
        weights = [store.get(slug).manifest.files for slug in slugs] if store else []
        measure(
            self._tell,
            base=self.plan.base,
            what=Measured(self.plan.data, self.plan.split, (self.plan.protocol,)),
            log=path,
            store=self.folder / "store",
            adapters=slugs,
            key=digest(weights),
            rows=rows,
            generate=generate,
            stale=True,  # what the store calls stale is measured as it stands
        )
        return read_log(path)

    def _tell(self, event: dict[str, Any]) -> None:
        if event.get("event") != "note":
            self.report({**event, "job": self.policy})

    def _store(self) -> AdapterStore:
        from adapters.store.store import AdapterStore

        return AdapterStore.open(self.folder / "store", create=True)

    def _arrive(self, number: int) -> dict[str, Any]:
        self._tell({"event": "arrive", "text": f"request {number} of {self.plan.count}"})
        before = [self.slug(f"request-{number - 1}")] if number > 1 else []
        if self.policy == "consolidated":
            request = self._joined(range(1, number + 1))
            trained = self._train(f"request-{number}", request, on_stack=False, replaces=before)
        else:
            earlier = range(1, number)
            trained = self._train(
                f"request-{number}",
                self.plan.requests[number - 1].request,
                on_stack=self.policy == "on-stack" and number > 1,
                guard=self._rows(earlier) if self.policy == "on-stack" else (),
            )
        asked = frozenset(range(number))
        return trained | self._state(f"arrival-{number:02d}", asked, number == self.plan.count)

    def _train(
        self,
        label: str,
        request: Request,
        *,
        on_stack: bool,
        guard: Sequence[Row] = (),
        replaces: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The active adapter of a request, trained unless it stands in the store, and its cost."""
        from unlearner.run import unlearn

        store, kept = self._store(), self.folder / f"trained-{label}.json"
        if not [one for one in store.list() if one.manifest.label == label]:
            started = time.monotonic()
            made = unlearn(
                request,
                self.plan.base,
                self.plan.config,
                store,
                on_stack=on_stack,
                label=label,
                resume=True,
                refusals=self.plan.refusals,
                guard=guard,
                replaces=replaces,
                on_progress=self._tell,
            )
            cost = _cost(made.manifest.train["steps"], self.plan.config, len(request.rows))
            cost |= {"seconds": time.monotonic() - started, "bytes": made.size}
            write_json(kept, cost)
        found = store.get(label)
        if not found.active:
            store.activate([found.slug])
        if kept.is_file():
            return {"slug": found.slug, "cost": json.loads(kept.read_text(encoding="utf-8"))}
        # Stored by a process that ended before it could write down how long it took.
        cost = _cost(found.manifest.train["steps"], self.plan.config, len(request.rows))
        return {"slug": found.slug, "cost": cost | {"seconds": None, "bytes": found.size}}

    def slug(self, label: str) -> str:
        """The slug of the adapter that was stored under this label."""
        return self._store().get(label).slug

    def _rows(self, numbers: Sequence[int]) -> list[Row]:
        return [row for n in numbers for row in self.plan.requests[n - 1].request.rows]

    def _joined(self, numbers: Sequence[int]) -> Request:
        from unlearner.request.past_requests import joined

        return joined([self.plan.requests[n - 1].request for n in numbers])

    def _state(self, name: str, asked: frozenset[int], generate: bool) -> dict[str, Any]:
        """Figures of the store's active stack, and what the store says of its adapters."""
        store = self._store()
        active = [one.slug for one in store.active()]
        log = self.measure(name, active, generate=generate)
        status = {one.slug: one.status for one in store.list()}
        return {
            **figures(log, self.plan.spans(), asked, self.retain, self.plan.protocol),
            "active": active,
            "stale": [slug for slug in active if status[slug] == "stale"],
            "status": status,
            "log": f"logs/{name}.json",
        }

    def _alone(self) -> list[list[float]]:
        """How each request's adapter, on the bare base alone, changes every author's NLL."""
        assert self.origin is not None
        rows = EvalData(self.plan.forget_rows)
        slugs = [self.slug(f"request-{n}") for n in range(1, self.plan.count + 1)]
        logs = [self._log(f"alone-{n:02d}", [s], rows, False) for n, s in enumerate(slugs, 1)]
        return interference(self.origin, logs, self.plan.spans())

    def _revert(self) -> dict[str, Any]:
        """One request is switched off by the store: what stands then, and what it calls stale.

        Of a consolidated adapter no part can be switched off: the whole of it goes.
        """
        number = self.plan.revert
        last = self.plan.count if self.policy == "consolidated" else number
        store, slug = self._store(), self.slug(f"request-{last}")
        self._tell({"event": "revert", "text": f"reverting request {number}"})
        if store.get(slug).active:
            store.revert(slug, reason="request withdrawn")
        return {"slug": slug} | self._state(f"revert-{number:02d}", self._others, False)

    @property
    def _others(self) -> frozenset[int]:
        return frozenset(range(self.plan.count)) - {self.plan.revert - 1}

    def _rebase(self) -> dict[str, Any]:
        """What the revert left stale, or took away with it, trained again; and what that costs."""
        number, costs = self.plan.revert, []
        others = [n for n in range(1, self.plan.count + 1) if n != number]
        if self.policy == "consolidated" and others:
            label = f"rebase-{self.plan.count}"
            costs.append(self._train(label, self._joined(others), on_stack=False)["cost"])
        if self.policy == "on-stack":
            store = self._store()
            stale = [n for n in others if n > number]
            old = {n: self.slug(f"request-{n}") for n in stale}
            for n in reversed(stale):  # children before their parents
                if store.get(old[n]).active:
                    store.revert(old[n], reason="rebase")
            for n in stale:
                earlier = [m for m in others if m < n]
                made = self._train(
                    f"rebase-{n}",
                    self.plan.requests[n - 1].request,
                    on_stack=bool(earlier),
                    guard=self._rows(earlier),
                    replaces=[old[n]],
                )
                costs.append(made["cost"])
        name = f"rebase-{number:02d}"
        return {"trained": len(costs), "cost": _sum(costs)} | self._state(name, self._others, True)


def _cost(steps: int, config: UnlearnConfig, n_forget: int) -> dict[str, Any]:
    return {"steps": steps, "pairs": steps * config.train.batch_size(n_forget)}


def _sum(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Costs added up; seconds are None where those of one part are unknown."""
    seconds = [cost["seconds"] for cost in costs]
    whole = None if None in seconds else sum(seconds)
    names = ("steps", "pairs", "bytes")
    return {name: sum(cost[name] for cost in costs) for name in names} | {"seconds": whole}
