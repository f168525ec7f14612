"""Publishing, finding, stacking and removing adapters; what is refused changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.digests import digest_rows, store_key
from adapters.errors import AdapterNotFound, BaseMismatch, StoreCorrupt, UserError
from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from adapters.store.states import STATES, TRANSITIONS
from adapters.store.store import AdapterStore


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, without the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def statuses(store: AdapterStore) -> dict[str, str]:
    return {a.manifest.request_id: a.status for a in store.list()}


def test_publish_fills_in_what_only_the_store_knows(publish: Any, store: AdapterStore) -> None:
    stored = publish("0001", lora={"r": 2, "alpha": 4})
    assert stored.slug == f"r0001_{stored.manifest.files[WEIGHTS_NAME]['sha256'][:8]}"
    assert (stored.status, stored.label, stored.active) == ("ready", "request-0001", False)
    names = {path.name for path in stored.path.iterdir()}
    assert names == {CONFIG_NAME, WEIGHTS_NAME, "forget_manifest.json"}
    assert [result.ok for result in store.verify()] == [True]
    assert [entry["action"] for entry in store.log()] == ["publish"]
    again = AdapterStore.open(store.path)
    assert again.get(stored.slug) == stored
    assert again.base_name() == "org/tiny"


def test_what_is_returned_is_what_is_read_later(publish: Any, store: AdapterStore) -> None:
    stored = publish("0001", train={"betas": (0.9, 0.999)}, env={"seed": 0})
    assert store.get("0001") == stored
    with pytest.raises(UserError, match="not a UTC time"):
        publish("0002", created="yesterday")
    assert len(store.list()) == 1


def test_norm_is_that_of_the_full_update(publish: Any) -> None:
    stored = publish("0001")
    files = read_adapter(stored.path)
    total = 0.0
    for name_a, name_b in files.modules().values():
        update = 2.0 * files.header.read(name_b) @ files.header.read(name_a)
        total += float(np.sum(update.astype(np.float64) ** 2))
    assert stored.manifest.norms["total"] == pytest.approx(total**0.5, rel=1e-5)


def test_same_adapter_same_bytes_whatever_the_order_of_its_settings(
    store: AdapterStore, make_adapter: Any, make_manifest: Any
) -> None:
    one, two = make_adapter(seed=1), make_adapter(seed=1)
    config = json.loads((two / CONFIG_NAME).read_text())
    config["target_modules"].reverse()
    config["peft_version"] = "9.9"
    (two / CONFIG_NAME).write_text(json.dumps(dict(reversed(config.items()))))
    first, second = (store.publish(f, make_manifest()) for f in (one, two))
    assert first.manifest.files == second.manifest.files
    assert (first.path / CONFIG_NAME).read_bytes() == (second.path / CONFIG_NAME).read_bytes()
    assert first.slug != second.slug


def test_no_folder_of_this_machine_gets_into_the_store(
    store: AdapterStore, make_adapter: Any, make_manifest: Any, tmp_path: Path
) -> None:
    secret = tmp_path / "home-of-somebody" / "llama"
    manifest = make_manifest()
    manifest = replace(manifest, base={**manifest.base, "name": str(secret)})
    stored = store.publish(make_adapter(config={"base_model_name_or_path": str(secret)}), manifest)
    assert stored.manifest.base["name"] == "llama"
    assert not any(b"home-of-somebody" in data for data in snapshot(store.path).values())


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"init_lora_weights": "pissa"}, "base weights"),
        ({"init_lora_weights": "olora"}, "base weights"),
        ({"loftq_config": {"loftq_bits": 4}}, "LoftQ"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "bias"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, "every layer"),
        ({"auto_mapping": {"base_model_class": "Evil", "parent_library": "os"}}, "import"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"some_new_trick": 1}, "some_new_trick"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"r": 0}, "r=0"),
        ({"r": True}, "r=True"),
        ({"lora_alpha": float("nan")}, "JSON"),
        ({"r": 4}, "rank 4"),
        ({"target_modules": ["q_proj"]}, "not part of its LoRA"),
    ],
)
def test_other_kinds_of_adapters_are_refused(
    config: dict[str, Any], word: str, store: AdapterStore, make_adapter: Any, make_manifest: Any
) -> None:
    before = snapshot(store.path)
    with pytest.raises(UserError) as caught:
        store.publish(make_adapter(config=config), make_manifest())
    assert word in str(caught.value)
    assert snapshot(store.path) == before


def _drop(tensors: dict[str, Any]) -> None:
    del tensors[sorted(tensors)[3]]


def _add(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((2, 64), np.float32)


def _widen(tensors: dict[str, Any]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = np.zeros((2, tensors[name].shape[1] + 1), np.float32)


def _nan(tensors: dict[str, Any]) -> None:
    tensors[sorted(tensors)[5]][0, 0] = np.nan


@pytest.mark.parametrize("change", [_drop, _add, _widen, _nan])
def test_wrong_tensors_are_refused(
    change: Callable[[dict[str, Any]], None],
    store: AdapterStore,
    make_adapter: Any,
    make_manifest: Any,
) -> None:
    before = snapshot(store.path)
    with pytest.raises(UserError):
        store.publish(make_adapter(change=change), make_manifest())
    assert snapshot(store.path) == before


def test_pickles_and_missing_files_are_refused(
    store: AdapterStore, make_adapter: Any, make_manifest: Any, tmp_path: Path
) -> None:
    folder = make_adapter()
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        store.publish(folder, make_manifest())
    with pytest.raises(UserError, match="no folder"):
        store.publish(tmp_path / "nowhere", make_manifest())


def test_half_precision_is_refused(
    store: AdapterStore, make_adapter: Any, make_manifest: Any
) -> None:
    folder = make_adapter()
    data = (folder / WEIGHTS_NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"F32"', b'"I32"')
    (folder / WEIGHTS_NAME).write_bytes(data[:8] + header + data[8 + length :])
    with pytest.raises(UserError, match="I32"):
        store.publish(folder, make_manifest())


def test_one_store_holds_adapters_of_one_base(
    store: AdapterStore, publish: Any, make_fingerprint: Any
) -> None:
    publish("0001")
    before = snapshot(store.path)
    other = {"name": "org/tiny", "fingerprint": make_fingerprint("two").to_json()}
    with pytest.raises(BaseMismatch, match="other weights") as caught:
        publish("0002", base=other)
    assert caught.value.exit_code == 3
    assert snapshot(store.path) == before


def test_manifest_must_describe_the_adapter_it_comes_with(publish: Any) -> None:
    with pytest.raises(UserError, match="lora alpha is 9"):
        publish("0001", lora={"r": 2, "alpha": 9})
    with pytest.raises(UserError, match="lora lora_r is 9"):
        publish("0001", lora={"lora_r": 9})
    with pytest.raises(UserError, match="which base"):
        publish("0001", base={"name": "org/tiny"})
    with pytest.raises(UserError, match="r0009_00000000"):
        publish("0001", parents=("r0009_00000000",))


def test_names_and_did_you_mean(publish: Any, store: AdapterStore) -> None:
    one, two = publish("0001", label="author-17"), publish("0002")
    assert store.get(one.slug[:5]).slug == one.slug
    assert store.get("author-17").slug == one.slug
    assert store.get("0002").slug == two.slug
    with pytest.raises(AdapterNotFound, match="names 2 adapters"):
        store.get("r00")
    with pytest.raises(AdapterNotFound, match="Did you mean 'author-17'"):
        store.get("auhtor-17")
    with pytest.raises(AdapterNotFound):
        store.get("")


def test_activation_keeps_order_and_scales(publish: Any, store: AdapterStore) -> None:
    one, two, three = (publish(f"000{i}") for i in (1, 2, 3))
    change = store.activate(["0003", "0001"], {"0001": 0.5})
    assert [(a.slug, a.scale) for a in change.stack] == [(three.slug, 1.0), (one.slug, 0.5)]
    store.activate(["0002"])
    store.activate(["0001"], {"0001": 1.5})
    again = AdapterStore.open(store.path).active()
    assert [(a.slug, a.scale) for a in again] == [
        (three.slug, 1.0),
        (one.slug, 1.5),
        (two.slug, 1.0),
    ]
    store.activate(["0002"], only=True)
    assert statuses(store) == {"0001": "reverted", "0002": "active", "0003": "reverted"}
    for scale in (-0.1, 1.6, float("nan"), True):
        with pytest.raises(UserError, match="outside 0 to"):
            store.activate(["0001"], {"0001": scale})


def test_children_need_their_parents(publish: Any, store: AdapterStore) -> None:
    one = publish("0001")
    two = publish("0002", parents=(one.slug,))
    before = snapshot(store.path)
    with pytest.raises(UserError, match=f"activate {one.slug} {two.slug}"):
        store.activate(["0002"])
    with pytest.raises(UserError):
        store.activate(["0002", "0001"][:1])
    assert snapshot(store.path) == before
    assert store.activate(["0002"], with_parents=True).stack[0].slug == one.slug
    assert two.manifest.parent_sha256 == {one.slug: one.manifest.files[WEIGHTS_NAME]["sha256"]}


def test_reverting_a_parent_makes_children_stale_until_it_returns(
    publish: Any, store: AdapterStore
) -> None:
    one = publish("0001")
    two = publish("0002", parents=(one.slug,))
    three = publish("0003", parents=(one.slug, two.slug))
    store.activate(["0001", "0002", "0003"])
    assert store.revert("0003").stale == ()  # last in, first out: always clean
    store.activate(["0003"])
    assert store.revert("0001").stale == (two.slug, three.slug)
    assert statuses(store) == {"0001": "reverted", "0002": "stale", "0003": "stale"}
    back = store.activate(["0001"])
    assert [a.slug for a in back.stack] == [one.slug, two.slug, three.slug]
    assert statuses(store) == {"0001": "active", "0002": "active", "0003": "active"}


def test_another_strength_of_a_parent_is_another_stack(publish: Any, store: AdapterStore) -> None:
    one = publish("0001")
    two = publish("0002", parents=(one.slug,), parent_scales={one.slug: 0.5})
    change = store.activate(["0002"], with_parents=True)
    assert [a.scale for a in change.stack] == [0.5, 1.0]
    assert change.stale == ()
    assert store.activate(["0001"], {"0001": 1.0}).stale == (two.slug,)
    assert statuses(store) == {"0001": "active", "0002": "stale"}
    store.activate(["0001"], {"0001": 0.5})
    assert statuses(store)["0002"] == "active"


def test_measuring_a_stale_adapter_on_its_stack_settles_it(
    publish: Any, store: AdapterStore
) -> None:
    one = publish("0001")
    two = publish("0002", parents=(one.slug,))
    store.activate(["0001", "0002"])
    store.revert("0001")
    store.attach_eval("0002", "tofu", {"forget_quality": 0.5, "stack": [one.slug, two.slug]})
    assert statuses(store)["0002"] == "stale"
    store.attach_eval("0002", "tofu", {"forget_quality": 0.4, "stack": [two.slug]})
    assert statuses(store)["0002"] == "active"
    assert {name: r["forget_quality"] for name, r in store.evals("0002").items()} == {
        "tofu": 0.5,
        "tofu-2": 0.4,
    }


def test_an_adapter_that_supersedes_others_takes_their_place(
    publish: Any, store: AdapterStore
) -> None:
    one, two = publish("0001"), publish("0002")
    store.activate(["0001", "0002"])
    publish("0003", supersedes=(one.slug, two.slug))
    assert statuses(store)["0001"] == "active"  # until the new one is really in use
    store.activate(["0003"])
    assert statuses(store) == {"0001": "superseded", "0002": "superseded", "0003": "active"}
    assert len(store.active()) == 1


def test_results_with_text_are_refused(publish: Any, store: AdapterStore) -> None:
    publish("0001")
    for bad in (
        {"answers": ["She was born in Lagos."]},
        {"nested": {"row": {"text": "two words"}}},
        {"value": float("nan")},
        {"a question with spaces": 1},
        {"blob": b"x"},
    ):
        with pytest.raises(UserError):
            store.attach_eval("0001", "tofu", bad)
    with pytest.raises(UserError, match="cannot name"):
        store.attach_eval("0001", "../x", {"a": 1})
    assert store.evals("0001") == {}


def test_no_forget_text_anywhere(store: AdapterStore, publish: Any) -> None:
    rows = [("Where was Mira Okafor born?", "Mira Okafor was born in Lagos.")]
    digest = digest_rows(store_key(), rows)
    publish("0001", data={"forget": {"n": 1, "digest": digest, "kind": "jsonl"}})
    store.activate(["0001"])
    everything = b"".join(snapshot(store.path).values())
    assert digest.encode() in everything
    for text in ("Mira", "Lagos", "born"):
        assert text.encode() not in everything
    with pytest.raises(UserError, match="kind"):
        publish("0002", data={"forget": {"n": 1, "digest": digest, "kind": "tofu:author=Mira O"}})


def test_remove_keeps_a_tombstone_and_protects_parents(publish: Any, store: AdapterStore) -> None:
    one = publish("0001")
    two = publish("0002", parents=(one.slug,))
    store.activate(["0001", "0002"])
    with pytest.raises(UserError, match="is active"):
        store.remove("0002")
    store.deactivate_all()
    with pytest.raises(UserError, match="parent of"):
        store.remove("0001")
    before = snapshot(store.path)
    assert store.remove("0002", dry_run=True)[0] == two.slug
    assert snapshot(store.path) == before
    slug, size = store.remove("0002")
    assert (slug, size > two.size) == (two.slug, True)
    assert not two.path.exists()
    assert [a.slug for a in store.list()] == [one.slug]
    tombstone = store.list(purged=True)[1]
    assert (tombstone.status, tombstone.manifest) == ("purged", two.manifest)
    with pytest.raises(AdapterNotFound, match="was removed"):
        store.get(two.slug)
    store.remove("0001")
    assert publish("0003").slug.startswith("r0003_")  # numbers are never used twice


def test_gc_removes_what_was_superseded_but_no_parent_of_the_living(
    publish: Any, store: AdapterStore
) -> None:
    one = publish("0001")
    two = publish("0002", parents=(one.slug,))
    three = publish("0003")
    publish("0004", supersedes=(one.slug, three.slug))
    store.activate(["0001", "0002", "0003"])
    store.activate(["0004"])
    assert statuses(store)["0001"] == statuses(store)["0003"] == "superseded"
    plan = store.gc(dry_run=True)
    assert (plan.adapters, plan.dry_run) == ((three.slug,), True)
    assert three.path.is_dir()
    report = store.gc()
    assert report.adapters == (three.slug,)
    assert report.bytes == plan.bytes > three.size
    assert [a.path.is_dir() for a in (one, two, three)] == [True, True, False]
    assert all(result.ok for result in store.verify())


def test_verify_names_every_kind_of_damage(
    publish: Any, store: AdapterStore, make_fingerprint: Any
) -> None:
    stored = publish("0001")
    weights = stored.path / WEIGHTS_NAME
    whole = weights.read_bytes()

    def problem() -> str:
        (result,) = store.verify(stored.slug)
        assert not result.ok
        with pytest.raises(StoreCorrupt):
            store.require_whole(stored.slug)
        return result.problems[0]

    weights.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    assert "was changed" in problem()
    weights.write_bytes(whole[:-1])
    assert "bytes instead of" in problem()
    weights.unlink()
    assert "missing" in problem()
    weights.write_bytes(whole)
    (stored.path / "extra.bin").write_bytes(b"x")
    assert "does not belong" in problem()
    (stored.path / "extra.bin").unlink()
    manifest = stored.path / "forget_manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema": 1', '"schema": 99'))
    assert "schema 99" in problem()
    manifest.write_text(text.replace("request-0001", "request-0007"))
    assert "since it was published" in problem()
    manifest.write_text(text)
    (stranger,) = store.verify("0001", make_fingerprint("two"))
    assert stranger.wrong_base
    assert "other weights" in stranger.problems[0]
    assert store.verify("0001", make_fingerprint())[0].ok


def test_one_damaged_manifest_does_not_hide_the_others(publish: Any, store: AdapterStore) -> None:
    one, two = publish("0001"), publish("0002")
    (one.path / "forget_manifest.json").write_text("{}")
    listed = store.list()
    assert [a.slug for a in listed] == [one.slug, two.slug]
    assert listed[0].problem
    assert not listed[1].problem
    with pytest.raises(StoreCorrupt):
        store.get(one.slug)
    store.quarantine(one.slug, "damaged manifest")
    assert store.list()[0].status == "quarantined"
    assert store.get("0002").slug == two.slug


def test_quarantine_leaves_the_stack_and_release_verifies(
    publish: Any, store: AdapterStore
) -> None:
    one = publish("0001")
    two = publish("0002", parents=(one.slug,))
    store.activate(["0001", "0002"])
    assert store.quarantine("0001", "disk error").stale == (two.slug,)
    with pytest.raises(UserError, match="release it from quarantine"):
        store.activate(["0001"])
    store.release("0001")
    assert statuses(store)["0001"] == "reverted"


def test_table_of_states_is_closed() -> None:
    for action, ways in TRANSITIONS.items():
        assert {*ways, *ways.values()} <= set(STATES), action
        assert "purged" not in ways, "nothing comes back from purged"


def test_export_and_merge_marks(publish: Any, store: AdapterStore, tmp_path: Path) -> None:
    one = publish("0001")
    out = store.export("0001", tmp_path / "out")
    assert read_adapter(out).config == read_adapter(one.path).config
    with pytest.raises(UserError, match="exists already"):
        store.export("0001", out)
    store.activate(["0001"])
    store.mark_merged(["0001"], "release-1")
    assert statuses(store)["0001"] == "merged"
    assert [a.slug for a in store.active()] == [one.slug]
    store.revert("0001")
    assert statuses(store)["0001"] == "reverted"


def test_opening_what_is_no_store(tmp_path: Path, store: AdapterStore) -> None:
    with pytest.raises(UserError, match="no store at"):
        AdapterStore.open(tmp_path / "missing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        AdapterStore.open(tmp_path / "full", create=True)
    (store.path / "store.json").write_text('{"schema": 7}')
    with pytest.raises(UserError, match="schema 7"):
        AdapterStore.open(store.path)


def test_work_dir_stays_inside_the_store(store: AdapterStore) -> None:
    assert store.work_dir("run-1").parent == store.path / "runs"
    for key in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(UserError):
            store.work_dir(key)


def test_listing_needs_no_torch(publish: Any, store: AdapterStore) -> None:
    publish("0001")
    code = (
        "import sys; from adapters.store.store import AdapterStore; "
        f"s = AdapterStore.open({str(store.path)!r}); s.list(); s.verify_log(); "
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[3]
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert run.stdout.strip() == "[]"
