"""Finding and loading a base and its tokenizer; what cannot be right is refused with its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base.fingerprint import architecture, fingerprint_base, require_same_base
from adapters.base.load import BaseSpec, base_view, load_base, load_tokenizer, resolve_base
from adapters.errors import UserError

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9]])


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_folders_and_hub_names(tiny_base: Path) -> None:
    assert resolve_base(str(tiny_base)) == tiny_base
    for name in ("/no/such/folder", "a/b/c", "../model", "a b"):
        with pytest.raises(UserError, match="neither a folder nor a hub id"):
            resolve_base(name)
    with pytest.raises(UserError, match="cannot be reached"):  # the suite runs offline
        resolve_base("nobody/no-such-model")


@pytest.mark.parametrize(
    ("options", "view"),
    [
        ({}, {"quantization": "none", "dtype": "float32", "compute_dtype": "float32"}),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "attention": "sdpa"}),
        ({"attention": "eager"}, {"attention": "eager"}),
        ({"load_in_4bit": True}, {"quantization": "nf4", "compute_dtype": "float32"}),
    ],
)
def test_base_is_frozen_and_says_how_it_is_held(
    options: dict[str, Any], view: dict[str, Any], tiny_base: Path
) -> None:
    if "load_in_4bit" in options:
        pytest.importorskip("bitsandbytes")
    model = load_base(BaseSpec(str(tiny_base), device="cpu", **options))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    seen = base_view(model)
    assert json.loads(json.dumps(seen)) == seen
    assert view.items() <= seen.items()


def test_4bit_weights_stay_as_they_are_whatever_is_done_with_them(tiny_base: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks on the first forward, and again on saving."""
    pytest.importorskip("bitsandbytes")
    model: Any = load_base(BaseSpec(str(tiny_base), load_in_4bit=True, device="cpu"))
    layer = model.model.layers[0].mlp.up_proj
    stored = layer.weight.data.clone()
    with torch.no_grad():
        first = model(TOKENS).logits
    model.state_dict()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, first)
    assert torch.equal(layer.weight.data, stored)
    embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert float(embeddings.grad.abs().sum()) > 0


def test_bases_that_cannot_be_right(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load_base(BaseSpec(str(tmp_path)))
    with pytest.raises(UserError, match="not a device"):
        load_base(BaseSpec(str(copy), device="abacus"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA"):
            load_base(BaseSpec(str(copy), device="cuda"))
    with pytest.raises(UserError, match="flash"):
        load_base(BaseSpec(str(copy), device="cpu", attention="flash_attention_2"))
    edit(copy / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match="9 tensors are missing"):
        load_base(BaseSpec(str(copy)))
    edit(copy / "config.json", num_hidden_layers=2, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match=r"already quantised \(gptq\)"):
        load_base(BaseSpec(str(copy)))


def test_pickled_weights_are_not_loaded(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(BaseSpec(str(copy)))
    with pytest.raises(UserError, match="no model weights"):
        fingerprint_base(copy)


def test_tokenizer_that_lost_its_bos_is_refused(copy: Path) -> None:
    assert load_tokenizer(str(copy))("hello").input_ids[0] == 1
    edit(copy / "tokenizer.json", post_processor=None)
    load_tokenizer(str(copy))  # without one by design: chat templates write it themselves
    edit(copy / "tokenizer_config.json", add_bos_token=True, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(UserError, match="does not put '<s>' first"):
        load_tokenizer(str(copy))


def test_tokenizer_that_changes_the_prompt_is_refused(copy: Path) -> None:
    edit(copy / "tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(UserError, match="does not give a prompt back"):
        load_tokenizer(str(copy))


def test_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_real_tokenizers_pass(shared: Path) -> None:
    llama = load_tokenizer(str(shared / "llama2-tokenizer"))
    assert llama("hello").input_ids[0] == llama.bos_token_id
    load_tokenizer(str(shared / "mini" / "origin"))


def test_fingerprint_knows_a_base_and_its_twins(
    tiny_base: Path, copy: Path, make_tiny_llama: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    one = fingerprint_base(tiny_base)
    assert fingerprint_base(copy) == one
    edit(copy / "config.json", transformers_version="1.0", use_cache=False)
    require_same_base(one, fingerprint_base(copy))
    half = tmp_path / "half"
    load_base(BaseSpec(str(tiny_base), dtype="bfloat16")).save_pretrained(half)
    require_same_base(one, fingerprint_base(half))

    def mismatch(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            require_same_base(one, fingerprint_base(folder))
        assert caught.value.exit_code == 3
        return str(caught.value)

    assert "other weights" in mismatch(make_tiny_llama(tmp_path / "seed", seed=5))
    assert "architecture" in mismatch(make_tiny_llama(tmp_path / "deep", layers=3))
    edit(copy / "config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert "architecture" in mismatch(copy)
    shutil.copy(tiny_base / "config.json", copy / "config.json")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 3] += 0.5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "other weights" in mismatch(copy)


def test_fingerprint_is_cached_until_a_file_changes(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import adapters.base.fingerprint as module

    one = fingerprint_base(copy)
    monkeypatch.setattr(module, "sha256_file", None)
    assert fingerprint_base(copy) == one
    (copy / "model.safetensors").touch()
    with pytest.raises(TypeError):
        fingerprint_base(copy)
    monkeypatch.undo()
    cache = module.cache_folder() / "fingerprints.json"
    for damage in ("", "[]", '{"x": 1}', json.dumps({str(copy.resolve()): {"stamp": 1}})):
        cache.write_text(damage)
        assert fingerprint_base(copy) == one


def test_releases_of_transformers_write_the_same_model_differently() -> None:
    old = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rope_theta": 10000.0,
        "rope_scaling": None,
    }
    new = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "attention_bias": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    assert architecture(old) == architecture(new)
    assert architecture(old) != architecture({**new, "num_key_value_heads": 2})
