"""A training that ends where it meets the reference: when, with which weights, and undisturbed."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.base.load import BaseSpec, load_tokenizer
from adapters.errors import Diverged, Interrupted, StoreCorrupt, UserError
from adapters.lora.format import WEIGHTS_NAME
from adapters.store.catalog import StoredAdapter
from adapters.store.store import AdapterStore
from unlearner.config import UnlearnConfig
from unlearner.objectives.likelihood import answer_nll
from unlearner.request.rows import Request
from unlearner.run import RunOptions, unlearn
from unlearner.tokens.packing import pack_attention, plain_attention
from unlearner.tokens.prompts import pad_batch, prompt_format
from unlearner.training.early_stop import EarlyStop, StopAt, Trace, undisturbed

Config = Callable[..., UnlearnConfig]
NEVER = 1e6


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore.open(tmp_path / "store", create=True, timeout=5)


@pytest.fixture(scope="session")
def nll(base: BaseSpec, request_: Request) -> Callable[[Any], float]:
    """Mean forget NLL of a model, drawing random numbers on the way as a careless measure might."""
    fmt = prompt_format(load_tokenizer(base.name))
    batch = pad_batch([fmt.encode(row.question, row.answer) for row in request_.rows], 0)

    def measure(model: Any) -> float:
        torch.rand(3)
        random.random()
        np.random.rand(3)
        assert not torch.is_grad_enabled()
        assert not model.training
        return float(answer_nll(model, batch).per_token.mean())

    return measure


def stop_at(nll: Callable[[Any], float], target: float, every: int = 1) -> StopAt:
    """Ends where the mean NLL passes `target`."""

    def measure(model: Any) -> Mapping[str, float]:
        found = nll(model)
        return {"gap": found - target, "nll_gap": 0.0, "ks": 0.0, "forget_nll": found}

    return StopAt(measure, "gap", "test", every)


def signal_at(step: int) -> Callable[[dict[str, Any]], None]:
    """A progress callback that presses Ctrl-C when `step` is done."""

    def on_progress(event: dict[str, Any]) -> None:
        if event["event"] == "train" and event["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return on_progress


def weights(adapter: StoredAdapter) -> bytes:
    return (adapter.path / WEIGHTS_NAME).read_bytes()


def gaps(events: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(e["step"], e["gap"]) for e in events if e["event"] == "gap"]


# The rule


@pytest.mark.parametrize(
    ("distances", "stopped_at", "kept"),
    [
        ([-1.0, -0.5, -0.1], None, None),
        ([-1.0, -0.5, 0.1], 2, 2),  # this one is nearer
        ([-1.0, -0.1, 0.5], 2, 1),  # the one before is
        ([-1.0, -0.2, 0.2], 2, 2),  # equally near: the later one, which has forgotten more
        ([-1.0, 0.0], 1, 1),  # met exactly
        ([-0.1, 0.9], 1, 1),  # an untrained adapter is never kept
        ([0.3, 0.5, 0.2], None, None),  # it was never below
        ([0.3, -0.2, 0.1], 2, 2),
    ],
)
def test_the_sign_must_turn_upwards(
    distances: list[float], stopped_at: int | None, kept: int | None
) -> None:
    trace = Trace()
    for step, distance in enumerate(distances):
        assert trace.stopped_at is None
        trace.add(step, distance)
    assert (trace.stopped_at, trace.kept) == (stopped_at, kept)


@pytest.mark.parametrize(
    ("distances", "stopped_at", "kept"),
    [
        ([-1.0, -0.5, 0.1, 0.4], None, None),  # reached, and not yet settled
        ([-1.0, -0.5, 0.1, 0.4, -0.2], 4, 4),  # the last one, whatever its distance
        ([0.3, 0.5, 0.2, 0.1, 0.1], None, None),  # it was never below
    ],
)
def test_a_run_may_settle_where_the_sign_has_turned(
    distances: list[float], stopped_at: int | None, kept: int | None
) -> None:
    trace = Trace()
    for step, distance in enumerate(distances):
        assert not trace.add(step, distance, settle=2)
    assert (trace.stopped_at, trace.kept) == (stopped_at, kept)


@pytest.mark.parametrize(
    ("readings", "steps"),
    [
        ([[0, -2.0]], 2),
        ([[0, -2.0], [10, -1.0]], 5),  # .1 a step: ten are left, and half of them may pass
        ([[0, -2.0], [10, -0.1]], 2),
        ([[0, -2.0], [10, -1.9]], 8),  # far, and no longer than four times two
        ([[0, -2.0], [10, -2.1]], 8),
    ],
)
def test_the_next_reading_comes_sooner_where_the_end_is_near(
    readings: list[list[float]], steps: int
) -> None:
    assert Trace(readings).wait(2, 4) == steps
    assert Trace(readings).wait(2, 1) == 2


def test_about_twenty_readings_unless_told_otherwise(nll: Any) -> None:
    counts = [stop_at(nll, 0.0, every=0).steps_between(steps) for steps in (1, 20, 93, 400)]
    assert counts == [1, 1, 5, 20]
    assert stop_at(nll, 0.0, every=7).steps_between(400) == 7


# The trainer


def test_readings_do_not_disturb_the_training(
    request_: Request, base: BaseSpec, quick: Config, nll: Any, tmp_path: Path
) -> None:
    """Dropout draws random numbers in every step, and packs need their attention."""
    config = quick(lora_dropout=0.1, num_train_epochs=5)
    plain = AdapterStore.open(tmp_path / "plain", create=True)
    probed = AdapterStore.open(tmp_path / "probed", create=True)
    events: list[dict[str, Any]] = []
    without = unlearn(request_, base, config, plain)
    with_ = unlearn(
        request_, base, config, probed, stop_at=stop_at(nll, NEVER, 2), on_progress=events.append
    )
    assert weights(with_) == weights(without)
    assert [step for step, _ in gaps(events)] == [0, 2, 4, 5]  # also after the last step
    (note,) = (e["text"] for e in events if e["event"] == "note")
    assert note.startswith("the reference was not reached: too little is forgotten at the end")
    train = with_.manifest.train
    assert (train["stopped_at_step"], train["kept_step"], train["gap_every"]) == (None, 5, 2)
    assert train["gap"] == gaps(events)[-1][1]
    assert train["gap_trace"] == [list(pair) for pair in gaps(events)]
    assert train["steps"] == 5


def test_everything_is_put_back(base: BaseSpec, fresh_model: Any, quick: Config) -> None:
    model = fresh_model(quick().lora)
    model.train()
    inner = next(m for name, m in model.named_modules() if name.endswith("mlp"))
    inner.eval()  # one that differs from the others
    modes = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]

    def careless() -> None:
        with undisturbed(model):
            torch.rand(2), random.random(), np.random.rand(2)
            raise KeyError

    with pytest.raises(KeyError):
        careless()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert torch.is_grad_enabled()


def test_trees_of_answers_get_their_own_attention_inside_packs(
    fresh_model: Any, quick: Config
) -> None:
    model = fresh_model(quick().lora)
    config = model.get_base_model().config
    with pack_attention(model):
        packs = config._attn_implementation
        with plain_attention(model):
            assert config._attn_implementation == "sdpa"
        assert config._attn_implementation == packs != "sdpa"
    with plain_attention(model):
        assert config._attn_implementation == "sdpa"


@pytest.fixture(scope="module")
def whole(
    request_: Request,
    base: BaseSpec,
    quick: Config,
    nll: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, tuple[float, bytes]]:
    """NLL and weights after steps 4 and 5 of eight, each of a run that ends right there."""
    kept: dict[int, tuple[float, bytes]] = {}
    for step in (4, 5):
        store = AdapterStore.open(tmp_path_factory.mktemp("steps") / "store", create=True)
        seen = iter([-1.0] * step + [0.0])
        found: list[float] = []

        def measure(model: Any, seen: Any = seen, found: Any = found) -> Mapping[str, float]:
            found.append(nll(model))
            return {"gap": next(seen)}

        config = quick(num_train_epochs=8)
        made = unlearn(request_, base, config, store, stop_at=StopAt(measure, every=1))
        assert made.manifest.train["stopped_at_step"] == step
        assert found == sorted(found), "the run does not forget steadily"
        kept[step] = (found[-1], weights(made))
    return kept


def test_the_nearer_weights_are_kept_exactly(
    request_: Request,
    base: BaseSpec,
    quick: Config,
    nll: Any,
    whole: dict[int, tuple[float, bytes]],
    tmp_path: Path,
) -> None:
    values = {step: value for step, (value, _) in whole.items()}
    for name, share, kept in (("later", 0.9, 5), ("earlier", 0.1, 4)):
        store = AdapterStore.open(tmp_path / name, create=True)
        target = values[4] + share * (values[5] - values[4])
        events: list[dict[str, Any]] = []
        made = unlearn(
            request_, base, quick(num_train_epochs=8), store,
            stop_at=stop_at(nll, target), on_progress=events.append,
        )  # fmt: skip
        train = made.manifest.train
        assert (train["stopped_at_step"], train["kept_step"], train["steps"]) == (5, kept, 5)
        assert train["gap"] == pytest.approx(values[kept] - target, abs=1e-6)
        assert weights(made) == whole[kept][1]
        rates = [e["learning_rate"] for e in events if e["event"] == "train"]
        assert rates == pytest.approx([1e-2 * (8 - n) / 8 for n in range(1, 6)])  # as planned


def test_readings_are_written_beside_the_steps(
    request_: Request, base: BaseSpec, quick: Config, nll: Any, store: AdapterStore
) -> None:
    lines: list[dict[str, Any]] = []

    def read(event: dict[str, Any]) -> None:
        if event["event"] == "publish":
            (work,) = (store.path / "runs").iterdir()
            lines.extend(map(json.loads, (work / "metrics.jsonl").read_text().splitlines()))

    unlearn(request_, base, quick(), store, stop_at=stop_at(nll, NEVER, 2), on_progress=read)
    assert [(line["event"], line["step"]) for line in lines] == [
        ("gap", 0), ("train", 1), ("train", 2), ("gap", 2), ("train", 3), ("train", 4), ("gap", 4),
    ]  # fmt: skip
    assert all(line["gap"] < 0 < line["forget_nll"] for line in lines if line["event"] == "gap")


def test_an_interrupted_run_stops_at_the_same_weights(
    request_: Request,
    base: BaseSpec,
    quick: Config,
    nll: Any,
    whole: dict[int, tuple[float, bytes]],
    store: AdapterStore,
) -> None:
    """Stopped after the reading whose weights will turn out to be the nearer ones."""
    config = quick(num_train_epochs=8)
    target = whole[4][0] + 0.1 * (whole[5][0] - whole[4][0])
    events: list[dict[str, Any]] = []

    def press(event: dict[str, Any]) -> None:
        events.append(event)
        signal_at(4)(event)

    with pytest.raises(Interrupted, match="after step 4 of 8"):
        unlearn(request_, base, config, store, stop_at=stop_at(nll, target), on_progress=press)
    made = unlearn(
        request_,
        base,
        config,
        store,
        RunOptions(resume=True),
        stop_at=stop_at(nll, target),
        on_progress=events.append,
    )
    assert [step for step, _ in gaps(events)] == [0, 1, 2, 3, 4, 5]  # none was taken twice
    assert made.manifest.train["gap_trace"] == [list(pair) for pair in gaps(events)]
    assert made.manifest.train["kept_step"] == 4
    assert weights(made) == whole[4][1]


def test_a_checkpoint_without_readings_is_measured_where_it_goes_on(
    request_: Request,
    base: BaseSpec,
    quick: Config,
    nll: Any,
    whole: dict[int, tuple[float, bytes]],
    store: AdapterStore,
) -> None:
    config = quick(num_train_epochs=8)
    target = whole[4][0] + 0.1 * (whole[5][0] - whole[4][0])
    with pytest.raises(Interrupted):
        unlearn(
            request_, base, config, store,
            stop_at=stop_at(nll, target), on_progress=signal_at(4),
        )  # fmt: skip
    (kept,) = store.path.glob("runs/*/checkpoint-4/gap.json")
    kept.write_text("{}")
    with pytest.raises(StoreCorrupt, match="damaged"):
        unlearn(
            request_, base, config, store, RunOptions(resume=True), stop_at=stop_at(nll, target)
        )
    kept.unlink()
    made = unlearn(
        request_, base, config, store, RunOptions(resume=True), stop_at=stop_at(nll, target)
    )
    assert [step for step, _ in made.manifest.train["gap_trace"]] == [4, 5]
    assert weights(made) == whole[4][1]


def test_a_stopped_run_whose_publishing_failed_is_not_trained_on(
    request_: Request,
    base: BaseSpec,
    quick: Config,
    nll: Any,
    whole: dict[int, tuple[float, bytes]],
    store: AdapterStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*words: Any) -> None:
        raise UserError("The disk is full.")

    config = quick(num_train_epochs=8)
    stop = stop_at(nll, whole[4][0] + 0.1 * (whole[5][0] - whole[4][0]))
    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "publish", full)
        with pytest.raises(UserError, match="disk is full"):
            unlearn(request_, base, config, store, stop_at=stop)
    events: list[dict[str, Any]] = []
    made = unlearn(
        request_,
        base,
        config,
        store,
        RunOptions(resume=True),
        stop_at=stop,
        on_progress=events.append,
    )
    assert [e["event"] for e in events] == ["load", "probe", "publish"]
    assert weights(made) == whole[4][1]
    assert made.manifest.train["stopped_at_step"] == 5


def test_a_run_with_readings_is_another_run(
    request_: Request, base: BaseSpec, quick: Config, nll: Any, store: AdapterStore
) -> None:
    """Its last checkpoint may hold the weights of an earlier step: no other run goes on from it."""
    with pytest.raises(Interrupted):
        unlearn(
            request_, base, quick(), store,
            stop_at=stop_at(nll, NEVER), on_progress=signal_at(2),
        )  # fmt: skip
    events: list[dict[str, Any]] = []
    unlearn(request_, base, quick(), store, RunOptions(resume=True), on_progress=events.append)
    assert [e["step"] for e in events if e["event"] == "train"] == [1, 2, 3, 4]


def test_a_run_that_starts_beyond_the_reference_says_so(
    request_: Request, base: BaseSpec, quick: Config, nll: Any, store: AdapterStore
) -> None:
    events: list[dict[str, Any]] = []
    made = unlearn(
        request_, base, quick(), store, stop_at=stop_at(nll, 0.0), on_progress=events.append
    )
    assert made.manifest.train["stopped_at_step"] is None
    (note,) = (e["text"] for e in events if e["event"] == "note")
    assert note.startswith("nothing is under-forgotten at the start")


def test_a_reading_that_is_no_number_ends_the_run(
    request_: Request, base: BaseSpec, quick: Config, store: AdapterStore
) -> None:
    with pytest.raises(Diverged, match="The gap after step 0 is not a finite number"):
        unlearn(request_, base, quick(), store, stop_at=StopAt(lambda model: {"gap": float("nan")}))


class Line(torch.nn.Module):
    """One weight, whose distance is given by a function of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = None


