"""One adapter's whole life on a tiny random model of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from adapters.base.fingerprint import fingerprint_base
from adapters.base.load import BaseSpec, base_view, load_base
from adapters.errors import BaseMismatch, UserError
from adapters.lora.export import export_serving
from adapters.lora.merge import fold_stack
from adapters.lora.stack import add_trainable, base_only, load_stack, save_adapter
from adapters.lora.targets import check_coverage, default_targets
from adapters.store.manifest import ForgetManifest
from adapters.store.store import AdapterStore
from tests.families import FAMILIES, save_model

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(TOKENS).logits
        return values


def trained(base: Path, out: Path, **view: Any) -> tuple[Path, torch.Tensor, dict[str, Any]]:
    """The folder of an adapter with random weights, the logits with it, and the base's view."""
    model: Any = load_base(BaseSpec(str(base), device="cpu", **view))
    shape = LoraConfig(
        r=2, lora_alpha=4, target_modules=list(default_targets(model)), task_type="CAUSAL_LM"
    )
    model = add_trainable(model, "new", shape, [])
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return save_adapter(model, "new", out), logits(model.eval()), base_view(model)


def publish(store: AdapterStore, folder: Path, base: Path, view: dict[str, Any]) -> Any:
    record = {"name": "tiny", "fingerprint": fingerprint_base(base).to_json(), "view": view}
    return store.publish(folder, ForgetManifest(request_id="0001", base=record))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_trained_stored_stacked_merged_and_exported(
    family: str, store: AdapterStore, tmp_path: Path
) -> None:
    base = save_model(family, tmp_path / "base")
    folder, expected, view = trained(base, tmp_path / "new")
    stored = publish(store, folder, base, view)
    assert stored.manifest.norms.keys() == {*FAMILIES[family][2], "total"}
    store.activate([stored.slug])
    assert store.verify(base=fingerprint_base(base))[0].ok
    bare = load_base(BaseSpec(str(base), device="cpu"))
    without = logits(bare)
    stack = load_stack(bare, store)
    assert torch.equal(logits(stack), expected)
    with base_only(stack):
        assert torch.equal(logits(stack), without)
    merged = fold_stack(base, [(stored.path, 1.0)], tmp_path / "merged")
    assert merged.matrices == 2 * len(FAMILIES[family][2])
    after = logits(load_base(BaseSpec(str(tmp_path / "merged"), device="cpu")))
    assert torch.allclose(after, expected, atol=1e-5)
    assert not torch.allclose(after, without, atol=1e-3)
    again = store.import_folder(stored.path, base)
    assert again.manifest.files == stored.manifest.files
    made = export_serving([(stored.path, 1.0)], tmp_path / "v", target="vllm", base_name="tiny")
    assert torch.allclose(
        logits(load_stack(load_base(BaseSpec(str(base), device="cpu")), store)), expected
    )
    assert made.rank == 2


@pytest.mark.parametrize("family", ["phi", "phi3", "mixtral"])
def test_the_4bit_view_covers_what_loading_in_4_bits_quantises(
    family: str, store: AdapterStore, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    base = save_model(family, tmp_path / "base", hidden_size=64, intermediate_size=64)
    folder, expected, _ = trained(base, tmp_path / "new", load_in_4bit=True)
    fold_stack(base, [(folder, 1.0)], tmp_path / "view", from_4bit_view=True)
    after = logits(load_base(BaseSpec(str(tmp_path / "view"), device="cpu")))
    assert torch.allclose(after, expected, atol=1e-4)


def test_a_checkpoint_without_the_models_prefix_is_merged_under_its_own_names(
    store: AdapterStore, tmp_path: Path
) -> None:
    base = save_model("llama", tmp_path / "base", tie_word_embeddings=True)
    weights = base / "model.safetensors"
    bare = {name.removeprefix("model."): value for name, value in load_file(weights).items()}
    save_file(bare, weights, metadata={"format": "pt"})
    folder, expected, view = trained(base, tmp_path / "new")
    stored = publish(store, folder, base, view)
    fold_stack(base, [(stored.path, 1.0)], tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == bare.keys()
    after = logits(load_base(BaseSpec(str(tmp_path / "merged"), device="cpu")))
    assert torch.allclose(after, expected, atol=1e-5)
    assert store.import_folder(stored.path, base).manifest.files == stored.manifest.files


def test_weights_under_names_that_cannot_be_mapped_are_refused_before_training(
    tmp_path: Path,
) -> None:
    base = save_model("llama", tmp_path / "base")
    model = load_base(BaseSpec(str(base), device="cpu"))
    weights = base / "model.safetensors"
    other = {name.replace("self_attn", "attention"): v for name, v in load_file(weights).items()}
    save_file(other, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no matrix for model\.layers\.0\.self_attn"):
        check_coverage(model, default_targets(model))


def test_an_adapter_of_another_family_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    folder, _, _ = trained(save_model("phi3", tmp_path / "phi3"), tmp_path / "new")
    with pytest.raises(BaseMismatch):
        store.import_folder(folder, save_model("llama", tmp_path / "llama"))
