"""A store that release 0.1 wrote, see store-0.1/README.txt: this release reads and uses it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from adapters.base.fingerprint import fingerprint_base
from adapters.base.load import BaseSpec, load_base
from adapters.lora.stack import load_stack, read_state
from adapters.store.store import AdapterStore

WRITTEN = Path(__file__).parent / "store-0.1"
TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9]])


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(WRITTEN, tmp_path / "old"))
    (folder / "key").chmod(0o600)
    monkeypatch.setenv("UNLEARNER_KEY", str(folder / "key"))
    return folder


def test_it_opens_and_verifies(old: Path) -> None:
    store = AdapterStore.open(old / "store")
    assert [(a.slug[:5], a.status, a.scale) for a in store.list()] == [
        ("r0001", "active", 1.0),
        ("r0002", "active", 0.5),
        ("r0003", "reverted", None),
    ]
    results = store.verify(base=fingerprint_base(old / "tiny-base"))
    assert [(result.slug[:5], result.problems) for result in results] == [
        ("r0001", ()),
        ("r0002", ()),
        ("r0003", ()),
    ]
    assert store.verify_log().ok
    assert len(store.log()) == 8
    assert set(store.evals("r0002")) == {"own-rows-tofu"}


def test_its_stack_runs_and_changes(old: Path) -> None:
    store = AdapterStore.open(old / "store")
    base = load_base(BaseSpec(str(old / "tiny-base"), device="cpu"))
    with torch.no_grad():
        bare = base(TOKENS).logits
        model = load_stack(base, store)
        assert [name[:5] for name in read_state(model).active] == ["r0001", "r0002"]
        assert not torch.equal(model(TOKENS).logits, bare)
    store.activate(["r0003"])
    assert [active.slug[:5] for active in store.active()] == ["r0001", "r0002", "r0003"]
    store.revert("r0001")
    assert store.get("r0002").status == "stale"
    store.deactivate_all()
    assert store.verify_log().ok


def test_it_takes_adapters_of_this_release(old: Path) -> None:
    store = AdapterStore.open(old / "store")
    summed = store.combine(["r0001", "r0002"], {"r0002": 0.5}, label="both")
    imported = store.import_folder(store.get("r0003").path, old / "tiny-base")
    assert [summed.slug[:5], imported.slug[:5]] == ["r0004", "r0005"]
    assert all(result.ok for result in store.verify(base=fingerprint_base(old / "tiny-base")))
    assert AdapterStore.open(old / "store").activate(["r0004"]).stack[-1].slug == summed.slug
