"""Adapters on a live model: exact off, exact return, frozen parents, and PEFT's state read back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base.fingerprint import fingerprint_base
from adapters.base.load import BaseSpec, load_base
from adapters.errors import BaseMismatch, StoreCorrupt, UserError
from adapters.lora import stack
from adapters.lora.format import WEIGHTS_NAME
from adapters.lora.peft_layers import lora_layers
from adapters.store.store import AdapterStore
from tests.families import LLAMA

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9]])


def on_cpu(folder: Path | str, **view: Any) -> Any:
    return load_base(BaseSpec(str(folder), **{"device": "cpu", **view}))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS.to(model.device)).logits.clone()


def lora(rank: int = 2, **options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(LLAMA),
        task_type="CAUSAL_LM",
        **options,
    )


def move(model: Any, name: str) -> None:
    """Give the new adapter an effect, as training would."""
    generator = torch.Generator().manual_seed(len(name))
    for key, parameter in model.named_parameters():
        if f"lora_B.{name}." in key:
            parameter.data.normal_(0, 0.05, generator=generator)


@pytest.fixture
def base(tiny_base: Path) -> Any:
    return on_cpu(tiny_base)


@pytest.fixture
def two(make_adapter: Any) -> Iterator[tuple[Path, Path]]:
    return make_adapter(seed=1, std=0.1), make_adapter(seed=2, std=0.1, rank=3)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param({}, id="float32"),
        pytest.param({"dtype": "bfloat16"}, id="bf16"),
        pytest.param({"load_in_4bit": True}, id="nf4"),
        pytest.param({"device": "cuda"}, id="gpu-bf16", marks=pytest.mark.gpu),
        pytest.param({"device": "cuda", "load_in_4bit": True}, id="gpu-nf4", marks=pytest.mark.gpu),
    ],
)
def test_off_is_the_base_and_the_stack_returns_bit_for_bit(
    view: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    if "load_in_4bit" in view:
        pytest.importorskip("bitsandbytes")
    if view.get("device") == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model: Any = on_cpu(tiny_base, **view)
    bare = logits(model)
    model = stack.add_trainable(model, "first", lora(), [])
    assert torch.equal(logits(model), bare), "a new adapter starts without effect"
    move(model, "first")
    one = logits(model)
    assert not torch.equal(one, bare)
    model = stack.add_trainable(model, "second", lora(3), ["first"])
    assert torch.equal(logits(model), one), "step 0 is the parents"
    move(model, "second")
    both = logits(model)
    for name in ("first", "second"):
        stack.save_adapter(model, name, tmp_path / name)
    assert torch.equal(logits(model), both), "saving changes nothing"
    with stack.parents_only(model, ["first"]):
        assert torch.equal(logits(model), one)
    with stack.base_only(model):
        assert torch.equal(logits(model), bare)
    stack.activate(model, [])
    assert torch.equal(logits(model), bare)

    again: Any = on_cpu(tiny_base, **view)
    for name in ("first", "second"):
        again = stack.attach(again, name, tmp_path / name)
    assert torch.equal(logits(again), bare), "attaching does not activate"
    stack.activate(again, ["first", "second"])
    assert torch.equal(logits(again), both), "the stack reloaded from disk"
    for names, expected in ((["second"], None), (["first"], one), ([], bare)):
        stack.activate(again, names)
        if expected is not None:
            assert torch.equal(logits(again), expected)


def test_plain_peft_loads_what_the_store_holds(
    store: AdapterStore, make_manifest: Any, two: Any, tiny_base: Path
) -> None:
    from peft import PeftModel

    fingerprint = fingerprint_base(tiny_base)
    manifest = make_manifest(base={"name": "tiny", "fingerprint": fingerprint.to_json()})
    stored = store.publish(two[0], manifest)
    plain = PeftModel.from_pretrained(on_cpu(tiny_base), str(stored.path))
    store.activate([stored.slug])
    ours = stack.load_stack(on_cpu(tiny_base), store)
    assert torch.equal(logits(plain), logits(ours))


def test_only_the_new_adapter_learns(base: Any, two: Any) -> None:
    model = stack.attach(base, "parent", two[0])
    model = stack.add_trainable(model, "child", lora(lora_dropout=0.1), ["parent"])
    model.train()

    def trainable() -> set[str]:
        return {key for key, p in model.named_parameters() if p.requires_grad}

    expected = {key for key, _ in model.named_parameters() if ".child." in key}
    assert trainable() == expected
    assert len(expected) == 2 * 7 * 2
    with stack.parents_only(model, ["parent"]):
        assert trainable() == set()
    assert trainable() == expected
    with pytest.raises(RuntimeError), stack.base_only(model):
        raise RuntimeError
    assert trainable() == expected
    assert stack.read_state(model).active == ("parent", "child")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(before[key], p)}
    assert moved == {key for key in expected if "lora_B" in key}


def test_a_parent_is_a_fixed_function_also_in_train_mode(base: Any, make_adapter: Any) -> None:
    folder = make_adapter(seed=1, std=0.1, config={"lora_dropout": 0.5})
    model = stack.attach(base, "parent", folder)
    stack.activate(model, ["parent"])
    evaluated = logits(model)
    model.train()
    assert torch.equal(logits(model), evaluated)


def test_scales_are_linear_and_read_back(base: Any, two: Any) -> None:
    model = stack.attach(stack.attach(base, "left", two[0]), "right", two[1])
    off = stack.activate(model, [])
    assert (off.active, off.scales, off.loaded) == ((), {}, ("left", "right"))
    bare = logits(model)
    state = stack.activate(model, ["right", "left"], {"left": 0.25})
    assert state.active == ("right", "left")
    assert state.scales == {"right": 1.0, "left": 0.25}
    assert state.trainable == ()
    quarter = logits(model)
    stack.activate(model, ["right", "left"])
    assert not torch.equal(logits(model), quarter)
    stack.activate(model, ["right"], {"right": 0.0})
    assert torch.allclose(logits(model), bare, atol=1e-6)
    for names, scales in (
        (["left", "nobody"], {}),
        (["left", "left"], {}),
        (["left"], {"right": 1.0}),
        (["left"], {"left": 1.6}),
        (["left"], {"left": -0.5}),
    ):
        before = stack.read_state(model)
        with pytest.raises(UserError):
            stack.activate(model, names, scales)
        assert stack.read_state(model) == before


def test_state_that_peft_got_wrong_is_reported(base: Any, two: Any) -> None:
    model = stack.attach(stack.attach(base, "left", two[0]), "right", two[1])
    stack.activate(model, ["left"])
    layer = next(lora_layers(model))
    layer.set_adapter(["right"])
    with pytest.raises(StoreCorrupt, match="do not agree"):
        stack.read_state(model)
    model.base_model.set_adapter(["left", "left"])
    with pytest.raises(StoreCorrupt, match="twice"):
        stack.read_state(model)
    stack.activate(model, ["left"])
    layer.scaling["left"] *= 2
    with pytest.raises(StoreCorrupt, match="two strengths"):
        stack.read_state(model)
    stack.activate(model, ["left"])
    model.merge_adapter()
    with pytest.raises(StoreCorrupt, match="merged"):
        stack.read_state(model)


def test_adapters_of_other_shapes_do_not_attach(base: Any, make_adapter: Any) -> None:
    model = stack.attach(base, "whole", make_adapter())
    before = stack.read_state(model), logits(model)
    for layers in (1, 3):
        with pytest.raises(BaseMismatch, match="does not fit this base"):
            stack.attach(model, "other", make_adapter(layers=layers))
    assert stack.read_state(model) == before[0]
    assert torch.equal(logits(model), before[1])
    for name in ("whole", "with.dot", "with/slash", "", "lora_", "default " * 20):
        with pytest.raises(UserError):
            stack.attach(model, name, make_adapter())


def test_attaching_does_not_shift_random_numbers(base: Any, two: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    stack.attach(base, "left", two[0])
    assert torch.equal(torch.rand(2), expected)


def test_reference_of_the_first_step_is_the_parents(base: Any, two: Any) -> None:
    """At step 0 NPO's loss is 2 ln 2 / beta and a KL to the parents is 0, exactly."""
    model = stack.attach(base, "parent", two[0])
    model = stack.add_trainable(model, "child", lora(), ["parent"])
    now = torch.log_softmax(model(TOKENS).logits.detach(), -1)
    with stack.parents_only(model, ["parent"]), torch.no_grad():
        reference = torch.log_softmax(model(TOKENS).logits, -1)
    difference = (now - reference).sum()
    beta = 0.1
    npo = -2 / beta * torch.nn.functional.logsigmoid(beta * difference)
    assert float(npo) == pytest.approx(13.862943611, rel=1e-7)
    assert float((now.exp() * (now - reference)).sum()) == 0.0
    with model.disable_adapter(), torch.no_grad():
        base_only = torch.log_softmax(model(TOKENS).logits, -1)
    assert not torch.equal(base_only, reference), "PEFT's own context is the base, not the parents"


