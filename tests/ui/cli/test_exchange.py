"""`adapters combine|export|import|quarantine|release` and merges from 4 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from adapters.lora.export import Target
from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from ui.cli.commands.adapters.exchange import FORMATS


@pytest.fixture
def adapters(run: Any, tmp_path: Path) -> Any:
    """`adapters("list", ...)` runs the command on the store of `put`."""

    def call(*words: object, store: Path = tmp_path / "store") -> Any:
        return run("adapters", *words, "--store", store)

    return call


def updates(folder: Path, scale: float = 1.0) -> dict[str, Any]:
    """scale * alpha/r B A of every matrix."""
    files = read_adapter(folder)
    return {
        module: scale * files.unit * files.header.read(b) @ files.header.read(a)
        for module, (a, b) in files.modules().items()
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.allclose(one[k], other[k], atol=1e-5) for k in one)


def summed(*parts: dict[str, Any]) -> dict[str, Any]:
    return {module: sum(part[module] for part in parts) for module in parts[0]}


def statuses(adapters: Any) -> dict[str, str]:
    table = adapters("list", "--json").json["table"]
    return {row["name"]: row["status"] for row in table}


def refused(ran: Any, *words: str, code: int = 2) -> None:
    """Exit code, nothing on stdout, and exactly a problem and a fix at the end of stderr."""
    assert ran.code == code
    assert ran.out == ""
    problem, fix = ran.err.strip().splitlines()[-2:]
    assert problem.startswith("Error: ")
    assert fix.startswith("Fix: ")
    for word in words:
        assert word in f"{problem} {fix}"


def test_the_sum_of_the_stack_is_exact_and_takes_its_place(
    adapters: Any, put: Any, tmp_path: Path
) -> None:
    one = put("1")
    two = put("2", parents=(one,))
    adapters("activate", "1", "2", "--scales", "1,0.5")
    made = adapters("combine", "--label", "both", "--json").json
    assert (made["exact"], made["needs_evaluation"], made["lora_r"]) == (True, False, 4)
    assert made["table"] == [{"name": one, "scale": 1.0}, {"name": two, "scale": 0.5}]
    folder = tmp_path / "store" / "adapters"
    assert same(
        updates(Path(made["path"])), summed(updates(folder / one), updates(folder / two, 0.5))
    )
    assert adapters("show", "both", "--json").json["name"] == made["name"]
    assert adapters("activate", "both", "--json").json["active"] == [made["name"]]
    assert statuses(adapters)[one] == "superseded"
    would = adapters("gc", "--dry-run", "--json").json
    assert set(would["adapters"]) == {one, two}
    assert len(statuses(adapters)) == 3
    assert adapters("gc", "--json").json["adapters"] == would["adapters"]
    assert statuses(adapters) == {made["name"]: "active"}


def test_a_truncated_sum_asks_for_its_own_evaluation(
    adapters: Any, put: Any, tmp_path: Path
) -> None:
    one, two = put("1"), put("2")
    ran = adapters("combine", "1", "2", "--scales", "1,0.5", "--rank", "1", "--json")
    made = ran.json
    assert (made["exact"], made["needs_evaluation"], made["lora_r"]) == (False, True, 1)
    assert 0 < made["kept"] < 1
    assert made["supersedes"] == [one, two]
    assert "evaluate it before use" in ran.err
    folder = tmp_path / "store" / "adapters"
    whole = summed(updates(folder / one), updates(folder / two, 0.5))
    assert not same(updates(Path(made["path"])), whole)
    plain = adapters("combine", "1", "2")
    assert plain.out.split()[0] in statuses(adapters)
    assert "exact sum" in plain.err
    origin = adapters("show", made["name"], "--json").json["manifest"]["origin"]
    assert (origin["kind"], origin["scales"]) == ("truncated", [1.0, 0.5])


def test_sums_that_are_refused(adapters: Any, put: Any) -> None:
    one = put("1")
    put("2")
    refused(adapters("combine"), "nothing to combine")
    refused(adapters("combine", "1", one), "named twice")
    refused(adapters("combine", "1", "--label", "two\nlines"), "label")
    refused(adapters("combine", "1", "2", "--rank", "0"), "below 1")
    refused(adapters("combine", "1", "2", "--scales", "1"), "1 numbers for 2")
    adapters("quarantine", "2", "--reason", "doubt")
    refused(adapters("combine", "1", "2"), "is quarantined", "adapters release")
    assert len(statuses(adapters)) == 2


def test_the_formats_are_those_of_the_library() -> None:
    assert get_args(Target) == FORMATS


@pytest.mark.parametrize("target", [name for name in FORMATS if name != "peft"])
def test_a_server_gets_one_adapter_with_its_parents(
    target: str, adapters: Any, put: Any, tmp_path: Path
) -> None:
    one = put("1")
    two = put("2", parents=(one,), parent_scales={one: 0.5}, view="nf4")
    words = ["export", "2", "--format", target, "--out"]
    made = adapters(*words, tmp_path / "a", "--base-name", "my/base", "--json").json
    assert made["table"] == [{"name": one, "scale": 0.5}, {"name": two, "scale": 1.0}]
    assert (made["name"], made["format"], made["rank"]) == (two, target, 4)
    assert "my/base" in made["command"]
    config = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    assert config["base_model_name_or_path"] == "my/base"
    assert any("nf4" in note for note in made["notes"])
    folder = tmp_path / "store" / "adapters"
    assert same(
        updates(Path(made["path"])), summed(updates(folder / one, 0.5), updates(folder / two))
    )
    plain = adapters(*words, tmp_path / "b")
    assert plain.out.strip() == str(tmp_path / "b")
    assert f"Summed with {one}" in plain.err
    config = json.loads((tmp_path / "b" / CONFIG_NAME).read_text())
    assert config["base_model_name_or_path"] == "org/tiny"


def test_peft_gets_the_files_as_they_are(adapters: Any, put: Any, tmp_path: Path) -> None:
    slug = put("1")
    made = adapters("export", "1", "--out", tmp_path / "x", "--format", "peft", "--json").json
    assert made == {"name": slug, "path": str(tmp_path / "x"), "format": "peft"}
    stored = tmp_path / "store" / "adapters" / slug
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "x" / name).read_bytes() == (stored / name).read_bytes()


def test_exports_that_are_refused(adapters: Any, put: Any, tmp_path: Path) -> None:
    put("1")
    out = ["--out", tmp_path / "x"]
    refused(adapters("export", "1", *out, "--base-name", "b"), "for servers")
    refused(adapters("export", "1", *out, "--format", "gguf"), "gguf")
    vllm = ["export", "1", "--format", "vllm"]
    refused(adapters(*vllm, *out, "--base-name", ""), "--base-name")
    refused(adapters(*vllm, "--out", tmp_path / "store"), "exists already")
    adapters("quarantine", "1", "--reason", "doubt")
    refused(adapters(*vllm, *out), "is quarantined")
    assert not (tmp_path / "x").exists()


def test_quarantine_and_release(adapters: Any, put: Any, tmp_path: Path) -> None:
    one, two = put("1"), put("2")
    adapters("activate", "1", "2")
    ran = adapters("quarantine", "1", "--reason", "disputed", "--json").json
    assert (ran["active"], ran["changed"]) == ([two], {one: "quarantined"})
    entry = adapters("log", "--json").json["table"][-1]
    assert (entry["name"], entry["reason"]) == ("quarantine", "disputed")
    refused(adapters("activate", "1"), "is quarantined")
    refused(adapters("quarantine", "1", "--reason", "again"), "already", "release")
    assert adapters("release", "1", "--json").json["changed"] == {one: "reverted"}
    refused(adapters("release", "1"), "is reverted, not quarantined")
    refused(adapters("quarantine", "1"), "--reason")
    would = adapters("remove", "1", "--dry-run", "--json").json
    assert (would["removed"], would["dry_run"]) == (False, True)
    assert statuses(adapters) == {one: "reverted", two: "active"}


def test_what_is_damaged_can_be_quarantined_but_not_released(
    adapters: Any, put: Any, tmp_path: Path
) -> None:
    slug = put("1")
    manifest = tmp_path / "store" / "adapters" / slug / "forget_manifest.json"
    manifest.write_text("{")
    assert adapters("quarantine", slug, "--reason", "torn").code == 0
    refused(adapters("release", slug), "not as recorded", code=1)
    assert statuses(adapters) == {slug: "quarantined"}


@pytest.mark.parametrize("action", [["revert", "1"], ["quarantine", "1", "--reason", "doubt"]])
def test_children_that_became_stale_are_named(action: list[str], adapters: Any, put: Any) -> None:
    one = put("1")
    two = put("2", parents=(one,))
    three = put("3", parents=(one, two))
    four = put("4")
    adapters("activate", "1", "2", "3", "4")
    ran = adapters(*action)
    assert ran.code == 0
    for child in (two, three):
        (line,) = [text for text in ran.err.splitlines() if f"Warning: {child}" in text]
        assert f"on top of {one}" in line
        assert "needs re-evaluation" in line
    assert f"Warning: {four}" not in ran.err


def test_json_lists_what_became_stale(adapters: Any, put: Any) -> None:
    one = put("1")
    two = put("2", parents=(one,))
    adapters("activate", "1", "2")
    assert adapters("revert", "1", "--json").json["stale"] == [two]
    assert adapters("activate", "1", "--json").json["stale"] == []
    weaker = adapters("activate", "1", "--scales", "0.5")
    assert f"{two} was trained on another stack" in weaker.err


def test_a_merge_from_the_4_bit_view(run: Any, put: Any, tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from safetensors.numpy import load_file

    trained, other = put("1", view="nf4"), put("2")
    words = ["merge", "--store", tmp_path / "store", "--base", tiny_base, "--adapters"]
    plain = run(*words, "1", "--out", tmp_path / "plain", "--json")
    assert plain.json["merge"]["from_4bit_view"] is False
    assert f"{trained} was trained on the base as nf4" in plain.err
    viewed = run(*words, "1", "--out", tmp_path / "viewed", "--from-4bit-view", "--json")
    assert viewed.json["merge"]["from_4bit_view"] is True
    assert "not recorded" not in viewed.err
    assert "4-bit (nf4) view" in (tmp_path / "viewed" / "README.md").read_text()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "viewed"))
    moved = {name for name in one if not np.array_equal(one[name], two[name])}
    assert {name.split(".")[-2] for name in moved} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    ran = run(*words, "2", "--out", tmp_path / "warned", "--from-4bit-view")
    assert f"{other} is not recorded as trained on the 4-bit view" in ran.err
    both = run(*words, "1", "--out", tmp_path / "no", "--from-4bit-view", "--load-in-4bit")
    refused(both, "never merged into 4-bit weights")


class Hub:
    """Stands in for `HfApi`: repositories are folders."""

    root: Path

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        (self.root / repo).mkdir(parents=True, exist_ok=True)
        (self.root / repo / ".private").write_text(str(private))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        for path in folder_path.iterdir():
            shutil.copy(path, self.root / repo_id / path.name)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo: str, *, revision: Any, allow_patterns: list[str]) -> str:
        assert revision in (None, "v1")
        assert allow_patterns == [CONFIG_NAME, WEIGHTS_NAME]
        if not (self.root / repo).is_dir():
            raise OSError("404 for hf_SECRETtoken123 with Bearer hf_SECRETtoken123")
        return str(self.root / repo)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Hub.root = tmp_path / "hub"
    Hub.root.mkdir()
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_SECRETtoken123")
    return Hub.root


def test_an_adapter_is_pushed_with_its_card_and_pulled_back(
    adapters: Any, put: Any, hub: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from adapters.store.store import AdapterStore

    slug = put("1")
    store = AdapterStore.open(tmp_path / "store")
    store.attach_eval(slug, "forget05-tofu", {"forget_quality": 0.5, "limit": None})
    store.attach_eval(slug, "forget10-tofu", {"forget_quality": 0.9, "limit": 3})
    ran = adapters("push", "1", "me/forgets", "--private", "--json")
    assert ran.json == {
        "name": slug,
        "repo": "me/forgets",
        "url": "https://hub/me/forgets/commit/1",
    }
    there = hub / "me" / "forgets"
    assert {path.name for path in there.iterdir()} == {
        CONFIG_NAME, WEIGHTS_NAME, "README.md", ".private",
    }  # fmt: skip
    assert (there / ".private").read_text() == "True"
    card = (there / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["library_name"]) == ("org/tiny", "peft")
    (result,) = front["model-index"][0]["results"]  # a limited evaluation is left out
    assert result["metrics"] == [{"type": "forget_quality", "value": 0.5}]
    other = tmp_path / "other"
    words = ["pull", "me/forgets", "--base", tiny_base, "--adapter-revision", "v1", "--json"]
    pulled = adapters(*words, store=other).json
    own = tmp_path / "store" / "adapters" / slug / WEIGHTS_NAME
    assert (Path(pulled["path"]) / WEIGHTS_NAME).read_bytes() == own.read_bytes()


def test_what_cannot_be_pushed_or_pulled_is_refused_without_the_token(
    adapters: Any, put: Any, hub: Path, tiny_base: Path
) -> None:
    one = put("1")
    put("2", parents=(one,))
    refused(adapters("push", "2", "me/x"), "on top of", "combine")
    refused(adapters("push", "1", "x"), "not the name of a repository", "OWNER/NAME")
    ran = adapters("pull", "me/none", "--base", tiny_base)
    refused(ran, "404 for [token]", "hf auth login")
    assert "SECRET" not in ran.err
    (hub / "me" / "empty").mkdir(parents=True)
    refused(adapters("pull", "me/empty", "--base", tiny_base), "holds no")
