"""Searches the settings of a forget request.

The search is Optuna's TPE. Every trial trains one adapter on the bare base and is measured by
`evaluation.tuning.probe` without generating answers; a trial that falls behind is stopped early.
The settings with the lowest loss are then trained for every seed and evaluated in full: they were
chosen on the first seed, the others are held out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from adapters.environment import free_memory
from adapters.errors import Diverged, UserError
from adapters.store.store import AdapterStore
from evaluation.cache import key_of
from evaluation.experiments.systems import (
    Measured,
    Report,
    base_inputs,
    forget_and_measure,
    measure,
    table_rows,
)
from evaluation.logs import read_log
from evaluation.logs.records import write_json
from evaluation.suite import load_eval_data
from evaluation.tuning.probe import (
    FORMULA,
    KEPT_UTILITY,
    NLL_WITHIN,
    Look,
    NotFinite,
    Probe,
    loss_of,
    thinned,
)
from unlearner.config import UnlearnConfig, make_config
from unlearner.request.rows import Request
from unlearner.run import RunOptions, unlearn
from unlearner.tokens.prompts import Template, prompt_format

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

# Shares of a training after which a trial is looked at; at each but the last it may be stopped.
LOOKS = (0.4, 0.7, 1.0)
STUDY_FILE = "study.journal"
FORGOTTEN = 0.5


class Range(NamedTuple):
    """Values a setting may take: `low` to `high` (whole numbers if both are), or `choices`."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[int, ...] = ()


# What is searched. `margin` gives gamma: gamma = beta * margin * (Retrain's forget NLL), since
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
    """One search: what is varied, on which request, and for how long.

    Attributes:
        split: of the evaluation.
        base: the Origin.
        reference_log: evaluation log of Retrain on this split.
        out: folder of study, stores, logs and `tune.json`.
        data: folder of TOFU's JSON lines, else the hub.
        fixed, space: settings that are not searched, and those that are.
        trials: how many in all, those of an earlier run of the same search included.
        minutes: no trial begins later than this.
        seeds: of training; the search uses the first, the others are held out.
        limit: evaluate the final adapters on at most this many rows of each set.
        refusals: for objectives that need them.
        words: the `unlearner forget` command of this request, without its settings.
    """

    request: Request
    split: str
    base: BaseSpec
    reference_log: Path
    out: Path
    data: Path | None = None
    objective: str = "simnpo"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Range] = field(default_factory=lambda: dict(SPACE))
    trials: int = 20
    minutes: float = 30.0
    seeds: tuple[int, ...] = (42, 43, 44)
    limit: int | None = None
    template: Template = "auto"
    system: str | None = None
    refusals: tuple[str, ...] = ()
    words: tuple[str, ...] = ("unlearner", "forget")

    @property
    def what(self) -> Measured:
        """How the final adapters are measured."""
        return Measured(
            self.data, self.split, limit=self.limit, template=self.template, system=self.system
        )

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What every training and measurement of the search depends on, for cache keys."""
        return {
            "request": self.request,
            "base": base_inputs(self.base),
            "template": self.what.prompts,
            "refusals": self.refusals,
            "reference": self.reference_log,
            "rows": load_eval_data(self.split, self.data),
        }

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
    """The trials, the chosen settings and their figures on every seed; also in `out/tune.json`.

    With an empty `space` nothing is searched: the given settings are measured on every seed.

    Raises:
        UserError: Optuna is not installed, no trial finished, a reference of other rows.
    """
    optuna = _optuna() if run.space else None
    started = time.monotonic()
    run.out.mkdir(parents=True, exist_ok=True)
    report({"event": "stage", "text": "Looking at Origin"})
    search = _open(run)
    study = None
    if optuna is not None:
        study = _study(optuna, run)
        while len(study.trials) < run.trials and time.monotonic() - started < 60 * run.minutes:
            report({"event": "stage", "text": f"Trial {len(study.trials) + 1} of {run.trials}"})
            _try(optuna, study, run, search, report)
        if all(trial.state.name != "COMPLETE" for trial in study.trials):
            raise UserError(
                f"None of the {len(study.trials)} trials finished.",
                "Give it more --minutes or more --trials.",
            )
    result = _result(run, search, study, report)
    result["seconds"] = time.monotonic() - started
    write_json(run.out / "tune.json", result)
    return result


@dataclass(frozen=True)
class _Search:
    """What all trials share: the probe, its figures of Origin, and Retrain's forget NLL."""

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
    fmt = prompt_format(load_tokenizer(run.base.name, run.base.revision), run.template, run.system)
    data = thinned(load_eval_data(run.split, run.data))
    probe = Probe(fmt, data, read_log(run.reference_log))
    origin = probe.look(load_base(run.base))
    return _Search(probe, origin, origin.forget_nll / origin.nll_ratio)