def test_stack_of_the_store_is_verified_before_it_runs(
    store: AdapterStore,
    make_manifest: Any,
    two: Any,
    tiny_base: Path,
    make_tiny_llama: Any,
    tmp_path: Path,
) -> None:
    base = {"name": "tiny", "fingerprint": fingerprint_base(tiny_base).to_json()}
    one = store.publish(two[0], make_manifest("0001", base=base))
    child = store.publish(two[1], make_manifest("0002", base=base, parents=(one.slug,)))
    store.activate(["0001", "0002"], {"0001": 0.5})
    model = on_cpu(tiny_base)
    bare = logits(model)
    running: Any = stack.load_stack(model, store)
    assert stack.read_state(running).scales == {one.slug: 0.5, child.slug: 1.0}
    both = logits(running)
    with pytest.raises(UserError, match=f"{one.slug},{child.slug}"):
        stack.load_stack(running, store, ["0002"])
    stack.load_stack(running, store, ["0002"], allow_missing_parents=True)
    assert stack.read_state(running).active == (child.slug,)
    stack.load_stack(running, store, ["0001", "0002"], {"0001": 0.5})
    assert torch.equal(logits(running), both)
    stack.load_stack(running, store, [])
    assert torch.equal(logits(running), bare)

    twin = make_tiny_llama(tmp_path / "twin", seed=1)
    with pytest.raises(BaseMismatch, match="other weights"):
        stack.load_stack(on_cpu(twin), store)
    weights = child.path / WEIGHTS_NAME
    data = bytearray(weights.read_bytes())
    data[-9] ^= 4
    weights.write_bytes(data)
    with pytest.raises(StoreCorrupt, match="was changed"):
        stack.load_stack(on_cpu(tiny_base), store)
