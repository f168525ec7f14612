"""One card per adapter, stack or merged model: what its forgetting stands up to.

Every attack is bounded by its settings. With a folder each result is a part file whose name holds
what it depends on (weights, rows, settings, versions), so the same call goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.environment import versions
from adapters.errors import UserError
from evaluation.logs.records import SETS, EvalLog, row_json
from evaluation.metrics.summary import summarise
from evaluation.protocols import DEFAULT, protocol_named
from evaluation.robustness import wordings as attacks
from evaluation.robustness.kept import Kept
from evaluation.robustness.quantisation import QUANTISED, Subject, Workplace
from evaluation.robustness.relearning import probabilities, recovery, relearn, split_rows
from evaluation.robustness.sampling import LEAKED_ROUGE, Draws, best_of, row_recalls
from evaluation.robustness.settings import Settings
from evaluation.robustness.verdicts import verdicts
from evaluation.suite import EvalData, evaluate

if TYPE_CHECKING:
    from evaluation.robustness.quantisation import Loaded
    from evaluation.robustness.relearning import Split
    from evaluation.suite import Effort, OnProgress
    from unlearner.request.rows import Row

KIND, SCHEMA = "unlearner-robustness", 1
CARD_FILE = "robustness.json"
STATE_KEYS = (
    "forget_quality", "forget_quality_log10", "ks", "ks_interval", "log_r_shift", "direction",
    "model_utility", "forget_answer_prob", "forget_nll", "forget_rouge_l_recall",
    "retain_answer_prob", "n",
)  # fmt: skip


def robustness(
    subject: Subject,
    data: EvalData,
    settings: Settings | None = None,
    *,
    split: str,
    protocol: str = DEFAULT,
    retain_log: EvalLog | None = None,
    limit: int | None = None,
    out: Path | None = None,
    on_progress: OnProgress | None = None,
    effort: Effort | None = None,
) -> dict[str, Any]:
    """The card: states, relearning, sampling, paraphrase, drop, and a verdict on each.

    Nothing of the store or of the models is changed. An attack that was not asked for is empty.

    Args:
        subject: what is attacked.
        data: the four sets; the attacks use the forget rows.
        settings: how hard each attack tries.
        split: name of the forget split, for the card.
        protocol: of the states' figures.
        retain_log: reference of forget quality.
        limit: only the first so many rows of each set.
        out: folder of the parts, and of the merged weights while the work lasts.
        on_progress: called with a label, done and all.
        effort: sizes of batches.

    Raises:
        UserError: an unknown state or attack, too few rows, rows that differ from the reference's.
    """
    settings = settings or Settings()
    states = settings.states or subject.states
    rows = len(data.forget[: protocol_named(protocol).max_rows][:limit])
    _check(subject, rows, settings, states)
    kept = Kept(out / "parts" if out else None, _key(subject))
    with Workplace(subject, out) as place:
        work = _Card(
            place, data, settings, protocol_named(protocol).name, retain_log, limit, kept,
            on_progress or _silent, effort,
        )  # fmt: skip
        wanted = settings.attacks
        card: dict[str, Any] = {
            "kind": KIND,
            "schema": SCHEMA,
            "base": subject.base.name,
            "adapters": [slug for slug, _ in subject.stack],
            "split": split,
            "protocol": work.protocol,
            "limit": limit,
            "states": work.states(states) if "states" in wanted else [],
            "relearning": work.relearning() if "relearn" in wanted else {},
            "sampling": work.sampling() if "sample" in wanted else {},
            "paraphrase": work.paraphrase() if "paraphrase" in wanted else [],
            "drop": work.drop() if "drop" in wanted else {},
        }
    return {
        **card,
        "verdicts": verdicts(card),
        "settings": _settings(subject, settings, states),
        "versions": versions(),
        "seconds": sum(kept.seconds),
    }


def _silent(label: str, done: int, total: int) -> None:
    """Nobody watches."""


def _check(subject: Subject, rows: int, settings: Settings, states: Sequence[str]) -> None:
    unknown = [state for state in states if state not in subject.states]
    if unknown:
        raise UserError(
            f"There is no state '{unknown[0]}' of this model.",
            f"Choose among {', '.join(subject.states)}.",
        )
    quantised = [state for state in states if state in QUANTISED and "states" in settings.attacks]
    if quantised and find_spec("bitsandbytes") is None:
        raise UserError(
            f"The state {quantised[0]} needs the package bitsandbytes.",
            "Install it with `pip install unlearner[quant]`, or name other --states.",
        )
    if "relearn" in settings.attacks and rows < 2:
        raise UserError(
            "Relearning needs two forget rows at least: one to train on, one to get back.",
            "Give more rows, or leave `relearn` out of --attacks.",
        )


def _key(subject: Subject) -> Any:
    packages = {name: found for name, found in versions().items() if name != "unlearner"}
    return [subject.identity, packages]


def _settings(subject: Subject, settings: Settings, states: Sequence[str]) -> dict[str, Any]:
    return {
        **asdict(settings),
        "states": list(states),
        "stack": [list(one) for one in subject.stack],
        "merged": None if subject.merged is None else str(subject.merged),
        "retrain": subject.retrain,
        "template": subject.template,
        "base_digest": subject.identity["base"],
        "leaked_rouge_l_recall": LEAKED_ROUGE,
    }


@dataclass(frozen=True)
class _Card:
    """The attacks of one card."""

    place: Workplace
    data: EvalData
    settings: Settings
    protocol: str
    retain_log: EvalLog | None
    limit: int | None
    kept: Kept
    on_progress: OnProgress
    effort: Effort | None

    @property
    def forget(self) -> list[Row]:
        """The forget rows that are attacked."""
        rows = list(self.data.forget)[: protocol_named(self.protocol).max_rows]
        return rows[: self.limit]

    def states(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """The figures of every form, measured alike."""
        rows = {name: [asdict(row) for row in found] for name, found in self.data.sets.items()}
        depends = [rows, self.protocol, self.limit, _reference(self.retain_log)]
        return [
            {
                "name": name,
                **self.kept.result(f"state-{name}", depends, partial(self._state, name)),
            }
            for name in names
        ]

    def _state(self, name: str) -> dict[str, Any]:
        with self.place.loaded(name) as loaded:
            log = evaluate(
                *loaded,
                self.data,
                protocol=self.protocol,
                retain_log=self.retain_log,
                limit=self.limit,
                key=json.dumps([self.kept.key, name], sort_keys=True),
                resume_dir=self.kept.folder,
                on_progress=lambda label, *counts: self.on_progress(f"{name}: {label}", *counts),
                effort=self.effort,
            )
        figures = summarise(log, self.retain_log, protocol=self.protocol)
        return {key: figures[key] for key in STATE_KEYS}

    def relearning(self) -> dict[str, Any]:
        """The curve of the merged weights, of the control, and where Origin stands."""
        split = split_rows(self.forget, self.settings.relearning)
        asked = asdict(self.settings.relearning)
        depends = [[_pair(row) for row in rows] for rows in split]
        place = self.place

        def attack(state: str, name: str) -> dict[str, Any]:
            plan = self.settings.relearning.settled(place.weights(state))
            with place.loaded(state, float32=plan.method == "full") as loaded:
                return {
                    "learning_rate": plan.learning_rate,
                    "with": plan.method,
                    "points": relearn(loaded, split, plan, self._steps(name, split)),
                }

        def bare() -> dict[str, Any]:
            with place.loaded("origin") as loaded:
                return probabilities(loaded, split, 0)

        found = self.kept.result(
            "relearn-unlearned", [depends, asked], lambda: attack("merged", "unlearned")
        )
        curves = [{"name": "unlearned", "points": found["points"]}]
        if place.subject.retrain:
            control = self.kept.result(
                "relearn-retrain",
                [depends, asked, place.subject.retrain_identity],
                lambda: attack("retrain", "retrain"),
            )
            curves.append({"name": "retrain", "points": control["points"]})
        origin = self.kept.result("relearn-origin", depends, bare)
        return {
            "share": self.settings.relearn_share,
            "rows_seen": len(split.seen),
            "rows_unseen": len(split.unseen),
            "learning_rate": found["learning_rate"],
            "with": found["with"],
            "curves": [*curves, {"name": "origin", "points": [origin]}],
            "recovery": {c["name"]: recovery(c["points"], origin) for c in curves},
        }

    def _steps(self, name: str, split: Split) -> Callable[[int, int], None]:
        """Progress of an attack in rows trained on, as everything else counts rows."""
        rows = len(split.seen)
        return lambda done, total: self.on_progress(f"relearning {name}", done * rows, total * rows)

    def sampling(self) -> dict[str, Any]:
        """Best of n for the unlearned model and the control."""
        rows = attacks.spread_rows(self.forget, self.settings.sample_rows)
        budget = protocol_named(self.protocol).decoding.max_total or 200
        draws = replace(self.settings.draws, max_total=budget)
        depends = [[_pair(row) for row in rows], asdict(draws)]
        subject = self.place.subject
        curves = []
        for name, state in (("unlearned", subject.unlearned), ("retrain", "retrain")):
            if name == "retrain" and not subject.retrain:
                continue
            weights = subject.retrain_identity if name == "retrain" else state
            recalls = self._recalls(name, state, rows, draws, [depends, weights])
            curves.append({"name": name, "points": best_of(recalls, draws.samples)})
        return {
            "samples": draws.samples,
            "temperature": draws.temperature,
            "rows": len(rows),
            "curves": curves,
        }

    def _recalls(
        self, name: str, state: str, rows: list[Row], draws: Draws, depends: Any
    ) -> list[list[float]]:
        with self.place.when_needed(state) as model:

            def ask(i: int) -> list[float]:
                found = row_recalls(model(), rows[i], draws)
                self.on_progress(f"sampling {name}", i + 1, len(rows))
                return found

            return self.kept.rows(f"sample-{name}", depends, len(rows), ask)

    def paraphrase(self) -> list[dict[str, Any]]:
        """Every form asked of the base and of the unlearned model."""
        rows = attacks.spread_rows(self.forget, self.settings.paraphrase_rows)
        asked = [[*_pair(row), row.paraphrased_question] for row in rows]
        found = [
            self._forms(state, rows, asked) for state in ("origin", self.place.subject.unlearned)
        ]
        return attacks.side_by_side(*found)

    def _forms(self, state: str, rows: list[Row], asked: Any) -> list[dict[str, Any] | None]:
        with self.place.when_needed(state) as model:
            return [
                self.kept.result(
                    f"paraphrase-{state}-{form.name}",
                    [asked, list(form)],
                    partial(self._ask, model, form, rows, state),
                )
                for form in attacks.FORMS
            ]

    def _ask(
        self, model: Callable[[], Loaded], form: attacks.Form, rows: list[Row], state: str
    ) -> dict[str, Any] | None:
        report = attacks.under(f"{state}, {form.name}", self.on_progress)
        return attacks.ask(model(), form, rows, on_progress=report, effort=self.effort)

    def drop(self) -> dict[str, Any]:
        """The adapter switched off."""
        if not self.place.subject.stack:
            return {"applies": False}
        rows = self.forget
        return self.kept.result(
            "drop",
            [_pair(row) for row in rows],
            lambda: attacks.drop(self.place, rows, self.on_progress),
        )


def _pair(row: Row) -> list[str]:
    return [row.question, row.answer]


def _reference(log: EvalLog | None) -> str | None:
    """Digest of the reference's rows."""
    if log is None:
        return None
    rows = {
        name: [row_json(row) for row in log.sets[name].rows] for name in SETS if name in log.sets
    }
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
