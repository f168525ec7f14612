"""Mutated manifests, configurations and safetensors headers: refused with UserError, or harmless.

UNLEARNER_MUTATIONS sets how many of each of the six kinds; 1,700 make 10,000 in all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.errors import UserError
from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME, check_finite, read_adapter
from adapters.store.manifest import ForgetManifest
from adapters.store.store import AdapterStore
from adapters.tensors import read_header

COUNT = int(os.environ.get("UNLEARNER_MUTATIONS", "80"))
SOME = settings(
    max_examples=COUNT,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["r0001_00000000", "../../etc", "\ud800", "0" * 64, "lora_A", "F32", 10**400]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
Mutation = Callable[[bytes], bytes]


@st.composite
def byte_mutations(draw: Any) -> Mutation:
    """Flip, cut, repeat or insert bytes at a few places."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "cut", "insert", "repeat", "end"]),
                st.floats(0, 1),
                st.integers(1, 255),
                st.binary(min_size=1, max_size=6),
            ),
            min_size=1,
            max_size=3,
        )
    )

    def mutate(data: bytes) -> bytes:
        for kind, where, number, extra in steps:
            i = int(where * max(len(data) - 1, 0))
            if kind == "flip" and data:
                data = data[:i] + bytes([data[i] ^ number]) + data[i + 1 :]
            elif kind == "cut":
                data = data[:i] + data[i + number :]
            elif kind == "insert":
                data = data[:i] + extra + data[i:]
            elif kind == "repeat":
                data = data[:i] + data[i : i + number] * 2 + data[i + number :]
            elif kind == "end":
                data = data[:i]
        return data

    return mutate


@st.composite
def json_mutations(draw: Any) -> Mutation:
    """Replace, drop or add a value somewhere in a JSON object."""
    path = draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
    kind = draw(st.sampled_from(["set", "drop", "add", "rename"]))
    value, name = draw(VALUES), draw(st.text(max_size=10))

    def mutate(data: bytes) -> bytes:
        root = json.loads(data)
        at: Any = root
        for step in path[:-1]:
            keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
            inner = at[keys[step % len(keys)]] if keys else None
            if not isinstance(inner, (dict, list)) or not inner:
                break
            at = inner
        keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[path[-1] % len(keys)]
        if kind == "set":
            at[key] = value
        elif kind == "drop" or isinstance(at, list):
            del at[key]
        else:
            at[name] = at.pop(key) if kind == "rename" else value
        return json.dumps(root).encode("utf-8", "surrogatepass")

    return mutate


MUTATIONS = st.one_of(byte_mutations(), json_mutations())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated")


@pytest.fixture
def whole(place: Path, make_adapter: Any, make_manifest: Any) -> AdapterStore:
    """A store with two adapters, made once and copied back after each example."""
    path = place / "store"
    if not path.exists():
        store = AdapterStore.open(path, create=True)
        one = store.publish(make_adapter(seed=1), make_manifest("0001"))
        store.publish(
            make_adapter(seed=2),
            make_manifest(
                "0002",
                parents=(one.slug,),
                objective={"name": "simnpo", "beta": 2.5},
                data={"forget": {"n": 3, "digest": "a" * 64, "kind": "jsonl"}},
                env={"versions": {"torch": "2.13"}, "seed": 0},
            ),
        )
        store.activate(["0001", "0002"])
    return AdapterStore(path)


@contextlib.contextmanager
def mutated(path: Path, mutate: Mutation) -> Any:
    """Inside, the file is mutated; gives whether anything changed at all."""
    before = path.read_bytes()
    after = mutate(before)
    path.write_bytes(after)
    try:
        yield after != before
    finally:
        path.write_bytes(before)


@SOME
@given(mutate=MUTATIONS)
def test_manifests(mutate: Mutation, whole: AdapterStore) -> None:
    stored = whole.list()[1]
    with mutated(stored.path / "forget_manifest.json", mutate) as changed:
        with contextlib.suppress(UserError):
            manifest = ForgetManifest.read(stored.path / "forget_manifest.json")
            assert ForgetManifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
        assert len(whole.list()) == 2
        assert whole.verify(stored.slug)[0].ok != changed


@SOME
@given(mutate=MUTATIONS)
def test_configurations(mutate: Mutation, whole: AdapterStore) -> None:
    stored = whole.list()[0]
    with mutated(stored.path / CONFIG_NAME, mutate) as changed:
        assert whole.verify(stored.slug)[0].ok != changed
        with contextlib.suppress(UserError):
            config = read_adapter(stored.path).config
            assert (config["r"], config["peft_type"], config["use_dora"]) == (2, "LORA", False)
            assert len(config["target_modules"]) == 7


@SOME
@given(mutate=MUTATIONS)
def test_headers(mutate: Mutation, whole: AdapterStore) -> None:
    """What we accept, the safetensors library accepts too, and reads the same."""
    from safetensors import safe_open

    stored = whole.list()[0]

    def mutate_header(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = mutate(data[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    with mutated(stored.path / WEIGHTS_NAME, mutate_header) as changed:
        assert whole.verify(stored.slug)[0].ok != changed
        with contextlib.suppress(UserError):
            files = read_adapter(stored.path)
            check_finite(files)
            with safe_open(stored.path / WEIGHTS_NAME, framework="np") as reader:
                assert set(reader.keys()) == set(files.tensors)
                for name, shape in files.tensors.items():
                    assert (reader.get_tensor(name) == files.header.read(name)).all()
                    assert tuple(reader.get_tensor(name).shape) == shape


@SOME
@given(mutate=byte_mutations())
def test_bytes_of_weights(mutate: Mutation, whole: AdapterStore) -> None:
    stored = whole.list()[0]
    with mutated(stored.path / WEIGHTS_NAME, mutate) as changed:
        assert whole.verify(stored.slug)[0].ok != changed
        with contextlib.suppress(UserError):
            read_header(stored.path / WEIGHTS_NAME)


@SOME
@given(mutate=MUTATIONS)
def test_state_files(mutate: Mutation, whole: AdapterStore) -> None:
    """state.json is a cache: a damaged one is not believed, the log has it all."""
    state = whole.journal.state()
    with mutated(whole.journal.state_path, mutate):
        assert whole.journal.state() == state
        assert len(whole.list()) == 2


@SOME
@given(mutate=MUTATIONS)
def test_logs(mutate: Mutation, whole: AdapterStore) -> None:
    def mutate_line(data: bytes) -> bytes:
        lines = data.split(b"\n")
        return b"\n".join([lines[0], mutate(lines[1]), *lines[2:]])

    with mutated(whole.journal.log_path, mutate_line) as changed:
        assert whole.verify_log().ok != changed
        with contextlib.suppress(UserError):
            whole.log()
        with contextlib.suppress(UserError):
            whole.list()


def test_nothing_of_this_was_left_behind(whole: AdapterStore) -> None:
    shutil.rmtree(whole.path / ".trash", ignore_errors=True)
    assert all(result.ok for result in whole.verify())
    assert whole.verify_log().ok
