"""Adapters that come and go: foreign PEFT folders, servers, releases, sums."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.base.fingerprint import fingerprint_base
from adapters.base.load import BaseSpec, load_base
from adapters.errors import BaseMismatch, UserError
from adapters.lora import stack
from adapters.lora.export import export_serving, max_lora_rank
from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from adapters.lora.merge import fold_stack
from adapters.lora.model_card import Release, release_card, write_release
from adapters.store.store import AdapterStore

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9]])


def on_cpu(folder: Path | str, **view: Any) -> Any:
    return load_base(BaseSpec(str(folder), device="cpu", **view))


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.name.startswith(".lock")}


@pytest.fixture
def base_record(tiny_base: Path) -> dict[str, Any]:
    return {"name": "org/tiny", "fingerprint": fingerprint_base(tiny_base).to_json()}


@pytest.fixture
def put(store: AdapterStore, make_adapter: Any, make_manifest: Any, base_record: Any) -> Any:
    """Publishes a random adapter of the tiny base."""

    def run(request_id: str, **fields: Any) -> Any:
        folder = make_adapter(seed=int(request_id), std=0.1)
        return store.publish(folder, make_manifest(request_id, base=base_record, **fields))

    return run


def test_foreign_adapter_is_checked_against_the_base(
    store: AdapterStore, make_adapter: Any, tiny_base: Path
) -> None:
    folder = make_adapter(seed=4)
    (folder / "README.md").write_text("not taken along")
    stored = store.import_folder(folder, tiny_base, base_name="org/tiny")
    assert (stored.manifest.policy, stored.status) == ("imported", "ready")
    assert stored.manifest.base["fingerprint"] == fingerprint_base(tiny_base).to_json()
    assert "README.md" not in files_of(stored.path)
    before = files_of(store.path)
    with pytest.raises(BaseMismatch, match="covers 21 matrices where the base has 14"):
        store.import_folder(make_adapter(layers=3), tiny_base)
    with pytest.raises(BaseMismatch, match="covers 7 matrices"):
        store.import_folder(make_adapter(layers=1), tiny_base)
    assert files_of(store.path) == before


def test_half_precision_is_widened_exactly(
    store: AdapterStore, make_adapter: Any, tiny_base: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_adapter(seed=4)
    half = {k: v.bfloat16() for k, v in load_file(folder / WEIGHTS_NAME).items()}
    (folder / WEIGHTS_NAME).unlink()
    save_file(half, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    stored = store.import_folder(folder, tiny_base)
    wide = load_file(stored.path / WEIGHTS_NAME)
    assert all(torch.equal(wide[name], value.float()) for name, value in half.items())
    assert stored.manifest.origin["dtypes"] == ["BF16"]


def _link_file(folder: Path) -> Path:
    (folder / WEIGHTS_NAME).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS_NAME).symlink_to(folder.parent / "elsewhere")
    return folder


def _link_folder(folder: Path) -> Path:
    link = folder.parent / "link"
    link.symlink_to(folder)
    return link


def _dots(folder: Path) -> Path:
    return folder / ".." / folder.name


@pytest.mark.parametrize("trick", [_link_file, _link_folder, _dots])
def test_links_and_dots_are_refused(
    trick: Callable[[Path], Path], store: AdapterStore, make_adapter: Any, tiny_base: Path
) -> None:
    with pytest.raises(UserError, match=r"symbolic link|'\.\.'"):
        store.import_folder(trick(make_adapter()), tiny_base)
    assert store.list() == []


def test_a_neighbouring_folder_may_be_typed(
    store: AdapterStore, make_adapter: Any, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter()
    (folder.parent / "here").mkdir()
    monkeypatch.chdir(folder.parent / "here")
    stored = store.import_folder(Path("..") / folder.name, tiny_base)
    assert stored.manifest.request_id.startswith("imported-")
    assert folder.name not in stored.manifest.request_id


def test_sum_of_a_stack_takes_its_place(put: Any, store: AdapterStore, tiny_base: Path) -> None:
    one = put("1")
    two = put("2", parents=(one.slug,))
    store.activate(["1", "2"], {"2": 0.5})

    def logits() -> torch.Tensor:
        model = stack.load_stack(on_cpu(tiny_base), store)
        with torch.no_grad():
            return model(TOKENS).logits

    before = logits()
    made = store.combine(label="both")
    assert made.manifest.origin["kind"] == "sum"
    assert made.manifest.supersedes == (one.slug, two.slug)
    store.activate(["both"])
    assert [a.slug for a in store.active()] == [made.slug]
    assert torch.allclose(logits(), before, atol=2e-5)
    small = store.combine(["2"], rank=1, label="small")
    assert small.manifest.origin["kind"] == "truncated"
    assert 0 < small.manifest.origin["kept"] < 1
    assert small.manifest.parents == (one.slug,)
    assert store.evals("small") == {}


def test_servers_get_one_adapter_and_its_command(
    put: Any, store: AdapterStore, tiny_base: Path, tmp_path: Path
) -> None:
    folders = [(put(name).path, scale) for name, scale in (("1", 1.0), ("2", 0.5), ("3", 1.0))]
    whole = export_serving(folders, tmp_path / "v", target="vllm", base_name="/models/tiny")
    config = json.loads((whole.path / CONFIG_NAME).read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    assert config["base_model_name_or_path"] == "/models/tiny"
    assert "--max-lora-rank 8 --lora-modules forget=" in whole.command
    assert any("does not name the adapter" in note for note in whole.notes)
    model: Any = on_cpu(tiny_base)
    for i, (folder, _) in enumerate(folders):
        model = stack.attach(model, f"part{i}", folder)
    stack.activate(model, ["part0", "part1", "part2"], {"part1": 0.5})
    with torch.no_grad():
        expected = model(TOKENS).logits
        model = stack.attach(model, "served", whole.path)
        stack.activate(model, ["served"])
        assert torch.allclose(model(TOKENS).logits, expected, atol=2e-5)
    small = export_serving(
        folders, tmp_path / "o", target="llama.cpp", base_name="tiny", rank=2, trained_on="nf4"
    )
    assert not small.exact
    assert "evaluate it before use" in small.notes[0]
    assert "nf4" in small.notes[-1]
    assert small.command == (
        f"python convert_lora_to_gguf.py --base-model-id tiny --outfile {tmp_path}/o.gguf "
        f"{tmp_path}/o && llama-cli -m BASE.gguf --lora {tmp_path}/o.gguf"
    )
    assert (max_lora_rank(24), max_lora_rank(8)) == (32, 8)
    with pytest.raises(UserError, match="up to 512"):
        max_lora_rank(513)
    with pytest.raises(UserError, match="no target"):
        export_serving(folders, tmp_path / "x", target="grpc", base_name="tiny")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="name is missing"):
        export_serving(folders, tmp_path / "x", base_name="")


def test_card_of_a_release_says_what_was_run(
    put: Any, store: AdapterStore, tiny_base: Path, tmp_path: Path
) -> None:
    one = put(
        "1",
        objective={"name": "simnpo", "alternates": 3, "beta": 2.5, "gamma": 0.0},
        lora={"r": 2, "alpha": 4},
        env={"seed": 17},
        data={"forget": {"n": 20, "digest": "a" * 64, "kind": "jsonl"}},
    )
    merge = fold_stack(tiny_base, [(one.path, 0.5)], tmp_path / "merged", from_4bit_view=False)
    release = Release(
        base_name="org/tiny",
        base_digest=fingerprint_base(tiny_base).digest,
        adapters=((one.manifest, 0.5),),
        merge=merge,
        formulas={
            "simnpo": "-(2/beta) logsigmoid(beta nbar - gamma)",
            "alternates": "+ w_a nbar_a",
        },
    )
    card = release_card(release)
    assert "Not measured after merging" in card
    measured = Release(
        **{
            **vars(release),
            "protocol": "tofu",
            "before": {"forget_quality": 1e-9, "model_utility": 0.6},
            "after": {"forget_quality": 0.4},
            "candidates": 7,
        }
    )
    folder = write_release(measured)
    text = (folder / "README.md").read_text()
    for words in (
        "W' = W + sum_i s_i (alpha_i / r_i) B_i A_i",
        f"| `{one.slug}` | 0.5 | simnpo | 4 / 2 | 17 | none | 20 |",
        "-(2/beta) logsigmoid(beta nbar - gamma); alternates = 3, beta = 2.5, gamma = 0.0",
        "; alternates = 3: + w_a nbar",
        "| forget_quality | 1e-09 | 0.4 |",
        "| model_utility | 0.6 | not measured |",
        "Selected from 7 candidates.",
        "is reversible",
    ):
        assert words in text, words
    record = json.loads((folder / "MERGE_MANIFEST.json").read_text())
    assert record["adapters"][0]["slug"] == one.slug
    assert set(record["files"]) >= {"model.safetensors", "config.json", "tokenizer.json"}
    on_cpu(folder)


def test_a_thousand_adapters_are_listed_quickly(
    store: AdapterStore, put: Any, tmp_path: Path
) -> None:
    """Measured as a ratio to reading and parsing the same files once: no time limit to be flaky."""
    import time

    from adapters.atomic_files import dump_json
    from adapters.store.log import append

    one = put("1")
    manifest = one.manifest.to_json()
    position = store.journal.state().log
    for number in range(2, 1001):
        slug = f"r{number:04d}_{number:08x}"
        folder = store.path / "adapters" / slug
        folder.mkdir()
        (folder / "forget_manifest.json").write_text(dump_json({**manifest, "slug": slug}))
        entry = {"action": "publish", "slugs": [slug], "status": {slug: "ready"}}
        position = append(store.journal.log_path, position, entry)
    with store.journal.locked() as state:
        store.journal.commit(state, "gc", [])  # writes state.json
    files = sorted(store.path.glob("adapters/*/forget_manifest.json"))

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    read = best(lambda: [json.loads(file.read_bytes()) for file in files])
    listed = best(store.list)
    print(f"list of {len(store.list())}: {listed:.3f} s, {listed / read:.1f} x reading the files")
    assert len(store.list()) == 1000
    assert listed < 12 * read
    state = store.journal.state()
    store.journal.state_path.unlink()
    assert store.journal.state() == state


def test_read_adapter_and_numpy_agree_on_bf16(tmp_path: Path) -> None:
    from adapters.tensors import to_bfloat16, to_float32

    values = np.random.default_rng(0).normal(0, 1, 4096).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    assert to_bfloat16(values) == expected.view(torch.uint8).numpy().tobytes()
    assert (to_float32(to_bfloat16(values), "BF16") == expected.float().numpy()).all()


def test_export_is_an_adapter_again(put: Any, store: AdapterStore, tmp_path: Path) -> None:
    one = put("1")
    store.export("1", tmp_path / "out")
    assert read_adapter(tmp_path / "out").tensors == read_adapter(one.path).tensors
