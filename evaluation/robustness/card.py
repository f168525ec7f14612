"""One card per adapter, stack or merged model: which attacks its forgetting withstands.

Every attack is bounded by its settings. With a folder each finished result is cached, so the same
call continues after an interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adapters.environment import versions
from adapters.errors import UserError
from evaluation.cache import Cache, key_of
from evaluation.inference.scoring import OnProgress, silent
from evaluation.logs.records import EvalLog
from evaluation.metrics.summary import summarise
from evaluation.protocols import DEFAULT, protocol_named
from evaluation.robustness import probe as probes
from evaluation.robustness import wordings as attacks
from evaluation.robustness.people import people_of
from evaluation.robustness.quantisation import QUANTISED, Loaded, Subject, Workplace
from evaluation.robustness.relearning import (
    Method,
    Relearning,
    probabilities,
    recovery,
    relearn,
    split_rows,
)
from evaluation.robustness.sampling import LEAKED_ROUGE, Draws, best_of, row_recalls
from evaluation.robustness.verdicts import verdicts
from evaluation.suite import Effort, EvalData, evaluate
from unlearner.request.rows import Row, spread

KIND, SCHEMA = "unlearner-robustness", 1
ATTACKS = ("states", "relearn", "sample", "paraphrase", "probe", "drop")
CARD_FILE = "robustness.json"
STATE_KEYS = (
    "forget_quality", "forget_quality_log10", "ks", "ks_interval", "log_r_shift", "direction",
    "model_utility", "forget_answer_prob", "forget_nll", "forget_rouge_l_recall",
    "retain_answer_prob", "n",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How hard each attack tries.

    Attributes:
        attacks: some of `ATTACKS`.
        states: which forms are measured; empty for all of the subject's.
        relearn_*: see `relearning.Relearning`.
        samples, temperature, top_p: see `Draws`.
        sample_rows, paraphrase_rows: how many forget rows are used, evenly spaced.
        probe_rows: how many forget and how many retained rows.
        seed: of rows, draws and first weights.
    """

    attacks: tuple[str, ...] = ATTACKS
    states: tuple[str, ...] = ()
    relearn_share: float = 0.1
    relearn_steps: int = 20
    relearn_lr: float | None = None
    relearn_with: Method = "auto"
    samples: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    sample_rows: int = 40
    paraphrase_rows: int = 100
    probe_rows: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [f"there is no attack '{a}'" for a in self.attacks if a not in ATTACKS]
        problems += [] if self.attacks else ["no attack is given"]
        counts = ("relearn_steps", "samples", "sample_rows", "paraphrase_rows", "probe_rows")
        wrong = {name: "below 1" for name in counts if getattr(self, name) < 1}
        if not 0 < self.relearn_share < 1:
            wrong["relearn_share"] = "not between 0 and 1"
        if not 0 < self.top_p <= 1:
            wrong["top_p"] = "not above 0 and at most 1"
        for name in ("temperature", "relearn_lr"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                wrong[name] = "not above 0"
        problems += [f"{name} {getattr(self, name)} is {rule}" for name, rule in wrong.items()]
        if problems:
            raise UserError(
                f"The settings of the attacks are not valid: {'; '.join(problems)}.",
                f"Attacks are {', '.join(ATTACKS)}.",
            )

    @property
    def relearning(self) -> Relearning:
        """Those of the relearning attack."""
        return Relearning(
            self.relearn_share, self.relearn_steps, self.relearn_lr, self.relearn_with, self.seed
        )

    @property
    def draws(self) -> Draws:
        """Those of the sampling attack, except for the length of answers."""
        return Draws(self.samples, self.temperature, self.top_p, self.seed)


@dataclass(frozen=True)
class Examination:
    """All attacks on one subject. Store and models are not changed.

    Attributes:
        subject: what is attacked.
        data: the four sets; the attacks use the forget rows.
        settings: how hard each attack tries.
        split: name of the forget split, for the card.
        protocol, retain_log: of the states' figures.
        limit: at most this many rows of each set.
        out: folder of the cache, and of the merged weights while the attacks run.
        wordings: more ways to ask, see `wordings.read_wordings`.
        on_progress: called with a label, the number done and the total.
        effort: sizes of batches.
    """

    subject: Subject
    data: EvalData
    settings: Settings
    split: str
    protocol: str = DEFAULT
    retain_log: EvalLog | None = None
    limit: int | None = None
    out: Path | None = None
    wordings: Sequence[attacks.Form] = ()
    on_progress: OnProgress = silent
    effort: Effort | None = None

    def card(self) -> dict[str, Any]:
        """States, relearning, sampling, paraphrase, probe, drop, and a verdict on each.

        An attack that the settings do not name is empty.

        Raises:
            UserError: an unknown state or protocol, too few rows, rows that differ from the
                reference's.
        """
        subject, wanted = self.subject, self.settings.attacks
        self._check()
        with self.place:
            card: dict[str, Any] = {
                "kind": KIND,
                "schema": SCHEMA,
                "base": subject.base.name,
                "adapters": [slug for slug, _ in subject.stack],
                "split": self.split,
                "protocol": self.protocol,
                "limit": self.limit,
                "states": self.states() if "states" in wanted else [],
                "relearning": self.relearning() if "relearn" in wanted else {},
                "sampling": self.sampling() if "sample" in wanted else {},
                "paraphrase": self.paraphrase() if "paraphrase" in wanted else [],
                "probe": self.probe() if "probe" in wanted else {},
                "drop": self.drop() if "drop" in wanted else {},
            }
        return {
            **card,
            "verdicts": verdicts(card),
            "settings": {
                **asdict(self.settings),
                "states": self._states,
                "stack": [list(pair) for pair in subject.stack],
                "merged": None if subject.merged is None else str(subject.merged),
                "retrain": subject.retrain,
                "template": subject.template,
                **({} if subject.system is None else {"system": subject.system}),
                "base_digest": subject.identity["base"],
                "leaked_rouge_l_recall": LEAKED_ROUGE,
            },
            "versions": versions(),
            "seconds": sum(self.cache.seconds),
        }

    @cached_property
    def place(self) -> Workplace:
        """Where the forms of the subject are loaded."""
        return Workplace(self.subject, self.out)

    @cached_property
    def cache(self) -> Cache:
        """The finished results."""
        folder = self.out / "parts" if self.out else None
        return Cache(folder, key_of(subject=self.subject.identity))

    @cached_property
    def forget(self) -> list[Row]:
        """The forget rows of the protocol, up to the limit."""
        return list(self.data.forget)[: protocol_named(self.protocol).max_rows][: self.limit]

    @property
    def _states(self) -> list[str]:
        return list(self.settings.states or self.subject.states)

    def _check(self) -> None:
        unknown = [state for state in self._states if state not in self.subject.states]
        if unknown:
            raise UserError(
                f"This model has no state '{unknown[0]}'.",
                f"Choose among {', '.join(self.subject.states)}.",
            )
        quantised = [state for state in self._states if state in QUANTISED]
        if "states" in self.settings.attacks and quantised and find_spec("bitsandbytes") is None:
            raise UserError(
                f"The state {quantised[0]} needs the package bitsandbytes.",
                "Install it with `pip install unlearner[quant]`, or name other --states.",
            )
        if "relearn" in self.settings.attacks and len(self.forget) < 2:
            raise UserError(
                "Relearning needs at least two forget rows: one to train on, one to recover.",
                "Give more rows, or leave `relearn` out of the attacks.",
            )

    @property
    def _models(self) -> dict[str, tuple[str, str]]:
        """State and identity of the weights of Origin, the unlearned model and the control."""
        subject = self.subject
        models = {
            "origin": ("origin", "origin"),
            "unlearned": (subject.unlearned, subject.unlearned),
        }
        if subject.retrain:
            models["retrain"] = ("retrain", str(subject.retrain_identity))
        return models

    def states(self) -> list[dict[str, Any]]:
        """The figures of every form, measured in the same way."""
        how: dict[str, Any] = {
            "protocol": self.protocol, "limit": self.limit, "retain_log": self.retain_log
        }  # fmt: skip

        def measure(name: str) -> dict[str, Any]:
            with self.place.loaded(name) as loaded:
                log = evaluate(
                    *loaded,
                    self.data,
                    **how,
                    key=f"{name}-{self.cache.key}",
                    resume_dir=self.cache.folder,
                    on_progress=lambda text, *counts: self.on_progress(f"{name}: {text}", *counts),
                    effort=self.effort,
                )
            figures = summarise(log, self.retain_log, protocol=self.protocol)
            return {key: figures[key] for key in STATE_KEYS}

        results = {
            name: self.cache.entry(f"state-{name}", rows=self.data, **how).result(
                partial(measure, name)
            )
            for name in self._states
        }
        return [{"name": name, **figures} for name, figures in results.items()]

    def relearning(self) -> dict[str, Any]:
        """The curves of the merged weights and of the control, and Origin's level."""
        place, settings = self.place, self.settings.relearning
        split = split_rows(self.forget, settings)
        rows = len(split.seen)

        def attack(state: str, name: str, **weights: Any) -> dict[str, Any]:
            def tell(step: int, steps: int) -> None:  # in rows, as all other parts do
                self.on_progress(f"relearning {name}", step * rows, steps * rows)

            def run() -> dict[str, Any]:
                plan = settings.settled(place.weights(state))
                with place.loaded(state, float32=plan.method == "full") as loaded:
                    points = relearn(loaded, split, plan, tell)
                return {"learning_rate": plan.learning_rate, "with": plan.method, "points": points}

            entry = self.cache.entry(f"relearn-{name}", split=split, attack=settings, **weights)
            return dict(entry.result(run))

        def bare() -> dict[str, Any]:
            with place.loaded("origin") as loaded:
                return probabilities(loaded, split, 0)

        unlearned = attack("merged", "unlearned")
        curves = [{"name": "unlearned", "points": unlearned["points"]}]
        if self.subject.retrain:
            control = attack("retrain", "retrain", weights=self.subject.retrain_identity)
            curves.append({"name": "retrain", "points": control["points"]})
        origin = self.cache.entry("relearn-origin", split=split).result(bare)
        return {
            "share": self.settings.relearn_share,
            "rows_seen": rows,
            "rows_unseen": len(split.unseen),
            "learning_rate": unlearned["learning_rate"],
            "with": unlearned["with"],
            "curves": [*curves, {"name": "origin", "points": [origin]}],
            "recovery": {c["name"]: recovery(c["points"], origin) for c in curves},
        }

    def sampling(self) -> dict[str, Any]:
        """Best of n for the unlearned model and the control."""
        rows = spread(self.forget, self.settings.sample_rows)
        budget = protocol_named(self.protocol).decoding.max_total or 200
        draws = replace(self.settings.draws, max_total=budget)
        curves = []
        for name, (state, weights) in self._models.items():
            if name == "origin":
                continue
            with self.place.when_needed(state) as model:

                def ask(i: int, name: str = name, model: Any = model) -> list[float]:
                    recalls = row_recalls(model(), rows[i], draws)
                    self.on_progress(f"sampling {name}", i + 1, len(rows))
                    return recalls

                entry = self.cache.entry(f"sample-{name}", rows=rows, draws=draws, weights=weights)
                recalls = entry.rows(len(rows), ask)
            curves.append({"name": name, "points": best_of(recalls, draws.samples)})
        return {
            "samples": draws.samples,
            "temperature": draws.temperature,
            "rows": len(rows),
            "curves": curves,
        }

    def paraphrase(self) -> list[dict[str, Any]]:
        """Every wording, asked of the base, of the unlearned model and of the control."""
        rows = spread(self.forget, self.settings.paraphrase_rows)
        people = people_of(self.forget)
        forms = (*attacks.FORMS, *self.wordings)
        asked = {form: attacks.asked_in(form, rows, people) for form in forms}

        def ask(model: Callable[[], Loaded], form: attacks.Form, state: str) -> Any:
            def report(label: str, done: int, total: int) -> None:
                part = label.rsplit(": ", 1)[-1]
                self.on_progress(f"{state}, {form.name}: {part}", done, total)

            return attacks.ask(model(), form, asked[form], on_progress=report, effort=self.effort)

        results = []
        for state, weights in self._models.values():
            with self.place.when_needed(state) as model:
                entries = {
                    form: self.cache.entry(
                        f"asked-{state}", rows=variants, bare=form.bare, weights=weights
                    )
                    for form, variants in asked.items()
                }
                results.append(
                    [e.result(partial(ask, model, form, state)) for form, e in entries.items()]
                )
        return attacks.side_by_side(forms, *results)

    def probe(self) -> dict[str, Any]:
        """What a linear probe reads by layer, in base, unlearned model and control."""
        known, asked = (
            spread(probes.can_be_probed(rows[: self.limit]), self.settings.probe_rows)
            for rows in (list(self.data.retain), self.forget)
        )
        if len(known) < probes.FEWEST or not asked:
            return {}

        def measure(name: str, state: str) -> dict[str, Any]:
            with self.place.loaded(state) as loaded:
                retained, forget = (
                    probes.layer_states(
                        loaded, rows, partial(self.on_progress, f"probe {name}: {text}")
                    )
                    for text, rows in (("retained", known), ("forgotten", asked))
                )
            return probes.summary(retained, forget)

        return probes.compared(
            {
                name: self.cache.entry(
                    f"probe-{state}", known=known, asked=asked, weights=weights
                ).result(partial(measure, name, state))
                for name, (state, weights) in self._models.items()
            }
        )

    def drop(self) -> dict[str, Any]:
        """The model with its adapters deactivated."""
        if not self.subject.stack:
            return {"applies": False}
        entry = self.cache.entry("drop", rows=self.forget)
        return dict(entry.result(partial(attacks.drop, self.place, self.forget, self.on_progress)))
