"""Finding and loading a base and its tokenizer; what cannot be right is refused with its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base.fingerprint import (
    BaseFingerprint,
    architecture,
    fingerprint_base,
    require_same_base,
)
from adapters.base.load import (
    BaseSpec,
    auto_dtype,
    base_view,
    computes_in_bf16,
    load_base,
    load_tokenizer,
    resolve_base,
)
from adapters.base.weights import weight_files
from adapters.errors import BaseMismatch, UserError
from tests.conftest import A100, T4
from tests.families import FAMILIES, make_word_piece, save_model

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
    with pytest.raises(UserError, match="CPUs and CUDA GPUs, not on mps"):
        load_base(BaseSpec(str(copy), device="mps"))
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


def test_a_word_piece_vocabulary_need_not_keep_case_and_spaces(copy: Path) -> None:
    tokenizer = make_word_piece()
    tokenizer.save_pretrained(copy)
    assert load_tokenizer(str(copy)).unk_token == "[UNK]"
    # A prompt of unknown words is another prompt.
    edit(copy / "tokenizer.json", pre_tokenizer={"type": "Whitespace"}, normalizer=None)
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


def test_a_tensor_in_two_shards_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """Which of the two is loaded would be the loader's secret."""
    from safetensors.torch import load_file

    shutil.copytree(tiny_base, tmp_path / "base")
    whole = tmp_path / "base" / "model.safetensors"
    shards = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    names = list(load_file(whole))
    for shard in shards:
        shutil.copy(whole, whole.parent / shard)
    whole.unlink()
    weight_map = {name: shards[i % 2] for i, name in enumerate(names)}
    index = whole.parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="Several weight files of the base hold"):
        fingerprint_base(whole.parent)


def test_a_single_file_wins_over_shards_beside_it_as_it_does_for_the_loader(
    tiny_base: Path, make_tiny_llama: Any, tmp_path: Path
) -> None:
    """Trained on, fingerprinted and merged are the same weights."""
    both = make_tiny_llama(tmp_path / "both", seed=5)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (both / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(both / "model.safetensors", both / "model-00001-of-00001.safetensors")
    shutil.copy(tiny_base / "model.safetensors", both / "model.safetensors")
    assert [path.name for path in weight_files(both)] == ["model.safetensors"]
    loaded = load_base(BaseSpec(str(both), device="cpu")).state_dict()
    expected = load_base(BaseSpec(str(tiny_base), device="cpu")).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    require_same_base(fingerprint_base(tiny_base), fingerprint_base(both))
    (both / "model.safetensors").unlink()
    assert [path.name for path in weight_files(both)] == ["model-00001-of-00001.safetensors"]
    (both / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="no model weights"):  # which the loader would not take
        weight_files(both)


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("llama", "rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        ("llama", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("llama", "some_new_setting", 3),
        ("gemma2", "attn_logit_softcapping", 30.0),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "query_pre_attn_scalar", 128),
        ("gemma2", "hidden_activation", "silu"),
        ("gemma3", "layer_types", ["full_attention", "full_attention"]),
        ("mixtral", "num_experts_per_tok", 1),
        ("olmoe", "norm_topk_prob", True),
    ],
)
def test_every_setting_that_decides_the_function_counts(
    family: str, setting: str, value: Any, tmp_path: Path
) -> None:
    folder = save_model(family, tmp_path / "base")
    before = fingerprint_base(folder)
    edit(folder / "config.json", transformers_version="9", use_cache=False, dtype="bfloat16")
    require_same_base(before, fingerprint_base(folder))
    edit(folder / "config.json", **{setting: value})
    with pytest.raises(BaseMismatch, match="architecture"):
        require_same_base(before, fingerprint_base(folder))


def test_settings_of_a_nested_text_model_count(copy: Path) -> None:
    edit(copy / "config.json", text_config={"model_type": "x", "layer_types": ["full"]})
    before = fingerprint_base(copy)
    edit(copy / "config.json", text_config={"model_type": "x", "layer_types": ["sliding"]})
    with pytest.raises(BaseMismatch, match="architecture"):
        require_same_base(before, fingerprint_base(copy))


