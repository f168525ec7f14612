from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from adapters.errors import Diverged, StoreCorrupt
from adapters.lora.stack import add_trainable, base_only, parents_only, read_state
from unlearner.config import TrainConfig, UnlearnConfig, default_objective
from unlearner.interrupt import StopRequest
from unlearner.objectives.likelihood import answer_nll
from unlearner.objectives.registry import OBJECTIVES
from unlearner.request.rows import Request
from unlearner.run import lora_config, with_targets
from unlearner.tokens.batch_plan import Pair, Rows, plan_steps
from unlearner.tokens.packing import pack_attention
from unlearner.tokens.prompts import encode_rows, pad_batch, pad_id, prompt_format
from unlearner.training.forward import StepForwards
from unlearner.training.loop import TrainingLoop
from unlearner.training.optimizer import OPTIMIZERS
from unlearner.training.unlearning import UnlearnData, UnlearnTask

Config = Callable[..., UnlearnConfig]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows(base: BaseSpec, request_: Request, refusals: tuple[str, ...]) -> Rows:
    fmt = prompt_format(load_tokenizer(base.name))

    def encoded(pairs: Any) -> Any:
        return encode_rows(fmt, list(pairs), 128, "these")

    return Rows(
        encoded((row.question, row.answer) for row in request_.rows),
        encoded((row.question, row.answer) for row in request_.retain),
        [encoded((row.question, refusal) for refusal in refusals) for row in request_.rows],
    )


@pytest.fixture(scope="module")
def pad(base: BaseSpec) -> int:
    return pad_id(load_tokenizer(base.name))


@dataclass(frozen=True)
class Trained:
    """A finished run: its model, the new adapter's weights and the terms of every step."""

    model: Any
    weights: Tensors
    terms: list[dict[str, float]]


Train = Callable[..., Trained]


@pytest.fixture
def train(rows: Rows, pad: int, fresh_model: Callable[..., Any], tmp_path: Path) -> Train:
    def run(
        config: UnlearnConfig,
        *,
        on_parent: bool = False,
        prepare: Callable[[Any], None] = lambda model: None,
        autocast: torch.dtype | None = None,
    ) -> Trained:
        model = fresh_model(config.lora, on_parent=on_parent)
        prepare(model)
        plan = plan_steps(len(rows.forget), len(rows.retain), len(rows.refusals[0]), config.train)
        parents = ("parent",) if on_parent else ()
        task = UnlearnTask(model, UnlearnData(rows, plan, pad, parents=parents), config)
        events: list[dict[str, Any]] = []
        TrainingLoop(
            model, task, config.train, tmp_path, report=events.append, autocast=autocast
        ).run(StopRequest())
        terms = [{k: v for k, v in event.items() if k.endswith("_loss")} for event in events]
        return Trained(model, new_weights(model), terms)

    return run


def new_weights(model: Any) -> Tensors:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".new." in n}


def difference(one: Tensors, other: Tensors) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# How a step is divided