def _study(optuna: Any, run: Tuning) -> Study:
    """The study of exactly this search: any other input makes another one in the same file."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    searched = {"objective": run.objective, "fixed": run.fixed, "space": run.space}
    study: Study = optuna.create_study(
        study_name=key_of(**searched, seed=run.seeds[0], loss=FORMULA, **run.inputs),
        storage=JournalStorage(JournalFileBackend(str(run.out / STUDY_FILE))),
        load_if_exists=True,
    )
    # With the same seed at every start the sampler would draw the same settings again.
    study.sampler = optuna.samplers.TPESampler(
        seed=run.seeds[0] + len(study.trials), multivariate=True, n_startup_trials=6
    )
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
    state = optuna.trial.TrialState
    for trial in study.get_trials(states=(state.RUNNING,)):  # a killed run left them unfinished
        study.tell(trial.number, state=state.FAIL)
    return study


def _suggest(trial: Trial, space: Mapping[str, Range]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, values in space.items():
        if values.choices:
            settings[name] = trial.suggest_categorical(name, values.choices)
        elif name in WHOLE:
            settings[name] = trial.suggest_int(name, int(values.low), int(values.high))
        else:
            settings[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
    return settings


def _try(optuna: Any, study: Study, run: Tuning, search: _Search, report: Report) -> None:
    """Trains and measures one trial, and tells the study its loss."""
    trial = study.ask()
    config = run.config(_suggest(trial, run.space), search.retrain_nll, run.seeds[0])
    trial.set_user_attr("settings", config.to_json())
    started = time.monotonic()
    looks: list[dict[str, Any]] = []

    def tell(step: int, steps: int, look: Look) -> None:
        loss = loss_of(look, search.origin)
        looks.append({"step": step, "steps": steps, "loss": loss, **asdict(look)})
        trial.set_user_attr("looks", looks)
        report({"event": "look", "text": look_text(trial.number + 1, looks[-1])})
        trial.report(loss, len(looks))
        if step < steps and trial.should_prune():
            raise optuna.TrialPruned

    outcome: dict[str, Any] = {}
    try:
        train_once(run, config, search.probe, tell, report)
        outcome["values"] = looks[-1]["loss"]
    except optuna.TrialPruned:
        outcome["state"] = optuna.trial.TrialState.PRUNED
    except (NotFinite, Diverged) as error:  # these settings break the model
        trial.set_user_attr("reason", str(error))
        outcome["state"] = optuna.trial.TrialState.FAIL
    trial.set_user_attr("seconds", time.monotonic() - started)
    study.tell(trial, **outcome)


def train_once(
    run: Tuning,
    config: UnlearnConfig,
    probe: Probe,
    tell: Callable[[int, int, Look], None],
    report: Report,
) -> None:
    """Trains one adapter in a temporary store; `tell` gets step, steps and figures at each look.

    It may raise to end the training.
    """

    def after_step(step: int, steps: int, model: Any) -> None:
        if step in {max(1, round(share * steps)) for share in LOOKS}:
            tell(step, steps, probe.look(model))

    free_memory()  # of the trial before
    with tempfile.TemporaryDirectory(prefix=".trial-", dir=run.out) as folder:
        unlearn(
            run.request,
            run.base,
            config,
            AdapterStore.open(Path(folder) / "store", create=True),
            RunOptions(
                on_stack=False, template=run.template, system=run.system, refusals=run.refusals
            ),
            after_step=after_step,
            on_progress=lambda event: report(event) if event.get("event") == "train" else None,
        )


def look_text(number: int, look: Mapping[str, Any]) -> str:
    """A look as one line of text."""
    return (
        f"trial {number}, step {look['step']} of {look['steps']}: loss {look['loss']:.3f}, "
        f"D {look['ks']:.3f}, FQ {look['forget_quality']:.2g}, shift {look['log_r_shift']:+.2f}, "
        f"NLL {look['nll_ratio']:.2f} of Retrain's, retain P {look['retain_answer_prob']:.3f}"
    )


def _result(run: Tuning, search: _Search, study: Study | None, report: Report) -> dict[str, Any]:
    best, trials = (study.best_trial, study.trials) if study is not None else (None, [])
    config = run.config(best.params if best else {}, search.retrain_nll, run.seeds[0])
    report({"event": "stage", "text": "Measuring Origin"})
    log = Path(measure(report, base=run.base, what=run.what, log=run.out / "logs" / "origin.json"))
    origin = table_rows("origin", log, run.reference_log, run.what.protocols)[0]
    rows = [on_seed(run, config, seed, origin, report) for seed in run.seeds]
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
        "origin_look": asdict(search.origin),
        "trials": [
            {
                "trial": trial.number + 1,
                "state": trial.state.name.lower(),
                "searched": trial.params,
                "loss": trial.value if trial.state.name == "COMPLETE" else None,
                **trial.user_attrs,
            }
            for trial in trials
        ],
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


def on_seed(
    run: Tuning, config: UnlearnConfig, seed: int, origin: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """The settings trained with this seed and measured in full, answers and all."""
    report({"event": "stage", "text": f"Training and measuring seed {seed}"})
    seeded = replace(config, train=replace(config.train, seed=seed))
    work = run.out / f"seed-{seed}-{key_of(config=seeded, **run.inputs)[:12]}"
    log = forget_and_measure(
        report,
        requests=[run.request],
        base=run.base,
        config=seeded,
        store=work / "forget-store",
        what=run.what,
        log=work / "log.json",
        how=RunOptions(refusals=run.refusals),
    )
    row = table_rows(f"seed {seed}", Path(log), run.reference_log, run.what.protocols)[0]
    return {**row, "seed": seed, "reached": reached(row, origin), "log": log}


def reached(row: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, bool | None]:
    """Which parts of the goal a measured row reaches; None where a figure is missing.

    FQ above one half, model utility at least 0.97 of Origin's, forget NLL within a tenth of
    Retrain's. Whether the answers are fluent must be read.
    """
    utility, whole = row["model_utility"], origin["model_utility"]
    ratio = row["forget_nll"] / row["retrain_forget_nll"]
    is_unknown = utility is None or whole is None
    return {
        "forget_quality": row["forget_quality"] > FORGOTTEN,
        "model_utility": None if is_unknown else utility >= KEPT_UTILITY * whole,
        "forget_nll": 2 - NLL_WITHIN <= ratio <= NLL_WITHIN,
    }


def setting_words(config: UnlearnConfig) -> list[str]:
    """The flags of `unlearner forget` that give exactly these settings."""
    name = config.objective.name
    usual = make_config(name).to_json()
    words = ["--objective", name]
    for part, settings in config.to_json().items():
        for key, value in settings.items():
            if key == "name" or value == usual[part][key]:
                continue
            flag = "--" + key.replace("_", "-")
            text = ",".join(value) if isinstance(value, list | tuple) else str(value)
            words += [flag] if value is True else [flag, text]
    return words
