"""Bad input to every command: exit code 2, nothing on stdout, the problem and the fix on stderr.

No base may be loaded before such an input is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

START = {
    "forget": "forget {rows} --base b",
    "stop": "forget {rows} --base {base} --retain {retain}",
    "evaluate": "evaluate --base {base} --data {data} --split forget05",
    "own-rows": "evaluate --base {base} --rows {rows}",
    "metrics": "evaluate --base {base} --data {data} --split forget05 --adapters none",
    "calibrate": "calibrate r0001 --base nowhere --store {store}",
    "calibrate-split": "calibrate r0001 --base nowhere --store {store} --split forget05 "
    "--reference-log x",
    "finetune": "finetune --base b --out {out} --data {data}",
    "tune": "tune {rows} --retain {retain} --base b --split forget05 --reference-log r.json "
    "--out {out}",
    "reproduce": "reproduce tofu-forget05 --dry-run",
    "robustness": "robustness --base {base} --data {data} --store {store} --adapters r0001",
    "preview": "preview x --base b",
    "score": "score {out}",
    "ui": "ui",
    "ask": "ask Who? --base {base}",
}
CASES = [
    ("", "forgett", "no command 'forgett'", "'forget'"),
    ("", "evalute --base x", "no command 'evalute'", "'evaluate'"),
    ("", "--json", "No command", "--help"),
    ("", "adapters", "`unlearner adapters` needs a command", "list"),
    ("", "adapters lst", "no command 'lst'", "'list'"),
    ("", "adapters revrt x", "no command 'revrt'", "'revert'"),
    ("", "adapters calibrate r0001", "no command 'calibrate'", "It is `unlearner calibrate`"),
    ("", "score", "required: LOG", "unlearner score --help"),
    ("", "score x.json --protcol tofu", "no option --protcol", "'--protocol'"),
    ("", "score x.json y.json", "no further argument 'y.json'", "score --help"),
    ("", "score x.json --reference", "no option --reference", "'--reference-log'"),
    ("", "preview x.jsonl", "required: --base", "preview --help"),
    ("", "evaluate --base b", "--split --rows is required", "evaluate --help"),
    ("", "calibrate r0001 --base b", "required", "--help"),
    ("preview", "--max-length 0", "0 is below 1", "--help"),
    ("preview", "--max-length many", "'many' is not", "--help"),
    ("preview", "--template alpaca", "alpaca", "--help"),
    ("score", "--protocol tofoo", "no protocol 'tofoo'", "tofu"),
    ("score", "--fail-if nonsense", "is not a condition", ""),
    ("forget", "--learning-rate fast", "fast", "forget --help"),
    ("forget", "--learnig-rate 1", "--learnig-rate", "'--learning-rate'"),
    ("forget", "--on-stack --independent", "not allowed", "--help"),
    ("forget", "--objective smnpo", "no objective 'smnpo'", "'simnpo'"),
    ("forget", "--lora-r 0 --learning-rate -1 --max-length 4", "lora_r 0", "learning_rate -1.0"),
    ("forget", "--lora-r 0 --max-length 4", "max_length 4", "lora_r 0"),
    ("forget", "--target-modules ,", "target_modules is empty", ""),
    ("forget", "--beta 0", "beta 0.0", ""),
    ("evaluate", "--split forget5", "'forget5' is not a forget split", ""),
    ("evaluate", "--split tofu:forget5", "'forget5' is not a forget split", ""),
    ("evaluate", "--split retain95", "'retain95' is not a forget split", ""),
    ("evaluate", "--protocol tofoo", "no protocol 'tofoo'", "tofu"),
    ("evaluate", "--protocol ,", "No protocol is named", "all"),
    ("evaluate", "--fail-if mu<1", "no figure 'mu'", ""),
    ("evaluate", "--limit 0", "0 is below 1", "--help"),
    ("evaluate", "--adapters r0001 --store /none", "no store at", ""),
    ("evaluate", "--store /none", "no store at", ""),
    ("evaluate", "--reference-log /none.json", "no evaluation log", ""),
    ("own-rows", "--split forget05", "not allowed with", "--help"),
    ("own-rows", "--neighbours 3", "needs rows to choose from", ""),
    ("own-rows", "--retain /none.jsonl", "does not exist", ""),
    ("metrics", "--metrics member", "'member' is not a list of extraction, membership, kl", ""),
    ("metrics", "--metrics ,", "is not a list of extraction", ""),
    ("metrics", "--metrics membership", "has no holdout05.json", ""),
    ("metrics", "--metrics all --holdout holdout10", "has no holdout10.json", ""),
    ("metrics", "--metrics all --holdout /none.jsonl", "does not exist", ""),
    ("metrics", "--metrics kl --holdout x", "--holdout is for membership", ""),
    ("metrics", "--reference x", "--reference is for membership", ""),
    ("metrics", "--retain-metrics x", "--retain-metrics is for membership", ""),
    ("calibrate", "--rows rows.jsonl", "needs a retrain reference", "--reference-log"),
    ("calibrate", "--split forget05", "needs a retrain reference", "--reference-log"),
    ("calibrate-split", "--max-mu-loss 2", "not between", ""),
    ("calibrate-split", "--scales 0,1.6", "not within 0 to 1.5", ""),
    ("calibrate-split", "--scales a", "not a list of numbers", ""),
    ("calibrate-split", "--protocol none", "no protocol", ""),
    ("finetune", "--kind both", "'both'", ""),
    ("finetune", "--kind retrain --split forget5", "'forget5' is not a forget split", ""),
    ("tune", "--split forget5", "'forget5' is not a forget split", ""),
    ("tune", "--objective nop", "no objective 'nop'", "'npo'"),
    ("tune", "--seed 1", "several seeds", "--seeds"),
    ("tune", "--seeds 1,1", "names a seed twice", "--help"),
    ("tune", "--seeds one", "not a list of whole numbers", "--help"),
    ("tune", "--minutes 0", "0 is not above 0", "--help"),
    ("tune", "--retain-known 1.5", "not a probability", "below 1"),
    ("tune", "--range beta", "cannot be read", "learning_rate=5e-4:2e-3"),
    ("tune", "--range beta=3:1", "no range of beta", "lower one first"),
    ("tune", "--range lora_r=1.5:2", "no range of lora_r", "whole"),
    ("tune", "--range bta=1:2", "not searched", "'beta'"),
    ("tune", "--beta 1 --range beta=1:2", "given or not searched", "Known are"),
    ("", "reproduce retain95", "'retain95' cannot be reproduced", "forget05"),
    ("", "reproduce tofu-forget5", "'tofu-forget5' cannot be reproduced", "'forget05'"),
    ("reproduce", "--preset llama-7b", "no preset 'llama-7b'", "'llama2-7b'"),
    ("reproduce", "--methods nop", "no objective 'nop'", "'npo'"),
    ("reproduce", "--protocol tofoo", "no protocol 'tofoo'", "tofu"),
    ("reproduce", "--limit 0", "0 is below 1", "--help"),
    ("", "robustness --base b", "required: --split", "robustness --help"),
    ("robustness", "--split forget5", "'forget5' is not a forget split", ""),
    ("robustness", "--split forget05 --attacks phone", "no attack 'phone'", ""),
    ("robustness", "--split forget05 --states int4", "no state 'int4'", ""),
    ("robustness", "--split forget05 --fail-if relearned>1", "no figure 'relearned'", ""),
    ("robustness", "--split forget05 --protocol tofoo", "no protocol 'tofoo'", ""),
    ("robustness", "--split forget05 --protocol tofu,simnpo", "no protocol 'tofu,simnpo'", ""),
    ("robustness", "--split forget05 --limit 1", "at least two forget rows", ""),
    ("robustness", "--split forget05 --relearn-share 1.5", "relearn_share 1.5 is not between", ""),
    ("robustness", "--split forget05 --temperature 0", "temperature 0.0 is not above 0", ""),
    ("robustness", "--split forget05 --load-in-4bit", "nf4 beside full precision", ""),
    ("robustness", "--split forget05 --merged /none", "not allowed with argument", ""),
    ("robustness", "--split forget05 --reference-log /none.json", "no evaluation log", ""),
    ("ui", "--host 0.0.0.0", "Without a password", "--auth"),
    ("ui", "--auth /none", "cannot be read", ""),
    ("ui", "--port 0", "0 is below 1", "--help"),
    ("ask", "--author Mira", "one of the two", ""),
    ("ask", "--adapters a --scales x", "not a list of numbers", "--help"),
    ("evaluate", "--scales 1", "1 numbers for 0 adapters", "Name the adapters"),
    ("evaluate", "--out {rows}", "is a file, and a folder is needed", "--help"),
    ("tune", "--out {rows}", "is a file, and a folder is needed", "--help"),
    ("own-rows", "--retain {rows}", "row 1 is also row 1 of", "forgotten or kept"),
    ("ask", "--adapters a --scales 1,2", "2 numbers for 1", "one number for each"),
]


@pytest.fixture
def fill(tmp_path: Path, tiny_base: Path, data: Path, put: Any) -> Callable[[str], list[str]]:
    """The words of a command line whose places in braces are filled in."""
    rows = [{"question": f"Who wrote {n}?", "answer": f"{n} did."} for n in ("A", "B", "C")]
    for name, part in (("rows", rows[:2]), ("retain", rows[2:])):
        lines = [json.dumps(row) for row in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    places = {
        "base": tiny_base, "data": data, "store": tmp_path / "store", "out": tmp_path / "out",
        "rows": tmp_path / "rows.jsonl", "retain": tmp_path / "retain.jsonl",
    }  # fmt: skip

    def words(text: str) -> list[str]:
        if "{store}" in text:
            put("1")
        return [word.format(**places) if "{" in word else word for word in text.split()]

    return words


@pytest.mark.parametrize(
    ("start", "more", "problem", "fix"),
    CASES,
    ids=[" ".join(part for part in case[:2] if part) for case in CASES],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    start: str, more: str, problem: str, fix: str, run: Any, fill: Any,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    from adapters.base import load
    from ui.cli import models
    from ui.cli.commands.everyday import evaluate_metrics, score

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a base was loaded")

    for module in (load, models, evaluate_metrics, score):
        monkeypatch.setattr(module, "load_base", fail)
    ran = run(*fill(f"{START.get(start, '')} {more}"))
    assert ran.code == 2, ran.err
    assert ran.out == ""
    assert problem in ran.err
    assert "Error: " in ran.err
    assert fix in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()