@pytest.mark.parametrize("objective", ["simnpo", "npo", "kl", "dpo", "rmu", "undial"])
def test_a_step_is_the_same_however_it_is_divided(
    objective: str, train: Train, quick: Config
) -> None:
    # SGD shows the gradient itself; AdamW would hide a wrong factor.
    settings = {"optim": "sgd", "learning_rate": 0.2, "num_train_epochs": 3}
    if objective == "rmu":
        settings |= {"rmu_layer": 1, "retain_weight": 1.0}
    whole = train(quick(objective, **settings))
    divisions = ((4, 2), (5, 2), (1, 8)) if objective == "simnpo" else ((5, 2),)
    for micro, accumulation in divisions:
        parts = train(
            quick(
                objective,
                **settings,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=accumulation,
            )
        )
        moved = max(float(w.abs().max()) for name, w in whole.weights.items() if "lora_B" in name)
        assert moved > 1e-3
        assert difference(whole.weights, parts.weights) < 2e-5 * moved, (micro, accumulation)
        assert len(parts.terms) == len(whole.terms) == 3
        for one, other in zip(whole.terms, parts.terms, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_dividing_a_step_changes_nothing_with_adamw_either(train: Train, quick: Config) -> None:
    whole = train(quick(num_train_epochs=5))
    parts = train(
        quick(num_train_epochs=5, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    )
    moved = max(float(w.abs().max()) for name, w in whole.weights.items() if "lora_B" in name)
    assert difference(whole.weights, parts.weights) < 1e-2 * moved


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_toward_what_it_wants(
    objective: str, train: Train, quick: Config, rows: Rows, pad: int
) -> None:
    # The published c and weight of RMU are those of a 7B model.
    own = {"rmu_layer": 1, "retain_weight": 1.0} if objective == "rmu" else {}
    run = train(quick(objective, num_train_epochs=6, **own))
    assert all(math.isfinite(v) for terms in run.terms for v in terms.values())
    forget = pad_batch(rows.forget, pad)
    with torch.no_grad():
        after = answer_nll(run.model.eval(), forget).per_token
        with base_only(run.model):
            before = answer_nll(run.model, forget).per_token
    # Every objective but these two raises the NLL of the true answers by a lot.
    assert (after - before).mean() > (0.01 if objective in ("idk", "simnpo-readme") else 0.5)
    # SatImp's value comes back to 0 once a token is forgotten: it tells nothing.
    assert objective == "satimp" or run.terms[-1]["forget_loss"] < run.terms[0]["forget_loss"]
    # At the first step the retain rows are known, and the model still is its own reference.
    alone = objective in ("grad_ascent", "undial", "ceu")
    known = 1e-6 if alone or objective in ("kl", "rmu") else 0.5
    assert 0 <= run.terms[0]["retain_loss"] < known
    assert (run.terms[-1]["retain_loss"] == 0) == alone


# The reference


def batch_of(rows: Rows, objective: str, pad: int) -> Tensors:
    pairs = [Pair(i, i, i % 3) for i in range(8)]
    return pad_batch(
        [row for name in OBJECTIVES[objective].streams for row in rows.stream(name, pairs)], pad
    )


@pytest.mark.parametrize("on_parent", [False, True])
def test_at_step_zero_the_model_is_its_own_reference(
    on_parent: bool, fresh_model: Any, rows: Rows, pad: int, quick: Config
) -> None:
    model = fresh_model(quick().lora, on_parent=on_parent).train()
    parents = ["parent"] if on_parent else []
    for objective in ("npo", "dpo"):
        config = default_objective(objective)
        step = StepForwards(
            model, batch_of(rows, objective, pad), OBJECTIVES[objective].streams, parents
        )
        terms = OBJECTIVES[objective].terms(step, config)
        expected = torch.full((8,), 2 * math.log(2) / config.beta)
        torch.testing.assert_close(terms.forget, expected, rtol=1e-5, atol=0)
    step = StepForwards(model, batch_of(rows, "kl", pad), OBJECTIVES["kl"].streams, parents)
    kept = OBJECTIVES["kl"].terms(step, default_objective("kl")).retain
    assert kept.abs().max() < 1e-6
    # The model is left as it was found: in training, with the new adapter on and alone trainable.
    assert model.training
    state = read_state(model)
    assert (state.active, state.trainable) == ((*parents, "new"), ("new",))


def test_the_reference_is_the_parents_and_not_the_base(
    fresh_model: Any, rows: Rows, pad: int, quick: Config
) -> None:
    model = fresh_model(quick().lora, on_parent=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".new." in name and "lora_B" in name:
                parameter.normal_(0, 0.05)
    batch = batch_of(rows, "npo", pad)
    forget = {name: tensor[:8] for name, tensor in batch.items()}
    step = StepForwards(model, batch, OBJECTIVES["npo"].streams, ["parent"])
    with torch.no_grad():
        with parents_only(model, ["parent"]):
            parents = answer_nll(model, forget).nll
        with base_only(model):
            bare = answer_nll(model, forget).nll
        now = answer_nll(model, forget).nll
    found = step.reference_nll("forget").nll
    torch.testing.assert_close(found, parents)
    assert not found.requires_grad
    torch.testing.assert_close(step.nll("forget").nll.detach(), now, rtol=1e-5, atol=1e-5)
    for other in (bare, now):
        assert (found - other).abs().min() > 0.05
    # Without parents named, the reference would be the base.
    alone = StepForwards(model, batch, OBJECTIVES["npo"].streams, [])
    torch.testing.assert_close(alone.reference_nll("forget").nll, bare)


def test_streams_share_one_forward_and_rows_keep_their_own_scores(
    fresh_model: Any, rows: Rows, pad: int, quick: Config
) -> None:
    model = fresh_model(quick().lora)
    forwards: list[int] = []
    model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda m, i, out: forwards.append(out.shape[0])
    )
    pairs = [Pair(3, 1, 2), Pair(0, 5, 0)]
    streams = OBJECTIVES["dpo"].streams
    batch = pad_batch([row for s in streams for row in rows.stream(s, pairs)], pad)
    step = StepForwards(model, batch, streams)
    with torch.no_grad():
        scores = {name: step.nll(name) for name in streams}
        found = {name: step.answers(name).at for name in streams}
        assert forwards == [6]
        for name in streams:
            alone = answer_nll(model, pad_batch(rows.stream(name, pairs), pad))
            torch.testing.assert_close(scores[name].nll, alone.nll, rtol=1e-5, atol=1e-5)
            assert scores[name].n.tolist() == alone.n.tolist()
            assert found[name].n.tolist() == alone.n.tolist()
            assert found[name].row.unique().tolist() == [0, 1]
            assert len(found[name].targets) == int(alone.n.sum())


# What trains and what does not


@pytest.mark.parametrize("objective", ["npo", "kl", "rmu", "undial"])
def test_parents_and_base_never_change(objective: str, train: Train, quick: Config) -> None:
    before: Tensors = {}

    def remember(model: Any) -> None:
        before.update(
            {n: p.detach().clone() for n, p in model.named_parameters() if ".new." not in n}
        )

    own = {"rmu_layer": 1} if objective == "rmu" else {}
    run = train(quick(objective, **own), on_parent=True, prepare=remember)
    assert any(".parent." in name for name in before)
    for name, parameter in run.model.named_parameters():
        if ".new." not in name:
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name
            assert torch.equal(parameter, before[name]), name
    assert all(float(w.abs().max()) > 0 for n, w in run.weights.items() if "lora_B" in n)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    train: Train, quick: Config
) -> None:
    one, again = train(quick(lora_dropout=0.1)), train(quick(lora_dropout=0.1))
    assert all(torch.equal(one.weights[name], again.weights[name]) for name in one.weights)
    other = train(quick(lora_dropout=0.1, seed=43))
    assert difference(one.weights, other.weights) > 1e-4


@pytest.mark.parametrize(("setting", "layers_again"), [("all", 2), ("2", 1)])
@pytest.mark.parametrize("on_parent", [False, True])
def test_gradient_checkpointing_trains_the_same_adapter(
    setting: str, layers_again: int, on_parent: bool, train: Train, quick: Config
) -> None:
    """Largest difference of a weight 1e-6 after four SGD steps."""
    calls: list[bool] = []

    def count(model: Any) -> None:
        for layer in model.get_base_model().model.layers:
            # Before the forward: the recomputation stops as soon as it has what backward needs.
            layer.mlp.register_forward_pre_hook(lambda m, i: calls.append(True))

    settings = {"optim": "sgd", "learning_rate": 0.2}
    plain = train(quick("npo", **settings), on_parent=on_parent, prepare=count)
    once = len(calls)
    calls.clear()
    saved = train(
        quick("npo", gradient_checkpointing=setting, **settings), on_parent=on_parent, prepare=count
    )
    # Blocks ran again in the backward pass: it was on.
    assert len(calls) == once + layers_again * len(saved.terms)
    assert all(float(w.abs().max()) > 1e-5 for n, w in saved.weights.items() if "lora_B" in n)
    assert difference(plain.weights, saved.weights) < 1e-6
    for one, other in zip(plain.terms, saved.terms, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("checkpointing", ["off", "all", "2"])
def test_an_adapter_that_stands_still_stops_the_run(
    checkpointing: str, train: Train, quick: Config
) -> None:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if ".new." in name and "layers.1.mlp" in name:
                parameter.register_hook(torch.zeros_like)

    with pytest.raises(RuntimeError, match=r"3 lora_B matrices did not move .*layers\.1\.mlp"):
        train(quick(gradient_checkpointing=checkpointing), prepare=freeze)


def test_a_first_step_without_learning_rate_is_not_taken_for_one_that_failed(
    train: Train, quick: Config
) -> None:
    run = train(quick(warmup_ratio=0.5, num_train_epochs=4))
    assert len(run.terms) == 4
    # Step one had learning rate 0: step two saw the same model, with new retain rows.
    assert run.terms[0]["forget_loss"] == pytest.approx(run.terms[1]["forget_loss"], rel=1e-5)
    assert run.terms[2]["forget_loss"] < run.terms[1]["forget_loss"]


# Runs that break, and short ones


def test_a_loss_that_is_not_finite_stops_at_that_step_with_the_cause(
    loop: Any, quick: Config
) -> None:
    """The step before is saved, and the weights are still those of that step."""
    made = loop(quick(num_train_epochs=4))
    real, calls = made.task.accumulate, []

    def accumulate(gradients: Any, batch: Any) -> Any:
        terms = real(gradients, batch)
        calls.append(len(calls))
        return (
            {name: value * math.nan for name, value in terms.items()} if len(calls) > 2 else terms
        )

    made.task.accumulate = accumulate
    with pytest.raises(Diverged, match=r"forget loss of step 3 .* step 2 is saved") as error:
        made.run(StopRequest())
    assert "--learning-rate" in error.value.fix
    assert error.value.exit_code == 1
    assert (made.work / "checkpoint-2").is_dir()
    assert all(torch.isfinite(p).all() for p in made.bare.parameters())


def test_a_gradient_that_is_not_finite_stops_the_run(loop: Any, quick: Config) -> None:
    made = loop(quick(num_train_epochs=4))
    parameter = next(p for p in made.bare.parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match=r"gradient of step 1 .* nothing was saved"):
        made.run(StopRequest())


@pytest.mark.parametrize(("ratio", "steps", "expected"), [(1.0, 1, 0), (0.1, 1, 0), (1.0, 4, 3),
                                                          (0.5, 4, 2), (0.0, 4, 0)])  # fmt: skip
def test_warm_up_is_shorter_than_the_run(ratio: float, steps: int, expected: int) -> None:
    assert TrainConfig(warmup_ratio=ratio).warmup_steps(steps) == expected


def test_a_run_of_one_step_trains(loop: Any, quick: Config) -> None:
    made = loop(quick(num_train_epochs=1, warmup_ratio=1.0))
    made.run(StopRequest())
    assert all(p.detach().any() for n, p in made.bare.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("optim", [*OPTIMIZERS])
def test_every_optimizer_resumes_to_the_same_weights(
    optim: str, loop: Any, quick: Config, tmp_path: Path
) -> None:
    if "adamw_torch" not in optim and optim not in ("sgd", "adafactor"):
        pytest.importorskip("bitsandbytes")
    if "paged" in optim and not torch.cuda.is_available():
        pytest.skip("pages between a GPU and the CPU")
    config = quick(optim=optim, num_train_epochs=4, lora_dropout=0.1)
    whole = loop(config)
    whole.run(StopRequest())
    shutil.rmtree(tmp_path / "run")
    half, stop = loop(config), StopRequest()
    half._after_step = lambda step, steps, model: setattr(stop, "asked", step == 2)
    half.run(stop)
    rest = loop(config)
    rest.load(tmp_path / "run" / "checkpoint-2")
    rest.run(StopRequest())
    weights = [new_weights(run.bare) for run in (whole, rest)]
    assert difference(*weights) == 0.0


def test_a_checkpoint_of_an_earlier_version_is_refused_in_a_sentence(
    loop: Any, quick: Config, tmp_path: Path
) -> None:
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(StoreCorrupt, match="cannot be read") as error:
        loop(quick()).load(tmp_path / "run" / "checkpoint-2")
    assert "--resume" in error.value.fix


# Precision: what a GPU does, on the CPU


def test_fp16_scales_its_loss_and_steps_over_an_overflow(
    train: Train, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card without bf16: float32 adapters, the gradient of float32, no lost run."""
    exact, half = (
        train(quick(optim="sgd", learning_rate=0.2, num_train_epochs=1), autocast=dtype)
        for dtype in (None, torch.float16)
    )
    assert {weight.dtype for weight in half.weights.values()} == {torch.float32}
    moved = max(float(w.abs().max()) for name, w in exact.weights.items() if "lora_B" in name)
    assert 0 < difference(exact.weights, half.weights) < 0.02 * moved
    assert half.terms[0] == pytest.approx(exact.terms[0], rel=0.02)
    large = partial(torch.amp.GradScaler, init_scale=2.0**24)
    monkeypatch.setattr(torch.amp, "GradScaler", large)
    again = train(
        quick(optim="sgd", learning_rate=0.2, num_train_epochs=12), autocast=torch.float16
    )
    losses = [terms["forget_loss"] for terms in again.terms]
    assert losses[0] == losses[1] != losses[-1]  # the first update was skipped
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    ("packed", "checkpointing"),
    [
        (True, "all"),
        (False, "off"),
        pytest.param(True, "off", marks=pytest.mark.slow),
        pytest.param(False, "all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bf16_weights_under_autocast_give_the_losses_of_float32(
    objective: str,
    packed: bool,
    checkpointing: str,
    rows: Rows,
    pad: int,
    base: BaseSpec,
    quick: Config,
    tmp_path: Path,
) -> None:
    """Losses of two steps within 2 %, and the adapter stays float32."""
    own = {"rmu_layer": 1, "retain_weight": 1.0} if objective == "rmu" else {}
    config = quick(objective, num_train_epochs=2, learning_rate=1e-3,
                   gradient_checkpointing=checkpointing, **own)  # fmt: skip
    found = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        loaded: Any = load_base(replace(base, dtype=dtype))
        model = add_trainable(loaded, "new", lora_config(with_targets(config.lora, loaded)), [])
        plan = plan_steps(len(rows.forget), len(rows.retain), len(rows.refusals[0]), config.train)
        task = UnlearnTask(model, UnlearnData(rows, plan, pad, packed), config)
        events: list[dict[str, Any]] = []
        autocast = torch.bfloat16 if dtype == "bfloat16" else None
        with pack_attention(model):
            run = TrainingLoop(
                model, task, config.train, tmp_path, report=events.append, autocast=autocast
            )
            run.run(StopRequest())
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        found.append([[e["forget_loss"], e["retain_loss"]] for e in events])
    exact, half = torch.tensor(found[0]), torch.tensor(found[1])
    # The difference beside the size of the step's loss: a term near 0 has no relative error.
    assert float((exact - half).abs().max() / exact.abs().max()) < 0.02
