"""Searches the settings of a forget request, and says what was tried and what holds elsewhere.

The search is Optuna's TPE over the product's own settings. Every trial trains one adapter from the
bare base and is looked at by `evaluation.tuning.probe`: no answers are generated until the end, and
a trial that falls behind is stopped half-way. The settings with the lowest loss are then trained
again for every seed and measured in full: the first seed is the one they were chosen on, the
others are held out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapters.base.fingerprint import fingerprint_base
from adapters.base.load import BaseSpec, load_base, load_tokenizer, resolve_base
from adapters.environment import threads_for
from adapters.errors import UserError
from adapters.store.store import AdapterStore
from evaluation.experiments.systems import Measured, Report, digest, measure, table_rows
from evaluation.logs import read_log
from evaluation.logs.records import EvalLog, write_json
from evaluation.suite import load_eval_data
from evaluation.tuning.chosen import on_seed, setting_words
from evaluation.tuning.probe import FORMULA, Look, Probe, Watch, thinned
from evaluation.tuning.probe import loss as loss_of
from unlearner.config import UnlearnConfig, make_config
from unlearner.request.rows import Request
from unlearner.tokens.prompts import prompt_format

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

# Shares of a training after which a trial is looked at; at each but the last it may be stopped.
LOOKS = (0.4, 0.7, 1.0)
STUDY_FILE = "study.journal"


class Range(NamedTuple):
    """Values a setting may take: `low` to `high` (whole numbers if both are), or `choices`."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[int, ...] = ()


# What is searched. `margin` stands for gamma: gamma = beta * margin * (Retrain's forget NLL), since
# SimNPO's push on a row fades once nll/|y| passes gamma / beta.
SPACE: dict[str, Range] = {
    "learning_rate": Range(1e-4, 4e-3, log=True),
    "forget_weight": Range(0.05, 1.0, log=True),
    "retain_weight": Range(0.5, 2.0, log=True),
    "beta": Range(0.5, 4.0, log=True),
    "margin": Range(0.4, 1.2),
    "lora_r": Range(choices=(8, 16, 32, 64)),
    "num_train_epochs": Range(6, 20),
}
WHOLE = ("lora_r", "num_train_epochs")
MARGIN_OBJECTIVES = ("simnpo", "simnpo-readme")


@dataclass(frozen=True)
class Tuning:
    """What is searched, on what, and for how long.

    Attributes:
        request: forget and retain rows.
        split: of the evaluation.
        base: the Origin.
        retain_log: evaluation log of Retrain on this split.
        out: folder of study, stores, logs and `tune.json`.
        data: folder of TOFU's JSON lines, else the hub.
        objective: whose settings are searched.
        fixed: settings that are not searched.
        space: what is searched.
        trials: so many in all, those of an earlier run of the same search counted in.
        minutes: no trial begins later than this.
        seeds: of training; the first is searched on, the others are held out.
        limit: measure the final adapters on the first so many rows only.
        words: the `unlearner forget` command of this request, without its settings.
    """

    request: Request
    split: str
    base: BaseSpec
    retain_log: Path
    out: Path
    data: Path | None = None
    objective: str = "simnpo"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Range] = field(default_factory=lambda: dict(SPACE))
    trials: int = 20
    minutes: float = 30.0
    seeds: tuple[int, ...] = (42, 43, 44)
    limit: int | None = None
    words: tuple[str, ...] = ("unlearner", "forget")

    def config(self, searched: Mapping[str, Any], retrain_nll: float, seed: int) -> UnlearnConfig:
        """The settings of a trial, `margin` turned into gamma."""
        settings = {**self.fixed, **searched, "seed": seed}
        margin = settings.pop("margin", None)
        if "lora_r" in searched:  # alpha / r stays, so that a rank does not change the step too
            settings.setdefault("lora_alpha", 2 * searched["lora_r"])
        config = make_config(self.objective, **settings)
        if margin is None:
            return config
        gamma = round(config.objective.beta * margin * retrain_nll, 4)
        return replace(config, objective=replace(config.objective, gamma=gamma))


