"""An adapter at another strength as one of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.base.load import BaseSpec, load_base
from adapters.errors import UserError
from adapters.lora import stack
from adapters.lora.format import read_adapter
from adapters.store.derive import scaled
from adapters.store.store import AdapterStore

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits.clone()
    return found


@pytest.mark.parametrize("scale", [0.3, 0.65, 1.5])
def test_it_computes_what_the_original_computes_at_that_scale(
    tiny_base: Path, store: AdapterStore, make_adapter: Any, make_manifest: Any, scale: float
) -> None:
    original = store.publish(make_adapter(seed=1, std=0.1, rank=3), make_manifest("1"))
    made = scaled(store, original.slug, scale)
    model: Any = load_base(BaseSpec(str(tiny_base), device="cpu"))
    model = stack.attach(model, "original", original.path)
    model = stack.attach(model, "made", made.path)
    stack.activate(model, ["original"], {"original": scale})
    expected = logits(model)
    stack.activate(model, ["made"])
    assert torch.allclose(logits(model), expected, atol=2e-6, rtol=2e-6)
    stack.activate(model, ["original"])
    assert (logits(model) - expected).abs().max() > 1e-2


def test_every_weight_is_rounded_once(
    store: AdapterStore, make_adapter: Any, make_manifest: Any
) -> None:
    original = store.publish(make_adapter(seed=1, std=0.1, rank=3), make_manifest("1"))
    old, new = read_adapter(original.path), read_adapter(scaled(store, "1", 0.7).path)
    assert new.config["r"] == new.config["lora_alpha"] == 3
    for a, b in old.modules().values():
        assert np.array_equal(old.header.read(a), new.header.read(a))
        factor = np.float32(0.7 * 2.0)  # alpha / r of the original is 2
        assert np.array_equal(old.header.read(b) * factor, new.header.read(b))


def test_the_record_says_where_it_comes_from(
    store: AdapterStore, publish: Any, make_adapter: Any, make_manifest: Any
) -> None:
    parent = publish("1")
    forget = {"n": 2, "digest": "a" * 64, "kind": "jsonl", "marks": []}
    fields = {
        "parents": (parent.slug,),
        "parent_scales": {parent.slug: 0.5},
        "data": {"forget": forget},
        "label": "request-17",
    }
    original = store.publish(make_adapter(seed=5), make_manifest("2", **fields))
    made = scaled(store, original.slug, 0.65).manifest
    assert made.policy == "derived"
    assert made.origin == {"kind": "scaled", "from": [original.slug], "scales": [0.65]}
    assert made.supersedes == (original.slug,)
    assert (made.parents, made.parent_scales) == ((parent.slug,), {parent.slug: 0.5})
    assert made.parent_sha256 == original.manifest.parent_sha256
    assert made.data == original.manifest.data
    assert made.base == original.manifest.base
    assert made.label == "request-17 at 0.65"
    assert made.lora == {"r": 2, "alpha": 2}
    assert store.get(original.slug).label == "request-17"  # as it was


def test_activating_it_takes_the_originals_place(store: AdapterStore, publish: Any) -> None:
    original = publish("1")
    store.activate([original.slug], {original.slug: 0.8})
    made = scaled(store, original.slug, 0.65)
    assert [one.slug for one in store.active()] == [original.slug]
    store.activate([made.slug])
    assert [(one.slug, one.scale) for one in store.active()] == [(made.slug, 1.0)]
    assert store.get(original.slug).status == "superseded"
    assert all(result.ok for result in store.verify())


@pytest.mark.parametrize(
    ("scale", "problem"),
    [
        (0.0, "does nothing"),
        (1.0, "nothing to publish"),
        (1.6, "outside"),
        (-0.5, "outside"),
        (float("nan"), "outside"),
    ],
)
def test_scales_that_make_no_adapter(
    store: AdapterStore, publish: Any, scale: float, problem: str
) -> None:
    original = publish("1")
    with pytest.raises(UserError, match=problem):
        scaled(store, original.slug, scale)
    assert [one.slug for one in store.list()] == [original.slug]


def test_a_sum_keeps_the_strength_of_parents_outside_of_it(
    store: AdapterStore, publish: Any
) -> None:
    one = publish("0001").slug
    two = publish("0002", parents=(one,), parent_scales={one: 0.5}).slug
    three = publish("0003", parents=(one,), parent_scales={one: 0.5}).slug
    four = publish("0004", parents=(one,)).slug
    summed = store.combine([two, three], label="both")
    assert summed.manifest.parents == (one,)
    assert summed.manifest.parent_scales == {one: 0.5}
    with pytest.raises(UserError, match=r"at the scales 0\.5, 1"):
        store.combine([two, four])