@pytest.mark.parametrize(
    ("distance", "before", "kept", "left"),
    [
        (lambda w: w - 0.3, 3, 3.3, 1e-6),  # a straight line
        (lambda w: 2 * w**4 - 0.3, 3, 3.6, 0.06),
        (lambda w: 0.7 * w**0.05 - 0.01, 3, 3, 0.0101),  # the reading before is the nearest
        (lambda w: w - 1e-6, 0, 1, 1.0),  # untrained weights forget nothing
    ],
)
def test_a_run_ends_at_the_nearest_weights_between_two_readings(
    distance: Callable[[float], float], before: int, kept: float, left: float, tmp_path: Path
) -> None:
    model = Line()

    def measure(model: Any) -> Mapping[str, float]:
        return {"target_gap": distance(float(model.weight)), "target": 1.0}

    stop = EarlyStop(StopAt(measure, "target_gap", every=1, refine=3), tmp_path / "log", print)
    stop.begin(before, 10, model)
    with torch.no_grad():
        model.weight.fill_(1.0)
    assert stop.after_step(before + 1, 10, model, {})
    record = stop.record(10)
    assert record["kept_step"] == pytest.approx(kept, abs=0.02)
    assert abs(record["gap"]) <= left
    assert record["gap"] == pytest.approx(distance(float(model.weight)))
    assert isinstance(record["kept_step"], int) == (kept == int(kept))