def tune(run: Tuning, report: Report) -> dict[str, Any]:
    """What was tried, what was chosen and how it does on every seed; also in `out/tune.json`.

    With nothing in `space` nothing is searched: the given settings are measured on every seed.

    Raises:
        UserError: Optuna is not installed, no trial came to its end, rows that do not match.
    """
    optuna = _optuna() if run.space else None
    started = time.monotonic()
    run.out.mkdir(parents=True, exist_ok=True)
    report({"event": "stage", "text": "Looking at Origin"})
    search = _open(run)
    study = _searched(optuna, run, search, report, started) if run.space else None
    found = _result(run, search, study, report)
    found["seconds"] = time.monotonic() - started
    write_json(run.out / "tune.json", found)
    return found


def _searched(optuna: Any, run: Tuning, search: _Search, report: Report, started: float) -> Study:
    """The study with its trials, those of an earlier run of the same search among them."""
    study = _study(optuna, run, search)
    _drop_unfinished(optuna, study)
    while len(study.trials) < run.trials and time.monotonic() - started < 60 * run.minutes:
        report({"event": "stage", "text": f"Trial {len(study.trials) + 1} of {run.trials}"})
        _try(optuna, study, run, search, report)
    if not _complete(study):
        raise UserError(
            f"None of the {len(study.trials)} trials came to its end.",
            "Give it more --minutes or more --trials.",
        )
    return study


