"""The same commands in two processes that share one job: one result."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.ui.conftest import Ran

ROOT = Path(__file__).resolve().parents[3]
# A thread of the group that outlives the job now and then aborts its process at the end of the
# interpreter.
RUN = """
import os, sys
from ui.cli.main import main

code = main(sys.argv[1:])
here, threads = "/proc/self/task", []
for thread in os.listdir(here) if os.path.isdir(here) else []:
    try:
        threads.append(open(f"{here}/{thread}/comm").read())
    except OSError:  # it ended meanwhile
        pass
assert not any("gloo" in thread for thread in threads), threads
sys.exit(code)
"""


def rank_of_job(
    rank: int, processes: int, port: int, words: Sequence[str], home: Path, streams: Path
) -> None:
    """What a launcher's process does, in a forked one that has imported everything already."""
    from accelerate.state import AcceleratorState

    from ui.cli.main import main

    AcceleratorState._reset_state(True)  # of tests before this one, in the process that forked
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        UNLEARNER_KEY=str(home / "key"), UNLEARNER_CACHE=str(home / "cache"),
    )  # fmt: skip
    with (streams / f"{rank}.out").open("w") as out, (streams / f"{rank}.err").open("w") as err:
        sys.stdout, sys.stderr = out, err
        try:
            code = main(words)
        except BaseException:
            traceback.print_exc()
            code = 1
        out.flush()
        err.flush()
        os._exit(code)


def launch(processes: int, *words: object, home: Path) -> Ran:
    """`unlearner WORDS` in so many processes that talk through gloo; what they wrote together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home.mkdir(exist_ok=True)
    streams = home / f"streams-{port}"
    streams.mkdir()
    fork = multiprocessing.get_context("fork")
    given = processes, port, [str(word) for word in words], home, streams
    ranks = [fork.Process(target=rank_of_job, args=(rank, *given)) for rank in range(processes)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(120)
        if each.is_alive():
            each.kill()
            each.join()
    out, err = (
        "".join((streams / f"{rank}.{name}").read_text() for rank in range(processes))
        for name in ("out", "err")
    )
    return Ran(max((abs(each.exitcode or 0) for each in ranks), default=0), out, err)


def torchrun(processes: int, *words: object, home: Path) -> Ran:
    """`unlearner WORDS` as torchrun starts it."""
    home.mkdir(exist_ok=True)
    script = home / "run.py"
    script.write_text(RUN)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "UNLEARNER_KEY": str(home / "key"), "UNLEARNER_CACHE": str(home / "cache"),
    }  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone",
             "--nproc-per-node", str(processes), str(script)]  # fmt: skip
    run = subprocess.run(
        [*start, *(str(word) for word in words)],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment,
    )  # fmt: skip
    return Ran(run.returncode, run.stdout, run.stderr)


def figures(ran: Ran) -> Any:
    assert ran.code == 0, ran.err[-3000:]
    return ran.json


@pytest.fixture(autouse=True)
def _short_runs(shorten_answers: Any, ask_less: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_answers(monkeypatch)  # forked processes inherit both
    ask_less(monkeypatch)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("forget", 7), ("keep", 9)):
        rows = [
            {
                "question": f"Who wrote {name} {i}?",
                "answer": f"Mira wrote number {i} " * (i % 3 + 1),
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.mark.parametrize(
    "objective", ["simnpo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("rmu", "npo"))]
)
def test_two_processes_train_the_adapter_of_one(
    objective: str, tiny_base: Path, files: Path, tmp_path: Path
) -> None:
    """Largest difference of a weight 1e-5 of .02 after six SGD steps of seven pairs."""
    from safetensors.torch import load_file

    weights = []
    rate = {"simnpo": "0.5", "npo": "0.02", "rmu": "0.02"}[objective]
    for processes in (1, 2):
        store = tmp_path / f"store-{processes}"
        made = figures(
            launch(
                processes, "forget", files / "forget.jsonl", "--retain", files / "keep.jsonl",
                "--base", tiny_base, "--store", store, "--objective", objective, "--optim", "sgd",
                "--learning-rate", rate, "--num-train-epochs", "6", "--warmup-ratio", "0",
                "--lora-r", "4", "--per-device-train-batch-size", "2", "--retain-weight", "1",
                "--json",
                home=tmp_path / str(processes),
            )
        )  # fmt: skip
        shown = figures(launch(1, "adapters", "show", made["name"], "--store", store, "--json",
                               home=tmp_path / str(processes)))  # fmt: skip
        assert shown["manifest"]["train"]["processes"] == processes
        assert len(list((store / "adapters").iterdir())) == 1
        weights.append(load_file(Path(made["path"]) / "adapter_model.safetensors"))
    one, two = weights
    moved = max(float(w.abs().max()) for name, w in one.items() if "lora_B" in name)
    gap = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert moved > 1e-3
    assert gap < 1e-4 * moved + 1e-7


def test_two_processes_measure_what_one_measures(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """Three rows a set, of which one of four processes gets none: every row exactly once."""
    found = []
    for processes in (1, 4):
        out = tmp_path / str(processes)
        words = ["--base", tiny_base, "--adapters", "none", "--data", data, "--split", "forget05"]
        run = launch(processes, "evaluate", *words, "--out", out, "--json", home=tmp_path)
        found.append(figures(run))
        log = json.loads((out / "eval_log.json").read_text())
        assert {name: len(part["rows"]) for name, part in log["sets"].items()} == {
            "forget": 3, "retain": 3, "real_authors": 3, "world_facts": 3,
        }  # fmt: skip
    import copy

    for other in found[1:]:
        assert other["model_utility"] == pytest.approx(found[0]["model_utility"], rel=1e-5)
        for mine, theirs in zip(copy.deepcopy(found[0]["table"]), other["table"], strict=True):
            assert mine.pop("name") == theirs.pop("name")
            assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("start", [launch, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_an_error_is_said_once(start: Any, tiny_base: Path, tmp_path: Path) -> None:
    run = start(2, "forget", tmp_path / "none.jsonl", "--base", tiny_base, home=tmp_path)
    assert run.code != 0
    assert run.err.count("does not exist") == 1


def test_two_processes_finetune_and_write_one_model(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    """TRL under DDP; FSDP takes the same way with accelerate's own settings."""
    from transformers import AutoModelForCausalLM

    for name in ("full", "retain95"):
        rows = (data / "forget05_perturbed.json").read_text()
        (tmp_path / f"{name}.json").write_text(rows)
    out = tmp_path / "origin"
    words = ["--kind", "origin", "--base", tiny_base, "--data", tmp_path, "--out", out]
    figures(launch(2, "finetune", *words, "--num-train-epochs", "2", "--json", home=tmp_path))
    model = AutoModelForCausalLM.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert model.lm_head.weight.ne(before.lm_head.weight).any()
