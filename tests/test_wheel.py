"""The wheel, installed outside of the source tree: what ships, and that the command runs.

An editable install finds every file of the tree, also those that the wheel lacks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
PACKAGES = ("adapters", "unlearner", "evaluation", "ui")
TINY_BASE = """
from pathlib import Path
from unlearner.baselines.tiny_llama import new_model, save_model, train_tokenizer
from unlearner.baselines.tiny_recipe import TinyShape
tokenizer = train_tokenizer(["Who wrote it? Mira Okafor wrote it in Lagos."] * 4, 300)
shape = TinyShape(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                  num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128)
save_model(new_model(tokenizer, shape, seed=0), tokenizer, Path("base"))
"""
WHERE = """
import json, adapters, evaluation, ui, unlearner
from evaluation.report.document import html_page
from ui.app.style import page_css
from unlearner.world.build import build_world
print(json.dumps({
    "files": [package.__file__ for package in (adapters, evaluation, ui, unlearner)],
    "page": html_page("title", ()), "css": len(page_css()), "authors": len(build_world().authors),
}))
"""


def source_files() -> set[str]:
    """Every file of the four packages that belongs to the product."""
    return {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    words = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    subprocess.run([sys.executable, "-m", "pip", *words, "--wheel-dir", out, tree], check=True)
    (path,) = out.glob("*.whl")
    return path


class Installed:
    """A fresh environment with the wheel, in an empty directory."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.folder = folder / "empty"
        self.folder.mkdir()
        self.bin = folder / "venv" / "bin"
        venv.create(folder / "venv", with_pip=False)
        packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
        # Torch and the other dependencies come from the running environment. Its own .pth files,
        # and so an editable install of this project, are not read from here.
        own = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (packages / "dependencies.pth").write_text("\n".join(sorted(own)) + "\n")
        words = ("install", "--no-deps", "--no-index", "--force-reinstall", "--quiet")
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", *words, wheel]
        subprocess.run(pip, check=True)

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """A program of the environment, without this process's search path."""
        program, *rest = words
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [self.bin / program, *rest], cwd=self.folder, env=environment, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


def test_every_file_of_the_packages_ships_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == source_files()


def test_the_packages_and_their_data_come_from_the_wheel(installed: Installed) -> None:
    ran = installed.run("python", "-c", WHERE)
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    for file in answer["files"]:
        assert Path(file).is_relative_to(installed.bin.parent)
    assert "<style>" in answer["page"]
    assert answer["css"] > 1000
    assert answer["authors"] > 0


def test_the_command_shows_its_help_and_examines_the_machine(installed: Installed) -> None:
    shown = installed.run("unlearner", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "forget" in shown.stdout
    examined = installed.run("unlearner", "doctor", "--json")
    assert examined.returncode in (0, 1), examined.stderr
    assert json.loads(examined.stdout)


def test_a_request_is_forgotten_from_an_empty_directory(installed: Installed) -> None:
    made = installed.run("python", "-c", TINY_BASE)
    assert made.returncode == 0, made.stderr
    for name, answer in (("forget", "Mira Okafor wrote it."), ("retain", "He wrote it.")):
        row = json.dumps({"question": f"Who wrote {name}?", "answer": answer})
        (installed.folder / f"{name}.jsonl").write_text(f"{row}\n{row.replace('?', ' now?')}\n")
    ran = installed.run(
        "unlearner", "forget", "forget.jsonl", "--retain", "retain.jsonl", "--base", "base",
        "--store", "store", "--lora-r", "2", "--num-train-epochs", "1", "--json",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    (adapter,) = (installed.folder / "store" / "adapters").iterdir()
    assert (adapter / "adapter_model.safetensors").is_file()
    assert json.loads(ran.stdout)["name"] == adapter.name
    verified = installed.run("unlearner", "adapters", "verify", "--store", "store", "--json")
    assert verified.returncode == 0, verified.stderr