@dataclass(frozen=True)
class _Search:
    """What all trials share."""

    probe: Probe
    origin: Look
    retrain_nll: float


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError(
            "The search needs Optuna, which is not installed.", "pip install 'unlearner[tune]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _open(run: Tuning) -> _Search:
    """The probe, Origin's look and Retrain's forget NLL."""
    probe = open_probe(run.base, run.split, run.data, read_log(run.retain_log))
    model = load_base(run.base)
    with threads_for(model):
        origin = probe.look(model)
    return _Search(probe, origin, origin.forget_nll / origin.nll_ratio)


def open_probe(base: BaseSpec, split: str, data: Path | None, retain_log: EvalLog) -> Probe:
    """A probe of a base on a TOFU split."""
    fmt = prompt_format(load_tokenizer(base.name, base.revision))
    return Probe(fmt, thinned(load_eval_data(split, data)), retain_log)


def _study(optuna: Any, run: Tuning, search: _Search) -> Study:
    """The study of exactly this search: other rows, base, space or settings make another one."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    request = run.request
    rows = [
        [[row.question, row.answer] for row in part]
        for part in (request.rows, request.retain, request.others)
    ]
    base = fingerprint_base(resolve_base(run.base.name, run.base.revision)).digest
    name = digest(
        run.objective, dict(run.fixed), {k: list(v) for k, v in run.space.items()}, run.seeds[0],
        run.split, rows, base, search.retrain_nll, FORMULA,
    )  # fmt: skip
    study: Study = optuna.create_study(
        study_name=name,
        storage=JournalStorage(JournalFileBackend(str(run.out / STUDY_FILE))),
        load_if_exists=True,
    )
    done = len(study.trials)
    # A sampler that was seeded alike at every start would draw the same settings again.
    study.sampler = optuna.samplers.TPESampler(
        seed=run.seeds[0] + done, multivariate=True, n_startup_trials=6
    )
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
    return study


def _drop_unfinished(optuna: Any, study: Study) -> None:
    """Trials that a killed run left half-way count as failed."""
    state = optuna.trial.TrialState
    for trial in study.get_trials(states=(state.RUNNING,)):
        study.tell(trial.number, state=state.FAIL)


def _complete(study: Study) -> list[FrozenTrial]:
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def _suggest(trial: Trial, space: Mapping[str, Range]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in space.items():
        if values.choices:
            found[name] = trial.suggest_categorical(name, values.choices)
        elif name in WHOLE:
            found[name] = trial.suggest_int(name, int(values.low), int(values.high))
        else:
            found[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
    return found


def _try(optuna: Any, study: Study, run: Tuning, search: _Search, report: Report) -> None:
    """One trial: trained, looked at, told to the study."""
    trial = study.ask()
    config = run.config(_suggest(trial, run.space), search.retrain_nll, run.seeds[0])
    trial.set_user_attr("settings", config.to_json())
    started = time.monotonic()
    looks: list[dict[str, Any]] = []

    def tell(step: int, steps: int, look: Look) -> None:
        loss = loss_of(look, search.origin)
        looks.append({"step": step, "steps": steps, "loss": loss, **look.to_json()})
        trial.set_user_attr("looks", looks)
        report({"event": "look", "text": look_text(trial.number + 1, looks[-1])})
        trial.report(loss, len(looks))
        if step < steps and trial.should_prune():
            raise optuna.TrialPruned

    outcome: dict[str, Any] = {}
    try:
        train_once(run, config, Watch(search.probe, LOOKS, tell), report)
        outcome["values"] = looks[-1]["loss"]
    except optuna.TrialPruned:
        outcome["state"] = optuna.trial.TrialState.PRUNED
    except ValueError as error:  # losses that are not finite: these settings break the model
        trial.set_user_attr("reason", str(error))
        outcome["state"] = optuna.trial.TrialState.FAIL
    trial.set_user_attr("seconds", time.monotonic() - started)
    study.tell(trial, **outcome)


def train_once(run: Tuning, config: UnlearnConfig, watch: Watch, report: Report) -> None:
    """Trains one adapter that nobody keeps."""
    from unlearner.run import unlearn

    with tempfile.TemporaryDirectory(prefix=".trial-", dir=run.out) as folder:
        unlearn(
            run.request,
            run.base,
            config,
            AdapterStore.open(Path(folder) / "store", create=True),
            on_stack=False,
            callbacks=[watch],
            on_progress=lambda event: report(event) if event.get("event") == "train" else None,
        )


def look_text(number: int, look: Mapping[str, Any]) -> str:
    """A look in a line, for people."""
    return (
        f"trial {number}, step {look['step']} of {look['steps']}: loss {look['loss']:.3f}, "
        f"D {look['ks']:.3f}, FQ {look['forget_quality']:.2g}, shift {look['log_r_shift']:+.2f}, "
        f"NLL {look['nll_ratio']:.2f} of Retrain's, retain P {look['retain_answer_prob']:.3f}"
    )


def _result(run: Tuning, search: _Search, study: Study | None, report: Report) -> dict[str, Any]:
    best, trials = (study.best_trial, study.trials) if study is not None else (None, [])
    config = run.config(best.params if best else {}, search.retrain_nll, run.seeds[0])
    what = Measured(run.data, run.split, limit=run.limit)
    report({"event": "stage", "text": "Measuring Origin"})
    log = Path(measure(report, base=run.base, what=what, log=run.out / "logs" / "origin.json"))
    origin = table_rows("origin", log, run.retain_log, what.protocols)[0]
    rows = [on_seed(run, config, seed, what, origin, report) for seed in run.seeds]
    states = [trial.state.name for trial in trials]
    return {
        "kind": "unlearner-tune",
        "schema": 1,
        "tried": len(states),
        "finished": states.count("COMPLETE"),
        "pruned": states.count("PRUNED"),
        "failed": states.count("FAIL"),
        "loss": FORMULA,
        "objective": run.objective,
        "request": run.request.name,
        "retain_rows": len(run.request.retain),
        "split": run.split,
        "space": {name: values._asdict() for name, values in run.space.items()},
        "fixed": dict(run.fixed),
        "retrain_forget_nll": search.retrain_nll,
        "origin_look": search.origin.to_json(),
        "trials": [_trial_json(trial) for trial in trials],
        "origin": origin,
        "chosen": {
            "trial": best.number + 1 if best else None,
            "loss": best.value if best else None,
            "settings": config.to_json(),
            "selected": rows[0],
            "held_out": rows[1:],
        },
        "command": [*run.words, *setting_words(config)],
    }


def _trial_json(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "trial": trial.number + 1,
        "state": trial.state.name.lower(),
        "searched": trial.params,
        "loss": trial.value if trial.state.name == "COMPLETE" else None,
        **trial.user_attrs,
    }