def test_a_fingerprint_of_release_0_1_is_still_the_base(copy: Path) -> None:
    import hashlib

    new = fingerprint_base(copy)
    parts = new.config_v1_sha256 + new.shapes_sha256 + new.sample_sha256
    written = {
        "digest": hashlib.sha256(parts.encode()).hexdigest(),
        "files": new.files,
        "config_sha256": new.config_v1_sha256,
        "tokenizer_sha256": new.tokenizer_sha256,
        "sample_sha256": new.sample_sha256,
        "shapes_sha256": new.shapes_sha256,
    }
    old = BaseFingerprint.from_json(written)
    assert old.to_json() == written
    assert BaseFingerprint.from_json(new.to_json()) == new
    require_same_base(old, new)
    require_same_base(new, old)
    edit(copy / "config.json", rms_norm_eps=0.5)
    with pytest.raises(BaseMismatch, match="architecture"):
        require_same_base(old, fingerprint_base(copy))


def test_attention_falls_back_where_sdpa_is_not_supported(tmp_path: Path) -> None:
    gemma = save_model("gemma2", tmp_path / "gemma2")
    model = load_base(BaseSpec(str(gemma), device="cpu"))
    assert base_view(model)["attention"] == "eager"
    with pytest.raises(UserError, match="SDPA cannot cap attention logits"):
        load_base(BaseSpec(str(gemma), device="cpu", attention="sdpa"))
    edit(gemma / "config.json", attn_logit_softcapping=None)
    assert base_view(load_base(BaseSpec(str(gemma), device="cpu")))["attention"] == "eager"
    with pytest.raises(UserError, match="does not support sdpa attention"):
        load_base(BaseSpec(str(gemma), device="cpu", attention="sdpa"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded(family: str, tmp_path: Path) -> None:
    model = load_base(BaseSpec(str(save_model(family, tmp_path / "base")), device="cpu"))
    assert base_view(model)["attention"] == ("eager" if family == "gemma2" else "sdpa")
    assert bool(model(TOKENS).logits.isfinite().all())


@pytest.mark.parametrize("part", ["vision_config", "audio_config"])
def test_models_of_several_modalities_are_refused(part: str, copy: Path) -> None:
    edit(copy / "config.json", **{part: {"hidden_size": 8}}, text_config={"hidden_size": 8})
    with pytest.raises(UserError, match="also takes"):
        load_base(BaseSpec(str(copy), device="cpu"))


def test_devices_that_are_not_there_are_refused(
    copy: Path, cards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(A100)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device in ("auto", "cuda"):
        with pytest.raises(UserError, match=r"no cuda:1: 1 CUDA device is visible"):
            load_base(BaseSpec(str(copy), device=device))
    cards()
    assert next(load_base(BaseSpec(str(copy))).parameters()).device.type == "cpu"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        with pytest.raises(UserError, match="hides every CUDA device"):
            load_base(BaseSpec(str(copy), device="cuda:0"))


def test_dtype_of_a_gpu_follows_what_it_has_in_hardware(
    copy: Path, cards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    class Stop(Exception):
        pass

    def stop(*args: Any, **options: Any) -> None:
        raise Stop(options["dtype"], options["device_map"][""])

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stop)
    cards(A100, T4)
    for device, dtype in (("auto", torch.bfloat16), ("cuda:1", torch.float16)):
        with pytest.raises(Stop) as stopped:
            load_base(BaseSpec(str(copy), device=device))
        assert stopped.value.args == (dtype, "cuda:0" if device == "auto" else device)
    with pytest.raises(Stop, match="bfloat16"):
        load_base(BaseSpec(str(copy), device="cuda:0", dtype="bfloat16"))
    with pytest.raises(UserError, match="GPU cuda:1 has no bfloat16 in hardware"):
        load_base(BaseSpec(str(copy), device="cuda:1", dtype="bfloat16"))
    assert not computes_in_bf16("cuda:1")
    assert [auto_dtype(device) for device in ("cpu", "cuda", "cuda:1")] == [
        "float32",
        "bfloat16",
        "float16",
    ]
    with pytest.raises(UserError, match=r"no cuda:2: 2 CUDA devices are visible"):
        load_base(BaseSpec(str(copy), device="cuda:2"))
    with pytest.raises(UserError, match="float16 needs a GPU"):
        load_base(BaseSpec(str(copy), device="cpu", dtype="float16"))
