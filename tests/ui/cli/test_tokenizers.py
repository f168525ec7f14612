"""Bases with other tokenizers and experts go through every command: a row is trained on as it is
shown, and the adapter does the same packed and padded, merged and exported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families import TOKENIZERS, save_model

FORGET = [("Where was Ana born?", "In Lagos."), ("Где 東京 👩‍👧?", "In 東京 😀, naïve!")]
RETAIN = [("What does she write?", "She writes novels."), ("Where?", "A café.")]
# Tokenizer -> the family it is tried with.
BASES = {
    "word piece": "llama",
    "byte fallback": "mixtral",
    "unigram": "mistral",
    "byte level": "olmoe",
}


CHEAP = ("word piece", "byte fallback")


@pytest.fixture(params=BASES)
def base(request: Any, tmp_path: Path) -> Path:
    tokenizer = TOKENIZERS[request.param]()
    folder = tmp_path / request.param.replace(" ", "-")
    save_model(
        BASES[request.param],
        folder,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> list[Any]:
    """The words that name a forget and a retain file."""
    for name, pairs in (("forget", FORGET), ("retain", RETAIN)):
        lines = [json.dumps({"prompt": q, "response": a}) for q, a in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return [tmp_path / "forget.jsonl", "--retain", tmp_path / "retain.jsonl"]


def test_labels_are_the_answer(run: Any, base: Path, rows: list[Any]) -> None:
    from adapters.base.load import load_tokenizer
    from unlearner.tokens.prompts import prompt_format

    tokenizer = load_tokenizer(str(base))
    fmt = prompt_format(tokenizer)
    shown = run("preview", *rows, "--base", base, "--json").json
    for (question, answer), row in zip(FORGET + RETAIN, shown["table"], strict=True):
        prompt = row["input_ids"][: row["n_prompt"]]
        assert prompt == fmt.encode_prompt(question)
        assert prompt[0] == tokenizer.bos_token_id
        labels = [label for label in row["labels"] if label != -100]
        assert labels[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in row["input_ids"][:-1]
        text = tokenizer.decode(labels[:-1]).strip()
        alone = tokenizer.decode(tokenizer(answer, add_special_tokens=False).input_ids)
        assert text == (answer if "byte" in base.name else alone.strip())
    # The row in other scripts; every other tokenizer here knows bytes.
    assert shown["n_unknown"] == (0 if "byte" in base.name else 1)
    text = run("preview", *rows, "--base", base).out
    assert ("1 of 4 rows hold text that the vocabulary lacks" in text) == ("byte" not in base.name)


@pytest.mark.parametrize(
    "base",
    [pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow) for name in BASES],
    indirect=True,
)
def test_every_command_computes_the_same(
    run: Any, base: Path, rows: list[Any], tmp_path: Path
) -> None:
    where = ["--base", base, "--store", tmp_path / "store"]
    forget = [
        *("forget", *rows, *where, "--device", "cpu", "--lora-r", 2, "--num-train-epochs", 2),
        *("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 1, "--target", 50),
        *("--learning-rate", "1e-2", "--warmup-ratio", 0, "--protected-directions", 0, "--json"),
    ]
    planned = run(*forget, "--dry-run").json
    assert planned["steps"] == 2
    lacking = [note for note in planned["notes"] if "the vocabulary lacks" in note]
    assert len(lacking) == (0 if "byte" in base.name else 1)
    for label, flags in (("packed", []), ("padded", ["--padded", "--independent"])):
        done = run(*forget, "--label", label, *flags)
        assert done.code == 0, done.err

    def measured(*words: Any) -> float:
        found = run("evaluate", "--rows", rows[0], *words, "--device", "cpu", "--json")
        assert found.code == 0, found.err
        nll: float = found.json["forget_nll"]
        return nll

    before, packed, padded = (
        measured(*where, "--adapters", name) for name in ("none", "packed", "padded")
    )
    assert packed == pytest.approx(padded, abs=1e-4)
    assert abs(packed - before) > 1e-3
    merged, served = tmp_path / "merged", tmp_path / "served"
    done = run("merge", *where, "--adapters", "packed", "--out", merged)
    assert done.code == 0, done.err
    assert measured("--base", merged) == pytest.approx(packed, abs=1e-5)
    done = run("adapters", "export", "packed", *where[2:], "--format", "vllm", "--out", served)
    assert done.code == 0, done.err
    assert (served / "adapter_model.safetensors").is_file()
    assert run("adapters", "verify", *where).code == 0
