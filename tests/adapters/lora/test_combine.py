"""Exact sums of adapters and weights with a stack folded in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base.fingerprint import fingerprint_base, require_same_base
from adapters.base.load import BaseSpec, load_base
from adapters.errors import BaseMismatch, StoreCorrupt, UserError
from adapters.lora import combine as algebra
from adapters.lora import merge, stack

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9]])


def on_cpu(folder: Path | str, **view: Any) -> Any:
    return load_base(BaseSpec(str(folder), device="cpu", **view))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.clone()


@pytest.fixture
def pair(make_adapter: Any) -> list[tuple[Path, float]]:
    return [(make_adapter(seed=1, std=0.1), 1.0), (make_adapter(seed=2, std=0.1, rank=3), 0.5)]


def dynamic(base: Path, pair: list[tuple[Path, float]], **view: Any) -> torch.Tensor:
    model: Any = on_cpu(base, **view)
    for i, (folder, _) in enumerate(pair):
        model = stack.attach(model, f"a{i}", folder)
    names = [f"a{i}" for i in range(len(pair))]
    stack.activate(model, names, {f"a{i}": scale for i, (_, scale) in enumerate(pair)})
    return logits(model)


def test_folded_weights_are_the_stack(tiny_base: Path, pair: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expected = dynamic(tiny_base, pair)
    result = merge.fold_stack(tiny_base, pair, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(logits(plain), expected, atol=2e-5)
    assert not torch.allclose(logits(on_cpu(tiny_base)), expected, atol=1e-2)
    assert (result.matrices, result.dtype) == (14, "float32")
    assert 0 < result.relative_change["q_proj"] < 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello").input_ids[0] == 1
    assert (tmp_path / "out" / "generation_config.json").is_file()
    with pytest.raises(BaseMismatch, match="other weights"):
        require_same_base(fingerprint_base(tiny_base), fingerprint_base(tmp_path / "out"))
    with pytest.raises(UserError, match="exists already"):
        merge.fold_stack(tiny_base, pair, tmp_path / "out")


def test_one_rounding_to_the_target_dtype(tiny_base: Path, pair: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    merge.fold_stack(tiny_base, pair, tmp_path / "full")
    merge.fold_stack(tiny_base, pair, tmp_path / "half", dtype="bfloat16")
    full = load_file(tmp_path / "full" / "model.safetensors")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(full[name].bfloat16(), half[name]) for name in full)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_keep_their_layout(tiny_base: Path, pair: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = on_cpu(tiny_base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    require_same_base(fingerprint_base(tiny_base), fingerprint_base(tmp_path / "sharded"))
    whole = merge.fold_stack(tiny_base, pair, tmp_path / "one")
    parts = merge.fold_stack(tmp_path / "sharded", pair, tmp_path / "many")
    assert len(whole.shards) == 1
    assert len(parts.shards) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    assert set(index["weight_map"]) == set(tensors)
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / shard)[name], tensors[name])
    assert torch.equal(
        logits(on_cpu(tmp_path / "one")),
        logits(on_cpu(tmp_path / "many")),
    )


def test_tied_embeddings_stay_tied(make_tiny_llama: Any, pair: Any, tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    expected = dynamic(base, pair)
    merge.fold_stack(base, pair, tmp_path / "out")
    model = on_cpu(tmp_path / "out")
    assert torch.allclose(logits(model), expected, atol=2e-5)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_quantised_bases_and_strangers_are_refused(
    tiny_base: Path, pair: Any, tmp_path: Path, make_tiny_llama: Any
) -> None:
    base = make_tiny_llama(tmp_path / "quantised")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="stored quantised"):
        merge.fold_stack(base, pair, tmp_path / "out")
    with pytest.raises(BaseMismatch):
        merge.fold_stack(make_tiny_llama(tmp_path / "deep", layers=3), pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_cat_is_the_stack(tiny_base: Path, pair: Any, tmp_path: Path) -> None:
    out = algebra.cat_adapters(pair, tmp_path / "cat")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 5
    assert torch.allclose(dynamic(tiny_base, [(out, 1.0)]), dynamic(tiny_base, pair), atol=2e-5)
    with pytest.raises(UserError, match="no adapter"):
        algebra.cat_adapters([], tmp_path / "none")


def test_the_4bit_view_is_what_a_qlora_adapter_was_trained_on(
    tiny_base: Path, pair: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    expected = dynamic(tiny_base, pair, load_in_4bit=True)
    merge.fold_stack(tiny_base, pair, tmp_path / "view", from_4bit_view=True)
    merge.fold_stack(tiny_base, pair, tmp_path / "original")
    view = logits(on_cpu(tmp_path / "view"))
    original = logits(on_cpu(tmp_path / "original"))
    assert torch.allclose(view, expected, atol=1e-4)
    assert not torch.allclose(original, expected, atol=1e-2)


def test_the_4bit_view_is_quantised_from_the_dtype_that_was_loaded(
    tiny_base: Path, pair: Any, tmp_path: Path
) -> None:
    """An fp16 checkpoint loaded as bf16 has other nf4 values than the stored ones give."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional
    from safetensors.torch import load_file, save_file

    half = Path(shutil.copytree(tiny_base, tmp_path / "half"))
    tensors = {k: v.half() for k, v in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    loaded = on_cpu(half, load_in_4bit=True, dtype="bfloat16")
    weight = loaded.model.layers[0].mlp.up_proj.weight
    expected = functional.dequantize_4bit(weight.data, weight.quant_state).float()
    folded = {}
    for dtype in ("bfloat16", None):
        out = tmp_path / f"view-{dtype}"
        merge.fold_stack(half, [], out, "float32", from_4bit_view=True, loaded_dtype=dtype)
        folded[dtype] = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(folded["bfloat16"], expected)
    assert not torch.equal(folded[None], expected)


def test_factors_of_least_rank_are_the_same_adapter(
    tiny_base: Path, pair: Any, tmp_path: Path
) -> None:
    cat = algebra.cat_adapters([pair[0], pair[1], pair[0]], tmp_path / "cat")  # one part twice
    result = algebra.factor_adapter(cat, tmp_path / "factored")
    assert (result.rank, result.exact) == (5, True)
    assert result.error < 1e-6
    assert torch.allclose(
        dynamic(tiny_base, [(result.path, 1.0)]), dynamic(tiny_base, [(cat, 1.0)]), atol=2e-5
    )
    padded = algebra.factor_adapter(cat, tmp_path / "padded", rank=8)
    assert (padded.rank, padded.exact) == (8, True)
    assert torch.allclose(
        dynamic(tiny_base, [(padded.path, 1.0)]), dynamic(tiny_base, [(cat, 1.0)]), atol=2e-5
    )


def test_truncation_says_what_it_lost(pair: Any, tmp_path: Path) -> None:
    import numpy as np

    from adapters.lora.format import read_adapter

    result = algebra.factor_adapter(pair[1][0], tmp_path / "small", rank=2)
    assert not result.exact
    kept, error = 1.0, 0.0
    before, after = read_adapter(pair[1][0]), read_adapter(result.path)
    for name_a, name_b in before.modules().values():
        full = before.unit * before.header.read(name_b) @ before.header.read(name_a)
        small = after.unit * after.header.read(name_b) @ after.header.read(name_a)
        values = np.linalg.svd(full, compute_uv=False)
        assert np.linalg.norm(full - small) == pytest.approx(values[2], rel=1e-4)
        error = max(error, float(np.linalg.norm(full - small) / np.linalg.norm(full)))
        kept = min(kept, float((values[:2] ** 2).sum() / (values**2).sum()))
    assert result.error == pytest.approx(error, rel=1e-4)
    assert result.kept == pytest.approx(kept, rel=1e-4)
    with pytest.raises(UserError):
        algebra.factor_adapter(pair[0][0], tmp_path / "none", rank=0)


def test_values_too_large_for_the_dtype_are_refused(
    make_tiny_llama: Any, pair: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = make_tiny_llama(tmp_path / "large")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e30
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoreCorrupt, match="float16 cannot hold"):
        merge.fold_stack(base, pair, tmp_path / "out", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large", "made"]
    with pytest.raises(UserError, match="not a dtype"):
        merge.fold_stack(base, pair, tmp_path / "out", dtype="int4")  # type: ignore[arg-type]


def test_a_matrix_folded_in_blocks_is_the_matrix_folded_whole(
    tiny_base: Path, make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Largest difference 1e-6: the order of float32 sums may change with the block."""
    from safetensors.torch import load_file

    stack = [(make_adapter(), 0.7)]
    whole = merge.fold_stack(tiny_base, stack, tmp_path / "whole")
    monkeypatch.setattr(merge, "BLOCK", 7 * 64)  # 7 rows, which divides nothing here
    blocks = merge.fold_stack(tiny_base, stack, tmp_path / "blocks")
    one = load_file(whole.path / "model.safetensors")
    two = load_file(blocks.path / "model.safetensors")
    assert one.keys() == two.keys()
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-6
    for kind, change in whole.relative_change.items():
        assert blocks.relative_change[kind] == pytest.approx(change, rel=1e-5)


MEMORY = """
import json, sys
from pathlib import Path
import torch
from adapters.lora import merge
torch.zeros(64, 64).addmm_(torch.ones(64, 8), torch.ones(8, 64))
def figure(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
base, adapter, out = map(Path, sys.argv[1:])
before = figure("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
merge.fold_stack(base, [(adapter, 1.0)], out)
print(json.dumps({"before": before, "after": figure("VmHWM")}))
"""


def test_memory_stays_at_one_shard(make_adapter: Any, tmp_path: Path) -> None:
    """Folding a checkpoint of 3 shards stays below two of them, whatever their number."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of memory is read from Linux's /proc")
    import subprocess
    import sys

    import numpy as np
    from safetensors.torch import save_file

    base, shards, width = tmp_path / "base", 3, 2048
    base.mkdir()
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {
            f"model.layers.{shard}.mlp.{module}.weight": torch.randn(width, width)
            for module in ("up_proj", "gate_proj")
        }
        save_file(tensors, base / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "config.json").write_text('{"model_type": "llama"}')

    def only_wide(tensors: dict[str, Any]) -> None:
        tensors.clear()
        for name in weight_map:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = np.ones((2, width), np.float32)
            tensors[f"{stem}.lora_B.weight"] = np.ones((width, 2), np.float32)

    adapter = make_adapter(change=only_wide, config={"target_modules": ["up_proj", "gate_proj"]})
    root = Path(__file__).resolve().parents[3]
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(base), str(adapter), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    measured = json.loads(run.stdout)
    grown = measured["after"] - measured["before"]
    shard_size = 2 * 4 * width * width
    print(
        f"grew by {grown / 1e6:.1f} MB; a shard has {shard_size / 1e6:.1f}, all {shards} of them "
        f"{shards * shard_size / 1e6:.0f}"
    )
    assert 0 < grown < 2 * shard_size
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
